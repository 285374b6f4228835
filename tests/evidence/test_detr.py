"""The experiment on DETR: detections, their masks, and what is right."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from captum_generic_attn import GenericAttention, RawAttention, demo
from captum_generic_attn.metrics import RandomAttribution
from captum_generic_attn.models.detectors import load_detector


@pytest.fixture(scope="module")
def drawn(evidence, sample):
    return evidence.detr.draw(evidence.detr.load_split("test", sample), 3, 0, 30)


@pytest.fixture(scope="module")
def found(evidence, drawn):
    """What the shipped model detects."""
    return evidence.detr.detected(load_detector("garments-detr"), evidence.detr.inputs(drawn))


@pytest.fixture(scope="module")
def right(evidence, drawn):
    """What a model that is always right detects, and the masks of these garments."""
    canvases, slots = torch.from_numpy(drawn.classes >= 0).nonzero(as_tuple=True)
    return evidence.detr.Found(
        canvases,
        slots,
        torch.from_numpy(drawn.classes)[canvases, slots],
        torch.full((len(slots),), 0.9),
        torch.from_numpy(drawn.boxes)[canvases, slots].float(),
    ), torch.from_numpy(drawn.masks)[canvases, slots]


def test_detections_are_sure_queries(evidence, drawn, found) -> None:
    with torch.no_grad():
        output = demo.load_detr()(evidence.detr.inputs(drawn))
    listed = set(zip(found.canvases.tolist(), found.queries.tolist(), strict=True))
    for canvas in range(30):
        for query in range(10):
            shares = output.logits[canvas, query].softmax(0)[:7]
            assert ((canvas, query) in listed) == (shares.max() > 0.5)
    for canvas, query, kind, share, box in zip(*vars(found).values(), strict=True):
        shares = output.logits[canvas, query].softmax(0)
        assert kind == shares[:7].argmax()
        torch.testing.assert_close(share, shares[kind], atol=1e-5, rtol=0)
        x, y, width, height = 64 * output.pred_boxes[canvas, query]
        corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        torch.testing.assert_close(box, corners.clamp(0, 64), atol=1e-4, rtol=0)


def test_filled_boxes_hold_the_pixels_inside(evidence) -> None:
    (mask,) = evidence.detr.filled(torch.tensor([[2.0, 5.0, 6.0, 8.4]]))
    rows, columns = mask.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 7, 2, 5)
    assert mask.sum() == 3 * 4


def test_right_masks_are_all_there_is(evidence, drawn, right) -> None:
    detections, masks = right
    scores = evidence.detr.scored(detections, masks, evidence.detr.truth(drawn), resamples=5)
    for name, value in vars(scores).items():
        assert value.value == pytest.approx(1), name
    boxes = evidence.detr.filled(detections.boxes)
    of_boxes = evidence.detr.scored(detections, boxes, evidence.detr.boxed(drawn), resamples=5)
    assert of_boxes.AP.value == pytest.approx(1)


def test_wrong_masks_and_wrong_classes_are_nothing(evidence, drawn, right) -> None:
    detections, masks = right
    objects = evidence.detr.truth(drawn)
    assert evidence.detr.scored(detections, ~masks, objects, resamples=5).AR.value < 0.02
    others = dataclasses.replace(detections, classes=(detections.classes + 1) % 7)
    assert evidence.detr.scored(others, masks, objects, resamples=5).AP.value < 0.15


def test_pointing_looks_for_the_detected_garment(evidence, drawn, right) -> None:
    detections, _ = right
    boxes = evidence.detr.filled(detections.boxes)
    inside = torch.nn.functional.max_pool2d(boxes[:, None].float(), 4)[:, 0]
    assert evidence.detr.pointed(detections, inside, drawn).value == 1
    assert evidence.detr.pointed(detections, -inside, drawn).value == 0
    # A detection without a garment of its class beneath it is left out.
    lost = dataclasses.replace(detections, boxes=torch.zeros_like(detections.boxes))
    some = dataclasses.replace(
        detections,
        boxes=torch.where(detections.canvases[:, None] > 0, lost.boxes, detections.boxes),
    )
    assert evidence.detr.pointed(some, inside, drawn).count == 1


def test_maps_are_those_of_a_query_and_its_class(evidence, drawn, found) -> None:
    model = demo.load_detr()
    pictures = evidence.detr.inputs(drawn)
    few = dataclasses.replace(found, **{field: value[:5] for field, value in vars(found).items()})
    maps = evidence.detr.attributions(GenericAttention(model), pictures, few)
    assert maps.shape == (5, 16, 16)
    for row in range(5):
        relevance = GenericAttention(model).relevance(
            pictures[few.canvases[row]][None], (few.queries[row].item(), few.classes[row].item())
        )
        ((query, rows),) = relevance.rows.items()
        assert rows[0].argmax() == few.queries[row]
        expected = relevance.matrix(query, "pixel_values")[0, few.queries[row]]
        torch.testing.assert_close(maps[row].flatten(), expected)


def test_maps_of_pixels_are_means_over_tokens(evidence, drawn, found) -> None:
    pictures = evidence.detr.inputs(drawn)
    few = dataclasses.replace(found, **{field: value[:5] for field, value in vars(found).items()})

    class Pixelwise(RawAttention):
        def attribute(self, inputs, target=None):
            return inputs**2

    maps = evidence.detr.attributions(Pixelwise(demo.load_detr()), pictures, few)
    expected = (pictures[few.canvases] ** 2).sum(1).view(5, 16, 4, 16, 4).mean((2, 4))
    torch.testing.assert_close(maps.float(), expected)
    control = RandomAttribution(demo.load_detr(), grid=(16, 16))
    assert evidence.detr.attributions(control, pictures, few).shape == (5, 16, 16)


def test_the_broken_variants_of_a_detector(evidence, drawn, found) -> None:
    model = demo.load_detr()
    pictures = evidence.detr.inputs(drawn)
    few = dataclasses.replace(found, **{field: value[:3] for field, value in vars(found).items()})
    ours = evidence.detr.attributions(GenericAttention(model), pictures, few)
    broken = evidence.methods.broken_detr(model, (16, 16))
    turned = evidence.detr.attributions(broken["ours, broken: map transposed"], pictures, few)
    torch.testing.assert_close(turned, ours.mT)
    other = evidence.detr.attributions(broken["ours, broken: wrong query"], pictures, few)
    for row in range(3):
        query = few.queries[row].item()
        relevance = GenericAttention(model).relevance(
            pictures[few.canvases[row]][None], (query, few.classes[row].item())
        )
        (stream,) = relevance.rows
        expected = relevance.matrix(stream, "pixel_values")[0, (query + 1) % 10]
        torch.testing.assert_close(other[row].flatten(), expected)
