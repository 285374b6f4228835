"""Baselines that combine self-attention by products, or use the last call of each pair of streams.

`ComposedAttribution` multiplies the maps of self-attention calls, as rollout does; in
`LastCallAttribution` the last call stands for itself. Attention between streams is that of its last
call: as it is, or between the products of both sides.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from captum_generic_attn.attribution import AttentionAttribution
from captum_generic_attn.relevance.aggregator import (
    Aggregator,
    BufferedAggregator,
    OutputRows,
    OwnEntry,
    PropagationOptions,
    apply_own,
    read_rows,
    self_entries,
    total_weights,
)
from captum_generic_attn.relevance.calls import IndexedCall, TokenIndexing
from captum_generic_attn.relevance.method import KeepLast
from captum_generic_attn.relevance.states import RelevanceStates


@dataclass(frozen=True)
class CompositionOptions:
    """How maps are combined.

    Attributes:
        between: whether the last cross-attention stands between the products of both sides,
            `Tᵀ A I`, or is read as it is.
        row_normalize: whether the rows of `I + A` are scaled to sum to 1.
        identity: whether the matrix of a stream has the identity, as products have, or is the map
            of the last call.
    """

    between: bool = False
    row_normalize: bool = False
    identity: bool = True


class ComposedAttribution(AttentionAttribution):
    """Base of the methods that multiply `I + A` over the calls of a stream."""

    keep_last: ClassVar[KeepLast] = "cross"

    @property
    def composition(self) -> CompositionOptions:
        """How maps are combined."""
        return CompositionOptions()

    def aggregator(
        self, calls: Sequence[IndexedCall], output_streams: Sequence[str],  # noqa: ARG002
        indexing: TokenIndexing, cross_pairs: frozenset[tuple[str, str]], *,  # noqa: ARG002
        matrices: bool,  # noqa: ARG002
    ) -> Aggregator:  # fmt: skip
        """Products of the maps of self-attention, and the last cross-attention."""
        return Composition(calls, indexing, self.composition, self.own)


class LastCallAttribution(ComposedAttribution):
    """Base of the methods in which the last call of each pair of streams stands for itself."""

    keep_last: ClassVar[KeepLast] = "all"

    @property
    def composition(self) -> CompositionOptions:
        """The maps themselves."""
        return CompositionOptions(identity=False)


class Composition(BufferedAggregator):
    """Values and matrices from products of self-attention, and one call of each cross pair.

    Args:
        calls: the calls that are used; of each pair of streams with cross-attention one.
        indexing: the streams.
        options: how maps are combined.
        own: what the token of an only explained row gets: 0, its value, or the least of its row.
    """

    def __init__(
        self, calls: Sequence[IndexedCall], indexing: TokenIndexing, options: CompositionOptions,
        own: OwnEntry,
    ) -> None:  # fmt: skip
        super().__init__()
        self._calls = calls
        self._indexing = indexing
        self._options = options
        self._own = own
        self._states = RelevanceStates(
            indexing,
            PropagationOptions(
                normalize=False,
                self_in_cross=options.between,
                row_normalize=options.row_normalize,
            ),
        )
        self._cross: dict[tuple[str, str], dict[int, Tensor]] = {}

    def result(self) -> dict[str, Tensor]:
        """`[B, base tokens]` values of the tokens of each stream."""
        for call in self._calls:
            if call.index in self._maps:
                self._add(call, self._maps.pop(call.index).dense())
        values: dict[str, Tensor] = {}
        for name, rows in self._output_rows.items():
            for to, stream in self._indexing.streams.items():
                matrix = self._read if to == name else self._between
                of = functools.partial(matrix, name, to=to)
                part = read_rows(of, rows, stream.num_base_tokens, same_stream=to == name)
                if part is None:
                    continue
                if to == name:
                    part = self._with_own(part, rows, name)
                values[to] = values[to] + part if to in values else part
        return values

    def _add(self, call: IndexedCall, matrix: Tensor) -> None:
        if call.is_cross_attention:
            for source in call.sources:
                update = self._states.cross_update(call, matrix, source)
                self._cross.setdefault((call.stream, source.stream), {})[call.index] = update
            return
        if not self._options.identity:  # the map stands for itself, whatever is upstream
            call = replace(call, query_ancestors=frozenset(), key_ancestors=frozenset())
        self._states.add_call(call, matrix)

    def _read(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """The matrix of one stream from which values are read."""
        # Scaled rows keep only a part of the identity, so none is subtracted.
        of = self._states.relevance if self._options.row_normalize else self._states.delta
        return of(stream, ancestors, to)

    def _between(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """The cross-attention between two streams in a state; `None` for zero."""
        # Heads that a model calls one by one are one layer, and count as one call.
        calls = self._cross.get((stream, to), {})
        found = [matrix for index, matrix in calls.items() if index in ancestors]
        return functools.reduce(torch.add, found) if found else None

    def _with_own(self, values: Tensor, rows: Sequence[OutputRows], name: str) -> Tensor:
        """Values with what the token of an example's only explained row is to get."""
        weights = total_weights(rows)
        if self._own != "row_min":
            return apply_own(values, weights, self._own)
        of = functools.partial(self._states.relevance, name, to=name)
        whole = read_rows(of, rows, values.shape[1], same_stream=False)
        assert whole is not None  # noqa: S101 - R includes the identity
        least = whole.amin(-1, keepdim=True)
        return torch.where(self_entries(weights)[:, : values.shape[1]], least, values)

    def matrices(self, states: Mapping[str, frozenset[int]]) -> dict[tuple[str, str], Tensor]:
        """`[B, size, base tokens]` matrices for each (query stream, key stream)."""
        examples = self._indexing.examples
        found = {
            (query, key): between
            for query, key in self._cross
            if (between := self._between(query, states[query], key)) is not None
        }
        for name, stream in self._indexing.streams.items():
            of = self._states.relevance if self._options.identity else self._states.delta
            matrix = of(name, states[name], name)
            if matrix is None:
                matrix = self._indexing.like.new_zeros(
                    examples, stream.size, stream.num_base_tokens
                )
            found[name, name] = matrix.expand(examples, -1, -1)
        return found
