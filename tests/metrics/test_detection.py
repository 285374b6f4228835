"""COCO's scores of masks: by hand, beside a run of pycocotools on plain entries, and their laws."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from captum_generic_attn.metrics.detection import (
    IOU_THRESHOLDS,
    Detections,
    DetectionScores,
    Objects,
    detection_scores,
)

pytest.importorskip("pycocotools")

AREAS = (30.0, 120.0)


def box(top: int, left: int, height: int, width: int, size: int = 32) -> Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def found(*entries: tuple[Tensor, int, float]) -> Detections:
    if not entries:
        return Detections(
            torch.zeros(0, 32, 32, dtype=torch.bool), torch.zeros(0).long(), torch.zeros(0)
        )
    masks, labels, scores = zip(*entries, strict=True)
    return Detections(torch.stack(masks), torch.tensor(labels), torch.tensor(scores))


def objects(*entries: tuple[Tensor, int]) -> Objects:
    if not entries:
        return Objects(torch.zeros(0, 32, 32, dtype=torch.bool), torch.zeros(0).long())
    masks, labels = zip(*entries, strict=True)
    return Objects(torch.stack(masks), torch.tensor(labels))


def scenes(count: int, seed: int) -> tuple[list[Detections], list[Objects]]:
    """Images with objects of three labels and sizes; detections are shifted, or made up."""
    random = np.random.default_rng(seed)
    given, true = [], []
    for _ in range(count):
        things, seen = [], []
        for _ in range(random.integers(0, 5)):
            top, left = random.integers(2, 16, 2)
            height, width = random.integers(2, 15, 2)
            label = int(random.integers(1, 4))
            things.append((box(top, left, height, width), label))
            shift = random.integers(-2, 3, 2)
            seen.append(
                (
                    box(top + shift[0], left + shift[1], height, width),
                    label if random.random() < 0.8 else 4,
                    float(random.random()),
                )
            )
        for _ in range(random.integers(0, 3)):
            entry = box(*random.integers(0, 16, 2), *random.integers(1, 15, 2))
            seen.append((entry, int(random.integers(1, 4)), float(random.random())))
        given.append(found(*seen))
        true.append(objects(*things))
    return given, true


def reference(
    given: list[Detections], true: list[Objects], thresholds: np.ndarray, areas: tuple[float, float]
) -> dict[str, float]:
    """What pycocotools finds, used as in its manual: data sets, results loaded, evaluated."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from pycocotools.mask import encode

    def coded(mask: Tensor) -> dict[str, Any]:
        return encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    annotations = [
        dict(image_id=10 + index, category_id=int(label), segmentation=coded(mask), iscrowd=0)
        | dict(area=float(mask.sum()))
        for index, picture in enumerate(true)
        for mask, label in zip(picture.masks, picture.labels, strict=True)
    ]
    results = [
        dict(image_id=10 + index, category_id=int(label), segmentation=coded(mask))
        | dict(score=float(score))
        for index, picture in enumerate(given)
        for mask, label, score in zip(picture.masks, picture.labels, picture.scores, strict=True)
    ]
    data = COCO()
    data.dataset = {
        "info": {},
        "images": [dict(id=10 + index, height=32, width=32) for index in range(len(true))],
        "categories": [dict(id=label, name=str(label)) for label in (1, 2, 3, 4)],
        "annotations": [entry | dict(id=100 + i) for i, entry in enumerate(annotations)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        data.createIndex()
        evaluation = COCOeval(data, data.loadRes(results), "segm")
        evaluation.params.iouThrs = thresholds
        small, large = areas
        evaluation.params.areaRng = [[0, 1e10], [0, small], [small, large], [large, 1e10]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = "AP AP50 AP75 AP_small AP_medium AP_large AR1 AR10 AR AR_small AR_medium AR_large"
    return dict(zip(names.split(), evaluation.stats, strict=True))


# --- by hand ----------------------------------------------------------------------------------


def test_thresholds_are_exact() -> None:
    assert len(IOU_THRESHOLDS) == 16
    assert IOU_THRESHOLDS[0] == 0.2
    assert 0.5 in IOU_THRESHOLDS
    assert IOU_THRESHOLDS[-1] == 0.95
    np.testing.assert_allclose(IOU_THRESHOLDS, np.linspace(0.2, 0.95, 16), rtol=1e-12)


def test_overlap_of_one_half_is_right_up_to_the_threshold_of_one_half() -> None:
    true = [objects((box(0, 0, 4, 8), 1))]
    given = [found((box(0, 0, 4, 4), 1, 0.9))]
    scores = detection_scores(given, true, resamples=5)
    assert scores.AP.value == pytest.approx(7 / 16)  # 0.20, 0.25, … 0.50
    assert scores.AR.value == pytest.approx(7 / 16)
    assert scores.AP50 is not None
    assert scores.AP50.value == pytest.approx(1)
    assert scores.AP75 is not None
    assert scores.AP75.value == 0


def test_precision_and_recall_by_hand() -> None:
    # By falling score: right, wrong, right; one of three objects is missed.
    true = [objects((box(0, 0, 5, 5), 1), (box(10, 0, 5, 5), 1)), objects((box(0, 0, 5, 5), 1))]
    given = [
        found((box(0, 0, 5, 5), 1, 0.9), (box(20, 20, 5, 5), 1, 0.8)),
        found((box(0, 0, 5, 5), 1, 0.7)),
    ]
    scores = detection_scores(given, true, thresholds=[0.5], resamples=5)
    assert scores.AR.value == pytest.approx(2 / 3)
    # Of the recalls 0, 0.01, … 1: 34 up to 1/3 at precision 1, 33 up to 2/3 at 2/3, the rest at 0.
    assert scores.AP.value == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)
    assert scores.AP50 == scores.AP
    assert scores.AP75 is None
    assert scores.AP.count == 2


def test_sizes_without_objects_are_none_and_others_count_their_pictures() -> None:
    true = [objects((box(0, 0, 5, 5), 1)), objects((box(0, 0, 5, 5), 1), (box(0, 0, 9, 9), 2))]
    given = [found((mask, label, 0.5)) for mask, label in ((box(0, 0, 5, 5), 1),) * 2]
    scores = detection_scores(given, true, areas=AREAS, resamples=5)
    assert scores.AP_small is not None
    assert scores.AP_medium is not None
    assert scores.AP_large is None
    assert scores.AR_large is None
    assert (scores.AP.count, scores.AP_small.count, scores.AP_medium.count) == (2, 2, 1)
    assert scores.AP_small.value == pytest.approx(1)
    assert scores.AP_medium.value == 0
    assert scores.AP.value == pytest.approx(0.5)
    everything_small = detection_scores(given, true, resamples=5)
    assert everything_small.AP_medium is None


def test_an_object_at_a_border_counts_on_both_sides() -> None:
    true = [objects((box(0, 0, 5, 6), 1))]
    scores = detection_scores([found()], true, areas=AREAS, resamples=5)
    assert scores.AP_small is not None
    assert scores.AP_medium is not None
    assert scores.AP_small.count == scores.AP_medium.count == 1


def test_only_the_highest_scores_count_beyond_the_maximum() -> None:
    true = [objects((box(0, 0, 5, 5), 1))]
    given = [found((box(20, 20, 5, 5), 1, 0.9), (box(0, 0, 5, 5), 1, 0.8))]
    assert detection_scores(given, true, max_detections=1, resamples=5).AR.value == 0
    assert detection_scores(given, true, max_detections=2, resamples=5).AR.value == 1


# --- beside pycocotools on plain entries ------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("thresholds", "areas"), [(IOU_THRESHOLDS, AREAS), ((0.5, 0.75), (32.0**2, 96.0**2))]
)
def test_scores_agree_with_pycocotools(
    seed: int, thresholds: tuple[float, ...], areas: tuple[float, float]
) -> None:
    given, true = scenes(12, seed)
    expected = reference(given, true, np.array(thresholds), areas)
    scores = asdict(detection_scores(given, true, thresholds=thresholds, areas=areas, resamples=5))
    assert 0 < expected["AP"] < 1
    for name, estimate in scores.items():
        if expected[name] == -1:
            assert estimate is None
        else:
            assert estimate["value"] == pytest.approx(expected[name], abs=1e-12)


def test_intervals_agree_with_pictures_that_are_repeated() -> None:
    given, true = scenes(8, seed=1)
    scores = detection_scores(given, true, areas=AREAS, resamples=20, seed=3)
    random = np.random.default_rng(3)
    draws = []
    for _ in range(20):
        drawn = random.integers(8, size=8)
        repeated = [given[i] for i in drawn], [true[i] for i in drawn]
        draws.append(reference(*repeated, np.array(IOU_THRESHOLDS), AREAS))
    for name in ("AP", "AR", "AP_small", "AR_medium", "AP_large"):
        values = [draw[name] for draw in draws if draw[name] > -1]
        interval = getattr(scores, name)
        low, high = np.percentile(values, [2.5, 97.5])
        assert (interval.low, interval.high) == (pytest.approx(low), pytest.approx(high))


# --- laws -------------------------------------------------------------------------------------


def test_scores_range_from_nothing_to_perfect() -> None:
    _, true = scenes(10, seed=4)
    perfect = [
        Detections(picture.masks, picture.labels, torch.rand(len(picture.labels)))
        for picture in true
    ]
    inverted = [replace(picture, masks=~picture.masks) for picture in perfect]
    nothing = [replace(picture, masks=picture.masks & False) for picture in perfect]
    best = asdict(detection_scores(perfect, true, areas=AREAS, resamples=10))
    assert {round(entry["value"], 12) for entry in best.values()} == {1}
    assert {round(entry["low"], 12) for entry in best.values()} == {1}
    for wrong in (inverted, nothing, [found()] * 10):
        worst = asdict(detection_scores(wrong, true, areas=AREAS, resamples=10))
        assert {entry["value"] for entry in worst.values()} == {0}


def test_interval_depends_on_the_seed_and_the_figure_does_not() -> None:
    given, true = scenes(10, seed=2)

    def scores(**options: Any) -> DetectionScores:
        return detection_scores(given, true, areas=AREAS, resamples=50, **options)

    one, same, other = scores(seed=1), scores(seed=1), scores(seed=2)
    assert one == same
    assert one.AP.value == other.AP.value
    assert (one.AP.low, one.AP.high) != (other.AP.low, other.AP.high)
    assert one.AP.low < one.AP.value < one.AP.high
    narrow = scores(seed=1, confidence=0.5)
    assert one.AP.low < narrow.AP.low < narrow.AP.high < one.AP.high


def test_nothing_is_printed_and_nothing_changed(capsys: pytest.CaptureFixture[str]) -> None:
    given, true = scenes(3, seed=6)
    before = [picture.masks.clone() for picture in given]
    detection_scores(given, true, resamples=2)
    assert capsys.readouterr().out == ""
    assert all(torch.equal(one, other.masks) for one, other in zip(before, given, strict=True))


# --- errors -----------------------------------------------------------------------------------

TRUE = objects((box(0, 0, 5, 5), 1))
GIVEN = found((box(0, 0, 5, 5), 1, 0.5))


@pytest.mark.parametrize(
    ("given", "true", "options", "error", "message"),
    [
        ([GIVEN], [TRUE, TRUE], {}, ValueError, "1 images with detections, 2 with objects"),
        ([found()], [objects()], {}, ValueError, "there is no object in any of 1 images"),
        ([], [], {}, ValueError, "there is no object in any of 0 images"),
        (
            [GIVEN, replace(GIVEN, labels=torch.zeros(2))],
            [TRUE, TRUE],
            {},
            ValueError,
            r"image 1: detections need masks \[N, H, W\] and labels \[N\], not \(1, 32, 32\)",
        ),
        (
            [GIVEN],
            [replace(TRUE, masks=TRUE.masks[0])],
            {},
            ValueError,
            r"image 0: objects need masks \[N, H, W\]",
        ),
        (
            [GIVEN],
            [replace(TRUE, masks=TRUE.masks.float())],
            {},
            TypeError,
            "image 0: masks of objects must be bool, not torch.float32",
        ),
        (
            [replace(GIVEN, scores=torch.zeros(3))],
            [TRUE],
            {},
            ValueError,
            "image 0: 1 detections need as many finite scores",
        ),
        (
            [replace(GIVEN, scores=torch.tensor([math.nan]))],
            [TRUE],
            {},
            ValueError,
            "need as many finite scores",
        ),
        (
            [replace(GIVEN, masks=GIVEN.masks[:, :16])],
            [TRUE],
            {},
            ValueError,
            r"image 0: masks of detections are \(16, 32\), those of objects \(32, 32\)",
        ),
        (
            [GIVEN],
            [replace(TRUE, masks=TRUE.masks & False)],
            {},
            ValueError,
            r"image 0: the masks of the objects \[0\] are empty",
        ),
        ([GIVEN], [TRUE], dict(thresholds=[]), ValueError, r"thresholds=\[\]: they must be"),
        ([GIVEN], [TRUE], dict(thresholds=[50]), ValueError, r"thresholds=\[50\]: they must be"),
        ([GIVEN], [TRUE], dict(areas=(9.0, 4.0)), ValueError, "must be two ascending limits"),
        ([GIVEN], [TRUE], dict(max_detections=0), ValueError, "max_detections=0: it must be at"),
        ([GIVEN], [TRUE], dict(resamples=0), ValueError, "resamples=0: it must be at least 1"),
        ([GIVEN], [TRUE], dict(confidence=95), ValueError, "confidence=95: it must be between"),
    ],
)
def test_errors_say_what_was_seen(
    given: list[Detections],
    true: list[Objects],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        detection_scores(given, true, **options)


def test_a_size_that_no_draw_holds_is_an_error() -> None:
    true = [objects((box(0, 0, 20, 20), 1)), TRUE, TRUE]
    seed = next(i for i in range(99) if 0 not in np.random.default_rng(i).integers(3, size=3))
    with pytest.raises(
        ValueError, match=r"none of 1 bootstrap samples has objects for A[PR]_large: raise"
    ):
        detection_scores([found()] * 3, true, areas=AREAS, resamples=1, seed=seed)
