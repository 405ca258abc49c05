"""The stream of training prompts: endless, shuffled epoch by epoch, addressed by position."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dapo_mcore.prompts.dataset import fingerprint
from dapo_mcore.types import Prompt


class PromptSource:
    """Position p holds prompt p mod N of epoch p div N, and becomes that prompt's uid.

    Reading does not consume: `peek` may run ahead of the position as far as it likes, `commit` moves it. What lies at a
    position depends on the prompts, the seed and the epoch alone.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("data.train: no prompts to draw from; give files with rows, or a task")
        self._prompts = prompts
        self._seed, self._shuffle = seed, shuffle
        self._position = 0
        self._orders: dict[int, list[int]] = {}  # of the epochs in reach of the position
        self._identity = {
            "prompts": len(prompts),
            "fingerprint": fingerprint(prompts),
            "seed": seed,
            "shuffle": shuffle,
        }

    @property
    def position(self) -> int:
        """The first position that is not consumed."""
        return self._position

    def peek(self, start: int, count: int) -> list[Prompt]:
        """The prompts at positions [start, start + count), consumed or not."""
        return [self._at(position) for position in range(start, start + count)]

    def commit(self, position: int) -> None:
        """Everything before `position` is consumed."""
        if position < self._position:
            raise ValueError(f"prompts up to {self._position} are consumed: the stream does not go back to {position}")
        self._position = position
        current = position // len(self._prompts)
        self._orders = {epoch: order for epoch, order in self._orders.items() if epoch >= current}

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"position": self._position, **self._identity}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            ValueError: the state belongs to other prompts or another order: its position would mean other prompts here.
        """
        options = {
            "prompts": "data.train",
            "fingerprint": "data.train",
            "seed": "trainer.seed",
            "shuffle": "data.shuffle",
        }
        for name, option in options.items():
            if state[name] != self._identity[name]:
                raise ValueError(
                    f"{option}: the checkpoint's prompt stream has {name}={state[name]}, this run has "
                    f"{self._identity[name]}; resume with the data and options of the checkpoint, or start anew with "
                    "trainer.resume_mode=disable"
                )
        self._position = state["position"]

    def _at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self._prompts))
        if epoch not in self._orders:
            self._orders[epoch] = self._order(epoch)
        return replace(self._prompts[self._orders[epoch][offset]], uid=position)

    def _order(self, epoch: int) -> list[int]:
        """Sorted by random(), the one draw whose sequence Python promises to keep from version to version."""
        rows = list(range(len(self._prompts)))
        if not self._shuffle:
            return rows
        draw = random.Random(f"{self._seed}/{epoch}").random
        keys = [draw() for _ in rows]
        return sorted(rows, key=keys.__getitem__)
