"""`explain` of detectors: what is printed, what is drawn, and what is refused."""

import re

import numpy as np
import pytest
import torch
from helpers import hugging_face_folders as folders
from helpers.command_line import explain, recorded
from PIL import Image

from captum_generic_attn import GenericAttention, demo
from captum_generic_attn.models.detectors import load_detector

SCALE = 100 / 48
"""From what `saved` sees of the noise to the pixels of the latter."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def figures(monkeypatch):
    return recorded(monkeypatch, "detections_figure")


@pytest.fixture
def saved(tmp_path):
    """A detector that finds ten things or so in the image, which is 150 × 100 pixels."""
    folders.detr(tmp_path / "saved")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (100, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return load_detector("saved")


def detections(detector, file="noise.png"):
    with Image.open(file) as image:
        pixels = detector.preprocess(image.convert("RGB"))
    return pixels, detector.detections(pixels)


def listed(output):
    """The printed detections: query, class, probability, box, explained?"""
    rows = re.findall(
        r" (\d+) ([a-z ]+) (\d\.\d{3}) (\d+) (\d+) (\d+) (\d+)( explained)?(?= )", output
    )
    return [
        (int(query), name, float(share), tuple(map(int, box)), bool(mark))
        for query, name, share, *box, mark in rows
    ]


def as_listed(detection, explained, scale=1.0):
    box = tuple(pytest.approx(edge * scale, abs=0.51) for edge in detection.box)
    share = pytest.approx(detection.probability, abs=6e-4)
    return detection.query, detection.name, share, box, explained


def test_the_shipped_detr_explains_its_detections(figures):
    # What the image shows to the model is told by the model.
    detector = load_detector("garments-detr")
    canvas = demo.canvases()[0]
    pixels, expected = detections(detector, canvas.path)
    output = explain(canvas.path, "--model", "garments-detr")
    assert "What the shipped DETR detects with a probability above 0.5 (boxes in pixels" in output
    assert "of the image, 64 wide and 64 high)" in output
    assert listed(output) == [as_listed(detection, True) for detection in expected]
    assert output.endswith("Wrote explanation.png")

    ((image, boxes, labels, heatmaps, options),) = figures
    assert options == {"title": canvas.path.name, "crop_box": (0, 0, 64, 64)}
    assert np.abs(np.asarray(image) / 255 - np.asarray(canvas.image()) / 255).max() < 1e-6
    assert boxes == [detection.box for detection in expected]
    assert labels == [f"{found.name}  {found.probability:.2f}" for found in expected]
    method = GenericAttention(demo.load_detr())
    for heat, found in zip(heatmaps, expected, strict=True):
        ours = method.attribute(pixels[None], (found.query, found.target))[0, 0].numpy()
        assert np.abs(heat - ours).max() < 1e-6


def test_a_folder_of_hugging_face_and_a_picture_of_another_size(figures, saved):
    pixels, expected = detections(saved)
    assert len(expected) > 8
    output = explain("noise.png", "--model", "saved")
    # The model sees 72 × 48 pixels of the image's 150 × 100, and boxes are of the latter.
    assert "of the image, 150 wide and 100 high)" in output
    assert listed(output) == [as_listed(found, i < 8, SCALE) for i, found in enumerate(expected)]
    ((image, boxes, labels, heatmaps, options),) = figures
    assert image.size == (150, 100)
    assert options["crop_box"] == (0, 0, 150, 100)
    assert len(boxes) == len(labels) == len(expected)
    for box, found in zip(boxes, expected, strict=True):
        assert box == pytest.approx([edge * SCALE for edge in found.box], abs=1e-4)
    assert heatmaps.shape == (8, 48, 72)
    method = GenericAttention(saved.model)
    for heat, found in zip(heatmaps, expected, strict=False):
        ours = method.attribute(pixels[None], (found.query, found.target))[0, 0].numpy()
        assert np.abs(heat - ours).max() < 1e-6


def test_top_bounds_how_many_are_explained(figures, saved):
    _, expected = detections(saved)
    output = explain("noise.png", "--model", "saved", "--top", "2")
    assert [row[-1] for row in listed(output)] == [True, True] + [False] * (len(expected) - 2)
    assert len(figures[0][1]) == len(expected)
    assert len(figures[0][3]) == 2


def test_target_keeps_the_detections_of_a_class(figures, saved):
    _, expected = detections(saved)
    name = expected[1].name
    kept = [found for found in expected if found.name == name]
    assert len(kept) < len(expected)
    output = explain("noise.png", "--model", "saved", "--target", name.upper())
    assert listed(output) == [as_listed(found, i < 8, SCALE) for i, found in enumerate(kept)]
    assert len(figures[0][1]) == len(kept)
    explain("noise.png", "--model", "saved", "--target", str(kept[0].target), "--top", "1")
    assert len(figures[1][3]) == 1


def test_start_layer_is_the_one_of_the_method(figures, saved):
    pixels, expected = detections(saved)
    explain("noise.png", "--model", "saved", "--top", "1", "--start-layer=-1")
    score = expected[0].query, expected[0].target
    last = GenericAttention(saved.model, start_layer=-1).attribute(pixels[None], score)[0, 0]
    every = GenericAttention(saved.model).attribute(pixels[None], score)[0, 0]
    assert np.abs(figures[0][3][0] - last.numpy()).max() < 1e-6
    assert (every - last).abs().max() > 1e-4


def test_nothing_detected_is_told(tmp_path):
    folders.detr(tmp_path / "unsure", decided=0.01)
    output = explain("--model", "unsure", code=1)
    assert re.search(
        r"Error: unsure detects nothing in the image: no query has a class with a probability "
        r"above 0\.5; the nearest to it is (cat|dog|house|tree) with 0\.2\d",
        output,
    )
    assert not (tmp_path / "explanation.png").exists()


def test_a_class_that_was_not_detected_is_told(tmp_path):
    model = folders.detr(tmp_path / "saved")
    with torch.no_grad():  # nothing but dogs
        model.class_labels_classifier.bias[1] += 100
    model.save_pretrained(tmp_path / "saved")
    output = explain("--model", "saved", "--target", "0", "--target", "house", code=2)
    expected = "--target: saved detects no cat or house in the image; it detects: dog"
    assert expected in output


def test_methods_explain_the_most_probable_detection(monkeypatch, saved):
    drawn = recorded(monkeypatch, "comparison_figure")
    pixels, expected = detections(saved)
    names = ["Generic attention", "Saliency", "LRP"]
    output = explain("noise.png", "--model", "saved", "--methods", ",".join(names))
    ((image, comparison, options),) = drawn
    assert image.size == (150, 100)
    assert options == {"title": expected[0].name, "crop_box": (0, 0, 150, 100)}
    assert list(comparison.attributions) == names
    score = expected[0].query, expected[0].target
    ours = GenericAttention(saved.model).attribute(pixels[None], score)
    assert (comparison["Generic attention"] - ours).abs().max() < 1e-6
    assert [row[-1] for row in listed(output)] == [True] + [False] * (len(expected) - 1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "shoe"], 2, "the shipped DETR has no class 'shoe' among its 7; nearest:"),
        (["--target", "7"], 2, "index 7 is out of range: the shipped DETR has the classes 0 to 6"),
        (["--weights", "x.pth"], 2, "--weights: garments-detr brings its own weights: leave them"),
        (["--start-layer", "9"], 1, "Error: the shipped DETR: start_layer=9"),
    ],
)
def test_failures_say_what_to_do(arguments, code, message, tmp_path):
    (tmp_path / "x.pth").touch()
    output = explain("--model", "garments-detr", *arguments, code=code)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "explanation.png").exists()
