"""Tokens that are merged or pooled between attention calls hand relevance on in equal shares.

Every case is a small encoder with one step between its two blocks, compared with a slow twin: a
matrix `P` of equal shares, `R = P R` at the merge, and `R - P` read out.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.adversarial import FORMS, Walker, maps
from torch import Tensor, nn
from zoo.encoder import BATCH, TOKENS, WIDTH, SelfAttention, features
from zoo.laws import assert_same

from captum_generic_attn import GenericAttention

both_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def shares(rows: list[list[int]], tokens: int = TOKENS) -> Tensor:
    """P: row i has equal shares of the tokens in `rows[i]`."""
    matrix = torch.zeros(len(rows), tokens, dtype=torch.float64)
    for i, parents in enumerate(rows):
        matrix[i, parents] = 1 / len(parents)
    return matrix


def pairs(x: Tensor) -> Tensor:
    return (x[:, ::2] + x[:, 1::2]) / 2


def mean_first(x: Tensor) -> Tensor:
    return torch.cat([x.mean(dim=1, keepdim=True), x[:, 1:]], dim=1)


def mean_in_front(x: Tensor) -> Tensor:
    return torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)


def max_pooled(x: Tensor) -> Tensor:
    return F.max_pool1d(x.mT, 2).mT


def max_pooled_apart(x: Tensor) -> Tensor:
    return F.max_pool1d(x.mT, 2, stride=2, dilation=2).mT


def overlapping(x: Tensor) -> Tensor:
    return F.avg_pool1d(x.mT, 3, stride=2, padding=1).mT


def adaptive(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool1d(x.mT, 4).mT


def strided(x: Tensor) -> Tensor:
    return x[:, ::2]


def stretched(x: Tensor) -> Tensor:
    return F.interpolate(x.mT, size=2 * TOKENS, mode="linear").mT


_EVEN, _ALL = range(0, TOKENS, 2), list(range(TOKENS))
STEPS: dict[str, tuple[Callable[[Tensor], Tensor], list[list[int]]]] = {
    "neighbours are averaged": (pairs, [[i, i + 1] for i in _EVEN]),
    "the mean replaces the first": (mean_first, [_ALL, *([i] for i in range(1, TOKENS))]),
    "the mean stands in front": (mean_in_front, [_ALL, *([i] for i in range(TOKENS))]),
    "max pooling": (max_pooled, [[i, i + 1] for i in _EVEN]),
    "max pooling of every second": (max_pooled_apart, [[0, 2], [2, 4]]),
    "overlapping windows": (
        overlapping, [[j for j in (i - 1, i, i + 1) if 0 <= j < TOKENS] for i in _EVEN]
    ),
    "adaptive pooling": (adaptive, [[0, 1], [1, 2], [3, 4], [4, 5]]),
    "every second is kept": (strided, [[i] for i in _EVEN]),
    "stretched": (stretched, [[i // 2] for i in range(2 * TOKENS)]),
}  # fmt: skip


@both_forms
@pytest.mark.parametrize("name", STEPS)
def test_a_step_between_two_blocks(name: str, form) -> None:
    step, parents = STEPS[name]

    def walk(model: Walker, x: Tensor) -> Tensor:
        first, second = model.blocks
        return model.finish(second(step(first(model.start(x)))))

    model, inputs = Walker(walk, form), features()
    first, second = maps(model, [inputs])
    P = shares(parents)
    before = torch.eye(TOKENS, dtype=torch.float64) + first
    after = P @ before + second @ (P @ before)
    expected = (after - P)[:, 0]
    if (
        len(parents[0]) == 1 and name != "stretched"
    ):  # the explained token is one of the input's: its own entry is 0
        expected[:, parents[0][0]] = 0
    method = GenericAttention(model)
    assert_same(method.attribute(inputs, 1, return_input_shape=False), expected)
    keeping = GenericAttention(model, own="keep")
    assert_same(keeping.attribute(inputs, 1, return_input_shape=False), (after - P)[:, 0])
    relevance = method.relevance(inputs, 1)
    (stream,) = relevance.streams.values()
    merged = [i for i, row in enumerate(parents) if len(row) > 1 or name == "stretched"]
    assert stream.tokens == TOKENS + len(merged)
    matrix = relevance.matrix("input0", "input0")
    if merged:
        assert_same(matrix[:, TOKENS:, :TOKENS], after[:, merged])
    assert not matrix[:, :, TOKENS:].any()


@both_forms
def test_an_input_s_map_of_a_model_that_merges(form) -> None:
    """Mean pooling at the end explains all merged tokens alike; the map is on the finest grid."""

    def walk(model: Walker, x: Tensor) -> Tensor:
        first, second = model.blocks
        return model.head(second(pairs(first(model.start(x)))).mean(1))

    model, inputs = Walker(walk, form), features()
    first, second = maps(model, [inputs])
    P = shares([[i, i + 1] for i in _EVEN])
    before = torch.eye(TOKENS, dtype=torch.float64) + first
    after = P @ before + second @ (P @ before)
    expected = (after - P).mean(1)
    ours = GenericAttention(model).attribute(inputs, 1)
    assert ours.shape == inputs.shape
    for feature in ours.unbind(-1):
        assert_same(feature, expected)


@both_forms
def test_streams_with_histories_of_their_own_are_added_in_equal_shares(form) -> None:
    def walk(model: Walker, one: Tensor, other: Tensor) -> Tensor:
        first, second, third = model.blocks
        return model.finish(third(first(model.start(one)) + second(model.start(other.flip(-1)))))

    model = Walker(walk, form, depth=3)
    inputs = features(3), features(4)
    first, second, third = maps(model, inputs)
    eye = torch.eye(TOKENS, dtype=torch.float64)
    P = torch.cat([eye, eye], 1) / 2
    before = torch.zeros(BATCH, 2 * TOKENS, 2 * TOKENS, dtype=torch.float64)
    before[:, :TOKENS, :TOKENS], before[:, TOKENS:, TOKENS:] = eye + first, eye + second
    merged = P @ before
    expected = (merged + third @ merged - P)[:, 0]
    one, other = GenericAttention(model).attribute(inputs, 1, return_input_shape=False)
    assert_same(one, expected[:, :TOKENS])
    assert_same(other, expected[:, TOKENS:])


class Reduced(nn.Module):
    """Every token attends to pooled ones, as in a pyramid vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.reduce = nn.Conv1d(WIDTH, WIDTH, 2, stride=2)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        few = self.reduce(x.mT).mT
        attention = (self.query(x) @ self.key(few).mT / WIDTH**0.5).softmax(-1)
        self.kept.append(attention)
        return x + attention @ few


def test_all_tokens_attend_to_pooled_ones() -> None:
    """Self-attention, `Ā P R`: the pooled keys are made of the very tokens that ask."""
    model = Walker(
        lambda m, x: m.finish(m.second(m.first(m.start(x)))), first=Reduced(), second=Reduced()
    )
    inputs = features()
    ours = GenericAttention(model).attribute(inputs, 1, return_input_shape=False)
    relevance = GenericAttention(model).relevance(inputs, 1)
    for layer in (model.first, model.second):
        layer.kept.clear()
    score = model(inputs)[:, 1].sum()
    attentions = [model.first.kept[0], model.second.kept[0]]
    gradients = torch.autograd.grad(score, attentions)
    P = shares([[i, i + 1] for i in _EVEN])
    R = torch.eye(TOKENS, dtype=torch.float64).expand(BATCH, -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        R = R + (attention * gradient).clamp(min=0) @ P @ R
    expected = R[:, 0].clone()
    expected[:, 0] = 0
    assert_same(ours, expected.detach())
    (stream,) = relevance.streams.values()
    assert stream.tokens == TOKENS + TOKENS // 2, "both layers pool the same tokens"
    assert [call.query_stream == call.key_stream for call in relevance.calls] == [True, True]


class Across(SelfAttention):
    """Queries of one sequence, keys and values of another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            projection(tokens).unflatten(-1, (-1, WIDTH // 2)).transpose(1, 2)
            for projection, tokens in ((self.query, x), (self.key, y), (self.value, y))
        )
        return x + self.out(self.form(q, k, v).transpose(1, 2).flatten(2))


@both_forms
@pytest.mark.parametrize("self_in_cross", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("asked", ["all", "pairs"])
def test_pooled_tokens_ask_another_stream(
    asked: str, normalize: bool, self_in_cross: bool, form
) -> None:
    """Eq. 10 over the tokens that ask: what one of them learnt of a token before the pooling goes
    to those that were pooled from that token, in proportion to their shares of it. The keys, which
    may be pooled as well, have learnt the mean of what theirs had.
    """

    def walk(model: Walker, one: Tensor, other: Tensor) -> Tensor:
        first, second, aside = model.blocks
        pooled = second(overlapping(first(model.start(one))))
        keys = aside(model.start(other.flip(-1)))
        return model.finish(model.across(pooled, pairs(keys) if asked == "pairs" else keys))

    model = Walker(walk, form, depth=3, across=Across(form))
    inputs = features(3), features(4)
    first, second, aside, across = maps(model, inputs)
    P = shares(STEPS["overlapping windows"][1])
    assert P.sum(0).unique().numel() > 1, "no token in two windows: columns are shared alike"
    learnt = P @ first + second @ (P + P @ first)
    own = learnt @ (P / P.sum(0)).mT
    assert_same(own.sum(-1), learnt.sum(-1))
    Q = shares([[i, i + 1] for i in _EVEN] if asked == "pairs" else [[i] for i in range(TOKENS)])
    keys = Q @ aside
    if normalize:  # eq. 8 and 9
        own, keys = own / own.sum(-1, keepdim=True), keys / keys.sum(-1, keepdim=True)
    R = across @ Q
    if self_in_cross:
        R = (torch.eye(len(P)) + own).mT @ across @ (Q + keys)
    method = GenericAttention(model, normalize=normalize, self_in_cross=self_in_cross)
    relevance = method.relevance(inputs, 1)
    assert_same(relevance.matrix("input0", "input1")[:, TOKENS:, :TOKENS], R)
    assert_same(relevance.matrix("input0", "input0")[:, TOKENS:, :TOKENS], P + learnt)
    one, other = method.attribute(inputs, 1, return_input_shape=False)
    assert_same(one, learnt[:, 0])
    assert_same(other, R[:, 0])


def test_equal_shares_conserve_what_a_merged_token_got() -> None:
    """The rows of what merged tokens start from sum to 1."""

    def walk(model: Walker, x: Tensor) -> Tensor:
        first, second, third = model.blocks
        return model.finish(third(overlapping(second(pairs(first(model.start(x)))))))

    model = Walker(walk, depth=3)
    with torch.no_grad():
        model.head.weight.zero_()  # no call adds anything
    with pytest.warns(UserWarning, match="no gradient"):
        relevance = GenericAttention(model).relevance(features(), 1)
    matrix = relevance.matrix("input0", "input0")
    assert matrix.shape[1] == TOKENS + 3 + 2
    torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:2], dtype=torch.float64))
