from dapo_mcore.reward.errors import GradingError, VerifierError
from dapo_mcore.reward.pool import Grader

__all__ = ["Grader", "GradingError", "VerifierError"]
