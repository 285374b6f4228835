"""Overlays: heat maps as colours over an image, and their colour bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from PIL.Image import Image
from torch import Tensor

from captum_generic_attn.files.images import rgb
from captum_generic_attn.visualization.arrays import array_of, merged, numbers
from captum_generic_attn.visualization.crop_boxes import checked_box, spread
from captum_generic_attn.visualization.scales import nothing_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

    from captum_generic_attn.visualization.scales import Scale

# The colours are drawn over a pale grey image; opacity increases with relevance, so the image is
# visible where nothing is relevant.
_FOR, _AGAINST = "Reds", "Blues"
# The darkest ends of the colormaps are left out: they are as dark as dark parts of images.
_DARKEST = 0.88
_OPACITY = 0.78
# The darkest and the lightest grey of the part that the model saw, and of the rest of the image.
_SEEN, _UNSEEN = (0.4, 1.0), (0.75, 0.93)
# Aspect ratio of a colour bar, and its minimum and maximum height as a fraction of the image's.
_BAR_FLAT, _BAR_SHARE = 25, (0.15, 0.9)
# Maximum size of the longer side, in pixels: more than a panel resolves, even in print.
_DRAWN = 2000
# The number of values that are coloured at once; each takes about 150 bytes.
_AT_ONCE = 2**20
# Luma weights of ITU-R BT.601.
_LUMA = np.array([0.299, 0.587, 0.114])


def overlay(
    image: ArrayLike | Image,
    heatmap: ArrayLike,
    *,
    crop_box: ArrayLike | None = None,
    maximum: float | None = None,
    signed: bool = False,
) -> NDArray[np.float64]:
    """Draw a heat map over its image: `[H, W, 3]`, colours in 0 … 1.

    The image becomes a pale grey, so that all colour comes from the heat map: 0 has no colour,
    `maximum` is dark red, and lightness falls evenly in between. Negative values count as 0 (the
    relevance of the method has none), unless `signed`: then they are blue.

    Args:
        image: `[H, W]` or `[H, W, 3]`, floats in 0 … 1 or bytes; a PIL image, whose transparent
            parts become white; or a tensor, which may also be `[3, H, W]`.
        heatmap: the heat map of one example, as `attribute` returns it: `[C, H, W]` or `[H, W]`, an
            array or a tensor with one finite value per pixel. Channels are summed, unless they are
            all equal.
        crop_box: the part of the image that the model saw, (left, top, right, bottom) in pixels of
            the image, for example from `centre_crop`. The map is scaled to it, and the rest of the
            image is paler. By default the whole image, which must have the size of the map.
        maximum: the value of the darkest colour; by default the largest value of the map. Use the
            same value for overlays that will be compared.
        signed: whether negative values are drawn, with dark blue for `-maximum`.

    Raises:
        ValueError: the shapes do not fit, or a value is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> from captum_generic_attn.visualization import overlay
        >>> heat = np.zeros((4, 4))
        >>> heat[1, 2] = 3.0
        >>> image = overlay(np.full((4, 4, 3), 0.5), heat)
        >>> image.shape
        (4, 4, 3)
        >>> np.argwhere(np.ptp(image, axis=2) > 0).tolist()  # where there is colour
        [[1, 2]]
    """
    grey, heat = _grey(image), checked_heat(heatmap)
    largest = float(np.abs(heat).max() if signed else heat.max())
    top = largest if maximum is None else maximum
    behind = _between(_SEEN, grey)
    if crop_box is not None:
        heat, seen = spread(heat, crop_box, *grey.shape)
        behind = np.where(seen, behind, _between(_UNSEEN, grey))
    elif grey.shape != heat.shape:
        raise ValueError(
            f"the heat map is {_size(heat)}, its image {_size(grey)} pixels: they must be of one "
            "size (attribute with return_input_shape=True returns a map of the model's input "
            "size), or crop_box= must give the part of the image that the map covers (centre_crop, "
            f"or (0, 0, {grey.shape[1]}, {grey.shape[0]}) for all of it)"
        )
    # A map of zeros shows the image alone.
    share = (heat / top).clip(-1 if signed else 0, 1) if top > 0 else np.zeros_like(heat)
    return coloured(share, behind)


def show_map(
    axes: Axes, array: NDArray[np.float64], heat: NDArray[np.float64], scale: Scale,
    crop_box: ArrayLike | None,
) -> None:  # fmt: skip
    """Draw the `overlay` of a map and its image on axes, in the colours of a scale.

    Large images are reduced, as in `show_image`.
    """
    height, width = array.shape[:2]
    small = _reduced(array)
    if crop_box is not None:
        x, y = small.shape[1] / width, small.shape[0] / height
        crop_box = np.multiply(checked_box(crop_box), (x, y, x, y))
    elif heat.shape == (height, width):
        heat = _reduced(heat)
    shown = overlay(small, heat, crop_box=crop_box, maximum=scale.maximum, signed=scale.signed)
    axes.imshow(shown, extent=_extent(width, height))


def show_image(axes: Axes, array: NDArray[np.float64]) -> None:
    """Draw an image `[H, W]` or `[H, W, 3]` in 0 … 1; axes coordinates are its pixels.

    An image that is larger than a panel can resolve is reduced by averaging pixels.
    """
    height, width = array.shape[:2]
    axes.imshow(_reduced(array), cmap="gray", vmin=0, vmax=1, extent=_extent(width, height))


def _extent(width: int, height: int) -> tuple[float, float, float, float]:
    """The extent of an image, since Matplotlib's pixel centres have integer coordinates."""
    return -0.5, width - 0.5, height - 0.5, -0.5


def _reduced(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values `[H, W, …]`, averaged to at most `_DRAWN` along the longer side."""
    share = _DRAWN / max(values.shape[:2])
    if share >= 1:
        return values
    for axis, size in enumerate(values.shape[:2]):
        count = max(1, round(size * share))
        starts = np.arange(count) * size // count
        sums = np.add.reduceat(values, starts, axis=axis)
        counts = np.diff(starts, append=size)
        values = sums / counts.reshape(-1, *[1] * (values.ndim - axis - 1))
    return values


def scale_bar(
    figure: Figure,
    axes: Axes,
    scale: Scale,
    label: str,
    extent: str = "",
    *,
    fill: bool = False,
) -> None:
    """Draw the colour bar of a scale under `axes`, or into `axes` themselves if `fill`.

    If all values are 0, the bar is white, and a text says so.

    Args:
        figure: the figure of the axes.
        axes: axes that show an image, or empty axes for the colour bar.
        scale: the scale of the values.
        label: the quantity that is shown.
        extent: a text that says whether other panels share the scale.
        fill: whether the colour bar fills `axes`.
    """
    nothing = scale.maximum == 0
    least, most = scale.least, scale.maximum or 1.0
    colours = ListedColormap(["white"]) if nothing else steps(signed=scale.signed)
    drawn = ScalarMappable(Normalize(least, most), colours)
    if fill:
        bar = figure.colorbar(drawn, cax=axes, orientation="horizontal")
    else:
        # Under a wide image, the bar takes a larger fraction of the height, to reach the full
        # width.
        flat = 1 / axes.get_data_ratio()
        share = float(np.clip(flat / _BAR_FLAT, *_BAR_SHARE))
        bar = figure.colorbar(
            drawn, ax=axes, location="bottom", pad=0.03, fraction=share,
            aspect=max(_BAR_FLAT, flat / share),
        )  # fmt: skip
    said = nothing_of(label) if nothing else ", ".join(filter(None, (label, extent)))
    bar.set_label(said, size=8, labelpad=-8)
    beyond = ("≤ ", "≥ ") if scale.cut else ("", "")
    low = beyond[0] + _short(least) if scale.signed else "0"
    # Blank tick labels keep the label aligned with those of other bars.
    ends = [" ", " "] if nothing else [low, beyond[1] + _short(most)]
    bar.set_ticks([least, most], labels=ends)
    bar.ax.tick_params(labelsize=8, length=0)
    left, right = bar.ax.get_xticklabels()
    left.set_horizontalalignment("left")
    right.set_horizontalalignment("right")
    bar.outline.set_visible(False)


def _short(value: float) -> str:
    """Format with two significant digits: 280, not 2.8e+02."""
    return f"{float(f'{value:.2g}'):g}"


def steps(*, signed: bool = False) -> ListedColormap:
    """The colours over white as a colormap for 0 … 1, or for -1 … 1 if `signed`."""
    return ListedColormap(coloured(np.linspace(-1 if signed else 0, 1, 256), np.ones(256)))


def checked_image(image: ArrayLike | Image) -> NDArray[np.float64]:
    """Convert an image, in any form that `overlay` takes, to `[H, W]` or `[H, W, 3]` in 0 … 1.

    Raises:
        ValueError: it has another shape, range or mode.
    """
    if isinstance(image, Image):
        image = np.asarray(rgb(image))
    given = array_of(image)
    if isinstance(image, Tensor) and given.ndim == 3 and given.shape[0] == 3:
        if given.shape[2] == 3:
            raise ValueError(
                f"a tensor {list(given.shape)} may be [3, H, W] or [H, W, 3]: give a NumPy array, "
                "[H, W, 3]"
            )
        given = given.transpose(1, 2, 0)  # channels first, as in the input of a model
    array = given / 255 if given.dtype == np.uint8 else given.astype(np.float64)
    if array.size == 0 or (array.ndim != 2 and array.shape[2:] != (3,)):
        raise ValueError(
            f"an image is [H, W] or [H, W, 3] (a tensor also [3, H, W]), not "
            f"{list(np.shape(image))}"
        )
    if not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(
            f"an image's values are in 0 … 1 (or bytes), not {array.min():.3g} … "
            f"{array.max():.3g}: undo the model's normalisation first"
        )
    return array


def _between(ends: tuple[float, float], grey: NDArray[np.float64]) -> NDArray[np.float64]:
    return ends[0] + (ends[1] - ends[0]) * grey


def _grey(image: ArrayLike | Image) -> NDArray[np.float64]:
    array = checked_image(image)
    return array if array.ndim == 2 else (array @ _LUMA).clip(0, 1)


def checked_heat(heatmap: ArrayLike) -> NDArray[np.float64]:
    """Check a heat map `[H, W]` or `[C, H, W]`, and return it as `[H, W]`.

    Channels are summed, unless they are all equal, as those of our own method are. Then one of them
    is the map.

    Raises:
        ValueError: it has another shape, or a value is NaN or infinite.
    """
    heat = numbers(heatmap)
    if heat.ndim in (4, 5):
        raise ValueError(
            f"a heat map is of one example, [H, W] or [C, H, W], not {list(heat.shape)}: pick one "
            "of the batch, heatmap[0], or maps[:, 0] of what attribute_targets returned"
        )
    if heat.ndim not in (2, 3) or heat.size == 0:
        raise ValueError(f"a heat map is [H, W] or [C, H, W], not {list(heat.shape)}")
    if not np.isfinite(heat).all():
        raise ValueError("the heat map holds NaN or infinite values")
    return heat if heat.ndim == 2 else merged(heat, axis=0)


def coloured(share: NDArray[np.float64], behind: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colour fractions of the maximum, -1 … 1, over a grey background.

    Over white, lightness falls evenly with the fraction.
    """
    found = np.empty((*share.shape, 3))
    step = max(1, _AT_ONCE * len(share) // max(1, share.size))
    for start in range(0, len(share), step):
        rows = slice(start, start + step)
        size = np.abs(share[rows])
        opacity = _opacity(size)[..., None]
        against = share[rows][..., None] < 0
        colours = np.where(against, _EVEN_AGAINST(size), _EVEN_FOR(size))[..., :3]
        found[rows] = opacity * colours + (1 - opacity) * behind[rows][..., None]
    return found


def _opacity(share: NDArray[np.float64]) -> NDArray[np.float64]:
    # The square root keeps low relevance visible.
    opacity: NDArray[np.float64] = _OPACITY * np.sqrt(share)
    return opacity


def _even(name: str) -> ListedColormap:
    """Resample a colormap so that `coloured` is perceptually even over white.

    The lightness falls by the same amount in each of 256 steps.
    """
    colours = colormaps[name].resampled(1024)(np.linspace(0, _DARKEST, 1024))[:, :3]
    opacity = _opacity(np.linspace(0, 1, 256))[:, None, None]
    found = _lightness(opacity * colours + (1 - opacity))
    wanted = np.linspace(100, found[-1, -1], 256)[:, None]
    return ListedColormap(colours[np.abs(found - wanted).argmin(axis=1)])


def luminance(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative luminance in 0 … 1 of sRGB colours `[..., 3]` in 0 … 1, as defined by
    WCAG (CIE Y).
    """
    linear = np.where(colours > 0.04045, ((colours + 0.055) / 1.055) ** 2.4, colours / 12.92)
    found: NDArray[np.float64] = linear @ [0.2126, 0.7152, 0.0722]
    return found


def _lightness(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB's L* of sRGB colours, 0 … 100."""
    light = luminance(colours)
    lightness: NDArray[np.float64] = np.where(
        light > 216 / 24389, 116 * np.cbrt(light) - 16, 24389 / 27 * light
    )
    return lightness


_EVEN_FOR, _EVEN_AGAINST = _even(_FOR), _even(_AGAINST)


def _size(array: NDArray[np.float64]) -> str:
    return f"{array.shape[0]} × {array.shape[1]}"
