"""What a capture says of each tensor that attention calls read, kept so that it can be checked.

`verify` hands a `Witness` to `capture_forward` and compares what it saw with derivatives. Without
one, nothing is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

_SAME = {"NativeDropoutBackward0", "ToCopyBackward0", "CloneBackward0", "AliasBackward0"}
"""Nodes behind a softmax that change no probability, or set some to zero."""


class Read(NamedTuple):
    """A tensor that a call reads, where the graph holds it, and the plane of its tokens.

    `what` is `"queries"`, `"keys"`, `"values"` or `"logits"`; these have two planes.
    """

    what: str
    edge: GradientEdge
    like: Tensor
    planes: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Observed:
    """One attention call: its result as it was, the plane of the result, and what it read."""

    result: Tensor
    plane: Tensor
    reads: tuple[Read, ...]


@dataclass(eq=False)
class Witness:
    """The calls of one forward pass, by the index of their records."""

    calls: dict[int, Observed] = field(default_factory=dict)

    def see(
        self, index: int, result: Tensor, plane: Tensor, **read: tuple[Tensor, tuple[Tensor, ...]]
    ) -> None:
        """Note a call. What no gradient leads to, or has no tokens, is left out."""
        with torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001
            reads = tuple(
                Read(what, edge, tensor.new_empty(0), planes)
                for what, (tensor, planes) in read.items()
                if planes and tensor.requires_grad and planes[0].shape == tensor.shape
                and (edge := _edge(what, tensor)) is not None
            )  # fmt: skip
            self.calls[index] = Observed(result.detach().clone(), plane, reads)


def _edge(what: str, tensor: Tensor) -> GradientEdge | None:
    """Where the graph holds a tensor; of probabilities, where it holds what the softmax is of."""
    if what != "logits":
        return get_gradient_edge(tensor)
    node = tensor.grad_fn
    while node is not None and node.name() in _SAME:
        node = node.next_functions[0][0]
    if node is None or node.name() != "SoftmaxBackward0":
        return None  # probabilities that were changed, whose rows depend on all keys
    below, place = node.next_functions[0]
    return None if below is None else GradientEdge(below, place)
