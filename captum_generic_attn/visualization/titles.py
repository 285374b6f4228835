"""Checks titles and labels, and breaks or shortens them so that they fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

if TYPE_CHECKING:
    from collections.abc import Sequence


def checked_titles(
    titles: Sequence[str], count: int, *, of: str = "heat maps", name: str = "titles"
) -> list[str]:
    """Check that there are `count` strings, one for each of what `of` names.

    Raises:
        TypeError: they are one string, or no strings.
        ValueError: there are more or fewer.
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
    """The width of a text in points."""
    width: float = text_to_path.get_text_width_height_descent(
        text, FontProperties(size=size, weight="bold" if bold else None), ismath=False
    )[0]
    return 1.04 * width  # letters are somewhat wider when aligned to the pixels of a screen


def title_lines(text: str, room: float, size: float, *, bold: bool = False) -> list[str]:
    """Break a title into lines of at most `room` points; its own line breaks are kept."""

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
    """Shorten a text to at most `room` points, with an ellipsis at its end."""
    if text_width(text, size) <= room:
        return text
    while text and text_width(text + "…", size) > room:
        text = text[:-1]
    return text + "…"
