"""The explained rows alone, in reverse mode: `wᵀ (R − I)` without any N × N matrix.

R of the output is the identity plus the updates of all upstream calls (`states`). So the weighted
rows are propagated backwards through the calls, the last call first. That is the order of the
backward pass: a call is processed as soon as its gradient is there, and then released.

Cross-attention multiplies from both sides (eq. 10). `CrossRowPropagation` therefore waits for the
end of the backward pass. It needs the matrix `R̄` of the queries' stream, but only the row sums of
the keys' stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.relevance.aggregator import (
    Aggregator,
    OutputRows,
    PropagationOptions,
    apply_own,
    total_weights,
)
from captum_generic_attn.relevance.attention_maps import AttentionMap
from captum_generic_attn.relevance.calls import IndexedCall, KeySource, TokenIndexing
from captum_generic_attn.relevance.equations import divisor
from captum_generic_attn.relevance.states import RelevanceStates


def row_propagation(
    calls: Sequence[IndexedCall], output_streams: Iterable[str], indexing: TokenIndexing,
    options: PropagationOptions,
) -> RowPropagation | None:  # fmt: skip
    """The aggregator of these calls, or `None` where rows alone do not suffice.

    They do not where streams attend to each other in turns, since eq. 10 then needs whole matrices
    of both; nor where a stream got more tokens after others had attended to it.
    """
    cross = [(call, source) for call in calls if call.is_cross_attention for source in call.sources]
    if any(source.columns is not None for _, source in cross):
        return None
    if not cross or not options.self_in_cross:
        return RowPropagation(calls, output_streams, indexing, options)
    if any(call.stream in options.known_to(source.stream) for call, source in cross):
        return None
    return CrossRowPropagation(calls, output_streams, indexing, options)


class Key(NamedTuple):
    """The output stream whose rows are explained, and the stream whose tokens are the columns."""

    output: str
    columns: str


@dataclass(eq=False)
class Cotangent:
    """Weighted rows with respect to states of a stream, each the sum of the updates of its calls.

    `total` is their sum over all states.
    """

    states: list[tuple[frozenset[int], Tensor]] = field(default_factory=list)
    total: Tensor | None = None

    def add(self, calls: frozenset[int], weights: Tensor) -> None:
        """Accumulate weights of rows of a state."""
        self.states.append((calls, weights))
        self.total = weights if self.total is None else self.total + weights

    def of(self, index: int) -> Tensor | None:
        """The cotangent of the update of one call, or `None` for zero."""
        parts = [weights for calls, weights in self.states if index in calls]
        if len(parts) == len(self.states):  # a plain chain of layers
            return self.total
        return torch.stack(parts).sum(0) if parts else None


class RowPropagation(Aggregator):
    """Relevance of all tokens for the explained rows, computed along with the backward pass."""

    def __init__(
        self, calls: Sequence[IndexedCall], output_streams: Iterable[str], indexing: TokenIndexing,
        options: PropagationOptions,
    ) -> None:  # fmt: skip
        self._indexing = indexing
        self._options = options
        self._calls = {call.index: call for call in calls}
        self._without_rows = set(output_streams)
        self._downstream = dict.fromkeys(self._calls, 0)
        for call in calls:
            for index in self._upstream(call):
                self._downstream[index] += 1
        self._maps: dict[int, AttentionMap] = {}
        self._rows: dict[str, Tensor] = {}
        self._cotangents: dict[str, dict[Key, Cotangent]] = {}
        self._values: dict[Key, Tensor] = {}

    def _upstream(self, call: IndexedCall) -> frozenset[int]:
        return (call.query_ancestors | call.key_ancestors) & self._calls.keys()

    def _calls_of(self, stream: str, ancestors: frozenset[int]) -> frozenset[int]:
        return frozenset(
            i for i in ancestors if i in self._calls and self._calls[i].stream == stream
        )

    def add_output_rows(self, stream: str, rows: Sequence[OutputRows]) -> None:
        """Set the explained rows of a stream, each with its state."""
        self._rows[stream] = total_weights(rows)
        for weights, ancestors in rows:
            for columns in self._options.known_to(stream):
                self._accumulate(stream, ancestors, Key(stream, columns), weights)
        self._without_rows.discard(stream)
        self._process_ready()

    def add_map(self, index: int, attention_map: AttentionMap) -> None:
        """Add the map of a call, and propagate through all calls that nothing more depends on."""
        self._maps[index] = attention_map
        self._process_ready()
        if index in self._maps:
            self._maps[index] = attention_map.squeeze_expanded()

    def result(self) -> dict[str, Tensor]:
        """`[B, base tokens]` values of the tokens of each stream."""
        for index in sorted(self._maps, reverse=True):
            self._propagate_through(index)
        values: dict[str, Tensor] = {}
        for key, part in self._values.items():
            if key.output == key.columns:
                part = apply_own(part, self._rows[key.output], self._options.own)
            values[key.columns] = values[key.columns] + part if key.columns in values else part
        for name, weights in self._rows.items():
            size = self._indexing.streams[name].num_base_tokens
            values.setdefault(name, weights.new_zeros(len(weights), size))
        return values

    # -- cotangents ---------------------------------------------------------------------------

    def _accumulate(
        self, stream: str, ancestors: frozenset[int], key: Key, weights: Tensor
    ) -> None:
        """Accumulate weighted rows of `R − I` of a state."""
        own = self._calls_of(stream, ancestors)
        if own:
            self._cotangents.setdefault(stream, {}).setdefault(key, Cotangent()).add(own, weights)

    def _add_values(self, stream: str, key: Key, weights: Tensor) -> None:
        """The identity of R: weighted rows of a stream are values of its base tokens."""
        tokens = self._indexing.streams[stream]
        part = tokens.unpool(weights.unsqueeze(1))[:, 0, : tokens.num_base_tokens]
        self._values[key] = self._values[key] + part if key in self._values else part

    # -- calls --------------------------------------------------------------------------------

    def _process_ready(self) -> None:
        """Propagate through the calls whose cotangents are complete."""
        while ready := [
            i for i in self._maps
            if self._downstream[i] == 0 and self._calls[i].stream not in self._without_rows
        ]:  # fmt: skip
            self._propagate_through(max(ready))

    def _propagate_through(self, index: int) -> None:
        """Propagate the cotangents of a call's update back to its keys."""
        call, attention_map = self._calls[index], self._maps.pop(index)
        for ancestor in self._upstream(call):
            self._downstream[ancestor] -= 1
        cotangents = {
            key: weights
            for key, known in self._cotangents.get(call.stream, {}).items()
            if (weights := known.of(index)) is not None
        }
        if not cotangents:
            return
        keys = list(cotangents)
        rows = self._indexing.streams[call.stream].unpool(torch.stack(list(cotangents.values()), 1))
        if call.is_cross_attention:
            rows = torch.cat([rows, self._times_queries(call, rows)], 1)
        queries = self._indexing.gather(rows, call.examples, call.queries, call.stream)
        product = attention_map.left_multiply(queries)
        for source in call.sources:
            at_keys = self._indexing.scatter(product, call.examples, source.keys, source.stream)
            for place, key in enumerate(keys):
                if call.is_cross_attention and key.columns == source.stream:
                    self._times_keys(call, source, key, at_keys[:, len(keys) + place])
                elif key.columns in self._options.known_to(source.stream):
                    weights = at_keys[:, place]
                    self._accumulate(source.stream, call.key_ancestors, key, weights)
                    if key.columns == source.stream:
                        self._add_values(source.stream, key, weights)

    # -- eq. 10 without its factors R̄ ---------------------------------------------------------

    def _times_queries(self, call: IndexedCall, rows: Tensor) -> Tensor:  # noqa: ARG002
        """Rows `[B, k, size]` times the factor on the queries' side."""
        return rows

    def _times_keys(
        self, call: IndexedCall, source: KeySource, key: Key, weights: Tensor  # noqa: ARG002
    ) -> None:  # fmt: skip
        """Propagate rows `[B, size]` through the factor on the keys' side."""
        self._add_values(source.stream, key, weights)


class CrossRowPropagation(RowPropagation):
    """Rows through cross-attention with both factors `R̄` of eq. 10, after the backward pass."""

    def _process_ready(self) -> None:
        """Wait: the factors of eq. 10 need the calls from the first on."""

    def result(self) -> dict[str, Tensor]:
        """`[B, base tokens]` values of the tokens of each stream."""
        cross = [call for call in self._calls.values() if call.is_cross_attention]
        query_streams = {call.stream for call in cross}
        key_streams = {source.stream for call in cross for source in call.sources}
        self._states = RelevanceStates(self._indexing, self._options)
        self._row_sums: dict[int, Tensor] = {}
        for index, call in sorted(self._calls.items()):
            if call.is_cross_attention or index not in self._maps:
                continue
            if call.stream in query_streams:
                self._states.add_call(call, self._maps[index].dense())
            if call.stream in key_streams and self._options.normalize:
                self._row_sums[index] = self._update_row_sums(call, self._maps[index])
        return super().result()

    def _times_queries(self, call: IndexedCall, rows: Tensor) -> Tensor:
        """Rows times `(R̄^{ss})ᵀ`."""
        own, tokens = self._states.query_self_relevance(call)
        if own is None:
            return rows
        rows = rows.clone()
        rows[:, :, tokens] += rows[:, :, tokens] @ own.mT
        return rows

    def _times_keys(self, call: IndexedCall, source: KeySource, key: Key, weights: Tensor) -> None:
        """Propagate rows through `R̄^{qq}`: the identity, and `R − I` with rows divided by sums."""
        self._add_values(source.stream, key, weights)
        if self._options.normalize:
            sums = self._delta_row_sums(source.stream, call.key_ancestors)
            if sums is None:
                return
            weights = weights / divisor(sums)
        self._accumulate(source.stream, call.key_ancestors, key, weights)

    def _update_row_sums(self, call: IndexedCall, attention_map: AttentionMap) -> Tensor:
        """`[B, size]` row sums of the update of a self-attention call."""
        (source,) = call.sources
        before = self._delta_row_sums(source.stream, call.key_ancestors)
        stream = self._indexing.streams[source.stream]
        ones = self._indexing.like.new_ones(self._indexing.examples, 1, stream.size)  # of I
        before = ones if before is None else ones + before.unsqueeze(1)
        keys = self._indexing.gather(before, call.examples, source.keys, source.stream)
        rows = attention_map.right_multiply(keys.mT).mT
        rows = self._indexing.scatter(rows, call.examples, call.queries, call.stream)
        return self._indexing.streams[call.stream].pool(rows.mT.clone()).squeeze(-1)

    def _delta_row_sums(self, stream: str, ancestors: frozenset[int]) -> Tensor | None:
        """`[B, size]` row sums of `R − I` of a state; `None` for zero."""
        parts = [
            self._row_sums[i] for i in self._calls_of(stream, ancestors) if i in self._row_sums
        ]
        return torch.stack(parts).sum(0) if parts else None
