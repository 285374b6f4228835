"""Visualization: turns what `attribute` returns into arrays, Matplotlib figures and HTML.

No function touches pyplot's state, so figures can be made in threads and without a display. A
notebook shows a returned figure, and `figure.savefig(path)` writes it. Words are drawn literally: a
`$` starts no formula.
"""

from captum_generic_attn.visualization.crop_boxes import centre_crop
from captum_generic_attn.visualization.detections import detections_figure
from captum_generic_attn.visualization.figures import NotebookFigure
from captum_generic_attn.visualization.grids import grid_figure
from captum_generic_attn.visualization.heads import heads_figure, layers_figure
from captum_generic_attn.visualization.heatmaps import comparison_figure, heatmap_figure
from captum_generic_attn.visualization.html import Html, text_html
from captum_generic_attn.visualization.overlays import overlay
from captum_generic_attn.visualization.pairs import pairs_figure
from captum_generic_attn.visualization.regions import regions_figure
from captum_generic_attn.visualization.texts import compared_words, text_figure, word_relevance
from captum_generic_attn.visualization.word_maps import word_maps_figure

__all__ = [
    "Html",
    "NotebookFigure",
    "centre_crop",
    "compared_words",
    "comparison_figure",
    "detections_figure",
    "grid_figure",
    "heads_figure",
    "heatmap_figure",
    "layers_figure",
    "overlay",
    "pairs_figure",
    "regions_figure",
    "text_figure",
    "text_html",
    "word_maps_figure",
    "word_relevance",
]
