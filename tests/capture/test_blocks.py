"""Attention and its gradient in blocks, against whole matrices written from the formulas.

The twin is float64 and knows no blocks: `P = softmax(q kᵀ scale + mask)`, `∂y/∂P = ∂y/∂O Vᵀ`, and
eq. 5 before its mean over heads, `relu(P ⊙ ∂y/∂P)`. Limits of a block are made small, so that
tiles, rests and what causality hides all occur at tiny sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.capture import blocks as module
from captum_generic_attn.capture.blocks import Blocks, Maps
from captum_generic_attn.capture.fused_kernels import logsumexp_of
from captum_generic_attn.capture.operands import Operands
from captum_generic_attn.capture.record import Explicit, Fused
from captum_generic_attn.relevance.equations import positive_contribution

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@contextmanager
def limits(
    rows: int = 4, columns: int = 5, whole: int = 6, elements: int = 64, threads: int = 1
) -> Iterator[None]:
    """Sets the size of blocks and the number of threads that they are cut for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", rows)
        patch.setattr(module, "_COLUMNS", columns)
        patch.setattr(module, "_WHOLE", whole)
        patch.setattr(module, "_DEVICE_ELEMENTS", elements)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        yield


# --- the twin


@dataclass(frozen=True)
class Whole:
    """The maps of a call, `[maps, Nq, Nk]`; `hidden` is what the causal mask hides."""

    probabilities: Tensor
    gradient: Tensor
    live: Tensor
    hidden: Tensor

    @property
    def evidence(self) -> Tensor:
        return (self.probabilities * self.gradient).clamp(min=0)

    def at(self, rows: Tensor) -> Whole:
        """The same of the queries `rows` `[maps, n]` alone."""
        maps = torch.arange(len(rows))[:, None]
        parts = self.probabilities, self.gradient, self.live, self.hidden
        return Whole(*(part[maps, rows] for part in parts))


@dataclass(frozen=True)
class Call:
    """The arguments of a fused kernel, and the gradient of its output."""

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    grouped: bool = False
    head_index: Tensor | None = None
    sums: Tensor | None = None

    def hidden(self) -> Tensor:
        hidden = torch.zeros(self.query.shape[-2], self.key.shape[-2], dtype=torch.bool)
        return ~torch.ones_like(hidden).tril() if self.causal else hidden

    def heads(self, tensor: Tensor) -> Tensor:
        """Keys or values in float64, for each head of the queries."""
        share = self.query.shape[-3] // tensor.shape[-3] if self.grouped else 1
        tensor = tensor.detach().double()
        return tensor.repeat_interleave(share, -3) if share > 1 else tensor

    def logits(self) -> Tensor:
        scale = 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale
        logits = self.query.detach().double() @ self.heads(self.key).mT * scale
        logits = logits.masked_fill(self.hidden(), -math.inf)
        if self.mask is None:
            return logits
        if self.mask.dtype == torch.bool:
            return torch.where(self.mask, logits, -math.inf)
        return logits + self.mask.double()

    def twin(self) -> Whole:
        logits, gradient = self.logits(), self.gradient.double()
        powers = logits.exp()
        total = powers.sum(-1, keepdim=True)
        maps = (
            torch.where(total > 0, powers / total, 0.0),
            (gradient @ self.heads(self.value).mT).expand_as(logits),
            (gradient != 0).any(-1),
            self.hidden().expand_as(logits),
        )
        flat = [t.reshape(-1, *t.shape[self.query.ndim - 2 :]) for t in maps]
        return Whole(*(t if self.head_index is None else t[self.head_index] for t in flat))

    def with_sums(self) -> Call:
        """The same call with the logsumexp of each query, as kernels save it; 0 without keys."""
        sums = self.logits().logsumexp(-1)
        sums = sums.masked_fill(sums == -math.inf, 0.0)
        return replace(self, sums=sums.to(module.computing_dtype(self.query)))

    def blocks(self) -> Blocks:
        mask = () if self.mask is None else (self.mask,)
        operands = Operands.of(self.query, self.key, self.value, *mask)
        source = Fused(operands, self.causal, self.scale, self.grouped, self.sums)
        return source.blocks(operands.read(), self.gradient, self.head_index)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def call_of(
    *lead: int, queries: int, keys: int, fewer: int = 1, width: int = 3, seed: int = 0,
    dtype: torch.dtype = torch.float64, **options,
) -> Call:  # fmt: skip
    """A call with random numbers; `fewer` heads of the queries share keys and values."""
    other = (*lead[:-1], lead[-1] // fewer) if fewer > 1 else lead
    return Call(
        draw(*lead, queries, width, seed=seed, dtype=dtype),
        draw(*other, keys, width, seed=seed + 1, dtype=dtype),
        draw(*other, keys, width + 1, seed=seed + 2, dtype=dtype),
        draw(*lead, queries, width + 1, seed=seed + 3, dtype=dtype),
        grouped=fewer > 1,
        **options,
    )


# --- blocks put together


def put_together(blocks: Blocks, hidden: Tensor | None = None) -> Tensor:
    """`[maps, Nq, Nk]`, 0 where no block is; each element in one, but for those that are hidden."""
    whole = blocks.like.new_zeros(blocks.count, blocks.queries, blocks.keys)
    times = torch.zeros(whole.shape, dtype=torch.long)
    for block in blocks:
        maps, rows, columns = block.maps, block.rows, block.columns
        evidence = positive_contribution(block.attention, block.gradient, out=block.out)
        assert evidence.shape == whole[maps, rows, columns].shape
        assert evidence.dtype == blocks.like.dtype
        whole[maps, rows, columns] = evidence
        times[maps, rows, columns] += 1
        assert hidden is None or not hidden[maps, rows, columns].all()  # nothing to compute there
    assert times.max() == 1
    missing = times == 0
    assert not (missing & (torch.zeros_like(missing) if hidden is None else ~hidden)).any()
    return whole


def check(blocks: Blocks, twin: Whole, *, skipping: bool = True) -> None:
    """All results of a call, whole and in blocks; with `skipping`, hidden blocks are left out."""
    assert (blocks.count, blocks.queries, blocks.keys) == twin.probabilities.shape
    limit = TOLERANCE[blocks.like.dtype]
    hidden = twin.hidden if skipping else None
    for ours, expected in (
        (blocks.probabilities(), twin.probabilities),
        (blocks.gradient().expand_as(twin.gradient), twin.gradient),
        (put_together(blocks, hidden), twin.evidence),
        (put_together(blocks, hidden), twin.evidence),  # they can be asked again
    ):
        assert ours.dtype == blocks.like.dtype
        torch.testing.assert_close(ours.double(), expected, rtol=limit, atol=limit)
    assert torch.equal(blocks.live_rows(), twin.live)


# --- drawn calls


def broadcast(draw_: st.DrawFn, shape: tuple[int, ...], *, short: bool) -> tuple[int, ...]:
    """A shape that broadcasts to `shape`; with `short`, leading axes may be missing."""
    one = [draw_(st.booleans()) for _ in shape]
    made = tuple(1 if single else n for n, single in zip(shape, one, strict=True))
    return made[draw_(st.integers(0, len(shape) - 2)) :] if short else made


@st.composite
def fused_calls(draw_: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> Call:
    lead = draw_(st.sampled_from([(2,), (1, 1), (1, 4), (2, 3), (3, 2), (2, 4), (2, 1, 2)]))
    queries, keys = draw_(st.integers(1, 40)), draw_(st.integers(1, 24))
    dtype = draw_(st.sampled_from(dtypes))
    seed = draw_(st.integers(0, 1000))
    fewer = draw_(st.sampled_from([n for n in (1, 2, 4) if lead[-1] % n == 0 and len(lead) > 1]
                                  or [1]))  # fmt: skip
    call = call_of(
        *lead, queries=queries, keys=keys, fewer=fewer, width=draw_(st.integers(1, 4)), seed=seed,
        dtype=dtype, causal=draw_(st.booleans()), scale=draw_(st.sampled_from([None, 0.4])),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    call.gradient[torch.rand(*lead, queries, generator=generator) < 0.3] = 0
    if draw_(st.booleans()):
        shape = broadcast(draw_, (*lead, queries, keys), short=True)
        seen = torch.rand(shape, generator=generator) > draw_(st.sampled_from([0.0, 0.4, 0.9]))
        added = torch.where(seen, draw(*shape, seed=seed), -math.inf).to(dtype)
        call = replace(call, mask=added if draw_(st.booleans()) else seen)
    if draw_(st.booleans()):
        maps = torch.randperm(math.prod(lead), generator=generator)
        call = replace(call, head_index=maps[: draw_(st.integers(1, len(maps)))])
    return call.with_sums() if draw_(st.booleans()) else call


TILES = st.sampled_from([4, 5, 6])
THREADS = st.sampled_from([1, 2])


@given(fused_calls(), TILES, TILES, TILES, THREADS)
@settings(max_examples=100, deadline=None)
def test_drawn_calls(call: Call, rows: int, columns: int, whole: int, threads: int) -> None:
    with limits(rows, columns, whole, threads=threads):
        check(call.blocks(), call.twin())


@given(fused_calls(), TILES, TILES, THREADS, st.data())
@settings(max_examples=60, deadline=None)
def test_some_queries_of_drawn_calls(
    call: Call, columns: int, whole: int, threads: int, data: st.DataObject
) -> None:
    """Some queries of each map; the causal mask and masks use their positions."""
    blocks, queries = call.blocks(), call.query.shape[-2]
    count = data.draw(st.integers(1, queries))
    order = torch.rand(blocks.count, queries, generator=torch.Generator().manual_seed(count))
    rows = order.argsort(-1)[:, :count].sort(-1).values
    with limits(columns=columns, whole=whole, threads=threads):
        check(blocks.select(rows), call.twin().at(rows), skipping=False)
        check(blocks, call.twin())  # which themselves stay as they were


@given(fused_calls((torch.float32, torch.float16, torch.bfloat16)), TILES, THREADS)
@settings(max_examples=50, deadline=None)
def test_drawn_calls_in_lower_precision(call: Call, columns: int, threads: int) -> None:
    """Half precision is computed in float32."""
    blocks = call.blocks()
    assert blocks.like.dtype == torch.float32
    with limits(columns=columns, threads=threads):
        check(blocks, call.twin())


# --- each thing by itself


MASKS = {
    "none": None,
    "[B, H, Nq, Nk]": (2, 4, 20, 13),
    "[B, 1, Nq, Nk]": (2, 1, 20, 13),
    "[1, H, Nq, Nk]": (1, 4, 20, 13),
    "[B, H, 1, Nk]": (2, 4, 1, 13),
    "[B, H, Nq, 1]": (2, 4, 20, 1),
    "[B, 1, 1, Nk]": (2, 1, 1, 13),
    "[1, 1, Nq, Nk]": (1, 1, 20, 13),
    "[H, Nq, Nk]": (4, 20, 13),
    "[1, Nq, Nk]": (1, 20, 13),
    "[Nq, Nk]": (20, 13),
    "[1, Nk]": (1, 13),
    "[Nq, 1]": (20, 1),
    "[1, 1]": (1, 1),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kept", [False, True], ids=["softmax", "kept logarithm"])
@pytest.mark.parametrize("added", [False, True], ids=["boolean", "added"])
@pytest.mark.parametrize("shape", MASKS)
def test_masks(shape: str, added: bool, kept: bool, threads: int) -> None:
    """Rows without any key (the second, where the mask has rows) are zero."""
    call = call_of(2, 4, queries=20, keys=13, fewer=2)
    if MASKS[shape] is not None:
        mask = torch.rand(MASKS[shape], generator=torch.Generator().manual_seed(1)) > 0.3
        mask[..., :1] = True
        if mask.shape[-2] > 1:
            mask[..., 1, :] = False
        numbers = torch.where(mask, draw(*mask.shape, seed=8), -math.inf)
        call = replace(call, mask=numbers if added else mask)
    call = call.with_sums() if kept else call
    with limits(threads=threads):
        check(call.blocks(), call.twin())
        evidence = put_together(call.blocks())
    blind = MASKS[shape] is not None and MASKS[shape][-2] > 1
    assert bool(evidence[:, 1].any()) != blind
    assert evidence[:, [0, 2, 19]].any()


@pytest.mark.parametrize("fewer", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kept", [False, True])
def test_grouped_queries(batch: int, fewer: int, kept: bool) -> None:
    """Down to one head of keys and values for all (multi-query attention)."""
    call = call_of(batch, 4, queries=9, keys=11, fewer=fewer)
    call = call.with_sums() if kept else call
    for threads in (1, 2):
        with limits(threads=threads):
            check(call.blocks(), call.twin())


@pytest.mark.parametrize("key_lead", [(1, 1), (2, 1), (1, 3)])
def test_keys_and_values_that_broadcast(key_lead: tuple[int, ...]) -> None:
    call = call_of(2, 3, queries=5, keys=7)
    key, value = draw(*key_lead, 7, 3, seed=8), draw(*key_lead, 7, 4, seed=9)
    call = replace(call, key=key, value=value)
    with limits(threads=2):
        check(call.blocks(), call.twin())
        check(call.with_sums().blocks(), call.twin())


@pytest.mark.parametrize("repeated", ["heads", "queries", "keys", "all"])
@pytest.mark.parametrize("kept", [False, True])
def test_masks_that_the_model_repeated(repeated: str, kept: bool) -> None:
    shape = {
        "heads": (2, 1, 9, 11),
        "queries": (2, 3, 1, 11),
        "keys": (2, 3, 9, 1),
        "all": (1,) * 4,
    }
    mask = draw(*shape[repeated]).expand(2, 3, 9, 11)
    call = call_of(2, 3, queries=9, keys=11, mask=mask)
    call = call.with_sums() if kept else call
    rows = torch.tensor([[8, 1]]).expand(6, -1)
    with limits(threads=2):
        check(call.blocks(), call.twin())
        check(call.blocks().select(rows), call.twin().at(rows))


@pytest.mark.parametrize("kept", [False, True])
def test_a_gradient_that_is_one_number_everywhere(kept: bool) -> None:
    """The gradient of a sum over the output: one number, expanded."""
    call = call_of(2, 3, queries=9, keys=11)
    call = replace(call, gradient=torch.full((), 0.5, dtype=torch.float64).expand(2, 3, 9, 4))
    call = call.with_sums() if kept else call
    rows = torch.tensor([[8, 1]]).expand(6, -1)
    with limits(threads=2):
        check(call.blocks(), call.twin())
        check(call.blocks().select(rows), call.twin().at(rows))


@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (7, 40), (40, 7), (1, 40), (32, 18)])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_causal(queries: int, keys: int, kept: bool, threads: int) -> None:
    call = call_of(1, 2, queries=queries, keys=keys, causal=True)
    call = call.with_sums() if kept else call
    with limits(threads=threads):
        check(call.blocks(), call.twin())


@pytest.mark.parametrize("kept", [False, True])
def test_some_queries_of_a_causal_call(kept: bool) -> None:
    """The last query attends to all keys, though it is selected first."""
    call = call_of(1, 2, queries=40, keys=40, causal=True)
    call = call.with_sums() if kept else call
    rows = torch.tensor([[39, 3], [0, 20]])
    twin = call.twin().at(rows)
    assert (twin.probabilities > 0).sum(-1).tolist() == [[40, 4], [1, 21]]
    with limits(threads=2):
        check(call.blocks().select(rows), twin, skipping=False)


@pytest.mark.parametrize("kept", [False, True])
def test_some_of_some_queries(kept: bool) -> None:
    call = call_of(1, 2, queries=40, keys=40, causal=True)
    call = call.with_sums() if kept else call
    first, then = torch.tensor([[39, 3, 7], [0, 20, 31]]), torch.tensor([[1, 0], [2, 1]])
    twin = call.twin().at(first.gather(1, then))
    check(call.blocks().select(first).select(then), twin, skipping=False)


def test_a_selected_query_keeps_its_row_of_the_mask() -> None:
    mask = torch.eye(8, dtype=torch.bool)  # each query sees the key of its own place
    call = call_of(1, 2, queries=8, keys=8, mask=mask)
    rows = torch.tensor([[5], [2]])
    ours = call.blocks().select(rows)
    assert ours.probabilities().nonzero().tolist() == [[0, 0, 5], [1, 0, 2]]
    check(ours, call.twin().at(rows), skipping=False)


def test_memory_that_held_nan_does_no_harm() -> None:
    """Blocks are computed in uninitialised memory."""
    call = call_of(2, 2, queries=20, keys=13).with_sums()
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        for threads in (1, 2):
            with limits(threads=threads):
                check(call.blocks(), call.twin())
                check(replace(call, sums=None).blocks(), call.twin())
    finally:
        torch.use_deterministic_algorithms(False)


# --- which blocks there are


Place = tuple[tuple[int, int], ...]


def places(blocks: Blocks) -> list[Place]:
    """Where each block starts and stops among maps, queries and keys."""
    return [tuple((s.start, s.stop) for s in block[:3]) for block in blocks]


def cuts(found: list[Place]) -> tuple[int, ...]:
    """In how many parts maps, queries and keys are cut."""
    return tuple(len({place[axis] for place in found}) for axis in range(3))


def sizes(found: list[Place], axis: int) -> set[int]:
    return {place[axis][1] - place[axis][0] for place in found}


def test_tiles_of_a_kept_logarithm() -> None:
    """Over all threads 2 maps, 16 queries at least, 5 keys."""
    with limits(rows=4, columns=5, whole=6, threads=2):
        found = places(call_of(3, queries=20, keys=13).with_sums().blocks())
    assert cuts(found) == (2, 2, 3)
    assert len(found) == 2 * 2 * 3
    assert all(max(sizes(found, axis)) <= most for axis, most in enumerate((2, 16, 5)))


def test_tiles_that_causality_hides_are_left_out() -> None:
    with limits(rows=4, columns=5, whole=6, threads=2):
        found = places(call_of(1, queries=40, keys=40, causal=True).with_sums().blocks())
    assert cuts(found) == (1, 3, 8)
    rows, columns = ({place[axis] for place in found} for axis in (1, 2))
    seen = {(r, c) for r, c in product(rows, columns) if c[0] < r[1]}
    assert {place[1:] for place in found} == seen
    assert len(found) == len(seen) < 3 * 8 - 4


@pytest.mark.parametrize("threads", [1, 2])
def test_a_softmax_has_all_keys_of_a_query_in_one_block(threads: int) -> None:
    """As many threads, as many maps in a block."""
    with limits(rows=4, columns=5, whole=6, threads=threads):
        found = places(call_of(3, queries=20, keys=13).blocks())
    assert cuts(found) == (4 - threads, 2, 1)
    assert sizes(found, 2) == {13}


@pytest.mark.parametrize(("keys", "count"), [(6, 1), (7, 2)])
def test_few_keys_are_one_block(keys: int, count: int) -> None:
    with limits(rows=4, columns=5, whole=6, threads=2):
        found = places(call_of(1, queries=3, keys=keys).with_sums().blocks())
    assert cuts(found) == (1, 1, count)


def test_a_logarithm_is_of_no_use_where_all_keys_fit_in_a_block() -> None:
    call = call_of(2, queries=20, keys=6)
    with limits(whole=6):
        check(replace(call, sums=torch.zeros(2, 20)).blocks(), call.twin())


def test_small_maps_share_a_block() -> None:
    """As many as fit, for each thread: 64 elements are five maps of 3 × 4."""
    with limits(rows=8, columns=8, threads=2):
        found = places(call_of(23, queries=3, keys=4).blocks())
    assert [place[0] for place in found] == [(0, 10), (10, 20), (20, 23)]


def test_real_limits_fill_no_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are there many more blocks than it takes to fill it."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    blocks = call_of(5, queries=1200, keys=1300, width=1, dtype=torch.float32).with_sums().blocks()
    found = places(blocks)
    most = 2 * 256 * 512  # of two threads
    assert all(math.prod(stop - start for start, stop in place) <= most for place in found)
    assert max(sizes(found, 2)) <= 512
    assert len(found) <= 1.6 * (5 * 1200 * 1300 / most)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_an_accelerator(causal: bool) -> None:
    """It has one core: all keys of a query in a block, whatever the threads of the host."""
    with limits(elements=16 * 40 * 2, threads=2):
        meta = torch.device("meta")
        call = call_of(3, queries=20, keys=40, causal=causal).with_sums()
        tensors = {name: getattr(call, name).to(meta) for name in ("query", "key", "value")}
        call = replace(call, **tensors, gradient=call.gradient.to(meta), sums=call.sums.to(meta))
        # 20 × 40 elements are a map: one in a block of 1280; of smaller ones several
        assert places(call.blocks()) == [((i, i + 1), (0, 20), (0, 40)) for i in range(3)]
        few = call.blocks().select(torch.zeros(3, 16, dtype=torch.long))
        assert places(few) == [((0, 2), (0, 16), (0, 40)), ((2, 3), (0, 16), (0, 40))]
        assert few.like.device == meta


@pytest.mark.parametrize("mask", ["none", "boolean", "added"])
def test_an_accelerator_trusts_a_logarithm_that_nothing_was_added_to(mask: str) -> None:
    """How large the numbers are that a mask adds is not asked there: that would wait for it."""
    masks = {"none": None, "boolean": torch.ones(20, 700).bool(), "added": torch.zeros(20, 700)}
    call = call_of(2, queries=20, keys=700, mask=masks[mask]).with_sums()
    assert call.sums is not None
    tensors = {
        name: tensor.to("meta")
        for name in ("query", "key", "value", "gradient", "mask", "sums")
        if (tensor := getattr(call, name)) is not None
    }
    assert replace(call, **tensors).blocks()._lse_is_fine() == (mask != "added")


# --- real size, real kernel


CALLS: dict[str, Callable[[], Call]] = {
    "plain": lambda: real(fewer=1),
    "causal": lambda: real(causal=True),
    "grouped": lambda: real(fewer=2),
    "boolean mask": lambda: real(mask=blind_mask()),
    "added mask": lambda: real(mask=torch.where(blind_mask(), 0.25, -math.inf)),
    "added mask of each head": lambda: real(mask=draw(1, 4, 700, 700, dtype=torch.float32)),
}


def real(fewer: int = 1, **options) -> Call:
    """More keys than one block takes; values are as wide as keys, as the fused kernel asks."""
    call = call_of(
        1, 4, queries=700, keys=700, fewer=fewer, width=4, dtype=torch.float32, **options
    )  # fmt: skip
    return replace(call, value=call.key, gradient=draw(1, 4, 700, 4, dtype=torch.float32))


def blind_mask() -> Tensor:
    """Query 600 sees nothing."""
    mask = torch.rand(700, 700, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[600] = False
    return mask


@pytest.mark.parametrize(("name", "threads"), [*((name, 1) for name in CALLS), ("causal", 2)])
def test_more_keys_than_a_block_takes(name: str, threads: int) -> None:
    torch.set_num_threads(threads)  # `conftest` sets it back
    call = CALLS[name]()
    kernel = F.scaled_dot_product_attention(
        call.query.requires_grad_(), call.key, call.value, call.mask, is_causal=call.causal,
        enable_gqa=call.grouped,
    )  # fmt: skip
    sums = logsumexp_of(kernel)
    assert sums is not None, kernel.grad_fn
    twin = call.twin()
    for kept in (sums, None):
        blocks = replace(call, sums=kept).blocks()
        check(blocks, twin)
        assert cuts(places(blocks))[2] == (1 if kept is None else 2)
    if "mask" in name and "head" not in name:
        assert not twin.probabilities[:, 600].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_logarithm_that_a_kernel_of_half_precision_kept(dtype: torch.dtype) -> None:
    """As exact as half precision: three digits."""
    call = real(causal=True)
    query, key, gradient = (t.to(dtype) for t in (call.query, call.key, call.gradient))
    call = Call(query.requires_grad_(), key, key, gradient, causal=True)
    sums = logsumexp_of(F.scaled_dot_product_attention(query, key, key, is_causal=True))
    assert sums is not None
    ours = put_together(replace(call, sums=sums).blocks(), call.twin().hidden)
    torch.testing.assert_close(ours.double(), call.twin().evidence, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("kept", [False, True], ids=["softmax", "kept logarithm"])
def test_a_row_masked_by_the_least_number_looks_everywhere(kept: bool) -> None:
    """A mask of `finfo.min`, as Hugging Face adds it, leaves a uniform softmax, which sums to 1."""
    mask = torch.zeros(700, 700)
    mask[600] = torch.finfo(torch.float32).min
    call = replace(
        real(), mask=mask, gradient=torch.ones(1, 4, 700, 4), value=torch.ones(1, 4, 700, 4)
    )
    kernel = F.scaled_dot_product_attention(
        call.query.requires_grad_(), call.key, call.value, call.mask
    )
    torch.testing.assert_close(kernel.detach(), torch.ones(1, 4, 700, 4))
    call = replace(call, sums=logsumexp_of(kernel) if kept else None)
    sums = put_together(call.blocks()).sum(-1)  # each ∂y/∂P is 4
    torch.testing.assert_close(sums, torch.full((4, 700), 4.0))


# --- probabilities of the model itself


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head_index", [None, [3, 0, 5]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_explicit_probabilities(
    dtype: torch.dtype, head_index: list[int] | None, threads: int
) -> None:
    maps, gradient = draw(2, 3, 20, 13).softmax(-1).to(dtype), draw(2, 3, 20, 13, seed=1).to(dtype)
    gradient[:, 1, 4:9] = 0
    gradient[:, 2, 10, 1:] = 0  # a query of which one key counts is alive
    index = None if head_index is None else torch.tensor(head_index)
    source = Explicit(Operands.of(maps), (0, 1, 2, 3), single_query=False)
    blocks = source.blocks(source.operands.read(), gradient, index)
    parts = (
        maps.double(),
        gradient.double(),
        (gradient != 0).any(-1),
        torch.zeros_like(maps).bool(),
    )
    flat = [t.flatten(0, 1) if index is None else t.flatten(0, 1)[index] for t in parts]
    whole = Whole(*flat)
    rows = torch.tensor([[19, 2, 5]]).expand(len(flat[0]), -1)
    with limits(rows=4, columns=5, threads=threads):
        check(blocks, whole)
        check(blocks.select(rows), whole.at(rows))
        assert cuts(places(blocks)) == (math.ceil(blocks.count / threads), 2, 1)


def test_memory_that_it_takes_to_keep_a_call() -> None:
    """All that a fused call read but its mask, without the broadcast; attention and gradient."""
    call = call_of(2, 4, queries=6, keys=5, fewer=2, mask=torch.ones(6, 5, dtype=torch.bool))
    assert call.blocks().elements == 2 * 4 * 6 * (3 + 4) + 2 * 2 * 5 * (3 + 4)
    maps = draw(2, 4, 6, 5)
    source = Explicit(Operands.of(maps), (0, 1, 2, 3), single_query=False)
    assert source.blocks((maps,), maps, None).elements == 2 * 2 * 4 * 6 * 5


# --- maps that share a tensor


def test_maps_in_order_are_the_tensor_itself() -> None:
    tensor = draw(2, 3, 5, 4)
    maps = Maps.of(tensor, (2, 3), None)
    assert maps.index is None
    assert maps.tensor.data_ptr() == tensor.data_ptr()
    assert torch.equal(maps[slice(1, 4)], tensor.flatten(0, 1)[1:4])


@pytest.mark.parametrize("head_index", [None, [5, 1, 0], [2]])
@pytest.mark.parametrize("own", [(), (1,), (3,), (1, 1), (2, 1), (1, 3), (2, 3)])
def test_shared_maps_are_never_expanded(own: tuple[int, ...], head_index: list[int] | None) -> None:
    tensor = draw(*own, 5, 4)
    maps = Maps.of(tensor, (2, 3), None if head_index is None else torch.tensor(head_index))
    assert maps.tensor.untyped_storage().nbytes() == math.prod(own) * 5 * 4 * 8
    assert maps.tensor.data_ptr() == tensor.data_ptr()
    expected = tensor.expand(2, 3, 5, 4).flatten(0, 1)
    expected = expected if head_index is None else expected[head_index]
    for part in (slice(None), slice(0, 1), slice(1, 3)):
        assert torch.equal(maps[part].expand_as(expected[part]), expected[part])


def test_a_mask_that_the_model_expanded_itself_is_not_copied() -> None:
    mask = draw(2, 1, 5, 4)
    maps = Maps.of(mask.expand(2, 3, 5, 4), (2, 3), None)
    assert maps.tensor.untyped_storage().nbytes() == 2 * 5 * 4 * 8
    assert torch.equal(maps[slice(None)].view(2, 3, 5, 4), mask.expand(2, 3, 5, 4))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("head_index", [None, [11, 1, 0, 6]])
def test_neighbouring_heads_share_keys(groups: int, head_index: list[int] | None) -> None:
    tensor = draw(2, 6 // groups, 5, 4)
    index = None if head_index is None else torch.tensor(head_index)
    maps = Maps.of(tensor, (2, 6), index, groups=groups)
    assert maps.tensor.data_ptr() == tensor.data_ptr()
    expected = tensor.repeat_interleave(groups, 1).flatten(0, 1)
    assert torch.equal(maps[slice(None)], expected if head_index is None else expected[head_index])


def test_rows_of_maps() -> None:
    tensor = draw(2, 1, 5, 4)
    rows = torch.tensor([[0, 4], [3, 1], [2, 0], [1, 1], [4, 3], [0, 2]])
    ours = Maps.of(tensor, (2, 3), None).rows(rows)
    assert ours.index is None
    for i, own in enumerate(rows.tolist()):
        assert torch.equal(ours[slice(i, i + 1)][0], tensor[i // 3, 0, own])
