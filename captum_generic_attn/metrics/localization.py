"""Localisation metrics: the pointing game, segmentation, and masks from maps.

They compare maps with annotated places in images. `statistics.estimate` aggregates their values
with confidence intervals; `detection` scores masks of several objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from captum_generic_attn.extras import needed
from captum_generic_attn.metrics.statistics import Estimate, estimate, ratio


def pointing(maps: Tensor, right: Tensor, *, tolerance: float = 0) -> Tensor:
    """The pointing game: whether the highest value lies in the annotated place.

    Args:
        maps: `[B, H, W]` for images, or `[B, N]` for tokens or regions.
        right: bool, in the same shape: the places of the explained object.
        tolerance: the Euclidean distance in pixels up to which a miss counts as a hit; for images
            only. The paper uses 15.

    Returns:
        `[B]`, float64, in 0 … 1, on the CPU: 1 for a hit, 0 for a miss. If several places have
        the highest value, the fraction of them that are hits: a constant map scores at chance
        level.

    Raises:
        ValueError: if shapes differ, a map is not finite, an example has no annotated place, or
            a tolerance is given for maps that are not images.
        TypeError: if `right` is not bool.

    Source: J. Zhang et al., *Top-down neural attention by excitation backprop*, ECCV 2016, 4.1.

    Example:
        >>> right = torch.tensor([[True, False, False], [True, False, False]])
        >>> pointing(torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.1, 0.1]]), right)
        tensor([1.0000, 0.3333], dtype=torch.float64)
    """
    maps, right = _checked(maps, right, "right", ranks=(2, 3))
    if tolerance:
        if maps.ndim != 3 or not tolerance > 0:
            raise ValueError(
                f"tolerance={tolerance} with maps {tuple(maps.shape)}: a tolerance is a positive "
                "number of pixels, for maps [B, H, W]; leave it out"
            )
        distance = needed("scipy.ndimage").distance_transform_edt
        away = np.stack([distance(image) for image in (~right).numpy()])
        right = torch.from_numpy(away <= tolerance)
    values = maps.flatten(1)
    highest = values == values.amax(1, keepdim=True)
    return (highest & right.flatten(1)).sum(1).double() / highest.sum(1)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """How well thresholded maps segment a foreground: pixel counts per image.

    `correct` and `total`, `[B]`, count the correctly classified pixels and all pixels.
    `intersection` and `union`, `[B, 2]`, are those of map and truth, for background and foreground.
    `average_precision`, `[B]`, is in 0 … 1. The `options` of the methods are those of
    `statistics.estimate` (`confidence`, `resamples`, `seed`).
    """

    correct: Tensor
    total: Tensor
    intersection: Tensor
    union: Tensor
    average_precision: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Segmentation]) -> Segmentation:
        """Concatenate several batches, whose images may have different sizes."""
        return cls(*(torch.cat([getattr(p, field.name) for p in parts]) for field in fields(cls)))

    def pixel_accuracy(self, **options: Any) -> Estimate:
        """The fraction of correctly classified pixels, in 0 … 1."""
        return estimate(self.correct, self.total, statistic=ratio, **options)

    def mean_iou(self, **options: Any) -> Estimate:
        """Intersection over union (IoU) on the whole data set, averaged over background and
        foreground.

        It is in 0 … 1. If neither maps nor truth have any background, it is the foreground's IoU.
        """
        counts = (*self.intersection.unbind(1), *self.union.unbind(1))
        return estimate(*counts, statistic=_mean_iou, **options)

    def mean_average_precision(self, **options: Any) -> Estimate:
        """The average precision of the maps' values, averaged over images, in 0 … 1."""
        return estimate(self.average_precision, **options)


def segment(
    maps: Tensor, truth: Tensor, *, threshold: Literal["mean"] | float | Tensor = "mean"
) -> Segmentation:
    """Compare maps as segmentations with the true foreground.

    Args:
        maps: `[B, H, W]`, at the resolution of the truth.
        truth: bool, `[B, H, W]`: the pixels of the foreground.
        threshold: pixels above it are foreground: the mean of each map, one value for all maps, or
            one value per map, `[B]`.

    Returns:
        A `Segmentation`, on the CPU. Average precision needs no threshold: the values of the
        map are the scores of the pixels, and equal values count as one threshold. It is
        computed in single precision.

    Raises:
        ValueError: if shapes differ, a map is not finite, an image has no foreground, or the
            threshold has another form.
        TypeError: if `truth` is not bool.

    Source: H. Chefer et al., *Generic Attention-model Explainability*, ICCV 2021, section 5, with
    the protocol of *Transformer Interpretability Beyond Attention Visualization*, CVPR 2021.

    Example:
        >>> maps = torch.tensor([[[4.0, 3.0], [0.0, 1.0]]])
        >>> found = segment(maps, torch.tensor([[[True, False], [False, False]]]))
        >>> found.pixel_accuracy().value, found.mean_iou().value
        (0.75, 0.5833333)
        >>> found.mean_average_precision().value
        1.0
    """
    maps, truth = _checked(maps, truth, "truth", ranks=(3,))
    foreground = _foreground(maps, threshold)
    pairs = [(~foreground, ~truth), (foreground, truth)]
    precision = needed("torchmetrics.functional.classification").binary_average_precision
    return Segmentation(
        correct=(foreground == truth).sum((1, 2)),
        total=torch.full((len(maps),), maps.shape[1] * maps.shape[2]),
        intersection=torch.stack([(one & other).sum((1, 2)) for one, other in pairs], 1),
        union=torch.stack([(one | other).sum((1, 2)) for one, other in pairs], 1),
        average_precision=torch.tensor(
            [
                float(precision(_ranks(values), right.flatten().long()))
                for values, right in zip(maps, truth, strict=True)
            ],
            dtype=torch.float64,
        ),
    )


def otsu_masks(maps: Tensor, size: tuple[int, int], *, level: float = 0.0) -> Tensor:
    """Convert maps of objects to masks: Otsu's threshold per map, then bilinear resizing.

    Args:
        maps: `[Q, h, w]`, at the resolution of the model's features.
        size: height and width of the masks, in pixels.
        level: the resized mask, in 0 … 1, is true above this level. 0, as in the authors' code,
            includes every pixel that a foreground cell influences; 0.5 preserves the size of the
            cells.

    Returns:
        bool, `[Q, height, width]`, on the CPU. A constant map has no foreground.

    Raises:
        ValueError: if `maps` does not have three axes, a map is not finite, or `level` is below 0,
            or is 1 or more.

    Source: N. Otsu, *A threshold selection method from gray-level histograms*, 1979; H. Chefer et
    al., *Generic Attention-model Explainability*, ICCV 2021, section 5.

    Example:
        >>> otsu_masks(torch.tensor([[[0.1, 0.9], [0.2, 0.8]]]), (1, 4), level=0.5)
        tensor([[[False, False,  True,  True]]])
    """
    if maps.ndim != 3:
        raise ValueError(f"maps must be [Q, h, w], not {tuple(maps.shape)}")
    if not 0 <= level < 1:
        raise ValueError(f"level={level}: it must be at least 0 and below 1")
    maps = maps.detach().cpu().double()
    _check_finite(maps)
    otsu = needed("skimage.filters").threshold_otsu
    masks = torch.zeros(maps.shape)
    for mask, values in zip(masks, maps, strict=True):
        least, most = values.aminmax()
        if least == most:
            continue
        # Quantize to 256 levels, as OpenCV does. For integers the threshold is the last level of
        # the background; for floats it would be the centre of a bin whose upper half is background
        # too.
        levels = ((values - least) / (most - least) * 255).byte()
        mask.copy_(levels > int(otsu(levels.numpy())))
    return F.interpolate(masks[:, None], size, mode="bilinear", align_corners=False)[:, 0] > level


def _checked(
    maps: Tensor, marked: Tensor, name: str, *, ranks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Check that each example has a finite map and a marked place; both detached, on the CPU."""
    if maps.ndim not in ranks or marked.shape != maps.shape:
        forms = " or ".join({2: "[B, N]", 3: "[B, H, W]"}[rank] for rank in ranks)
        seen = f"maps {tuple(maps.shape)} and {name} {tuple(marked.shape)}"
        raise ValueError(f"{seen} must both be {forms}")
    if marked.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, not {marked.dtype}: compare it, such as {name} > 0")
    maps, marked = maps.detach().cpu(), marked.cpu()
    _check_finite(maps)
    empty = (~marked.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{name} marks no place in {_left_out(empty)}")
    return maps, marked


def _check_finite(maps: Tensor) -> None:
    broken = (~maps.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"there are NaN or infinite values in {_left_out(broken)}")


def _left_out(examples: Sequence[int]) -> str:
    return f"the examples {list(examples)}: leave them out, and say how many"


def _foreground(maps: Tensor, threshold: object) -> Tensor:
    if isinstance(threshold, str) and threshold == "mean":
        # Subtract the minimum: then a constant map and its mean are exactly 0.
        above = maps.double() - maps.double().amin((1, 2), keepdim=True)
        return above > above.mean((1, 2), keepdim=True)
    if isinstance(threshold, Tensor) and threshold.shape == maps.shape[:1]:
        limits = threshold.detach().cpu().double()
    elif isinstance(threshold, (int, float)):
        limits = torch.full(maps.shape[:1], float(threshold), dtype=torch.float64)
    else:
        seen = tuple(threshold.shape) if isinstance(threshold, Tensor) else repr(threshold)
        raise ValueError(f"threshold={seen}: it must be 'mean', a number or [{len(maps)}] numbers")
    if limits.isnan().any():
        raise ValueError("threshold holds NaN: no value exceeds it")
    return maps.double() > limits[:, None, None]


def _ranks(values: Tensor) -> Tensor:
    """Ranks in 0 … 1: torchmetrics would apply a sigmoid to other scores, which creates ties."""
    ranks = np.unique(values.double().numpy(), return_inverse=True)[1].ravel()
    return torch.from_numpy(ranks / ranks.size)


def _mean_iou(*counts: NDArray[np.float64], axis: int = -1) -> Any:
    sums = np.stack([count.sum(axis) for count in counts])
    intersection, union = sums[:2], sums[2:]
    present = union > 0
    shares = np.divide(intersection, union, out=np.zeros_like(union), where=present)
    return shares.sum(0) / present.sum(0)
