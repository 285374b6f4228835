"""Figures next to the pictures in golden_pictures/, which were looked at: what is drawn is where it
was, and mistakes that a picture can hide are far from it.

The distance is of colours, which are the heat's, in small and blurred copies, so that letters,
another resolution or another version of Matplotlib weigh little. Each mistake is made on purpose,
in the code that lays tokens out, and must be above the limit. After a wanted change of looks, write
them anew and look at them:

    GOLDEN_PICTURES=write pytest tests/test_golden_pictures.py
"""

import io
import os
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from image_distance import LIMIT, distance
from matplotlib.figure import Figure
from PIL import Image

from captum_generic_attn import GenericAttention, demo, input_maps
from captum_generic_attn.detectors import load_detector
from captum_generic_attn.dual_encoders import load_dual_encoder
from captum_generic_attn.tokens import Grid
from captum_generic_attn.visualization import (
    detections_figure,
    grid_figure,
    heatmap_figure,
    overlay,
    pairs_figure,
)

FOLDER = Path(__file__).parent / "golden_pictures"
WRITE = os.environ.get("GOLDEN_PICTURES") == "write"
DPI = 120


def prepared(canvas):
    return demo.preprocess(canvas.image())[None]


def drawn_overlay():
    """One class: an array, no figure."""
    canvas = demo.canvases()[0]
    heat = GenericAttention(demo.load_model()).attribute(prepared(canvas), target=3)[0]
    return overlay(canvas.image(), heat)


def drawn_heatmap_figure():
    canvas = demo.canvases()[3]
    targets = [demo.CLASSES.index(name) for name in ("sandal", "ankle boot")]
    maps = GenericAttention(demo.load_model()).attribute_targets(prepared(canvas), targets)
    return heatmap_figure(canvas.image(), maps[:, 0], ["sandal", "ankle boot"], title="picture")


def drawn_grid_figure():
    canvases = demo.canvases()[:2]
    method = GenericAttention(demo.load_model())
    batch = torch.cat([prepared(canvas) for canvas in canvases])
    columns = {
        name: method.attribute(batch, demo.CLASSES.index(name)) for name in ("trouser", "bag")
    }
    images = [canvas.image() for canvas in canvases]
    return grid_figure(images, columns, names=["one", "two"], scale="row")


def drawn_detections_figure():
    pytest.importorskip("transformers")
    canvas = demo.canvases()[1]
    detector = load_detector("garments-detr")
    pixels = detector.preprocess(canvas.image())
    found = detector.detections(pixels, threshold=0.5)[:3]
    scores = [(one.query, one.target) for one in found]
    maps = GenericAttention(detector.model).attribute_targets(pixels[None], scores)
    boxes, labels = [one.box for one in found], [one.name for one in found]
    return detections_figure(canvas.image(), boxes, labels, maps[:, 0])


def drawn_pairs_figure():
    pytest.importorskip("transformers")
    canvas = demo.canvases()[3]
    encoder = load_dual_encoder("garments-clip")
    texts = encoder.encode(["a sandal", "a boot in the upper left"])
    forward, inputs, rest = encoder.pairs(encoder.preprocess(canvas.image()), texts)
    in_picture, in_texts = GenericAttention(forward).attribute(inputs, None, rest)
    words = [
        [[(piece.text, float(values[list(piece.tokens)].sum())) for piece in word] for word in text]
        for text, values in zip(texts.words, in_texts, strict=True)
    ]
    return pairs_figure(canvas.image(), in_picture, words, ["first", "second"], title="picture")


DRAWN = {
    "overlay": drawn_overlay,
    "heatmap_figure": drawn_heatmap_figure,
    "grid_figure": drawn_grid_figure,
    "detections_figure": drawn_detections_figure,
    "pairs_figure": drawn_pairs_figure,
}


def picture_of(drawn, dpi=DPI):
    """What a function drew, as a picture."""
    if not isinstance(drawn, Figure):
        return Image.fromarray((drawn * 255).round().astype(np.uint8)).resize((256, 256), 0)
    page = io.BytesIO()
    drawn.savefig(page, format="png", dpi=dpi)
    return Image.open(page).convert("RGB")


def golden(name):
    return Image.open(FOLDER / f"{name}.png")


# ---------------------------------------------------------------- mistakes

TO_TOKENS, FEEDING = Grid.to_tokens, input_maps._feeding


def of_pictures(change):
    """A mistake in how the tokens of a picture are laid out."""

    def to_tokens(grid, values):
        tokens = TO_TOKENS(grid, values)
        return change(tokens) if tokens.ndim == 3 else tokens

    return Grid, "to_tokens", to_tokens


def shifted(capture, stream, values, *rest):
    """Tokens are counted from the prefix token on: it is the first patch, and so on."""
    return FEEDING(capture, stream, values.roll(1, dims=1), *rest)


MISTAKES = {
    "upside down": of_pictures(lambda tokens: tokens.flip(1)),
    "left to right": of_pictures(lambda tokens: tokens.flip(2)),
    "transposed": of_pictures(lambda tokens: tokens.transpose(1, 2)),
    "shifted by a token": (input_maps, "_feeding", shifted),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_as_it_was(name):
    picture = picture_of(DRAWN[name]())
    if WRITE:
        picture.quantize(256, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)
    found = distance(picture, golden(name))
    assert found < LIMIT


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", DRAWN)
def test_a_mistake_is_seen(name, mistake, monkeypatch):
    monkeypatch.setattr(*MISTAKES[mistake])
    found = distance(picture_of(DRAWN[name]()), golden(name))
    assert found > 1.3 * LIMIT


@pytest.mark.parametrize("name", [name for name in DRAWN if name != "overlay"])
def test_other_letters_and_another_resolution_are_no_mistake(name):
    with mpl.rc_context({"font.family": "serif"}):
        found = distance(picture_of(DRAWN[name](), dpi=150), golden(name))
    assert found < LIMIT
