"""Where a chunk's logits come from: hidden states times the vocabulary's weight, or a tensor the caller made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dapo_kernels.chunks import chunk_buffer
from dapo_kernels.gemm import Gemm


@dataclass(frozen=True, slots=True)
class LinearHead:
    hidden: Tensor  # [T, H]
    weight: Tensor  # [columns, H], without the padding
    rows: Tensor  # [n]: the unmasked rows of hidden
    gemm: Gemm
    hidden_gradient: Tensor | None  # [T, H], rows are written
    weight_gradient: Tensor | None  # [columns, H] float32 (or float64), added to

    @property
    def wants_gradient(self) -> bool:
        return self.hidden_gradient is not None or self.weight_gradient is not None

    @property
    def gradient_dtype(self) -> torch.dtype:
        return self.gemm.gradient_dtype(self.hidden.dtype)

    def buffer(self, rows: int) -> Tensor:
        return chunk_buffer(self.hidden, min(rows, len(self.rows)), self.weight.shape[0])

    def logits(self, span: slice, buffer: Tensor) -> Tensor:
        logits = buffer[: span.stop - span.start]
        self.gemm.logits(self.hidden[self.rows[span]], self.weight, logits)
        return logits

    def accept(self, rows: Tensor, dlogits: Tensor) -> None:
        rows = self.rows[rows]
        if self.hidden_gradient is not None:
            gradient = self.gemm.hidden_gradient(dlogits, self.weight)
            self.hidden_gradient[rows] = gradient.to(self.hidden_gradient.dtype)
        if self.weight_gradient is not None:
            self.gemm.add_weight_gradient(dlogits, self.hidden[rows], self.weight_gradient)


@dataclass(frozen=True, slots=True)
class LogitsHead:
    source: Tensor  # [T, V]
    columns: int  # without the padding
    rows: Tensor  # [n]: the unmasked rows of source
    gradient: Tensor | None  # [T, V], written in these rows; may be the source

    @property
    def wants_gradient(self) -> bool:
        return self.gradient is not None

    @property
    def gradient_dtype(self) -> torch.dtype:
        return self.source.dtype

    def buffer(self, rows: int) -> Tensor:
        return chunk_buffer(self.source, min(rows, len(self.rows)), self.columns)

    def logits(self, span: slice, buffer: Tensor) -> Tensor:
        rows = self.rows[span]
        logits = buffer[: len(rows)].copy_(self.source[rows, : self.columns])
        if self.gradient is not None:
            self.gradient[rows] = 0  # once read, as both may be one
        return logits

    def accept(self, rows: Tensor, dlogits: Tensor) -> None:
        assert self.gradient is not None
        self.gradient[self.rows[rows], : self.columns] = dlogits
