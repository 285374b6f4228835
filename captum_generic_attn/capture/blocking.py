"""Ends backward passes at the results of attention calls: what reaches them without attention.

`Capture.blocked` uses it, which `reading` asks before the backward pass that explains a score.
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
    """Meanwhile, backward passes hand zeros on through some edges.

    Zeros and not nothing: hooks of the model on what lies before an edge expect a tensor.
    """
    outputs: dict[torch.autograd.graph.Node, set[int]] = {}
    for edge in edges:
        outputs.setdefault(edge.node, set()).add(edge.output_nr)
    with contextlib.ExitStack() as undo:
        for node, places in outputs.items():
            handle = node.register_prehook(functools.partial(_ended, places))
            undo.callback(handle.remove)
        yield


def _ended(places: set[int], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a node's outputs, zero at some places."""
    with torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001
        return tuple(
            g.new_zeros(()).expand_as(g) if g is not None and i in places else g
            for i, g in enumerate(gradients)
        )
