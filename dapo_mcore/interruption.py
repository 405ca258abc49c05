"""A run that is asked to end does so after the step that it is in, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

from dapo_mcore.rollout.leader import StopRun
from dapo_mcore.rollout.ranks import Ranks

SIGNAL = signal.SIGUSR1  # SIGTERM is what launchers end ranks with when another one has failed


class Interrupted(StopRun):
    """Somebody asked for the end; raised on every rank."""


class Interruption:
    """Takes note of a signal to any rank. What it interrupts goes on."""

    def __init__(self) -> None:
        """Collective."""
        self._ranks = Ranks.world()
        self._is_asked = False

    def listen(self) -> None:
        """Until then the signal ends the process, as it does by default: nothing is lost before the first step."""
        signal.signal(SIGNAL, self._note)
        signal.siginterrupt(SIGNAL, False)  # native code need not know of it

    def obey(self) -> None:
        """Collective. Raises Interrupted, on every rank, if any rank has got the signal."""
        if any(self._ranks.all_gather(self._is_asked)):
            raise Interrupted(f"{SIGNAL.name} asked for it; the same command goes on from here")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
