"""Records of attention calls: their tokens, and how their attention and gradient are computed.

A record holds nothing of the model. Its `Source` computes attention and gradient, in `blocks`, from
what the forward pass kept (`operands`) and the gradient that its `Tap` receives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_generic_attn.capture.blocks import Blocks, ExplicitBlocks, FusedBlocks, Maps
from captum_generic_attn.capture.operands import Operands, Saved
from captum_generic_attn.tokens import UNRESOLVED, StreamPair
from captum_generic_attn.tokens.ids import squeeze_expanded


class Source(Protocol):
    """Computes the attention of one call and its gradient in the backward pass."""

    @property
    def operands(self) -> Operands | Saved:
        """The tensors that attention is computed from."""

    def live_rows(self, gradient: Tensor) -> Tensor:
        """`[*lead, Nq]` True where the gradient of the call's result is not zero.

        NaN counts as zero. `lead` are the call's leading axes, such as batch and heads.
        """

    def blocks(
        self, operands: Sequence[Tensor], gradient: Tensor, head_index: Tensor | None
    ) -> Blocks:
        """Attention and its gradient in blocks.

        Args:
            operands: the tensors of `self.operands`.
            gradient: the gradient of the tensor that the record's tap is on.
            head_index: `[maps]` which of the call's maps, with its leading axes flattened; `None`
                takes all in order.
        """


@dataclass(frozen=True, eq=False)
class Explicit:
    """The source of a call whose probabilities the model computes itself. Its tap is on them.

    `order` permutes their axes to `[*lead, Nq, Nk]`. With `single_query` they have no axis of
    queries. `of_result` names, for each axis of the call's result, the axis of the probabilities
    that it comes from; `None` if it comes from the values alone.
    """

    operands: Operands
    order: tuple[int, ...]
    single_query: bool
    of_result: tuple[int | None, ...] = ()

    def blocks(
        self, operands: Sequence[Tensor], gradient: Tensor, head_index: Tensor | None
    ) -> Blocks:
        """Attention and its gradient in blocks; see `Source.blocks`."""
        (operand,) = operands
        attention, gradient = self._arrange(operand), self._arrange(gradient)
        lead = attention.shape[:-2]
        count = math.prod(lead) if head_index is None else len(head_index)
        return ExplicitBlocks(
            count, attention.shape[-2], attention.shape[-1], Maps.of(attention, lead, head_index),
            Maps.of(gradient, lead, head_index),
        )  # fmt: skip

    def live_rows(self, gradient: Tensor) -> Tensor:
        """`[*lead, Nq]` True where the gradient of the call's result is not zero."""
        weights = self.operands.tensors[0]
        live = gradient.abs() > 0
        own = [i for i, axis in enumerate(self.of_result) if axis is not None]
        live = live.permute(*own, *(i for i in range(live.ndim) if i not in own))
        live = live.flatten(len(own)).any(-1) if live.ndim > len(own) else live
        axes = [self.of_result[i] for i in own]
        rows = self.order[:-1]
        live = live.permute([axes.index(axis) for axis in rows if axis in axes])
        for place, axis in enumerate(rows):
            if axis not in axes:  # the result is a sum over this axis: each term is read
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
    """The source of a fused call that computes `softmax(q kᵀ scale + mask) v`.

    Its operands are query, key, value and perhaps a mask, its tap is on the result. The other
    fields are those of `FusedCall`. `logsumexp` `[*lead, Nq]` is of each query's logits, if the
    kernel saved it.
    """

    operands: Operands | Saved
    causal: bool
    scale: float | None
    grouped: bool
    logsumexp: Tensor | None = None

    def live_rows(self, gradient: Tensor) -> Tensor:
        """`[*lead, Nq]` True where the gradient of the call's result is not zero."""
        return (gradient.abs() > 0).any(-1)

    def blocks(
        self, operands: Sequence[Tensor], gradient: Tensor, head_index: Tensor | None
    ) -> Blocks:
        """Attention and its gradient in blocks; see `Source.blocks`."""
        query, key, value, *mask = operands
        lead = gradient.shape[:-2]  # not the query's, which may be broadcast
        groups = lead[-1] // key.shape[-3] if self.grouped else 1
        logsumexp = self.logsumexp
        count = math.prod(lead) if head_index is None else len(head_index)
        return FusedBlocks(
            count, query.shape[-2], key.shape[-2],
            Maps.of(query, lead, head_index),
            Maps.of(key, lead, head_index, groups=groups),
            Maps.of(value, lead, head_index, groups=groups),
            Maps.of(gradient, lead, head_index),
            1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale,
            self.causal,
            Maps.of(squeeze_expanded(mask[0]), lead, head_index) if mask else None,
            None if logsumexp is None else Maps.of(logsumexp.unsqueeze(-1), lead, head_index),
        )  # fmt: skip


Listener = Callable[[Sequence[Tensor], Tensor], None]


class Tap:
    """A hook on a tensor of a call: gives a listener the call's operands and that gradient.

    Reading the operands may run a part of the model again (activation checkpointing), which needs
    the modes of the backward pass; what the listener computes is not part of the model. The graph
    holds the tap, so the tap holds nothing of the graph but its operands.
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

    Attributes:
        index: its place among the attention calls of the forward pass.
        module: the qualified name of the module that makes it.
        module_type: the name of that module's class.
        source: computes its attention and gradient.
        edge: where the gradient that the tap receives is in the graph.
        result: where the gradient of the call's result is in the graph. For a fused call it is the
            same as `edge`.
        tap: hands out operands and gradient in the backward pass.
        query_tokens: `[G, Nq]` token ids of `G` groups: the examples of the batch, or their
            windows.
        key_tokens: `[G, Nk]` token ids.
        examples: `[G]` the example of each group.
        head_index: `[G, H]` the heads of each group, as places among the flattened leading axes.
        in_order: whether `head_index` takes all places in order.
        has_padding_queries: whether some query is no token.
        query_ancestors: indices of the calls that the queries depend on.
        key_ancestors: indices of the calls that the keys depend on.
        query_stream: the name of the stream of the queries.
        key_stream: the names of the streams of the keys, joined by "+".
        stream_pair: the spaces of query and key streams.
        layer: the least index among the calls that are heads of the same layer.
        head_fraction: how large a part of the layer's heads the call has; 1 unless the model calls
            its heads one by one.
    """

    index: int
    module: str
    module_type: str
    source: Source
    edge: GradientEdge
    result: GradientEdge
    tap: Tap
    query_tokens: Tensor
    key_tokens: Tensor
    examples: Tensor
    head_index: Tensor
    in_order: bool
    has_padding_queries: bool
    query_ancestors: frozenset[int]
    key_ancestors: frozenset[int]
    query_stream: str = ""
    key_stream: str = ""
    stream_pair: StreamPair = UNRESOLVED
    layer: int = -1
    head_fraction: float = 1.0

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.head_index.shape[1]

    def blocks(self, operands: Sequence[Tensor], gradient: Tensor) -> Blocks:
        """Attention and its gradient, `[G * H, Nq, Nk]`, from what the tap hands out."""
        return self.source.blocks(
            operands, gradient, None if self.in_order else self.head_index.flatten()
        )

    def read_rows(self, gradient: Tensor | None) -> Tensor:
        """`[G, Nq]` True where a gradient at the call's result is not zero in some head."""
        with torch.no_grad():
            if gradient is None:
                return torch.zeros(self.query_tokens.shape, dtype=torch.bool)
            live = self.source.live_rows(gradient)
            return live.reshape(-1, live.shape[-1])[self.head_index.to(live.device)].any(1)
