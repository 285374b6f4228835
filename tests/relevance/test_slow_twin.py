"""Each equation against a twin in plain loops, straight from the paper, over drawn shapes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.relevance.equations import average_heads, self_attention_update

TOLERANCE = dict(rtol=1e-12, atol=1e-12)
SIZES = st.integers(min_value=1, max_value=5)
SEEDS = st.integers(min_value=0, max_value=2**31)


def draw(*shape: int, seed: int) -> Tensor:
    """Values of both signs, some of them exactly zero, as masked attention has them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return values * (torch.rand(shape, generator=generator) > 0.2)


def average_heads_in_loops(attention: Tensor, gradient: Tensor) -> Tensor:
    """Eq. 5: Ā_mn = (1/H) Σ_h max(0, ∇A_hmn A_hmn), one number at a time."""
    batch, heads, queries, keys = attention.shape
    result = torch.zeros(batch, queries, keys, dtype=torch.float64)
    for b in range(batch):
        for m in range(queries):
            for n in range(keys):
                total = 0.0
                for h in range(heads):
                    total += max(0.0, (gradient[b, h, m, n] * attention[b, h, m, n]).item())
                result[b, m, n] = total / heads
    return result


def update_in_loops(attention_map: Tensor, relevance: Tensor) -> Tensor:
    """The addition of eq. 6 and 7: (Ā R)_mn = Σ_k Ā_mk R_kn, one number at a time."""
    batch, queries, keys = attention_map.shape
    columns = relevance.shape[-1]
    result = torch.zeros(batch, queries, columns, dtype=torch.float64)
    for b in range(batch):
        for m in range(queries):
            for n in range(columns):
                total = 0.0
                for k in range(keys):
                    total += (attention_map[b, m, k] * relevance[b, k, n]).item()
                result[b, m, n] = total
    return result


@given(batch=SIZES, heads=SIZES, queries=SIZES, keys=SIZES, seed=SEEDS)
@settings(deadline=None, max_examples=40)
def test_average_heads(batch: int, heads: int, queries: int, keys: int, seed: int) -> None:
    attention = draw(batch, heads, queries, keys, seed=seed).abs()
    gradient = draw(batch, heads, queries, keys, seed=seed + 1)
    actual = average_heads(attention, gradient)
    torch.testing.assert_close(actual, average_heads_in_loops(attention, gradient), **TOLERANCE)


@given(batch=SIZES, heads=SIZES, queries=SIZES, keys=SIZES, seed=SEEDS)
@settings(deadline=None, max_examples=40)
def test_average_heads_of_mixed_probabilities(
    batch: int, heads: int, queries: int, keys: int, seed: int
) -> None:
    """Talking heads make negative "probabilities"; two negatives count as evidence as well."""
    attention = draw(batch, heads, queries, keys, seed=seed)
    gradient = draw(batch, heads, queries, keys, seed=seed + 1)
    actual = average_heads(attention, gradient)
    torch.testing.assert_close(actual, average_heads_in_loops(attention, gradient), **TOLERANCE)


@given(batch=SIZES, queries=SIZES, keys=SIZES, columns=SIZES, seed=SEEDS)
@settings(deadline=None, max_examples=40)
def test_self_attention_update(
    batch: int, queries: int, keys: int, columns: int, seed: int
) -> None:
    attention_map = draw(batch, queries, keys, seed=seed)
    relevance = draw(batch, keys, columns, seed=seed + 1)
    actual = self_attention_update(attention_map, relevance)
    torch.testing.assert_close(actual, update_in_loops(attention_map, relevance), **TOLERANCE)


@given(batch=SIZES, heads=SIZES, tokens=SIZES, layers=SIZES, seed=SEEDS)
@settings(deadline=None, max_examples=20)
def test_relevance_of_a_whole_model(
    batch: int, heads: int, tokens: int, layers: int, seed: int
) -> None:
    """R = I, then R += Ā R for every layer; in loops and by the rules."""
    slow = torch.eye(tokens, dtype=torch.float64).repeat(batch, 1, 1)
    fast = slow.clone()
    for layer in range(layers):
        attention = draw(batch, heads, tokens, tokens, seed=seed + 2 * layer).abs()
        gradient = draw(batch, heads, tokens, tokens, seed=seed + 2 * layer + 1)
        slow = slow + update_in_loops(average_heads_in_loops(attention, gradient), slow)
        fast = fast + self_attention_update(average_heads(attention, gradient), fast)
    # The greatest entries grow with every layer: relative to them.
    scale = max(1.0, slow.abs().max().item())
    torch.testing.assert_close(fast / scale, slow / scale, **TOLERANCE)
