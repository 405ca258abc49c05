"""Responses that a step sampled and did not train on, kept for the next ones (rollout.staleness > 0)."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dapo_mcore.rollout.engine import Key
from dapo_mcore.types import FinishReason, Outcome, Response, Verdict


@dataclass(frozen=True, slots=True)
class Banked:
    response: Response  # with the log-probabilities of the weights that sampled it; may be cut
    verdict: Verdict | None = None  # None: not graded

    @property
    def is_cut(self) -> bool:
        return self.response.finish_reason is FinishReason.ABORTED


@dataclass(slots=True)
class Bank:
    """Holds responses of prompts that are not consumed, for at most `staleness` training steps; 0: holds nothing."""

    staleness: int
    entries: dict[Key, Banked] = field(default_factory=dict)
    terms: list[Any] = field(default_factory=list)  # what they were sampled under
    dropped_tokens: int = 0  # since it was opened: what was sampled and is used for nothing
    expired_groups: int = 0  # as `open` found them

    @property
    def num_groups(self) -> int:
        """Groups of which anything is held."""
        return len({uid for uid, _ in self.entries})

    def keep(self, key: Key, banked: Banked) -> None:
        if self.staleness:
            self.entries[key] = banked
        else:
            self.dropped_tokens += len(banked.response.token_ids)

    def take(self, key: Key) -> Banked | None:
        return self.entries.pop(key, None)

    def holds_group(self, uid: int, size: int) -> bool:
        """Whether the first `size` responses of a prompt are here, graded."""
        found = [self.entries.get((uid, index)) for index in range(size)]
        return all(banked is not None and banked.verdict is not None for banked in found)

    def open(self, version: int, terms: list[Any]) -> None:
        """Begin a step: drop what is too old for it, or was sampled under other `terms`.

        Terms are plain values, such as group size and temperature. The age counts from a response's first token.
        """
        oldest = version - self.staleness if terms == self.terms else version + 1
        expired = {key: banked for key, banked in self.entries.items() if banked.response.version < oldest}
        self.entries = {key: banked for key, banked in self.entries.items() if key not in expired}
        self.dropped_tokens = sum(len(banked.response.token_ids) for banked in expired.values())
        self.expired_groups = len({uid for uid, _ in expired})
        self.terms = terms

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        entries = [[*key, _plain(banked)] for key, banked in self.entries.items()]
        return {"terms": self.terms, "entries": entries}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.terms = list(state["terms"])
        self.entries = (
            {(uid, index): _banked(plain) for uid, index, plain in state["entries"]} if self.staleness else {}
        )


def _plain(banked: Banked) -> dict[str, Any]:
    response = banked.response
    return {
        "token_ids": _packed(array("i", response.token_ids)),
        "logprobs": _packed(array("d", response.logprobs)),
        "text": response.text,
        "finish_reason": response.finish_reason,
        "version": response.version,
        "continued": response.continued,
        "verdict": banked.verdict and asdict(banked.verdict),
    }


def _banked(plain: Mapping[str, Any]) -> Banked:
    verdict = plain["verdict"]
    response = Response(
        token_ids=tuple(_unpacked("i", plain["token_ids"])),
        logprobs=tuple(_unpacked("d", plain["logprobs"])),
        text=plain["text"],
        finish_reason=FinishReason(plain["finish_reason"]),
        version=plain["version"],
        continued=tuple((position, version) for position, version in plain["continued"]),
    )
    return Banked(response, verdict and replace(Verdict(**verdict), outcome=Outcome(verdict["outcome"])))


def _packed(values: array[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _unpacked(kind: str, text: str) -> array[Any]:
    values = array(kind)
    values.frombytes(base64.b64decode(text))
    return values
