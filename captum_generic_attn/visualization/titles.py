"""Titles and labels: one for each of what is drawn, in lines or shortened so that they fit.

All figures call it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

if TYPE_CHECKING:
    from collections.abc import Sequence


def checked_titles(
    titles: Sequence[str], count: int, *, of: str = "heat maps", name: str = "titles"
) -> list[str]:
    """As many strings as there are `of` something.

    Raises:
        TypeError: they are one string, or no strings.
        ValueError: they are more or fewer.
    """
    if isinstance(titles, str):
        raise TypeError(f"{name} are a sequence of strings, not the one string {titles!r:.40}")
    found = list(titles)
    strange = [title for title in found if not isinstance(title, str)]
    if strange:
        raise TypeError(f"{name} are strings, not {type(strange[0]).__name__}")
    if len(found) != count:
        raise ValueError(f"{count} {of} need as many {name}, not {len(found)}")
    return found


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """How wide a text is, in points."""
    width: float = text_to_path.get_text_width_height_descent(
        text, FontProperties(size=size, weight="bold" if bold else None), ismath=False
    )[0]
    return 1.04 * width  # letters on the pixels of a screen are somewhat wider


def title_lines(text: str, room: float, size: float, *, bold: bool = False) -> list[str]:
    """A title in lines of at most `room` points, and in those that it has itself."""

    def fits(line: str) -> bool:
        return text_width(line, size, bold=bold) <= room

    lines = []
    for own in text.split("\n"):
        if fits(own):
            lines.append(own)
            continue
        line = ""
        for word in own.split():
            longer = f"{line} {word}" if line else word
            if fits(longer):
                line = longer
                continue
            if line:
                lines.append(line)
            line = word
            while not fits(line):
                end = max(1, sum(fits(line[:length]) for length in range(1, len(line))))
                lines.append(line[:end])
                line = line[end:]
        lines.append(line)
    return lines


def shortened(text: str, room: float, size: float) -> str:
    """A text that is at most `room` points wide: if it is wider, its end is an ellipsis."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(text + "…", size) > room:
        text = text[:-1]
    return text + "…"
