"""The explained rows of relevance alone: the sum over ancestors, read from its other end.

Values are `w (R - I)` with weights `w` of the explained rows, and `R` is where tokens started plus
the additions of the calls that a state depends on (`additions`). So the rows are pulled back
through the calls, later ones first, which is the order of the backward pass: a call is done with
when its gradient comes, and no matrix of tokens by tokens is made.

Attention between streams multiplies from both sides (eq. 10): there the calls wait for the end of
the backward pass. The queries' `R̄` is made whole, of the keys' only the sums of its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.relevance.attention_maps import AttentionMap
from captum_generic_attn.relevance.calls import (
    Layout,
    MappedCall,
    Reading,
    Source,
    Sum,
    Switches,
    total_weights,
)
from captum_generic_attn.relevance.equations import divisor
from captum_generic_attn.relevance.full_propagation import Additions, with_own


def pulls_back(calls: Iterable[MappedCall], switches: Switches) -> bool:
    """Whether rows can be pulled back through these calls.

    Not where streams attend to each other in turns: there eq. 10 needs whole matrices of both. Nor
    where a stream grew after others attended to it. It may have grown after it asked others.
    """
    crossing = [(call, source) for call in calls if call.crosses for source in call.sources]
    if not crossing:
        return True
    if not switches.aggregate or any(source.columns is not None for _, source in crossing):
        return False
    return not switches.self_in_cross or not any(
        call.stream in switches.known_to(source.stream) for call, source in crossing
    )


class Row(NamedTuple):
    """Whose explained rows, and of which stream the tokens are that they are read for."""

    reader: str
    column: str


@dataclass(eq=False)
class _Wanted:
    """Weighted rows that are wanted of the states of a stream, each the sum over some calls."""

    states: list[tuple[frozenset[int], Tensor]] = field(default_factory=list)
    total: Tensor | None = None

    def add(self, calls: frozenset[int], weights: Tensor) -> None:
        self.states.append((calls, weights))
        self.total = weights if self.total is None else self.total + weights

    def of(self, index: int) -> Tensor | None:
        """What is wanted of the addition of one call; `None` for nothing."""
        parts = [weights for calls, weights in self.states if index in calls]
        if len(parts) == len(self.states):  # as in any chain of layers
            return self.total
        return torch.stack(parts).sum(0) if parts else None


class Pullback(Sum):
    """Values of all tokens for the explained rows of the streams that the score reads."""

    def __init__(
        self, calls: Sequence[MappedCall], readers: Iterable[str], layout: Layout,
        switches: Switches,
    ) -> None:  # fmt: skip
        self._layout = layout
        self._switches = switches
        self._calls = {call.index: call for call in calls}
        self._waits = switches.self_in_cross and any(call.crosses for call in calls)
        self._unread = set(readers)
        self._dependents = dict.fromkeys(self._calls, 0)
        for call in calls:
            for index in self._ancestors(call):
                self._dependents[index] += 1
        self._maps: dict[int, AttentionMap] = {}
        self._rows: dict[str, Tensor] = {}
        self._wanted: dict[str, dict[Row, _Wanted]] = {}
        self._values: dict[Row, Tensor] = {}

    def _ancestors(self, call: MappedCall) -> frozenset[int]:
        return (call.query_ancestors | call.key_ancestors) & self._calls.keys()

    def _own(self, stream: str, ancestors: frozenset[int]) -> frozenset[int]:
        return frozenset(
            i for i in ancestors if i in self._calls and self._calls[i].stream == stream
        )

    def read(self, stream: str, readings: Sequence[Reading]) -> None:  # noqa: D102
        self._rows[stream] = total_weights(readings)
        for weights, ancestors in readings:
            # Without aggregation a state is what its last call left, and nothing is subtracted.
            start = not self._switches.aggregate and bool(self._own(stream, ancestors))
            for column in self._switches.known_to(stream):
                self._want(stream, ancestors, Row(stream, column), weights, start=start)
        self._unread.discard(stream)
        self._advance()

    def arrive(self, index: int, attention_map: AttentionMap) -> None:  # noqa: D102
        self._maps[index] = attention_map
        self._advance()
        if index in self._maps:
            self._maps[index] = attention_map.kept()

    def finish(self) -> dict[str, Tensor]:  # noqa: D102
        if self._waits:
            self._prepare_crossing()
        for index in sorted(self._maps, reverse=True):
            self._go_through(index)
        values: dict[str, Tensor] = {}
        for row, part in self._values.items():
            if row.reader == row.column:
                part = with_own(part, self._rows[row.reader], self._switches.own)
            values[row.column] = values[row.column] + part if row.column in values else part
        for name, weights in self._rows.items():
            roots = self._layout.streams[name].roots
            values.setdefault(name, weights.new_zeros(len(weights), roots))
        return values

    # -- what is wanted -----------------------------------------------------------------------

    def _want(
        self, stream: str, ancestors: frozenset[int], row: Row, weights: Tensor, *, start: bool
    ) -> None:
        """Ask for weighted rows of a state: of R with `start`, else of what its calls added."""
        wanted = self._wanted.setdefault(stream, {}).setdefault(row, _Wanted())
        own = self._own(stream, ancestors)
        if self._switches.aggregate:
            if own:
                wanted.add(own, weights)
        else:  # the row of a token is what the last call that wrote to it left
            for index in sorted(own, reverse=True):
                wanted.add(frozenset([index]), weights)  # of the other rows it adds nothing
                weights = weights * ~self._layout.touched(self._calls[index])
        if start and row.column == stream:
            self._give(stream, row, weights)

    def _give(self, stream: str, row: Row, weights: Tensor) -> None:
        """Hand weighted rows of a stream to the tokens that they started as."""
        tokens = self._layout.streams[stream]
        part = tokens.hand_back(weights.unsqueeze(1))[:, 0, : tokens.roots]
        self._values[row] = self._values[row] + part if row in self._values else part

    # -- calls --------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Go through the calls of which nothing more can be wanted."""
        while not self._waits and (
            ready := [
                i for i in self._maps
                if self._dependents[i] == 0 and self._calls[i].stream not in self._unread
            ]
        ):  # fmt: skip
            self._go_through(max(ready))

    def _go_through(self, index: int) -> None:
        """Pull what is wanted of a call's addition back to its keys."""
        call, attention_map = self._calls[index], self._maps.pop(index)
        for ancestor in self._ancestors(call):
            self._dependents[ancestor] -= 1
        wanted = {
            row: weights
            for row, known in self._wanted.get(call.stream, {}).items()
            if (weights := known.of(index)) is not None
        }
        if not wanted:
            return
        stream = self._layout.streams[call.stream]
        rows = stream.hand_back(torch.stack(list(wanted.values()), 1))
        from_left = self._times_queries(call, rows) if call.crosses else rows
        stacked = torch.cat([rows, from_left], 1) if call.crosses else rows
        queries = self._layout.gather(stacked, call.examples, call.queries, call.stream)
        product = attention_map.of_rows(queries)
        for source in call.sources:
            keys = self._layout.scatter(product, call.examples, source.keys, source.stream)
            for place, row in enumerate(wanted):
                if call.crosses and row.column == source.stream:
                    self._cross(call, source, row, keys[:, len(wanted) + place])
                elif row.column in self._switches.known_to(source.stream):
                    ancestors = call.key_ancestors
                    self._want(source.stream, ancestors, row, keys[:, place], start=True)

    # -- eq. 10 -------------------------------------------------------------------------------

    def _times_queries(self, call: MappedCall, rows: Tensor) -> Tensor:
        """`rows (R̄^{ss})ᵀ`, `[B, k, size]`."""
        if not self._switches.self_in_cross:
            return rows
        own, tokens = self._additions.of_queries(call)
        if own is None:
            return rows
        rows = rows.clone()
        rows[:, :, tokens] += rows[:, :, tokens] @ own.mT
        return rows

    def _cross(self, call: MappedCall, source: Source, row: Row, weights: Tensor) -> None:
        """Pull rows back through `R̄^{qq}` of the keys."""
        if not self._switches.self_in_cross:
            self._give(source.stream, row, weights)
        elif not self._switches.normalize:
            self._want(source.stream, call.key_ancestors, row, weights, start=True)
        else:
            self._give(source.stream, row, weights)
            sums = self._sums_of(source.stream, call.key_ancestors)
            if sums is not None:
                weights = weights / divisor(sums)
                self._want(source.stream, call.key_ancestors, row, weights, start=False)

    def _prepare_crossing(self) -> None:
        """From the first call to the last: the queries' matrices, the sums of the keys' rows."""
        crossing = [call for call in self._calls.values() if call.crosses]
        asking = {call.stream for call in crossing}
        asked = {source.stream for call in crossing for source in call.sources}
        self._additions = Additions(self._layout, self._switches)
        self._sums: dict[int, Tensor] = {}
        for index, call in sorted(self._calls.items()):
            if call.crosses or index not in self._maps:
                continue
            if call.stream in asking:
                self._additions.add(call, self._maps[index].dense())
            if call.stream in asked and self._switches.normalize:
                self._sums[index] = self._summed(call, self._maps[index])

    def _summed(self, call: MappedCall, attention_map: AttentionMap) -> Tensor:
        """`[B, size]`, the sums of the rows that a call adds to its stream."""
        (source,) = call.sources
        before = self._sums_of(source.stream, call.key_ancestors)
        size = self._layout.streams[source.stream].size
        ones = self._layout.like.new_ones(self._layout.examples, 1, size)  # rows of the start
        before = ones if before is None else ones + before.unsqueeze(1)
        keys = self._layout.gather(before, call.examples, source.keys, source.stream)
        rows = attention_map.of_columns(keys.mT).mT
        added = self._layout.scatter(rows, call.examples, call.queries, call.stream)
        return self._layout.streams[call.stream].hand_on(added.mT.clone()).squeeze(-1)

    def _sums_of(self, stream: str, ancestors: frozenset[int]) -> Tensor | None:
        """`[B, size]`, the sums of the rows of `R - I` in a state; `None` for zero."""
        parts = [self._sums[i] for i in self._own(stream, ancestors) if i in self._sums]
        return torch.stack(parts).sum(0) if parts else None
