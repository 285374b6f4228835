"""Keeps what the capture claims about the tensors that attention calls read, for a check.

`verify` gives a `Witness` to `capture_forward` and compares its claims with derivatives. Without
one, nothing is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

_SAME = {"NativeDropoutBackward0", "ToCopyBackward0", "CloneBackward0", "AliasBackward0"}
"""Nodes after a softmax that keep its probabilities, or set some to zero."""


class Read(NamedTuple):
    """A tensor that a call reads.

    Attributes:
        what: `"queries"`, `"keys"`, `"values"` or `"logits"`.
        edge: where the graph holds it.
        like: an empty tensor of its type and device.
        token_ids: its token ids, in its shape; two tensors for logits, of queries and of keys.
    """

    what: str
    edge: GradientEdge
    like: Tensor
    token_ids: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Observed:
    """One attention call: a copy of its result, the token ids of the result, and what it read."""

    result: Tensor
    ids: Tensor
    reads: tuple[Read, ...]


@dataclass(eq=False)
class Witness:
    """The calls of one forward pass, by the indices of their records."""

    calls: dict[int, Observed] = field(default_factory=dict)

    def see(
        self, index: int, result: Tensor, ids: Tensor, **read: tuple[Tensor, tuple[Tensor, ...]]
    ) -> None:
        """Keep a call.

        Args:
            index: of its record.
            result: what it returned.
            ids: the token ids of the result.
            **read: the tensors that it read, each with its token ids. Those without a gradient or
                without tokens are left out.
        """
        with torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001
            reads = tuple(
                Read(what, edge, tensor.new_empty(0), token_ids)
                for what, (tensor, token_ids) in read.items()
                if token_ids and tensor.requires_grad and token_ids[0].shape == tensor.shape
                and (edge := _edge(what, tensor)) is not None
            )  # fmt: skip
            self.calls[index] = Observed(result.detach().clone(), ids, reads)


def _edge(what: str, tensor: Tensor) -> GradientEdge | None:
    """Where the graph holds a tensor; for probabilities, where it holds their logits."""
    if what != "logits":
        return get_gradient_edge(tensor)
    node = tensor.grad_fn
    while node is not None and node.name() in _SAME:
        node = node.next_functions[0][0]
    if node is None or node.name() != "SoftmaxBackward0":
        return None  # probabilities were changed, so each may depend on all keys
    below, place = node.next_functions[0]
    return None if below is None else GradientEdge(below, place)
