"""Which attention calls a score reaches through autograd's graph, and where a backward can stop.

Called by `explanation` before the backward pass: calls that it has no use for must not make that
pass longer.
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
"""How many times as wide as the residual stream all heads of a call may be."""


class Reached:
    """The calls that a score depends on, and which of them lie deepest in its graph."""

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
        """Those records from which the graph leads to no other of them."""
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
        """Whether the score may read tokens after `earlier` calls that it does not after the last.

        Ways down the graph to both part at each layer, where attention is added to the residual
        stream: an addition hands the gradient of a token on to both sides alike. Where they part at
        anything else (exits that are stacked, hidden states that are joined) it may be another
        token that is read there. Ways end at the results of all `records`.
        """
        ends = {_edge(r.result): 0 for r in records}
        ends.update((_edge(r.result), _EARLIER) for r in earlier)
        ends.update((_edge(r.result), _LAST) for r in last)
        size = sum(_elements(r.result) for r in last) / _WIDEST  # of all heads, one by one or not
        rows = max(r.query_tokens.numel() for r in last)
        leading: dict[Any, int] = {}
        for node, below in self._below.items():
            ways = [ends[e] if e in ends else leading.get(e[0], 0) for e in below]
            leading[node] = found = functools.reduce(operator.or_, ways, 0)
            if found == _LAST | _EARLIER and _EARLIER in ways and len(ways) > 1 and not (
                node.name() == "AddBackward0"
                and (elements := _elements(GradientEdge(node, 0))) >= size
                and elements % rows == 0
            ):  # fmt: skip
                return True
        return False


def _edge(edge: GradientEdge) -> tuple[Any, int]:
    return edge.node, edge.output_nr


def _elements(edge: GradientEdge) -> float:
    """How many elements the tensor at an edge has.

    The attribute is no public one, so nothing depends on it: without, additions are not told apart,
    and one more pass over the graph is made.
    """
    known = getattr(edge.node, "_input_metadata", None)
    return math.nan if known is None else math.prod(known[edge.output_nr].shape)


def _edges(node: Any) -> list[tuple[Any, int]]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def reached_by(score: Tensor, records: Sequence[AttentionRecord]) -> Reached:
    """The calls among `records` that a score depends on."""
    return Reached(score, records)
