"""The crop of an image that a model sees after its preprocessing, for any library.

The command line draws the user's own image by it, with the map on that part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from captum_generic_attn.files.images import Box

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

_GREYS = 255
# How oblique the shading is. Were it upright, each grey of a column would be rounded alike, and
# their mean would be no better than one of them.
_TILT = 1 / 16
# The share of columns left out on each side: where an image ends, filters have nothing to go on
# with, and bend the values.
_MARGIN = 1 / 8


def seen_crop(preprocess: Callable[[Image.Image], Tensor], width: int, height: int) -> Box | None:
    """The crop that a preprocessing which crops and scales leaves of an image of this size.

    It is found by trying. Of two images shaded from black to white, one rather from left to
    right, the other rather from top to bottom, what is left tells where each value came from.

    Args:
        preprocess: a PIL image to `[C, h, w]`, normalised in any way.
        width: of the image, in pixels.
        height: of the image, in pixels.

    Returns:
        (left, top, right, bottom) in pixels of the image; or `None` where the preprocessing does
        anything else (it pads, turns, mirrors or bends images), or leaves too little to tell.

    Example:
        >>> from captum_generic_attn import demo
        >>> [round(edge) for edge in seen_crop(demo.preprocess, 300, 200)]
        [50, 0, 250, 200]
    """
    from PIL import Image

    def seen(image: Image.Image) -> NDArray[np.float64]:
        return preprocess(image.convert("RGB")).double().numpy()

    black, white = (seen(Image.new("L", (width, height), grey)) for grey in (0, _GREYS))
    contrast = white - black
    largest = np.abs(contrast).max(axis=(1, 2), keepdims=True)
    # Where a frame was added, black and white look alike.
    if not (np.abs(contrast) > 0.999 * largest).all():
        return None

    def look_at(part: Box) -> Box | None:
        """The crop, found by shades that increase over a part of the image which contains it."""
        left, top, right, bottom = part
        x = ((np.arange(width, dtype=np.float32) + 0.5 - left) / (right - left))[None]
        y = ((np.arange(height, dtype=np.float32) + 0.5 - top) / (bottom - top))[:, None]
        first, second = (
            ((seen(_shaded(*shades)) - black) / contrast).mean(axis=0)
            for shades in (((1 - _TILT) * x, _TILT * y), (_TILT * x, (1 - _TILT) * y))
        )
        across = ((1 - _TILT) * first - _TILT * second) / (1 - 2 * _TILT)
        down = ((1 - _TILT) * second - _TILT * first) / (1 - 2 * _TILT)
        sides = _ends(across, left, right, width), _ends(down.T, top, bottom, height)
        if sides[0] is None or sides[1] is None:
            return None
        return sides[0][0], sides[1][0], sides[0][1], sides[1][1]

    whole = (0.0, 0.0, float(width), float(height))
    crop_box = look_at(whole)
    if crop_box is None:
        return None
    left, top, right, bottom = crop_box
    if right - left >= width / 2 and bottom - top >= height / 2:
        return crop_box
    # Few of the shades were seen: once more, with most of them on this part.
    x, y = (right - left) / 4 + 2 * width / _GREYS, (bottom - top) / 4 + 2 * height / _GREYS
    return look_at((left - x, top - y, right + x, bottom + y))


def _shaded(across: NDArray[np.float32], down: NDArray[np.float32]) -> Image.Image:
    """An image of the sums of `[1, W]` and `[H, 1]`: 0 is black, 1 white."""
    from PIL import Image

    across, down = _GREYS * across, _GREYS * down
    greys = np.empty((down.shape[0], across.shape[1]), dtype=np.uint8)
    for row, grey in enumerate(down):  # floats for all of a large image would be gigabytes
        greys[row] = (across[0] + grey).clip(0, _GREYS).round()
    return Image.fromarray(greys)


def _ends(
    shares: NDArray[np.float64], start: float, end: float, size: int
) -> tuple[float, float] | None:
    """The first and the last visible position of a line of `size` pixels.

    Args:
        shares: `[N, along]`: how far each value lies on the way from `start` to `end`.
        start: in pixels.
        end: in pixels.
        size: in pixels.
    """
    places = start + (end - start) * shares
    count = places.shape[1]
    margin = round(_MARGIN * count)
    inner = places[:, margin : count - margin]
    middles = np.arange(margin, count - margin) + 0.5
    if len(middles) < 3:
        return None
    slope, first = np.polyfit(middles, inner.mean(axis=0), 1)
    # Shades were rounded twice, and some filters take the nearest pixel.
    grey = (end - start) / _GREYS
    bent = np.abs(inner - (first + slope * middles)).max() > 2 * grey + 1
    if bent or slope * count < 2 * grey:
        return None
    last = first + slope * count
    # Whole sides are the rule; less than half a pixel of what is seen cannot be told from one.
    first = 0.0 if abs(first) < slope / 2 else float(first)
    last = float(size) if abs(last - size) < slope / 2 else float(last)
    return first, last
