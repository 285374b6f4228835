"""Records of attention calls: what the rules need of each, and nothing of the model.

A record holds what its call read as autograd itself keeps it for a backward pass, so it costs no
memory of its own; `blocks` computes attention and gradient from it when the backward pass comes by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_generic_attn.capture.blocks import Blocks, ExplicitBlocks, FusedBlocks, Maps
from captum_generic_attn.tokens import NOBODY, Meeting
from captum_generic_attn.tokens.ids import compact

_KEEPING_NODES = {
    "ScaledDotProductFlashAttentionForCpuBackward0",
    "ScaledDotProductFlashAttentionBackward0",
}
"""Nodes of fused kernels that keep the natural logarithm of each query's sum of exponentials."""


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
    def of(cls, *tensors: Tensor, copies: bool = False) -> Operands:
        """Note tensors as they are now; with `copies`, whatever the model does to them later."""
        kept = tuple(t.detach().clone() if copies else t.detach() for t in tensors)
        return cls(kept, tuple(map(_version, kept)))

    def read(self) -> tuple[Tensor, ...]:
        """The tensors, if the model did not write to them since.

        Raises:
            OverwrittenError: if it did.
        """
        if tuple(map(_version, self.tensors)) != self.versions:
            raise OverwrittenError("an attention operand was modified by an inplace operation")
        return self.tensors


class _Keep(torch.autograd.Function):
    """A node that does nothing but keep tensors as autograd keeps them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty(0)


class Saved:
    """Tensors of an attention call, kept by autograd: shared with its graph, and recomputed with it
    where the model checkpoints its activations.

    Like those of the graph they can be read once in each backward pass, and a `RuntimeError` says
    where the model overwrote them.
    """  # fmt: skip

    def __init__(self, *tensors: Tensor, copies: bool = False) -> None:
        """Keep tensors; `copies` for those that no gradient leads to, as in `Operands.of`."""
        # In PyTorch 2.9 a node frees what it keeps when its result is gone.
        self._result = _Keep.apply(*tensors)
        self._node = self._result.grad_fn
        self._plain = Operands.of(*tensors, copies=copies) if self._node is None else None

    def read(self) -> tuple[Tensor, ...]:
        """The tensors."""
        if self._plain is not None:
            return self._plain.read()
        return tuple(tensor.detach() for tensor in self._node.saved_tensors)


def sums_kept_by(result: Tensor) -> Tensor | None:
    """`[..., Nq]`, the logarithm of each query's sum of exponentials, if the kernel kept it.

    Its attribute is no public one, so nothing depends on it: without, a softmax is computed. Where
    a model checkpoints its activations, reading it would run the model again.
    """
    node = result.grad_fn
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # noqa: SLF001
    if node is None or node.name() not in _KEEPING_NODES or hooks is None or hooks(False):
        return None
    sums = getattr(node, "_saved_logsumexp", None)
    if not isinstance(sums, Tensor) or sums.shape != result.shape[:-1]:
        return None
    return sums.detach()


@dataclass(frozen=True, eq=False)
class Explicit:
    """Probabilities that the model computed itself; `order` brings their axes to [..., q, k].

    `of_result` says of each axis of what they make of the values which of their axes it is, `None`:
    none of them.
    """

    operands: Operands
    order: tuple[int, ...]
    single_query: bool
    of_result: tuple[int | None, ...] = ()

    def blocks(self, operands: Sequence[Tensor], gradient: Tensor, pick: Tensor | None) -> Blocks:
        """The call in blocks.

        Args:
            operands: what `self.operands` hold.
            gradient: the gradient of the probabilities, in the order of their axes.
            pick: `[maps]` which of the call's maps, its leading axes flattened; `None`: all, in
                order.
        """
        (operand,) = operands
        attention, gradient = self._arrange(operand), self._arrange(gradient)
        lead = attention.shape[:-2]
        count = math.prod(lead) if pick is None else len(pick)
        return ExplicitBlocks(
            count, attention.shape[-2], attention.shape[-1], Maps.of(attention, lead, pick),
            Maps.of(gradient, lead, pick),
        )  # fmt: skip

    def live_rows(self, gradient: Tensor) -> Tensor:
        """`[*lead, Nq]` True where the gradient of the call's result is not zero."""
        weights = self.operands.tensors[0]
        live = gradient.abs() > 0  # NaN is no evidence
        own = [i for i, axis in enumerate(self.of_result) if axis is not None]
        live = live.permute(*own, *(i for i in range(live.ndim) if i not in own))
        live = live.flatten(len(own)).any(-1) if live.ndim > len(own) else live
        axes = [self.of_result[i] for i in own]
        rows = self.order[:-1]
        live = live.permute([axes.index(axis) for axis in rows if axis in axes])
        for place, axis in enumerate(rows):
            if axis not in axes:  # summed: what is read of the sum is read of each
                live = live.unsqueeze(place)
            elif weights.shape[axis] == 1:
                live = live.any(place, keepdim=True)
        live = live.expand([weights.shape[axis] for axis in rows])
        return live.unsqueeze(-1) if self.single_query else live

    def _arrange(self, tensor: Tensor) -> Tensor:
        tensor = tensor.permute(self.order)
        return tensor.unsqueeze(-2) if self.single_query else tensor


@dataclass(frozen=True, eq=False)
class Fused:
    """`scaled_dot_product_attention`; its operands are query, key, value and perhaps a mask."""

    operands: Operands | Saved
    causal: bool
    scale: float | None
    grouped: bool
    sums: Tensor | None = None

    def live_rows(self, gradient: Tensor) -> Tensor:
        """`[*lead, Nq]` True where the gradient of the call's result is not zero."""
        return (gradient.abs() > 0).any(-1)  # NaN is no evidence

    def blocks(self, operands: Sequence[Tensor], gradient: Tensor, pick: Tensor | None) -> Blocks:
        """The call in blocks.

        Args:
            operands: what `self.operands` hold.
            gradient: the gradient of the kernel's output.
            pick: `[maps]` which of the call's maps, its leading axes flattened; `None`: all, in
                order.
        """
        query, key, value, *mask = operands
        lead = gradient.shape[:-2]  # the query's, unless it is shared
        groups = lead[-1] // key.shape[-3] if self.grouped else 1
        sums = self.sums
        count = math.prod(lead) if pick is None else len(pick)
        return FusedBlocks(
            count, query.shape[-2], key.shape[-2],
            Maps.of(query, lead, pick),
            Maps.of(key, lead, pick, groups=groups),
            Maps.of(value, lead, pick, groups=groups),
            Maps.of(gradient, lead, pick),
            1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale,
            self.causal,
            Maps.of(compact(mask[0]), lead, pick) if mask else None,
            None if sums is None else Maps.of(sums.unsqueeze(-1), lead, pick),
        )  # fmt: skip


Listener = Callable[[Sequence[Tensor], Tensor], None]


class Tap:
    """Hands out a call's operands and the gradient of a tensor of it, when the backward pass comes.

    Reading the operands may run a piece of the model again (activation checkpointing), under the
    modes of the backward pass; what the listener computes is not the model's. The graph holds the
    tap, so the tap holds nothing of the graph beyond its operands.
    """

    def __init__(self, tensor: Tensor, operands: Operands | Saved) -> None:
        self.listener: Listener | None = None
        self._operands = operands
        tensor.register_hook(self._receive)  # type: ignore[no-untyped-call]

    def _receive(self, gradient: Tensor | None) -> None:
        if self.listener is not None and gradient is not None:
            operands = self._operands.read()
            with torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001
                self.listener(operands, gradient.detach())


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One attention call.

    `query_tokens` `[G, Nq]` and `key_tokens` `[G, Nk]` are token ids of `G` groups: the examples
    of the batch, or their windows; `examples` `[G]` says whose. `pick` `[G, H]` finds a group's
    heads among the flattened leading axes of the probabilities; they are `plain` if it takes all of
    them in order. `padded` says whether some query is no token. `result` is where the gradient of
    what the call returns passes, `edge` where that comes which the tap hands out: they differ where
    the model computes its probabilities itself. `query_ancestors` and
    `key_ancestors` are the calls that the queries and keys depend on; `meeting` says whose streams
    met. Where a model calls its heads one by one, the calls of one `layer` have a `share` each of
    the layer's map.
    """

    index: int
    module: str
    module_type: str
    source: Explicit | Fused
    edge: GradientEdge
    result: GradientEdge
    tap: Tap
    query_tokens: Tensor
    key_tokens: Tensor
    examples: Tensor
    pick: Tensor
    plain: bool
    padded: bool
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

    def blocks(self, operands: Sequence[Tensor], gradient: Tensor) -> Blocks:
        """Attention and its gradient, `[G * H, Nq, Nk]`, from what the tap hands out."""
        return self.source.blocks(operands, gradient, None if self.plain else self.pick.flatten())

    def read_rows(self, gradient: Tensor | None) -> Tensor:
        """`[G, Nq]` True where a gradient at the call's result is not zero in some head."""
        with torch.no_grad():
            if gradient is None:
                return torch.zeros(self.query_tokens.shape, dtype=torch.bool)
            live = self.source.live_rows(gradient)
            return live.reshape(-1, live.shape[-1])[self.pick.to(live.device)].any(1)
