"""Relevance as a sum over ancestors, on drawn graphs of calls, against a slow twin.

The twin keeps, for every state that a call reads, the whole matrices of the paper and applies
equations 6 to 11 to them one entry at a time; it knows no shortcut of `states`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.relevance.aggregator import OutputRows, PropagationOptions
from captum_generic_attn.relevance.attention_maps import DenseMap
from captum_generic_attn.relevance.calls import IndexedCall, KeySource, TokenIndexing
from captum_generic_attn.relevance.full_propagation import FullPropagation
from captum_generic_attn.relevance.last_update import LastUpdateStates
from captum_generic_attn.relevance.row_propagation import row_propagation
from captum_generic_attn.relevance.states import RelevanceStates
from captum_generic_attn.tokens import TokenStream
from captum_generic_attn.tokens.streams import Merge

B = 2
LIKE = torch.empty(0, dtype=torch.float64)


def stream(name: str, roots: int, *merged: Sequence[list[int]]) -> TokenStream:
    """A stream of `roots` tokens and of tokens merged from those before them.

    Of each merged token the parents, once or for each example; -1 is none.
    """
    merges = tuple(
        Merge(torch.tensor([roots + i]), torch.tensor(parents).unsqueeze(1))
        for i, parents in enumerate(merged)
    )
    return TokenStream(name, roots + len(merged), roots, {}, {}, merges)


@dataclass
class Twin:
    """Slow: a state is a set of calls; its matrices are summed anew whenever it is asked for."""

    streams: dict[str, TokenStream]
    options: PropagationOptions
    aggregate: bool = True
    calls: dict[int, IndexedCall] = field(default_factory=dict)
    added: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def shares(self, name: str) -> Tensor:
        """What each token of a stream is made of: every token on its own, or equal shares."""
        of = self.streams[name]
        made = torch.eye(of.size, dtype=torch.float64).repeat(B, 1, 1)
        for merge in of.merges:
            row = int(merge.tokens[0])
            for b, parents in enumerate(merge.parents.expand(B, -1, -1)[:, 0].tolist()):
                known = [p for p in parents if p >= 0]
                made[b, row] += sum(made[b, p] for p in known) / len(known)
        return made

    def identity(self, name: str) -> Tensor:
        return self.shares(name)[:, :, : self.streams[name].num_base_tokens]

    def zero(self, rows: str, columns: str) -> Tensor:
        size, roots = self.streams[rows].size, self.streams[columns].num_base_tokens
        return torch.zeros(B, size, roots, dtype=torch.float64)

    def relevance(self, name: str, ancestors: frozenset[int], to: str) -> Tensor:
        total = self.identity(name) if name == to else self.zero(name, to)
        for i in self.writers(name, ancestors, to):
            if self.aggregate:
                total = total + self.added[i][to]
            else:  # each += an =, of the rows that a call writes
                total = torch.where(self.written(self.calls[i]), self.added[i][to], total)
        return total

    def writers(self, name: str, ancestors: frozenset[int], to: str) -> list[int]:
        return [
            i for i in sorted(ancestors)
            if i in self.calls and self.calls[i].stream == name and to in self.added[i]
        ]  # fmt: skip

    def written(self, call: IndexedCall) -> Tensor:
        """`[B, size, 1]`: the queries, and what is made of them; eq. 10 writes all rows."""
        rows = torch.zeros(B, self.streams[call.stream].size).double()
        for owner, queries in zip(call.examples.tolist(), call.queries.tolist(), strict=True):
            rows[owner, [i for i in queries if i >= 0]] = 1
        rows = (self.shares(call.stream) @ rows.unsqueeze(-1)).squeeze(-1)
        if call.is_cross_attention:
            rows[:, self.columns(call.columns, call.stream)] = 1
        return rows.unsqueeze(-1) > 0

    def columns(self, columns: Tensor | None, name: str) -> list[int]:
        return (
            list(range(self.streams[name].num_base_tokens)) if columns is None else columns.tolist()
        )

    def knows(self, call: IndexedCall, source: KeySource, to: str) -> bool:
        """Whether there is anything to set equal: without aggregation, zeros would count."""
        if call.is_cross_attention and to == call.stream and self.options.mutual(to, source.stream):
            return True
        return to == source.stream or bool(self.writers(source.stream, call.key_ancestors, to))

    def barred(self, R: Tensor, identity: Tensor) -> Tensor:
        """Eq. 8 and 9, row by row."""
        if not (self.options.normalize and self.aggregate):
            return R
        result = R.clone()
        for b in range(B):
            for m in range(R.shape[1]):
                learnt = R[b, m] - identity[b, m]
                total = learnt.sum()
                result[b, m] = identity[b, m] + (learnt / total if total > 1e-14 else 0)
        return result

    def add(self, call: IndexedCall, values: Tensor) -> None:
        shares = self.shares(call.stream)
        found: dict[str, Tensor] = {}
        for source in call.sources:
            dense = torch.zeros(
                B, self.streams[call.stream].size, self.streams[source.stream].size
            ).double()
            for g, owner in enumerate(call.examples.tolist()):
                for i, query in enumerate(call.queries[g].tolist()):
                    for j, key in enumerate(source.keys[g].tolist()):
                        if query >= 0 and key >= 0:
                            dense[owner, query, key] += values[g, i, j]
            for to in self.streams:
                if not self.knows(call, source, to):
                    continue
                known = self.relevance(source.stream, call.key_ancestors, to)
                update = dense @ known  # eq. 6, 7 and 11
                if call.is_cross_attention and to == source.stream:
                    own = self.columns(source.columns, to)
                    update[:, :, own] = self.rule_10(call, source, dense)
                found[to] = found.get(to, 0) + update
            if self.options.row_normalize:  # of the only source
                for to, update in found.items():
                    before = self.relevance(call.stream, call.query_ancestors, to)
                    found[to] = (before + update) / (1 + dense.sum(-1, keepdim=True)) - before
        self.calls[call.index] = call
        # What a token gets, the tokens that are made of it get their share of.
        self.added[call.index] = {to: shares @ rows for to, rows in found.items()}

    def rule_10(self, call: IndexedCall, source: KeySource, dense: Tensor) -> Tensor:
        """Eq. 10, over those tokens of both streams that made them up when the call ran."""
        columns = self.columns(source.columns, source.stream)
        identity = self.identity(source.stream)[:, :, columns]
        if not self.options.self_in_cross:
            return dense @ identity
        keys = self.relevance(source.stream, call.key_ancestors, source.stream)[:, :, columns]
        tokens, own = self.of_queries(call)
        update = torch.zeros(B, dense.shape[1], len(columns)).double()
        update[:, tokens] = own.mT @ dense[:, tokens] @ self.barred(keys, identity)
        return update

    def of_queries(self, call: IndexedCall) -> tuple[list[int], Tensor]:
        """`R̄` over the tokens that made the stream up; over those that ask if some are merged.

        There, what one learnt of a token goes to all that have a share of it, in proportion.
        """
        columns = self.columns(call.columns, call.stream)
        tokens = sorted({i for i in call.queries.flatten().tolist() if i >= 0})
        R = self.relevance(call.stream, call.query_ancestors, call.stream)
        if not any(i >= self.streams[call.stream].num_base_tokens for i in tokens):
            R, identity = (t[:, columns][:, :, columns] for t in (R, self.identity(call.stream)))
            return columns, self.barred(R, identity)
        learnt, shares = R - self.identity(call.stream), self.shares(call.stream)
        own = torch.zeros(B, len(tokens), len(tokens)).double()
        for m, one in enumerate(tokens):
            for k, other in enumerate(tokens):
                for b, root in product(range(B), columns):
                    if shares[b, other, root] > 0:
                        part = shares[b, other, root] / shares[b, tokens, root].sum()
                        own[b, m, k] += learnt[b, one, root] * part
        eye = torch.eye(len(tokens)).double().expand(B, -1, -1)
        return tokens, self.barred(eye + own, eye)


def states(calls: int) -> st.SearchStrategy[frozenset[int]]:
    """A state after some calls; of all, often, as in a chain of layers."""
    every = st.just(frozenset(range(calls)))
    return st.one_of(every, st.frozensets(st.integers(0, calls - 1))) if calls else every


@st.composite
def graphs(
    draw: st.DrawFn, *, crossing: bool = True, keys_grow: bool = True, keys_padded: bool = True
) -> tuple[dict[str, TokenStream], list[IndexedCall], list[Tensor]]:
    """Two or three streams, calls that read any earlier states of them, and their maps.

    A call has one group or two of each example, with padding among queries and keys. Streams may
    have grown after calls across; with `keys_grow`, also those that were asked. `keys_padded`:
    whether some attention may be lost to padding.
    """
    streams = {}
    for name in ("a", "b", "c")[: draw(st.integers(2, 3))]:
        roots = draw(st.integers(1, 4))
        merged = []
        for i in range(draw(st.integers(0, 2))):
            some = st.sets(st.integers(0, roots + i - 1), min_size=1, max_size=3)
            parents = [sorted(draw(some)) for _ in range(draw(st.sampled_from([1, B])))]
            merged.append([[*own, *[-1] * (3 - len(own))] for own in parents])
        streams[name] = stream(name, roots, *merged)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def grown(name: str) -> Tensor | None:
        """The roots that a stream had when a call ran; `None`: all."""
        roots = range(streams[name].num_base_tokens)
        some = draw(st.sets(st.sampled_from(roots), min_size=1)) if draw(st.booleans()) else roots
        return None if len(some) == len(roots) else torch.tensor(sorted(some))

    def there(name: str, columns: Tensor | None) -> Tensor:
        """The tokens of a stream that a call can read."""
        roots = torch.arange(streams[name].num_base_tokens) if columns is None else columns
        return torch.cat([roots, torch.arange(streams[name].num_base_tokens, streams[name].size)])

    calls: list[IndexedCall] = []
    maps: list[Tensor] = []
    for index in range(draw(st.integers(1, 6))):
        name = draw(st.sampled_from(sorted(streams)))
        others = [n for n in sorted(streams) if n != name]
        crosses = crossing and draw(st.booleans())
        keys = (
            draw(st.lists(st.sampled_from(others), min_size=1, unique=True)) if crosses else [name]
        )
        groups = draw(st.integers(1, 2))
        padded = draw(st.booleans())
        columns = grown(name) if crosses else None
        asking = there(name, columns).tolist()
        if crosses and draw(st.booleans()):  # else some may be merged
            asking = [i for i in asking if i < streams[name].num_base_tokens]
        count = draw(st.integers(1, len(asking)))
        queries = torch.tensor(
            [draw(st.permutations(asking))[:count] for _ in range(groups)]
        ).repeat(B, 1)
        sources, start, width = [], 0, sum(streams[k].size for k in keys)
        for key in keys:
            then = grown(key) if crosses and keys_grow else None
            positions = torch.full((B * groups, width), -1)
            known = there(key, then)
            positions[:, start : start + len(known)] = known
            if padded and keys_padded:
                positions[torch.rand(positions.shape, generator=generator) < 0.2] = -1
            start += streams[key].size
            sources.append(KeySource(key, positions, then))
        if padded:
            queries[torch.rand(queries.shape, generator=generator) < 0.2] = -1
        values = torch.rand(B * groups, count, width, generator=generator, dtype=torch.float64)
        values = values * (torch.rand(values.shape, generator=generator) < 0.7)
        examples = torch.arange(B).repeat_interleave(groups)
        if draw(st.booleans()):  # groups stand in any order
            examples = examples.flip(0)
        before = states(index)
        maps.append(values)
        calls.append(
            IndexedCall(
                index, name, examples, queries, tuple(sources), crosses, draw(before), draw(before),
                columns,
            )
        )  # fmt: skip
    return streams, calls, maps


def crossings(calls: Sequence[IndexedCall]) -> frozenset[tuple[str, str]]:
    return frozenset((c.stream, s.stream) for c in calls if c.is_cross_attention for s in c.sources)


def check_states(
    drawn, options: PropagationOptions, *, positive: bool, aggregate: bool = True
) -> None:
    """All pairs of streams in some states, as the twin has them."""
    streams, calls, maps = drawn
    kind = RelevanceStates if aggregate else LastUpdateStates
    ours = kind(TokenIndexing(streams.values(), B, LIKE), options)
    twin = Twin(streams, options, aggregate)
    for call, values in zip(calls, maps, strict=True):
        ours.add_call(call, values)
        twin.add(call, values)
    every = frozenset(range(len(calls)))
    for state in (every, frozenset(list(every)[::2]), frozenset()):
        for name in streams:
            for to in streams:
                expected = twin.relevance(name, state, to)
                found = ours.relevance(name, state, to)
                found = twin.zero(name, to) if found is None else found.expand(B, -1, -1)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
                assert not positive or bool((found >= 0).all())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("self_in_cross", [True, False])
@given(drawn=graphs())
@settings(deadline=None, max_examples=40)
def test_drawn_graphs_of_calls(drawn, normalize: bool, self_in_cross: bool) -> None:
    options = PropagationOptions(normalize, self_in_cross, crossings(drawn[1]))
    check_states(drawn, options, positive=True)


@pytest.mark.parametrize("self_in_cross", [True, False])
@given(drawn=graphs())
@settings(deadline=None, max_examples=40)
def test_drawn_graphs_without_aggregation(drawn, self_in_cross: bool) -> None:
    options = PropagationOptions(True, self_in_cross, crossings(drawn[1]))
    check_states(drawn, options, positive=False, aggregate=False)


@given(drawn=graphs(crossing=False, keys_padded=False))
@settings(deadline=None, max_examples=40)
def test_drawn_graphs_of_rollout(drawn) -> None:
    check_states(drawn, PropagationOptions(row_normalize=True), positive=False)


@given(drawn=graphs())
@settings(deadline=None, max_examples=20)
def test_what_tokens_start_from_sums_to_one(drawn) -> None:
    for of in drawn[0].values():
        start = of.initial_relevance(torch.empty(0, dtype=torch.float64))
        examples = max([len(merge.parents) for merge in of.merges], default=1)
        assert start.shape == (examples, of.size, of.num_base_tokens)
        torch.testing.assert_close(start.sum(-1), torch.ones(start.shape[:2], dtype=torch.float64))
        assert torch.equal(
            start[0, : of.num_base_tokens], torch.eye(of.num_base_tokens, dtype=torch.float64)
        )


def test_merged_tokens_that_ask_across_share_what_they_were_merged_from() -> None:
    """R̄ of the asking tokens: over themselves, each column of its parents in equal parts."""
    streams = {"a": stream("a", 4, [[0, 1]], [[2, 3]]), "b": stream("b", 2)}
    own = torch.zeros(1, 2, 2).double()
    own[0, 0, 1] = 3.0  # the first merged token attends to the second
    across = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).double()
    merged = torch.tensor([[4, 5]])
    one = torch.arange(1)
    none, first = frozenset[int](), frozenset([0])
    calls = [
        IndexedCall(0, "a", one, merged, (KeySource("a", merged),), False, none, none),
        IndexedCall(
            1, "a", one, merged, (KeySource("b", torch.tensor([[0, 1]])),), True, first, none
        ),
    ]
    layout = TokenIndexing(streams.values(), 1, LIKE)
    options = PropagationOptions(cross_pairs=crossings(calls))
    ours = RelevanceStates(layout, options)
    for call, values in zip(calls, (own, across), strict=True):
        ours.add_call(call, values)
    found = ours.relevance("a", frozenset([0, 1]), "b")
    assert found is not None
    # R̄ᵀ Ā with R̄ = [[1, 1], [0, 1]]: what the first token asks for, the second shares in.
    assert found[0, 4:].tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert not found[0, :4].any()
    for row in range(6):
        rows = row_propagation(calls, ["a"], layout, options)
        rows.add_output_rows(
            "a", [OutputRows(torch.eye(6).double()[row : row + 1], frozenset([0, 1]))]
        )
        rows.add_map(1, DenseMap(across))
        rows.add_map(0, DenseMap(own))
        assert rows.result()["b"][0].tolist() == found[0, row].tolist()


def simple(
    index: int, asking: str, queries: list[int], asked: str, keys: list[int],
    ancestors: frozenset[int] = frozenset(),
) -> IndexedCall:  # fmt: skip
    """A call of one group of each example, whose queries and keys depend on the same calls."""
    source = KeySource(asked, torch.tensor([keys] * B))
    return IndexedCall(
        index, asking, torch.arange(B), torch.tensor([queries] * B), (source,), asking != asked,
        ancestors, ancestors,
    )  # fmt: skip


def alike(*rows: list[float]) -> Tensor:
    """The same matrix for each example."""
    return torch.tensor([rows] * B, dtype=torch.float64)


@pytest.mark.parametrize(("normalize", "expected"), [(True, 10.0), (False, 15.0)])
def test_what_no_asking_token_has_a_share_of_is_left_out(normalize: bool, expected: float) -> None:
    """Of two merged tokens the first asks across, which learnt 2 of its parents and 3 of others:
    eq. 8 and 9 make 1 of the 2.
    """
    streams = {"a": stream("a", 4, [[0, 1]], [[2, 3]]), "b": stream("b", 1)}
    calls = [simple(0, "a", [4], "a", [1, 2]), simple(1, "a", [4], "b", [0], frozenset([0]))]
    options = PropagationOptions(normalize, cross_pairs=crossings(calls))
    ours = RelevanceStates(TokenIndexing(streams.values(), B, LIKE), options)
    ours.add_call(calls[0], alike([2.0, 3.0]))
    ours.add_call(calls[1], alike([5.0]))
    found = ours.relevance("a", frozenset([0, 1]), "b")
    assert found is not None
    assert found[..., 0].tolist() == [[0, 0, 0, 0, expected, 0]] * B


@pytest.mark.parametrize("aggregate", [True, False])
def test_what_was_asked_for_stays_as_it_was(aggregate: bool) -> None:
    """A matrix that was handed out is no sum that runs on."""
    streams = {"a": stream("a", 2), "b": stream("b", 2)}
    both = frozenset([0, 1])
    calls = [simple(i, "a", [0, 1], "b", [0, 1]) for i in range(2)]
    options = PropagationOptions(cross_pairs=crossings(calls))
    ours = (RelevanceStates if aggregate else LastUpdateStates)(
        TokenIndexing(streams.values(), B, LIKE), options
    )
    values = alike([1.0, 2.0], [3.0, 4.0])
    ours.add_call(calls[0], values)
    before, started = (ours.relevance("a", frozenset([0]), to) for to in ("b", "a"))
    ours.add_call(calls[1], values)
    after = ours.relevance("a", both, "b")
    assert before is not None
    assert started is not None
    assert after is not None
    assert torch.equal(before, values)
    assert torch.equal(after, 2 * values if aggregate else values)
    for handed in (after, started):
        handed.zero_()
    again, start = (ours.relevance("a", both, to) for to in ("b", "a"))
    assert again is not None
    assert start is not None
    assert torch.equal(again, 2 * values if aggregate else values)
    assert torch.equal(start[0], torch.eye(2).double())


# --- the explained rows alone


@st.composite
def readings(
    draw: st.DrawFn, streams: dict[str, TokenStream], calls: int
) -> dict[str, list[OutputRows]]:
    """Weights of explained rows of some streams, each row read in one of one or two states."""
    names = draw(st.lists(st.sampled_from(sorted(streams)), min_size=1, unique=True))
    found = {}
    for name in names:
        size = streams[name].size
        chosen = st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True)
        weights = torch.zeros(B, size).double()
        for example in range(B):
            rows = draw(chosen)
            weights[example, rows] = 1 / len(rows)
        known = draw(st.lists(states(calls), min_size=1, max_size=2))
        which = torch.tensor(
            draw(st.lists(st.integers(0, len(known) - 1), min_size=B * size, max_size=B * size))
        ).view(B, size)
        found[name] = [OutputRows(weights * (which == i), state) for i, state in enumerate(known)]
    return found


def both(
    calls: list[IndexedCall], maps: list[Tensor], streams: dict[str, TokenStream],
    reading: dict[str, list[OutputRows]], options: PropagationOptions, order: Sequence[int],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Values by pulling rows back, as the maps arrive in an order, and from whole matrices."""
    results = []
    for by_rows in (True, False):
        layout = TokenIndexing(streams.values(), B, LIKE)
        total = (
            row_propagation(calls, reading, layout, options) if by_rows
            else FullPropagation(calls, layout, options)
        )  # fmt: skip
        arrivals = list(order)
        for name, parts in reading.items():
            if arrivals:  # a stream's rows may be known only after calls of others have come
                index = arrivals.pop(0)
                total.add_map(index, DenseMap(maps[index]))
            total.add_output_rows(name, parts)
        for index in arrivals:
            total.add_map(index, DenseMap(maps[index]))
        results.append(total.result())
    return results[0], results[1]


def assert_equal_values(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in ours.keys() | expected.keys():
        known = next(v[name] for v in (ours, expected) if name in v)
        pair = [v.get(name, torch.zeros_like(known)) for v in (ours, expected)]
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("self_in_cross", [True, False])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_rows_that_are_pulled_back_are_those_of_the_matrices(
    data: st.DataObject, normalize: bool, self_in_cross: bool
) -> None:
    streams, calls, maps = data.draw(graphs(keys_grow=False))
    if data.draw(st.booleans()):  # no two streams attend to each other: eq. 10 in rows
        kept = [
            not c.is_cross_attention or all(c.stream < s.stream for s in c.sources) for c in calls
        ]  # fmt: skip
        calls = [c for c, keep in zip(calls, kept, strict=True) if keep]
        index = {c.index: i for i, c in enumerate(calls)}
        maps = [m for m, keep in zip(maps, kept, strict=True) if keep]
        calls = [
            replace(
                c, index=index[c.index],
                query_ancestors=frozenset(index[i] for i in c.query_ancestors if i in index),
                key_ancestors=frozenset(index[i] for i in c.key_ancestors if i in index),
            ) for c in calls
        ]  # fmt: skip
        assume(calls)
    options = PropagationOptions(normalize, self_in_cross, crossings(calls))
    assume(row_propagation(calls, [], TokenIndexing([], B, LIKE), options) is not None)
    reading = data.draw(readings(streams, len(calls)))
    order = data.draw(st.permutations(range(len(calls))))
    assert_equal_values(*both(calls, maps, streams, reading, options, order))


def test_streams_that_attend_to_each_other_need_whole_matrices() -> None:
    none = frozenset[int]()
    one, place = torch.arange(1), torch.tensor([[0]])

    def call(index: int, asking: str, asked: str, columns: Tensor | None = None) -> IndexedCall:
        source = KeySource(asked, place, columns)
        return IndexedCall(index, asking, one, place, (source,), asking != asked, none, none)

    there, back, alone = call(0, "a", "b"), call(1, "b", "a"), call(2, "a", "a")
    for calls, options, expected in (
        ([alone], PropagationOptions(), True),
        ([there, alone], PropagationOptions(cross_pairs=crossings([there])), True),
        ([there, back], PropagationOptions(cross_pairs=crossings([there, back])), False),
        (
            [there, back],
            PropagationOptions(self_in_cross=False, cross_pairs=crossings([there, back])),
            True,
        ),
        ([call(0, "a", "b", place[0])], PropagationOptions(cross_pairs=crossings([there])), False),
        (
            [call(0, "a", "b", place[0])],
            PropagationOptions(self_in_cross=False, cross_pairs=crossings([there])),
            False,
        ),
    ):
        found = row_propagation(calls, [], TokenIndexing([], 1, LIKE), options)
        assert (found is not None) is expected


def test_rows_are_asked_only_of_what_their_tokens_can_be_reached_through() -> None:
    """An encoder knows nothing of the decoder's queries: their rows are not pulled through it."""
    asked: dict[int, int] = {}

    @dataclass(frozen=True, eq=False)
    class Noting(DenseMap):
        index: int = 0

        def left_multiply(self, rows: Tensor) -> Tensor:
            asked[self.index] = rows.shape[1]
            return super().left_multiply(rows)

    streams = {"queries": stream("queries", 2), "image": stream("image", 2)}
    calls = [
        simple(0, "image", [0, 1], "image", [0, 1]),
        simple(1, "queries", [0, 1], "queries", [0, 1]),
        simple(2, "queries", [0, 1], "image", [0, 1], frozenset([0, 1])),
    ]
    for self_in_cross in (True, False):
        options = PropagationOptions(self_in_cross=self_in_cross, cross_pairs=crossings(calls))
        total = row_propagation(
            calls, ["queries"], TokenIndexing(streams.values(), B, LIKE), options
        )
        total.add_output_rows(
            "queries", [OutputRows(torch.ones(B, 2).double() / 2, frozenset([0, 1, 2]))]
        )
        for i in (2, 1, 0):
            total.add_map(i, Noting(alike([1.0, 2.0], [3.0, 4.0]), i))
        values = total.result()
        assert all(bool((values[name] > 0).all()) for name in streams)
        assert asked.pop(0, 0) == self_in_cross, "the image's; plain Ā ends at its tokens"
        assert asked.pop(1) == 2
