"""Crop boxes: the part of an image that a model saw, and heat maps of that part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from captum_generic_attn.files.images import Box

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def centre_crop(width: int, height: int, share: float = 1.0) -> Box:
    """The part of an image that the usual preprocessing of image classifiers keeps.

    That preprocessing scales the shorter side to a fixed length and crops a square at the centre.

    Args:
        width: width of the image in pixels.
        height: height of the image in pixels.
        share: the side of the square divided by the scaled shorter side: timm's `crop_pct`, or 224
            / 256 for `Resize(256)` and `CenterCrop(224)`.

    Returns:
        (left, top, right, bottom) in pixels of the image, for `crop_box=` of `overlay` and of the
        figures.

    Raises:
        ValueError: `share` is not above 0 and at most 1, or a side of the image is below 1 pixel.

    Example:
        >>> from captum_generic_attn.visualization import centre_crop
        >>> centre_crop(1000, 700)
        (150.0, 0.0, 850.0, 700.0)
        >>> centre_crop(1000, 700, share=0.5)
        (325.0, 175.0, 675.0, 525.0)
    """
    if not (0 < share <= 1 and width > 0 and height > 0):
        raise ValueError(
            f"width and height must be at least 1 pixel, share above 0 and at most 1, not {width}, "
            f"{height} and {share}"
        )
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def checked_box(box: ArrayLike) -> Box:
    """Check a box: four finite numbers, left at most right, and top at most bottom.

    Raises:
        ValueError: it is no such box.
    """
    values = np.asarray(box, dtype=np.float64)
    if values.shape != (4,) or not np.isfinite(values).all() or (values[2:] < values[:2]).any():
        raise ValueError(
            f"a box is (left, top, right, bottom) in pixels, not {np.asarray(box).tolist()}"
        )
    left, top, right, bottom = values.tolist()
    return left, top, right, bottom


def checked_boxes(boxes: ArrayLike, count: int) -> list[Box]:
    """One box for each of `count` images, given one for each or one for all.

    Raises:
        ValueError: they have another shape, or one of them is no box.
    """
    given = np.asarray(boxes, dtype=np.float64)
    if given.shape not in {(4,), (count, 4)}:
        raise ValueError(
            f"a crop box is (left, top, right, bottom) in pixels, one for all {count} images or "
            f"one for each, not {list(given.shape)} numbers"
        )
    return [checked_box(box) for box in np.broadcast_to(given, (count, 4))]


def spread(
    heat: NDArray[np.float64], crop_box: ArrayLike, height: int, width: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Extend a map of a crop to the whole image, and return where the crop is.

    The map is scaled bilinearly; where it shrinks, values are averaged.

    Args:
        heat: the map, `[h, w]`.
        crop_box: (left, top, right, bottom) in pixels of the image. It may exceed the image where
            the preprocessing padded it.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        The map `[height, width]`, 0 outside of the crop, and a mask `[height, width]` of the pixels
        whose centre is in the crop.

    Raises:
        ValueError: `crop_box` is no box, or contains no pixel of the image.
    """
    left, top, right, bottom = checked_box(crop_box)
    rows, in_rows = _weights(heat.shape[0], top, bottom, height)
    columns, in_columns = _weights(heat.shape[1], left, right, width)
    seen = in_rows[:, None] & in_columns
    if not seen.any():
        raise ValueError(
            f"the crop box {(left, top, right, bottom)} contains no pixel of the image, which is "
            f"{width} × {height} pixels"
        )
    return rows @ heat @ columns.T, seen


def _weights(
    count: int, start: float, end: float, size: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Bilinear weights along one axis.

    Returns:
        `[size, count]`: the weights of `count` values between `start` and `end` for each of `size`
        pixels, 0 outside; and `[size]`: whether the pixel is inside.
    """
    middles = np.arange(size) + 0.5
    inside = (middles > start) & (middles < end)
    step = (end - start) / count if end > start else 1.0
    distance = np.abs((middles[:, None] - start) / step - (np.arange(count) + 0.5))
    weights = (1 - distance / max(1.0, 1 / step)).clip(0)
    # Renormalize at the edges, where a neighbour is missing.
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return weights * inside[:, None], inside
