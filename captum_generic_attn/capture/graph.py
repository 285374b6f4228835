"""Finds the attention calls that a score depends on, and where its backward pass can stop.

This walks autograd's graph before the backward pass, so that calls that do not count make that pass
no longer.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_generic_attn.capture.record import AttentionRecord

_LAST, _EARLIER = 1, 2
_WIDEST = 4
"""How many times as wide as the residual stream the heads of a call may be together."""


class Reached:
    """The calls that a score depends on.

    `index in reached` tells whether the score depends on the call of that index; iteration gives
    all such indices.
    """

    def __init__(self, score: Tensor, records: Sequence[AttentionRecord]) -> None:
        self._below: dict[Any, list[tuple[Any, int]]] = {}  # those that run last come first
        edges: set[tuple[Any, int]] = set()
        if score.grad_fn is not None:
            edges.add((score.grad_fn, score.output_nr))
            self._walk(score.grad_fn)
            edges.update(edge for below in self._below.values() for edge in below)
        self._known = {r.index for r in records if (r.edge.node, r.edge.output_nr) in edges}

    def _walk(self, top: Any) -> None:
        seen = {top}
        stack = [(top, edges := _edges(top), iter(edges))]
        while stack:
            node, edges, further = stack[-1]
            for below, _ in further:
                if below not in seen:
                    seen.add(below)
                    stack.append((below, found := _edges(below), iter(found)))
                    break
            else:
                self._below[node] = edges
                stack.pop()

    def __contains__(self, index: object) -> bool:
        return index in self._known

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def deepest(self, records: Sequence[AttentionRecord]) -> list[AttentionRecord]:
        """Those records below which no other of them lies in the graph."""
        edges = {(r.edge.node, r.edge.output_nr) for r in records}
        leading: set[Any] = set()  # nodes below which one of them lies
        for node, below in self._below.items():
            for edge in below:
                if edge[0] in leading or edge in edges:
                    leading.add(node)
                    break
        return [r for r in records if r.edge.node not in leading]

    def parts_early(
        self, last: Sequence[AttentionRecord], earlier: Sequence[AttentionRecord],
        records: Sequence[AttentionRecord],
    ) -> bool:  # fmt: skip
        """Whether the score may read tokens behind `earlier` calls that it does not behind `last`.

        Paths from the score to both kinds of calls part at each layer, where attention is added to
        the residual stream: an addition passes the gradient of a token to both sides alike. Where
        paths part at another operation (stacked exits, concatenated hidden states), other tokens
        may be read there. Paths end at the results of all `records`.
        """
        ends = {_edge(r.result): 0 for r in records}
        ends.update((_edge(r.result), _EARLIER) for r in earlier)
        ends.update((_edge(r.result), _LAST) for r in last)
        size = sum(_elements(r.result) for r in last) / _WIDEST  # of all heads together
        rows = max(r.query_tokens.numel() for r in last)
        leading: dict[Any, int] = {}
        for node, below in self._below.items():
            ways = [ends[e] if e in ends else leading.get(e[0], 0) for e in below]
            leading[node] = found = functools.reduce(operator.or_, ways, 0)
            parts = found == _LAST | _EARLIER and _EARLIER in ways and len(ways) > 1
            if parts and not _adds_to_tokens(node, size, rows):
                return True
        return False


def _adds_to_tokens(node: Any, size: float, rows: int) -> bool:
    """Whether a node is an addition of at least `size` elements, the same number for each row."""
    if type(node).__name__ != "AddBackward0":
        return False
    elements = _elements(GradientEdge(node, 0))
    return elements >= size and elements % rows == 0


def _edge(edge: GradientEdge) -> tuple[Any, int]:
    return edge.node, edge.output_nr


def _elements(edge: GradientEdge) -> float:
    """How many elements the tensor at an edge has; NaN if unknown.

    The attribute is private in PyTorch, so it is only a short cut: without it, additions are not
    told apart, and one more pass over the graph is made.
    """
    known = getattr(edge.node, "_input_metadata", None)
    return math.nan if known is None else math.prod(known[edge.output_nr].shape)


def _edges(node: Any) -> list[tuple[Any, int]]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def reached_by(score: Tensor, records: Sequence[AttentionRecord]) -> Reached:
    """The calls among `records` that a score depends on."""
    return Reached(score, records)
