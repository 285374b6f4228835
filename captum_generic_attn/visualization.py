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

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    from captum_generic_attn.compare import Attributions, Comparison

__all__ = ["comparison_figure", "heatmap_figure", "overlay"]

# A sequential map of even steps, readable with colour-blind eyes. It is laid over a pale grey
# picture, the more opaque the higher the relevance: nothing is hidden where nothing is relevant.
_COLORMAP = "YlOrRd"
# What speaks against the score, where a method tells: as even, and as far from grey.
_AGAINST = "GnBu"
# Gradients have outliers: in a comparison, the darkest colour stands for this share of the pixels.
_PERCENTILE = 99.5
_OPACITY = 0.85
_PALENESS = 0.4
# ITU-R BT.601.
_LUMA = np.array([0.299, 0.587, 0.114])


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
    grey, heat = _grey(image), _heat(heatmap)
    if grey.shape != heat.shape:
        raise ValueError(
            f"the heat map is {_size(heat)}, its picture {_size(grey)} pixels: they must be of one "
            "size (attribute with return_input_shape=True makes a map of the picture's size)"
        )
    largest = float(np.abs(heat).max() if signed else heat.max())
    top = largest if maximum is None else maximum
    # A map of zeros shows the picture alone.
    share = (heat / top).clip(-1 if signed else 0, 1) if top > 0 else np.zeros_like(heat)
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
    for axes, heatmap, maximum, name in zip(grid[1:], heatmaps, maxima, titles, strict=False):
        axes.imshow(overlay(picture, heatmap, maximum=maximum))
        axes.set_title(name, fontsize=11)
        _bar(figure, axes, 0.0, maximum, "relevance")
    return figure


def comparison_figure(
    image: ArrayLike, comparison: Comparison, *, example: int = 0, part: int = 0, title: str = ""
) -> Figure:
    r"""A figure with the picture and one overlay for each method of a comparison.

    Each has its own scale: methods have different units. Channels are summed, unless they are all
    alike. Red speaks for the score; blue, in methods that tell, against it. The darkest colours
    stand for the 99.5th percentile of a map's magnitudes, so that single pixels hide nothing.

    Args:
        image: `[H, W]` or `[H, W, 3]`, floats in 0 … 1 or bytes: the picture of that example.
        comparison: what `compare` returned, of pictures `[B, C, H, W]`.
        example: which of the batch.
        part: which input holds the pictures, where there are several.
        title: stands over the picture.

    Raises:
        ValueError: if nothing of the comparison can be drawn, or it is of no pictures.

    Example:
        >>> import torch
        >>> from captum_generic_attn.compare import Comparison
        >>> from captum_generic_attn.visualization import comparison_figure
        >>> found = Comparison({"ours": torch.rand(1, 3, 8, 8)}, {"ours": 0.25}, {}, {})
        >>> figure = comparison_figure(np.zeros((8, 8)), found)
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['', 'ours\n0.25 s']
    """
    if not comparison.attributions:
        raise ValueError("no method of this comparison could be run: there is nothing to draw")
    picture = _picture(image)
    count = len(comparison.attributions) + 1
    columns = min(count, 4)
    rows = -(-count // columns)
    height = 2.6 * picture.shape[0] / picture.shape[1] + 0.95
    layout = ConstrainedLayoutEngine(compress=True, h_pad=0.08)
    figure = Figure(figsize=(2.6 * columns, height * rows), layout=layout)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    grid[0].imshow(picture, cmap="gray", vmin=0, vmax=1)
    grid[0].set_title(title, fontsize=11)
    for axes, (name, found) in zip(grid[1:], comparison.attributions.items(), strict=False):
        heat = _one_map(found, example, part, name)
        top = float(np.percentile(np.abs(heat), _PERCENTILE)) or float(np.abs(heat).max())
        signed = bool(heat.min() < 0)
        axes.imshow(overlay(picture, heat, maximum=top, signed=signed))
        axes.set_title(f"{name}\n{comparison.seconds[name]:.2g} s", fontsize=10)
        _bar(figure, axes, -top if signed else 0.0, top, "attribution")
    return figure


def _one_map(found: Attributions, example: int, part: int, name: str) -> NDArray[np.float64]:
    """`[H, W]` of one example: channels summed, or one of them where all are alike."""
    tensor = found[part] if isinstance(found, tuple) else found
    if tensor.ndim != 4:
        raise ValueError(
            f"{name} has attributions {tuple(tensor.shape)}; pictures are [B, C, H, W]"
        )
    channels = tensor[example].detach().cpu().double().numpy()
    alike = bool((channels == channels[:1]).all())
    heat: NDArray[np.float64] = channels[0] if alike else channels.sum(0)
    return heat


def _bar(figure: Figure, axes: Axes, least: float, most: float, label: str) -> None:
    """The scale of an overlay, under it."""
    steps = ListedColormap(_coloured(np.linspace(-1 if least < 0 else 0, 1, 256), np.ones(256)))
    scale = ScalarMappable(Normalize(least, most if most > 0 else 1), steps)
    bar = figure.colorbar(scale, ax=axes, location="bottom", pad=0.03, aspect=25)
    bar.set_label(label, size=8, labelpad=-8)
    bar.set_ticks([least, most], labels=["0" if least == 0 else f"{least:.2g}", f"{most:.2g}"])
    bar.ax.tick_params(labelsize=8, length=0)
    left, right = bar.ax.get_xticklabels()
    left.set_horizontalalignment("left")
    right.set_horizontalalignment("right")
    bar.outline.set_visible(False)


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
    """Shares of the maximum, -1 … 1, in colours over what is behind them."""
    # The square root lets low relevance show as well.
    opacity = _OPACITY * np.sqrt(np.abs(share))[..., None]
    against = colormaps[_AGAINST](-share)[..., :3]
    colours = np.where(share[..., None] < 0, against, colormaps[_COLORMAP](share)[..., :3])
    blended: NDArray[np.float64] = opacity * colours + (1 - opacity) * grey[..., None]
    return blended


def _size(array: NDArray[np.float64]) -> str:
    return f"{array.shape[0]} × {array.shape[1]}"
