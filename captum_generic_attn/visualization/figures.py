"""The kind of Matplotlib figure that this package returns: a notebook shows it by itself.

All functions of the package that make a figure make one of these.
"""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

# Half as fine again as Matplotlib's own, since images are looked into.
_DPI = 150.0


class NotebookFigure(Figure):
    r"""A Matplotlib figure that belongs to no window and no pyplot, and shows itself in a notebook.

    Jupyter knows how to show Matplotlib's own figures after `%matplotlib inline` alone.

    Example:
        >>> figure = NotebookFigure(figsize=(1, 1))
        >>> figure._repr_png_()[:4]
        b'\x89PNG'
    """

    def __init__(
        self, figsize: tuple[float, float] | None = None, dpi: float = _DPI, **options: Any
    ) -> None:
        super().__init__(figsize, dpi, **options)

    def _repr_png_(self) -> bytes:
        """What Jupyter asks of the last value of a cell."""
        page = io.BytesIO()
        self.savefig(page, format="png", dpi=self.dpi)
        return page.getvalue()
