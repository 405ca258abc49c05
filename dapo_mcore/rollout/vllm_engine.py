"""vLLM inside this process: one rank's part of one rollout replica."""

from __future__ import annotations

import atexit
import functools
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist

from dapo_mcore.config import ModelConfig, RolloutConfig
from dapo_mcore.platform import platform
from dapo_mcore.rollout.engine import Finished, Key, Request, Sampling
from dapo_mcore.rollout.rng import undisturbed_rng
from dapo_mcore.rollout.vllm_env import prepare_environment
from dapo_mcore.rollout.vllm_inputs import prompt_for, refuse_other_tokens, refuse_prompts
from dapo_mcore.rollout.vllm_start import start
from dapo_mcore.types import EncodedImage, FinishReason, Response

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from vllm import SamplingParams

    from dapo_mcore.prompts.vision import ImageTokens
    from dapo_mcore.rollout.vllm_runtime import RuntimeWeights
    from dapo_mcore.rollout.weight_channel import Meeting

SLICE = 8  # decoding steps of a poll


class Tokenizer(Protocol):
    """Of a Hugging Face tokenizer, what turns responses into text."""

    eos_token_id: int | None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class _Running:
    request: Request
    sampling: Sampling
    inner_name: str  # vLLM's own


class VllmEngine:
    """An in-process vLLM engine whose weights are replaced between generations.

    With `rollout.tensor_model_parallel_size` above 1 this is one of so many consecutive ranks of the torch.distributed
    world; all of them make the same calls with the same arguments. Where there is no world, vLLM has so many worker
    processes of its own, which take new weights by `receive` alone and end with this process.

    Every request brings its own seed, so that its response does not depend on the other requests. The reported
    log-probabilities are those of the distribution that was sampled: after temperature, top-p and top-k; greedy
    responses get those of temperature 1. The process is changed as `prepare_environment` says.
    """

    version: int = -1  # of the weights; those of the model's folder come before the first `load`

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        tokenizer: Tokenizer,
        *,
        max_prompt_length: int,
        max_response_length: int,
        job: str = "",
        record_routes: bool = False,
        vision: ImageTokens | None = None,
    ) -> None:
        """Load the model of `model.path`.

        Args:
            model: folder and dtype.
            rollout: engine options.
            tokenizer: decodes responses; its end-of-sequence token ends them, beside the model's own.
            max_prompt_length: tokens, those of pictures too; longer prompts are refused.
            max_response_length: tokens.
            job: names this run's shared memory; the same on all ranks, used by no other run on the host.
            record_routes: responses can carry the experts of their tokens (`Sampling.routes`).
            vision: how the tokens of a picture are counted; None for a model that reads text alone.

        Raises:
            ValueError: rollout.kv_cache_mb cannot hold one sequence; or vLLM refused the model or an option.
        """
        prepare_environment()
        self._tokenizer = tokenizer
        self._stop_token_ids = sorted(end_of_sequence(Path(model.path), tokenizer))
        self._max_prompt_length = max_prompt_length
        self._max_response_length = max_response_length
        self._max_num_seqs = rollout.max_num_seqs
        self._record_routes = record_routes
        self._sees = vision is not None
        self._names = count()  # of requests: a key comes back after an abort, and vLLM must not mix the two up
        self._running: dict[str, _Running] = {}
        self._is_guest = dist.is_initialized()
        with undisturbed_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's dependencies warn of one another; what matters is raised
            self._llm = start(model, rollout, max_prompt_length + max_response_length, job, record_routes, vision)
        if self._is_guest:  # vLLM tears the torch.distributed world down with a discarded engine: keep it to the end
            atexit.register(self._llm.engine_core.shutdown)

    @property
    def capacity(self) -> int:
        """Responses decoded together."""
        return self._max_num_seqs

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Queue `requests`.

        Raises:
            ValueError: a prompt or `sampling.max_tokens` is longer than the engine was built for; a prompt has pictures
                that the model cannot see, or of which the engine makes other tokens than the prompt says.
        """
        self._refuse(requests, sampling)
        decode = functools.cache(EncodedImage.decode)  # once for all responses to a prompt
        with undisturbed_rng():
            for request in requests:
                name = str(next(self._names))
                params = self._params(request.seed, sampling, sampling.max_tokens - len(request.sampled))
                prompt: Any = prompt_for(request, decode)
                inner = self._llm.add_request(name, prompt, params)
                self._running[name] = _Running(request, sampling, inner)
                refuse_other_tokens(request, self._state(inner).prompt_token_ids)

    def poll(self) -> list[Finished]:
        """What finishes within `SLICE` decoding steps."""
        outputs: list[Any] = []
        with undisturbed_rng():
            for _ in range(SLICE):
                if self._llm.has_unfinished_requests():
                    outputs += self._llm.step()
        routes = self._take_routes(outputs)
        return [self._finished(output, routes.get(output.request_id)) for output in outputs]

    def abort(self, keys: Collection[Key]) -> list[Finished]:
        """Forget these; what those that had begun have sampled so far."""
        names = [name for name, running in self._running.items() if running.request.key in keys]
        aborted = [self._aborted(self._running.pop(name)) for name in names]
        self._llm.abort_request(names)
        if self._records_itself:
            self._llm.collective_rpc("take_routes", args=(names,))
        return [finished for finished in aborted if finished.response.token_ids]

    def clear(self) -> None:
        """Forget everything in flight, after a failure; both ends of vLLM's cache of pictures, which may disagree."""
        self._llm.abort_request(list(self._running))
        self._running.clear()
        self._llm.reset_mm_cache()

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over `weights`, pairs of HF name and full tensor, and forget what was computed with the old ones.

        A sleeping engine gets the weights' memory back before, but not yet the KV cache's, and forgets when it wakes.

        Raises:
            ValueError: a weight is missing.
            RuntimeError: the prefix cache was in use.
        """
        self._update("update_weights_from", version, weights)

    def receive(self, meeting: Meeting, first_rank: int, host: str, version: int) -> None:
        """Take part in a push with receivers `first_rank` and up, one per worker; otherwise as `load`.

        Args:
            meeting: as the sender has made it.
            first_rank: of the `rollout.tensor_model_parallel_size` ranks of this engine.
            host: address of this machine to be reached at.
            version: of the weights.
        """
        self._update("receive_weights", version, meeting, first_rank, host)

    def write(self, push: Callable[[RuntimeWeights], None], version: int) -> None:
        """Let `push` write the weights where they lie; otherwise as `load`."""
        self._update("write_weights", version, push)

    def examine(self, question: Callable[[RuntimeWeights], str]) -> str:
        """The answer to a question about the parameters that `write` would write to."""
        (answer,) = self._llm.collective_rpc("examine_weights", args=(question,))
        return answer

    def _update(self, method: str, version: int, *arguments: Any) -> None:
        if self._llm.is_sleeping():
            self._llm.wake_up(["weights"])
        with undisturbed_rng():
            self._llm.collective_rpc(method, args=arguments)
        if not self._llm.is_sleeping():
            self._forget()
        self.version = version

    def _forget(self) -> None:
        """Drop what was computed with earlier weights."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache after a weight update: requests are still running")
        self._llm.reset_encoder_cache()  # what the old tower made of pictures
        self._llm.reset_mm_cache()  # pictures of earlier steps

    def wake(self) -> None:
        """After `sleep` and `load`: take the KV cache's memory back, ready to sample."""
        if self._llm.is_sleeping():
            self._llm.wake_up(["kv_cache"])
            self._forget()

    def sleep(self) -> None:
        """Give the memory of weights and KV cache to the trainer, where the platform's engines sleep.

        The weights must come again before the next sampling.
        """
        if level := platform().engines.sleep_level:
            if not self._llm.is_sleeping():
                self._llm.collective_rpc("prepare_to_sleep")
            self._llm.sleep(level=level)
            self.version = -1

    def close(self) -> None:
        """Free the engine and the torch.distributed world that vLLM made for it.

        In a world of the trainer's nothing happens before the process ends: vLLM would tear that world down.
        """
        if not self._is_guest:
            self._llm.engine_core.shutdown()

    def _refuse(self, requests: Sequence[Request], sampling: Sampling) -> None:
        if sampling.max_tokens > self._max_response_length:
            raise ValueError(
                f"{sampling.max_tokens} response tokens asked for, but data.max_response_length="
                f"{self._max_response_length} is what the engine has room for; ask for fewer or raise that"
            )
        refuse_prompts([request.prompt for request in requests], self._max_prompt_length, self._sees)

    def _params(self, seed: int, sampling: Sampling, max_tokens: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            seed=seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=max_tokens,
            stop_token_ids=self._stop_token_ids,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,  # one list instead of a dictionary per token
            detokenize=False,  # once at the end is cheaper than token by token
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    @property
    def _records_itself(self) -> bool:
        """Whether this package records the routes: on a CPU vLLM does not."""
        from vllm.platforms import current_platform

        return self._record_routes and current_platform.is_cpu()

    def _take_routes(self, outputs: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """Request -> [prompt + response - 1, layers, top_k], where they are recorded."""
        if self._records_itself:
            names = [output.request_id for output in outputs]
            recorded, *_ = self._llm.collective_rpc("take_routes", args=(names,))  # alike in all workers
            return recorded
        return {output.request_id: output.outputs[0].routed_experts for output in outputs if self._record_routes}

    def _finished(self, output: Any, routes: NDArray[Any] | None) -> Finished:
        running = self._running.pop(output.request_id)
        (sample,) = output.outputs
        reason = FinishReason(sample.finish_reason)
        response = self._response(running.request, sample.token_ids, sample.logprobs.logprobs, reason)
        return Finished(running.request, replace(response, routes=routes if running.sampling.routes else None))

    def _state(self, inner_name: str) -> Any:
        """Of a running request, as vLLM keeps it for its output."""
        return self._llm.output_processor.request_states[inner_name]

    def _aborted(self, running: _Running) -> Finished:
        """Read from vLLM's state of a running request: an aborted one has no output."""
        state = self._state(running.inner_name)
        assert state.detokenizer is not None
        assert state.logprobs_processor is not None
        tokens: list[int] = state.detokenizer.output_token_ids
        logprobs: Any = state.logprobs_processor.logprobs
        response = self._response(running.request, tokens, logprobs.logprobs, FinishReason.ABORTED)
        return Finished(running.request, response)

    def _response(
        self, request: Request, tokens: Sequence[int], logprobs: Sequence[float], reason: FinishReason
    ) -> Response:
        """All of it: behind what earlier weights have sampled, if the request continues that."""
        sampled = Response(tuple(tokens), tuple(logprobs), "", reason, self.version)
        whole = sampled if request.partial is None else continued(request.partial, sampled)
        return replace(whole, text=self._tokenizer.decode(whole.token_ids, skip_special_tokens=True))


def continued(partial: Response, rest: Response) -> Response:
    """One response of two parts; the text is left out."""
    return replace(
        rest,
        token_ids=partial.token_ids + rest.token_ids,
        logprobs=partial.logprobs + rest.logprobs,
        version=partial.version,
        continued=(*partial.continued, (len(partial.token_ids), rest.version)),
    )


def end_of_sequence(model: Path, tokenizer: Tokenizer) -> set[int]:
    """Tokens that end a response, by the tokenizer and by the model folder's config.json and generation_config.json."""
    files = [file for name in ("config.json", "generation_config.json") if (file := model / name).is_file()]
    found = [tokenizer.eos_token_id, *(json.loads(file.read_text()).get("eos_token_id") for file in files)]
    lists = [entry if isinstance(entry, list) else [entry] for entry in found if entry is not None]
    return {token for entries in lists for token in entries}
