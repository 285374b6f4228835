"""Scores so large that relevance leaves float32 on the way, or for good.

Relevance grows with the power of the layers. Where the result fits, it is that of float64; where it
does not, the message says so, and blames neither weights nor gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit, two_towers
from relevance.test_crossing_streams import Chain, Three, inputs
from torch import Tensor, nn
from zoo.oracles import randomise

from captum_generic_attn import (
    AttentionGradCam,
    AttentionRollout,
    GenericAttention,
    GradientAttention,
    RawAttention,
    TransformerAttribution,
)
from captum_generic_attn.baselines.scaling import min_max
from captum_generic_attn.relevance.equations import divisor, normalize_relevance

LARGEST = torch.finfo(torch.float32).max
TOO_LARGE = (
    r"^relevance is too large for float32 \(its largest number is 3\.4e\+38\): it grows with each "
    r"layer as the score's gradients do\. The model's weights are not at fault: take model and "
    r"inputs to float64 \(\.double\(\)\), or explain a smaller score"
)


def scaled(model: nn.Module, scale: float) -> Callable[..., Tensor]:
    return lambda *inputs: model(*inputs) * scale


def check(ours: Tensor, theirs: Tensor, limit: float = 1e-4) -> None:
    """Numbers of float32 against those of float64, each example by itself."""
    assert ours.dtype == torch.float32
    assert ours.isfinite().all()
    assert theirs.abs().max() > 0
    for mine, expected in zip(ours.double(), theirs, strict=True):
        assert (mine - expected).abs().max() <= limit * expected.abs().max()


# --- results that fit


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_a_deep_model(scale: float) -> None:
    images = pictures().float()
    ours, theirs = (
        GenericAttention(scaled(tiny_vit(depth=24, dtype=dtype), scale)).attribute(
            images.to(dtype), 1
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert theirs.max() > (1e35 if scale == 1e4 else 0)
    check(ours, theirs)


def looks_at_itself(attention: Tensor, gradient: Tensor) -> Tensor:
    """A map in which the first token gives nearly all to itself."""
    found = torch.full_like(attention[:, 0], 1e-5)
    found[:, 0, 0] = 2e13
    return found


def by_loops(layers: int, tokens: int) -> Tensor:
    """The first row of R of such maps."""
    given = looks_at_itself(torch.zeros(1, 1, tokens, tokens, dtype=torch.float64), torch.empty(0))
    R = torch.eye(tokens, dtype=torch.float64)
    for _ in range(layers):
        R = R + given[0] @ R
    return R[0]


def test_tokens_that_are_not_returned_may_be_too_large() -> None:
    """The class token's own entry does not fit, the patches' values do."""
    expected = by_loops(3, 17)
    assert expected[1:].max() < 1e30
    assert expected[0] > LARGEST
    for own in ("zero", "keep"):
        model, images = tiny_vit(depth=3).float(), pictures().float()
        method = GenericAttention(model, rule=looks_at_itself, own=own)
        ours = method.attribute(images, 1, return_input_shape=False)
        check(ours.flatten(1), expected[1:].expand(2, -1), 1e-6)
        parts = method.attribute(images, 1, internal_batch_size=1)
        assert torch.equal(parts, method.attribute(images, 1))
        twice = method.attribute_targets(images, [1, 2], return_input_shape=False)
        check(twice[1].flatten(1), expected[1:].expand(2, -1), 1e-6)
        with pytest.raises(ValueError, match=TOO_LARGE):
            method.relevance(images, 1)


def test_an_own_entry_that_is_too_large_is_told_of_only_if_it_is_kept() -> None:
    model = tiny_text("classes", depth=3).float()
    ours = GenericAttention(model, rule=looks_at_itself).attribute(sentences(), 1)
    expected = by_loops(3, 6)
    expected[0] = 0
    check(ours, expected.expand(3, -1), 1e-6)
    with pytest.raises(ValueError, match=TOO_LARGE):
        GenericAttention(model, rule=looks_at_itself, own="keep").attribute(sentences(), 1)


@pytest.mark.parametrize(
    ("kind", "seed", "scale"),
    [(Chain, 0, 5e18), (lambda: Three(alone=True), 2, 4e18)],
    ids=["chain", "in turns"],
)
def test_equation_8_divides_by_what_is_too_large(
    kind: Callable[[], nn.Module], seed: int, scale: float
) -> None:
    """R of a stream is divided by the sums of its rows, which float32 need not hold.

    Divided by infinity, rows pass for rows of zeros: a map that is finite, and wrong.
    """
    model = randomise(kind().double().eval(), seed)
    method = GenericAttention(scaled(model, scale))
    theirs = method.attribute(inputs(), 1, return_input_shape=False)
    learnt = method.relevance(inputs(), 1).matrix("input0", "input0")
    assert max(values.max() for values in theirs) < LARGEST < learnt.sum(-1).max()
    method = GenericAttention(scaled(model.float(), scale))
    given = tuple(part.float() for part in inputs())
    ours = method.attribute(given, 1, return_input_shape=False)
    for values, expected in zip(ours, theirs, strict=True):
        check(values, expected)
    for options in ({"normalize": False}, {"normalize": False, "self_in_cross": False}):
        with pytest.raises(ValueError, match=TOO_LARGE):
            GenericAttention(scaled(model, 1e30), **options).attribute(given, 1)


def test_without_aggregation_a_large_map_meets_a_small_one() -> None:
    """Products of maps alone: rows are large on the way, and small in the end."""
    model = tiny_text("classes", depth=4)

    class Weighed(torch.autograd.Function):
        """What passes back is larger by `factor`."""

        @staticmethod
        def forward(ctx, x: Tensor, factor: float) -> Tensor:
            ctx.factor = factor
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient * ctx.factor, None

    def forward(input_ids: Tensor) -> Tensor:
        x = model.words(input_ids)
        for i, block in enumerate(model.blocks):
            x = block(Weighed.apply(x, 1e-30) if i == 2 else x)
        return model.head(x)[:, 0] * 1e22

    theirs = GenericAttention(forward, aggregate=False).attribute(sentences(), 1)
    assert 0 < theirs.max() < LARGEST
    model.float()
    ours = GenericAttention(forward, aggregate=False).attribute(sentences(), 1)
    check(ours, theirs)


@pytest.mark.parametrize(
    "method",
    [
        RawAttention,
        AttentionRollout,
        AttentionGradCam,
        lambda model: AttentionGradCam(model, weights_from="all"),
        lambda model: AttentionGradCam(model, scale=None),
        GradientAttention,
        lambda model: TransformerAttribution(model, row_normalize=True),
    ],
)
def test_baselines(method) -> None:
    model = tiny_text("classes", depth=3)
    theirs = method(scaled(model, 1e37)).attribute(sentences(), 1)
    assert theirs.max() < LARGEST
    check(method(scaled(model.float(), 1e37)).attribute(sentences(), 1), theirs, 1e-3)


def test_one_tower_of_two() -> None:
    model = two_towers("classes")
    method = GenericAttention(scaled(model, 1e9))
    theirs = method.attribute((pictures(3), sentences()), 1)
    method = GenericAttention(scaled(model.float(), 1e9))
    for ours, expected in zip(
        method.attribute((pictures(3).float(), sentences()), 1), theirs, strict=True
    ):
        check(ours, expected)


# --- results that do not fit


def test_too_large_for_the_result() -> None:
    method = GenericAttention(scaled(tiny_vit(depth=24).float(), 1e6))
    images = pictures().float()
    for call in (
        lambda: method.attribute(images, 1),
        lambda: method.attribute(images, 1, return_input_shape=False),
        lambda: method.attribute(images, 1, internal_batch_size=1),
        lambda: method.attribute_targets(images, [1, 2]),
        lambda: method.relevance(images, 1),
        lambda: method.relevance(images, 1, keep_calls=True),
    ):
        with pytest.raises(ValueError, match=TOO_LARGE):
            call()
    advised = GenericAttention(method.forward_func, output=lambda scores: scores / 1e6)
    assert advised.attribute(images, 1).max() > 0


def test_too_large_for_float64() -> None:
    method = GenericAttention(scaled(tiny_vit(depth=3), 1e150))
    with pytest.raises(ValueError, match=r"too large for float64 .* fault: explain a smaller sc"):
        method.attribute(pictures(), 1)


def test_the_message_of_too_large_relevance_leaves_nothing_behind() -> None:
    model = tiny_vit(depth=24).float()
    with pytest.raises(ValueError, match=TOO_LARGE):
        GenericAttention(scaled(model, 1e6)).attribute(pictures().float(), 1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._C._len_torch_function_stack() == 0


def test_the_model_runs_once_where_float32_suffices() -> None:
    for scale, passes in ((1.0, 1), (1e6, 2)):
        model, count = tiny_vit(depth=24).float(), []
        model.register_forward_hook(lambda *_, count=count: count.append(1))
        try:
            GenericAttention(scaled(model, scale)).attribute(pictures().float(), 1)
        except ValueError:
            assert scale > 1
        assert len(count) == passes


# --- what is not finite in the model


def spoiled(model: nn.Module, block: int, value: float) -> nn.Module:
    """The model, with a gradient of `value` behind one block."""
    model.blocks[block].register_forward_hook(
        lambda _module, _inputs, x: x.register_hook(lambda g: torch.full_like(g, value)) and None
    )
    return model


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_names_its_calls(value, dtype, eager) -> None:
    model = spoiled(tiny_text("classes", depth=4, eager=eager).to(dtype), 1, value)
    with pytest.raises(ValueError, match="attention probabilities or their gradients") as caught:
        GenericAttention(model).attribute(sentences(), 1)
    assert str(caught.value).endswith("overflow in: blocks.0, blocks.1")
    if not eager:
        with pytest.raises(ValueError, match=r"overflow in: blocks\.0, blocks\.1$"):
            GenericAttention(model).relevance(sentences(), 1)


@pytest.mark.parametrize("method", [AttentionGradCam, GradientAttention, TransformerAttribution])
def test_baselines_name_the_calls_that_are_not_finite(method) -> None:
    model = spoiled(tiny_text("classes", depth=3), 2, torch.nan)
    with pytest.raises(ValueError, match=r"overflow in: (blocks\.0, blocks\.1, )?blocks\.2$"):
        method(model).attribute(sentences(), 1)


def test_weights_that_hold_nan_are_still_told_of() -> None:
    model = tiny_vit(depth=3)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN in the weights of, .*blocks\.2"):
        GenericAttention(model).attribute(pictures(), 1)


# --- the equations


def test_a_sum_that_overflowed_is_no_row_of_zeros() -> None:
    row = torch.tensor([[3e38, 3e38], [1.0, 3.0], [0.0, 0.0]])
    ours = normalize_relevance(row)
    assert ours[0].isnan().all()
    assert ours[1:].tolist() == [[0.25, 0.75], [0, 0]]
    assert divisor(torch.tensor([0.0, torch.inf, 2.0])).tolist() == [
        1,
        pytest.approx(torch.nan, nan_ok=True),
        2,
    ]


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan, -torch.inf])
def test_maps_that_are_not_finite_are_not_scaled_to_zeros(wrong: float) -> None:
    maps = torch.tensor([[[0.0, wrong]], [[5.0, 6.0]], [[1.0, 1.0]]])
    ours = min_max(maps, torch.tensor([0, 1, 2]))
    assert ours[0].isnan().all()
    assert ours[1:].tolist() == [[[0, 1]], [[0, 0]]]
