"""Objects sent between the ranks of the trainer, and failures that reach all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")

# A rank may wait for as long as the leader grades or another replica decodes. A rank that died closes its
# connection, which ends the wait at once.
PATIENCE = timedelta(days=1)


class RolloutError(RuntimeError):
    """Something failed on at least one rank. Raised on every rank, naming each rank that failed and why."""


def patient_group() -> dist.ProcessGroup:
    """All ranks of the torch.distributed world, by gloo: the world's own group gives up after half an hour.
    Collective.
    """
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))


@dataclass(frozen=True)
class Ranks:
    """The trainer's ranks, with rank 0 as the leader; a single process needs no torch.distributed."""

    rank: int
    size: int
    group: dist.ProcessGroup | None  # gloo, for decisions only; None: a single process

    @classmethod
    def world(cls) -> Ranks:
        """All ranks of the torch.distributed world, over a group of their own. Collective."""
        if not dist.is_initialized():
            return cls(0, 1, None)
        return cls(dist.get_rank(), dist.get_world_size(), patient_group())

    def scatter(self, items: Sequence[T] | None = None) -> T:
        """This rank's item of the leader's `items`, one per rank. The others pass nothing."""
        if self.group is None:
            assert items is not None
            return items[0]
        received: list[T | None] = [None]
        dist.scatter_object_list(received, list(items) if items is not None else None, src=0, group=self.group)
        return cast(T, received[0])

    def gather(self, item: T) -> list[T]:
        """Every rank's item, by rank, on the leader; an empty list elsewhere."""
        if self.group is None:
            return [item]
        items: list[T] = [item] * self.size if self.rank == 0 else []
        dist.gather_object(item, items or None, dst=0, group=self.group)
        return items

    def all_gather(self, item: T) -> list[T]:
        """Every rank's item, by rank, everywhere."""
        if self.group is None:
            return [item]
        items = [item] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; when it fails on one, raise on all.

        Ranks that talk to each other inside `action` must fail together there: a rank that waits for a failed one
        within vLLM's own collectives cannot be reached from here.

        Raises:
            RolloutError: with the number of each rank that failed and its reason.
        """
        result, failure, cause = None, "", None
        try:
            result = action()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait and must hear of it
            failure, cause = f"rank {self.rank}: {type(error).__name__}: {error}", error
        failures = list(filter(None, self.all_gather(failure)))
        if failures:
            raise RolloutError("; ".join(failures)) from cause
        return cast(T, result)
