"""Attention probabilities of one call and their gradient, block by block.

`ExplicitBlocks` reads them from tensors of the model, `FusedBlocks` recomputes them from what a
fused kernel read. A block fits into the cache of a core, so the `[heads, queries, keys]` tensors
of a fused call are never built and memory does not grow with their size. What is computed from a
block is up to the reader: this module knows no equation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS, _COLUMNS = 256, 512
"""Queries and keys of a block on a CPU: two of them in float32 fill half the cache of a core."""
_WHOLE = 640
"""Up to so many keys are one block: a rest of less than a quarter costs less inside than apart."""
_LARGEST_LSE = 1e4
"""Up to here float32 keeps three digits of a probability when it is subtracted from a logit."""
_DEVICE_ELEMENTS = 1 << 24
"""Elements of a block elsewhere: enough to keep an accelerator busy, 64 MB in float32."""


class Block(NamedTuple):
    """The probabilities and their gradient for a range of maps, queries (rows) and keys (columns).

    Both are `[maps, rows, columns]` and valid until the next block is asked for. `out` is memory of
    that shape to which a result may be written: the gradient's, unless the model owns it.
    """

    maps: slice
    rows: slice
    columns: slice
    attention: Tensor
    gradient: Tensor
    out: Tensor | None = None


def computing_dtype(tensor: Tensor) -> torch.dtype:
    """The precision of relevance: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Maps:
    """`[maps, *, *]` tensors of which several maps may share one: `index` says which, if any do."""

    tensor: Tensor
    index: Tensor | None = None

    @classmethod
    def of(
        cls, tensor: Tensor, lead: Sequence[int], head_index: Tensor | None, *, groups: int = 1
    ) -> Maps:
        """The last two axes of a tensor whose other axes broadcast to `lead`, in another order.

        Args:
            tensor: `[..., n, m]`.
            lead: the shape of the leading axes of the call.
            head_index: `[maps]` places among them, flattened; `None`: all, in order.
            groups: how many neighbouring heads share one (grouped keys and values).
        """
        for axis in range(tensor.ndim - 2):
            if tensor.stride(axis) == 0:  # what the model repeated is not copied
                tensor = tensor.narrow(axis, 0, 1)
        own = tensor.shape[:-2]
        flat = tensor.reshape(-1, *tensor.shape[-2:])
        if head_index is None and own == lead:
            return cls(flat)
        places = torch.arange(math.prod(own)).view(own)
        if groups > 1:
            places = places.repeat_interleave(groups, -1)
        index = places.expand(lead).reshape(-1)
        return cls(flat, (index if head_index is None else index[head_index]).to(tensor.device))

    def __getitem__(self, maps: slice) -> Tensor:
        if self.index is None:
            return self.tensor[maps]
        index = self.index[maps]
        if len(self.tensor) == 1:  # shared by all: nothing to copy
            return self.tensor.expand(len(index), -1, -1)
        return self.tensor[index]

    def rows(self, index: Tensor) -> Maps:
        """Only the rows `index` `[maps, n]` of each map."""
        index = index.to(self.tensor.device).unsqueeze(-1)
        whole = self[slice(None)]
        return Maps(whole.gather(1, index.expand(-1, -1, whole.shape[-1])))


@dataclass(frozen=True, eq=False)
class Blocks(ABC):
    """One call's attention and gradient, `count` maps of `queries` × `keys`."""

    count: int
    queries: int
    keys: int

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the device and the precision that blocks are computed in."""

    @property
    @abstractmethod
    def elements(self) -> int:
        """How many elements it takes to keep this."""

    @property
    @abstractmethod
    def operands(self) -> Sequence[Maps]:
        """What the blocks are computed from."""

    def operands_are_finite(self) -> bool:
        """Whether what the blocks are computed from holds neither NaN nor infinity."""
        return all(bool(operand.tensor.isfinite().all()) for operand in self.operands)

    @abstractmethod
    def live_rows(self) -> Tensor:
        """`[maps, queries]` True where the gradient of a query's attention is not zero."""

    @abstractmethod
    def select(self, rows: Tensor) -> Blocks:
        """The same of the queries `rows` `[maps, n]` alone."""

    @abstractmethod
    def probabilities(self) -> Tensor:
        """P `[maps, queries, keys]`, whole."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """The gradient of P, whole."""

    @abstractmethod
    def __iter__(self) -> Iterator[Block]:
        """All blocks; those in which no attention can be are left out."""

    def _sizes(self, *, whole_rows: bool) -> tuple[int, int, int]:
        """How many maps, queries and keys a block covers."""
        if self.like.device.type == "cpu":
            budget, parts = _ROWS * _COLUMNS, torch.get_num_threads()
            columns = self.keys if whole_rows or self.keys <= _WHOLE else _COLUMNS
        else:
            budget, parts, columns = _DEVICE_ELEMENTS, 1, self.keys
        columns = _even(self.keys, columns)
        rows = _even(self.queries, max(16, budget // columns))
        return min(self.count, parts * max(1, budget // (rows * columns))), rows, columns


def _even(total: int, most: int) -> int:
    """The size of the fewest parts of at most `most`, all alike but for the last."""
    return -(-total // -(-total // most))


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


@dataclass(frozen=True, eq=False)
class ExplicitBlocks(Blocks):
    """Probabilities that the model computed itself, and their gradient."""

    attention: Maps
    attention_gradient: Maps

    @property
    def like(self) -> Tensor:  # noqa: D102 - as in the base class
        tensor = self.attention.tensor
        return tensor.new_empty(0, dtype=computing_dtype(tensor))

    @property
    def elements(self) -> int:  # noqa: D102
        return 2 * self.count * self.queries * self.keys

    @property
    def operands(self) -> Sequence[Maps]:  # noqa: D102
        return self.attention, self.attention_gradient

    def live_rows(self) -> Tensor:  # noqa: D102
        return (self.attention_gradient[slice(None)] != 0).any(-1)

    def select(self, rows: Tensor) -> Blocks:  # noqa: D102
        return replace(
            self,
            queries=rows.shape[1],
            attention=self.attention.rows(rows),
            attention_gradient=self.attention_gradient.rows(rows),
        )

    def probabilities(self) -> Tensor:  # noqa: D102
        return self.attention[slice(None)].to(self.like.dtype)

    def gradient(self) -> Tensor:  # noqa: D102
        return self.attention_gradient[slice(None)].to(self.like.dtype)

    def __iter__(self) -> Iterator[Block]:
        count, height, _ = self._sizes(whole_rows=True)
        dtype = self.like.dtype
        whole = slice(0, self.keys)
        for maps in _slices(self.count, count):
            attention, gradient = self.attention[maps], self.attention_gradient[maps]
            for rows in _slices(self.queries, height):
                part = attention[:, rows].to(dtype), gradient[:, rows].to(dtype)
                yield Block(maps, rows, whole, *part)


@dataclass(frozen=True, eq=False)
class FusedBlocks(Blocks):
    """What a fused kernel read, and the gradient of its output.

    The kernel keeps its probabilities to itself; they are computed anew: by softmax where all keys
    of a query fit in a block and none is masked, else as `P = exp(q kᵀ scale + mask - lse)` with
    the logarithm `lse` of each query's sum, which the kernel keeps for its own backward pass (by
    softmax again if it kept none). Their gradient is `∂y/∂P = ∂y/∂O · Vᵀ`. `positions` `[maps,
    queries]` are the places of the queries where they are not all, in order.
    """

    query: Maps
    key: Maps
    value: Maps
    output_gradient: Maps
    scale: float
    causal: bool
    mask: Maps | None = None
    lse: Maps | None = None
    positions: Tensor | None = None

    @property
    def like(self) -> Tensor:  # noqa: D102
        tensor = self.query.tensor
        return tensor.new_empty(0, dtype=computing_dtype(tensor))

    @property
    def elements(self) -> int:  # noqa: D102
        return sum(part.tensor.numel() for part in self.operands)

    @property
    def operands(self) -> Sequence[Maps]:  # noqa: D102
        return self.query, self.key, self.value, self.output_gradient

    def live_rows(self) -> Tensor:  # noqa: D102
        return (self.output_gradient[slice(None)] != 0).any(-1)

    def select(self, rows: Tensor) -> Blocks:  # noqa: D102
        places = rows.to(self.query.tensor.device)
        return replace(
            self,
            queries=rows.shape[1],
            query=self.query.rows(rows),
            output_gradient=self.output_gradient.rows(rows),
            lse=None if self.lse is None else self.lse.rows(rows),
            mask=self.mask.rows(rows) if self.mask and self.mask.tensor.shape[1] > 1 else self.mask,
            positions=places if self.positions is None else self.positions.gather(1, places),
        )

    def probabilities(self) -> Tensor:  # noqa: D102
        every, rows, columns = slice(None), slice(0, self.queries), slice(0, self.keys)
        query, keys, scale = self._factors(every, by_lse=False)
        logits = query @ keys * scale
        self._hide(logits, every, rows, columns)
        return self._softmax(logits)

    def gradient(self) -> Tensor:  # noqa: D102
        dtype = self.like.dtype
        output_gradient = self.output_gradient[slice(None)].to(dtype)
        return output_gradient @ self.value[slice(None)].to(dtype).mT

    def __iter__(self) -> Iterator[Block]:
        dtype = self.like.dtype
        # With a mask too: a softmax would have to look for rows that it leaves nothing.
        by_lse = (self.keys > _WHOLE or self.mask is not None) and self._lse_is_fine()
        count, height, width = self._sizes(whole_rows=not by_lse)
        memory = self.like.new_empty(2 if by_lse else 3, count * height * width)
        for maps in _slices(self.count, count):
            query, keys, scale = self._factors(maps, by_lse=by_lse)
            gradient = self.output_gradient[maps].to(dtype).contiguous()
            values = self.value[maps].to(dtype).mT
            n = len(query)
            for columns in _slices(self.keys, width):
                for rows in _slices(self.queries, height):
                    if self._beyond(rows, columns):
                        continue
                    shape = n, rows.stop - rows.start, columns.stop - columns.start
                    logits, change, *other = (m[: math.prod(shape)].view(shape) for m in memory)
                    part = query[:, rows], keys[:, :, columns]
                    torch.baddbmm(logits, *part, beta=0, alpha=scale, out=logits)
                    self._hide(logits, maps, rows, columns)
                    attention = logits.exp_() if by_lse else self._softmax(logits, *other)
                    torch.bmm(gradient[:, rows], values[:, :, columns], out=change)
                    yield Block(maps, rows, columns, attention, change, out=change)

    def _lse_is_fine(self) -> bool:
        """Whether logits less `lse` keep enough digits; not where a mask added a huge number."""
        if self.lse is None:
            return False
        if self.lse.tensor.device.type == "cpu":
            return bool(self.lse.tensor.abs().amax() < _LARGEST_LSE)
        return self.mask is None or self.mask.tensor.dtype == torch.bool

    def _factors(self, maps: slice, *, by_lse: bool) -> tuple[Tensor, Tensor, float]:
        """Queries `[n, queries, d]` and keys `[n, d, keys]`, and what makes their product logits.

        With `by_lse` the logarithm rides along as one more feature: no pass over the logits for it.
        """
        dtype = self.like.dtype
        query, key = self.query[maps].to(dtype), self.key[maps].to(dtype)
        if not by_lse or self.lse is None:
            return query, key.mT, self.scale
        query = torch.cat([query * self.scale, -self.lse[maps].to(dtype)], -1)
        key = torch.cat([key, key.new_ones(*key.shape[:-1], 1)], -1)
        return query, key.mT, 1.0

    def _hide(self, logits: Tensor, maps: slice, rows: slice, columns: slice) -> None:
        """Add the mask to the logits of a block."""
        if self.causal and (hidden := self._hidden(maps, rows, columns)) is not None:
            logits.masked_fill_(hidden, -math.inf)
        if self.mask is None:
            return
        mask = self.mask[maps]
        mask = mask[:, rows] if mask.shape[1] > 1 else mask
        mask = mask[:, :, columns] if mask.shape[2] > 1 else mask
        if mask.dtype == torch.bool:
            logits.masked_fill_(~mask, -math.inf)
        else:
            logits.add_(mask)

    def _softmax(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """P from whole rows of logits; rows that the mask leaves nothing are zero."""
        attention = torch.softmax(logits, -1, out=out)
        if self.mask is None:
            return attention
        return attention.masked_fill_((logits == -math.inf).all(-1, keepdim=True), 0.0)

    def _hidden(self, maps: slice, rows: slice, columns: slice) -> Tensor | None:
        """Which keys of a block come after the queries; `None`: none does."""
        device = self.query.tensor.device
        keys = torch.arange(columns.start, columns.stop, device=device)
        if self.positions is not None:
            return keys > self.positions[maps, rows].unsqueeze(-1)
        if columns.stop - 1 <= rows.start:
            return None
        return keys > torch.arange(rows.start, rows.stop, device=device).unsqueeze(-1)

    def _beyond(self, rows: slice, columns: slice) -> bool:
        """Whether all keys of a block come after all its queries."""
        return self.causal and self.positions is None and rows.stop <= columns.start
