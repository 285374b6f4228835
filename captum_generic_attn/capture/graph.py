"""Which attention calls a score reaches through autograd's graph, and where a backward can stop.

Called by `explanation` before the backward pass: calls that it has no use for must not make that
pass longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from captum_generic_attn.capture.record import AttentionRecord


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


def _edges(node: Any) -> list[tuple[Any, int]]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def reached_by(score: Tensor, records: Sequence[AttentionRecord]) -> Reached:
    """The calls among `records` that a score depends on."""
    return Reached(score, records)
