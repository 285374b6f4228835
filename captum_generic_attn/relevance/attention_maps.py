"""Ā of eq. 5 for one attention call, as what it does to rows and columns of relevance.

`explanation` makes a map of each call; `additions` takes them whole, `pullback` multiplies rows by
them, so that nothing of the size of an attention matrix is ever made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_generic_attn.capture.blocks import Block, Blocks


class AttentionMap(ABC):
    """Ā, `[G, Nq, Nk]`: `G` groups, the examples or their windows."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Ā whole, `[G, Nq, Nk]`."""

    @abstractmethod
    def of_rows(self, rows: Tensor) -> Tensor:
        """`rows Ā`, `[G, k, Nq]` to `[G, k, Nk]`."""

    @abstractmethod
    def of_columns(self, columns: Tensor) -> Tensor:
        """`Ā columns`, `[G, Nk, k]` to `[G, Nq, k]`."""

    @abstractmethod
    def kept(self) -> AttentionMap:
        """The same in the form that takes less memory to keep."""


@dataclass(frozen=True, eq=False)
class DenseMap(AttentionMap):
    """Ā that was computed."""

    matrix: Tensor

    def dense(self) -> Tensor:  # noqa: D102 - as in the base class
        return self.matrix

    def of_rows(self, rows: Tensor) -> Tensor:  # noqa: D102
        return rows @ self.matrix

    def of_columns(self, columns: Tensor) -> Tensor:  # noqa: D102
        return self.matrix @ columns

    def kept(self) -> AttentionMap:  # noqa: D102
        return self


@dataclass(frozen=True, eq=False)
class BlockMap(AttentionMap):
    """Ā that is computed block by block whenever it is asked for.

    `heads` neighbouring maps of `blocks` are one group; `share` is the part of the layer's mean
    that they are (1 unless a model calls its heads one by one). `dtype` is the precision of what
    comes out; it is computed in that of the blocks, or in this one if it holds more.
    """

    blocks: Blocks
    heads: int
    share: float = 1.0
    dtype: torch.dtype | None = None

    def dense(self) -> Tensor:  # noqa: D102
        blocks = self.blocks
        shape = blocks.count // self.heads, blocks.queries, blocks.keys
        total = blocks.like.new_zeros(shape, dtype=self._computing)
        for block in blocks:
            evidence = block.evidence.to(total.dtype)
            total[:, block.rows, block.columns].index_add_(0, self._groups(block), evidence)
        return self._scaled(total)

    def of_rows(self, rows: Tensor) -> Tensor:  # noqa: D102
        blocks, rows = self._asking(rows.to(self._computing))
        total = rows.new_zeros(blocks.count, rows.shape[1], blocks.keys)
        for maps, block_rows, columns, evidence in blocks:
            total[maps, :, columns] += rows[maps, :, block_rows] @ evidence.to(rows.dtype)
        return self._mean(total)

    def of_columns(self, columns: Tensor) -> Tensor:  # noqa: D102
        blocks = self.blocks
        columns = columns.to(self._computing).repeat_interleave(self.heads, 0)
        total = columns.new_zeros(blocks.count, blocks.queries, columns.shape[-1])
        for maps, rows, block_columns, evidence in blocks:
            total[maps, rows] += evidence.to(total.dtype) @ columns[maps, block_columns]
        return self._mean(total)

    def kept(self) -> AttentionMap:  # noqa: D102
        size = self.blocks.count // self.heads * self.blocks.queries * self.blocks.keys
        return DenseMap(self.dense()) if size < self.blocks.elements else self

    @property
    def _computing(self) -> torch.dtype:
        own = self.blocks.like.dtype
        return own if self.dtype is None else torch.promote_types(own, self.dtype)

    def _asking(self, rows: Tensor) -> tuple[Blocks, Tensor]:
        """Only those queries that some row has, and the rows of each map.

        The last call is asked for few. How many must be known to the host, so this is done where
        asking costs nothing.
        """
        alive = (rows != 0).any(1)
        blocks, every = self.blocks, rows.repeat_interleave(self.heads, 0)
        if alive.device.type != "cpu":
            return blocks, every
        most = int(alive.sum(-1).max())
        if most > blocks.queries // 2:
            return blocks, every
        index = alive.to(torch.uint8).topk(max(most, 1), sorted=False).indices
        index = index.sort(-1).values.repeat_interleave(self.heads, 0)
        picked = every.gather(2, index.unsqueeze(1).expand(-1, every.shape[1], -1))
        return blocks.select(index), picked

    def _groups(self, block: Block) -> Tensor:
        maps = torch.arange(block.maps.start, block.maps.stop, device=block.evidence.device)
        return maps // self.heads

    def _mean(self, total: Tensor) -> Tensor:
        """The mean over the heads of each group."""
        grouped = total.view(-1, self.heads, *total.shape[1:])
        return self._scaled(grouped.sum(1))

    def _scaled(self, total: Tensor) -> Tensor:
        total.mul_(self.share / self.heads)
        return total if self.dtype is None else total.to(self.dtype)
