"""Pointing, segmentation and Otsu's masks: by hand, beside other libraries, and their laws."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.metrics.localization import Segmentation, otsu_masks, pointing, segment

for library in ("scipy", "skimage", "torchmetrics"):
    pytest.importorskip(library)

SEEDS = st.integers(min_value=0, max_value=2**31)
SIZES = st.integers(min_value=2, max_value=6)
LAWS = settings(deadline=None, max_examples=30)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(batch: int, height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Maps without ties, and places that are neither none nor all."""
    generator = random(seed)
    maps = torch.stack(
        [torch.randperm(height * width, generator=generator) for _ in range(batch)]
    ).double()
    right = torch.rand(batch, height * width, generator=generator) < 0.4
    right[:, 0], right[:, 1] = True, False
    return maps.reshape(batch, height, width), right.reshape(batch, height, width)


# --- the pointing game ------------------------------------------------------------------------


def test_pointing_by_hand() -> None:
    right = torch.tensor([[True, False], [False, True]]).expand(4, 2, 2)
    maps = torch.tensor(
        [
            [[5.0, 1], [2, 3]],  # a hit
            [[1.0, 5], [2, 3]],  # a miss
            [[5.0, 5], [2, 3]],  # two share the maximum, one is right
            [[5.0, 5], [1, 5]],  # three share it, two are right
        ]
    )
    assert pointing(maps, right).tolist() == [1, 0, 0.5, pytest.approx(2 / 3)]
    assert pointing(maps.flatten(1), right.flatten(1)).tolist() == pointing(maps, right).tolist()
    assert pointing(maps, right).dtype == torch.float64


@pytest.mark.parametrize(
    ("tolerance", "hit"), [(0, 0), (1, 0), (2.2, 0), (math.sqrt(5), 1), (3, 1)]
)
def test_tolerance_is_a_euclidean_distance(tolerance: float, hit: int) -> None:
    right, maps = torch.zeros(1, 5, 5, dtype=torch.bool), torch.zeros(1, 5, 5)
    right[0, 1, 1], maps[0, 3, 2] = True, 1.0
    assert pointing(maps, right, tolerance=tolerance).tolist() == [hit]


@given(height=SIZES, width=SIZES, tolerance=st.floats(0.5, 4), seed=SEEDS)
@LAWS
def test_tolerance_agrees_with_all_pairs_of_places(
    height: int, width: int, tolerance: float, seed: int
) -> None:
    maps, right = pictures(3, height, width, seed)
    for found, values, places in zip(
        pointing(maps, right, tolerance=tolerance), maps, right, strict=True
    ):
        top = (values == values.max()).nonzero().double()
        near = torch.cdist(top, places.nonzero().double()).amin(1) <= tolerance
        assert found == near.double().mean()


def test_pointing_agrees_with_quantus() -> None:
    quantus = pytest.importorskip("quantus")
    maps, right = pictures(40, 6, 6, seed=3)
    theirs = quantus.PointingGame(disable_warnings=True, normalise=False)(
        model=None,
        x_batch=np.zeros((40, 1, 6, 6)),
        y_batch=np.zeros(40, dtype=int),
        a_batch=maps[:, None].numpy(),
        s_batch=right[:, None].numpy(),
    )
    ours = pointing(maps, right)
    assert 0 < ours.mean() < 1
    assert ours.tolist() == [float(hit) for hit in theirs]


@given(height=SIZES, width=SIZES, seed=SEEDS)
@LAWS
def test_pointing_ranges_from_inverted_to_perfect(height: int, width: int, seed: int) -> None:
    _, right = pictures(3, height, width, seed)
    assert pointing(right.double(), right).tolist() == [1, 1, 1]
    assert pointing(-right.double(), right).tolist() == [0, 0, 0]
    share = right.double().mean((1, 2))
    torch.testing.assert_close(pointing(torch.full(right.shape, 0.1), right), share)


@given(height=SIZES, width=SIZES, seed=SEEDS)
@LAWS
def test_only_the_order_of_values_counts(height: int, width: int, seed: int) -> None:
    maps, right = pictures(3, height, width, seed)
    other = (maps / 10).exp() - 20
    assert torch.equal(pointing(maps, right), pointing(other, right))
    expected, found = segment(maps, right), segment(other, right)
    assert torch.equal(expected.average_precision, found.average_precision)


# --- segmentation -----------------------------------------------------------------------------


def test_segmentation_by_hand() -> None:
    maps = torch.tensor([[[8.0, 4, 0, 0]], [[0.0, 0, 0, 4]]])  # their means are 3 and 1
    truth = torch.tensor([[[True, False, True, False]], [[False, False, False, True]]])
    found = segment(maps, truth)
    assert found.correct.tolist() == [2, 4]
    assert found.total.tolist() == [4, 4]
    assert found.intersection.tolist() == [[1, 1], [3, 1]]  # background, foreground
    assert found.union.tolist() == [[3, 3], [3, 1]]
    # Ranked 8 (right), 4 (wrong), then 0 and 0 (one of two right): 1/2 · 1/1 + 1/2 · 2/4.
    torch.testing.assert_close(
        found.average_precision, torch.tensor([0.75, 1.0], dtype=torch.float64)
    )
    assert found.pixel_accuracy().value == 6 / 8
    assert found.mean_iou().value == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert found.mean_average_precision().value == pytest.approx(0.875)
    assert found.mean_iou().count == 2


def test_threshold_by_hand() -> None:
    maps = torch.tensor([[[1.0, 2, 3, 4]], [[1.0, 2, 3, 4]]])
    truth = torch.tensor([[[False, False, True, True]]]).expand(2, 1, 4)
    assert segment(maps, truth).correct.tolist() == [4, 4]
    assert segment(maps, truth, threshold=3).correct.tolist() == [3, 3]
    assert segment(maps, truth, threshold=torch.tensor([3.0, 0.0])).correct.tolist() == [3, 2]


def test_mean_of_a_constant_map_is_not_exceeded() -> None:
    maps = torch.full((1, 7, 7), 0.1, dtype=torch.float64)
    truth = torch.zeros(1, 7, 7, dtype=torch.bool)
    truth[0, 0] = True
    found = segment(maps, truth)
    assert found.correct.tolist() == [42]
    assert found.average_precision.tolist() == [pytest.approx(1 / 7)]


def test_figures_agree_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = random(5)
    maps = torch.randn(6, 9, 11, generator=generator) * 4  # outside 0 … 1, and negative
    maps[3:] = maps[3:].round()  # with ties
    truth = torch.rand(6, 9, 11, generator=generator) < 0.3
    found = segment(maps, truth)
    foreground = torch.stack([values > values.mean() for values in maps])
    flat, marked = truth.flatten().numpy(), foreground.flatten().numpy()
    assert found.pixel_accuracy().value == pytest.approx(metrics.accuracy_score(flat, marked))
    assert found.mean_iou().value == pytest.approx(
        metrics.jaccard_score(flat, marked, average="macro")
    )
    for index in range(6):
        right = truth[index].flatten().numpy()
        assert found.correct[index] / found.total[index] == pytest.approx(
            metrics.accuracy_score(right, foreground[index].flatten().numpy())
        )
        assert found.average_precision[index].item() == pytest.approx(
            metrics.average_precision_score(right, maps[index].flatten().numpy()), abs=1e-6
        )


def test_average_precision_of_large_values_keeps_their_order() -> None:
    # The sigmoid of all of these is 1 in single precision.
    maps = torch.tensor([[[100.0, 200, 300, 400]]])
    truth = torch.tensor([[[False, False, True, True]]])
    assert segment(maps, truth).average_precision.tolist() == [1]


@given(height=SIZES, width=SIZES, seed=SEEDS)
@LAWS
def test_segmentation_ranges_from_inverted_to_perfect(height: int, width: int, seed: int) -> None:
    _, truth = pictures(3, height, width, seed)
    best, worst = segment(truth.double(), truth), segment(-truth.double(), truth)
    for figure in ("pixel_accuracy", "mean_iou", "mean_average_precision"):
        assert getattr(best, figure)(resamples=10).value == pytest.approx(1)
    assert worst.pixel_accuracy(resamples=10).value == 0
    assert worst.mean_iou(resamples=10).value == 0
    # Every foreground pixel comes last, all at once.
    torch.testing.assert_close(
        worst.average_precision, truth.double().mean((1, 2)), rtol=1e-6, atol=1e-6
    )


def test_average_precision_of_a_random_map_is_the_share_of_the_foreground() -> None:
    draws = 300
    truth = torch.zeros(draws, 20, 20, dtype=torch.bool)
    truth[:, :5] = True
    maps = torch.rand(truth.shape, generator=random(7))
    found = segment(maps, truth).mean_average_precision()
    assert found.value == pytest.approx(0.25, abs=0.02)
    # A right pixel at rank i has 1 + (i − 1)(R − 1) / (N − 1) right ones up to it, on average; all
    # ranks are equally likely. Single images scatter by about 0.03, the mean of 300 by 0.002.
    pixels, right = 400, 100
    harmonic = sum(1 / rank for rank in range(1, pixels + 1))
    expected = (harmonic + (right - 1) / (pixels - 1) * (pixels - harmonic)) / pixels
    assert found.value == pytest.approx(expected, abs=0.006)


def test_batches_are_joined() -> None:
    maps, truth = pictures(6, 4, 5, seed=1)
    whole = segment(maps, truth)
    joined = Segmentation.joined([segment(maps[:2], truth[:2]), segment(maps[2:], truth[2:])])
    assert joined.mean_iou() == whole.mean_iou()
    assert joined.pixel_accuracy() == whole.pixel_accuracy()
    assert joined.mean_average_precision() == whole.mean_average_precision()


def test_background_that_is_nowhere_is_left_out() -> None:
    truth = torch.ones(2, 2, 2, dtype=torch.bool)
    found = segment(torch.ones(2, 2, 2), truth, threshold=0.5)
    assert found.union.tolist() == [[0, 4], [0, 4]]
    assert found.mean_iou().value == 1


def test_interval_depends_on_the_seed_and_the_figure_does_not() -> None:
    maps, truth = pictures(12, 4, 5, seed=2)
    found = segment(maps, truth)
    for figure in (found.pixel_accuracy, found.mean_iou, found.mean_average_precision):
        one, same, other = figure(seed=1), figure(seed=1), figure(seed=2)
        assert one == same
        assert one.value == other.value
        assert (one.low, one.high) != (other.low, other.high)
        assert one.low <= one.value <= one.high


# --- Otsu's masks -----------------------------------------------------------------------------


def test_otsu_by_hand() -> None:
    maps = torch.tensor([[[0.0, 1, 9, 10], [0.0, 1, 9, 10]], [[3.0, 3, 3, 3], [3.0, 3, 3, 3]]])
    high = [False, False, True, True]
    assert otsu_masks(maps, (2, 4)).tolist() == [[high, high], [[False] * 4] * 2]


def test_otsu_agrees_with_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    maps = torch.randn(30, 13, 17, generator=random(4)).exp()
    masks = otsu_masks(maps, (13, 17))
    for mask, values in zip(masks, maps.double().numpy(), strict=True):
        scaled = (values - values.min()) / (values.max() - values.min())
        _, expected = cv2.threshold(
            (scaled * 255).astype(np.uint8), 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU
        )
        assert mask.tolist() == expected.astype(bool).tolist()


def test_masks_are_resized_with_aligned_edges() -> None:
    maps = torch.tensor([[[0.0, 1.0]]])
    # Eight pixels of two cells: the mask rises from 0 to 1 in steps of 1/4 between their middles.
    half = [False] * 4 + [True] * 4
    assert otsu_masks(maps, (1, 8), level=0.5).tolist() == [[half]]
    reached = [False] * 2 + [True] * 6
    assert otsu_masks(maps, (1, 8)).tolist() == [[reached]]


@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10), seed=SEEDS)
@LAWS
def test_masks_do_not_depend_on_the_unit_of_a_map(scale: float, shift: float, seed: int) -> None:
    # Whole levels, so that no rounding crosses one: 255 · x / 255.
    levels = torch.randint(0, 256, (2, 5, 5), generator=random(seed)).double()
    levels[:, 0, 0], levels[:, 0, 1] = 0, 255
    between = levels + torch.where(levels < 255, 0.5, 0.0) * (levels > 0)
    assert torch.equal(otsu_masks(between * scale + shift, (5, 5)), otsu_masks(between, (5, 5)))


def test_no_maps_give_no_masks() -> None:
    assert otsu_masks(torch.zeros(0, 3, 4), (6, 8)).shape == (0, 6, 8)


# --- errors -----------------------------------------------------------------------------------

RIGHT = torch.tensor([[[True, False]], [[False, False]], [[False, False]]])
MAPS = torch.zeros(3, 1, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pointing(MAPS, RIGHT), ValueError, r"right marks no place in the examples \[1, 2"),
        (lambda: segment(MAPS, RIGHT), ValueError, r"truth marks no place in the examples \[1, 2"),
        (lambda: pointing(MAPS, RIGHT[:2]), ValueError, r"maps \(3, 1, 2\) and right \(2, 1, 2\)"),
        (lambda: pointing(MAPS[0, 0], RIGHT[0, 0]), ValueError, r"be \[B, N\] or \[B, H, W\]"),
        (lambda: segment(MAPS[0], RIGHT[0]), ValueError, r"must both be \[B, H, W\]"),
        (lambda: pointing(MAPS, RIGHT.long()), TypeError, "right must be bool, not torch.int64"),
        (lambda: segment(MAPS, RIGHT.long()), TypeError, "truth must be bool, not torch.int64"),
        (lambda: pointing(MAPS / 0, RIGHT), ValueError, r"infinite values in the examples \[0, 1,"),
        (lambda: segment(MAPS / 0, RIGHT), ValueError, r"infinite values in the examples \[0, 1,"),
        (lambda: otsu_masks(MAPS / 0, (2, 2)), ValueError, r"infinite values in the examples \[0"),
        (
            lambda: pointing(MAPS[:1, 0], RIGHT[:1, 0], tolerance=1),
            ValueError,
            r"tolerance=1 with maps \(1, 2\)",
        ),
        (lambda: pointing(MAPS[:1], RIGHT[:1], tolerance=-1), ValueError, "tolerance=-1 with maps"),
        (lambda: segment(MAPS[:1], RIGHT[:1], threshold="otsu"), ValueError, "threshold='otsu'"),
        (
            lambda: segment(MAPS[:1], RIGHT[:1], threshold=torch.zeros(2)),
            ValueError,
            r"threshold=\(2,\): it must be 'mean', a number or \[1\] numbers",
        ),
        (lambda: segment(MAPS[:1], RIGHT[:1], threshold=math.nan), ValueError, "holds NaN"),
        (lambda: otsu_masks(MAPS[0], (2, 2)), ValueError, r"must be \[Q, h, w\], not \(1, 2\)"),
        (
            lambda: otsu_masks(MAPS, (2, 2), level=1),
            ValueError,
            "level=1: it must be at least 0 and below 1",
        ),
    ],
)
def test_errors_say_what_was_seen(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(ImportError, match=r"torchmetrics is needed.*captum-generic-attn\[metrics"):
        segment(MAPS[:1], RIGHT[:1])
