"""COCO's average precision and recall of masks with confidence intervals, for maps of objects.

The inputs are a mask of each detected object (`localization.otsu_masks` converts maps to masks) and
the true masks. pycocotools does the matching, in memory; the bootstrap resamples images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_generic_attn.extras import needed
from captum_generic_attn.metrics.statistics import Estimate

IOU_THRESHOLDS = tuple(percent / 100 for percent in range(20, 100, 5))
"""The thresholds of overlap (IoU) in the paper's protocol: 0.20, 0.25, … 0.95."""

SIZES = ("", "small", "medium", "large")  # "" stands for all objects


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections in one image: `masks` bool `[Q, H, W]`, `labels` `[Q]`, `scores` `[Q]`."""

    masks: Tensor
    labels: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Objects:
    """The true objects in one image: `masks` bool `[G, H, W]`, `labels` `[G]`; `G` may be 0."""

    masks: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DetectionScores:
    """Average precision (AP) and average recall (AR) in 0 … 1, for all objects and by object size.

    They are means over labels and thresholds, or at one threshold (`AP50`, `AP75`; `None` if it was
    not among the thresholds). A size without objects has `None`. An estimate's `count` is the
    number of images with such an object.
    """

    AP: Estimate
    AP50: Estimate | None
    AP75: Estimate | None
    AP_small: Estimate | None
    AP_medium: Estimate | None
    AP_large: Estimate | None
    AR: Estimate
    AR_small: Estimate | None
    AR_medium: Estimate | None
    AR_large: Estimate | None


def detection_scores(
    found: Sequence[Detections],
    truth: Sequence[Objects],
    *,
    thresholds: Sequence[float] = IOU_THRESHOLDS,
    areas: tuple[float, float] = (32.0**2, 96.0**2),
    max_detections: int = 100,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> DetectionScores:
    """COCO's mask scores, with percentile bootstrap intervals over images.

    Args:
        found: the detections of each image. Labels that no object has are ignored, as in COCO.
        truth: the true objects of each image, with masks of the same size as the detections'.
        thresholds: overlaps (intersection over union, above 0 and up to 1) from which a detection
            is correct.
        areas: the limits in pixels between small, medium and large objects; by default COCO's. An
            object at a limit counts in both classes, as in COCO.
        max_detections: the maximum number of detections per label and image, highest scores first.
        confidence: confidence level of the intervals, in 0 … 1.
        resamples: number of bootstrap samples of the images. A sample without an object of some
            size is skipped for that size.
        seed: seed of the bootstrap.

    Returns:
        `DetectionScores`.

    Raises:
        ValueError: if shapes or lengths differ, a score is not finite, a true mask is empty, there
            is no object at all, or an option is out of range.
        TypeError: if masks are not bool.

    Source: T.-Y. Lin et al., *Microsoft COCO*, ECCV 2014, and its evaluation code; thresholds of
    H. Chefer et al., *Generic Attention-model Explainability*, ICCV 2021, section 5.

    Example:
        >>> mask, label = torch.ones(1, 4, 4, dtype=torch.bool), torch.tensor([7])
        >>> found = Detections(mask, label, torch.tensor([0.9]))
        >>> scores = detection_scores([found], [Objects(mask, label)], resamples=20)
        >>> print(scores.AP, scores.AP_large)
        1 (1 to 1, n = 1) None
    """
    _check_options(thresholds, areas, max_detections, confidence, resamples)
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} images with detections, {len(truth)} with objects")
    for image, (detections, objects) in enumerate(zip(found, truth, strict=True)):
        _check(image, detections, objects)
    if not any(len(objects.labels) for objects in truth):
        raise ValueError(f"there is no object in any of {len(truth)} images")
    ranges = [(0.0, 1e10), (0.0, areas[0]), areas, (areas[1], 1e10)]
    with redirect_stdout(io.StringIO()):
        evaluator = needed("pycocotools.cocoeval").COCOeval(*_coco(found, truth), iouType="segm")
        evaluator.params.iouThrs = np.array(thresholds)
        evaluator.params.areaRng = [list(ends) for ends in ranges]
        evaluator.params.maxDets = [max_detections]
        evaluator.evaluate()
        matches = np.array(evaluator.evalImgs, dtype=object).reshape(-1, len(ranges), len(truth))
        values = _figures(evaluator)
        draws: dict[str, list[float]] = {name: [] for name in values}
        random = np.random.default_rng(seed)
        for _ in range(resamples):
            drawn = random.integers(len(truth), size=len(truth))
            evaluator.evalImgs = matches[:, :, drawn].ravel().tolist()
            for name, value in _figures(evaluator).items():
                draws[name].append(value)
    counts = {size: _images_with(truth, *ends) for size, ends in zip(SIZES, ranges, strict=True)}
    estimates: dict[str, Any] = {
        name: _estimate(name, value, draws[name], counts[name.partition("_")[2]], confidence)
        for name, value in values.items()
    }
    return DetectionScores(**estimates)


def _check_options(
    thresholds: Sequence[float], areas: tuple[float, float], max_detections: int,
    confidence: float, resamples: int,
) -> None:  # fmt: skip
    if not thresholds or not all(0 < threshold <= 1 for threshold in thresholds):
        raise ValueError(f"thresholds={list(thresholds)}: they must be above 0 and at most 1")
    if not 0 < areas[0] < areas[1]:
        raise ValueError(f"areas={areas}: they must be two ascending limits, in pixels")
    for name, number in (("max_detections", max_detections), ("resamples", resamples)):
        if number < 1:
            raise ValueError(f"{name}={number}: it must be at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: it must be between 0 and 1")


def _figures(evaluator: Any) -> dict[str, float]:
    """The scores from the evaluator's current matches; NaN where there is nothing to score."""
    evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    at = evaluator.params.iouThrs
    figures = {
        f"AP{percent}": _mean(precision[..., 0, 0][np.isclose(at, percent / 100)])
        for percent in (50, 75)
    }
    for area, size in enumerate(SIZES):
        ending = f"_{size}" if size else ""
        figures[f"AP{ending}"] = _mean(precision[..., area, 0])
        figures[f"AR{ending}"] = _mean(recall[..., area, 0])
    return figures


def _mean(entries: NDArray[np.float64]) -> float:
    # pycocotools marks labels without objects by -1.
    scored = entries[entries > -1]
    return float(scored.mean()) if scored.size else math.nan


def _estimate(
    name: str, value: float, draws: Sequence[float], count: int, confidence: float
) -> Estimate | None:
    if math.isnan(value):
        return None
    told = [draw for draw in draws if not math.isnan(draw)]
    if not told:
        raise ValueError(
            f"none of {len(draws)} bootstrap samples has objects for {name}: raise resamples"
        )
    low, high = np.quantile(told, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), count)


def _images_with(truth: Iterable[Objects], least: float, most: float) -> int:
    areas = (objects.masks.sum((1, 2)) for objects in truth)
    return sum(bool(((least <= area) & (area <= most)).any()) for area in areas)


def _coco(found: Sequence[Detections], truth: Sequence[Objects]) -> tuple[Any, Any]:
    """Convert truth and detections to data sets of pycocotools."""
    labels = sorted({int(label) for objects in truth for label in objects.labels})
    common = {
        "images": [
            {"id": image, "height": objects.masks.shape[1], "width": objects.masks.shape[2]}
            for image, objects in enumerate(truth)
        ],
        "categories": [{"id": label} for label in labels],
    }
    known, detected = (needed("pycocotools.coco").COCO() for _ in range(2))
    for coco, images in ((known, truth), (detected, found)):
        coco.dataset = {**common, "annotations": _annotations(images)}
        coco.createIndex()
    return known, detected


def _annotations(images: Sequence[Detections | Objects]) -> list[dict[str, Any]]:
    encode = needed("pycocotools.mask").encode
    entries: list[dict[str, Any]] = []
    for image, content in enumerate(images):
        scores = content.scores if isinstance(content, Detections) else content.labels  # unused
        for index, mask in enumerate(content.masks.cpu().numpy()):
            entries.append(
                {
                    # In pycocotools, 0 means "not matched", so ids begin at 1.
                    "id": len(entries) + 1,
                    "image_id": image,
                    "category_id": int(content.labels[index]),
                    "segmentation": encode(np.asfortranarray(mask, dtype=np.uint8)),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "score": float(scores[index]),
                }
            )
    return entries


def _check(image: int, found: Detections, truth: Objects) -> None:
    for name, content in (("detections", found), ("objects", truth)):
        masks, labels = content.masks, content.labels
        if masks.ndim != 3 or labels.shape != masks.shape[:1]:
            raise ValueError(
                f"image {image}: {name} need masks [N, H, W] and labels [N], not "
                f"{tuple(masks.shape)} and {tuple(labels.shape)}"
            )
        if masks.dtype != torch.bool:
            raise TypeError(f"image {image}: masks of {name} must be bool, not {masks.dtype}")
    if found.scores.shape != found.labels.shape or not found.scores.isfinite().all():
        raise ValueError(
            f"image {image}: {len(found.labels)} detections need as many finite scores"
        )
    if found.masks.shape[1:] != truth.masks.shape[1:]:
        raise ValueError(
            f"image {image}: masks of detections are {tuple(found.masks.shape[1:])}, those of "
            f"objects {tuple(truth.masks.shape[1:])}; resize one to the size of the other"
        )
    empty = (~truth.masks.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"image {image}: the masks of the objects {empty} are empty; remove these objects"
        )
