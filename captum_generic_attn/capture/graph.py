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
    """The calls that a score depends on; the graph below each."""

    def __init__(self, score: Tensor, records: Sequence[AttentionRecord]) -> None:
        self._order: list[Any] = []  # nodes, those that the backward pass runs last come first
        self._edges: set[tuple[Any, int]] = set()
        if score.grad_fn is not None:
            self._edges.add((score.grad_fn, score.output_nr))
            self._walk(score.grad_fn)
        self._known = {
            r.index: r for r in records if (r.tap.edge.node, r.tap.edge.output_nr) in self._edges
        }

    def _walk(self, top: Any) -> None:
        seen = {top}
        stack = [(top, iter(top.next_functions))]
        while stack:
            node, further = stack[-1]
            for below, number in further:
                if below is None:
                    continue
                self._edges.add((below, number))
                if below not in seen:
                    seen.add(below)
                    stack.append((below, iter(below.next_functions)))
                    break
            else:
                self._order.append(node)
                stack.pop()

    def __contains__(self, index: object) -> bool:
        return index in self._known

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def deepest(self, records: Sequence[AttentionRecord]) -> list[AttentionRecord]:
        """Those records from which the graph leads to no other of them."""
        edges = {(r.tap.edge.node, r.tap.edge.output_nr) for r in records}
        leading: set[Any] = set()  # nodes below which one of them lies
        for node in self._order:
            if any(
                below in leading or (below, number) in edges
                for below, number in node.next_functions
            ):
                leading.add(node)
        return [r for r in records if r.tap.edge.node not in leading]


def reached_by(score: Tensor, records: Sequence[AttentionRecord]) -> Reached:
    """The calls among `records` that a score depends on."""
    return Reached(score, records)
