"""A heat map over its image: places, forms of what is given, parts of an image, and colours."""

import tracemalloc

import numpy as np
import pytest
import torch
from helpers.tiny_models import pictures, tiny_vit
from PIL import Image
from skimage.color import rgb2lab

from captum_generic_attn import GenericAttention
from captum_generic_attn.comparison import Comparison
from captum_generic_attn.visualization import (
    centre_crop,
    comparison_figure,
    detections_figure,
    grid_figure,
    heads_figure,
    heatmap_figure,
    overlay,
    pairs_figure,
    word_maps_figure,
)
from captum_generic_attn.visualization.overlays import coloured


def test_overlay_keeps_the_places_and_the_order_of_relevance():
    heat = np.random.default_rng(0).random((5, 7))
    panel = overlay(np.ones((5, 7)), heat)
    assert panel.shape == (5, 7, 3)
    darkness = -panel.sum(axis=2)
    assert (np.argsort(darkness, axis=None) == np.argsort(heat, axis=None)).all()


def test_overlay_of_nothing_is_the_pale_picture():
    image = np.random.default_rng(0).random((4, 4))
    panel = overlay(image, np.zeros((4, 4)))
    assert np.ptp(panel, axis=2).max() == 0
    assert (np.argsort(panel[..., 0], axis=None) == np.argsort(image, axis=None)).all()
    assert panel.min() >= 0.4


def test_overlay_counts_negative_values_as_none():
    heat = np.array([[-5.0, 0.0], [1.0, 2.0]])
    assert (overlay(np.zeros((2, 2)), heat) == overlay(np.zeros((2, 2)), heat.clip(0))).all()


def test_overlay_colours_follow_a_given_maximum():
    grey = np.full((2, 2), 0.5)
    halves = overlay(grey, np.array([[0.5, 0.0], [0.0, 1.0]]))
    assert (overlay(grey, np.eye(2), maximum=2.0)[0, 0] == halves[0, 0]).all()
    assert (overlay(grey, 9 * np.eye(2), maximum=1.0) == overlay(grey, np.eye(2))).all()


def test_bytes_and_floats_give_the_same_overlay():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    heat = np.arange(24.0).reshape(4, 6)
    assert np.allclose(overlay(pixels, heat), overlay(pixels / 255, heat), atol=1e-12)


@pytest.mark.parametrize(
    ("image", "heat", "message"),
    [
        (np.zeros((4, 4)), np.zeros((4, 5)), r"4 × 5, its image 4 × 4 pixels"),
        (np.zeros((4, 4)), np.zeros((2, 3, 4, 4)), r"of one example, .*, not \[2, 3, 4, 4\]: pick"),
        (np.zeros((4, 4)), np.zeros(4), r"\[H, W\] or \[C, H, W\], not \[4\]"),
        (np.zeros((3, 4, 4)), np.zeros((4, 4)), r"image is .*, not \[3, 4, 4\]"),
        (np.full((4, 4), 2.0), np.zeros((4, 4)), r"not 2 … 2: undo the model's normalisation"),
        (np.full((4, 4), np.nan), np.zeros((4, 4)), r"values are in 0 … 1"),
        (np.zeros((4, 4)), np.full((4, 4), np.inf), r"NaN or infinite"),
    ],
)
def test_overlay_says_what_does_not_fit(image, heat, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, heat)


# ---------------------------------------------------------------- what attribute returns

PICTURE = np.random.default_rng(1).random((6, 8, 3))
CHANNELS = np.random.default_rng(2).random((3, 6, 8)) - 0.3


@pytest.mark.parametrize(
    "turned",
    [
        torch.from_numpy,
        lambda heat: torch.from_numpy(heat).requires_grad_(),
        lambda heat: torch.from_numpy(heat).float(),
        lambda heat: heat.tolist(),
    ],
    ids=["double", "requires grad", "float", "lists"],
)
@pytest.mark.parametrize("signed", [False, True])
def test_channels_are_summed_whoever_holds_them(turned, signed):
    ours = overlay(PICTURE, turned(CHANNELS), signed=signed)
    assert np.abs(ours - overlay(PICTURE, CHANNELS.sum(0), signed=signed)).max() < 0.01


def test_channels_that_are_alike_are_one_of_them():
    alike = np.stack([CHANNELS[0]] * 3)
    assert (overlay(PICTURE, alike, maximum=1.0) == overlay(PICTURE, alike[0], maximum=1.0)).all()
    assert (
        overlay(PICTURE, alike[:1], maximum=1.0) == overlay(PICTURE, alike[0], maximum=1.0)
    ).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_maps_of_other_precision_are_drawn(dtype):
    heat = torch.arange(48).view(1, 6, 8)
    assert (overlay(PICTURE, heat.to(dtype)) == overlay(PICTURE, heat[0].numpy())).all()


def test_a_picture_is_the_same_picture_in_every_form():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    heat = np.arange(48.0).reshape(6, 8)
    expected = overlay(pixels, heat)
    forms = {
        "pil": Image.fromarray(pixels),
        "palette": Image.fromarray(pixels).quantize(256),
        "opaque": Image.fromarray(pixels).convert("RGBA"),
        "bytes": torch.from_numpy(pixels),
        "as models take it": torch.from_numpy(pixels).permute(2, 0, 1) / 255,
        "channels last": torch.from_numpy(pixels / 255),
    }
    for name, form in forms.items():
        # 8 bits for each pixel of a palette hold 48 colours, but not to the last bit.
        tolerance = 0.02 if name == "palette" else 1e-7
        assert np.abs(overlay(form, heat) - expected).max() < tolerance, name


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            torch.zeros(3, 9, 3),
            r"\[3, 9, 3\] may be \[3, H, W\] or \[H, W, 3\]: give a NumPy array",
        ),
        (torch.zeros(4, 9, 9), r"\(a tensor also \[3, H, W\]\), not \[4, 9, 9\]"),
        (torch.zeros(1, 3, 9, 9), r"not \[1, 3, 9, 9\]"),
        (np.zeros((0, 9)), r"not \[0, 9\]"),
        (torch.full((3, 9, 9), -1.5), r"undo the model's normalisation"),
        (Image.new("I", (9, 9)), "mode I does not say which value is white"),
        (Image.new("F", (9, 9)), "mode F"),
    ],
)
def test_overlay_says_what_is_no_picture(image, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, np.zeros((9, 9)))


# ---------------------------------------------------------------- a part of the image

PHOTO = np.random.default_rng(3).random((70, 100, 3))


def smooth(height, width):
    """A map without symmetry that interpolation hardly changes."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    return np.exp(-((x - 0.2) ** 2 + (y - 0.3) ** 2) / 0.05) + 0.4 * x * y


def test_the_usual_preprocessing_cuts_a_square_from_the_middle():
    assert centre_crop(1000, 700) == (150, 0, 850, 700)
    assert centre_crop(700, 1000) == (0, 150, 700, 850)
    assert centre_crop(64, 64) == (0, 0, 64, 64)
    assert centre_crop(512, 256, share=224 / 256) == (144, 16, 368, 240)
    for share in (0, -0.5, 1.01):
        with pytest.raises(ValueError, match="share above 0 and at most 1"):
            centre_crop(10, 10, share)


def test_centre_crop_is_what_a_preprocessing_shows_the_model():
    """A mark that lies in a corner of the box comes out in that corner of what the model gets."""
    photo = np.zeros((700, 1000), dtype=np.uint8)
    left, top, right, bottom = (round(edge) for edge in centre_crop(1000, 700, share=7 / 8))
    photo[top:bottom, left:right] = 100
    photo[top : top + 50, right - 50 : right] = 200
    resized = Image.fromarray(photo).resize((1000 * 256 // 700, 256))
    corner = (resized.width - 224) // 2, (256 - 224) // 2
    seen = np.asarray(resized.crop((*corner, corner[0] + 224, corner[1] + 224))).astype(int)
    expected = np.full((224, 224), 100)
    expected[:16, -16:] = 200
    assert np.mean(np.abs(seen - expected) > 10) < 0.02  # the edges


@pytest.mark.parametrize("crop_box", [(15, 0, 85, 70), (20, 5, 60, 65), (0, 0, 100, 70)])
def test_cropping_the_overlay_is_overlaying_the_crop(crop_box):
    left, top, right, bottom = crop_box
    heat = smooth(32, 32)
    whole = overlay(PHOTO, heat, crop_box=crop_box)
    assert whole.shape == PHOTO.shape
    size = right - left, bottom - top
    resized = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, 2))
    crop = overlay(PHOTO[top:bottom, left:right], resized, maximum=heat.max())
    assert np.abs(whole[top:bottom, left:right] - crop).max() < 1e-3
    # The model did not see the rest: no colour, and paler than what it saw.
    outside = np.ones((70, 100), dtype=bool)
    outside[top:bottom, left:right] = False
    assert np.ptp(whole[outside], axis=-1).max(initial=0) < 1e-12
    assert whole[outside].min(initial=1) >= 0.75
    assert overlay(PHOTO, np.zeros((2, 2)), crop_box=crop_box)[~outside].min() < 0.6


def test_the_box_of_the_whole_picture_changes_nothing():
    heat = smooth(70, 100)
    assert (
        np.abs(overlay(PHOTO, heat, crop_box=(0, 0, 100, 70)) - overlay(PHOTO, heat)).max() < 1e-9
    )


def test_of_a_padded_picture_the_padding_is_left_out():
    """An image of 100 × 70 in the middle of a square of 100 × 100."""
    heat = smooth(100, 100)
    padded = overlay(PHOTO, heat, crop_box=(0, -15, 100, 85))
    assert np.abs(padded - overlay(PHOTO, heat[15:85], maximum=heat.max())).max() < 1e-9


def test_a_map_that_shrinks_is_averaged():
    """A small photo, enlarged for the model: single pixels of the map do not get lost."""
    checks = np.indices((64, 64)).sum(0) % 2
    panel = overlay(np.ones((8, 8)), checks, crop_box=(0, 0, 8, 8), maximum=1.0)
    assert np.abs(panel - overlay(np.ones((8, 8)), np.full((8, 8), 0.5), maximum=1.0)).max() < 0.01


def test_a_white_picture_shows_where_the_model_did_not_look():
    panel = overlay(np.ones((70, 100)), np.zeros((4, 4)), crop_box=centre_crop(100, 70))
    assert (panel[:, 15:85] == 1).all()
    assert (panel[:, :15] < 0.95).all()


@pytest.mark.parametrize(
    ("crop_box", "message"),
    [
        (None, r"or crop_box= must give .* \(centre_crop, or \(0, 0, 100, 70\) for all of it\)"),
        ((0, 0, 5), r"a box is \(left, top, right, bottom\) in pixels, not \[0, 0, 5\]"),
        ((9, 0, 5, 5), r"not \[9, 0, 5, 5\]"),
        ((200, 0, 300, 70), r"no pixel of the image, which is 100 × 70 pixels"),
        ((5, 5, 5, 5), "no pixel of the image"),
    ],
)
def test_overlay_says_which_area_is_none(crop_box, message):
    with pytest.raises(ValueError, match=message):
        overlay(PHOTO, np.zeros((32, 32)), crop_box=crop_box)


def test_every_figure_takes_an_area():
    heat, crop_box = smooth(32, 32), centre_crop(100, 70)
    expected = overlay(PHOTO, heat, crop_box=crop_box)
    found = Comparison({"ours": torch.from_numpy(heat)[None, None]}, {"ours": 1.0}, {}, {})
    figures = [
        heatmap_figure(PHOTO, [heat], ["map"], crop_box=crop_box),
        detections_figure(PHOTO, [(50, 0, 90, 60)], ["bag"], [heat], crop_box=crop_box),
        pairs_figure(PHOTO, [heat], [[[("word", 1.0)]]], ["text"], crop_box=crop_box),
    ]
    patches = word_maps_figure(PHOTO, ["a"], heat.reshape(1, -1), grid=(32, 32), crop_box=crop_box)
    figures.append(patches)
    for figure in figures:
        assert (np.asarray(figure.axes[1].images[0].get_array()) == expected).all()
        assert figure.axes[0].images[0].get_array().shape == (70, 100, 3)
    top = np.percentile(heat, 99.5)
    expected = overlay(PHOTO, heat, crop_box=crop_box, maximum=top)
    for figure in [
        comparison_figure(PHOTO, found, crop_box=crop_box),
        grid_figure([PHOTO], found, crop_box=crop_box),
    ]:
        assert np.abs(np.asarray(figure.axes[1].images[0].get_array()) - expected).max() < 1e-12


def test_heads_take_an_area():
    relevance = GenericAttention(tiny_vit()).relevance(pictures(), target=1, keep_calls=True)
    laid = {"query": 0, "key": "x", "grid": (4, 4)}
    crop_box = centre_crop(100, 70)
    figure = heads_figure(relevance, image=PHOTO, crop_box=crop_box, calls=[1], **laid)
    call = relevance.calls[1]
    maps = call.per_head[0, :, 0, 1:].reshape(-1, 4, 4)
    for axes, heat in zip(figure.axes[1:], maps, strict=True):
        expected = overlay(PHOTO, heat, crop_box=crop_box, maximum=float(maps.max()))
        assert np.abs(np.asarray(axes.images[0].get_array()) - expected).max() < 1e-6
    for given in (laid, {"image": PHOTO, "boxes": [(0, 0, 9, 9)] * 16, "query": 0, "key": "x"}, {}):
        with pytest.raises(ValueError, match="crop_box= is the part of image= that grid= covers"):
            heads_figure(relevance, crop_box=crop_box, **given)


# ---------------------------------------------------------------- colours

# How people without one of the three kinds of cones see: G. M. Machado, M. M. Oliveira, L. A. F.
# Fernandes, "A physiologically-based model for simulation of color vision deficiency", IEEE TVCG
# 15(6), 2009, the matrices of severity 1.0, which apply to linear RGB.
EYES = {
    "usual": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def seen_by(colours, eyes):
    """CIELAB of sRGB colours as these eyes see them."""
    linear = np.where(colours > 0.04045, ((colours + 0.055) / 1.055) ** 2.4, colours / 12.92)
    linear = (linear @ np.transpose(EYES[eyes])).clip(0, 1)
    colours = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb2lab(colours)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("eyes", EYES)
def test_colours_are_even_for_all_eyes(eyes, sign):
    """Over white, equal steps of relevance are equal steps of lightness, and about equal steps of
    colour, from white to dark.
    """
    shares = np.linspace(0, sign, 33)
    found = seen_by(coloured(shares, np.ones(33)), eyes)
    falls = -np.diff(found[:, 0])
    assert falls.min() > 0
    assert falls.max() / falls.min() < (1.15 if eyes == "usual" else 1.6)
    assert found[0, 0] > 99
    assert found[-1, 0] < 52
    steps = np.linalg.norm(np.diff(found, axis=0), axis=1)
    assert steps.max() / steps.min() < 2.5


@pytest.mark.parametrize("eyes", EYES)
def test_for_and_against_are_told_apart_by_all_eyes(eyes):
    shares = np.linspace(0.1, 1, 10)
    apart = seen_by(coloured(shares, np.ones(10)), eyes) - seen_by(
        coloured(-shares, np.ones(10)), eyes
    )
    assert np.linalg.norm(apart[:, 1:], axis=1).min() > 8


def test_a_picture_shows_through_the_darkest_colour():
    """Dark and light places of an image stay apart, even where all of it is of most relevance."""
    picture = np.tile([0.0, 1.0], (2, 1))
    dark, light = seen_by(overlay(picture, np.ones((2, 2))), "usual")[0]
    assert light[0] - dark[0] > 8
    assert np.hypot(*dark[1:]) > 40  # of the heat's colour all the same


def test_figures_draw_large_pictures_smaller():
    """Places on the axes stay pixels of the image, and no pixel is left out."""
    height, width = 1500, 4001
    picture = np.zeros((height, width, 3))
    picture[:, 1000:3000] = 1
    heat = np.zeros((height, width))
    heat[300:900, 3500:] = 2.0
    figure = heatmap_figure(picture, [heat], crop_box=None)
    shown, drawn = (axes.images[0] for axes in figure.axes[:2])
    for image in (shown, drawn):
        assert image.get_array().shape == (750, 2000, 3)
        assert image.get_extent() == [-0.5, width - 0.5, height - 0.5, -0.5]
    assert np.asarray(shown.get_array()).mean() == pytest.approx(2000 / 4001, abs=1e-3)
    coloured = np.ptp(np.asarray(drawn.get_array()), axis=2) > 0.05
    expected = np.zeros((750, 2000), dtype=bool)
    expected[150:450, 1750:] = True
    assert (coloured != expected).mean() < 1e-3
    # A map of a part of it lies where that is.
    figure = heatmap_figure(picture, [np.ones((2, 2))], crop_box=(1000, 0, 2500, 1500))
    coloured = np.ptp(np.asarray(figure.axes[1].images[0].get_array()), axis=2) > 0.05
    assert coloured.sum(axis=1).tolist() == [pytest.approx(750, abs=1)] * 750
    assert not coloured[:, :499].any()
    with pytest.raises(ValueError, match="they must be of one size"):
        heatmap_figure(picture, [np.ones((2, 2))])


def test_overlays_of_large_pictures_take_little_memory_besides_themselves():
    picture = np.zeros((1500, 2000))
    tracemalloc.start()
    found = overlay(picture, np.ones((3, 4)), crop_box=(0, 0, 2000, 1500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (1500, 2000, 3)
    assert peak < 100 * picture.size + 150 * 2**20  # more than 200 before


def test_colours_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    heat = np.random.default_rng(0).normal(size=(33, 20))
    whole = overlay(np.full((33, 20), 0.3), heat, signed=True)
    monkeypatch.setattr("captum_generic_attn.visualization.overlays._AT_ONCE", 70)
    assert np.array_equal(overlay(np.full((33, 20), 0.3), heat, signed=True), whole)
