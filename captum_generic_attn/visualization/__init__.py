"""Pictures of relevance: arrays in, arrays or Matplotlib figures out. The command line calls them;
notebooks may.

No function touches pyplot's state, so that figures can be made in threads and without a display; a
notebook shows a returned figure by itself, and `figure.savefig(path)` writes it. Words are drawn as
they are: a `$` in them starts no formula.
"""

from captum_generic_attn.visualization.detections import detections_figure
from captum_generic_attn.visualization.heatmaps import comparison_figure, heatmap_figure
from captum_generic_attn.visualization.overlays import overlay
from captum_generic_attn.visualization.pairs import pairs_figure

__all__ = [
    "comparison_figure",
    "detections_figure",
    "heatmap_figure",
    "overlay",
    "pairs_figure",
]
