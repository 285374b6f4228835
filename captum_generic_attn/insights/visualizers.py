"""Captum Insights on the models that come with the package: for `__main__` and the tutorial, and to
be read by who wants the same for another model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from captum_generic_attn.insights.entries import register, select
from captum_generic_attn.insights.requirement import require_insights
from captum_generic_attn.models.checkpoints import require_transformers

if TYPE_CHECKING:
    from captum.insights import AttributionVisualizer, Batch

    from captum_generic_attn.demo import Canvas

CAPTIONS = ("both are there", "one is there", "none is there")
"""What is true of the garments that the three captions of a canvas name."""


def image_visualizer(method: str = "Generic Attention") -> AttributionVisualizer:
    """The shipped vision transformer and the 24 canvases, four a page, over and over.

    A class's score is its probability, each by itself: a canvas has several right answers. A
    canvas's label is the most probable of the garments that are on it.

    Args:
        method: the name of the method that is selected first.

    Raises:
        ImportError: if Captum Insights is not installed.
        ValueError: if there is no such method.

    Example:
        >>> image_visualizer().classes[:3]  # doctest: +SKIP
        ['top', 'trouser', 'dress']
    """
    require_insights()
    from captum.insights import AttributionVisualizer, Batch
    from captum.insights.attr_vis.features import ImageFeature

    from captum_generic_attn import demo

    model = demo.load_model()

    def examples() -> Iterator[Batch]:
        # Without an end: Captum's own repetition leaves examples out.
        for canvas in itertools.cycle(demo.canvases()):
            pixels = demo.preprocess(canvas.image())[None]
            there = [demo.CLASSES.index(garment.name) for garment in canvas.garments]
            with torch.no_grad():
                scores = model(pixels)[0, there]
            yield Batch((pixels,), torch.tensor([there[int(scores.argmax())]]))

    register()
    visualizer = AttributionVisualizer(
        model, list(demo.CLASSES), ImageFeature("canvas", None, None, _shown), examples(),
        score_func=torch.sigmoid,
    )  # fmt: skip
    select(visualizer, method)
    return visualizer


def caption_visualizer(method: str = "Generic Attention (per token)") -> AttributionVisualizer:
    """The shipped CLIP, and canvases with three captions each, four a page, over and over.

    A caption names two garments. Both are on the canvas, or one of them, or none: these are the
    classes. Scores are the probabilities that CLIP gives the captions; what is explained is the
    logit of one, so that only its words have relevance. Canvases that show a single class of
    garment are left out.

    Args:
        method: the name of the method that is selected first.

    Raises:
        ImportError: if Captum Insights or transformers is not installed.
        ValueError: if there is no such method.

    Example:
        >>> caption_visualizer().classes  # doctest: +SKIP
        ['both are there', 'one is there', 'none is there']
    """
    require_insights()
    require_transformers("the shipped CLIP")
    from captum.insights import AttributionVisualizer, Batch
    from captum.insights.attr_vis.features import ImageFeature, TextFeature

    from captum_generic_attn import demo

    def examples() -> Iterator[Batch]:
        for canvas in itertools.cycle(demo.canvases()):
            captions = captions_of(canvas)
            if captions:
                pixels = demo.preprocess(canvas.image())[None]
                ids = demo.tokenize(captions).flatten()[None]
                yield Batch((pixels, ids), torch.tensor([0]))

    register()
    visualizer = AttributionVisualizer(
        CaptionChoice(demo.load_clip(), len(CAPTIONS)), list(CAPTIONS),
        [ImageFeature("canvas", None, None, _shown), TextFeature("captions", None, None, _words)],
        examples(), score_func=lambda logits: logits.softmax(-1),
    )  # fmt: skip
    select(visualizer, method)
    return visualizer


class CaptionChoice(nn.Module):
    """A dual encoder as a classifier, whose classes are the captions that come with an image.

    Args:
        model: takes `pixel_values` and `input_ids`; returns `image_embeds` and `text_embeds`, and
            has a `logit_scale`, as Hugging Face's CLIP.
        captions: how many each image has.

    Example:
        >>> from captum_generic_attn import demo
        >>> choice = CaptionChoice(demo.load_clip(), 2)
        >>> ids = demo.tokenize(["a bag", "a dress"]).flatten()[None]
        >>> choice(demo.preprocess(demo.canvases()[0].image())[None], ids).shape
        torch.Size([1, 2])
    """

    def __init__(self, model: nn.Module, captions: int) -> None:
        super().__init__()
        self.model = model
        self.captions = captions

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Logits `[B, captions]`, of images `[B, 3, H, W]` and ids `[B, captions · N]`."""
        # Captions stand one behind the other, as CLIP takes them.
        each = ids.reshape(len(ids) * self.captions, -1)
        found = self.model(pixel_values=pixels, input_ids=each)
        texts = found.text_embeds.reshape(len(ids), self.captions, -1)
        cosines = torch.einsum("bd,bkd->bk", found.image_embeds, texts)
        return cosines * cast(Tensor, self.model.logit_scale).exp()


def captions_of(canvas: Canvas) -> tuple[str, ...]:
    """Captions that name two garments on the canvas, one, and none; empty for a single class.

    Example:
        >>> from captum_generic_attn import demo
        >>> captions_of(demo.canvases()[0])
        ('a sandal and a trouser', 'a sandal and a top', 'a top and a bag')
    """
    from captum_generic_attn import demo

    def pair(one: str, other: str) -> str:
        return f"a {one} and a {other}".replace("ankle boot", "boot")  # a word of CLIP's

    there = list(dict.fromkeys(garment.name for garment in canvas.garments))
    absent = [name for name in demo.CLASSES if name not in there]
    if len(there) < 2:
        return ()
    return pair(there[0], there[1]), pair(there[0], absent[0]), pair(absent[0], absent[1])


def _shown(pixels: Tensor) -> Tensor:
    """The image as it was before `demo.preprocess`, in 0 … 1."""
    from captum_generic_attn import demo

    return (pixels * demo.STD + demo.MEAN).clamp(0, 1)


def _words(ids: Tensor) -> list[str]:
    """A word for each token; where a caption starts, its class."""
    from captum_generic_attn import demo
    from captum_generic_attn.demo.models import END, START

    starts = (f"{name}:" for name in CAPTIONS)
    words = [demo.VOCABULARY[index] for index in ids.flatten().tolist()]
    return [next(starts) if word == START else "·" if word == END else word for word in words]
