"""Attention records: one per attention call, from which its probabilities and gradients follow.

The fused kernel keeps its probabilities to itself; they are computed anew from queries, keys, mask
and scale, and their gradient from the gradient of the kernel's output: `∂y/∂P = ∂y/∂O · Vᵀ`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_generic_attn.tokens import NOBODY, Meeting


def _computing_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; inference tensors, which are refused, do not count."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


class OverwrittenError(RuntimeError):
    """The model overwrote a tensor of an attention call; the forward pass must keep copies."""


@dataclass(frozen=True, eq=False)
class Operands:
    """Tensors of an attention call, read after the forward pass, and their versions in it."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, *tensors: Tensor, copies: bool) -> Operands:
        """Note tensors as they are now; with `copies`, whatever the model does to them later."""
        kept = tuple(t.detach().clone() if copies else t.detach() for t in tensors)
        return cls(kept, tuple(map(_version, kept)))

    def __getitem__(self, place: int) -> Tensor:
        tensor = self.tensors[place]
        if _version(tensor) != self.versions[place]:
            raise OverwrittenError("an attention operand was modified by an inplace operation")
        return tensor


@dataclass(frozen=True, eq=False)
class Explicit:
    """Probabilities that the model computed itself; `order` brings their axes to [..., q, k]."""

    operands: Operands
    order: tuple[int, ...]
    single_query: bool

    def _arrange(self, tensor: Tensor) -> Tensor:
        tensor = tensor.permute(self.order)
        return tensor.unsqueeze(-2) if self.single_query else tensor

    def probabilities(self) -> Tensor:
        """P `[..., H, Nq, Nk]`."""
        tensor = self.operands[0]
        return self._arrange(tensor).to(_computing_dtype(tensor))

    def gradient(self, gradient: Tensor) -> Tensor:
        """Its gradient, from the gradient of the tensor."""
        return self._arrange(gradient).to(_computing_dtype(gradient))


@dataclass(frozen=True, eq=False)
class Fused:
    """`scaled_dot_product_attention`; its operands are query, key, value and perhaps a mask."""

    operands: Operands
    causal: bool
    scale: float | None
    grouped: bool

    def probabilities(self) -> Tensor:
        """P `[..., H, Nq, Nk]`; rows that the mask leaves nothing are zero, as in the kernel."""
        dtype = _computing_dtype(self.operands[0])
        query = self.operands[0].to(dtype)
        key = self._for_heads(self.operands[1]).to(dtype)
        scale = 1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale
        logits = query @ key.mT * scale
        if self.causal:
            allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
            logits = logits.masked_fill(~allowed, -math.inf)
        if len(self.operands.tensors) > 3:
            mask = self.operands[3]
            blocked = mask.dtype == torch.bool
            logits = logits.masked_fill(~mask, -math.inf) if blocked else logits + mask.to(dtype)
        empty = (logits == -math.inf).all(-1, keepdim=True)
        return logits.softmax(-1).masked_fill(empty, 0.0)

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of P, from the gradient of the kernel's output."""
        value = self.operands[2]
        dtype = _computing_dtype(value)
        return gradient.to(dtype) @ self._for_heads(value).to(dtype).mT

    def _for_heads(self, tensor: Tensor) -> Tensor:
        if self.grouped:
            heads = self.operands.tensors[0].shape[-3]
            return tensor.repeat_interleave(heads // tensor.shape[-3], -3)
        return tensor


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One attention call.

    `query_tokens` `[G, Nq]` and `key_tokens` `[G, Nk]` are token ids of `G` groups: the examples
    of the batch, or their windows; `examples` `[G]` says whose. `pick` `[G, H]` finds a group's
    heads among the flattened leading axes of the probabilities. `query_ancestors` and
    `key_ancestors` are the calls that the queries and keys depend on; `meeting` says whose streams
    met. Where a model calls its heads one by one, the calls of one `layer` have a `share` each of
    the layer's map.
    """

    index: int
    module: str
    module_type: str
    source: Explicit | Fused
    edge: GradientEdge
    query_tokens: Tensor
    key_tokens: Tensor
    examples: Tensor
    pick: Tensor
    query_ancestors: frozenset[int]
    key_ancestors: frozenset[int]
    query_stream: str = ""
    key_stream: str = ""
    meeting: Meeting = NOBODY
    layer: int = -1
    share: float = 1.0

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.pick.shape[1]

    def probabilities(self) -> Tensor:
        """Attention probabilities, `[G, H, Nq, Nk]`, float32 or float64."""
        return self._grouped(self.source.probabilities())

    def gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of the probabilities from the one at `edge`, `[G, H, Nq, Nk]`."""
        return self._grouped(self.source.gradient(gradient))

    def _grouped(self, maps: Tensor) -> Tensor:
        rows = maps.reshape(-1, *maps.shape[-2:])
        flat = self.pick.reshape(-1)
        if not torch.equal(flat, torch.arange(len(rows))):
            rows = rows[flat.to(rows.device)]
        return rows.reshape(*self.pick.shape, *maps.shape[-2:])
