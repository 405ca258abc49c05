"""Which groups a step samples, commits and gives up: the decisions of dynamic sampling, without I/O or clock.

A sequential reading of Algorithm 1 would sample one prompt after the other until `wanted` groups have passed or
`budget` prompts are spent. A `Fill` commits exactly that, in whatever order responses come in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from dapo_mcore.algo.groups import commit_in_order
from dapo_mcore.rollout.pass_rate import ALL_BUT_CERTAIN, ELDEST, Alike, Outlook, age_at, chance
from dapo_mcore.types import Group, Prompt, Sample


@dataclass(slots=True)
class OpenGroup:
    """A group while it is sampled."""

    prompt: Prompt
    size: int  # responses asked for
    rate: float  # chance that it passes, before its first response
    samples: dict[int, Sample] = field(default_factory=dict)  # graded, by index
    age: int = 0  # of the longest of them

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
    alike: Alike
    groups: dict[int, OpenGroup] = field(default_factory=dict)  # by position, without gaps from `start` on
    verdicts: dict[int, bool] = field(default_factory=dict)  # position -> whether its group passes, once certain
    accepted: list[int] = field(default_factory=list)  # positions certain to be committed, ascending
    cursor: int = field(init=False)  # first position that is not certain to be read
    _spent: int = 0
    _outlook: Outlook = field(default_factory=Outlook)  # of the groups from the cursor on
    _is_outdated: bool = False  # that is
    _needless: int = 0  # of them, the last so many are needed for nothing, all but certainly

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
        self._look_ahead()
        return self._spent < self.budget and not self._outlook.suffices(self.wanted - len(self.accepted))

    def give_up(self) -> list[OpenGroup]:
        """Return the last prompts begun, unless they may still be needed (1 %); they can be begun again."""
        self._look_ahead()
        positions = range(self.next_position - self._needless, self.next_position)
        self._spent -= len(positions)
        for position in positions:
            self.verdicts.pop(position, None)
        self._is_outdated = bool(positions)
        return [self.groups.pop(position) for position in positions]

    def begin(self, prompt: Prompt, rate: float, free: bool = False) -> range:
        """Open the group of the prompt at `next_position`; the indices to sample."""
        assert prompt.uid == self.next_position
        self.groups[prompt.uid] = group = OpenGroup(prompt, self.group_size, rate)
        self._spent += not free
        self._outlook.add(rate)
        self._needless = 0
        self._decide(group)
        return range(group.size)

    def record(self, position: int, index: int, sample: Sample) -> range:
        """Take in a graded response; the indices to sample beyond those asked for so far."""
        group, before = self.groups[position], self.groups[position].size
        group.samples[index] = sample
        group.age = max(group.age, age_at(len(sample.response.token_ids)))
        self._is_outdated = True
        if position not in self.verdicts:
            self._decide(group)
        return range(before, group.size)

    def _decide(self, group: OpenGroup) -> None:
        """Pass, grow, fail, or wait for more responses."""
        passes = self.passes(group.close())
        if not passes and group.is_whole and group.size < self.max_samples:
            group.size = min(group.size + self.group_size, self.max_samples)
        elif passes or group.is_whole:
            self.verdicts[group.prompt.uid] = passes
            self._is_outdated = True
            self._read_on()

    def _read_on(self) -> None:
        commit = commit_in_order(self.verdicts, self.cursor, self.wanted - len(self.accepted))
        self.accepted += commit.accepted
        self.cursor = commit.cursor

    def _look_ahead(self) -> None:
        """How many of the groups from the cursor on will pass, and how many of them are enough."""
        if not self._is_outdated:
            return
        chances = [self._chance(position, age) for position, age in self._ages()]
        self._outlook, self._needless, self._is_outdated = Outlook.of(chances), 0, False
        without_last = Outlook.of(chances)
        while chances:
            without_last.remove(chances.pop())
            if not without_last.suffices(self.wanted - len(self.accepted), ALL_BUT_CERTAIN):
                break
            self._needless += 1

    def _ages(self) -> list[tuple[int, int]]:
        """How long the groups from the cursor on have been sampled for: as long as any that was begun later."""
        positions = range(self.next_position - 1, self.cursor - 1, -1)
        ages = accumulate((self.groups[position].age for position in positions), max)
        return list(zip(positions, ages, strict=True))[::-1]

    def _chance(self, position: int, age: int) -> float:
        """That a group passes; while it is undecided all of its responses look alike."""
        if position in self.verdicts:
            return float(self.verdicts[position])
        group = self.groups[position]
        has_grown = group.size > self.group_size
        return chance(group.rate, self.alike.share(len(group.samples), ELDEST if has_grown else age))
