"""Which part of an image a model saw, and a heat map of that part spread over it again.

The overlays call it; `centre_crop` is for users.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from captum_generic_attn.files.images import Box

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def centre_crop(width: int, height: int, share: float = 1.0) -> Box:
    """The part of an image that is left by the usual preprocessing of image classifiers: its
    shorter side is scaled to some length, and a square is cut from the middle.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        share: the side of the square as a share of the scaled shorter side: timm's `crop_pct`, or
            224 / 256 for `Resize(256)` and `CenterCrop(224)`.

    Returns:
        (left, top, right, bottom) in pixels of the image: the `crop_box` of `overlay` and of the
        figures.

    Raises:
        ValueError: `share` is not in 0 … 1, or there is no image.

    Example:
        >>> from captum_generic_attn.visualization import centre_crop
        >>> centre_crop(1000, 700)
        (150.0, 0.0, 850.0, 700.0)
        >>> centre_crop(1000, 700, share=0.5)
        (325.0, 175.0, 675.0, 525.0)
    """
    if not (0 < share <= 1 and width > 0 and height > 0):
        raise ValueError(
            f"width and height are at least 1 pixel, share above 0 and at most 1, not {width}, "
            f"{height} and {share}"
        )
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def checked_box(box: ArrayLike) -> Box:
    """Four finite numbers, of which right and bottom are not the smaller ones.

    Raises:
        ValueError: it is something else.
    """
    values = np.asarray(box, dtype=np.float64)
    if values.shape != (4,) or not np.isfinite(values).all() or (values[2:] < values[:2]).any():
        raise ValueError(
            f"a box is (left, top, right, bottom) in pixels, not {np.asarray(box).tolist()}"
        )
    left, top, right, bottom = values.tolist()
    return left, top, right, bottom


def checked_boxes(boxes: ArrayLike, count: int) -> list[Box]:
    """One box for each of `count` images, of as many or of one for all.

    Raises:
        ValueError: they are something else.
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
    """A map of a part of an image as a map of the whole image, and where that part is.

    The map is scaled bilinearly, as images are: where it shrinks, values are averaged.

    Args:
        heat: `[h, w]`.
        crop_box: (left, top, right, bottom) in pixels of the image. It may go past the image's
            edges, where that was padded.
        height: of the image.
        width: of the image.

    Returns:
        The map `[height, width]`, 0 outside of the part, and `[height, width]`: whether the middle
        of a pixel is in the part.

    Raises:
        ValueError: `crop_box` is no box, or holds no pixel of the image.
    """
    left, top, right, bottom = checked_box(crop_box)
    rows, in_rows = _weights(heat.shape[0], top, bottom, height)
    columns, in_columns = _weights(heat.shape[1], left, right, width)
    seen = in_rows[:, None] & in_columns
    if not seen.any():
        raise ValueError(
            f"the crop box {(left, top, right, bottom)} holds no pixel of the image, which is "
            f"{width} wide and {height} high"
        )
    return rows @ heat @ columns.T, seen


def _weights(
    count: int, start: float, end: float, size: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """`[size, count]`: how much each of `count` values that lie between `start` and `end` counts
    for each pixel of a line, nothing outside of them; `[size]`: whether that is inside.
    """
    middles = np.arange(size) + 0.5
    inside = (middles > start) & (middles < end)
    step = (end - start) / count if end > start else 1.0
    distance = np.abs((middles[:, None] - start) / step - (np.arange(count) + 0.5))
    weights = (1 - distance / max(1.0, 1 / step)).clip(0)
    # Beside the outermost values there are none to go to.
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return weights * inside[:, None], inside
