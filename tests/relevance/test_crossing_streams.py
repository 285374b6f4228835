"""Three streams that attend to each other, from the model to the matrices: against equations 5 to
11 as they stand in the paper, whole matrices, updated call by call in the order of execution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.laws import assert_same
from zoo.oracles import randomise

from captum_generic_attn import GenericAttention

WIDTH, HEADS, B = 8, 2, 2
SIZES = {"a": 4, "b": 3, "z": 2}
LATENTS = "latents"


class Attend(nn.Module):
    """One stream asks another; fused, or written out with its probabilities kept."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.kept: Tensor | None = None
        self.fused = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            part(t).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part, t in ((self.query, x), (self.key, y), (self.value, y))
        )
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            self.kept = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            mixed = self.kept @ v
        return x + mixed.transpose(1, 2).flatten(2)


class Three(nn.Module):
    """Two inputs attend to each other, and latents to one of them, then to both at once.

    Without `alone`, the first input never attends to itself: its `R − I` has nothing but zeros.
    """

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone
        self.embed = nn.ModuleDict({name: nn.Linear(5, WIDTH) for name in "ab"})
        self.latents = nn.Parameter(torch.zeros(1, SIZES["z"], WIDTH))
        self.calls = nn.ModuleList(Attend() for _ in range(7))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.embed["a"](a), self.embed["b"](b)
        z = self.latents.expand(len(a), -1, -1)
        if self.alone:
            a = self.calls[0](a, a)
        b = self.calls[1](b, b)
        b = self.calls[2](b, a)
        if self.alone:
            a = self.calls[3](a, b)
        z = self.calls[4](z, z)
        z = self.calls[5](z, a)
        z = self.calls[6](z, torch.cat([a, b], 1))
        return self.head(z[:, 1])


class Paper:
    """R of every pair of streams, updated by the equations."""

    def __init__(self, normalize: bool, self_in_cross: bool) -> None:
        self.normalize, self.self_in_cross = normalize, self_in_cross
        self.R = {
            (s, c): (torch.eye(SIZES[s]) if s == c else torch.zeros(SIZES[s], SIZES[c]))
            .double().expand(B, -1, -1)
            for s, c in product(SIZES, SIZES)
        }  # fmt: skip

    def bar(self, s: str) -> Tensor:
        """Eq. 8 and 9; a row of zeros stays the identity's."""
        R, eye = self.R[s, s], torch.eye(SIZES[s], dtype=torch.float64)
        if not self.normalize:
            return R
        sums = (R - eye).sum(-1, keepdim=True)
        return torch.where(sums > 1e-12, (R - eye) / sums.clamp(min=1e-12), 0) + eye

    def attend(self, s: str, keys: Sequence[str], Abar: Tensor) -> None:
        """Eq. 6 and 7, or eq. 10 and 11 for each stream of the keys, from the old matrices."""
        parts = Abar.split([SIZES[q] for q in keys], -1)
        added = {c: torch.zeros_like(self.R[s, c]) for c in SIZES}
        for q, part in zip(keys, parts, strict=True):
            for c in SIZES:
                if q == s or c != q:
                    added[c] = added[c] + part @ self.R[q, c]
                elif self.self_in_cross:
                    added[c] = added[c] + self.bar(s).mT @ part @ self.bar(q)
                else:
                    added[c] = added[c] + part
        self.R |= {(s, c): self.R[s, c] + rows for c, rows in added.items()}


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(B, SIZES[name], 5, dtype=torch.float64, generator=generator) for name in "ab"
    )  # type: ignore[return-value]


def by_the_paper(model: Three, given: tuple[Tensor, Tensor], paper: Paper) -> Paper:
    order = [("a", "a"), ("b", "b"), ("b", "a"), ("a", "b"), ("z", "z"), ("z", "a"), ("z", "ab")]
    score = model(*given)[:, 1].sum()
    used = [(of, call.kept) for of, call in zip(order, model.calls, strict=True)
            if call.kept is not None]  # fmt: skip
    gradients = torch.autograd.grad(score, [kept for _, kept in used])
    for ((s, keys), kept), gradient in zip(used, gradients, strict=True):
        paper.attend(s, keys, (kept * gradient).clamp(min=0).mean(1).detach())
    return paper


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("alone", [True, False], ids=["both attend", "zero rows"])
@pytest.mark.parametrize(("normalize", "self_in_cross"), list(product([True, False], repeat=2)))
def test_three_streams(normalize: bool, self_in_cross: bool, alone: bool, fused: bool) -> None:
    model = randomise(Three(alone).double().eval())
    assert isinstance(model, Three)
    given = inputs()
    paper = by_the_paper(model, given, Paper(normalize, self_in_cross))
    for call in model.calls:
        call.fused = fused
    method = GenericAttention(model, normalize=normalize, self_in_cross=self_in_cross)
    relevance = method.relevance(given, 1)
    assert set(relevance.streams) == {"a", "b", LATENTS}
    assert relevance.rows[LATENTS].tolist() == [[0, 1]] * B
    names = {"a": "a", "b": "b", "z": LATENTS}
    for (s, c), expected in paper.R.items():
        found = relevance.matrix(names[s], names[c])
        if expected.any():
            assert_same(found, expected)
        else:
            assert not found.any()
    maps = method.attribute(given, 1, return_input_shape=False)
    for name, ours in zip("ab", maps, strict=True):
        assert_same(ours, paper.R["z", name][:, 1])


class Chain(nn.Module):
    """Latents ask the first input, and the second input asks the latents; none is asked back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleDict({name: nn.Linear(5, WIDTH) for name in "ab"})
        self.latents = nn.Parameter(torch.zeros(1, SIZES["z"], WIDTH))
        self.calls = nn.ModuleList(Attend() for _ in range(6))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.embed["a"](a), self.embed["b"](b)
        z = self.latents.expand(len(a), -1, -1)
        for call in self.calls[:2]:
            a = call(a, a)
        z = self.calls[3](self.calls[2](z, z), a)
        b = self.calls[5](self.calls[4](b, b), z)
        return self.head(b[:, 1])


@pytest.mark.parametrize(("normalize", "self_in_cross"), list(product([True, False], repeat=2)))
def test_a_chain_of_streams(normalize: bool, self_in_cross: bool) -> None:
    model = randomise(Chain().double().eval())
    assert isinstance(model, Chain)
    given = inputs()
    score = model(*given)[:, 1].sum()
    kept = [call.kept for call in model.calls]
    paper = Paper(normalize, self_in_cross)
    order = ("aa", "aa", "zz", "za", "bb", "bz")
    gradients = torch.autograd.grad(score, kept)
    for (s, keys), attention, gradient in zip(order, kept, gradients, strict=True):
        paper.attend(s, keys, (attention * gradient).clamp(min=0).mean(1).detach())
    method = GenericAttention(model, normalize=normalize, self_in_cross=self_in_cross)
    first, second = method.attribute(given, 1, return_input_shape=False)
    assert_same(first, paper.R["b", "a"][:, 1])
    own = paper.R["b", "b"][:, 1].clone()
    own[:, 1] = 0
    assert_same(second, own)
    keeping = GenericAttention(
        model, normalize=normalize, self_in_cross=self_in_cross, own="keep"
    ).attribute(given, 1, return_input_shape=False)
    assert torch.equal(keeping[0], first), "the other stream has no own entry"
    assert_same(keeping[1], paper.R["b", "b"][:, 1] - torch.eye(SIZES["b"]).double()[1])


@pytest.mark.parametrize("own", ["zero", "keep"])
@pytest.mark.parametrize("rows", [{"a": 2}, {"a": [0, 2]}, {"a": 2, "b": 1, LATENTS: 1}])
def test_own_entries_of_streams_that_attend_in_turns(own: str, rows: dict[str, object]) -> None:
    """Whole matrices, in loops: `R − I` between a stream's own tokens, `R` between two streams.

    A token gets 0 of its own only row, and what other rows say of it in any case.
    """
    model = randomise(Three(alone=True).double().eval())
    assert isinstance(model, Three)
    given = inputs()
    paper = by_the_paper(model, given, Paper(normalize=True, self_in_cross=True))
    names = {"a": "a", "b": "b", LATENTS: "z"}
    expected = {c: torch.zeros(B, SIZES[c]).double() for c in SIZES}
    for name, chosen in rows.items():
        s = names[name]
        places = [chosen] if isinstance(chosen, int) else chosen
        for example, c in product(range(B), SIZES):
            for row, token in product(places, range(SIZES[c])):
                value = paper.R[s, c][example, row, token]
                if (s, row) == (c, token):
                    value = value - 1 if own == "keep" or len(places) > 1 else 0
                expected[c][example, token] += value / len(places)
    if LATENTS not in rows:  # read by the score: its row stays
        for c in SIZES:
            expected[c] += paper.R["z", c][:, 1]
    maps = GenericAttention(model, rows=rows, own=own).attribute(given, 1, return_input_shape=False)
    for name, ours in zip("ab", maps, strict=True):
        assert_same(ours, expected[name])


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
def test_without_aggregation_a_chain_of_streams_hands_on_what_it_knows(fused: bool) -> None:
    """Each `+=` an `=`: eq. 7 carries what the latents know of the first input to the second."""
    model = randomise(Chain().double().eval())
    assert isinstance(model, Chain)
    given = inputs()
    score = model(*given)[:, 1].sum()
    kept = [call.kept for call in model.calls]
    gradients = torch.autograd.grad(score, kept)
    aa, again, zz, za, bb, bz = (
        (attention * gradient).clamp(min=0).mean(1).detach()
        for attention, gradient in zip(kept, gradients, strict=True)
    )
    for call in model.calls:
        call.fused = fused
    aa = again @ aa  # eq. 6
    za = zz.mT @ za @ aa  # eq. 10
    expected = {
        ("a", "a"): aa,
        (LATENTS, LATENTS): zz,
        (LATENTS, "a"): za,
        ("b", "b"): bb,
        ("b", LATENTS): bb.mT @ bz @ zz,
        ("b", "a"): bz @ za,
    }
    method = GenericAttention(model, aggregate=False)
    relevance = method.relevance(given, 1)
    for pair, matrix in expected.items():
        assert_same(relevance.matrix(*pair), matrix)
    first, second = method.attribute(given, 1, return_input_shape=False)
    assert_same(first, (bz @ za)[:, 1])
    bb[:, 1, 1] = 0  # a token does not explain itself
    assert_same(second, bb[:, 1])


class Growing(nn.Module):
    """The first input is joined to latents after it has asked the second, or was asked by it.

    With `linked`, it has asked the latents as well, while they were a stream of their own.
    """

    def __init__(self, linked: bool, asks: bool) -> None:
        super().__init__()
        self.linked, self.asks = linked, asks
        self.embed = nn.ModuleDict({name: nn.Linear(5, WIDTH) for name in "ab"})
        self.latents = nn.Parameter(torch.zeros(1, SIZES["z"], WIDTH))
        self.calls = nn.ModuleList(Attend() for _ in range(7))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.embed["a"](a), self.embed["b"](b)
        z = self.latents.expand(len(a), -1, -1)
        a, z, b = (self.calls[i](x, x) for i, x in enumerate((a, z, b)))
        if self.linked:
            a = self.calls[3](a, z)
        asking = self.calls[4](a, b) if self.asks else self.calls[4](b, a)
        s = torch.cat([z, asking if self.asks else a], 1)
        s = self.calls[5](s, s)
        if self.asks:
            return self.head(s[:, SIZES["z"] + 1])
        return self.head(self.calls[6](asking, s)[:, 1])


@pytest.mark.parametrize("asks", [True, False], ids=["asks", "is asked"])
@pytest.mark.parametrize("linked", [True, False], ids=["linked", "apart"])
@pytest.mark.parametrize(("normalize", "self_in_cross"), list(product([True, False], repeat=2)))
def test_a_stream_that_grows(
    normalize: bool, self_in_cross: bool, linked: bool, asks: bool
) -> None:
    """Eq. 8 to 10 are over the tokens that made a stream up when the call ran."""
    model = randomise(Growing(linked, asks).double().eval())
    assert isinstance(model, Growing)
    given = inputs()
    score = model(*given)[:, 1].sum()
    calls = [i for i, call in enumerate(model.calls) if call.kept is not None]
    kept = [model.calls[i].kept for i in calls]
    maps = {
        i: (attention * gradient).clamp(min=0).mean(1).detach()
        for i, attention, gradient in zip(
            calls, kept, torch.autograd.grad(score, kept), strict=True
        )
    }
    paper = Paper(normalize, self_in_cross)
    for i, s, keys in ((0, "a", "a"), (1, "z", "z"), (2, "b", "b"), (3, "a", "z")):
        if i in maps:
            paper.attend(s, keys, maps[i])
    paper.attend(*(("a", "b") if asks else ("b", "a")), maps[4])
    R = paper.R
    joined = torch.cat([torch.cat([R[s, c] for c in "za"], -1) for s in "za"], 1)
    joined = joined + maps[5] @ joined
    across = torch.cat([R["z", "b"], R["a", "b"]], 1)
    across = across + maps[5] @ across
    expected = {("s", "s"): joined, ("s", "b"): across, ("b", "b"): R["b", "b"]}
    expected["b", "s"] = torch.cat([R["b", "z"], R["b", "a"]], -1)
    if not asks:
        more = maps[6]
        if self_in_cross:
            learnt = joined - torch.eye(joined.shape[-1])
            if normalize:
                learnt = learnt / learnt.sum(-1, keepdim=True)
            more = paper.bar("b").mT @ (more + more @ learnt)
        expected["b", "s"] = expected["b", "s"] + more
    method = GenericAttention(model, normalize=normalize, self_in_cross=self_in_cross)
    relevance = method.relevance(given, 1)
    assert [stream.tokens for stream in relevance.streams.values()] == [6, 3]
    names = dict(zip("sb", relevance.streams, strict=True))
    for (s, c), matrix in expected.items():
        if matrix.any():
            assert_same(relevance.matrix(names[s], names[c]), matrix)
        else:
            assert not relevance.matrix(names[s], names[c]).any()
    first, second = method.attribute(given, 1, return_input_shape=False)
    s, row = ("s", SIZES["z"] + 1) if asks else ("b", 1)
    of_s, of_b = expected[s, "s"][:, row].clone(), expected[s, "b"][:, row].clone()
    (of_s if asks else of_b)[:, row] = 0
    assert_same(first, of_s[:, SIZES["z"] :])
    assert_same(second, of_b)
