"""Ā of one call by blocks, as what it does to rows and columns, against Ā whole (eq. 5).

That the blocks themselves are right is asked in `test_capture_blocks.py`; here their P and its
gradient are taken whole, and `equations.average_heads` makes Ā of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.capture import blocks as blocks_module
from captum_generic_attn.capture.blocks import Blocks, FusedBlocks
from captum_generic_attn.capture.operands import Operands
from captum_generic_attn.capture.record import Explicit, Fused
from captum_generic_attn.relevance.attention_maps import BlockMap, DenseMap
from captum_generic_attn.relevance.equations import average_heads, positive_contribution

G, H, NQ, NK, D = 3, 2, 20, 13, 3  # of blocks of 16 queries and 5 keys


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "_ROWS", 4)
    monkeypatch.setattr(blocks_module, "_COLUMNS", 5)
    monkeypatch.setattr(blocks_module, "_WHOLE", 6)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def fused(
    *, keys: int = NK, groups: int = G, heads: int = H, queries: int = NQ, width: int = D,
    kept: bool = False, causal: bool = False, fewer: int = 1, mask: Tensor | None = None,
    head_index: list[int] | None = None,
) -> Blocks:  # fmt: skip
    query, key, value = (
        draw(groups, heads, queries, width, seed=1),
        draw(groups, heads // fewer, keys, width, seed=2),
        draw(groups, heads // fewer, keys, width, seed=3),
    )
    gradient = draw(groups, heads, queries, width, seed=4)
    logits = query @ key.repeat_interleave(fewer, 1).mT / math.sqrt(width)
    if causal:
        logits = logits.masked_fill(~torch.ones(queries, keys).tril().bool(), -math.inf)
    given_mask = () if mask is None else (mask,)
    sums = logits.logsumexp(-1) if kept else None
    source = Fused(Operands.of(query, key, value, *given_mask), causal, None, fewer > 1, sums)
    index = None if head_index is None else torch.tensor(head_index)
    return source.blocks(source.operands.read(), gradient, index)


def explicit(*, queries: int = NQ, keys: int = NK, head_index: list[int] | None = None) -> Blocks:
    maps, gradient = draw(G, H, queries, keys).softmax(-1), draw(G, H, queries, keys, seed=4)
    source = Explicit(Operands.of(maps), (0, 1, 2, 3), single_query=False)
    index = None if head_index is None else torch.tensor(head_index)
    return source.blocks(source.operands.read(), gradient, index)


CALLS: dict[str, Callable[[], Blocks]] = {
    "explicit": explicit,
    "explicit, permuted": lambda: explicit(head_index=[0, 3, 1, 4, 2, 5]),
    "softmax": fused,
    "kept logarithm": lambda: fused(kept=True),
    "causal": lambda: fused(keys=NQ, causal=True),
    "causal, kept logarithm": lambda: fused(keys=40, queries=40, causal=True, kept=True),
    "masked": lambda: fused(mask=torch.rand(G, 1, NQ, NK) > 0.5),
    "grouped": lambda: fused(heads=4, groups=2, fewer=2),
    "permuted": lambda: fused(head_index=[0, 3, 1, 4, 2, 5], kept=True),
    "one group": lambda: fused(groups=1, heads=4),
    "one head": lambda: fused(groups=4, heads=1, kept=True),
}
HEADS = {"grouped": 4, "one group": 4, "one head": 1}


def twins(name: str, share: float = 1.0) -> tuple[BlockMap, DenseMap]:
    blocks, heads = CALLS[name](), HEADS.get(name, H)
    return BlockMap(blocks, positive_contribution, heads, share), DenseMap(
        averaged(blocks, heads) * share
    )


def averaged(blocks: Blocks, heads: int) -> Tensor:
    grouped = (t.unflatten(0, (-1, heads)) for t in (blocks.probabilities(), blocks.gradient()))
    return average_heads(*grouped)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_by_blocks_as_whole(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ours, whole = twins(name)
    groups, queries, keys = whole.matrix.shape
    rows, columns = draw(groups, 3, queries, seed=5), draw(groups, keys, 2, seed=6)
    assert_same(ours.dense(), whole.matrix)
    assert_same(ours.left_multiply(rows), whole.left_multiply(rows))
    assert_same(ours.right_multiply(columns), whole.right_multiply(columns))
    assert_same(ours.squeeze_expanded().dense(), whole.matrix)
    assert_same(ours.squeeze_expanded().left_multiply(rows), whole.left_multiply(rows))


@pytest.mark.parametrize("name", CALLS)
def test_of_the_identity_it_is_itself(name: str) -> None:
    for one in twins(name):
        groups, queries, keys = one.dense().shape
        every = torch.eye(queries, dtype=torch.float64).expand(groups, -1, -1)
        assert_same(one.left_multiply(every), one.dense())
        every = torch.eye(keys, dtype=torch.float64).expand(groups, -1, -1)
        assert_same(one.right_multiply(every), one.dense())


@pytest.mark.parametrize("name", CALLS)
def test_it_is_linear(name: str) -> None:
    for one in twins(name):
        groups, queries, keys = one.dense().shape
        a, b = draw(groups, 2, queries, seed=5), draw(groups, 2, queries, seed=6)
        assert_same(one.left_multiply(2 * a - b), 2 * one.left_multiply(a) - one.left_multiply(b))
        c, d = draw(groups, keys, 2, seed=7), draw(groups, keys, 2, seed=8)
        assert_same(
            one.right_multiply(2 * c - d), 2 * one.right_multiply(c) - one.right_multiply(d)
        )
        assert_same(a @ one.right_multiply(c), one.left_multiply(a) @ c)


def test_what_was_given_stays_as_it_was() -> None:
    ours, _ = twins("kept logarithm")
    rows, columns = draw(G, 2, NQ), draw(G, NK, 2)
    before = rows.clone(), columns.clone(), ours.dense()
    ours.left_multiply(rows)
    ours.right_multiply(columns)
    assert torch.equal(rows, before[0])
    assert torch.equal(columns, before[1])
    assert torch.equal(ours.dense(), before[2])


# --- shares


@pytest.mark.parametrize("share", [1.0, 0.25, 2 / 3])
def test_a_share_scales_all(share: float) -> None:
    ours, whole = twins("softmax", share)
    rows, columns = draw(G, 3, NQ, seed=5), draw(G, NK, 2, seed=6)
    assert_same(ours.dense(), whole.matrix)
    assert_same(ours.left_multiply(rows), whole.left_multiply(rows))
    assert_same(ours.right_multiply(columns), whole.right_multiply(columns))
    assert_same(ours.squeeze_expanded().dense(), whole.matrix)


def test_shares_of_heads_that_are_called_one_by_one_add_up() -> None:
    """Three heads in a call of one and a call of two: Ā is the mean of the three."""
    every = [
        fused(groups=2, heads=3, head_index=head_index) for head_index in ([0, 3], [1, 2, 4, 5])
    ]
    parts = (
        BlockMap(every[0], positive_contribution, 1, 1 / 3),
        BlockMap(every[1], positive_contribution, 2, 2 / 3),
    )
    whole = averaged(fused(groups=2, heads=3), 3)
    assert_same(parts[0].dense() + parts[1].dense(), whole)
    rows = draw(2, 1, NQ, seed=5)
    assert_same(parts[0].left_multiply(rows) + parts[1].left_multiply(rows), rows @ whole)


# --- few rows


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The queries `[maps, n]` of every selection."""
    chosen: list[Tensor] = []
    select = FusedBlocks.select

    def noting(self: FusedBlocks, rows: Tensor) -> Blocks:
        chosen.append(rows)
        return select(self, rows)

    monkeypatch.setattr(FusedBlocks, "select", noting)
    return chosen


def only(places: list[list[int]], k: int = 1, queries: int = NQ) -> Tensor:
    """Rows `[G, k, Nq]` that are not zero at these queries of each group."""
    rows = torch.zeros(len(places), k, queries, dtype=torch.float64)
    for group, own in enumerate(places):
        rows[group, :, own] = draw(k, len(own), seed=group + 10)
    return rows


SPARSE = ("explicit", "softmax", "kept logarithm", "masked", "permuted")


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("places", [
    [[0], [0], [0]], [[19], [4], [0]], [[3, 17], [], [5]], [[], [], [8]], [[0, 9, 19], [1], [2, 3]],
])  # fmt: skip
def test_few_rows(name: str, places: list[list[int]]) -> None:
    """CLS of every example; the last token of each; different numbers of them; none in some."""
    ours, whole = twins(name)
    for k in (1, 4):
        rows = only(places, k)
        assert_same(ours.left_multiply(rows), whole.left_multiply(rows))


def test_rows_are_asked_for_by_different_readers() -> None:
    """What one row asks for counts for all: a query is computed if some row has it."""
    ours, whole = twins("softmax")
    rows = torch.cat([only([[1], [2], []]), only([[5], [], [7, 8]])], 1)
    assert_same(ours.left_multiply(rows), whole.left_multiply(rows))


@pytest.mark.parametrize("name", SPARSE)
def test_rows_of_zeros(name: str) -> None:
    ours, _ = twins(name)
    nothing = ours.left_multiply(torch.zeros(G, 2, NQ, dtype=torch.float64))
    assert torch.equal(nothing, torch.zeros(G, 2, NK, dtype=torch.float64))


def test_only_what_is_asked_for_is_computed(selected: list[Tensor]) -> None:
    """For each of a group's heads as many queries as the group that asks for most."""
    ours, whole = twins("softmax")
    rows = only([[3, 17], [], [5]], k=2)
    assert_same(ours.left_multiply(rows), whole.left_multiply(rows))
    (chosen,) = selected
    assert chosen.shape == (G * H, 2)
    assert chosen[0].tolist() == chosen[1].tolist() == [3, 17]
    assert 5 in chosen[4].tolist()
    assert torch.equal(chosen[4], chosen[5])
    assert all(len(set(own)) == 2 for own in chosen.tolist())


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 20])
def test_half_of_the_queries_are_few(selected: list[Tensor], count: int) -> None:
    ours, whole = twins("softmax")
    rows = only([list(range(count)), [19] if count else [], []])
    torch.testing.assert_close(
        ours.left_multiply(rows), whole.left_multiply(rows), rtol=1e-12, atol=1e-12
    )
    assert [chosen.shape for chosen in selected] == (
        [(G * H, max(count, 1))] if count <= 10 else []
    )


def test_a_causal_call_keeps_the_places_of_few_rows() -> None:
    ours, whole = twins("causal, kept logarithm")
    rows = only([[39], [1, 22], [0]], queries=40)
    result = ours.left_multiply(rows)
    assert_same(result, whole.left_multiply(rows))
    assert not result[2, 0, 1:].any()  # its only query sees the first key alone
    assert result[0, 0, 23:].any()


def test_a_call_of_one_query() -> None:
    for blocks in (fused(queries=1), explicit(queries=1)):
        ours, whole = BlockMap(blocks, positive_contribution, H), averaged(blocks, H)
        for rows in (draw(G, 2, 1), torch.zeros(G, 2, 1, dtype=torch.float64)):
            torch.testing.assert_close(
                ours.left_multiply(rows), rows @ whole, rtol=1e-12, atol=1e-12
            )


@given(st.integers(1, 30), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=60)
def test_drawn_rows(queries: int, heads: int, data: st.DataObject) -> None:
    blocks = fused(groups=2, heads=heads, queries=queries, kept=data.draw(st.booleans()))
    ours, whole = BlockMap(blocks, positive_contribution, heads), averaged(blocks, heads)
    each = st.lists(st.integers(0, queries - 1), max_size=4, unique=True)
    rows = only([data.draw(each), data.draw(each)], data.draw(st.integers(1, 3)), queries)
    torch.testing.assert_close(ours.left_multiply(rows), rows @ whole, rtol=1e-12, atol=1e-12)


# --- the smaller form


@pytest.mark.parametrize(
    ("heads", "tokens", "dense"),
    # Ā takes tokens², a call takes 4 tensors of heads × tokens × 3.
    [(1, 11, True), (1, 12, False), (1, 13, False), (2, 23, True), (2, 24, False), (4, 47, True)],
)
def test_the_smaller_form_is_kept(heads: int, tokens: int, dense: bool) -> None:
    blocks = fused(groups=2, heads=heads, queries=tokens, keys=tokens)
    one = BlockMap(blocks, positive_contribution, heads, 0.5)
    kept = one.squeeze_expanded()
    assert type(kept) is (DenseMap if dense else BlockMap)
    assert (kept is one) != dense
    assert kept.squeeze_expanded() is kept
    assert_same(kept.dense(), averaged(blocks, heads) * 0.5)


def test_keys_that_heads_share_make_a_call_smaller() -> None:
    """Of each example, Ā takes 900; a call of 4 heads 960, with one head of keys 600."""
    sizes = {"queries": 30, "keys": 30, "heads": 4, "groups": 2, "width": 2}
    assert fused(**sizes).elements == 2 * 4 * 4 * 30 * 2
    assert type(BlockMap(fused(**sizes), positive_contribution, 4).squeeze_expanded()) is DenseMap
    assert fused(**sizes, fewer=4).elements == 2 * (4 + 1 + 1 + 4) * 30 * 2
    assert (
        type(BlockMap(fused(**sizes, fewer=4), positive_contribution, 4).squeeze_expanded())
        is BlockMap
    )


def test_probabilities_of_the_model_are_kept_as_their_mean() -> None:
    """They take twice as much of each head, even of one."""
    for heads in (1, 2):
        assert (
            type(BlockMap(explicit(), positive_contribution, heads).squeeze_expanded()) is DenseMap
        )
