"""Records: probabilities and gradients of the fused kernel, and their grouping into heads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from captum_generic_attn.capture.record import (
    AttentionRecord,
    Explicit,
    Fused,
    Operands,
    OverwrittenError,
)

B, H, NQ, NK, D = 2, 4, 3, 5, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def operands(queries: int = NQ, keys: int = NK, groups: int = H) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(B, H, queries, D, seed=1).requires_grad_(),
        draw(B, groups, keys, D, seed=2).requires_grad_(),
        draw(B, groups, keys, D + 1, seed=3).requires_grad_(),
    )


def fused(
    *tensors: Tensor | None, causal: bool = False, scale: float | None = None, grouped: bool = False
) -> Fused:
    """A call of the kernel with query, key, value and perhaps a mask."""
    given = [t for t in tensors if t is not None]
    return Fused(Operands.of(*given, copies=False), causal, scale, grouped)


def explicit(tensor: Tensor, *order: int, single_query: bool = False) -> Explicit:
    return Explicit(Operands.of(tensor, copies=False), order, single_query)


def softmax_in_loops(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """P one number at a time; `mask` is additive, of the shape of P."""
    result = torch.zeros(B, H, query.shape[-2], key.shape[-2], dtype=torch.float64)
    for b, h in [(b, h) for b in range(B) for h in range(H)]:
        group = h // (H // key.shape[1])
        for i in range(query.shape[-2]):
            logits = []
            for j in range(key.shape[-2]):
                products = [float(query[b, h, i, d]) * float(key[b, group, j, d]) for d in range(D)]
                logits.append(scale * sum(products) + float(mask[b, h, i, j]))
            powers = [math.exp(x) for x in logits]
            for j, power in enumerate(powers):
                result[b, h, i, j] = power / sum(powers) if sum(powers) else 0.0
    return result


def full(mask: Tensor | None, queries: int, keys: int) -> Tensor:
    """Any mask as numbers to add, `[B, H, Nq, Nk]`."""
    if mask is None:
        mask = torch.zeros(())
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf)
    return mask.double().expand(B, H, queries, keys)


BOOLEAN = torch.rand(B, 1, NQ, NK, generator=torch.Generator().manual_seed(4)) > 0.4
NOTHING_LEFT = BOOLEAN.clone()
NOTHING_LEFT[1, 0, 2] = False
MASKS = {
    "no mask": None,
    "boolean": BOOLEAN,
    "boolean of two axes": BOOLEAN[0, 0],
    "boolean, of keys": torch.tensor([True, False, True, True, False]).expand(B, 1, 1, NK),
    "added": draw(B, H, NQ, NK, seed=5),
    "added, of two axes": draw(NQ, NK, seed=6),
    "added, with infinity": torch.where(BOOLEAN, 0.5, -math.inf).double(),
    "a row with nothing left": NOTHING_LEFT,
    "a row with nothing left, added": torch.where(NOTHING_LEFT, 0.0, -math.inf).double(),
}  # fmt: skip


def check(source: Fused, mask: Tensor, kernel: Tensor) -> None:
    """P by loops, P V the kernel's output, and ∂y/∂P by autograd through P V."""
    query, key, value = source.operands.tensors[:3]
    scale = 1 / math.sqrt(D) if source.scale is None else source.scale
    probabilities = source.probabilities()
    torch.testing.assert_close(probabilities, softmax_in_loops(query, key, mask, scale))
    heads = value.repeat_interleave(H // value.shape[1], 1)
    torch.testing.assert_close(probabilities @ heads, kernel)

    weights = draw(*kernel.shape, seed=7)
    (at_output,) = torch.autograd.grad((kernel * weights).sum().sin(), kernel)
    leaf = probabilities.clone().requires_grad_()
    (expected,) = torch.autograd.grad(((leaf @ heads) * weights).sum().sin(), leaf)
    torch.testing.assert_close(source.gradient(at_output), expected)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_fused_with_a_mask(name: str, scale: float | None) -> None:
    query, key, value = operands()
    mask = MASKS[name]
    kernel = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    source = fused(query, key, value, mask, scale=scale)
    check(source, full(mask, NQ, NK), kernel)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (3, 5), (5, 3), (1, 4)])
def test_fused_and_causal(queries: int, keys: int) -> None:
    query, key, value = operands(queries, keys)
    kernel = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    source = fused(query, key, value, causal=True)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    check(source, full(mask, queries, keys), kernel)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fused_with_grouped_queries(groups: int) -> None:
    query, key, value = operands(groups=groups)
    kernel = F.scaled_dot_product_attention(query, key, value, BOOLEAN, enable_gqa=True)
    check(fused(query, key, value, BOOLEAN, grouped=True), full(BOOLEAN, NQ, NK), kernel)


def test_rows_that_may_look_nowhere_are_zero() -> None:
    query, key, value = operands()
    ours = fused(query, key, value, NOTHING_LEFT).probabilities()
    sums = ours.sum(-1)
    expected = torch.ones(B, H, NQ, dtype=torch.float64)
    expected[1, :, 2] = 0
    torch.testing.assert_close(sums, expected)
    assert not ours.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    query, key, value = (t.detach().to(dtype) for t in operands())
    source = fused(query, key, value)
    whole = fused(query.float(), key.float(), value.float())
    assert source.probabilities().dtype == torch.float32
    assert torch.equal(source.probabilities(), whole.probabilities())
    gradient = draw(B, H, NQ, D + 1).to(dtype)
    assert source.gradient(gradient).dtype == torch.float32
    assert torch.equal(source.gradient(gradient), whole.gradient(gradient.float()))


def test_explicit_probabilities_in_any_order_of_axes() -> None:
    maps = draw(B, H, NQ, NK).softmax(-1)
    stored = maps.permute(2, 0, 3, 1).requires_grad_()  # [Nq, B, Nk, H]
    source = explicit(stored, 1, 3, 0, 2)
    assert torch.equal(source.probabilities(), maps)
    assert not source.probabilities().requires_grad
    gradient = draw(*stored.shape, seed=8)
    assert torch.equal(source.gradient(gradient), gradient.permute(1, 3, 0, 2))


def test_explicit_probabilities_of_a_single_query() -> None:
    maps = draw(B, H, NK).softmax(-1)
    source = explicit(maps, 0, 1, 2, single_query=True)
    assert torch.equal(source.probabilities(), maps[:, :, None])
    assert source.gradient(maps).shape == (B, H, 1, NK)


def test_explicit_half_precision_is_given_in_single() -> None:
    maps = draw(B, H, NQ, NK).softmax(-1).half()
    source = explicit(maps, 0, 1, 2, 3)
    assert torch.equal(source.probabilities(), maps.float())
    assert source.gradient(maps).dtype == torch.float32


# --- operands that the model overwrites


def test_operands_are_detached_and_not_copied() -> None:
    query, key, value = operands()
    kept = Operands.of(query, key, value, copies=False)
    for place, tensor in enumerate((query, key, value)):
        assert not kept[place].requires_grad
        assert kept[place].data_ptr() == tensor.data_ptr()


def test_an_operand_that_was_overwritten_is_not_read() -> None:
    query, key, value = (t.detach() for t in operands())
    kept = Operands.of(query, key, value, copies=False)
    key[0] = 0
    assert torch.equal(kept[0], query)
    with pytest.raises(OverwrittenError, match="modified by an inplace operation"):
        kept[1]
    source = Fused(kept, causal=False, scale=None, grouped=False)
    with pytest.raises(OverwrittenError):
        source.probabilities()
    gradient = draw(B, H, NQ, D + 1)
    assert torch.equal(source.gradient(gradient), gradient @ value.mT)


def test_copies_keep_what_the_model_overwrites() -> None:
    query, key, value = (t.detach() for t in operands())
    expected = fused(query, key, value).probabilities()
    kept = Operands.of(query, key, value, copies=True)
    key.zero_()
    query.view(-1)[:7] = 1.0
    source = Fused(kept, causal=False, scale=None, grouped=False)
    assert torch.equal(source.probabilities(), expected)


# --- records


def record_of(maps: Tensor, pick: list[list[int]]) -> AttentionRecord:
    groups = len(pick)
    tensor = maps.requires_grad_()
    return AttentionRecord(
        3, "blocks.0.attn", "Attention", explicit(tensor, *range(maps.ndim)),
        get_gradient_edge(tensor), torch.zeros(groups, NQ).long(), torch.zeros(groups, NK).long(),
        torch.arange(groups), torch.tensor(pick), frozenset(), frozenset([2]),
    )  # fmt: skip


PICKS = {
    "[B, H]": ((B, H), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    "[H, B]": ((H, B), [[0, 2, 4, 6], [1, 3, 5, 7]]),
    "[B * H]": ((B * H,), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    "[B * windows, H]": ((B * 2, 2), [[0, 1], [2, 3], [4, 5], [6, 7]]),
}


@pytest.mark.parametrize("layout", PICKS)
def test_maps_are_grouped_by_example_and_head(layout: str) -> None:
    lead, pick = PICKS[layout]
    maps = draw(*lead, NQ, NK).softmax(-1)
    record = record_of(maps, pick)
    gradient = draw(*maps.shape, seed=9)
    assert record.heads == len(pick[0])
    for ours, whole in ((record.probabilities(), maps), (record.gradient(gradient), gradient)):
        assert ours.shape == (len(pick), len(pick[0]), NQ, NK)
        flat = whole.reshape(-1, NQ, NK)
        for group, places in enumerate(pick):
            for head, place in enumerate(places):
                assert torch.equal(ours[group, head], flat[place])


def test_a_record_is_frozen() -> None:
    record = record_of(draw(B, H, NQ, NK), PICKS["[B, H]"][1])
    with pytest.raises(AttributeError, match="index"):
        record.index = 4
