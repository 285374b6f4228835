"""The figure of a picture and texts: where in the picture and at which words a text fits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from captum_generic_attn.visualization.figures import NotebookFigure
from captum_generic_attn.visualization.overlays import (
    checked_heat,
    checked_picture,
    overlay,
    scale_bar,
)
from captum_generic_attn.visualization.words import LINE, Word, draw_lines, set_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image

# In inches.
_PANEL = 2.9
_GAP = 0.3  # between panels
_EDGE = 0.12
_TITLE = 0.28
_BAR = 0.34  # with its numbers, and what is above it
_BAR_ITSELF = 0.09


def pairs_figure(
    image: ArrayLike | Image,
    heatmaps: Sequence[ArrayLike] | NDArray[np.floating[Any]],
    texts: Sequence[Sequence[Word]],
    titles: Sequence[str],
    *,
    title: str = "",
    area: ArrayLike | None = None,
) -> NotebookFigure:
    """A figure with the picture, and for each text an overlay over the words in their colours.

    Maps and texts have a scale of their own each, which the bars under them show: the relevance of
    a word and that of a place in the picture are not measured alike.

    Args:
        image: as `overlay` takes it.
        heatmaps: at least one, as `overlay` takes them: `[T, H, W]` or `[T, C, H, W]`.
        texts: one per heat map: its words, each a sequence of (text, relevance). A word is one such
            piece, or several that a tokenizer has broken it into. Negative values count as 0.
        titles: one per heat map.
        title: stands over the picture.
        area: the part of the picture that the model saw, as in `overlay`.

    Raises:
        ValueError: no heat map, not one text and title for each, a text without words, or shapes
            and values that do not fit.

    Example:
        >>> import numpy as np
        >>> from captum_generic_attn.visualization import pairs_figure
        >>> text = [[("two", 0.1)], [("cat", 0.9), ("s", 0.3)]]
        >>> figure = pairs_figure(np.zeros((8, 8)), [np.eye(8)], [text], ["logit 3.2"])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['', 'logit 3.2']
        >>> [word.get_text() for word in figure.axes[3].texts]
        ['two', 'cat', 's']
    """
    if len(heatmaps) == 0:
        raise ValueError("there is no heat map to draw")
    if not len(heatmaps) == len(texts) == len(titles):
        raise ValueError(
            f"{len(heatmaps)} heat maps need as many texts and titles, not {len(texts)} and "
            f"{len(titles)}"
        )
    picture = checked_picture(image)
    most = [_most(words) for words in texts]
    lines = [set_lines(words, 72 * _PANEL) for words in texts]
    rows = -(-(len(texts) + 1) // 4)
    columns = -(-(len(texts) + 1) // rows)
    tall = _PANEL * picture.shape[0] / picture.shape[1]
    counts = [0, *map(len, lines)]  # the picture has no words
    # A row of panels is as high as its longest text needs.
    longest = [max(counts[row * columns : (row + 1) * columns]) for row in range(rows)]
    heights = [_TITLE + tall + _BAR + LINE / 72 * count + _BAR + _GAP for count in longest]
    size = columns * (_PANEL + _GAP) - _GAP + 2 * _EDGE, sum(heights) - _GAP + 2 * _EDGE
    figure = NotebookFigure(figsize=size)

    def axes_at(place: int, below: float, high: float) -> Axes:
        """Axes as wide as a panel, `below` inches under the top of the panel."""
        row, column = divmod(place, columns)
        left = _EDGE + column * (_PANEL + _GAP)
        top = _EDGE + sum(heights[:row]) + below
        return figure.add_axes(
            (left / size[0], 1 - (top + high) / size[1], _PANEL / size[0], high / size[1])
        )

    def show(place: int, pixels: NDArray[np.float64], name: str) -> None:
        axes = axes_at(place, _TITLE, tall)
        axes.set_axis_off()
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=10, parse_math=False)

    def bar(place: int, below: float, maximum: float) -> None:
        axes = axes_at(place, below, _BAR_ITSELF)
        scale_bar(figure, axes, 0.0, maximum, "relevance, own scale", fill=True)

    show(0, picture, title)
    for place, heatmap in enumerate(heatmaps, 1):
        maximum = max(float(checked_heat(heatmap).max()), 0.0)
        show(place, overlay(picture, heatmap, area=area, maximum=maximum), titles[place - 1])
        bar(place, _TITLE + tall + 0.06, maximum)
        own = lines[place - 1]
        below = _TITLE + tall + _BAR
        high = LINE / 72 * len(own)
        draw_lines(axes_at(place, below, high), own, 72 * _PANEL, most[place - 1])
        bar(place, below + high + 0.06, most[place - 1])
    return figure


def _most(words: Sequence[Word]) -> float:
    """The largest relevance of a piece, at least 0."""
    values = [relevance for word in words for _, relevance in word]
    if not values:
        raise ValueError("a text has no words")
    if not np.isfinite(values).all():
        raise ValueError("the relevance of a word is NaN or infinite")
    return max(*values, 0.0)
