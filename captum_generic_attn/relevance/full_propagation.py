"""Full relevance matrices (eq. 6 to 11), for `relevance()` and where rows alone do not suffice."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from captum_generic_attn.relevance.aggregator import (
    BufferedAggregator,
    PropagationOptions,
    apply_own,
    read_rows,
    total_weights,
)
from captum_generic_attn.relevance.calls import IndexedCall, TokenIndexing
from captum_generic_attn.relevance.states import RelevanceStates


class FullPropagation(BufferedAggregator):
    """Collects the maps of all calls, then updates relevance from the first call to the last."""

    states: ClassVar[type[RelevanceStates]] = RelevanceStates

    def __init__(
        self, calls: Sequence[IndexedCall], indexing: TokenIndexing, options: PropagationOptions
    ) -> None:
        super().__init__()
        self._calls = calls
        self._indexing = indexing
        self._own = options.own
        self._states = self.states(indexing, options)

    def result(self) -> dict[str, Tensor]:
        """`[B, base tokens]` values of the tokens of each stream."""
        for call in self._calls:
            if call.index in self._maps:
                self._states.add_call(call, self._maps.pop(call.index).dense())
        values: dict[str, Tensor] = {}
        for name, rows in self._output_rows.items():
            for to, stream in self._indexing.streams.items():
                matrix = functools.partial(self._states.readout, name, to=to)
                part = read_rows(matrix, rows, stream.num_base_tokens, same_stream=to == name)
                if part is None:
                    continue
                if to == name:
                    part = apply_own(part, total_weights(rows), self._own)
                values[to] = values[to] + part if to in values else part
        return values

    def matrices(self, states: Mapping[str, frozenset[int]]) -> dict[tuple[str, str], Tensor]:
        """`[B, size, base tokens]` relevance for each (query stream, key stream)."""
        found = {}
        for query in self._indexing.streams:
            for key in self._indexing.streams:
                matrix = self._states.relevance(query, states[query], key)
                if matrix is not None:
                    found[query, key] = matrix.expand(self._indexing.examples, -1, -1)
        return found
