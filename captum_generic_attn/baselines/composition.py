"""How the baselines combine the maps of calls: products of self-attention, last calls alone.

Self-attention multiplies up as in rollout, or the last call stands for itself; attention between
streams is that of its last call, between what both sides had gathered, or bare. `method` hands the
maps over, as it does to the sums of `additions`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from captum_generic_attn.relevance.calls import (
    Collected,
    Layout,
    MappedCall,
    OwnEntry,
    Reading,
    Switches,
    total_weights,
)
from captum_generic_attn.relevance.full_propagation import (
    Additions,
    own_entries,
    read_out,
    with_own,
)

_NOTHING = frozenset[int]()


class Composition(Collected):
    """Values and matrices from products of self-attention, and one call of each crossing pair.

    Args:
        calls: the calls that count; of each crossing pair of streams one.
        layout: the streams.
        between: whether what crosses stands between the products of both sides, `Tᵀ A I`.
        row_normalize: whether rows of `I + A` are scaled to sum to 1.
        identity: whether a stream's matrix has the identity, as products have, or is the map alone.
        own: what the token of an only explained row gets: 0, its value, or the least of its row.
    """

    def __init__(
        self, calls: Sequence[MappedCall], layout: Layout, *, between: bool = False,
        row_normalize: bool = False, identity: bool = True, own: OwnEntry = "zero",
    ) -> None:  # fmt: skip
        super().__init__()
        switches = Switches(normalize=False, self_in_cross=between, row_normalize=row_normalize)
        self._calls = calls
        self._layout = layout
        self._identity = identity
        self._own = own
        self._scaled = row_normalize
        self._additions = Additions(layout, switches)
        self._crossing: dict[tuple[str, str], dict[int, Tensor]] = {}

    def finish(self) -> dict[str, Tensor]:  # noqa: D102
        for call in self._calls:
            if call.index not in self._maps:
                continue
            matrix = self._maps.pop(call.index).dense()
            if not call.crosses:
                if not self._identity:  # it stands for itself, whatever it was computed from
                    call = replace(call, query_ancestors=_NOTHING, key_ancestors=_NOTHING)
                self._additions.add(call, matrix)
                continue
            for source in call.sources:
                found = self._additions.crossing(call, matrix, source)
                self._crossing.setdefault((call.stream, source.stream), {})[call.index] = found
        values: dict[str, Tensor] = {}
        # Scaled rows keep less than all of the identity: there is nothing to take off.
        inside = self._additions.relevance if self._scaled else self._additions.gain
        for name, readings in self._readings.items():
            for to, stream in self._layout.streams.items():
                of = functools.partial(inside if to == name else self._between, name, to=to)
                part = read_out(of, readings, stream.roots, own=to == name)
                if part is None:
                    continue
                if to == name:
                    part = with_own(part, total_weights(readings), self._own)
                    if self._own == "row_min":
                        part = self._with_least(part, readings, name)
                values[to] = values[to] + part if to in values else part
        return values

    def _between(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """What crosses between two streams, in a state; `None` for nothing."""
        # Heads that a model calls one by one are one layer, and so one call.
        calls = self._crossing.get((stream, to), {})
        found = [matrix for index, matrix in calls.items() if index in ancestors]
        return functools.reduce(torch.add, found) if found else None

    def _with_least(self, values: Tensor, readings: Sequence[Reading], name: str) -> Tensor:
        """The least of its row for the token of an example's only explained row."""
        rows = total_weights(readings)
        of = functools.partial(self._additions.relevance, name, to=name)
        whole = read_out(of, readings, values.shape[1], own=False)
        assert whole is not None  # noqa: S101 - R holds the identity
        least = whole.amin(-1, keepdim=True)
        return torch.where(own_entries(rows)[:, : values.shape[1]], least, values)

    def matrices(self, states: Mapping[str, frozenset[int]]) -> dict[tuple[str, str], Tensor]:  # noqa: D102
        examples = self._layout.examples
        found = {
            (query, key): between
            for query, key in self._crossing
            if (between := self._between(query, states[query], key)) is not None
        }
        for name, stream in self._layout.streams.items():
            of = self._additions.relevance if self._identity else self._additions.gain
            matrix = of(name, states[name], name)
            if matrix is None:
                matrix = self._layout.like.new_zeros(examples, stream.size, stream.roots)
            found[name, name] = matrix.expand(examples, -1, -1)
        return found


class Total(Collected):
    """The sum of all maps, each averaged over the queries of its call."""

    def __init__(self, calls: Sequence[MappedCall], layout: Layout) -> None:
        super().__init__()
        self._calls = {call.index: call for call in calls}
        self._layout = layout

    def finish(self) -> dict[str, Tensor]:  # noqa: D102
        found = self._placed(each_query=False)
        values: dict[str, Tensor] = {}
        for (query, to), rows in found.items():
            if query in self._readings:
                part = rows.squeeze(1)
                values[to] = values[to] + part if to in values else part
        for name in self._readings:
            stream = self._layout.streams[name]
            zeros = self._layout.like.new_zeros(self._layout.examples, stream.roots)
            values.setdefault(name, zeros)
        return values

    def matrices(self, states: Mapping[str, frozenset[int]]) -> dict[tuple[str, str], Tensor]:  # noqa: ARG002, D102
        found = self._placed(each_query=True)
        for name, stream in self._layout.streams.items():
            zeros = self._layout.like.new_zeros(self._layout.examples, stream.size, stream.roots)
            found.setdefault((name, name), zeros)
        return found

    def _placed(self, *, each_query: bool) -> dict[tuple[str, str], Tensor]:
        """`[B, size or 1, roots]`: of each query, times the stream's size, or summed over them."""
        layout = self._layout
        found: dict[tuple[str, str], Tensor] = {}
        for index, attention_map in self._maps.items():
            call = self._calls[index]
            size = layout.streams[call.stream].size
            asking = layout.like.new_ones(*call.queries.shape) * (call.queries >= 0).to(layout.like)
            count = layout.scatter(
                asking.unsqueeze(1), call.examples, call.queries, call.stream
            ).sum(-1, keepdim=True)  # [B, 1, 1]
            weights = layout.like.new_ones(layout.examples, 1, size) / count.clamp(min=1)
            if each_query:
                weights = torch.eye(size).to(layout.like) * size / count.clamp(min=1)
            queries = layout.gather(weights, call.examples, call.queries, call.stream)
            product = attention_map.of_rows(queries)
            for source in call.sources:
                keys = layout.scatter(product, call.examples, source.keys, source.stream)
                stream = layout.streams[source.stream]
                part = stream.hand_back(keys)[:, :, : stream.roots]
                pair = call.stream, source.stream
                found[pair] = found[pair] + part if pair in found else part
        return found
