"""The figure of detections: the boxes on the image, and a heat map for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from captum_generic_attn.files.images import Box
from captum_generic_attn.visualization.crop_boxes import checked_box
from captum_generic_attn.visualization.heatmaps import panels_of
from captum_generic_attn.visualization.labels import Label, write_labels
from captum_generic_attn.visualization.overlays import (
    checked_heat,
    checked_image,
    scale_bar,
    show_map,
)
from captum_generic_attn.visualization.scales import ONE, OWN, scales_of
from captum_generic_attn.visualization.titles import checked_titles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image

    from captum_generic_attn.visualization.figures import NotebookFigure

# Dark enough for white letters, and different from the colours of heat maps.
_COLOURS = (
    "#0072b2", "#00795a", "#a3307a", "#000000", "#6a3d9a", "#5c5c5c", "#0f3d6e", "#3d5c10",
)  # fmt: skip
_LABEL = 7  # font size of labels, in points


def detections_figure(
    image: ArrayLike | Image,
    boxes: Sequence[ArrayLike] | NDArray[np.floating[Any]],
    labels: Sequence[str],
    heatmaps: Sequence[ArrayLike] | NDArray[np.floating[Any]],
    *,
    title: str = "",
    crop_box: ArrayLike | None = None,
    shared_scale: bool = False,
) -> NotebookFigure:
    """A figure with the image and all boxes, and one overlay per heat map with its own box.

    Each map has its own scale, shown by the colour bar under it, unless `shared_scale`. Red marks
    evidence for the score; blue, where values are negative, evidence against it. A box has the same
    colour in all panels.

    Args:
        image: an image, as for `overlay`.
        boxes: at least one (left, top, right, bottom) in pixels; the left edge of the image is 0,
            the right edge is W.
        labels: one per box.
        heatmaps: heat maps as for `overlay`: `[T, H, W]`, or what `attribute_targets` returns for
            one image, `[T, C, H, W]`. They belong to the first T boxes; there may be more boxes.
        title: title over the image.
        crop_box: the part of the image that the model saw, as in `overlay`; boxes are in pixels of
            the whole image.
        shared_scale: one scale for all maps, so that their colours can be compared.

    Raises:
        TypeError: labels are no sequence of strings.
        ValueError: there is no heat map, there are more heat maps than boxes, there is not one
            label for each box, or shapes do not fit.

    Example:
        >>> import numpy as np
        >>> from captum_generic_attn.visualization import detections_figure
        >>> boxes = [(0, 0, 4, 4), (4, 4, 8, 8)]
        >>> figure = detections_figure(np.zeros((8, 8)), boxes, ["bag", "boot"], np.ones((1, 8, 8)))
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['', 'bag']
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['bag', 'boot']
    """
    placed = [checked_box(box) for box in boxes]
    labels = checked_titles(labels, len(placed), of="boxes", name="labels")
    if not 0 < len(heatmaps) <= len(placed):
        raise ValueError(
            f"there are {len(heatmaps)} heat maps and {len(placed)} boxes: give at least one map, "
            "and for each map the box of its detection"
        )
    array = checked_image(image)
    heats = [checked_heat(heatmap) for heatmap in heatmaps]
    scales = scales_of(heats, shared=shared_scale)
    figure, panels = panels_of(array, labels[: len(heats)], title)
    for place, (axes, heat, scale) in enumerate(zip(panels, heats, scales, strict=True)):
        show_map(axes, array, heat, scale, crop_box)
        _draw_box(axes, placed[place], _COLOURS[place % len(_COLOURS)])
        scale_bar(figure, axes, scale, "relevance", ONE if shared_scale else OWN)
    figure.draw_without_rendering()  # computes the sizes of the panels
    written = []
    for place, (box, label) in enumerate(zip(placed, labels, strict=True)):
        colour = _COLOURS[place % len(_COLOURS)]
        _draw_box(figure.axes[0], box, colour)
        written.append(Label(box, label, back=colour, letters="white"))
    height, width = array.shape[:2]
    write_labels(figure.axes[0], written, width, height, size=_LABEL, inside=False)
    return figure


def _draw_box(axes: Axes, box: Box, colour: str) -> None:
    left, top, right, bottom = box
    # Matplotlib's pixel centres have integer coordinates.
    frame = Rectangle(
        (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color=colour, linewidth=1.4
    )
    frame.set_path_effects([withStroke(linewidth=2.8, foreground="white", alpha=0.8)])
    axes.add_patch(frame)
