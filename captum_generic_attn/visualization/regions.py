"""The figure of regions: boxes of an image, coloured by their relevance.

It is for models that read the regions of a detector (LXMERT, VisualBERT).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Rectangle

from captum_generic_attn.visualization.arrays import merged, numbers
from captum_generic_attn.visualization.heatmaps import panels_of
from captum_generic_attn.visualization.labels import Label, write_labels
from captum_generic_attn.visualization.overlays import (
    checked_image,
    coloured,
    scale_bar,
    show_map,
)
from captum_generic_attn.visualization.scales import ONE, OWN, Scale, scales_of
from captum_generic_attn.visualization.titles import checked_titles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image

    from captum_generic_attn.comparison import Comparison
    from captum_generic_attn.visualization.figures import NotebookFigure

_LABEL = 6.5  # font size of labels, in points
_EDGE = 0.62  # grey level under the colour of an edge


def regions_figure(
    image: ArrayLike | Image,
    boxes: ArrayLike,
    relevance: ArrayLike | Mapping[str, ArrayLike] | Comparison,
    titles: Sequence[str] | None = None,
    *,
    labels: Sequence[str] | None = None,
    named: int = 5,
    title: str = "",
    shared_scale: bool = False,
    example: int = 0,
    part: int = 0,
) -> NotebookFigure:
    """A figure with the image, and its regions coloured by their relevance.

    Where boxes overlap, the most relevant one is on top. Negative values of signed methods are
    blue. The features of a region are summed, unless they are all equal, as those of our own method
    are.

    Args:
        image: an image, as for `overlay`.
        boxes: `[R, 4]`: (left, top, right, bottom) of each region in pixels of the image. Models
            often take them as fractions of width and height: multiply those by `[W, H, W, H]`.
        relevance: the relevance of one example, as `attribute` returns it, `[R, D]` or `[R]`. With
            `titles`, several of them, `[T, R, D]` or `[T, R]`, as from `attribute_targets`; or a
            mapping from titles to such values; or a `Comparison`.
        titles: one for each of several relevances.
        labels: one per region, drawn in the most relevant regions; by default their relevance.
            Labels that are wider than their region are shortened, and omitted where no letter fits.
        named: how many regions of a panel are labelled.
        title: title over the image.
        shared_scale: one scale for all panels, so that their colours can be compared.
        example: index in the batch of a `Comparison`.
        part: index of the input that holds the regions, in a `Comparison` with several.

    Raises:
        TypeError: titles or labels are no sequence of strings.
        ValueError: boxes, relevance, titles and labels do not fit together; a value is NaN or
            infinite; or the boxes are no boxes of this image.

    Example:
        >>> import numpy as np
        >>> from captum_generic_attn.visualization import regions_figure
        >>> boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 1]]) * [8, 6, 8, 6]
        >>> attributions = {"ours": [0.2, 0.9], "gradients": [[-1, -2], [2, 3]]}  # [R], [R, D]
        >>> figure = regions_figure(np.ones((6, 8)), boxes, attributions)
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['', 'ours', 'gradients']
        >>> [text.get_text() for text in figure.axes[2].texts]
        ['5', '-3']
    """
    from captum_generic_attn.comparison import Comparison

    array = checked_image(image)
    placed = boxes_on(boxes, array)
    if labels is not None:
        labels = checked_titles(labels, len(placed), of="boxes", name="labels")
    if isinstance(relevance, Comparison):
        relevance = {
            name: (found[part] if isinstance(found, tuple) else found)[example]
            for name, found in relevance.attributions.items()
        }
    several = _several(relevance, titles, len(placed))
    scales = scales_of(list(several.values()), shared=shared_scale)
    # A single panel does not share its scale.
    extent = "" if len(several) == 1 else ONE if shared_scale else OWN
    figure, panels = panels_of(array, list(several), title)
    for axes, values, scale in zip(panels, several.values(), scales, strict=True):
        draw_regions(axes, array, placed, values, scale.maximum)
        scale_bar(figure, axes, scale, "relevance", extent)
    figure.draw_without_rendering()  # computes the sizes of the panels
    for axes, values in zip(panels, several.values(), strict=True):
        most = np.argsort(-np.abs(values), kind="stable")[:named].tolist()
        texts = {
            place: f"{values[place]:.2g}" if labels is None else labels[place]
            for place in most
            if values[place] != 0
        }
        written = [
            Label(tuple(placed[place].tolist()), text, whole=labels is None)
            for place, text in texts.items()
        ]
        height, width = array.shape[:2]
        write_labels(axes, written, width, height, size=_LABEL, inside=True)
    return figure


def boxes_on(boxes: ArrayLike, array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Check the boxes of an image: `[R, 4]`, at least one.

    Raises:
        ValueError: they are no boxes, or are not in pixels of this image.
    """
    found = numbers(boxes)
    if found.ndim != 2 or found.shape[1] != 4 or len(found) == 0:
        raise ValueError(
            f"boxes= is [R, 4], each (left, top, right, bottom) in pixels, not {list(found.shape)}"
        )
    if not np.isfinite(found).all() or (found[:, 2:] < found[:, :2]).any():
        wrong = ~np.isfinite(found).all(1) | (found[:, 2:] < found[:, :2]).any(1)
        place = int(wrong.argmax())
        raise ValueError(
            f"box {place} is {found[place].tolist()}: a box is (left, top, right, bottom), with "
            "left ≤ right and top ≤ bottom"
        )
    height, width = array.shape[:2]
    if found.max() <= 1 and max(height, width) > 1:
        raise ValueError(
            f"the boxes lie in 0 … {found.max():.3g}, but the image is {width} × {height} "
            f"pixels: if they are fractions of its size, multiply them by [{width}, {height}, "
            f"{width}, {height}]"
        )
    middles = (found[:, :2] + found[:, 2:]) / 2
    outside = ((middles < 0) | (middles > [width, height])).any(axis=1)
    if outside.any():
        place = int(outside.argmax())
        raise ValueError(
            f"the centre of box {place}, {found[place].tolist()}, is outside of the image, which "
            f"is {width} × {height} pixels: are the boxes for another size of the image?"
        )
    return found


def draw_regions(
    axes: Axes,
    array: NDArray[np.float64],
    boxes: NDArray[np.float64],
    values: NDArray[np.float64],
    top: float,
) -> None:
    """Draw the image and its regions, coloured by `[R]` values; `top` has the darkest colour."""
    height, width = array.shape[:2]
    heat = np.zeros((height, width))
    across, down = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    least_first = np.argsort(np.abs(values), kind="stable").tolist()
    frames = []
    for place in least_first:
        left, top_edge, right, bottom = boxes[place].tolist()
        inside = (left <= across) & (across < right) & (top_edge <= down) & (down < bottom)
        heat[inside] = values[place]
        share = np.clip(values[place] / top, -1, 1) if top > 0 else 0.0
        # Matplotlib's pixel centres have integer coordinates.
        frame = Rectangle((left - 0.5, top_edge - 0.5), right - left, bottom - top_edge, fill=False)
        frame.set_color(tuple(coloured(np.array([share]), np.array([_EDGE]))[0].tolist()))
        frame.set_linewidth(0.5 + abs(share))
        frames.append(frame)
    show_map(axes, array, heat, Scale(top, signed=True), None)
    for frame in frames:
        axes.add_patch(frame)


def _several(
    relevance: ArrayLike | Mapping[str, ArrayLike], titles: Sequence[str] | None, regions: int
) -> dict[str, NDArray[np.float64]]:
    """The values `[R]` of each panel, by title."""
    if isinstance(relevance, Mapping):
        if titles is not None:
            raise ValueError("this relevance has titles already: leave titles= out")
        given = {name: numbers(values) for name, values in relevance.items()}
    elif titles is None:
        given = {"": numbers(relevance)}
    else:
        titles = checked_titles(titles, len(titles))
        found = numbers(relevance)
        if found.ndim not in (2, 3) or len(found) != len(titles):
            raise ValueError(
                f"with {len(titles)} titles, relevance is [{len(titles)}, R] or "
                f"[{len(titles)}, R, D], not {list(found.shape)}"
            )
        if len(set(titles)) < len(titles):
            raise ValueError(f"titles must differ, not {list(titles)}")
        given = dict(zip(titles, found, strict=True))
    if not given:
        raise ValueError("there is no relevance to draw")
    return {name: _of_regions(values, regions) for name, values in given.items()}


def _of_regions(values: NDArray[np.float64], regions: int) -> NDArray[np.float64]:
    """Reduce `[R]` or `[R, D]` to `[R]`."""
    if values.ndim not in (1, 2) or len(values) != regions or values.size == 0:
        raise ValueError(
            f"the relevance of {regions} regions of one example is [{regions}] or [{regions}, D], "
            f"not {list(values.shape)}: pick one of the batch, and give titles= if there are "
            "several targets"
        )
    if not np.isfinite(values).all():
        raise ValueError("the relevance of a region is NaN or infinite")
    return values if values.ndim == 1 else merged(values, axis=1)
