"""Relevance as a sum over ancestors, on drawn graphs of calls, against a slow twin.

The twin keeps, for every state that a call reads, the whole matrices of the paper and applies
equations 6 to 11 to them one entry at a time; it knows no shortcut of `additions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.additions import Additions, MappedCall, Source, Switches
from captum_generic_attn.tokens import TokenStream
from captum_generic_attn.tokens.streams import Merge

B = 2


def stream(name: str, roots: int, merged: Sequence[list[int]] = ()) -> TokenStream:
    """A stream of `roots` tokens and of tokens merged from those before them."""
    merges = tuple(
        Merge(torch.tensor([roots + i]), torch.tensor([[parents]]))
        for i, parents in enumerate(merged)
    )
    return TokenStream(name, roots + len(merged), roots, {}, {}, merges)


@dataclass
class Twin:
    """Slow: a state is a set of calls; its matrices are summed anew whenever it is asked for."""

    streams: dict[str, TokenStream]
    switches: Switches
    calls: dict[int, MappedCall] = field(default_factory=dict)
    added: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def shares(self, name: str) -> Tensor:
        """What each token of a stream is made of: every token on its own, or equal shares."""
        of = self.streams[name]
        made = torch.eye(of.size, dtype=torch.float64)
        for merge in of.merges:
            row, parents = int(merge.tokens[0]), merge.parents[0, 0].tolist()
            made[row] += sum(made[p] for p in parents) / len(parents)
        return made

    def identity(self, name: str) -> Tensor:
        return self.shares(name)[:, : self.streams[name].roots].expand(B, -1, -1)

    def zero(self, rows: str, columns: str) -> Tensor:
        size, roots = self.streams[rows].size, self.streams[columns].roots
        return torch.zeros(B, size, roots, dtype=torch.float64)

    def relevance(self, name: str, ancestors: frozenset[int], to: str) -> Tensor:
        total = self.identity(name) if name == to else self.zero(name, to)
        for i in ancestors:
            if i in self.calls and self.calls[i].stream == name and to in self.added[i]:
                total = total + self.added[i][to]
        return total

    def barred(self, R: Tensor, identity: Tensor) -> Tensor:
        """Eq. 8 and 9, row by row."""
        if not self.switches.normalize:
            return R
        result = R.clone()
        for b in range(B):
            for m in range(R.shape[1]):
                learnt = R[b, m] - identity[b, m]
                total = learnt.sum()
                result[b, m] = identity[b, m] + (learnt / total if total > 1e-14 else 0)
        return result

    def add(self, call: MappedCall) -> None:
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
                            dense[owner, query, key] += call.map[g, i, j]
            for to in self.streams:
                known = self.relevance(source.stream, call.key_ancestors, to)
                if call.crosses and to == source.stream:
                    update = self.rule_10(call, source, dense)
                else:  # eq. 6, 7 and 11
                    update = dense @ known
                found[to] = found.get(to, 0) + update
        self.calls[call.index] = call
        # What a token gets, the tokens that are made of it get their share of.
        self.added[call.index] = {to: shares @ rows for to, rows in found.items()}

    def rule_10(self, call: MappedCall, source: Source, dense: Tensor) -> Tensor:
        identity = self.identity(source.stream)
        if not self.switches.self_in_cross:
            return dense @ identity
        keys = self.barred(
            self.relevance(source.stream, call.key_ancestors, source.stream), identity
        )
        roots = self.streams[call.stream].roots
        own = self.relevance(call.stream, call.query_ancestors, call.stream)[:, :roots]
        own = self.barred(own, self.identity(call.stream)[:, :roots])
        update = torch.zeros_like(dense @ keys)
        update[:, :roots] = own.mT @ dense[:, :roots] @ keys
        return update


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, TokenStream], list[MappedCall]]:
    """Two or three streams, and calls that read any earlier states of them."""
    streams = {}
    for name in ("a", "b", "c")[: draw(st.integers(2, 3))]:
        roots = draw(st.integers(1, 4))
        merged = [
            sorted(draw(st.sets(st.integers(0, roots + i - 1), min_size=1, max_size=2)))
            for i in range(draw(st.integers(0, 2)))
        ]
        streams[name] = stream(name, roots, merged)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    calls: list[MappedCall] = []
    for index in range(draw(st.integers(1, 6))):
        name = draw(st.sampled_from(sorted(streams)))
        others = [n for n in sorted(streams) if n != name]
        crosses = draw(st.booleans())
        keys = (
            draw(st.lists(st.sampled_from(others), min_size=1, unique=True)) if crosses else [name]
        )
        # How merged tokens ask across is ours to say: the last test of this file.
        size = streams[name].roots if crosses else streams[name].size
        queries = draw(st.permutations(range(size)))[: draw(st.integers(1, size))]
        sources, start, width = [], 0, sum(streams[k].size for k in keys)
        for key in keys:
            positions = torch.full((B, width), -1)
            positions[:, start : start + streams[key].size] = torch.arange(streams[key].size)
            start += streams[key].size
            sources.append(Source(key, positions))
        values = torch.rand(B, len(queries), width, generator=generator, dtype=torch.float64)
        values = values * (torch.rand(values.shape, generator=generator) < 0.7)
        before = st.frozensets(st.integers(0, index - 1)) if index else st.just(frozenset())
        calls.append(
            MappedCall(
                index, name, values, torch.arange(B), torch.tensor([queries] * B), tuple(sources),
                crosses, draw(before), draw(before),
            )
        )  # fmt: skip
    return streams, calls


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("self_in_cross", [True, False])
@given(drawn=graphs())
@settings(deadline=None, max_examples=25)
def test_drawn_graphs_of_calls(drawn, normalize: bool, self_in_cross: bool) -> None:
    streams, calls = drawn
    crossings = frozenset((c.stream, s.stream) for c in calls if c.crosses for s in c.sources)
    switches = Switches(normalize, self_in_cross, True, crossings)
    ours = Additions(streams.values(), B, torch.empty(0, dtype=torch.float64), switches)
    twin = Twin(streams, switches)
    for call in calls:
        ours.add(call)
        twin.add(call)
    every = frozenset(range(len(calls)))
    for state in (every, frozenset(list(every)[::2]), frozenset()):
        for name in streams:
            for to in streams:
                expected = twin.relevance(name, state, to)
                found = ours.relevance(name, state, to)
                found = twin.zero(name, to) if found is None else found.expand(B, -1, -1)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
                assert bool((found >= 0).all())


@given(drawn=graphs())
@settings(deadline=None, max_examples=20)
def test_what_tokens_start_from_sums_to_one(drawn) -> None:
    for of in drawn[0].values():
        start = of.start(torch.empty(0, dtype=torch.float64))
        assert start.shape == (1, of.size, of.roots)
        torch.testing.assert_close(start.sum(-1), torch.ones(1, of.size, dtype=torch.float64))
        assert torch.equal(start[0, : of.roots], torch.eye(of.roots, dtype=torch.float64))


def test_merged_tokens_that_ask_across_share_what_they_were_merged_from() -> None:
    """R̄ of the asking tokens: over themselves, each column of its parents in equal parts."""
    streams = {"a": stream("a", 4, [[0, 1], [2, 3]]), "b": stream("b", 2)}
    own = torch.zeros(1, 2, 2).double()
    own[0, 0, 1] = 3.0  # the first merged token attends to the second
    across = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).double()
    merged = torch.tensor([[4, 5]])
    one = torch.arange(1)
    none, first = frozenset[int](), frozenset([0])
    ours = Additions(streams.values(), 1, torch.empty(0).double(), Switches())
    ours.add(MappedCall(0, "a", own, one, merged, (Source("a", merged),), False, none, none))
    ours.add(
        MappedCall(
            1, "a", across, one, merged, (Source("b", torch.tensor([[0, 1]])),), True, first, none
        )
    )
    found = ours.relevance("a", frozenset([0, 1]), "b")
    assert found is not None
    # R̄ᵀ Ā with R̄ = [[1, 1], [0, 1]]: what the first token asks for, the second shares in.
    assert found[0, 4:].tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert not found[0, :4].any()
