"""Detectors: which queries found something, what, and where."""

import sys

import numpy as np
import pytest
import torch
import transformers
from helpers import hugging_face_folders as folders
from PIL import Image
from torch import nn

from captum_generic_attn import demo
from captum_generic_attn.errors import UnavailableWeightsError
from captum_generic_attn.models.detectors import Detector, load_detector
from captum_generic_attn.models.preprocessing import preprocessing_of, shipped_preprocessing


class Fixed(nn.Module):
    """Returns given logits and boxes whatever it sees."""

    def __init__(self, logits, boxes):
        super().__init__()
        self.logits, self.boxes = torch.tensor([logits]), torch.tensor([boxes])

    def forward(self, pixels):
        output = transformers.modeling_outputs.ModelOutput(logits=self.logits)
        return output if self.boxes.numel() == 0 else type(output)(**output, pred_boxes=self.boxes)


def detector(logits, boxes, classes=("cat", "dog")):
    return Detector("fixed", Fixed(logits, boxes), *shipped_preprocessing(), classes)


def noise(width=150, height=100):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_detections_by_hand():
    # "No object" is the last class: its own probability finds nothing, but lessens the others'.
    logits = [[0.0, 3.0, 0.0], [0.0, 1.0, 9.0], [4.0, 1.0, 0.0], [0.4, 0.0, 0.0]]
    boxes = [[0.5, 0.5, 0.5, 0.25], [0.5, 0.5, 1.0, 1.0], [0.9, 0.1, 0.4, 0.4], [0.5] * 4]
    first, second = detector(logits, boxes).detections(torch.zeros(3, 40, 80))
    assert (first.query, first.target, first.name) == (2, 0, "cat")
    assert (second.query, second.target, second.name) == (0, 1, "dog")
    total = np.exp([4.0, 1.0, 0.0]).sum()
    assert first.probability == pytest.approx(np.exp(4.0) / total, rel=1e-6)
    assert second.probability == pytest.approx(np.exp(3) / (np.exp(3) + 2), rel=1e-6)
    # 80 wide and 40 high; what lies outside is cut off.
    assert first.box == pytest.approx((56.0, 0.0, 80.0, 12.0), abs=1e-4)
    assert second.box == pytest.approx((20.0, 15.0, 60.0, 25.0), abs=1e-4)


def test_all_queries_below_a_threshold_of_zero():
    logits = [[0.0, 3.0, 0.0], [0.0, 1.0, 9.0]]
    found = detector(logits, [[0.5] * 4] * 2).detections(torch.zeros(3, 8, 8), threshold=0)
    assert [detection.query for detection in found] == [0, 1]
    assert detector(logits, [[0.5] * 4] * 2).detections(torch.zeros(3, 8, 8), threshold=0.99) == ()


def test_classes_without_no_object_are_judged_by_themselves():
    logits = [[1.0, 0.5], [-1.0, -2.0]]
    (found,) = detector(logits, [[0.5] * 4] * 2).detections(torch.zeros(3, 8, 8))
    assert (found.query, found.name) == (0, "cat")
    assert found.probability == pytest.approx(1 / (1 + np.exp(-1.0)), rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "boxes", "message"),
    [
        ([[1.0] * 5], [[0.5] * 4], "it has 5 logits for each query, and 2 classes"),
        ([[1.0] * 3], [], "it returns logits: a detector with one class and one box"),
    ],
)
def test_outputs_of_no_detector_are_told(logits, boxes, message):
    with pytest.raises(ValueError, match=message):
        detector(logits, boxes).detections(torch.zeros(3, 8, 8))


def test_the_shipped_detr_finds_what_its_model_says():
    shipped = load_detector("garments-detr")
    assert shipped.classes == demo.CLASSES
    pixels = shipped.preprocess(demo.canvases()[0].image())
    with torch.no_grad():
        output = demo.load_detr()(pixels[None])
    # As transformers reads it, in pixels of the image.
    reader = transformers.DetrImageProcessor()
    (expected,) = reader.post_process_object_detection(output, 0.1, torch.tensor([[64, 64]]))
    found = shipped.detections(pixels, threshold=0.1)
    order = expected["scores"].argsort(descending=True)
    assert len(found) == len(order)
    for detection, i in zip(found, order.tolist(), strict=True):
        assert detection.target == int(expected["labels"][i])
        assert detection.probability == pytest.approx(float(expected["scores"][i]), abs=1e-6)
        box = expected["boxes"][i].clamp(0, 64).tolist()
        assert detection.box == pytest.approx(box, abs=1e-3)


@pytest.mark.parametrize("kind", ["Detr", "ConditionalDetr"])
def test_a_folder_of_hugging_face(kind, tmp_path):
    model = folders.detr(tmp_path, kind)
    loaded = load_detector(str(tmp_path))
    assert loaded.classes == folders.CLASSES
    pixels = loaded.preprocess(noise())
    assert pixels.shape == (3, 48, 72)
    with torch.no_grad():
        output = model(pixels[None])
    # No object is one more class of a DETR, and none of a conditional DETR.
    assert output.logits.shape == (1, 12, 5 if kind == "Detr" else 4)
    reader = getattr(transformers, f"{kind}ImageProcessor")()
    (expected,) = reader.post_process_object_detection(output, 0.5, torch.tensor([[48, 72]]))
    found = loaded.detections(pixels)
    assert len(found) > 1
    # transformers counts a query once for each class above the threshold of a conditional DETR.
    theirs = {round(float(score), 4) for score in expected["scores"]}
    assert {round(detection.probability, 4) for detection in found} <= theirs
    assert {detection.name for detection in found} <= set(folders.CLASSES)
    assert all(0 <= d.box[0] < d.box[2] <= 72 and 0 <= d.box[1] < d.box[3] <= 48 for d in found)


def test_padding_is_cut_off(tmp_path):
    model = folders.detr(tmp_path, pad_size={"height": 96, "width": 96})
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    encoding = processor(images=noise(), return_tensors="pt")
    assert encoding["pixel_values"].shape == (1, 3, 96, 96)
    assert encoding["pixel_mask"].sum() == 48 * 72
    pixels = preprocessing_of(processor).preprocess(noise())
    assert torch.equal(pixels, encoding["pixel_values"][0, :, :48, :72])
    # The model says the same of both, but for rounding.
    with torch.no_grad():
        padded, alone = model(**encoding), model(pixels[None])
    assert (padded.logits - alone.logits).abs().max() < 1e-3
    assert (padded.pred_boxes - alone.pred_boxes).abs().max() < 1e-5


def test_a_folder_without_a_trained_detector_is_refused(tmp_path):
    model = folders.detr(tmp_path)
    model.model.save_pretrained(tmp_path)
    with pytest.raises(UnavailableWeightsError, match="holds no trained detector: weights are mis"):
        load_detector(str(tmp_path))


def test_the_shipped_detr_needs_a_new_transformers(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.1.0")
    expected = "the shipped DETR needs transformers 5.2 or newer, this is 5.1.0"
    with pytest.raises(ImportError, match=expected):
        load_detector("garments-detr")


@pytest.mark.parametrize("name", ["garments-detr", "facebook/detr-resnet-50"])
def test_without_transformers_the_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'captum-generic-attn\[hf\]'"):
        load_detector(name)
