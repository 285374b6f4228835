"""Laws of the equations: of the pure functions, and of the explanations that rest on them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import encoder, laws
from zoo.encoder import BATCH, HEAD_WIDTH, HEADS, TOKENS, Encoder

from captum_generic_attn import GenericAttention
from captum_generic_attn.relevance.equations import average_heads, self_attention_update

EXACT = dict(rtol=0, atol=1e-12)
SIZES = st.integers(min_value=1, max_value=5)
SEEDS = st.integers(min_value=0, max_value=2**31)
LAWS = settings(deadline=None, max_examples=30)


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def probabilities(*shape: int, seed: int) -> Tensor:
    return draw(*shape, seed=seed).softmax(dim=-1)


def relevance_of(attentions: list[Tensor], gradients: list[Tensor]) -> Tensor:
    batch, _, tokens, _ = attentions[0].shape
    relevance = torch.eye(tokens, dtype=torch.float64).repeat(batch, 1, 1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + self_attention_update(average_heads(attention, gradient), relevance)
    return relevance


# --- laws of the pure functions ---------------------------------------------------------------


@given(batch=SIZES, heads=SIZES, tokens=SIZES, seed=SEEDS)
@LAWS
def test_order_of_heads_does_not_matter(batch: int, heads: int, tokens: int, seed: int) -> None:
    attention = probabilities(batch, heads, tokens, tokens, seed=seed)
    gradient = draw(batch, heads, tokens, tokens, seed=seed + 1)
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
    expected = average_heads(attention, gradient)
    torch.testing.assert_close(
        average_heads(attention[:, order], gradient[:, order]), expected, **EXACT
    )


@given(batch=SIZES, heads=SIZES, tokens=SIZES, seed=SEEDS)
@LAWS
def test_examples_do_not_mix(batch: int, heads: int, tokens: int, seed: int) -> None:
    attention = probabilities(batch, heads, tokens, tokens, seed=seed)
    gradient = draw(batch, heads, tokens, tokens, seed=seed + 1)
    whole = average_heads(attention, gradient)
    updated = self_attention_update(whole, whole)
    for i in range(batch):
        alone = average_heads(attention[i : i + 1], gradient[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], **EXACT)
        torch.testing.assert_close(self_attention_update(alone, alone), updated[i : i + 1], **EXACT)


@given(heads=SIZES, tokens=SIZES, factor=st.floats(0.1, 10), seed=SEEDS)
@LAWS
def test_map_is_proportional_to_the_score(
    heads: int, tokens: int, factor: float, seed: int
) -> None:
    attention = probabilities(2, heads, tokens, tokens, seed=seed)
    gradient = draw(2, heads, tokens, tokens, seed=seed + 1)
    torch.testing.assert_close(
        average_heads(attention, gradient * factor),
        average_heads(attention, gradient) * factor,
        rtol=1e-12,
        atol=1e-12,
    )


@given(heads=SIZES, tokens=SIZES, seed=SEEDS)
@LAWS
def test_map_is_never_negative_and_negative_evidence_is_dropped_before_the_mean(
    heads: int, tokens: int, seed: int
) -> None:
    attention = probabilities(2, heads, tokens, tokens, seed=seed)
    gradient = draw(2, heads, tokens, tokens, seed=seed + 1)
    result = average_heads(attention, gradient)
    assert (result >= 0).all()
    assert not average_heads(attention, -gradient.abs()).any()
    # One head against, one for: the mean of the two would cancel, the rule keeps half.
    both = average_heads(torch.cat([attention] * 2, 1), torch.cat([gradient, -gradient], 1))
    torch.testing.assert_close(both, (attention * gradient.abs()).mean(1) / 2, **EXACT)


@given(layers=SIZES, heads=SIZES, tokens=SIZES, seed=SEEDS)
@LAWS
def test_relevance_never_falls_below_the_identity(
    layers: int, heads: int, tokens: int, seed: int
) -> None:
    attentions = [probabilities(2, heads, tokens, tokens, seed=seed + 2 * i) for i in range(layers)]
    gradients = [draw(2, heads, tokens, tokens, seed=seed + 2 * i + 1) for i in range(layers)]
    change = relevance_of(attentions, gradients) - torch.eye(tokens, dtype=torch.float64)
    assert (change >= 0).all()


@given(layers=SIZES, heads=SIZES, tokens=SIZES, seed=SEEDS)
@LAWS
def test_causal_attention_keeps_relevance_lower_triangular(
    layers: int, heads: int, tokens: int, seed: int
) -> None:
    blocked = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    attentions = [
        draw(2, heads, tokens, tokens, seed=seed + 2 * i)
        .masked_fill(blocked, -math.inf)
        .softmax(-1)
        for i in range(layers)
    ]
    gradients = [draw(2, heads, tokens, tokens, seed=seed + 2 * i + 1) for i in range(layers)]
    relevance = relevance_of(attentions, gradients)
    assert torch.equal(relevance, relevance.tril())


@given(layers=SIZES, heads=SIZES, tokens=st.integers(2, 5), seed=SEEDS)
@LAWS
def test_order_of_tokens_does_not_matter(layers: int, heads: int, tokens: int, seed: int) -> None:
    attentions = [probabilities(2, heads, tokens, tokens, seed=seed + 2 * i) for i in range(layers)]
    gradients = [draw(2, heads, tokens, tokens, seed=seed + 2 * i + 1) for i in range(layers)]
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    moved = relevance_of(
        [one[..., order, :][..., order] for one in attentions],
        [one[..., order, :][..., order] for one in gradients],
    )
    expected = relevance_of(attentions, gradients)[:, order][..., order]
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)


def test_row_without_probabilities_adds_nothing() -> None:
    attention = probabilities(1, 2, 4, 4, seed=0)
    attention[..., 2, :] = 0
    gradient = draw(1, 2, 4, 4, seed=1)
    averaged = average_heads(attention, gradient)
    assert not averaged[:, 2].any()
    relevance = torch.eye(4, dtype=torch.float64)[None]
    updated = relevance + self_attention_update(averaged, relevance)
    assert torch.equal(updated[:, 2], relevance[:, 2])


def test_leading_axes_are_free() -> None:
    """`[..., H, Nq, Nk]`: several targets of one forward are one more axis in front."""
    attention = probabilities(3, 2, 4, 5, 6, seed=0)
    gradient = draw(3, 2, 4, 5, 6, seed=1)
    result = average_heads(attention, gradient)
    assert result.shape == (3, 2, 5, 6)
    for i in range(3):
        torch.testing.assert_close(result[i], average_heads(attention[i], gradient[i]), **EXACT)
    relevance = draw(3, 2, 6, 6, seed=2)
    updated = self_attention_update(result, relevance)
    assert updated.shape == (3, 2, 5, 6)
    for i in range(3):
        torch.testing.assert_close(
            updated[i], self_attention_update(result[i], relevance[i]), **EXACT
        )


def test_inputs_are_not_changed() -> None:
    attention, gradient = probabilities(1, 2, 3, 3, seed=0), draw(1, 2, 3, 3, seed=1)
    relevance = torch.eye(3, dtype=torch.float64)[None]
    before = [tensor.clone() for tensor in (attention, gradient, relevance)]
    self_attention_update(average_heads(attention, gradient), relevance)
    for tensor, old in zip((attention, gradient, relevance), before, strict=True):
        assert torch.equal(tensor, old)


# --- laws of whole explanations ---------------------------------------------------------------


def fused(**options: object) -> encoder.Form:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def matrix(model: Encoder, inputs: Tensor, target: int = 1) -> Tensor:
    return GenericAttention(model).relevance(inputs, target).matrix("x", "x")


@pytest.mark.parametrize("read", [0, "mean"])
def test_matrix_is_at_least_the_identity(read: int | str) -> None:
    relevance = matrix(Encoder(fused(), depth=3, read=read), encoder.features())
    change = relevance - torch.eye(TOKENS, dtype=relevance.dtype)
    assert change.min() >= 0
    assert change.max() > 1e-3


def test_matrix_of_a_causal_model_is_lower_triangular() -> None:
    relevance = matrix(Encoder(fused(is_causal=True), depth=3, read=-1), encoder.features())
    assert torch.equal(relevance, relevance.tril())
    assert relevance[:, -1, :-1].min() > 0 or relevance[:, -1, :-1].max() > 1e-3


def test_row_that_may_look_nowhere_keeps_the_identity() -> None:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[3] = False
    relevance = matrix(Encoder(fused(attn_mask=mask), depth=3), encoder.features())
    assert torch.isfinite(relevance).all()
    identity = torch.eye(TOKENS, dtype=relevance.dtype)
    assert torch.equal(relevance[:, 3], identity[3].expand(BATCH, -1))
    assert not torch.equal(relevance[:, 0], identity[0].expand(BATCH, -1))


def test_key_that_nobody_may_look_at_gets_nothing() -> None:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[:, 4] = False
    model = Encoder(fused(attn_mask=mask), depth=3)
    values = GenericAttention(model).attribute(encoder.features(), 1, return_input_shape=False)
    assert not values[:, 4].any()
    assert values.any()


def test_order_of_heads_in_the_weights_does_not_matter() -> None:
    model = Encoder(fused(), depth=2)
    expected = matrix(model, encoder.features())
    order = torch.arange(HEADS * HEAD_WIDTH).view(HEADS, HEAD_WIDTH).flip(0).flatten()
    for block in model.blocks:
        attention = block.attention
        for projection in (attention.query, attention.key, attention.value):
            projection.weight.data = projection.weight.data[order]
            projection.bias.data = projection.bias.data[order]
        attention.out.weight.data = attention.out.weight.data[:, order]
    laws.assert_same(matrix(model, encoder.features()), expected, 1e-12)


@pytest.mark.parametrize("read", [0, "mean"])
def test_batch_is_its_examples(read: int | str) -> None:
    method = GenericAttention(Encoder(fused(), depth=3, read=read))
    together = method.attribute(encoder.features(), torch.tensor([1, 2]))
    for i, target in enumerate((1, 2)):
        alone = method.attribute(encoder.features()[i : i + 1], target)
        laws.assert_same(together[i : i + 1], alone, 1e-12)


def test_explanation_is_proportional_to_the_score_with_one_layer() -> None:
    model, inputs = Encoder(fused(), depth=1), encoder.features()
    once = GenericAttention(model).attribute(inputs, 1)
    laws.assert_same(GenericAttention(lambda x: 3 * model(x)).attribute(inputs, 1), 3 * once, 1e-12)


def test_explanation_does_not_see_a_constant_added_to_the_score() -> None:
    model, inputs = Encoder(fused(), depth=2), encoder.features()
    once = GenericAttention(model).attribute(inputs, 1)
    laws.assert_same(GenericAttention(lambda x: model(x) + 7).attribute(inputs, 1), once, 1e-12)
