"""Figures next to the images in golden_pictures/, which were looked at: what is drawn is where it
was, and mistakes that an image can hide are far from it.

The distance is of colours, which are the heat's, in small and blurred copies, so that letters,
another resolution or another version of Matplotlib weigh little. Each mistake is made on purpose,
in the code that lays tokens out, and must be above the limit. After a wanted change of looks, write
them anew and look at them:

    GOLDEN_PICTURES=write pytest tests/visualization/test_golden_pictures.py
"""

import io
import os
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from helpers.image_distance import LIMIT, distance
from matplotlib.figure import Figure
from PIL import Image

from captum_generic_attn import GenericAttention, demo
from captum_generic_attn.models.detectors import load_detector
from captum_generic_attn.models.dual_encoders import load_dual_encoder
from captum_generic_attn.relevance import input_maps
from captum_generic_attn.tokens import Grid
from captum_generic_attn.visualization import (
    detections_figure,
    grid_figure,
    heads,
    heads_figure,
    heatmap_figure,
    overlay,
    pairs_figure,
    regions,
    regions_figure,
    word_maps,
    word_maps_figure,
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


def drawn_regions_figure():
    """Of each garment, how much of the relevance of two classes is in its box."""
    canvas = demo.canvases()[3]
    names = ["sandal", "ankle boot"]
    targets = [demo.CLASSES.index(name) for name in names]
    maps = GenericAttention(demo.load_model()).attribute_targets(prepared(canvas), targets)[:, 0, 0]
    boxes = np.array([garment.box for garment in canvas.garments])
    values = [
        [heat[top:bottom, left:right].sum().item() for left, top, right, bottom in boxes.tolist()]
        for heat in maps
    ]
    return regions_figure(canvas.image(), boxes, values, names, title="picture")


def of_class_token(canvas, target, *, keep_calls=False):
    method = GenericAttention(demo.load_model())
    return method.relevance(prepared(canvas), demo.CLASSES.index(target), keep_calls=keep_calls)


def drawn_heads_figure():
    """What the class token takes from the patches in two of the layers."""
    canvas = demo.canvases()[0]
    found = of_class_token(canvas, "sandal", keep_calls=True)
    return heads_figure(
        found, query=0, key="x", grid=(8, 8), image=canvas.image(), calls=[1, 3], title="heads"
    )


def drawn_word_maps_figure():
    """Classes in the place of words, and what the class token has of the patches for each."""
    canvas = demo.canvases()[3]
    names = ["sandal", "ankle boot", "bag"]
    rows = [of_class_token(canvas, name).matrix("x", "x")[0, 0, 1:] for name in names]
    return word_maps_figure(canvas.image(), names, torch.stack(rows), grid=(8, 8))


DRAWN = {
    "overlay": drawn_overlay,
    "heatmap_figure": drawn_heatmap_figure,
    "grid_figure": drawn_grid_figure,
    "detections_figure": drawn_detections_figure,
    "pairs_figure": drawn_pairs_figure,
    "regions_figure": drawn_regions_figure,
    "heads_figure": drawn_heads_figure,
    "word_maps_figure": drawn_word_maps_figure,
}


def picture_of(drawn, dpi=DPI):
    """What a function drew, as an image."""
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
    """A mistake in how the tokens of an image are laid out."""

    def to_tokens(grid, values):
        tokens = TO_TOKENS(grid, values)
        return change(tokens) if tokens.ndim == 3 else tokens

    return Grid, "to_tokens", to_tokens


def shifted(capture, stream, values, *rest):
    """Tokens are counted from the prefix token on: it is the first patch, and so on."""
    return FEEDING(capture, stream, values.roll(1, dims=1), *rest)


OF_TOKENS = {
    "upside down": of_pictures(lambda tokens: tokens.flip(1)),
    "left to right": of_pictures(lambda tokens: tokens.flip(2)),
    "transposed": of_pictures(lambda tokens: tokens.transpose(1, 2)),
    "shifted by a token": (input_maps, "_feeding", shifted),
}

BOXES_ON, OF_REGIONS, OF_KEYS = regions.boxes_on, regions._of_regions, heads.of_keys
SHOW_MAP, CHECKED_MATRIX = word_maps.show_map, word_maps._checked_matrix


def of_boxes(change):
    """A mistake in where the regions of an image of 64 × 64 pixels are."""
    return regions, "boxes_on", lambda boxes, picture: change(BOXES_ON(boxes, picture))


OF_BOXES = {
    "upside down": of_boxes(lambda boxes: np.abs([0, 64, 0, 64] - boxes[:, [0, 3, 2, 1]])),
    "left to right": of_boxes(lambda boxes: np.abs([64, 0, 64, 0] - boxes[:, [2, 1, 0, 3]])),
    "transposed": of_boxes(lambda boxes: boxes[:, [1, 0, 3, 2]]),
    "shifted by a region": (regions, "_of_regions", lambda *given: np.roll(OF_REGIONS(*given), 1)),
}


def of_patches(change):
    """A mistake in how what a query takes from the keys `[1 + H, 8, 8]` is laid out."""
    return heads, "of_keys", lambda *given: change(OF_KEYS(*given))


def counted_with_the_class_token(relevance, call, maps, *rest):
    return OF_KEYS(relevance, call, maps._replace(keys=maps.keys + 1), *rest)


OF_HEADS = {
    "upside down": of_patches(lambda maps: maps[:, ::-1]),
    "left to right": of_patches(lambda maps: maps[:, :, ::-1]),
    "transposed": of_patches(lambda maps: maps.swapaxes(1, 2)),
    "shifted by the class token": (heads, "of_keys", counted_with_the_class_token),
}


def of_words(change):
    """A mistake in how the row of a word is laid out as a map."""

    def show_map(axes, picture, heat, *rest):
        return SHOW_MAP(axes, picture, change(heat), *rest)

    return word_maps, "show_map", show_map


def of_matrix(axis):
    """Words or patches are counted from the one before the first."""
    return word_maps, "_checked_matrix", lambda given: np.roll(CHECKED_MATRIX(given), 1, axis)


OF_WORDS = {
    "upside down": of_words(lambda heat: heat[::-1]),
    "left to right": of_words(lambda heat: heat[:, ::-1]),
    "transposed": of_words(lambda heat: heat.T),
    "shifted by a patch": of_matrix(1),
    "shifted by a word": of_matrix(0),
}

OWN_MISTAKES = {
    "regions_figure": OF_BOXES,
    "heads_figure": OF_HEADS,
    "word_maps_figure": OF_WORDS,
}
MISTAKES = {
    (name, mistake): made
    for name in DRAWN
    for mistake, made in OWN_MISTAKES.get(name, OF_TOKENS).items()
}

# Before Matplotlib 3.11 the panels of this figure are smaller: 193 pixels wide, not 200.
ELSEWHERE = {"word_maps_figure"} if mpl.__version_info__ < (3, 11) else set()


@pytest.mark.parametrize("name", [name for name in DRAWN if name not in ELSEWHERE])
def test_a_figure_is_as_it_was(name):
    picture = picture_of(DRAWN[name]())
    if WRITE:
        picture.quantize(256, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)
    found = distance(picture, golden(name))
    assert found < LIMIT


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_a_mistake_is_seen(name, mistake, monkeypatch):
    monkeypatch.setattr(*MISTAKES[name, mistake])
    found = distance(picture_of(DRAWN[name]()), golden(name))
    assert found > 1.3 * LIMIT


@pytest.mark.parametrize("name", [name for name in DRAWN if name not in {"overlay", *ELSEWHERE}])
def test_other_letters_and_another_resolution_are_no_mistake(name):
    with mpl.rc_context({"font.family": "serif"}):
        found = distance(picture_of(DRAWN[name](), dpi=150), golden(name))
    assert found < LIMIT
