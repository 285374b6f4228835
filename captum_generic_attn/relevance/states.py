"""Relevance at every point of the forward graph: eq. 6 to 11, one update ΔR per attention call.

A residual stream is a sum, and each rule has the form `R += ΔR`. So the relevance of a state, the
set of calls upstream of a point, is the identity plus the updates of these calls. Parallel branches
of a model read the same earlier state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_generic_attn.relevance.aggregator import PropagationOptions
from captum_generic_attn.relevance.calls import IndexedCall, KeySource, TokenIndexing
from captum_generic_attn.relevance.equations import (
    cross_attention_update,
    divisor,
    normalize_relevance,
    self_attention_update,
)


@dataclass(frozen=True, eq=False)
class Update:
    """ΔR of a call: `[B, n, columns]` rows of its stream from position `first` to the end."""

    first: int
    rows: Tensor


class RelevanceStates:
    """The updates of all calls, and the relevance of each state.

    Relevance is kept without its identity (`R − I`): nothing cancels, and a zero row is exact. Each
    pair of streams has one running sum; only a state that does not continue it is summed anew.
    """

    def __init__(self, indexing: TokenIndexing, options: PropagationOptions) -> None:
        self._indexing = indexing
        self._streams = indexing.streams
        self._examples = indexing.examples
        self._like = indexing.like
        self._initial = indexing.initial_relevance
        self._options = options
        self._updates: dict[int, dict[str, Update]] = {}
        self._stream_of: dict[int, str] = {}
        self._sums: dict[tuple[str, str], tuple[frozenset[int], Tensor]] = {}

    # -- updates ------------------------------------------------------------------------------

    def add_call(self, call: IndexedCall, attention_map: Tensor) -> None:
        """Eq. 6, 7, 10 and 11: compute the update of a call.

        Args:
            call: the call; those upstream of it have been added.
            attention_map: its Ā, `[G, Nq, Nk]`.
        """
        updates: dict[str, Tensor] = {}
        for source in call.sources:
            for to in self._updated_columns(call, source):
                if call.is_cross_attention and to == source.stream:
                    update = self.cross_update(call, attention_map, source)
                else:
                    update = self._self_update(call, attention_map, source, to)
                updates[to] = updates[to] + update if to in updates else update
        if self._options.row_normalize:
            sums = self._map_row_sums(call, attention_map)
            updates = {to: self._rescaled(call, rows, sums, to) for to, rows in updates.items()}
        stream = self._streams[call.stream]
        first = self._first_row(call)
        self._updates[call.index] = {
            to: Update(first, stream.pool(rows, first)) for to, rows in updates.items()
        }
        self._stream_of[call.index] = call.stream

    def _updated_columns(self, call: IndexedCall, source: KeySource) -> list[str]:
        """The streams whose columns a call updates: the keys', and all that the keys depend on."""
        upstream = self._calls_of(source.stream, call.key_ancestors)
        found = {to for i in upstream for to in self._updates[i]}
        return [to for to in self._streams if to in found or to == source.stream]

    def _self_update(
        self, call: IndexedCall, attention_map: Tensor, source: KeySource, to: str
    ) -> Tensor:
        """`Ā R^{q,to}`: eq. 6, 7 and 11."""
        summands = self._summands(source.stream, call.key_ancestors, to)
        if not summands:
            size = self._streams[call.stream].size - self._first_row(call)
            return self._like.new_zeros(self._examples, size, self._streams[to].num_base_tokens)
        if self._is_whole(call, source):
            return self_attention_update(attention_map, functools.reduce(torch.add, summands))
        device = self._like.device
        owner, keys = call.examples.to(device)[:, None], source.keys.to(device)
        read = [s.expand(self._examples, -1, -1)[owner, keys.clamp(min=0)] for s in summands]
        weights = attention_map * (keys >= 0).unsqueeze(-2)
        update = self_attention_update(weights, functools.reduce(torch.add, read))
        return self._scatter_rows(call, update)

    def _map_row_sums(self, call: IndexedCall, attention_map: Tensor) -> Tensor:
        """`[B, size - first, 1]` row sums of the map of a call."""
        sums = attention_map.sum(-1, keepdim=True)
        if self._indexing.in_order(call.examples, call.queries, call.stream):
            return sums
        return self._scatter_rows(call, sums)

    def _rescaled(self, call: IndexedCall, update: Tensor, sums: Tensor, to: str) -> Tensor:
        """Rollout's update, `(R + Ā R) / (1 + s) − R` with `s` the row sums of Ā."""
        before = self.relevance(call.stream, call.query_ancestors, to)
        if before is None:
            return update / divisor(1 + sums)
        return (update - sums * before[:, self._first_row(call) :]) / divisor(1 + sums)

    # -- eq. 10 -------------------------------------------------------------------------------

    def cross_update(self, call: IndexedCall, attention_map: Tensor, source: KeySource) -> Tensor:
        """Eq. 10 for the columns of the keys' stream: `[B, size, base tokens of that stream]`.

        Args:
            call: the call; those upstream of it have been added.
            attention_map: its map, `[G, Nq, Nk]`.
            source: the keys of one stream.
        """
        dense = self._dense(call, attention_map, source)
        columns = self._indexing.columns_or_all(source.columns, source.stream)
        own = None
        if self._options.self_in_cross:
            own, tokens = self.query_self_relevance(call)
            keys = self._key_self_relevance(source.stream, call.key_ancestors, columns)
        else:
            tokens = torch.arange(self._streams[call.stream].size, device=dense.device)
            keys = self._initial(source.stream)[:, :, columns]
        if source.columns is None:
            update = self._zeros(call.stream, source.stream)
        else:  # tokens that joined the keys' stream after this call count as a third stream
            update = self._self_update(call, attention_map, source, source.stream)
        update[:, tokens[:, None], columns] = cross_attention_update(dense[:, tokens], own, keys)
        return update

    def query_self_relevance(self, call: IndexedCall) -> tuple[Tensor | None, Tensor]:
        """`R̄^{ss} − I` (without eq. 8: `R^{ss} − I`) of the queries' stream, and its tokens.

        Returns:
            `[B, n, n]` (`None` for zero), and the positions `[n]` of the tokens: all of the stream,
            or, where merged tokens are queries, the queries, each with the relevance of all tokens
            that it was merged from.
        """
        stream = self._streams[call.stream]
        columns = self._indexing.columns_or_all(call.columns, call.stream)
        queries = torch.unique(call.queries[call.queries >= 0]).to(self._like.device)
        merged = bool((queries >= stream.num_base_tokens).any())
        tokens = queries if merged else columns
        delta = self.delta(call.stream, call.query_ancestors, call.stream)
        if delta is None:
            return None, tokens
        own = delta[:, tokens[:, None], columns]
        if merged:
            shares = self._initial(call.stream)[:, tokens[:, None], columns]
            shares = shares / shares.sum(-2, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
            own = own @ shares.mT
        return (normalize_relevance(own) if self._options.normalize else own), tokens

    def _key_self_relevance(
        self, stream: str, ancestors: frozenset[int], columns: Tensor
    ) -> Tensor:
        """`R̄^{qq}` (without eq. 8: `R^{qq}`) of the keys' stream, identity included."""
        initial = self._initial(stream)[:, :, columns]
        delta = self.delta(stream, ancestors, stream)
        if delta is None:
            return initial
        delta = delta[:, :, columns]
        return initial + (normalize_relevance(delta) if self._options.normalize else delta)

    # -- states -------------------------------------------------------------------------------

    def delta(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """`R − I` of a state: the sum of the updates of its calls.

        Args:
            stream: the stream whose tokens are the rows.
            ancestors: the calls upstream of the state.
            to: the stream whose tokens are the columns.

        Returns:
            `[B, size, base tokens]`, or `None` for zero.
        """
        own = frozenset(i for i in self._calls_of(stream, ancestors) if to in self._updates[i])
        if not own:
            return None
        summed, total = self._sums.get((stream, to), (frozenset[int](), None))
        if total is None or not summed <= own:
            summed, total = frozenset[int](), self._zeros(stream, to)
        for i in sorted(own - summed):
            update = self._updates[i][to]
            total[:, update.first :] += update.rows
        self._sums[stream, to] = own, total
        return total

    def relevance(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """R of the paper, `[B, size, base tokens]`, identity included; `None` for zero."""
        summands = self._summands(stream, ancestors, to)
        if len(summands) < 2:
            return summands[0].clone() if summands else None
        return functools.reduce(torch.add, summands)

    def readout(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """The matrix whose rows give values to tokens: `R − I`."""
        return self.delta(stream, ancestors, to)

    def _summands(self, stream: str, ancestors: frozenset[int], to: str) -> list[Tensor]:
        """R as a sum: `R − I`, if not zero, and the initial relevance within one stream."""
        delta = self.delta(stream, ancestors, to)
        summands = [] if delta is None else [delta]
        if stream == to:
            summands.append(self._initial(stream))
        return summands

    def _zeros(self, stream: str, to: str) -> Tensor:
        size, columns = self._streams[stream].size, self._streams[to].num_base_tokens
        return self._like.new_zeros(self._examples, size, columns)

    def _calls_of(self, stream: str, ancestors: frozenset[int]) -> list[int]:
        return [i for i in ancestors if self._stream_of.get(i) == stream]

    # -- from calls to streams ----------------------------------------------------------------

    def _is_whole(self, call: IndexedCall, source: KeySource) -> bool:
        """Whether all tokens of one stream attend to all tokens of another, both in order."""
        in_order = self._indexing.in_order
        return in_order(call.examples, call.queries, call.stream) and in_order(
            call.examples, source.keys, source.stream
        )

    def _first_row(self, call: IndexedCall) -> int:
        """The first row of its stream that a call can update."""
        return 0 if call.is_cross_attention else int(call.queries.clamp(min=0).min())

    def _scatter_rows(self, call: IndexedCall, rows: Tensor) -> Tensor:
        """`[G, Nq, n]` rows of a call's queries as `[B, size - first, n]` rows of their stream."""
        first, size = self._first_row(call), self._streams[call.stream].size
        placed = rows.new_zeros(self._examples, size - first + 1, rows.shape[-1])  # last: padding
        owners = call.examples.to(rows.device)[:, None].expand_as(call.queries)
        places = torch.where(call.queries < 0, size, call.queries) - first
        placed.index_put_((owners, places.to(rows.device)), rows, accumulate=True)
        return placed[:, :-1]

    def _dense(self, call: IndexedCall, attention_map: Tensor, source: KeySource) -> Tensor:
        """Ā over all tokens of both streams: `[B, size, size of the keys' stream]`."""
        if self._is_whole(call, source):
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
