"""One frozen type per station of a step.

prompts ──► rollout ──► reward ──► groups ──► batch ──► actor
Prompt      Response    Verdict    Group      TrainBatch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the configuration and the prompt side work without torch
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture as its file holds it (PNG, JPEG, ...): its pixels take many times that and are made where needed."""

    data: bytes = field(repr=False)
    width: int  # pixels
    height: int

    def decode(self) -> Image:
        """RGB; what is transparent is white, as on a page."""
        from PIL import Image

        with Image.open(BytesIO(self.data)) as picture:
            if not picture.has_transparency_data:
                return picture.convert("RGB")
            page = Image.new("RGBA", picture.size, "white")
            page.alpha_composite(picture.convert("RGBA"))
            return page.convert("RGB")


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """The tokens of a picture: row by row, from `start` on, where every placeholder has become its picture's tokens."""

    start: int
    rows: int  # of tokens, not of patches
    columns: int

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the policy reads it, and what its verifier needs to judge an answer."""

    uid: int  # position in the shuffled stream, counted over epochs: one occurrence, never reused in a run
    row: int  # row in the data set
    token_ids: tuple[int, ...]
    text: str  # what `token_ids` decode to, for people
    answer: str  # the ground truth
    metadata: Mapping[str, Any] = field(default_factory=dict)  # whatever else the row held, for the verifier
    images: tuple[EncodedImage, ...] = ()  # each has one placeholder in `token_ids`, in this order
    visual_spans: tuple[VisualSpan, ...] = ()  # one per image, in `expanded_ids`
    source: str = ""  # the data set it belongs to, by which validation is told apart

    @property
    def expanded_ids(self) -> tuple[int, ...]:
        """`token_ids` with every placeholder as often as its image has tokens: what the policy computes on."""
        return expand(self.token_ids, self.visual_spans)

    @property
    def length(self) -> int:
        """Of `expanded_ids`, in tokens."""
        return len(self.token_ids) + sum(span.num_tokens - 1 for span in self.visual_spans)


def expand(token_ids: Sequence[int], spans: Sequence[VisualSpan]) -> tuple[int, ...]:
    """Repeats the placeholder of each span, which counts positions in the result."""
    expanded = list(token_ids)
    for span in spans:
        expanded[span.start : span.start + 1] = expanded[span.start : span.start + 1] * span.num_tokens
    return tuple(expanded)


@dataclass(frozen=True, slots=True)
class Visual:
    """An image in a sequence, or a frame of a video. Tokens are told by their places: their id elsewhere is text."""

    make: Callable[[], Tensor]  # the same tensor at every call; one object wherever the image is shown
    span: VisualSpan  # in the sequence

    @property
    def pixels(self) -> Tensor:
        """[patches, numbers] float32, from the processor: made where they are first asked for, and kept."""
        return self.make()


PixelsOf = Callable[[EncodedImage], "Tensor"]  # what `Visual.pixels` holds of a picture


class FinishReason(StrEnum):
    STOP = "stop"  # the policy ended its response
    LENGTH = "length"  # cut at max_response_length
    ABORTED = "aborted"  # interrupted while it was sampled; never trained on as it is


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer, as the engine that sampled it reports it."""

    token_ids: tuple[int, ...]  # includes the end-of-sequence token when finish_reason is STOP
    logprobs: tuple[float, ...]  # of each token under the sampling distribution (behaviour policy), nats
    text: str
    finish_reason: FinishReason
    version: int  # policy version that sampled its first token: training steps the weights have behind them
    # [prompt + response - 1, layers, top_k]: experts each token was sent to; the last token is sampled, never read
    routes: NDArray[Any] | None = field(default=None, compare=False, repr=False)
    # (position, version): the tokens from this position on were sampled by newer weights, which continued the response
    continued: tuple[tuple[int, int], ...] = ()


class Outcome(StrEnum):
    GRADED = "graded"
    TIMEOUT = "timeout"  # the verifier was killed at its deadline
    ERROR = "error"  # the verifier raised or died


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier says. A response that could not be graded is counted apart from a wrong one."""

    accuracy: float  # raw correctness in [0, 1]; the group filter looks at this and nothing else
    score: float  # task reward before any shaping; DAPO eq. 7: +1 or -1
    outcome: Outcome = Outcome.GRADED
    detail: str = ""  # the verifier's error message


@dataclass(frozen=True, slots=True)
class Sample:
    response: Response
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Group:
    """The `n` graded responses to one prompt: the unit of filtering and of the advantage."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    @property
    def accuracies(self) -> tuple[float, ...]:
        return tuple(sample.verdict.accuracy for sample in self.samples)


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Responses ready for the actor: ragged, flat, unpadded; the same on every rank.

    S responses, L = sum of their prompt and response tokens, N = sum of their response tokens.
    Everything of length N is concatenated in the order of the responses.
    """

    token_ids: Tensor  # [L] int64: prompt then response, response after response
    prompt_lengths: Tensor  # [S] int64
    response_lengths: Tensor  # [S] int64
    loss_mask: Tensor  # [N] bool: the response tokens that are trained on
    advantages: Tensor  # [N] float32
    rollout_logprobs: Tensor  # [N] float32: from the engine (behaviour policy)
    old_logprobs: Tensor | None = None  # [N] float32: pi_old of the clip; None: on-policy, the ratio is exactly 1
    ref_logprobs: Tensor | None = None  # [N] float32: of the reference model; None: no option needs it
    rewards: Tensor | None = None  # [S] float32, shaped, NaN where not graded; None: not made of rewards
    groups: Tensor | None = None  # [S] int64: which responses the advantage compares, with `rewards`
    temperature: float = 1.0  # of the rollout; divides the policy's logits
    routes: Tensor | None = None  # [L, layers, top_k] uint8 or int16: experts the engine chose; None: no replay
    visuals: tuple[tuple[Visual, ...], ...] | None = None  # [S] in the order of their places; None: no image at all

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that share the token-mean's denominator, once every mask is final."""
        return int(self.loss_mask.sum())

    @property
    def responses(self) -> Tensor:
        """[N] int64: which response each token belongs to."""
        from torch import arange  # prompts and reward workers use this module without torch

        return arange(len(self)).repeat_interleave(self.response_lengths)

    @property
    def trained_lengths(self) -> Tensor:
        """[S] int64: trained tokens of each response."""
        return self.sum_by_response(self.loss_mask.long())

    def sum_by_response(self, values: Tensor) -> Tensor:
        """[N] -> [S]: what is masked must be 0."""
        return values.new_zeros(len(self)).index_add_(0, self.responses, values)

    def with_old_logprobs(self, old_logprobs: Tensor) -> TrainBatch:
        return replace(self, old_logprobs=old_logprobs)

    def select(self, order: Sequence[int]) -> TrainBatch:
        """The responses `order`, in that order."""
        from torch import cat, tensor  # see `responses`

        totals = (self.prompt_lengths + self.response_lengths).tolist()
        lengths = self.response_lengths.tolist()
        index = tensor(list(order), dtype=self.prompt_lengths.dtype)

        def gather(flat: Tensor, sizes: list[int]) -> Tensor:
            rows = flat.split(sizes)
            return cat([flat[:0], *(rows[i] for i in order)])

        def if_present(flat: Tensor | None) -> Tensor | None:
            return None if flat is None else gather(flat, lengths)

        return TrainBatch(
            token_ids=gather(self.token_ids, totals),
            prompt_lengths=self.prompt_lengths[index],
            response_lengths=self.response_lengths[index],
            loss_mask=gather(self.loss_mask, lengths),
            advantages=gather(self.advantages, lengths),
            rollout_logprobs=gather(self.rollout_logprobs, lengths),
            old_logprobs=if_present(self.old_logprobs),
            ref_logprobs=if_present(self.ref_logprobs),
            rewards=None if self.rewards is None else self.rewards[index],
            groups=None if self.groups is None else self.groups[index],
            temperature=self.temperature,
            routes=None if self.routes is None else gather(self.routes, totals),
            visuals=None if self.visuals is None else tuple(self.visuals[i] for i in order),
        )

    def split(self, size: int) -> list[TrainBatch]:
        """As few mini-batches of at most `size` responses as possible, in order; their sizes differ by at most one.

        No optimizer update rests on a handful of leftovers when a step trains on fewer groups than it wanted. An empty
        batch makes none.
        """
        parts = -(-len(self) // size)
        cuts = [len(self) * i // max(parts, 1) for i in range(parts + 1)]
        return [self.select(range(start, stop)) for start, stop in pairwise(cuts)]
