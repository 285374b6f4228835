"""The figure of text × image relevance: the patches or regions of an image that words attend to.

It is for models whose words and patches attend to each other (ViLT, LXMERT, VisualBERT), and draws
what `Relevance.matrix` returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from captum_generic_attn.visualization.arrays import numbers
from captum_generic_attn.visualization.figures import NotebookFigure
from captum_generic_attn.visualization.overlays import (
    checked_image,
    scale_bar,
    show_image,
    show_map,
)
from captum_generic_attn.visualization.regions import boxes_on, draw_regions
from captum_generic_attn.visualization.scales import OWN, scales_of
from captum_generic_attn.visualization.titles import title_lines

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image

Pieces = Sequence[tuple[str, Sequence[int]]]
"""The pieces of a word: the text and the token positions of each."""

# Lengths are in inches, unless noted.
_PANEL = 1.75
_TITLE = 0.25  # a line of a title
_BAR = 0.42  # a colour bar with its numbers
_BAR_ITSELF = 0.09
_ACROSS = 6
_LETTERS = 10  # font size of titles, in points


def word_maps_figure(
    image: ArrayLike | Image,
    words: Sequence[str] | Sequence[Pieces],
    matrix: ArrayLike,
    *,
    grid: tuple[int, int] | None = None,
    boxes: ArrayLike | None = None,
    title: str = "",
    crop_box: ArrayLike | None = None,
    shared_scale: bool = True,
) -> NotebookFigure:
    """A figure with the image, and for each word an overlay of its relevance from the image.

    By default all words share one scale, so that a word without relevance from the image stays
    pale. Red marks evidence for the score; blue, where values are negative, evidence against it.

    Args:
        image: an image, as for `overlay`.
        words: one word per row of `matrix`; or words by their pieces, each a text and its token
            positions, as from `hf.words`. With pieces, the rows of a word's tokens are summed, and
            rows that belong to no word are left out.
        matrix: the relevance of image tokens (columns) for text tokens (rows) in one example, `[Nt,
            Ni]`: `relevance.matrix("input_ids", "pixel_values")[0]`. It may be a selection of rows,
            with as many `words`.
        grid: rows and columns of the patches, which cover the image (or `crop_box`) row by row.
        boxes: instead of a grid, (left, top, right, bottom) of each region in pixels.
        title: title over the image.
        crop_box: the part of the image that the model saw, as in `overlay`.
        shared_scale: one scale for all words; otherwise each word has its own.

    Raises:
        ValueError: shapes do not fit, a value is NaN or infinite, or all are 0: the words never
            attended to the image, as in models whose encoders meet only in the score (CLIP).
        IndexError: a word has tokens that `matrix` has no rows for.

    Example:
        >>> import numpy as np
        >>> from captum_generic_attn.visualization import word_maps_figure
        >>> matrix = np.arange(18.0).reshape(3, 6)
        >>> words = [[("sand", [1]), ("als", [2])]]  # row 0 is a start token
        >>> figure = word_maps_figure(np.ones((8, 12)), words, matrix, grid=(2, 3))
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['', 'sandals']
    """
    array = checked_image(image)
    rows = _rows(words, _checked_matrix(matrix))
    placed = _placed(array, rows[0][1].size, grid, boxes)
    scales = scales_of([values for _, values in rows], shared=shared_scale)
    whole = (0, 0, array.shape[1], array.shape[0]) if crop_box is None else crop_box

    titles = [title_lines(each, 72 * _PANEL, _LETTERS) for each in (title, *(w for w, _ in rows))]
    longest = max(map(len, titles))
    across = min(1 + len(rows), _ACROSS)
    down = -(-(1 + len(rows)) // across)
    tall = _PANEL * array.shape[0] / array.shape[1]
    # A row of colour bars is under each row of panels, or a single bar is under all of them.
    heights = [tall, _BAR_ITSELF] * down if not shared_scale else [tall] * down + [_BAR_ITSELF]
    bars = 1 if shared_scale else down
    figure = NotebookFigure(
        figsize=(across * _PANEL, down * (tall + _TITLE * longest) + bars * _BAR),
        layout="constrained",
    )
    places = figure.add_gridspec(len(heights), across, height_ratios=heights)
    step = 1 if shared_scale else 2
    corners = [(k // across * step, k % across) for k in range(1 + len(rows))]
    panels = [figure.add_subplot(places[corner]) for corner in corners]
    for axes, lines in zip(panels, titles, strict=True):
        axes.set_axis_off()
        axes.set_title("\n".join(lines), fontsize=_LETTERS, parse_math=False)
    show_image(panels[0], array)
    for axes, (_, values), scale in zip(panels[1:], rows, scales, strict=True):
        if placed is not None:
            draw_regions(axes, array, placed, values, scale.maximum)
        else:
            show_map(axes, array, values.reshape(grid), scale, whole)
    if shared_scale:
        bar = figure.add_subplot(places[down, :])
        scale_bar(figure, bar, scales[0], "relevance", "one scale for all words", fill=True)
    else:
        for (row, column), scale in zip(corners[1:], scales, strict=True):
            bar = figure.add_subplot(places[row + 1, column])
            scale_bar(figure, bar, scale, "", OWN, fill=True)
    return figure


def _placed(
    array: NDArray[np.float64], columns: int, grid: tuple[int, int] | None,
    boxes: ArrayLike | None,
) -> NDArray[np.float64] | None:  # fmt: skip
    """The boxes of the columns of a matrix, or `None` if the columns are patches of a grid."""
    if (grid is None) == (boxes is None):
        raise ValueError(
            "the layout of the matrix's columns must be given: grid=(rows, columns) of patches, or "
            "the boxes= of regions"
        )
    if grid is not None and math.prod(grid) != columns:
        raise ValueError(
            f"a grid of {grid[0]} × {grid[1]} has {math.prod(grid)} patches, but the matrix has "
            f"{columns} columns: select the columns of patches, without class tokens"
        )
    placed = None if boxes is None else boxes_on(boxes, array)
    if placed is not None and len(placed) != columns:
        raise ValueError(f"there are {len(placed)} boxes, but {columns} columns in the matrix")
    return placed


def _checked_matrix(matrix: ArrayLike) -> NDArray[np.float64]:
    found = numbers(matrix)
    if found.ndim != 2 or found.size == 0:
        raise ValueError(
            f"the matrix is [Nt, Ni], of one example, not {list(found.shape)}: pick one of the "
            "batch, matrix[0]"
        )
    if not np.isfinite(found).all():
        raise ValueError("the matrix holds NaN or infinite values")
    if not found.any():
        raise ValueError(
            "the matrix is all 0: these words never attended to the image. For models whose "
            "encoders meet only in the score (CLIP), use pairs_figure, which shows words and image "
            "side by side"
        )
    return found


def _rows(
    words: Sequence[str] | Sequence[Pieces], matrix: NDArray[np.float64]
) -> list[tuple[str, NDArray[np.float64]]]:
    """Pair each word with its row `[Ni]`."""
    if isinstance(words, str):
        raise TypeError(f"words are a sequence of words, not one text: {words!r}")
    if len(words) == 0:
        raise ValueError("there are no words")
    tokens = [str(word) for word in words if isinstance(word, str)]
    if not tokens:
        return [_joined(word, matrix) for word in words if not isinstance(word, str)]
    if not len(tokens) == len(words) == len(matrix):
        raise ValueError(
            f"there are {len(words)} words, but {len(matrix)} rows in the matrix: give one for "
            "each token, take fewer rows, or give words by their pieces, (text, tokens)"
        )
    return list(zip(tokens, matrix, strict=True))


def _joined(word: Pieces, matrix: NDArray[np.float64]) -> tuple[str, NDArray[np.float64]]:
    text = "".join(piece for piece, _ in word)
    tokens = [token for _, own in word for token in own]
    if not tokens or not 0 <= min(tokens) <= max(tokens) < len(matrix):
        raise IndexError(f"{text!r} has the tokens {tokens}, the matrix {len(matrix)} rows")
    return text, matrix[tokens].sum(axis=0)
