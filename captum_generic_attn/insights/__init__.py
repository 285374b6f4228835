"""Our methods on the page of Captum Insights, which shows a model's scores, and why, in a browser.

Captum 0.8 is the last release that has Insights: `pip install 'captum-generic-attn[insights]'`.
This module can be imported without it; what needs it says so. For your own model, in a notebook or
a script::

    from captum.insights import AttributionVisualizer, Batch
    from captum.insights.attr_vis.features import ImageFeature
    from captum_generic_attn import insights

    insights.register()
    visualizer = AttributionVisualizer(
        model, classes, ImageFeature("image", None, [normalise]),
        dataset=[Batch(images, labels)], score_func=lambda logits: logits.softmax(-1),
    )
    insights.select(visualizer, "Generic Attention")
    visualizer.serve(debug=True)  # goes on in a thread; insights.serve(visualizer) stays here

Each example needs a label, and with `debug=True` errors are seen. `(per token)` behind a method's
name: each token counts once, however many pixels it has, so that the contributions of images and
words can be compared. `python -m captum_generic_attn.insights` shows the models that come with the
package (`visualizers`). `entries` has what the page calls, `fields` its arguments.
"""

from captum_generic_attn.insights.entries import per_token, register, select, unregister
from captum_generic_attn.insights.server import serve
from captum_generic_attn.insights.visualizers import (
    CaptionChoice,
    caption_visualizer,
    captions_of,
    image_visualizer,
)

__all__ = [
    "CaptionChoice",
    "caption_visualizer",
    "captions_of",
    "image_visualizer",
    "per_token",
    "register",
    "select",
    "serve",
    "unregister",
]
