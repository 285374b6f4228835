"""Perturbation, deletion, insertion, SaCo: against slow twins, Quantus, and what theory says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn import GenericAttention
from captum_generic_attn.metrics import (
    PIXELS,
    TOKENS,
    Curve,
    Pixels,
    RandomAttribution,
    Tokens,
    accuracy,
    blurred,
    deletion,
    detected,
    insertion,
    joined,
    perturbation,
    probability,
    saco,
    soft_accuracy,
)
from captum_generic_attn.metrics.curves import ranks
from captum_generic_attn.metrics.saco import coefficient

EXACT = {"atol": 1e-12, "rtol": 0}


class Sums(torch.nn.Module):
    """An image's score is the sum of its pixels, times weights; the other class gets zero."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.weights = weights

    def forward(self, images: Tensor) -> Tensor:
        score = (images * self.weights).sum((1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], 1)


def score(outputs: Tensor, rows: Tensor) -> Tensor:
    return outputs[:, 0]


@pytest.fixture
def images():
    return torch.rand(3, 2, 6, 4, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.fixture
def maps():
    return torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(1))


# --- perturbation of pixels


@pytest.mark.parametrize("first", [True, False])
def test_pixels_twin(images, maps, first) -> None:
    """One image, one fraction, one pixel at a time."""
    model, fill = Sums(torch.ones(2, 6, 4)), torch.tensor([[[0.5]], [[-1.0]]])
    curve = perturbation(
        model, Pixels(images, fill), maps, score, most_relevant_first=first, batch_size=2
    )
    assert curve.fractions == (0.0, *PIXELS)
    for f, fraction in enumerate(curve.fractions):
        for b in range(3):
            order = sorted(range(24), key=lambda p: maps[b].flatten()[p].item(), reverse=first)
            left = images[b].clone()
            for p in order[: int(fraction * 24)]:
                left[:, p // 4, p % 4] = fill[:, 0, 0]
            assert curve.scores[f, b].item() == pytest.approx(left.sum().item(), abs=1e-4)


def test_pixels_agree_with_quantus(maps) -> None:
    """Quantus' pixel flipping removes the most relevant pixels, some at a time."""
    quantus = pytest.importorskip("quantus")
    images = torch.rand(3, 1, 6, 4, generator=torch.Generator().manual_seed(2))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(24, 3)).eval()
    targets = [0, 2, 1]
    flipping = quantus.PixelFlipping(
        features_in_step=3, perturb_baseline=0.0, disable_warnings=True
    )
    theirs = np.array(
        flipping(model, images.numpy(), np.array(targets), maps[:, None].numpy(), softmax=True)
    )
    removal = Pixels(images, 0.0)
    curve = deletion(model, removal, maps, probability(targets), steps=8)
    # Quantus leaves the clean image out.
    np.testing.assert_allclose(curve.scores[1:].T.numpy(), theirs, atol=1e-6)


def test_patches_are_removed_whole() -> None:
    images = torch.ones(1, 3, 4, 6)
    relevance = torch.zeros(1, 4, 6)
    relevance[0, 3, 5] = 1  # its patch has the highest mean
    removal = Pixels(images, 0.0, patch=2)
    seen = []

    def watch(outputs, rows):
        seen.append(outputs)
        return outputs.sum((1, 2, 3))

    perturbation(lambda x: x, removal, relevance, watch, fractions=[0.2])
    assert seen[1][0, 0].tolist() == [[1] * 6, [1] * 6, [1] * 4 + [0] * 2, [1] * 4 + [0] * 2]


def test_a_map_in_every_channel_counts_once_and_signs_add(images) -> None:
    removal = Pixels(images)
    one = torch.rand(3, 1, 6, 4)
    assert torch.equal(removal.features(one.expand(3, 2, 6, 4)), one[:, 0].flatten(1).double())
    signed = torch.randn(3, 2, 6, 4)
    torch.testing.assert_close(removal.features(signed), signed.sum(1).flatten(1).double())


def test_further_arguments_are_handed_on(images, maps) -> None:
    extra = torch.tensor([10.0, 20.0, 30.0])
    model = lambda x, y: (x.sum((1, 2, 3)) * 0 + y)[:, None]
    removal = Pixels(images, further=[extra])
    watch = lambda out, rows: out[:, 0]
    curve = perturbation(model, removal, maps, watch, batch_size=2)
    assert torch.equal(curve.scores, extra.double().expand(10, 3))


# --- tokens


def bag(ids: Tensor, mask: Tensor) -> Tensor:
    """A model without padding: what it gets is what counts, in this order."""
    assert mask.bool().all()
    places = torch.arange(1, ids.shape[1] + 1)
    value = (ids * places).sum(1).double()
    return torch.stack([value, torch.zeros_like(value)], 1)


@pytest.mark.parametrize("first", [True, False])
def test_tokens_twin(first) -> None:
    """One sentence, one fraction at a time: int((1 − f) n) words stay, in their order."""
    generator = torch.Generator().manual_seed(3)
    lengths = [9, 4, 7, 2]
    ids = torch.zeros(4, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, 50, (length,), generator=generator)
    mask = (ids > 0).long()
    ends = torch.zeros_like(mask, dtype=torch.bool)
    ends[:, 0] = True
    ends[torch.arange(4), torch.tensor(lengths) - 1] = True
    relevance = torch.rand(4, 9, generator=generator)
    removal = Tokens([ids, mask], dropped=(0, 1), present=mask, protected=ends)
    curve = perturbation(
        bag, removal, relevance, score, fractions=TOKENS, most_relevant_first=first, batch_size=3
    )
    for f, fraction in enumerate(TOKENS):
        for b, length in enumerate(lengths):
            words = list(range(1, length - 1))
            ranked = sorted(words, key=lambda p: relevance[b, p].item(), reverse=not first)
            stay = ranked[: int((1 - fraction) * len(words))]
            left = [ids[b, p].item() for p in range(length) if p in {0, length - 1, *stay}]
            expected = sum(place * token for place, token in enumerate(left, 1))
            assert curve.scores[f, b].item() == expected


def test_regions_lose_their_boxes_too() -> None:
    words, features = torch.ones(2, 3), torch.rand(2, 4, 5)
    boxes = torch.arange(8.0).view(2, 4, 1)
    removal = Tokens([words, features, boxes], dropped=(1, 2))
    relevance = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    seen = {}

    def forward(words, features, boxes):
        seen[features.shape[1]] = (words, features, boxes)
        return features.new_zeros(len(words), 2)

    perturbation(forward, removal, relevance, accuracy(0), fractions=[0.5, 1.0])
    assert seen[2][2][..., 0].tolist() == [[2, 3], [4, 5]]
    torch.testing.assert_close(seen[2][1], torch.stack([features[0, 2:], features[1, :2]]))
    assert seen[0][1].shape == (2, 0, 5)
    assert seen[0][0].shape == (2, 3)


def test_token_attributions_of_every_shape() -> None:
    ids, features = torch.ones(2, 3, dtype=torch.long), torch.rand(2, 4, 5)
    text, image = torch.rand(2, 3), torch.rand(2, 4)
    every = image[..., None].expand(2, 4, 5)
    words, regions = Tokens([ids, features]), Tokens([ids, features], dropped=[-1])
    assert torch.equal(words.features((text, every)), text.double())
    assert torch.equal(regions.features((text, every)), image.double())
    assert torch.equal(regions.features(image), image.double())
    signed = torch.randn(2, 4, 5)
    torch.testing.assert_close(regions.features(signed), signed.sum(-1).double(), atol=1e-6, rtol=0)


# --- laws


def linear(seed: int):
    weights = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed))
    images = torch.ones(40, 1, 8, 8)
    return Sums(weights), images, weights.expand(40, 8, 8)


def test_perfect_random_and_inverted_maps_on_a_linear_model() -> None:
    """Where each pixel's effect is known, the true map is best, its negative worst, and chance
    keeps each pixel equally long: a straight line.
    """
    model, images, true = linear(0)
    removal = Pixels(images, 0.0)
    areas = {}
    for name, relevance in (
        ("true", true), ("random", RandomAttribution(model, seed=4).attribute(images)),
        ("inverted", -true),
    ):  # fmt: skip
        areas[name] = deletion(model, removal, relevance, score, steps=64).areas.mean().item()
    whole = true[0].sum().item()
    assert areas["random"] == pytest.approx(100 * whole / 2, abs=8 * 100 / 40**0.5)
    assert areas["true"] < areas["random"] - 1000
    assert areas["inverted"] > areas["random"] + 1000
    # The best that can be had: pixels by falling weight.
    falling = true[0].flatten().sort(descending=True).values
    left = torch.cat([torch.tensor([whole]), whole - falling.cumsum(0)])
    assert areas["true"] == pytest.approx(100 * torch.trapezoid(left, dx=1 / 64).item(), rel=1e-4)


def test_negative_is_positive_of_the_inverted_map(images, maps) -> None:
    model, removal = Sums(torch.randn(2, 6, 4)), Pixels(images)
    ours = perturbation(model, removal, maps, score, most_relevant_first=False)
    theirs = perturbation(model, removal, -maps, score)
    assert torch.equal(ours.scores, theirs.scores)


def test_insertion_is_deletion_of_the_complement(images, maps) -> None:
    """What is inserted at a step is what deletion of the inverted map has left."""
    model = Sums(torch.randn(2, 6, 4))
    for b, step in itertools.product(range(3), range(7)):
        curve = insertion(model, Pixels(images[b : b + 1]), maps[b : b + 1], score, steps=6)
        best = maps[b].flatten().topk(24 * step // 6).indices
        kept = torch.zeros(24).index_fill(0, best, 1).view(1, 6, 4)
        expected = model((images[b] * kept)[None])[0, 0].item()
        assert curve.scores[step, 0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("count", "steps"), [(49, 49), (20, 20), (5, 20), (25, 20), (64, 20)])
def test_even_steps_count_exactly(count, steps) -> None:
    """Fractions in binary would now and then round to one feature less or more."""
    tokens = torch.ones(1, count)
    watch = lambda scores, rows: scores[:, 0]
    forward = lambda x: x.sum(1, keepdim=True)
    relevance = torch.rand(1, count)
    gone = deletion(forward, Tokens([tokens]), relevance, watch, steps=steps)
    back = insertion(forward, Tokens([tokens]), relevance, watch, steps=steps)
    for step in range(steps + 1):
        assert gone.scores[step, 0].item() == count - step * count // steps
        assert back.scores[step, 0].item() == step * count // steps


def test_insertion_starts_from_the_baseline(images, maps) -> None:
    model = Sums(torch.ones(2, 6, 4))
    soft = blurred(images, 3, 1.0)
    curve = insertion(model, Pixels(images, soft), maps, score, steps=2)
    torch.testing.assert_close(curve.scores[0].float(), soft.sum((1, 2, 3)))
    torch.testing.assert_close(curve.scores[-1].float(), images.sum((1, 2, 3)))
    assert (soft.var((2, 3)) < images.var((2, 3))).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 10**6))
def test_ranks_are_an_order(count, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    relevance = torch.randint(0, 4, (3, count), generator=generator).double()
    removable = torch.rand(3, count, generator=generator) < 0.7
    place = ranks(relevance, removable)
    for row, value, free in zip(place, relevance, removable, strict=True):
        assert sorted(row.tolist()) == list(range(count))
        ordered = value[free][row[free].argsort()]
        assert (ordered[:-1] >= ordered[1:]).all()
        assert set(row[free].tolist()) == set(range(int(free.sum())))


def test_equal_relevance_falls_as_chance_would_have_it() -> None:
    """A constant map must not gain by an order of reading."""
    place = ranks(torch.zeros(1, 2000), torch.ones(1, 2000, dtype=torch.bool))[0].double()
    reading = torch.arange(2000).double()
    assert abs(torch.corrcoef(torch.stack([place, reading]))[0, 1].item()) < 0.1
    again = ranks(torch.zeros(2, 2000), torch.ones(2, 2000, dtype=torch.bool))
    assert torch.equal(again[0].double(), place)
    assert torch.equal(again[1].double(), place)


def test_a_figure_does_not_depend_on_batches_or_neighbours(images, maps) -> None:
    model, removal = Sums(torch.randn(2, 6, 4)), Pixels(images)
    whole = perturbation(model, removal, maps, score)
    alone = [
        perturbation(model, Pixels(images[b : b + 1]), maps[b : b + 1], score, batch_size=1)
        for b in range(3)
    ]
    torch.testing.assert_close(joined(alone).scores, whole.scores, atol=1e-6, rtol=0)


def test_the_model_and_its_inputs_stay_as_they_are(images, maps) -> None:
    model = Sums(torch.nn.Parameter(torch.ones(2, 6, 4)))
    before = images.clone()
    curve = perturbation(model, Pixels(images), maps, score)
    assert torch.equal(images, before)
    assert not curve.scores.requires_grad
    assert model.weights.grad is None


def test_ours_is_better_than_chance_on_the_shipped_model() -> None:
    from captum_generic_attn import demo

    model = demo.load_model()
    images = torch.stack([demo.preprocess(canvas.image()) for canvas in demo.canvases()])
    with torch.no_grad():
        targets = model(images).argmax(1)
    areas = {}
    for name, method in (
        ("ours", GenericAttention(model)),
        ("random", RandomAttribution(model, grid=(8, 8), seed=0)),
    ):
        maps = method.attribute(images, target=targets)
        for first in (True, False):
            curve = perturbation(
                model, Pixels(images), maps, detected(targets), most_relevant_first=first
            )
            areas[name, first] = curve.auc().value
    assert areas["ours", True] < areas["random", True] - 20
    assert areas["ours", False] > areas["random", False] + 20


# --- areas


def test_areas_are_trapezoids_and_their_mean_is_that_of_the_mean_curve() -> None:
    fractions = (0.0, 0.1, 0.4, 0.9)
    scores = torch.rand(4, 50, dtype=torch.float64)
    curve = Curve(fractions, scores)
    by_hand = sum(
        (fractions[i + 1] - fractions[i]) * (scores[i] + scores[i + 1]) / 2 for i in range(3)
    )
    torch.testing.assert_close(curve.areas, 100 * by_hand)
    of_mean = 100 * torch.trapezoid(curve.means, torch.tensor(fractions)).item()
    assert curve.auc().value == pytest.approx(of_mean)
    assert Curve(fractions, torch.ones(4, 5)).auc().value == pytest.approx(90)


# --- measures


def test_measures() -> None:
    outputs = torch.tensor([[1.0, 3.0, 2.0], [0.5, -1.0, -2.0]])
    rows = torch.tensor([4, 1])
    targets = torch.tensor([9, 1, 9, 9, 1])
    assert accuracy(targets)(outputs, rows).tolist() == [1, 0]
    assert accuracy(0)(outputs, rows).tolist() == [0, 1]
    shares = outputs.double().softmax(1)
    torch.testing.assert_close(probability(targets)(outputs, rows), shares[:, 1], **EXACT)
    alone = outputs.double().sigmoid()[:, 1]
    torch.testing.assert_close(
        probability(targets, multi_label=True)(outputs, rows), alone, **EXACT
    )
    assert detected(targets)(outputs, rows).tolist() == [1, 0]
    assert detected(0, threshold=0.7)(outputs, rows).tolist() == [1, 0]
    credit = torch.zeros(5, 3)
    credit[4, 1], credit[1, 0] = 0.3, 1.0
    torch.testing.assert_close(
        soft_accuracy(credit)(outputs, rows), torch.tensor([0.3, 1.0]).double(), atol=1e-7, rtol=0
    )


# --- SaCo


def slow_saco(model, image, fill, saliency, target, subsets) -> float:
    """Algorithm 1 of the paper, step by step."""
    order = sorted(range(saliency.numel()), key=lambda p: -saliency.flatten()[p].item())
    size = len(order) / subsets
    groups = [order[round(i * size) : round((i + 1) * size)] for i in range(subsets)]
    confidence = lambda x: model(x[None]).double().softmax(-1)[0, target].item()
    s, change = [], []
    for group in groups:
        left = image.clone()
        for p in group:
            left[:, p // image.shape[2], p % image.shape[2]] = fill
        s.append(sum(saliency.flatten()[p].item() for p in group))
        change.append(confidence(image) - confidence(left))
    coefficient, total = 0.0, 0.0
    for i in range(subsets - 1):
        for j in range(i + 1, subsets):
            weight = s[i] - s[j] if change[i] >= change[j] else -(s[i] - s[j])
            coefficient += weight
            total += abs(weight)
    return coefficient / total


def test_saco_twin() -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(4, 2, 6, 5, generator=generator)
    saliency = torch.randn(4, 6, 5, generator=generator)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 3))
    targets = [0, 1, 2, 0]
    found = saco(model, Pixels(images, 0.3), saliency, probability(targets), subsets=6)
    for b in range(4):
        expected = slow_saco(model, images[b], 0.3, saliency[b], targets[b], 6)
        assert found[b].item() == pytest.approx(expected, abs=1e-9)


def test_saco_of_what_theory_knows() -> None:
    model, images, true = linear(1)
    removal = Pixels(images, 0.0)
    assert saco(model, removal, true, score).unique().tolist() == [1.0]
    assert saco(model, removal, -true, score).unique().tolist() == [-1.0]
    assert saco(model, removal, torch.ones(40, 8, 8), score, subsets=8).tolist() == [0.0] * 40
    chance = saco(model, removal, RandomAttribution(model, seed=1).attribute(images), score)
    assert abs(chance.mean().item()) < 3 * chance.std().item() / 40**0.5
    scaled = saco(model, removal, 7 * true + 3, score)
    torch.testing.assert_close(scaled, torch.ones_like(scaled))


@pytest.mark.parametrize("count", [10, 11, 13, 19, 25, 64])
def test_saco_is_no_better_than_chance_for_chance_however_many_tokens(count) -> None:
    """Ten subsets of 13 tokens hold one or two each: the larger ones must not win by size."""
    generator = torch.Generator().manual_seed(count)
    tokens = torch.rand(1000, count, generator=generator).double()
    model = lambda x: x.sum(1, keepdim=True)
    removal = Tokens([tokens])
    chance = saco(model, removal, torch.rand(1000, count, generator=generator), score)
    assert abs(chance.mean().item()) < 3.5 * chance.std().item() / 1000**0.5
    assert saco(model, removal, tokens, score).mean().item() == pytest.approx(1)
    for constant in (torch.ones(1000, count), torch.full((1000, count), 0.1).double()):
        assert saco(model, removal, constant, score).abs().max().item() == 0


def test_saco_of_a_constant_map_is_zero_whatever_its_rounding() -> None:
    constant = torch.full((1, 20, 20), 0.1, dtype=torch.float64)
    model, images = Sums(torch.rand(1, 20, 20)), torch.rand(1, 1, 20, 20)
    for subsets in (5, 8, 10):
        assert saco(model, Pixels(images), constant, score, subsets=subsets).item() == 0


def test_saco_does_not_look_at_relevance_that_counts_nowhere() -> None:
    ids = torch.tensor([[9.0, 3.0, 2.0, 9.0], [9.0, 3.0, 9.0, 0.0]])
    relevance = ids.clone()
    relevance[0, 0] = relevance[1, 3] = torch.nan
    removal = Tokens([ids], present=ids > 0, protected=ids == 9)
    model = lambda x: x.sum(1, keepdim=True)
    assert saco(model, removal, relevance, score).tolist() == [1, 0]  # one word makes no pair


def test_saco_of_few_tokens_cuts_them_singly() -> None:
    """Three words in one sentence, five in the other, ten subsets."""
    ids = torch.tensor([[9.0, 5.0, 3.0, 1.0, 0.0, 0.0], [9.0, 2.0, 7.0, 1.0, 5.0, 4.0]])
    present, protected = ids > 0, ids == 9
    removal = Tokens([ids], present=present, protected=protected)
    model = lambda x: torch.stack([x.sum(1), 0 * x.sum(1)], 1)
    assert saco(model, removal, ids, score).tolist() == [1, 1]
    mixed = torch.tensor([[0.0, 1.0, 3.0, 2.0, 0.0, 0.0], [0.0, 2.0, 7.0, 1.0, 5.0, 4.0]])
    # Said to matter 3, 2, 1 (words 3, 1, 5): pairs (3, 1) right by 1, (3, 5), (1, 5) wrong by 2, 1.
    expected = (1 - 2 - 1) / 4
    assert saco(model, removal, mixed, score).tolist() == pytest.approx([expected, 1])


def test_saco_coefficient_by_hand() -> None:
    sums = torch.tensor([[5.0, 2.0, 1.0]])
    changes = torch.tensor([[0.1, 0.4, 0.1]])
    # (5, 2) is wrong by 3; (5, 1) is right (equal) by 4; (2, 1) is right by 1.
    assert coefficient(sums, changes).item() == pytest.approx((-3 + 4 + 1) / 8)


# --- control


def test_the_control_has_the_grain_that_is_asked_for() -> None:
    pictures, ids, regions = torch.zeros(4, 3, 8, 8), torch.zeros(4, 5).long(), torch.zeros(4, 2, 6)
    control = RandomAttribution(torch.nn.Identity(), seed=0)
    maps, words, boxes = control.attribute((pictures, ids, regions), target=1)
    assert [tuple(m.shape) for m in (maps, words, boxes)] == [(4, 3, 8, 8), (4, 5), (4, 2, 6)]
    assert (maps == maps[:, :1]).all()
    assert len(maps[0, 0].unique()) == 64
    assert (boxes == boxes[..., :1]).all()
    assert len(torch.cat([words.flatten(), boxes[..., 0].flatten()]).unique()) == 28
    coarse = RandomAttribution(torch.nn.Identity(), grid=(2, 2), seed=0).attribute(pictures)
    # Bilinear: constant beyond the outermost centres.
    assert (coarse[:, :, :2, :2] == coarse[:, :, :1, :1]).all()
    again = RandomAttribution(torch.nn.Identity(), grid=(2, 2), seed=0).attribute(pictures)
    assert torch.equal(again, coarse)


def test_the_controls_numbers_can_be_had_as_they_are() -> None:
    inputs = torch.zeros(4, 3, 8, 8), torch.zeros(4, 2, 6)
    control = RandomAttribution(torch.nn.Identity(), grid=(2, 2), seed=0)
    whole, few = control.attribute(inputs), control.attribute(inputs, return_input_shape=False)
    assert [tuple(part.shape) for part in few] == [(4, 2, 2), (4, 2)]
    fine = torch.nn.functional.interpolate(few[0][:, None], (8, 8), mode="bilinear")
    assert torch.equal(whole[0], fine.expand(4, 3, 8, 8))
    assert torch.equal(whole[1], few[1][..., None].expand(4, 2, 6))


def test_an_unseeded_control_goes_on_with_torchs_numbers() -> None:
    control, pictures = RandomAttribution(torch.nn.Identity()), torch.zeros(1, 1, 4, 4)
    torch.manual_seed(3)
    one, two = control.attribute(pictures), control.attribute(pictures)
    assert not torch.equal(one, two)
    torch.manual_seed(3)
    assert torch.equal(control.attribute(pictures), one)


# --- what is refused


def test_wrong_shapes_and_values_are_told(images, maps) -> None:
    with pytest.raises(ValueError, match=r"images are \[B, C, H, W\], not \[3, 6, 4\]"):
        Pixels(maps)
    with pytest.raises(ValueError, match="patches of 4 pixels do not tile 6 × 4 pixels"):
        Pixels(images, patch=4)
    with pytest.raises(ValueError, match=r"baseline \[5\] does not broadcast.*\[C, 1, 1\]"):
        Pixels(images, torch.zeros(5))
    removal = Pixels(images)
    model = Sums(torch.ones(2, 6, 4))
    with pytest.raises(ValueError, match=r"attributions \[3, 4, 6\] do not fit images"):
        perturbation(model, removal, maps.mT, score)
    with pytest.raises(ValueError, match="NaN or infinite"):
        perturbation(model, removal, maps / 0, score)
    for fractions in ([], [0.5, 0.2], [0.1, 1.5], [-0.1], [0.2, 0.2]):
        with pytest.raises(ValueError, match="must ascend within 0 … 1"):
            perturbation(model, removal, maps, score, fractions=fractions)
    with pytest.raises(ValueError, match=r"returned shape \[3, 2\] for 3 examples"):
        perturbation(model, removal, maps, lambda outputs, rows: outputs)
    with pytest.raises(ValueError, match=r"targets are one index.*float32"):
        accuracy(torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"output has shape \[3\], not \[B, K\]"):
        perturbation(lambda x: x.sum((1, 2, 3)), removal, maps, accuracy(0))
    with pytest.raises(ValueError, match="subsets=1"):
        saco(model, removal, maps, score, subsets=1)
    with pytest.raises(ValueError, match="2 sets of fractions"):
        joined([Curve((0.0, 1.0), torch.ones(2, 1)), Curve((0.0, 0.5), torch.ones(2, 1))])


def test_scores_that_are_no_numbers_are_no_answers(images, maps) -> None:
    """NaN compares as "no": accuracy would rise or fall by it."""

    def model(x):
        return torch.stack([x.sum((1, 2, 3)) / 0 * 0, x.sum((1, 2, 3))], 1)

    for measure in (accuracy(0), detected(1), probability(1)):
        with pytest.raises(ValueError, match=r"NaN or infinite for some of the examples \[0, 1, 2"):
            perturbation(model, Pixels(images), maps, measure)
    with pytest.raises(ValueError, match="NaN or infinite"):
        saco(model, Pixels(images), maps, probability(0))


def test_targets_must_be_classes(images, maps) -> None:
    outputs, rows = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1])
    assert accuracy(-2)(outputs, rows).tolist() == [1]  # from the end, as Captum takes it
    assert probability([0, -1])(outputs, rows).item() == pytest.approx(
        outputs.double().softmax(1)[0, 2].item()
    )
    for measure in (accuracy, probability, detected):
        with pytest.raises(ValueError, match=r"targets \[3\] are out of range for 3 classes"):
            measure(3)(outputs, rows)
        with pytest.raises(ValueError, match="there are 1 targets, but an example 1"):
            measure([0])(outputs, rows)
        with pytest.raises(ValueError, match=r"targets are one index.*bool"):
            measure(torch.tensor([True, False]))


def test_one_score_is_no_choice() -> None:
    outputs, rows = torch.tensor([[2.0]]), torch.tensor([0])
    for measure in (accuracy(0), probability(0)):
        with pytest.raises(ValueError, match=r"one score per example.*detected\(0\)"):
            measure(outputs, rows)
    assert detected(0)(outputs, rows).tolist() == [1]
    assert probability(0, multi_label=True)(outputs, rows).item() == pytest.approx(0.8808, abs=1e-4)


def test_odd_arguments_are_told(images, maps) -> None:
    removal, model = Pixels(images), Sums(torch.ones(2, 6, 4))
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps={steps}: it must be at least 1"):
            deletion(model, removal, maps, score, steps=steps)
    with pytest.raises(ValueError, match="batch_size=0"):
        perturbation(model, removal, maps, score, batch_size=0)
    with pytest.raises(ValueError, match="no example to measure"):
        perturbation(model, Pixels(images[:0]), maps[:0], score)
    with pytest.raises(ValueError, match="must be floats"):
        Pixels((images * 255).byte())
    with pytest.raises(ValueError, match=r"same number of examples; they have \[2, 3\]"):
        Pixels(images, further=[images[:2]])
    with pytest.raises(ValueError, match=r"same number of examples; they have \[1, 2\]"):
        Tokens([torch.ones(2, 3), torch.ones(1, 4)])
    with pytest.raises(TypeError, match="an argument is NoneType, not a tensor"):
        Tokens([torch.ones(2, 3), None])
    with pytest.raises(ValueError, match="0 attributions, but those of the input at index 0"):
        removal.features(())
    with pytest.raises(ValueError, match="kernel of 11 pixels is too large for 6 × 4"):
        blurred(images)


def test_attributions_with_history_leave_it_behind(images, maps) -> None:
    grown = (maps * torch.nn.Parameter(torch.ones(1))).requires_grad_()
    assert not saco(Sums(torch.ones(2, 6, 4)), Pixels(images), grown, score).requires_grad


def test_wrong_tokens_are_told() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"must agree in \[B, N\].*\(2, 3\), \(2, 4\)"):
        Tokens([ids], present=torch.ones(2, 4))
    with pytest.raises(ValueError, match="dropped names no input"):
        Tokens([ids], dropped=())
    with pytest.raises(ValueError, match=r"attributions \[2, 4\] do not fit tokens \[2, 3\]"):
        Tokens([ids]).features(torch.ones(2, 4))
    with pytest.raises(
        ValueError, match="1 attributions, but those of the input at index 1 are needed"
    ):
        Tokens([ids, ids], dropped=[1]).features((torch.ones(2, 3),))


def test_the_control_goes_through_captums_own_metrics():
    """`sensitivity_max` views what it gets as rows: broadcast maps have none."""
    from captum.metrics import sensitivity_max

    control = RandomAttribution(torch.nn.Identity())
    for shape in [(2, 3, 8, 8), (2, 5), (2, 5, 4)]:
        inputs = torch.rand(shape)
        assert control.attribute(inputs).is_contiguous()
        assert (sensitivity_max(control.attribute, inputs, n_perturb_samples=2) > 0).all()
