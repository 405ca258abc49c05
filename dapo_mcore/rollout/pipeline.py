"""Requests in, graded samples out, as they come: a response is graded while others are still sampled."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dapo_mcore.rollout.engine import Decoder, Key, Request, Sampling
from dapo_mcore.rollout.grading import Grading
from dapo_mcore.types import Prompt, Response, Sample


@dataclass(slots=True)
class Pipeline:
    """Engine and grader behind each other. What was not asked for, or asked for no longer, does not come out."""

    engine: Decoder
    grader: Grading
    sampling: Sampling
    requests: dict[Key, Request] = field(default_factory=dict)  # being sampled
    responses: dict[Key, Response] = field(default_factory=dict)  # being graded
    generated_tokens: int = 0
    aborted_responses: int = 0

    @property
    def keys(self) -> list[Key]:
        """Of all that is under way."""
        return [*self.requests, *self.responses]

    def sample(self, requests: Sequence[Request]) -> None:
        self.requests |= {request.key: request for request in requests}
        self.engine.submit(requests, self.sampling)

    def grade(self, prompt: Prompt, key: Key, response: Response) -> None:
        self.responses[key] = response
        self.grader.submit(key, prompt, response)

    def advance(self) -> list[tuple[Key, Sample]]:
        """Decode a slice and take what is graded. Waits only for the grader, and only with nothing to sample."""
        for finished in self.engine.poll():
            if self.requests.pop(finished.request.key, None) is not None:
                self._count(finished.request, finished.response)
                self.grade(finished.request.prompt, finished.request.key, finished.response)
        verdicts = self.grader.poll(wait=not self.requests)
        return [(key, Sample(self.responses.pop(key), verdict)) for key, verdict in verdicts if key in self.responses]

    def abort(self, keys: Collection[Key]) -> dict[Key, Response]:
        """Give up on these; what there is of their responses, cut or whole."""
        sampling = {key: request for key in keys if (request := self.requests.pop(key, None)) is not None}
        left = {key: response for key in keys if (response := self.responses.pop(key, None)) is not None}
        self.grader.abort(left.keys())
        left |= {key: request.partial for key, request in sampling.items() if request.partial is not None}
        for finished in self.engine.abort(list(sampling)) if sampling else []:
            self._count(finished.request, finished.response)
            left[finished.request.key] = finished.response
        self.aborted_responses += len(sampling)
        return left

    def _count(self, request: Request, response: Response) -> None:
        before = len(request.partial.token_ids) if request.partial else 0
        self.generated_tokens += len(response.token_ids) - before
