"""Places labels of boxes on an image so that they overlap as little as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.patches import Rectangle

from captum_generic_attn.visualization.titles import shortened, text_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from captum_generic_attn.files.images import Box

_PAD = 2.0  # padding beside the letters, in points


@dataclass(frozen=True)
class Label:
    """The label of a box: its text and colours, and whether the text must stay `whole`."""

    box: Box
    text: str
    whole: bool = False
    back: str = "white"
    letters: str = "black"


def write_labels(
    axes: Axes, labels: Sequence[Label], width: int, height: int, *, size: float, inside: bool
) -> None:
    """Draw each label at the place where it overlaps the previous labels least.

    Args:
        axes: axes that show the image; their size must be known (`Figure.draw_without_rendering`).
        labels: the labels; the first ones get the best places.
        width: width of the image.
        height: height of the image.
        size: font size in points.
        inside: whether labels stay inside their boxes. Then wider labels are shortened, and omitted
            if no letter fits; `whole` labels may be wider than their box. Otherwise a label is
            placed above its box by preference, farther away if necessary, and anywhere on the
            image.
    """
    # The size of a typographic point in pixels of the image.
    point = width / axes.get_window_extent().width * axes.figure.dpi / 72
    tall = 1.6 * size * point
    taken: list[Box] = []
    for label in labels:
        left, right = (label.box[0], label.box[2]) if inside else (0, width)
        room = (min(right, width) - max(left, 0)) / point - 2 * _PAD
        text = label.text if label.whole else shortened(label.text, room, size)
        if text == "…":
            continue
        wide = (text_width(text, size) + 2 * _PAD) * point
        corners = (_inside if inside else _around)(label.box, wide, tall, height)
        spots = [_kept((x, y, x + wide, y + tall), width, height) for x, y in corners]
        spot = min(spots, key=lambda spot: sum(_shared(spot, other) for other in taken))
        taken.append(spot)
        left, top, right, bottom = spot
        # Matplotlib's pixel centres have integer coordinates.
        back = Rectangle(
            (left - 0.5, top - 0.5), right - left, bottom - top, color=label.back, alpha=0.85,
            linewidth=0, zorder=2,
        )  # fmt: skip
        axes.add_patch(back)
        axes.text(
            left + _PAD * point - 0.5, bottom - 0.45 * size * point - 0.5, text,
            fontsize=size, color=label.letters, parse_math=False, in_layout=False,
        )  # fmt: skip


def _inside(box: Box, wide: float, tall: float, _: float) -> list[tuple[float, float]]:
    """Candidate upper left corners inside a box, best first."""
    left, top, right, bottom = box
    rows = top, bottom - tall, (top + bottom - tall) / 2
    return [(x, y) for y in rows for x in (left, right - wide)]


def _around(box: Box, wide: float, tall: float, height: float) -> list[tuple[float, float]]:
    """Candidate upper left corners: above a box, in it, below it, then farther and farther away."""
    left, top, right, bottom = box
    farther = [
        top + side * step * tall for step in range(2, int(height / tall) + 1) for side in (1, -1)
    ]
    rows = top - tall, top, bottom, bottom - tall, *farther
    return [(x, y) for y in rows for x in (left, right - wide)]


def _kept(spot: Box, width: float, height: float) -> Box:
    """Move a label into the image."""
    right = min(max(spot[0], 0.0), max(width - (spot[2] - spot[0]), 0.0)) - spot[0]
    down = min(max(spot[1], 0.0), max(height - (spot[3] - spot[1]), 0.0)) - spot[1]
    return spot[0] + right, spot[1] + down, spot[2] + right, spot[3] + down


def _shared(a: Box, b: Box) -> float:
    """The area of the intersection of two boxes."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    tall = min(a[3], b[3]) - max(a[1], b[1])
    return max(wide, 0.0) * max(tall, 0.0)
