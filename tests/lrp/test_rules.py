"""Each relevance rule against a twin: loops over single numbers, straight from the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.lrp import RULE_SETS, RuleSet, rule_sets
from captum_generic_attn.lrp.rule_sets import rule_set
from captum_generic_attn.lrp.rules import (
    STABILISER,
    AlphaBeta,
    Balanced,
    Conserved,
    Epsilon,
    Examples,
    Gamma,
    Halved,
    Proportional,
    Step,
    ZBox,
    first_axis,
    per_unit,
    shares,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def of_weight(rule, x: Tensor, weight: Tensor, result: Tensor, relevance: Tensor) -> Tensor:
    return rule(Step(linear, result, relevance, first_axis(x)), x, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def unit(relevance: float, z: float, stabiliser: float) -> float:
    return 0.0 if z == 0 else relevance / (z + stabiliser)


def twin_of(parts, x: Tensor, weight: Tensor, relevance: Tensor, stabiliser: float) -> Tensor:
    """`Σ_j x_i w_ij R_j / z_j`, with `parts(x_i, w_ij)` the part that counts."""
    found = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for j in range(weight.shape[0]):
            z = sum(parts(x[b, i].item(), weight[j, i].item()) for i in range(x.shape[1]))
            for i in range(x.shape[1]):
                part = parts(x[b, i].item(), weight[j, i].item())
                found[b, i] += part * unit(relevance[b, j].item(), z, stabiliser)
    return found


def both_positive(x: float, w: float) -> float:
    return x * w if x > 0 and w > 0 else 0.0


def both_negative(x: float, w: float) -> float:
    return x * w if x < 0 and w < 0 else 0.0


def speaks_for(x: float, w: float) -> float:
    return max(x * w, 0.0)


def speaks_against(x: float, w: float) -> float:
    return min(x * w, 0.0)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_alpha_beta_joint(shape, seed) -> None:
    batch, features, out = shape
    x, weight, relevance = drawn(seed, (batch, features), (out, features), (batch, out))
    ours = of_weight(AlphaBeta(alpha=2, beta=1), x, weight, linear(x, weight), relevance)
    theirs = 2 * twin_of(speaks_for, x, weight, relevance, STABILISER) - twin_of(
        speaks_against, x, weight, relevance, STABILISER
    )
    torch.testing.assert_close(ours, theirs, **CLOSE)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_alpha_beta_with_a_divisor_for_each_part(shape, seed) -> None:
    batch, features, out = shape
    x, weight, relevance = drawn(seed, (batch, features), (out, features), (batch, out))
    ours = of_weight(AlphaBeta(joint=False), x, weight, linear(x, weight), relevance)
    theirs = twin_of(both_positive, x, weight, relevance, STABILISER) + twin_of(
        both_negative, x, weight, relevance, STABILISER
    )
    torch.testing.assert_close(ours, theirs, **CLOSE)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000), st.booleans())
def test_epsilon(shape, seed, bias) -> None:
    batch, features, out = shape
    x, weight, relevance, shift = drawn(
        seed, (batch, features), (out, features), (batch, out), (out,)
    )
    epsilon = 0.25
    result = linear(x, weight) + shift
    ours = of_weight(Epsilon(epsilon, bias=bias), x, weight, result, relevance)
    theirs = torch.zeros_like(x)
    for b in range(batch):
        for j in range(out):
            z = (result[b, j] if bias else result[b, j] - shift[j]).item()
            z += epsilon * (1 if z > 0 else -1)
            for i in range(features):
                theirs[b, i] += x[b, i] * weight[j, i] * relevance[b, j] / z
    torch.testing.assert_close(ours, theirs, **CLOSE)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_gamma_of_positive_operands(shape, seed) -> None:
    """`x_i (w_ij + γ w_ij⁺) R_j / Σ_i`, as the overview has it, where the result is positive."""
    batch, features, out = shape
    x, weight, relevance = drawn(seed, (batch, features), (out, features), (batch, out))
    x = x.abs()
    relevance = relevance * (linear(x, weight) > 0)
    ours = of_weight(Gamma(0.5, epsilon=0.0), x, weight, linear(x, weight), relevance)
    theirs = twin_of(lambda a, w: a * (w + 0.5 * max(w, 0.0)), x, weight, relevance, 0.0)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_gamma_conserves_and_mirrors(shape, seed) -> None:
    batch, features, out = shape
    x, weight, relevance = drawn(seed, (batch, features), (out, features), (batch, out))
    rule = Gamma(0.5, epsilon=0.0)
    ours = of_weight(rule, x, weight, linear(x, weight), relevance)
    torch.testing.assert_close(ours.sum(1), relevance.sum(1), rtol=1e-8, atol=1e-8)
    mirrored = of_weight(rule, -x, weight, linear(-x, weight), relevance)
    torch.testing.assert_close(ours, mirrored, **CLOSE)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_box(shape, seed) -> None:
    batch, features, out = shape
    x, weight, relevance = drawn(seed, (batch, features), (out, features), (batch, out))
    ours = of_weight(ZBox(), x, weight, linear(x, weight), relevance)
    theirs = torch.zeros_like(x)
    for b in range(batch):
        low, high = x[b].min(), x[b].max()
        for j in range(out):
            parts = [
                x[b, i] * weight[j, i]
                - low * weight[j, i].clamp(min=0)
                - high * weight[j, i].clamp(max=0)
                for i in range(features)
            ]
            for i, part in enumerate(parts):
                theirs[b, i] += part * relevance[b, j] / (sum(parts) + STABILISER)
    # With one feature x is its own least and greatest: rounding is divided by the stabiliser.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_conserved(shape, seed) -> None:
    batch, features, out = shape
    x, weight, relevance = drawn(seed, (batch, features), (out, features), (batch, out))
    plain = of_weight(AlphaBeta(), x, weight, linear(x, weight), relevance)
    ours = of_weight(Conserved(AlphaBeta()), x, weight, linear(x, weight), relevance)
    for b in range(batch):
        if plain[b].sum() != 0:
            expected = plain[b] * relevance[b].sum() / plain[b].sum()
            torch.testing.assert_close(ours[b], expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_product_is_halved(shape, seed) -> None:
    rows, inner, columns = shape
    a, b, relevance = drawn(seed, (rows, inner), (inner, columns), (rows, columns))
    result = a @ b
    of_a, of_b = Halved()(Step(torch.matmul, result, relevance), [a, b])
    expected_a, expected_b = torch.zeros_like(a), torch.zeros_like(b)
    for m in range(rows):
        for n in range(columns):
            s = unit(relevance[m, n].item(), result[m, n].item(), STABILISER)
            for k in range(inner):
                expected_a[m, k] += a[m, k] * b[k, n] * s / 2
                expected_b[k, n] += a[m, k] * b[k, n] * s / 2
    torch.testing.assert_close(of_a, expected_a, **CLOSE)
    torch.testing.assert_close(of_b, expected_b, **CLOSE)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000), st.booleans())
def test_addition(shape, seed, broadcast) -> None:
    a, b, relevance = drawn(seed, shape, (1, *shape[1:]) if broadcast else shape, shape)
    of_a, of_b = Proportional()(Step(torch.add, a + b, relevance), [a, b])
    unit_of = relevance / (a + b + STABILISER)
    torch.testing.assert_close(of_a, a * unit_of, **CLOSE)
    torch.testing.assert_close(of_b, (b * unit_of).sum_to_size(b.shape), **CLOSE)


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 1000))
def test_balanced_addition(shape, seed) -> None:
    a, b, relevance = drawn(seed, shape, shape, shape)
    found = Balanced()(Step(torch.add, a + b, relevance, first_axis(a)), [a, b])
    for e in range(shape[0]):
        z = a[e] + b[e] + STABILISER
        parts = a[e] * relevance[e] / z, b[e] * relevance[e] / z
        whole = sum(part.sum().abs() for part in parts) + STABILISER
        for ours, part in zip(found, parts, strict=True):
            fraction = part.sum().abs() / whole * relevance[e].sum()
            expected = part * fraction / (part.sum() + STABILISER)
            torch.testing.assert_close(ours[e], expected, rtol=1e-8, atol=1e-10)


def test_balanced_addition_keeps_the_sum() -> None:
    a, b, relevance = drawn(3, (2, 5), (2, 5), (2, 5))
    found = Balanced()(Step(torch.add, a + b, relevance, first_axis(a)), [a, b])
    total = found[0].sum(1) + found[1].sum(1)
    torch.testing.assert_close(total, relevance.sum(1), rtol=1e-6, atol=1e-6)


def test_sums_over_examples_wherever_they_stand() -> None:
    (tensor,) = drawn(1, (3, 4, 2))
    owner = torch.tensor([0, 1, 0, 1])
    found = Examples(-2, owner).sums(tensor)
    assert found.shape == (1, 4, 1)
    for place in range(4):
        expected = tensor[:, owner == owner[place]].sum()
        torch.testing.assert_close(found[0, place, 0], expected)
    assert torch.equal(Examples().sums(tensor), tensor.sum())
    with pytest.raises(
        ValueError, match=r"which example each element of a tensor \(3, 4, 2\) belongs"
    ):
        Examples(known=False).sums(tensor)


def test_nothing_is_divided_by_zero() -> None:
    zero = torch.zeros(3)
    assert per_unit(torch.ones(3), zero).tolist() == [0, 0, 0]
    assert per_unit(torch.ones(1), torch.tensor([-STABILISER], dtype=torch.float32)).isfinite()


def test_shares_of_a_linear_operation_sum_to_its_result() -> None:
    x, weight = drawn(5, (2, 3), (4, 3))
    (found,) = shares(lambda t: linear(t, weight), [x], torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(found.sum(1), linear(x, weight).sum(1))


# -- the tables ------------------------------------------------------------------------------------


def test_rule_sets_are_data() -> None:
    for name, rules in RULE_SETS.items():
        assert rule_set(name) is rules
        assert rule_set(rules) is rules
        assert eval(repr(rules), vars(rule_sets)) == rules  # noqa: S307 - our own words
    changed = replace(RULE_SETS["chefer2021"], inert=True)
    assert isinstance(changed, RuleSet)
    assert changed != RULE_SETS["chefer2021"]


def test_wrong_rule_sets_are_named() -> None:
    with pytest.raises(ValueError, match="rules='theirs' is none of chefer2021_full, "):
        rule_set("theirs")
    with pytest.raises(TypeError, match="rules= takes a name or a RuleSet, not int"):
        rule_set(3)
