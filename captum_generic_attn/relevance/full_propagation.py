"""The sum over ancestors: equations 6 to 11 over the attention calls of one forward pass.

A residual stream is a sum, and each rule has the form `R += addition`. So each call gets the
additions that it makes, and the relevance of a state is where its tokens started plus the additions
of the calls that the state depends on: parallel branches read the same old state by themselves.

`explanation` lets `WholeSum` collect the maps of the calls and read the answer off `Additions`;
where only rows are asked for, `pullback` takes its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_generic_attn.relevance.calls import (
    Collected,
    Layout,
    MappedCall,
    OwnEntry,
    Reading,
    Source,
    Switches,
    total_weights,
)
from captum_generic_attn.relevance.equations import (
    cross_attention_update,
    divisor,
    normalize_relevance,
    self_attention_update,
)


@dataclass(frozen=True, eq=False)
class Block:
    """What a call adds: `[B, n, columns]` rows of its stream from position `first` to the end."""

    first: int
    rows: Tensor


class Additions:
    """What each attention call adds to the relevance of its stream.

    Relevance is kept without its identity (`R − I`), so nothing cancels and a zero row is exact;
    with `aggregate=False` (the authors' ablation, each `+=` an `=`) it is `R` of the latest call.
    One sum for each pair of streams runs on from state to state; a state that another branch of
    the model left behind is summed anew.
    """

    def __init__(self, layout: Layout, switches: Switches) -> None:
        self._layout = layout
        self._streams = layout.streams
        self._examples = layout.examples
        self._like = layout.like
        self._start = layout.start
        self._switches = switches
        self._added: dict[int, dict[str, Block]] = {}
        self._touched: dict[int, Tensor] = {}
        self._stream_of: dict[int, str] = {}
        self._sums: dict[tuple[str, str], tuple[frozenset[int], Tensor]] = {}

    def add(self, call: MappedCall, attention_map: Tensor) -> None:
        """Eq. 6, 7, 10 and 11: what a call adds to the relevance of its queries' stream.

        Args:
            call: the call; those before it have been added.
            attention_map: its Ā, `[G, Nq, Nk]`.
        """
        added: dict[str, Tensor] = {}
        for source in call.sources:
            for to in self._known(call, source):
                if call.crosses and to == source.stream:
                    update = self.crossing(call, attention_map, source)
                else:
                    update = self._carried(call, attention_map, source, to)
                added[to] = added[to] + update if to in added else update
        if self._switches.row_normalize:
            sums = self._row_sums(call, attention_map)
            added = {to: self._scaled(call, rows, sums, to) for to, rows in added.items()}
        stream = self._streams[call.stream]
        first = self._first(call)
        self._added[call.index] = {
            to: Block(first, stream.hand_on(rows, first)) for to, rows in added.items()
        }
        self._stream_of[call.index] = call.stream
        if not self._switches.aggregate:
            self._touched[call.index] = self._layout.touched(call).unsqueeze(-1)

    def _known(self, call: MappedCall, source: Source) -> list[str]:
        """The streams to which a call adds: the keys', and all that these know of."""
        own = self._records(source.stream, call.key_ancestors)
        found = {to for i in own for to in self._added[i]}
        switches = self._switches
        if call.crosses and not switches.aggregate and switches.mutual(call.stream, source.stream):
            found.add(call.stream)  # also if they know nothing of it yet: eq. 11 leaves zeros
        return [to for to in self._streams if to in found or to == source.stream]

    def _carried(self, call: MappedCall, attention_map: Tensor, source: Source, to: str) -> Tensor:
        """`Ā R^{q,to}`: eq. 6, 7 and 11."""
        parts = self._parts(source.stream, call.key_ancestors, to)
        if not parts:
            size = self._streams[call.stream].size - self._first(call)
            return self._like.new_zeros(self._examples, size, self._streams[to].roots)
        if self._whole(call, source):
            return self_attention_update(attention_map, functools.reduce(torch.add, parts))
        device = self._like.device
        owner, keys = call.examples.to(device)[:, None], source.keys.to(device)
        read = [part.expand(self._examples, -1, -1)[owner, keys.clamp(min=0)] for part in parts]
        weights = attention_map * (keys >= 0).unsqueeze(-2)
        return self._rows(call, self_attention_update(weights, functools.reduce(torch.add, read)))

    def _row_sums(self, call: MappedCall, attention_map: Tensor) -> Tensor:
        """`[B, size - first, 1]` sums of the rows of a call's map."""
        if self._layout.in_order(call.examples, call.queries, call.stream):
            return attention_map.sum(-1, keepdim=True)
        return self._rows(call, attention_map.sum(-1, keepdim=True))

    def _scaled(self, call: MappedCall, update: Tensor, sums: Tensor, to: str) -> Tensor:
        """Rollout's addition: `(R + Ā R) / (1 + s) − R`, with `s` the sums of the rows of Ā."""
        before = self.relevance(call.stream, call.query_ancestors, to)
        if before is None:
            return update / divisor(1 + sums)
        return (update - sums * before[:, self._first(call) :]) / divisor(1 + sums)

    def crossing(self, call: MappedCall, attention_map: Tensor, source: Source) -> Tensor:
        """Eq. 10 for the tokens of the keys' stream: `[B, size, roots of the keys' stream]`.

        Args:
            call: the call; those that it depends on have been added.
            attention_map: its map, `[G, Nq, Nk]`.
            source: which of its keys' streams.
        """
        key_stream, query_stream = self._streams[source.stream], self._streams[call.stream]
        dense = self._dense(call, attention_map, source)
        columns = self._layout.columns_or_all(source.columns, key_stream)
        own = None
        if self._switches.self_in_cross:
            own, tokens = self.of_queries(call)
            keys = self._barred(source.stream, call.key_ancestors, columns)
        else:
            tokens = torch.arange(query_stream.size, device=dense.device)
            keys = self._start(source.stream)[:, :, columns]
        if source.columns is None:
            update = self._zeros(call.stream, source.stream)
        else:  # what joined the keys' stream later is a third stream
            update = self._carried(call, attention_map, source, source.stream)
        update[:, tokens[:, None], columns] = cross_attention_update(dense[:, tokens], own, keys)
        return update

    def of_queries(self, call: MappedCall) -> tuple[Tensor | None, Tensor]:
        """`R̄^{ss} − I` (`R^{ss} − I` unless normalised) over tokens of s, and which those are.

        They are all tokens of the stream; or, where merged tokens ask, those that ask, each with
        the relevance of all that it was merged from.
        """
        stream = self._streams[call.stream]
        columns = self._layout.columns_or_all(call.columns, stream)
        asking = torch.unique(call.queries[call.queries >= 0]).to(self._like.device)
        merged = bool((asking >= stream.roots).any())
        tokens = asking if merged else columns
        learnt = self.learnt(call.stream, call.query_ancestors, call.stream)
        if learnt is None:
            return None, tokens
        own = learnt[:, tokens[:, None], columns]
        if merged:
            shares = self._start(call.stream)[:, tokens[:, None], columns]
            shares = shares / shares.sum(-2, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
            own = own @ shares.mT
        return (normalize_relevance(own) if self._normalizes else own), tokens

    def _barred(self, stream: str, ancestors: frozenset[int], columns: Tensor) -> Tensor:
        """`R̄^{qq}` (`R^{qq}` unless normalised) of all tokens of a stream, identity included."""
        start = self._start(stream)[:, :, columns]
        learnt = self.learnt(stream, ancestors, stream)
        if learnt is None:
            return start
        learnt = learnt[:, :, columns]
        return start + (normalize_relevance(learnt) if self._normalizes else learnt)

    @property
    def _normalizes(self) -> bool:
        return self._switches.normalize and self._switches.aggregate

    # -- states -------------------------------------------------------------------------------

    def learnt(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """`R − I` of a state: what attention added to where its tokens started.

        Args:
            stream: the stream whose tokens are the rows.
            ancestors: the calls that the state depends on.
            to: the stream whose tokens are the columns.

        Returns:
            `[B, size, roots]`, or `None` for zero.
        """
        if not self._switches.aggregate:
            relevance = self._latest(stream, ancestors, to)
            if relevance is None or stream != to:
                return relevance
            return relevance - self._start(stream)
        own = frozenset(i for i in self._records(stream, ancestors) if to in self._added[i])
        if not own:
            return None
        known, total = self._sums.get((stream, to), (frozenset[int](), None))
        if total is None or not known <= own:
            known, total = frozenset[int](), self._zeros(stream, to)
        for i in sorted(own - known):
            block = self._added[i][to]
            total[:, block.first :] += block.rows
        self._sums[stream, to] = own, total
        return total

    def relevance(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """R of the paper, `[B, size, roots]`, identity included; `None` for zero."""
        parts = self._parts(stream, ancestors, to)
        if len(parts) < 2:
            return parts[0].clone() if parts else None
        return functools.reduce(torch.add, parts)

    def _parts(self, stream: str, ancestors: frozenset[int], to: str) -> list[Tensor]:
        """The summands of R: what was learnt, and where the tokens started."""
        gain = self.gain(stream, ancestors, to)
        parts = [] if gain is None else [gain]
        if stream == to and (self._switches.aggregate or gain is None):
            parts.append(self._start(stream))
        return parts

    def gain(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """What values are read from: `R − I`, or without aggregation `R` as it is."""
        if self._switches.aggregate:
            return self.learnt(stream, ancestors, to)
        return self._latest(stream, ancestors, to)

    def _latest(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """R without aggregation: each row from the last call that wrote to it."""
        own = [i for i in sorted(self._records(stream, ancestors)) if to in self._added[i]]
        if not own:
            return None
        rows = self._zeros(stream, to)
        if stream == to:
            rows = rows + self._start(stream)
        for i in own:
            block = self._added[i][to]
            touched = self._touched[i][:, block.first :]
            rows[:, block.first :] = torch.where(touched, block.rows, rows[:, block.first :])
        return rows

    def _zeros(self, stream: str, to: str) -> Tensor:
        size, roots = self._streams[stream].size, self._streams[to].roots
        return self._like.new_zeros(self._examples, size, roots)

    def _records(self, stream: str, ancestors: frozenset[int]) -> list[int]:
        return [i for i in ancestors if self._stream_of.get(i) == stream]

    # -- layout -------------------------------------------------------------------------------

    def _whole(self, call: MappedCall, source: Source) -> bool:
        """Whether all tokens of one stream attend to all of another, in their order."""
        in_order = self._layout.in_order
        return in_order(call.examples, call.queries, call.stream) and in_order(
            call.examples, source.keys, source.stream
        )

    def _first(self, call: MappedCall) -> int:
        """The first row of its stream that a call can add to."""
        if call.crosses:
            return 0
        return int(call.queries.clamp(min=0).min())

    def _rows(self, call: MappedCall, rows: Tensor) -> Tensor:
        """`[G, Nq, n]` rows of a call's queries as `[B, size - first, n]` rows of their stream."""
        first, size = self._first(call), self._streams[call.stream].size
        placed = rows.new_zeros(self._examples, size - first + 1, rows.shape[-1])  # last: padding
        owners = call.examples.to(rows.device)[:, None].expand_as(call.queries)
        places = torch.where(call.queries < 0, size, call.queries) - first
        placed.index_put_((owners, places.to(rows.device)), rows, accumulate=True)
        return placed[:, :-1]

    def _dense(self, call: MappedCall, attention_map: Tensor, source: Source) -> Tensor:
        """Ā over all tokens of both streams: `[B, size, size of the keys' stream]`."""
        if self._whole(call, source):
            return attention_map
        device = attention_map.device
        size = self._streams[call.stream].size, self._streams[source.stream].size
        dense = attention_map.new_zeros(self._examples, size[0] + 1, size[1] + 1)
        where = (
            call.examples.to(device)[:, None, None],
            call.queries.to(device)[:, :, None],
            source.keys.to(device)[:, None, :],
        )
        dense.index_put_(where, attention_map, accumulate=True)
        return dense[:, :-1, :-1]


class WholeSum(Collected):
    """Relevance of all rows: the maps of the calls are collected, then added from the first on."""

    def __init__(self, calls: Sequence[MappedCall], layout: Layout, switches: Switches) -> None:
        super().__init__()
        self._calls = calls
        self._layout = layout
        self._own = switches.own
        self._additions = Additions(layout, switches)

    def finish(self) -> dict[str, Tensor]:  # noqa: D102
        for call in self._calls:
            if call.index in self._maps:
                self._additions.add(call, self._maps.pop(call.index).dense())
        values: dict[str, Tensor] = {}
        for name, readings in self._readings.items():
            for to, stream in self._layout.streams.items():
                gain = functools.partial(self._additions.gain, name, to=to)
                part = read_out(gain, readings, stream.roots, own=to == name)
                if part is not None:
                    if to == name:
                        part = with_own(part, total_weights(readings), self._own)
                    values[to] = values[to] + part if to in values else part
        return values

    def matrices(self, states: Mapping[str, frozenset[int]]) -> dict[tuple[str, str], Tensor]:  # noqa: D102
        found = {}
        for query in self._layout.streams:
            for key in self._layout.streams:
                matrix = self._additions.relevance(query, states[query], key)
                if matrix is not None:
                    found[query, key] = matrix.expand(self._layout.examples, -1, -1)
        return found


def read_out(
    relevance: Callable[[frozenset[int]], Tensor | None], readings: Sequence[Reading],
    columns: int, *, own: bool,
) -> Tensor | None:  # fmt: skip
    """Values of a stream's tokens: the explained rows of relevance, weighted.

    Args:
        relevance: `[B, N, columns]` in the state after some calls, `None` for zero. What it
            returns is used before it is asked again.
        readings: the weights of the explained rows, and the states that they are read in.
        columns: number of tokens that get values.
        own: whether rows and columns are of one stream.

    Returns:
        `[B, columns]`; `None` for zero between two streams.
    """
    rows = total_weights(readings)
    values = rows.new_zeros(len(rows), columns) if own else None
    for weights, ancestors in readings:
        state = relevance(ancestors)
        if state is not None:
            part = (weights.unsqueeze(1) @ state).squeeze(1)
            values = part if values is None else values + part
    return values


def with_own(values: Tensor, rows: Tensor, own: OwnEntry) -> Tensor:
    """Values of a stream's tokens with what the token of an example's only explained row is to get.

    Args:
        values: `[B, n]`.
        rows: `[B, N]` weights of the explained rows of the same stream.
        own: `"keep"`: its value; else 0.
    """
    if own == "keep":
        return values
    return values.masked_fill(own_entries(rows)[:, : values.shape[1]], 0.0)


def own_entries(rows: Tensor) -> Tensor:
    """`[B, N]` True for the token of an example's only explained row."""
    explained = rows != 0
    return explained & (explained.sum(-1, keepdim=True) == 1)
