"""The ablation "no aggregation" of the paper: each `+=` of eq. 6 to 11 becomes `=`.

The row of a token is what the last call that wrote to it left, so relevance includes its identity
only where no call has written.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from captum_generic_attn.relevance.aggregator import PropagationOptions
from captum_generic_attn.relevance.calls import IndexedCall, KeySource, TokenIndexing
from captum_generic_attn.relevance.full_propagation import FullPropagation
from captum_generic_attn.relevance.states import RelevanceStates


class LastUpdateStates(RelevanceStates):
    """R of each state, every row from the last call that wrote to it; eq. 8 and 9 are off."""

    def __init__(self, indexing: TokenIndexing, options: PropagationOptions) -> None:
        super().__init__(indexing, replace(options, normalize=False))
        self._written: dict[int, Tensor] = {}

    def add_call(self, call: IndexedCall, attention_map: Tensor) -> None:
        """Compute the update of a call, and note which rows it writes."""
        super().add_call(call, attention_map)
        self._written[call.index] = self._written_rows(call).unsqueeze(-1)

    def delta(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """`R − I` of a state, `[B, size, base tokens]`, or `None` for zero."""
        latest = self.readout(stream, ancestors, to)
        if latest is None or stream != to:
            return latest
        return latest - self._initial(stream)

    def readout(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """R itself, from which the values of tokens are read: nothing is subtracted."""
        own = [i for i in sorted(self._calls_of(stream, ancestors)) if to in self._updates[i]]
        if not own:
            return None
        rows = self._zeros(stream, to)
        if stream == to:
            rows = rows + self._initial(stream)
        for i in own:
            update = self._updates[i][to]
            written = self._written[i][:, update.first :]
            rows[:, update.first :] = torch.where(written, update.rows, rows[:, update.first :])
        return rows

    def _summands(self, stream: str, ancestors: frozenset[int], to: str) -> list[Tensor]:
        latest = self.readout(stream, ancestors, to)
        if latest is not None:
            return [latest]
        return [self._initial(stream)] if stream == to else []

    def _updated_columns(self, call: IndexedCall, source: KeySource) -> list[str]:
        found = super()._updated_columns(call, source)
        # Streams that attend to each other: eq. 11 writes zeros even where keys know nothing yet.
        mutual = call.is_cross_attention and self._options.mutual(call.stream, source.stream)
        return [to for to in self._streams if to in found or (mutual and to == call.stream)]

    def _written_rows(self, call: IndexedCall) -> Tensor:
        """`[B, size]` True for the tokens whose rows a call writes."""
        rows = self._like.new_ones(*call.queries.shape).unsqueeze(1)
        rows = self._indexing.scatter(rows, call.examples, call.queries, call.stream)
        written = self._streams[call.stream].pool(rows.mT.clone()).squeeze(-1) > 0
        if call.is_cross_attention:
            written[:, self._indexing.columns_or_all(call.columns, call.stream)] = True
        return written


class LastUpdatePropagation(FullPropagation):
    """Full matrices without aggregation."""

    states = LastUpdateStates
