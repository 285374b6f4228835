"""Draws lines of words that are coloured by their relevance."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rcParams
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from captum_generic_attn.visualization.overlays import coloured, luminance
from captum_generic_attn.visualization.titles import shortened, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

Word = Sequence[tuple[str, float]]
"""The pieces of a word, each with its relevance; most words have one piece."""

SIZE = 10
"""Font size in points."""
LINE = 1.9 * SIZE
"""Line height in points."""
_GAP = 0.3 * SIZE  # between words
_PAD = 0.15 * SIZE  # between a piece and its edge
_BREAKS = {"\n": "↵", "\r": "↵", "\t": "⇥"}  # a line of a figure cannot contain these
_NO_GLYPH = "□"


def share_of(relevance: float, maximum: float, *, signed: bool = False) -> float:
    """Relevance as a fraction of the maximum: 0 … 1, or -1 … 1 if `signed`."""
    if maximum <= 0:
        return 0.0
    return float(np.clip(relevance / maximum, -1 if signed else 0, 1))


def colours_of(share: float) -> tuple[NDArray[np.float64], str]:
    """The background colour of a word in 0 … 1, and "black" or "white" letters, by contrast."""
    back = coloured(np.array([share], dtype=np.float64), np.ones(1))[0]
    # At this luminance, the WCAG contrasts with black and with white are equal: 4.6 to 1.
    return back, "white" if luminance(back) < 0.179 else "black"


def right_to_left(words: Sequence[Word]) -> bool:
    """Whether a text runs from right to left, by its first letter (Hebrew, Arabic, …)."""
    for word in words:
        for text, _ in word:
            for letter in text:
                kind = unicodedata.bidirectional(letter)
                if kind in {"L", "R", "AL"}:
                    return kind != "L"
    return False


def drawable(texts: Iterable[Sequence[Word]]) -> list[list[Word]]:
    """Replace the characters for which Matplotlib's font has no glyph.

    Warns:
        UserWarning: once, for all characters that a box replaces.
    """
    texts = [[list(word) for word in text] for text in texts]
    letters = {letter for text in texts for word in text for piece, _ in word for letter in piece}
    missing = letters - _BREAKS.keys() - _drawn_by_fonts(letters)
    if missing:
        some = " ".join(map(_shown, sorted(missing)[:12]))
        warnings.warn(
            f"Matplotlib's font has no glyph for {len(missing)} characters, such as {some}: a box "
            "replaces each. Add a font that has them, such as matplotlib.rcParams['font.family'] "
            "= ['sans-serif', 'Noto Sans CJK JP'], or write HTML (text_html)",
            UserWarning,
            stacklevel=3,
        )
    table = str.maketrans(_BREAKS | dict.fromkeys(missing, _NO_GLYPH))
    return [[[(piece.translate(table), r) for piece, r in word] for word in text] for text in texts]


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else f"U+{ord(letter):04X}"


def _drawn_by_fonts(letters: set[str]) -> set[str]:
    """The letters for which one of Matplotlib's current fonts has a glyph."""
    found: set[str] = set()
    for family in rcParams["font.family"]:
        try:  # one font per family, as in Matplotlib
            path = findfont(FontProperties(family=[family]), fallback_to_default=False)
        except ValueError:  # not installed
            continue
        glyphs = get_font(path).get_charmap()
        found |= {letter for letter in letters if ord(letter) in glyphs}
    return found


def set_lines(words: Sequence[Word], width: float) -> list[list[Word]]:
    """Break words into lines of at most `width` points.

    A word that is wider than a line is broken between its pieces. A piece that is still too wide is
    shortened with an ellipsis.
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


def draw_lines(
    axes: Axes,
    lines: Sequence[Sequence[Word]],
    width: float,
    maximum: float,
    *,
    signed: bool = False,
) -> None:
    """Draw lines into axes that are `width` points wide and `LINE * len(lines)` high.

    Args:
        axes: empty axes.
        lines: the words in lines, from `set_lines`.
        width: width of a line in points.
        maximum: the relevance of the darkest colour; with 0, nothing is coloured.
        signed: whether negative relevance is drawn; otherwise it counts as 0.
    """
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(LINE * len(lines), 0)
    mirrored = right_to_left([word for line in lines for word in line])
    for row, line in enumerate(lines):
        left = 0.0
        for word in line:
            for text, relevance in word:
                wide = text_width(text, SIZE) + 2 * _PAD
                back, letters = colours_of(share_of(relevance, maximum, signed=signed))
                x = width - left - wide if mirrored else left
                axes.add_patch(
                    Rectangle((x, row * LINE + 0.1 * LINE), wide, 0.8 * LINE, color=back)
                )
                axes.text(
                    x + _PAD, (row + 0.66) * LINE, text, fontsize=SIZE, parse_math=False,
                    color=letters,
                )  # fmt: skip
                left += wide
            left += _GAP


def _parts(word: Word, width: float) -> list[Word]:
    if _width(word) <= width:
        return [word]
    return [[(shortened(text, width - 2 * _PAD, SIZE), relevance)] for text, relevance in word]


def _width(word: Word) -> float:
    return sum(text_width(text, SIZE) + 2 * _PAD for text, _ in word)
