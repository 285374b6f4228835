"""Words in the colours of their relevance, set into lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path

from captum_generic_attn.visualization.overlays import LUMA, coloured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Word = Sequence[tuple[str, float]]
"""The pieces of a word, each with its relevance: most words are one piece."""

SIZE = 10
"""Of the letters, in points."""
LINE = 1.9 * SIZE
"""From line to line, in points."""
_GAP = 0.3 * SIZE  # between words
_PAD = 0.15 * SIZE  # between a piece and its edge


def text_width(text: str, size: float) -> float:
    """How wide a text is, in points."""
    width: float = text_to_path.get_text_width_height_descent(
        text, FontProperties(size=size), ismath=False
    )[0]
    return 1.04 * width  # letters on the pixels of a screen are somewhat wider


def set_lines(words: Sequence[Word], width: float) -> list[list[Word]]:
    """Words broken into lines of at most `width` points.

    A word that is wider than a line is broken between its pieces, and a piece that still is loses
    its end to an ellipsis.
    """
    lines: list[list[Word]] = []
    room = 0.0
    for word in words:
        for part in _parts(word, width):
            wide = _width(part) + _GAP
            if not lines or wide - _GAP > room:
                lines.append([])
                room = width
            lines[-1].append(part)
            room -= wide
    return lines


def draw_lines(axes: Axes, lines: Sequence[Sequence[Word]], width: float, maximum: float) -> None:
    """Draw lines into axes that are `width` points wide and `LINE * len(lines)` high.

    Args:
        axes: nothing else should be in it.
        lines: what `set_lines` made of the words.
        width: of a line.
        maximum: the relevance drawn darkest; 0 colours nothing.
    """
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(LINE * len(lines), 0)
    for row, line in enumerate(lines):
        left = 0.0
        for word in line:
            for text, relevance in word:
                wide = text_width(text, SIZE) + 2 * _PAD
                share = np.clip(relevance / maximum, 0, 1) if maximum > 0 else 0.0
                colour = coloured(np.array([share]), np.ones(1))[0]
                axes.add_patch(
                    Rectangle((left, row * LINE + 0.1 * LINE), wide, 0.8 * LINE, color=colour)
                )
                axes.text(
                    left + _PAD, (row + 0.66) * LINE, text, fontsize=SIZE, parse_math=False,
                    color="white" if colour @ LUMA < 0.5 else "black",
                )  # fmt: skip
                left += wide
            left += _GAP


def _parts(word: Word, width: float) -> list[Word]:
    if _width(word) <= width:
        return [word]
    return [[(_shortened(text, width), relevance)] for text, relevance in word]


def _width(word: Word) -> float:
    return sum(text_width(text, SIZE) + 2 * _PAD for text, _ in word)


def _shortened(text: str, width: float) -> str:
    if text_width(text, SIZE) + 2 * _PAD <= width:
        return text
    while text_width(text + "…", SIZE) + 2 * _PAD > width:
        text = text[:-1]
    return text + "…"
