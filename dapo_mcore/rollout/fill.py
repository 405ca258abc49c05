"""Which groups a step samples, commits and gives up: the decisions of dynamic sampling, without I/O or clock.

A sequential reading of Algorithm 1 would sample one prompt after the other until `wanted` groups have passed or
`budget` prompts are spent. A `Fill` commits exactly that, in whatever order responses come in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dapo_mcore.algo.groups import commit_in_order
from dapo_mcore.rollout.pass_rate import Outlook, chance
from dapo_mcore.types import Group, Prompt, Sample


@dataclass(slots=True)
class OpenGroup:
    """A group while it is sampled."""

    prompt: Prompt
    size: int  # responses asked for
    rate: float  # chance that it passes, before its first response
    samples: dict[int, Sample] = field(default_factory=dict)  # graded, by index

    @property
    def is_whole(self) -> bool:
        return len(self.samples) == self.size

    def close(self) -> Group:
        return Group(self.prompt, tuple(self.samples[index] for index in sorted(self.samples)))


@dataclass(slots=True)
class Fill:
    """The groups of one step, from the first unread position of the prompt stream on.

    `passes` must be certain when it says yes: a group that passes goes on passing whatever is added to it. So it is
    known which groups are committed before their last responses are there, and what lies behind them can be given up.
    """

    start: int
    wanted: int
    budget: int  # prompts that may be begun, those begun for free not counted
    group_size: int
    max_samples: int  # a group without variance grows, by group_size, up to so many responses
    passes: Callable[[Group], bool]
    alike: Sequence[float]  # [k]: share of the passing groups whose first k responses have the same accuracy
    groups: dict[int, OpenGroup] = field(default_factory=dict)  # by position, without gaps from `start` on
    verdicts: dict[int, bool] = field(default_factory=dict)  # position -> whether its group passes, once certain
    decided_after: dict[int, int] = field(default_factory=dict)  # position -> responses graded when it passed
    accepted: list[int] = field(default_factory=list)  # positions certain to be committed, ascending
    cursor: int = field(init=False)  # first position that is not certain to be read
    _spent: int = 0
    _passed: int = 0
    _outlook: Outlook = field(default_factory=Outlook)  # of the undecided groups

    def __post_init__(self) -> None:
        self.cursor = self.start

    @property
    def next_position(self) -> int:
        """Of the first prompt that was not begun."""
        return self.start + len(self.groups)

    @property
    def is_determined(self) -> bool:
        """Whether it is certain which groups are committed."""
        exhausted = self._spent == self.budget and self.cursor == self.next_position
        return exhausted or len(self.accepted) == self.wanted

    @property
    def is_complete(self) -> bool:
        """Whether all of them are there, to the last response."""
        return self.is_determined and all(self.groups[position].is_whole for position in self.accepted)

    @property
    def considered(self) -> list[Group]:
        """What sequential sampling would have drawn; call when complete."""
        return [self.groups[position].close() for position in range(self.start, self.cursor)]

    @property
    def surplus(self) -> list[OpenGroup]:
        """What was begun behind the groups that are committed; call when determined."""
        return [self.groups[position] for position in range(self.cursor, self.next_position)]

    def wants_more(self) -> bool:
        """Whether to begin the next prompt: those begun may not fill the batch (90 % is enough)."""
        return self._spent < self.budget and not self._outlook.suffices(self.wanted - self._passed)

    def begin(self, prompt: Prompt, rate: float, free: bool = False) -> range:
        """Open the group of the prompt at `next_position`; the indices to sample."""
        assert prompt.uid == self.next_position
        self.groups[prompt.uid] = group = OpenGroup(prompt, self.group_size, rate)
        self._spent += not free
        self._outlook.add(self._chance(group))
        self._decide(group)
        return range(group.size)

    def record(self, position: int, index: int, sample: Sample) -> range:
        """Take in a graded response; the indices to sample beyond those asked for so far."""
        group, before = self.groups[position], self.groups[position].size
        if position in self.verdicts:
            group.samples[index] = sample
            return range(0)
        self._outlook.remove(self._chance(group))
        group.samples[index] = sample
        self._outlook.add(self._chance(group))
        self._decide(group)
        return range(before, group.size)

    def _decide(self, group: OpenGroup) -> None:
        """Pass, grow, fail, or wait for more responses."""
        passes = self.passes(group.close())
        if not passes and group.is_whole and group.size < self.max_samples:
            group.size = min(group.size + self.group_size, self.max_samples)
        elif passes or group.is_whole:
            self._outlook.remove(self._chance(group))
            self.verdicts[group.prompt.uid] = passes
            if passes:
                self.decided_after[group.prompt.uid] = len(group.samples)
            self._passed += passes
            self._read_on()

    def _read_on(self) -> None:
        commit = commit_in_order(self.verdicts, self.cursor, self.wanted - len(self.accepted))
        self.accepted += commit.accepted
        self.cursor = commit.cursor

    def _chance(self, group: OpenGroup) -> float:
        """That the group passes, while it is undecided: all of its responses look alike."""
        return chance(group.rate, self.alike[len(group.samples)])
