"""A plan carried out: the policy's parameters written into those of the live rollout engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_mcore.weights.attest import Attestation, AttestationError, Fault
from dapo_mcore.weights.homes import Groups, homes
from dapo_mcore.weights.itinerary import LayerOfEngine, Round, Target, itinerary, mismatches, numbered, targets
from dapo_mcore.weights.layouts import rectangle
from dapo_mcore.weights.names import parameters
from dapo_mcore.weights.plan import Plan

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

LISTED = 8  # faults printed
CACHED = 1 << 19  # bytes whose copy stays in a processor's cache, source and target together


class RuntimeWeights(Protocol):
    """What a rollout engine lets a push do with its parameters; see rollout/vllm_runtime.py."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def is_in_place(self) -> bool: ...

    def expert_slots(self, name: str) -> list[int] | None: ...

    def open(self, name: str) -> Tensor: ...

    def close(self, names: Iterable[str]) -> None: ...

    def finish(self) -> None: ...


class Push:
    """Pushes the weights of `chunks` by `plan`, as often as wanted. Collective over the torch.distributed world.

    What crosses ranks is staged in flat buckets, `bucket_mb` MiB of them at a time; what stays is copied once.
    """

    def __init__(self, plan: Plan, hf_config: Any, chunks: Sequence[GPTModel], bucket_mb: int) -> None:
        self._plan = plan
        self._chunks = chunks
        self._hf_config = hf_config
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._declared = list(parameters(hf_config, chunks[0].vocab_size))
        first = next(chunks[0].parameters())
        self._dtype, self._device = first.dtype, first.device
        half = (bucket_mb << 20) // first.element_size() // 2  # one to send, one to receive
        self._pieces, self._round_numbers = numbered(plan, half)
        self._sizes = torch.tensor([piece.size for piece in self._pieces], device=self._device)
        self._targets: dict[int, Target] = {}  # what follows is found with the engine, at the first push
        self._rounds: list[Round] = []
        self._addresses: list[int] = []  # of the policy's parameters, when `_sources` was made
        self._sources: dict[int, Tensor] = {}  # piece -> its rectangle of the policy
        self._kept_addresses: list[int] = []  # of the engine's parameters, when `_kept` was begun
        self._kept: dict[int, Tensor] = {}  # piece -> its rectangle of the engine, where these stay in place

    def __call__(self, runtime: RuntimeWeights) -> None:
        """Write every parameter of this rank's part of the engine, and prove that it arrived.

        Raises:
            ValueError: the engine does not have exactly the parameters of the plan; on every rank, nothing is written.
            AttestationError: something did not arrive; on every rank. The engine must not sample.
        """
        misfits = _gathered([misfit] if (misfit := self.misfit(runtime)) else [])
        if misfits:
            raise ValueError(f"{misfits[0]}; set weights.push=reload")
        self._find_sources()
        self._forget_moved(runtime)
        attestation = Attestation(self._sizes)
        for round_ in self._rounds:
            self._exchange(round_, runtime, attestation)
            for layer in round_.completes:
                self._complete(layer, runtime, attestation)
        runtime.finish()
        faults = attestation.faults()
        if faults:
            raise AttestationError(
                f"the rollout engine does not hold the policy's weights: {len(faults)} parts are wrong. Start again "
                "from the last checkpoint; if it happens again on the same ranks, look at their memory and network, or "
                "set weights.push=reload\n  " + "\n  ".join(self._told(fault) for fault in faults[:LISTED])
            )

    def misfit(self, runtime: RuntimeWeights) -> str:
        """Why the plan does not fill the parameters of this rank's engine exactly; empty if it does."""
        if not self._rounds:
            shapes = runtime.shapes
            found = targets(self._declared, self._plan.rollout, self._rank, shapes)
            defects = mismatches(found, self._pieces, self._rank, shapes)
            if defects:
                return f"the plan does not fit rank {self._rank} of the engine: " + ", ".join(defects[:LISTED])
            self._targets = found
            self._rounds = itinerary(self._pieces, self._round_numbers, self._rank, self._declared, found)
        return ""

    def _find_sources(self) -> None:
        """Views of the policy's parameters, anew when one of these has moved."""
        addresses = [parameter.data_ptr() for chunk in self._chunks for parameter in chunk.parameters()]
        if addresses == self._addresses:
            return
        groups = Groups.current()
        tensors: dict[tuple[int, int], Tensor] = {}
        for position, home in enumerate(homes(self._chunks, self._hf_config, groups)):
            first = groups.expert.rank() * len(home.shards) if home.parameter.experts else -1
            tensors |= {(position, first + local): shard for local, shard in enumerate(home.shards)}
        read: dict[tuple[Any, ...], Tensor] = {}  # the same for all ranks that get it
        for number, piece in enumerate(self._pieces):
            if piece.source == self._rank:
                place = piece.parameter, piece.expert, piece.mcore_at, piece.shape
                if place not in read:
                    read[place] = rectangle(tensors[place[:2]], piece.mcore_at, piece.shape)
                self._sources[number] = read[place]
        self._addresses = addresses

    def _forget_moved(self, runtime: RuntimeWeights) -> None:
        if runtime.is_in_place:
            addresses = [runtime.open(target.name).data_ptr() for target in self._targets.values()]
            if addresses != self._kept_addresses:
                self._kept_addresses, self._kept = addresses, {}

    def _exchange(self, round_: Round, runtime: RuntimeWeights, attestation: Attestation) -> None:
        """One message to and from every rank that has something for the other."""
        outgoing = {peer: self._bucket(numbers) for peer, numbers in round_.sends.items()}
        incoming = {peer: self._bucket(numbers) for peer, numbers in round_.receives.items()}
        for peer, numbers in round_.sends.items():
            sources = [self._sources[number] for number in numbers]
            torch._foreach_copy_(self._slots(outgoing[peer], numbers), sources)
            attestation.sent(zip(numbers, sources, strict=True))
        operations = [dist.P2POp(dist.isend, bucket, peer) for peer, bucket in outgoing.items()]
        operations += [dist.P2POp(dist.irecv, bucket, peer) for peer, bucket in incoming.items()]
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        for peer, numbers in round_.receives.items():
            torch._foreach_copy_(self._written(numbers, runtime), self._slots(incoming[peer], numbers))

    def _complete(self, layer: LayerOfEngine, runtime: RuntimeWeights, attestation: Attestation) -> None:
        """Copy what stays on this rank, and let the engine take the layer over."""
        slots = self._expert_slots(chain(layer.copies, layer.received), runtime)
        for numbers in self._batches(layer.copies, runtime):
            sources, written = [self._sources[number] for number in numbers], self._written(numbers, runtime)
            torch._foreach_copy_(written, sources)
            attestation.sent(zip(numbers, sources, strict=True))
            attestation.received(self._found(numbers, written, slots, runtime))
        written = self._written(layer.received, runtime)
        attestation.received(self._found(layer.received, written, slots, runtime))
        runtime.close(layer.names)

    def _batches(self, numbers: Sequence[int], runtime: RuntimeWeights) -> Iterator[list[int]]:
        """In one batch where parameters are written in place; else in such that sums find in the cache what was copied.

        Cutting into many would cost a device more than its cache gives.
        """
        batch: list[int] = []
        size = 0
        for number in numbers:
            batch.append(number)
            size += self._pieces[number].size
            if size * self._dtype.itemsize >= CACHED and not runtime.is_in_place:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _bucket(self, numbers: Sequence[int]) -> Tensor:
        size = sum(self._pieces[number].size for number in numbers)
        return torch.empty(size, dtype=self._dtype, device=self._device)

    def _slots(self, bucket: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """The parts of a flat bucket as the pieces' matrices."""
        pieces = [self._pieces[number] for number in numbers]
        flat = bucket.split([piece.size for piece in pieces])
        return [part.view(piece.shape) for part, piece in zip(flat, pieces, strict=True)]

    def _written(self, numbers: Sequence[int], runtime: RuntimeWeights) -> list[Tensor]:
        """Where the pieces lie in the engine."""
        if not runtime.is_in_place:
            return [self._target(number, self._slot(number), runtime) for number in numbers]
        for number in numbers:
            if number not in self._kept:
                self._kept[number] = self._target(number, self._slot(number), runtime)
        return [self._kept[number] for number in numbers]

    def _expert_slots(self, numbers: Iterable[int], runtime: RuntimeWeights) -> dict[int, list[int]]:
        """For the parameters of the pieces that the engine has a map of experts for."""
        positions = {self._pieces[number].parameter for number in numbers}
        targets = {position: self._targets[position] for position in positions if self._targets[position].experts}
        maps = {position: runtime.expert_slots(target.name) for position, target in targets.items()}
        return {position: slots for position, slots in maps.items() if slots is not None}

    def _found(
        self, numbers: Sequence[int], written: Sequence[Tensor], slots: Mapping[int, list[int]], runtime: RuntimeWeights
    ) -> Iterator[tuple[int, Tensor]]:
        """The pieces where the engine looks for them: experts by its own map, whatever the plan holds of it."""
        for number, there in zip(numbers, written, strict=True):
            piece = self._pieces[number]
            planned = self._slot(number)
            slot = slots[piece.parameter][piece.expert] if piece.parameter in slots else planned
            if slot >= 0:
                yield number, there if slot == planned else self._target(number, slot, runtime)

    def _slot(self, number: int) -> int:
        """Where the plan puts an expert among those of its rank; 0 for what is no expert's."""
        piece = self._pieces[number]
        experts = self._targets[piece.parameter].experts
        return experts.index(piece.expert) if experts else 0

    def _target(self, number: int, slot: int, runtime: RuntimeWeights) -> Tensor:
        piece = self._pieces[number]
        target = self._targets[piece.parameter]
        tensor = runtime.open(target.name)
        return rectangle(tensor[slot] if target.experts else tensor, piece.vllm_at, piece.shape)

    def _told(self, fault: Fault) -> str:
        piece = self._pieces[fault.index]
        expert = f", expert {piece.expert}" if piece.expert >= 0 else ""
        sent, received = (f"{value % 2**64:016x}" for value in fault.checksums)
        return (
            f"{self._targets[piece.parameter].name}{expert}: of {piece.size} elements from rank {piece.source} "
            f"(checksum {sent}) rank {piece.destination} has {fault.received} ({received})"
        )


def _gathered(texts: list[str]) -> list[str]:
    """Those of all ranks, in order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return texts
    every: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(every, texts)
    return [text for of_rank in every for text in of_rank]
