"""Whether a map is high where the thing that it explains is: pointing, segmentation, masks.

For those who have maps beside images with known places of things; `statistics.estimate` makes
figures with intervals of what comes out, `detection` scores the masks of several things.
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
    """The pointing game: whether the highest value lies in the right place.

    Args:
        maps: `[B, H, W]` of images, or `[B, N]` of tokens or regions.
        right: bool, of the same shape: the places of the thing that is explained.
        tolerance: how many pixels beside it still count, in Euclidean distance; of images only.
            The paper allows 15.

    Returns:
        `[B]`, float64, in 0 … 1, on the CPU: 1 for a hit, 0 for a miss. Where several places share
        the highest value, the share of them that is right: a constant map scores what chance does.

    Raises:
        ValueError: if shapes differ, a map is not finite, an example has no right place, or there
            is a tolerance without images.
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
    """How well thresholded maps cover a foreground: counts of pixels, for each image.

    `correct`, `total`: `[B]`, pixels on the right side, and all. `intersection`, `union`: `[B, 2]`,
    of map and truth, for background and foreground. `average_precision`: `[B]`, in 0 … 1.
    `options` go to `statistics.estimate` (`confidence`, `resamples`, `seed`).
    """

    correct: Tensor
    total: Tensor
    intersection: Tensor
    union: Tensor
    average_precision: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Segmentation]) -> Segmentation:
        """Those of several batches as one; the images of each may have a size of their own."""
        return cls(*(torch.cat([getattr(p, field.name) for p in parts]) for field in fields(cls)))

    def pixel_accuracy(self, **options: Any) -> Estimate:
        """The share of all pixels that are on the right side, in 0 … 1."""
        return estimate(self.correct, self.total, statistic=ratio, **options)

    def mean_iou(self, **options: Any) -> Estimate:
        """Intersection over union of the whole data set, mean of background and foreground.

        In 0 … 1. A background that neither maps nor truth have anywhere is left out of the mean.
        """
        counts = (*self.intersection.unbind(1), *self.union.unbind(1))
        return estimate(*counts, statistic=_mean_iou, **options)

    def mean_average_precision(self, **options: Any) -> Estimate:
        """The mean over images of the average precision of the maps' values, in 0 … 1."""
        return estimate(self.average_precision, **options)


def segment(
    maps: Tensor, truth: Tensor, *, threshold: Literal["mean"] | float | Tensor = "mean"
) -> Segmentation:
    """Compare maps as segmentations with the true foreground.

    Args:
        maps: `[B, H, W]`, at the resolution of the truth.
        truth: bool, `[B, H, W]`: the pixels of the foreground.
        threshold: what a pixel must exceed to be called foreground: each map's own mean, one value
            for all maps, or one for each, `[B]`.

    Returns:
        A `Segmentation`, on the CPU. Average precision takes no threshold: each value of the map is
        a pixel's score, equal values count as one; it is computed in single precision.

    Raises:
        ValueError: if shapes differ, a map is not finite, an image has no foreground, or the
            threshold is none of the three.
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
    """Masks of things from their maps: Otsu's threshold for each map, then resized bilinearly.

    Args:
        maps: `[Q, h, w]`, at the resolution of the model's features.
        size: height and width of the masks, in pixels.
        level: what the resized mask, 0 … 1, must exceed. 0, as the authors have it, takes every
            pixel that a foreground cell reaches; 0.5 keeps the cells' own size.

    Returns:
        bool, `[Q, height, width]`, on the CPU. A constant map has no foreground.

    Raises:
        ValueError: if `maps` has no three axes, one is not finite, or `level` is not in 0 … 1.

    Source: N. Otsu, *A threshold selection method from gray-level histograms*, 1979; H. Chefer et
    al., *Generic Attention-model Explainability*, ICCV 2021, section 5.

    Example:
        >>> otsu_masks(torch.tensor([[[0.1, 0.9], [0.2, 0.8]]]), (1, 4), level=0.5)
        tensor([[[False, False,  True,  True]]])
    """
    if maps.ndim != 3:
        raise ValueError(f"maps must be [Q, h, w], not {tuple(maps.shape)}")
    if not 0 <= level < 1:
        raise ValueError(f"level={level}: it must be in 0 … 1, 1 left out")
    maps = maps.detach().cpu().double()
    _check_finite(maps)
    otsu = needed("skimage.filters").threshold_otsu
    masks = torch.zeros(maps.shape)
    for mask, values in zip(masks, maps, strict=True):
        least, most = values.aminmax()
        if least == most:
            continue
        # In 256 levels, as OpenCV does it: of whole numbers the threshold is the last level of the
        # background; of others it would be the middle of a bin whose upper half is background too.
        levels = ((values - least) / (most - least) * 255).byte()
        mask.copy_(levels > int(otsu(levels.numpy())))
    return F.interpolate(masks[:, None], size, mode="bilinear", align_corners=False)[:, 0] > level


def _checked(
    maps: Tensor, marked: Tensor, name: str, *, ranks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Both on the CPU, without history; each example has a finite map and a marked place."""
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
        # Above its least value a constant map is 0 and so is its mean, without rounding.
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
    """Scores in 0 … 1 of the same order: torchmetrics would take a sigmoid, which makes ties."""
    ranks = np.unique(values.double().numpy(), return_inverse=True)[1].ravel()
    return torch.from_numpy(ranks / ranks.size)


def _mean_iou(*counts: NDArray[np.float64], axis: int = -1) -> Any:
    sums = np.stack([count.sum(axis) for count in counts])
    intersection, union = sums[:2], sums[2:]
    present = union > 0
    shares = np.divide(intersection, union, out=np.zeros_like(union), where=present)
    return shares.sum(0) / present.sum(0)
