"""The Matplotlib figure that this package returns; notebooks display it without pyplot."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

# 1.5 times Matplotlib's default, so that details of images are visible.
_DPI = 150.0


class NotebookFigure(Figure):
    r"""A Matplotlib figure without window or pyplot, which a notebook displays.

    Jupyter displays Matplotlib's own figures only after `%matplotlib inline`.

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
        """The figure as PNG; Jupyter calls this for the last value of a cell."""
        page = io.BytesIO()
        self.savefig(page, format="png", dpi=self.dpi)
        return page.getvalue()
