"""What a caller did that would be an error, or silently wrong, on an NPU."""


class ContractError(AssertionError):
    pass


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise ContractError(rule)
