"""The tensors that an attention call reads, kept from the forward pass for the backward pass.

They are kept as autograd keeps its own, so they cost no memory: autograd holds the same tensors for
its gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


class OverwrittenError(RuntimeError):
    """The model overwrote a tensor of an attention call; the forward pass must keep copies."""


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; inference tensors, which are refused, do not count."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


@dataclass(frozen=True, eq=False)
class Operands:
    """Tensors of an attention call, and how often each had been written to by then."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, *tensors: Tensor, copies: bool = False) -> Operands:
        """Keep tensors; `copies` of them where the model overwrites them later."""
        kept = tuple(t.detach().clone() if copies else t.detach() for t in tensors)
        return cls(kept, tuple(map(_version, kept)))

    def read(self) -> tuple[Tensor, ...]:
        """The tensors.

        Raises:
            OverwrittenError: if the model wrote to one of them since.
        """
        if tuple(map(_version, self.tensors)) != self.versions:
            raise OverwrittenError("an attention operand was modified by an inplace operation")
        return self.tensors


class _Keep(torch.autograd.Function):
    """A node that does nothing but save tensors for the backward pass."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty(0)


@dataclass(frozen=True, eq=False)
class Saved:
    """Tensors of an attention call that a node of the graph saves.

    Where the model checkpoints its activations, they are computed again. As all saved tensors, they
    can be read once in each backward pass, and a `RuntimeError` says that the model overwrote one.
    """

    node: Node
    result: Tensor  # in PyTorch 2.9 a node frees what it saves when its result is gone

    def read(self) -> tuple[Tensor, ...]:
        """The tensors."""
        return tuple(tensor.detach() for tensor in self.node.saved_tensors)  # type: ignore[attr-defined]


def save(*tensors: Tensor, copies: bool = False) -> Operands | Saved:
    """Keep tensors in the graph; those that need no gradient, as `Operands`.

    Args:
        tensors: what a call reads.
        copies: keep copies of tensors that the graph does not keep.
    """
    result = _Keep.apply(*tensors)
    node = result.grad_fn
    return Operands.of(*tensors, copies=copies) if node is None else Saved(node, result)
