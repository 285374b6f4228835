"""Pictures of relevance: arrays in, arrays or Matplotlib figures out. The command line calls them;
notebooks may.

No function touches pyplot's state, so that figures can be made in threads and without a display; a
notebook shows a returned figure by itself, and `figure.savefig(path)` writes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

__all__ = ["heatmap_figure", "overlay"]

# A sequential map of even steps, readable with colour-blind eyes. It is laid over a pale grey
# picture, the more opaque the higher the relevance: nothing is hidden where nothing is relevant.
_COLORMAP = "YlOrRd"
_OPACITY = 0.85
_PALENESS = 0.4
# ITU-R BT.601.
_LUMA = np.array([0.299, 0.587, 0.114])


def overlay(
    image: ArrayLike, heatmap: ArrayLike, *, maximum: float | None = None
) -> NDArray[np.float64]:
    """A heat map laid over its picture: `[H, W, 3]`, colours in 0 … 1.

    The picture is turned to a pale grey, so that every colour is the heat map's: none is 0, dark
    red is `maximum`; negative values count as 0 (the method's relevance has none).

    Args:
        image: `[H, W]` or `[H, W, 3]`, floats in 0 … 1 or bytes.
        heatmap: `[H, W]`, one finite value per pixel.
        maximum: the value drawn darkest; by default the map's own largest. Give the same to
            overlays that will be compared.

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
    grey, heat = _grey(image), _heat(heatmap)
    if grey.shape != heat.shape:
        raise ValueError(
            f"the heat map is {_size(heat)}, its picture {_size(grey)} pixels: they must be of one "
            "size (attribute with return_input_shape=True makes a map of the picture's size)"
        )
    top = float(heat.max()) if maximum is None else maximum
    # A map of zeros shows the picture alone.
    share = (heat / top).clip(0, 1) if top > 0 else np.zeros_like(heat)
    return _coloured(share, _PALENESS + (1 - _PALENESS) * grey)


def heatmap_figure(
    image: ArrayLike,
    heatmaps: Sequence[ArrayLike] | NDArray[np.floating[Any]],
    titles: Sequence[str],
    *,
    title: str = "",
    shared_scale: bool = False,
) -> Figure:
    """A figure with the picture and one overlay per heat map, each over the bar of its scale.

    By default each map has its own scale, since one class often gets many times the relevance of
    another: the colours say where, the bars' numbers how much.

    Args:
        image: `[H, W]` or `[H, W, 3]`, floats in 0 … 1 or bytes.
        heatmaps: at least one `[H, W]`, or an array `[T, H, W]`; one finite value per pixel.
        titles: one per heat map.
        title: stands over the picture.
        shared_scale: one scale for all, so that colours can be compared from map to map.

    Raises:
        ValueError: no heat map, not one title for each, or shapes that do not fit.

    Example:
        >>> import numpy as np
        >>> from captum_generic_attn.visualization import heatmap_figure
        >>> left, right = np.eye(8), np.eye(8)[::-1]
        >>> figure = heatmap_figure(np.zeros((8, 8)), [left, right], ["left", "right"])
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['', 'left', 'right']
    """
    if len(heatmaps) == 0:
        raise ValueError("there is no heat map to draw")
    if len(heatmaps) != len(titles):
        raise ValueError(f"{len(heatmaps)} heat maps need as many titles, not {len(titles)}")
    picture = _picture(image)
    maxima = [max(float(_heat(heatmap).max()), 0.0) for heatmap in heatmaps]
    if shared_scale:
        maxima = [max(maxima)] * len(maxima)

    rows = -(-(len(heatmaps) + 1) // 4)
    columns = -(-(len(heatmaps) + 1) // rows)
    height = 2.6 * picture.shape[0] / picture.shape[1] + 0.75
    layout = ConstrainedLayoutEngine(compress=True, h_pad=0.08)
    figure = Figure(figsize=(2.6 * columns, height * rows), layout=layout)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    grid[0].imshow(picture, cmap="gray", vmin=0, vmax=1)
    grid[0].set_title(title, fontsize=11)
    steps = ListedColormap(_coloured(np.linspace(0, 1, 256), np.ones(256)))
    for axes, heatmap, maximum, name in zip(grid[1:], heatmaps, maxima, titles, strict=False):
        axes.imshow(overlay(picture, heatmap, maximum=maximum))
        axes.set_title(name, fontsize=11)
        scale = ScalarMappable(Normalize(0, maximum if maximum > 0 else 1), steps)
        bar = figure.colorbar(scale, ax=axes, location="bottom", pad=0.03, aspect=25)
        bar.set_label("relevance", size=8, labelpad=-8)
        bar.set_ticks([0, maximum], labels=["0", f"{maximum:.2g}"])
        bar.ax.tick_params(labelsize=8, length=0)
        least, most = bar.ax.get_xticklabels()
        least.set_horizontalalignment("left")
        most.set_horizontalalignment("right")
        bar.outline.set_visible(False)
    return figure


def _picture(image: ArrayLike) -> NDArray[np.float64]:
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
    picture = _picture(image)
    return picture if picture.ndim == 2 else (picture @ _LUMA).clip(0, 1)


def _heat(heatmap: ArrayLike) -> NDArray[np.float64]:
    heat = np.asarray(heatmap, dtype=np.float64)
    if heat.ndim != 2:
        raise ValueError(f"a heat map is [H, W], not {list(heat.shape)}: take one channel of it")
    if not np.isfinite(heat).all():
        raise ValueError("the heat map holds NaN or infinite values")
    return heat


def _coloured(share: NDArray[np.float64], grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of the maximum in colours over what is behind them."""
    # The square root lets low relevance show as well.
    opacity = _OPACITY * np.sqrt(share)[..., None]
    colours = colormaps[_COLORMAP](share)[..., :3]
    blended: NDArray[np.float64] = opacity * colours + (1 - opacity) * grey[..., None]
    return blended


def _size(array: NDArray[np.float64]) -> str:
    return f"{array.shape[0]} × {array.shape[1]}"
