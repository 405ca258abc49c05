"""Device memory that is given away for a while: its values wait in host memory.

Storages are emptied and filled again in place. Whatever looks into them stays valid: parameters, Megatron's gradient
and parameter buffers, their buckets, the shards of the distributed optimizer. Megatron 0.16's own
`optimizer.offload_to_cpu` gives parameters new storages instead: in fp32 those of the distributed optimizer would no
longer be the model's, and updates would be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, UntypedStorage

from dapo_mcore.config import MegatronConfig
from dapo_mcore.platform import platform


@dataclass(frozen=True, slots=True)
class Parked:
    """A storage without memory, and what is to be in it again."""

    storage: UntypedStorage
    size: int  # bytes
    values: Tensor | None  # [size] uint8 on the host; None: nobody will ask for them


def park(kept: Iterable[Tensor], dropped: Iterable[Tensor] = ()) -> list[Parked]:
    """Free the device memory behind these tensors; the values of `dropped` are lost. They must not be used until
    `unpark`. Storages are parked whole and once, whoever shares them."""
    device = platform()
    lost = _storages(dropped)
    saved = [storage for pointer, storage in _storages(kept).items() if pointer not in lost]
    parked = [Parked(storage, storage.nbytes(), _to_host(storage)) for storage in saved]
    parked += [Parked(storage, storage.nbytes(), None) for storage in lost.values()]
    device.synchronize()
    for entry in parked:
        entry.storage.resize_(0)
    device.empty_cache()
    return parked


def unpark(parked: Iterable[Parked]) -> None:
    """Give the tensors memory again, and their values to those that were kept."""
    for entry in parked:
        entry.storage.resize_(entry.size)
        if entry.values is not None:
            _bytes(entry.storage).copy_(entry.values, non_blocking=True)
    platform().synchronize()  # the host's copies go now


class Offload:
    """Takes what the offload options name off the device in two stages. No communication may be under way."""

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer, options: MegatronConfig
    ) -> None:
        self._chunks = chunks
        self._optimizer = optimizer
        self._options = options
        self._resting: list[Parked] = []

    def rest(self) -> None:
        """Gradients, main parameters and moments leave until `resume`, as nothing but an update reads them.

        Gradients are not kept: an update starts from zeros. Main parameters of an fp32 policy are its weights, and
        stay.
        """
        if self._resting:
            return
        of_weights = _storages(self._weights())
        states = [t for t in _optimizer_tensors(self._optimizer) if t.untyped_storage().data_ptr() not in of_weights]
        buffers = [buffer for chunk in self._chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        gradients = [buffer.grad_data for buffer in buffers]
        self._resting = park(
            kept=states if self._options.optimizer_offload else (),
            dropped=gradients if self._options.grad_offload else (),
        )

    def resume(self) -> None:
        """What `rest` took away is there again."""
        unpark(self._resting)
        self._resting = []

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """While the block runs the weights are away, too. They are back at its end, and the rest rests on."""
        self.rest()
        parked = park(self._weights() if self._options.param_offload else ())
        try:
            yield
        finally:
            unpark(parked)

    def _weights(self) -> list[Tensor]:
        return [parameter.data for chunk in self._chunks for parameter in chunk.parameters()]


def _optimizer_tensors(optimizer: ChainedOptimizer) -> list[Tensor]:
    """Main parameters and moments, as far as they are on the device. Moments exist from the first update on."""
    main = [parameter.data for group in optimizer.param_groups for parameter in group["params"]]
    moments = [value for _, state in optimizer.state.items() for value in state.values() if torch.is_tensor(value)]
    return [tensor for tensor in main + moments if tensor.device.type == platform().device.type]


def _storages(tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
    """By address, without empty ones."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def _to_host(storage: UntypedStorage) -> Tensor:
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=platform().pins_host_memory)
    return host.copy_(_bytes(storage), non_blocking=True)


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
