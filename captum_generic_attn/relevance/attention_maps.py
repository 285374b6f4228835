"""The attention map Ā (eq. 5) of one call as a linear operator.

`left_multiply` and `right_multiply` are its products with rows and columns of relevance. `BlockMap`
computes them block by block and never builds the matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from captum_generic_attn.capture.blocks import Block, Blocks


class ElementwiseRule(Protocol):
    """An element-wise function of probabilities and their gradient, such as eq. 5's."""

    def __call__(self, attention: Tensor, gradient: Tensor, *, out: Tensor | None = None) -> Tensor:
        """A tensor of the same shape; `out`, if given, may be overwritten."""


class AttentionMap(ABC):
    """Ā, `[G, Nq, Nk]`: `G` groups, the examples or their windows."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix, `[G, Nq, Nk]`."""

    def left_multiply(self, rows: Tensor) -> Tensor:
        """`rows Ā`, `[G, k, Nq]` to `[G, k, Nk]`."""
        return rows @ self.dense()

    def right_multiply(self, columns: Tensor) -> Tensor:
        """`Ā columns`, `[G, Nk, k]` to `[G, Nq, k]`."""
        return self.dense() @ columns

    def squeeze_expanded(self) -> AttentionMap:
        """The same map in the form that takes less memory."""
        return self


@dataclass(frozen=True, eq=False)
class DenseMap(AttentionMap):
    """A map that has been computed."""

    matrix: Tensor

    def dense(self) -> Tensor:
        """The matrix, `[G, Nq, Nk]`."""
        return self.matrix


@dataclass(frozen=True, eq=False)
class DeferredMap(AttentionMap):
    """A map that is computed when it is asked for, after the backward pass."""

    compute: Callable[[], Tensor]

    def dense(self) -> Tensor:
        """The matrix, `[G, Nq, Nk]`."""
        return self.compute()


@dataclass(frozen=True, eq=False)
class BlockMap(AttentionMap):
    """The mean over heads of an element-wise rule, computed block by block whenever asked for.

    `heads` neighbouring maps of `blocks` form one group. `fraction` is the part of the layer's mean
    that these heads are: 1, unless a model calls its heads one by one. `dtype` is the precision of
    the result; blocks are computed in their own precision, or in this one if it is higher.
    """

    blocks: Blocks
    rule: ElementwiseRule
    heads: int
    fraction: float = 1.0
    dtype: torch.dtype | None = None

    def dense(self) -> Tensor:
        """The matrix, `[G, Nq, Nk]`."""
        blocks = self.blocks
        shape = blocks.count // self.heads, blocks.queries, blocks.keys
        total = blocks.like.new_zeros(shape, dtype=self._computing)
        for block in blocks:
            value = self._value(block, total.dtype)
            total[:, block.rows, block.columns].index_add_(0, self._groups(block), value)
        return self._scaled(total)

    def left_multiply(self, rows: Tensor) -> Tensor:
        """`rows Ā`, `[G, k, Nq]` to `[G, k, Nk]`."""
        blocks, rows = self._nonzero_rows(rows.to(self._computing))
        total = rows.new_zeros(blocks.count, rows.shape[1], blocks.keys)
        for block in blocks:
            product = rows[block.maps, :, block.rows] @ self._value(block, rows.dtype)
            total[block.maps, :, block.columns] += product
        return self._mean(total)

    def right_multiply(self, columns: Tensor) -> Tensor:
        """`Ā columns`, `[G, Nk, k]` to `[G, Nq, k]`."""
        blocks = self.blocks
        columns = columns.to(self._computing).repeat_interleave(self.heads, 0)
        total = columns.new_zeros(blocks.count, blocks.queries, columns.shape[-1])
        for block in blocks:
            product = self._value(block, total.dtype) @ columns[block.maps, block.columns]
            total[block.maps, block.rows] += product
        return self._mean(total)

    def squeeze_expanded(self) -> AttentionMap:
        """The matrix where it is smaller than what the blocks are computed from."""
        size = self.blocks.count // self.heads * self.blocks.queries * self.blocks.keys
        return DenseMap(self.dense()) if size < self.blocks.elements else self

    def is_finite(self) -> bool:
        """Whether the map of each head holds neither NaN nor infinity."""
        dtype = self.blocks.like.dtype
        return all(bool(self._value(block, dtype).isfinite().all()) for block in self.blocks)

    def _value(self, block: Block, dtype: torch.dtype) -> Tensor:
        return self.rule(block.attention, block.gradient, out=block.out).to(dtype)

    @property
    def _computing(self) -> torch.dtype:
        own = self.blocks.like.dtype
        return own if self.dtype is None else torch.promote_types(own, self.dtype)

    def _nonzero_rows(self, rows: Tensor) -> tuple[Blocks, Tensor]:
        """The blocks of only those queries that some row has a value for, and the rows of each map.

        The last call of a model is usually asked for few of its queries. Their number must be known
        to the host, so this is done only where reading it needs no synchronisation (on the CPU).
        """
        nonzero = (rows != 0).any(1)
        blocks, every = self.blocks, rows.repeat_interleave(self.heads, 0)
        if nonzero.device.type != "cpu":
            return blocks, every
        most = int(nonzero.sum(-1).max())
        if most > blocks.queries // 2:
            return blocks, every
        index = nonzero.to(torch.uint8).topk(max(most, 1), sorted=False).indices
        index = index.sort(-1).values.repeat_interleave(self.heads, 0)
        picked = every.gather(2, index.unsqueeze(1).expand(-1, every.shape[1], -1))
        return blocks.select(index), picked

    def _groups(self, block: Block) -> Tensor:
        maps = torch.arange(block.maps.start, block.maps.stop, device=block.attention.device)
        return maps // self.heads

    def _mean(self, total: Tensor) -> Tensor:
        """The mean over the heads of each group."""
        grouped = total.view(-1, self.heads, *total.shape[1:])
        return self._scaled(grouped.sum(1))

    def _scaled(self, total: Tensor) -> Tensor:
        total.mul_(self.fraction / self.heads)
        return total if self.dtype is None else total.to(self.dtype)
