"""`explain` draws the user's own image, with the map on the part that the model saw."""

import re

import numpy as np
import pytest
from helpers import hugging_face_folders as folders
from helpers.command_line import explain, recorded
from PIL import Image

from captum_generic_attn import demo
from captum_generic_attn.cli.seen import see
from captum_generic_attn.models.classifiers import load_classifier
from captum_generic_attn.models.detectors import load_detector
from captum_generic_attn.visualization import overlay

PICTURE = "photo.png"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def figures(monkeypatch):
    return recorded(monkeypatch, "heatmap_figure")


def composition(width=1000, height=700):
    """A canvas in the middle and one at the left edge, which a square from the middle misses."""
    picture = Image.new("RGB", (width, height), "white")
    middle, aside = (canvas.image() for canvas in demo.canvases()[:2])
    picture.paste(middle.resize((300, 300)), ((width - 300) // 2, (height - 300) // 2))
    picture.paste(aside.resize((120, 120)), (10, (height - 120) // 2))
    return picture


def crops_beyond(folder):
    """A CLIP whose image processor makes a frame round the image."""
    folders.clip(folder)
    crop = {"height": 32, "width": 32}
    images = folders.T.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=crop)
    folders.T.CLIPProcessor(images, folders.clip_tokenizer()).save_pretrained(folder)


def test_what_lies_outside_of_the_crop_is_shown_without_colour(figures):
    composition().save(PICTURE)
    output = explain(PICTURE, "--target", "sandal")
    assert "Warning" not in output
    ((image, heatmaps, _, options),) = figures
    assert (np.asarray(image) == np.asarray(composition())).all()
    assert heatmaps.shape == (1, 64, 64)
    left, top, right, bottom = options["crop_box"]
    assert (left, right) == pytest.approx((150, 850), abs=0.5)
    assert (top, bottom) == (0, 700)

    shown = overlay(image, heatmaps[0], crop_box=options["crop_box"])
    colour = np.ptp(shown, axis=2)
    assert colour[:, :149].max() < 1e-9
    assert colour[:, 851:].max() < 1e-9
    assert colour[:, 151:849].max() > 0.4
    # The canvas at the left edge is there, in greys.
    assert np.ptp(shown[290:410, 10:130]) > 0.1
    # The map's highest value is over the place that it is of.
    row, column = np.unravel_index(heatmaps[0].argmax(), (64, 64))
    over_white = overlay(np.ones((700, 1000)), heatmaps[0], crop_box=options["crop_box"])
    y, x = np.unravel_index(over_white.sum(axis=2).argmin(), (700, 1000))
    assert (x, y) == pytest.approx((150 + (column + 0.5) * 700 / 64, (row + 0.5) * 700 / 64), abs=9)


def test_a_picture_of_the_models_own_size_looks_as_ever(figures):
    explain("--target", "sandal")
    ((image, heatmaps, _, options),) = figures
    assert (
        overlay(image, heatmaps[0], crop_box=options["crop_box"]) == overlay(image, heatmaps[0])
    ).all()


def test_a_turned_photo_is_drawn_upright(figures):
    upright = composition(400, 600)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90° clockwise
    upright.rotate(90, expand=True).save("turned.png", exif=exif)
    explain("turned.png", "--target", "sandal")
    upright.save(PICTURE)
    explain(PICTURE, "--target", "sandal")
    turned, expected = figures
    assert (np.asarray(turned[0]) == np.asarray(upright)).all()
    assert (turned[1] == expected[1]).all()
    assert (
        turned[3]["crop_box"]
        == expected[3]["crop_box"]
        == pytest.approx((0, 100, 400, 500), abs=0.5)
    )


def test_a_huge_photo_is_drawn_smaller_with_the_same_part_seen(figures):
    composition(3000, 2000).save(PICTURE)
    explain(PICTURE, "--target", "sandal")
    ((image, _, _, options),) = figures
    assert image.size == (1200, 800)
    assert options["crop_box"] == pytest.approx((200, 0, 1000, 800), abs=0.5)


def test_boxes_are_drawn_and_printed_in_pixels_of_the_picture(monkeypatch):
    figures = recorded(monkeypatch, "detections_figure")
    wide = Image.new("RGB", (2400, 1600), "white")
    wide.paste(demo.canvases()[0].image().resize((1600, 1600)), (400, 0))
    wide.save(PICTURE)
    output = explain(PICTURE, "--model", "garments-detr")
    assert "(boxes in pixels of the image, 2400 wide and 1600 high)" in output
    ((image, boxes, _, _, _),) = figures
    assert image.size == (1200, 800)
    detector = load_detector("garments-detr")
    found = detector.detections(detector.preprocess(wide))
    assert len(boxes) == len(found) > 2
    for box, detection in zip(boxes, found, strict=True):
        # What the model got are 64 of the image's 1600 pixels, behind 400 that it did not get.
        edges = [25 * edge + start for edge, start in zip(detection.box, (400, 0) * 2, strict=True)]
        assert box == pytest.approx([edge / 2 for edge in edges], abs=0.5)
        row = re.search(rf" {detection.query} {detection.name} \S+ (\d+) (\d+) (\d+) (\d+)", output)
        assert [int(edge) for edge in row.groups()] == pytest.approx(edges, abs=1.5)


def test_a_comparison_shows_the_whole_picture(monkeypatch):
    figures = recorded(monkeypatch, "comparison_figure")
    composition().save(PICTURE)
    explain(PICTURE, "--methods", "generic,Raw attention")
    ((image, _, options),) = figures
    assert image.size == (1000, 700)
    assert options["crop_box"] == pytest.approx((150, 0, 850, 700), abs=0.5)


def test_clip_shows_the_whole_picture(monkeypatch, tmp_path):
    figures = recorded(monkeypatch, "pairs_figure")
    folders.clip(tmp_path / "saved")
    composition().save(PICTURE)
    output = explain(PICTURE, "--model", "saved", "--text", "two cats")
    assert "Warning" not in output
    ((image, heatmaps, _, _, options),) = figures
    assert image.size == (1000, 700)
    assert heatmaps.shape == (1, 32, 32)
    # 45 × 32 pixels, of which those from the seventh to the thirty-eighth are left.
    expected = 6 * 1000 / 45, 0, 38 * 1000 / 45, 700
    assert options["crop_box"] == pytest.approx(expected, abs=2)


def test_where_the_part_cannot_be_told_the_models_picture_is_drawn_and_said(monkeypatch, tmp_path):
    figures = recorded(monkeypatch, "pairs_figure")
    crops_beyond(tmp_path / "saved")
    composition().save(PICTURE)
    output = explain(PICTURE, "--model", "saved", "--text", "two cats")
    assert output.count("Warning") == 1
    assert (
        "Warning: which part of the image saved sees cannot be told from its preprocessing: the "
        "figure shows it as the model got it" in output
    )
    ((image, _, _, _, options),) = figures
    assert image.size == (32, 32)
    assert options["crop_box"] == (0, 0, 32, 32)
    # The frame is black, the image is not.
    assert np.asarray(image)[0].max() < 3
    assert np.asarray(image)[16].max() > 250


def test_a_strip_is_drawn_as_the_model_got_it_and_said(figures):
    composition(3000, 310).save(PICTURE)
    output = explain(PICTURE, "--target", "sandal")
    assert (
        "Warning: the image is too narrow for a figure (3000 × 310 pixels): the figure shows it "
        "as the model got it" in output
    )
    ((image, _, _, options),) = figures
    assert image.size == (64, 64)
    assert options["crop_box"] == (0, 0, 64, 64)


def test_boxes_go_from_what_the_model_got_to_the_picture_and_its_drawing():
    seen = see(load_classifier(), composition(3000, 2000))
    left, _, right, _ = seen.crop_box
    assert seen.on_image((0, 0, 64, 64)) == pytest.approx(seen.crop_box)
    assert seen.on_image((16, 32, 64, 64)) == pytest.approx(
        (left + (right - left) / 4, 1000, right, 2000)
    )
    drawn = seen.drawn()
    assert drawn.on_image((16, 32, 64, 64)) == pytest.approx(
        [edge * 0.4 for edge in seen.on_image((16, 32, 64, 64))]
    )
    assert drawn.drawn() is drawn
