"""Stops gradients at some edges of the graph, such as the results of attention calls.

What remains is the gradient of the ways that lead through no attention.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


@contextlib.contextmanager
def ending_at(edges: Iterable[GradientEdge]) -> Iterator[None]:
    """A context in which backward passes pass zeros on below some edges.

    Zeros, because hooks of the model on tensors further down expect a tensor.
    """
    outputs: dict[torch.autograd.graph.Node, set[int]] = {}
    for edge in edges:
        outputs.setdefault(edge.node, set()).add(edge.output_nr)
    with contextlib.ExitStack() as undo:
        for node, places in outputs.items():
            handle = node.register_prehook(functools.partial(_zeroed, places))
            undo.callback(handle.remove)
        yield


def _zeroed(places: set[int], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of the outputs of a node, with zeros at some places."""
    with torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001
        return tuple(
            g.new_zeros(()).expand_as(g) if g is not None and i in places else g
            for i, g in enumerate(gradients)
        )
