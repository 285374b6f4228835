"""Ids are looked up in many ways; ids, features and pictures are joined before they are tokens.

Every look-up of one table has the map of `nn.Embedding`. The reference of several inputs that are
joined is the joined tensor as one input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import oracles
from zoo.encoder import BATCH, TOKENS, WIDTH, Block, features, ids
from zoo.laws import assert_same

from captum_generic_attn import GenericAttention, UnsupportedAttentionError

TARGET = 1
TOLERANCE = 1e-9
WORDS = 20
aten = torch.ops.aten


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Reader(nn.Module):
    """Two layers over what `look_up(model, *inputs)` returns, `[B, N, WIDTH]`."""

    def __init__(self, look_up: Callable[..., Tensor], read: int = -1) -> None:
        super().__init__()
        self.look_up, self.read = look_up, read
        self.table, self.project = nn.Embedding(WORDS, WIDTH), nn.Linear(3, WIDTH)
        self.wide, self.patch = nn.Linear(6, WIDTH), nn.Conv2d(2, WIDTH, 4, 4)
        self.wide_patch = nn.Conv2d(4, WIDTH, 4, 4)
        self.places = nn.Parameter(torch.zeros(1, 12, WIDTH))
        self.blocks = nn.Sequential(Block(fused), Block(fused))
        self.head = nn.Linear(WIDTH, 4)
        oracles.randomise(self.double())

    @property
    def rows(self) -> nn.Parameter:
        return self.table.weight

    def forward(self, *inputs: Any) -> Tensor:
        x = self.look_up(self, *inputs)
        return self.head(self.blocks(x + self.places[:, : x.shape[1]])[:, self.read])


def explain(model: Callable[..., Tensor], inputs: Any, extra: Any = None, **options: Any) -> Any:
    method = GenericAttention(model)
    return method.attribute(inputs, TARGET, extra, **({"return_input_shape": False} | options))


def joined(parts: Any, dim: int = 1) -> Tensor:
    return torch.cat(parts, dim) if isinstance(parts, tuple) else parts


# -- one table, looked up in many ways ---------------------------------------------------------


def flat(i: Tensor) -> Tensor:
    return i.reshape(-1)


def laid_out(rows: Tensor, i: Tensor) -> Tensor:
    return rows.view(*i.shape, -1)


LOOK_UPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nn.Embedding": lambda m, i: m.table(i),
    "F.embedding": lambda m, i: F.embedding(i, m.rows),
    "F.embedding, by name": lambda m, i: F.embedding(input=i, weight=m.rows),
    "torch.embedding": lambda m, i: torch.embedding(m.rows, i),
    "aten.embedding": lambda m, i: aten.embedding.default(m.rows, i),
    "aten.index": lambda m, i: aten.index.Tensor(m.rows, [i]),
    "table[ids]": lambda m, i: m.rows[i],
    "table[ids, :]": lambda m, i: m.rows[i, :],
    "table[ids, ...]": lambda m, i: m.rows[i, ...],
    "table[(ids,)]": lambda m, i: m.rows[(i,)],
    "table of one more axis": lambda m, i: m.rows[None][:, i].squeeze(0),
    "table, transposed": lambda m, i: m.rows.T[:, i].movedim(0, -1),
    "detached table": lambda m, i: m.rows.detach()[i],
    "computed table": lambda m, i: (m.rows * 2)[i] / 2,
    "index_select": lambda m, i: laid_out(m.rows.index_select(0, flat(i)), i),
    "torch.index_select": lambda m, i: laid_out(torch.index_select(m.rows, 0, flat(i)), i),
    "index_select, by name": lambda m, i: laid_out(m.rows.index_select(dim=0, index=flat(i)), i),
    "gather": lambda m, i: laid_out(m.rows.gather(0, flat(i)[:, None].expand(-1, WIDTH)), i),
    "gather in a batch": lambda m, i: m.rows.expand(len(i), -1, -1).gather(
        1, i[..., None].expand(-1, -1, WIDTH)
    ),
    "take_along_dim": lambda m, i: laid_out(torch.take_along_dim(m.rows, flat(i)[:, None], 0), i),
    "take_along_dim in a batch": lambda m, i: m.rows[None].take_along_dim(i[..., None], dim=1),
    "one hot, product": lambda m, i: F.one_hot(i, WORDS).to(m.rows.dtype) @ m.rows,
    "one hot, matmul": lambda m, i: torch.matmul(F.one_hot(i, num_classes=WORDS).double(), m.rows),
    "one hot, linear": lambda m, i: F.linear(F.one_hot(i, WORDS).double(), m.rows.T),
    "one hot, einsum": lambda m, i: torch.einsum(
        "bnv,vd->bnd", F.one_hot(i, WORDS).double(), m.rows
    ),
    "one hot, tensordot": lambda m, i: torch.tensordot(F.one_hot(i, WORDS).double(), m.rows, 1),
    "one hot by scatter": lambda m, i: torch.zeros(*i.shape, WORDS, dtype=torch.float64).scatter(
        -1, i[..., None], 1.0
    ) @ m.rows,
    "one hot, scatter_": lambda m, i: (
        torch.zeros(*i.shape, WORDS).double().scatter_(2, i.unsqueeze(-1), 1) @ m.rows
    ),
    "ids of another type": lambda m, i: m.table(i.int()),
    "ids, shifted twice": lambda m, i: m.table((i + 1) - 1),
    "ids, clamped": lambda m, i: m.table(i.clamp(0, WORDS - 1)),
    "id by id": lambda m, i: torch.stack([m.table(i[:, n]) for n in range(i.shape[1])], 1),
}  # fmt: skip


@cache
def by_embedding() -> Tensor:
    return explain(Reader(LOOK_UPS["nn.Embedding"]), ids())


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", LOOK_UPS)
def test_look_ups(name: str, frozen: bool) -> None:
    model = Reader(LOOK_UPS[name]).requires_grad_(not frozen)
    assert_same(explain(model, ids()), by_embedding(), TOLERANCE)


def test_ids_that_are_compared_with_all_words_are_told_of() -> None:
    model = Reader(lambda m, i: (i[..., None] == torch.arange(WORDS)).double() @ m.rows)
    with pytest.warns(UserWarning, match="input0 reaches no attention"):
        assert not explain(model, ids()).any()


def test_ids_of_one_example_at_a_time_are_refused_by_name() -> None:
    model = Reader(lambda m, i: torch.stack([m.rows[one] for one in i]))
    with pytest.raises(UnsupportedAttentionError, match="could not be followed through getitem"):
        explain(model, ids())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nn.Embedding", "table[ids]", "one hot, product"])
def test_exported_look_ups(name: str) -> None:
    model = Reader(LOOK_UPS[name]).requires_grad_(False)
    program = torch.export.export(model, (ids(),)).module()
    assert_same(explain(program, ids()), by_embedding(), TOLERANCE)


# -- ids that are joined before the look-up ----------------------------------------------------


def embedded(m: Any, *parts: Tensor) -> Tensor:
    return m.table(torch.cat(parts, 1))


def column(parts: tuple[Tensor, ...], word: int) -> Tensor:
    return torch.full_like(parts[0][:, :1], word)


def with_start(m: Any, *parts: Tensor) -> Tensor:
    return embedded(m, column(parts, 1), *parts)


def with_separators(m: Any, *parts: Tensor) -> Tensor:
    between = [piece for part in parts for piece in (part, column(parts, 2))]
    return embedded(m, column(parts, 1), *between)


def written(m: Any, *parts: Tensor) -> Tensor:
    whole = torch.zeros(len(parts[0]), sum(p.shape[1] for p in parts), dtype=torch.long)
    start = 0
    for part in parts:
        whole[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return m.table(whole)


IDS_JOINED: dict[str, Callable[..., Tensor]] = {
    "cat": embedded,
    "cat, then one hot": lambda m, *p: F.one_hot(torch.cat(p, 1), WORDS).double() @ m.rows,
    "cat, then an index": lambda m, *p: m.rows[torch.cat(p, -1)],
    "hstack": lambda m, *p: m.table(torch.hstack(p)),
    "a start token": with_start,
    "separators": with_separators,
    "padding": lambda m, *p: m.table(F.pad(torch.cat(p, 1), (1, 0), value=3)),
    "written into a buffer": written,
    "looked up one by one": lambda m, *p: torch.cat([m.table(part) for part in p], 1),
}
CUTS = {"two": (0, 2, TOKENS), "three": (0, 1, 4, TOKENS)}


def cut(whole: Tensor, cuts: str) -> tuple[Tensor, ...]:
    ends = CUTS[cuts]
    return tuple(whole[:, a:b].clone() for a, b in pairwise(ends))


def one_argument(m: Any, name: str, cuts: str, whole: Tensor) -> Tensor:
    """The same function of the joined ids."""
    if name == "separators":
        return with_separators(m, *torch.split(whole, [p.shape[1] for p in cut(whole, cuts)], 1))
    return IDS_JOINED[name](m, whole)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", IDS_JOINED)
def test_ids_that_are_joined(name: str, cuts: str) -> None:
    expected = explain(Reader(lambda m, i: one_argument(m, name, cuts, i)), ids())
    parts = cut(ids(), cuts)
    model = Reader(IDS_JOINED[name])
    assert_same(torch.cat(explain(model, parts), 1), expected, TOLERANCE)
    first, *others = parts
    assert_same(explain(model, first, tuple(others)), expected[:, : first.shape[1]], TOLERANCE)


def test_ids_of_a_default_argument() -> None:
    start = ids()[:1, :2].expand(BATCH, -1).clone()

    class WithPrompt(Reader):
        def forward(self, answer: Tensor, prompt: Tensor = start) -> Tensor:
            return super().forward(prompt, answer)

    expected = explain(Reader(embedded), torch.cat([start, ids()[:, 2:]], 1))[:, 2:]
    model = WithPrompt(embedded)
    answer = ids()[:, 2:].clone()
    assert_same(explain(model, answer, (start,)), expected, TOLERANCE)
    assert_same(explain(model, answer), expected, TOLERANCE)


def test_a_prompt_that_all_examples_share() -> None:
    prompt, answer = ids()[:1, :2].clone(), ids()[:, 2:].clone()
    model = Reader(lambda m, a, p: embedded(m, p.expand(len(a), -1), a))
    expected = explain(Reader(embedded), torch.cat([prompt.expand(BATCH, -1), answer], 1))
    assert_same(explain(model, answer, (prompt,)), expected[:, 2:], TOLERANCE)


# -- features that are joined before they are tokens -------------------------------------------

FEATURES_JOINED: dict[str, tuple[Callable[..., Tensor], int]] = {
    "along tokens": (lambda m, a, b: m.project(torch.cat([a, b], 1)), 1),
    "along tokens, after the projection": (
        lambda m, a, b: torch.cat([m.project(a), m.project(b)], 1), 1
    ),
    "along tokens, with a token between": (
        lambda m, a, b: m.project(torch.cat([a, torch.zeros_like(a[:, :0]), b], 1)), 1
    ),
    "along features": (lambda m, a, b: m.wide(torch.cat([a, b], -1)), -1),
    "along features, stacked": (lambda m, a, b: m.wide(torch.stack([a, b], -2).flatten(-2)), -1),
    "along features, written": (
        lambda m, a, b: m.wide(torch.zeros(*a.shape[:2], 6).double().index_copy(
            -1, torch.arange(3), a).index_copy(-1, torch.arange(3, 6), b)), -1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES_JOINED)
def test_features_that_are_joined(name: str) -> None:
    """Along features each input has the map of the whole: one token has both."""
    join, axis = FEATURES_JOINED[name]
    one, other = features(), features(5)
    layer = (lambda m, x: m.wide(x)) if axis == -1 else (lambda m, x: m.project(x))
    expected = explain(Reader(layer), torch.cat([one, other], axis), return_input_shape=True)
    found = explain(Reader(join), (one, other), return_input_shape=True)
    assert_same(torch.cat(found, axis), expected, TOLERANCE)


def pictures(seed: int, channels: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, channels, 8, 12, generator=generator, dtype=torch.float64)


def in_patches(conv: nn.Module, x: Tensor) -> Tensor:
    return conv(x).flatten(2).mT


PICTURES_JOINED: dict[str, Callable[..., Tensor]] = {
    "cat": lambda m, a, b: in_patches(m.wide_patch, torch.cat([a, b], 1)),
    "stack": lambda m, a, b: in_patches(m.wide_patch, torch.stack([a, b], 1).flatten(1, 2)),
    "normalised before": lambda m, a, b: in_patches(m.wide_patch, torch.cat([a * 1.0, b + 0], 1)),
}


@pytest.mark.parametrize("name", PICTURES_JOINED)
def test_pictures_joined_along_channels(name: str) -> None:
    one, other = pictures(3), pictures(5)
    whole = Reader(lambda m, x: in_patches(m.wide_patch, x))
    expected = explain(whole, torch.cat([one, other], 1), return_input_shape=True)
    found = explain(Reader(PICTURES_JOINED[name]), (one, other), return_input_shape=True)
    assert_same(torch.cat(found, 1), expected, TOLERANCE)


def halves(x: Tensor) -> Tensor:
    """`[2 B, N, D]` as two sequences of each example: `[B, 2 N, D]`."""
    return torch.cat(x.chunk(2), 1)


ALONG_THE_BATCH: dict[str, tuple[Any, Any, tuple[Tensor, ...]]] = {
    "pictures": (
        lambda m, a, b: halves(in_patches(m.patch, torch.cat([a, b]))),
        lambda m, a, b: torch.cat([in_patches(m.patch, a), in_patches(m.patch, b)], 1),
        (pictures(3), pictures(5)),
    ),
    "pictures, stacked": (
        lambda m, a, b: halves(in_patches(m.patch, torch.stack([a, b]).flatten(0, 1))),
        lambda m, a, b: torch.cat([in_patches(m.patch, a), in_patches(m.patch, b)], 1),
        (pictures(3), pictures(5)),
    ),
    "features": (
        lambda m, a, b: halves(m.project(torch.cat([a, b]))),
        lambda m, a, b: torch.cat([m.project(a), m.project(b)], 1),
        (features(), features(5)),
    ),
    "ids": (
        lambda m, a, b: halves(m.table(torch.cat([a, b]))),
        lambda m, a, b: torch.cat([m.table(a), m.table(b)], 1),
        (ids(), ids(5)),
    ),
}


@pytest.mark.parametrize("name", ALONG_THE_BATCH)
def test_inputs_joined_along_the_batch(name: str) -> None:
    """Both are made tokens at once, and are sequences of one example after it."""
    at_once, apart, inputs = ALONG_THE_BATCH[name]
    found, expected = (
        explain(Reader(join, read=0), inputs, return_input_shape=True) for join in (at_once, apart)
    )
    for mine, other in zip(found, expected, strict=True):
        assert_same(mine, other, TOLERANCE)


def test_two_dates_that_are_subtracted() -> None:
    """Siamese: both dates go through the encoder at once, and their scores are subtracted.

    The rows that the score reads are then two of one stream, each with half of the weight.
    """
    model = Reader(lambda m, x: in_patches(m.patch, x))
    before, after = pictures(3), pictures(5)

    def at_once(a: Tensor, b: Tensor) -> Tensor:
        first, second = model(torch.cat([a, b])).chunk(2)
        return first - second

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return model(a) - model(b)

    found, expected = (explain(join, (before, after)) for join in (at_once, apart))
    for mine, other in zip(found, expected, strict=True):  # one stream, of which two rows are read
        assert_same(2 * mine.flatten(1)[:, :-1], other.flatten(1)[:, :-1], TOLERANCE)
