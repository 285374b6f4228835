"""Heat maps as colours over their picture, and the scale under them: the figures are made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

# A sequential map of even steps, readable with colour-blind eyes. It is laid over a pale grey
# picture, the more opaque the higher the relevance: nothing is hidden where nothing is relevant.
_COLORMAP = "YlOrRd"
# What speaks against the score, where a method tells: as even, and as far from grey.
_AGAINST = "GnBu"
_OPACITY = 0.85
_PALENESS = 0.4
# ITU-R BT.601.
LUMA = np.array([0.299, 0.587, 0.114])


def overlay(
    image: ArrayLike, heatmap: ArrayLike, *, maximum: float | None = None, signed: bool = False
) -> NDArray[np.float64]:
    """A heat map laid over its picture: `[H, W, 3]`, colours in 0 … 1.

    The picture is turned to a pale grey, so that every colour is the heat map's: none is 0, dark
    red is `maximum`; negative values count as 0 (the method's relevance has none), unless
    `signed`: then they are blue.

    Args:
        image: `[H, W]` or `[H, W, 3]`, floats in 0 … 1 or bytes.
        heatmap: `[H, W]`, one finite value per pixel.
        maximum: the value drawn darkest; by default the map's own largest. Give the same to
            overlays that will be compared.
        signed: whether negative values are drawn, dark blue for `-maximum`.

    Raises:
        ValueError: the shapes do not fit, or a value is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> from captum_generic_attn.visualization import overlay
        >>> heat = np.zeros((4, 4))
        >>> heat[1, 2] = 3.0
        >>> picture = overlay(np.full((4, 4, 3), 0.5), heat)
        >>> picture.shape
        (4, 4, 3)
        >>> np.argwhere(np.ptp(picture, axis=2) > 0).tolist()  # where there is colour
        [[1, 2]]
    """
    grey, heat = _grey(image), checked_heat(heatmap)
    if grey.shape != heat.shape:
        raise ValueError(
            f"the heat map is {_size(heat)}, its picture {_size(grey)} pixels: they must be of one "
            "size (attribute with return_input_shape=True makes a map of the picture's size)"
        )
    largest = float(np.abs(heat).max() if signed else heat.max())
    top = largest if maximum is None else maximum
    # A map of zeros shows the picture alone.
    share = (heat / top).clip(-1 if signed else 0, 1) if top > 0 else np.zeros_like(heat)
    return coloured(share, _PALENESS + (1 - _PALENESS) * grey)


def scale_bar(
    figure: Figure, axes: Axes, least: float, most: float, label: str, *, fill: bool = False
) -> None:
    """The scale of what `axes` show, under it; or in its place, to `fill` axes made for it."""
    steps = ListedColormap(coloured(np.linspace(-1 if least < 0 else 0, 1, 256), np.ones(256)))
    scale = ScalarMappable(Normalize(least, most if most > 0 else 1), steps)
    if fill:
        bar = figure.colorbar(scale, cax=axes, orientation="horizontal")
    else:
        bar = figure.colorbar(scale, ax=axes, location="bottom", pad=0.03, aspect=25)
    bar.set_label(label, size=8, labelpad=-8)
    bar.set_ticks([least, most], labels=["0" if least == 0 else f"{least:.2g}", f"{most:.2g}"])
    bar.ax.tick_params(labelsize=8, length=0)
    left, right = bar.ax.get_xticklabels()
    left.set_horizontalalignment("left")
    right.set_horizontalalignment("right")
    bar.outline.set_visible(False)


def checked_picture(image: ArrayLike) -> NDArray[np.float64]:
    """`[H, W]` or `[H, W, 3]` in 0 … 1.

    Raises:
        ValueError: it is of another shape or range.
    """
    given = np.asarray(image)
    picture = given / 255 if given.dtype == np.uint8 else given.astype(np.float64)
    if picture.ndim != 2 and picture.shape[2:] != (3,):
        raise ValueError(f"a picture is [H, W] or [H, W, 3], not {list(picture.shape)}")
    if not (picture.min() >= 0 and picture.max() <= 1):
        raise ValueError(
            f"a picture's values are in 0 … 1 (or bytes), not {picture.min():.3g} … "
            f"{picture.max():.3g}: undo the model's normalisation first"
        )
    return picture


def _grey(image: ArrayLike) -> NDArray[np.float64]:
    picture = checked_picture(image)
    return picture if picture.ndim == 2 else (picture @ LUMA).clip(0, 1)


def checked_heat(heatmap: ArrayLike) -> NDArray[np.float64]:
    """`[H, W]`, all finite.

    Raises:
        ValueError: it is of another shape, or a value is NaN or infinite.
    """
    heat = np.asarray(heatmap, dtype=np.float64)
    if heat.ndim != 2:
        raise ValueError(f"a heat map is [H, W], not {list(heat.shape)}: take one channel of it")
    if not np.isfinite(heat).all():
        raise ValueError("the heat map holds NaN or infinite values")
    return heat


def coloured(share: NDArray[np.float64], grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of the maximum, -1 … 1, in colours over what is behind them."""
    # The square root lets low relevance show as well.
    opacity = _OPACITY * np.sqrt(np.abs(share))[..., None]
    against = colormaps[_AGAINST](-share)[..., :3]
    colours = np.where(share[..., None] < 0, against, colormaps[_COLORMAP](share)[..., :3])
    blended: NDArray[np.float64] = opacity * colours + (1 - opacity) * grey[..., None]
    return blended


def _size(array: NDArray[np.float64]) -> str:
    return f"{array.shape[0]} × {array.shape[1]}"
