"""Detectors by name, with their own preprocessing, class names and boxes: the shipped DETR, and
Hugging Face's. Explaining a model of one's own needs none of this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_generic_attn import demo
from captum_generic_attn.models.checkpoints import from_hugging_face, require_transformers
from captum_generic_attn.models.preprocessing import (
    ClassModel,
    preprocessing_of,
    shipped_preprocessing,
)


@dataclass(frozen=True)
class Detection:
    """The detection of one object query.

    Attributes:
        query: the index of the query.
        target: the index of its most probable class. The score of the detection is the logit of
            both: `target=(query, target)` in `GenericAttention.attribute`.
        name: that class, in words.
        probability: of that class.
        box: (left, top, right, bottom) in pixels of the image that the model saw, cut off at its
            edges.
    """

    query: int
    target: int
    name: str
    probability: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Detector(ClassModel):
    """A model whose object queries each find an object of one of its classes, or nothing.

    Attributes:
        model: `[B, 3, H, W]` to an output with `logits` `[B, Q, K + 1]`, the last one for "no
            object" (`[B, Q, K]` where each class is judged by itself), and `pred_boxes`
            `[B, Q, 4]`: centre, width and height, in 0 … 1.
    """

    def logits(self, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` to the scores that are explained: `[B, Q, K + 1]` or `[B, Q, K]`."""
        logits: Tensor = self.model(pixels).logits
        return logits

    @torch.no_grad()
    def detections(self, pixels: Tensor, threshold: float = 0.5) -> tuple[Detection, ...]:
        """The detections on an image, the most probable first.

        Args:
            pixels: `[3, H, W]`, as `preprocess` made it.
            threshold: a query detects something if its most probable class is more probable. The
                probabilities are the softmax over all classes and "no object"; in models without
                the latter, each class has its sigmoid.

        Raises:
            ValueError: the model returns no such logits and boxes.

        Example:
            >>> from captum_generic_attn import demo
            >>> from captum_generic_attn.models.detectors import load_detector
            >>> detector = load_detector("garments-detr")
            >>> pixels = detector.preprocess(demo.canvases()[0].image())
            >>> everything = detector.detections(pixels, threshold=0)
            >>> len(everything), everything[0].name in demo.CLASSES
            (10, True)
        """
        output = self.model(pixels[None])
        count = len(self.classes)
        if "logits" not in output or "pred_boxes" not in output:
            raise ValueError(
                f"it returns {', '.join(output)}: a detector with one class and one box for each "
                "query (logits and pred_boxes) is needed"
            )
        logits = output.logits[0]
        if logits.shape[-1] not in {count, count + 1}:
            raise ValueError(
                f"it has {logits.shape[-1]} logits for each query, and {count} classes: one for "
                'each, and one for "no object" or none, is needed'
            )
        alone = logits.shape[-1] == count
        shares = logits.sigmoid() if alone else logits.softmax(-1)[:, :-1]
        best, targets = shares.max(-1)
        height, width = pixels.shape[-2:]
        centre, size = output.pred_boxes[0].split(2, dim=-1)
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1)
        boxes = corners * corners.new_tensor([width, height, width, height])
        found = []
        for query in best.argsort(descending=True).tolist():
            if best[query] > threshold:
                target, box = int(targets[query]), tuple(boxes[query].tolist())
                name, share = self.classes[target], float(best[query])
                found.append(Detection(query, target, name, share, box))
        return tuple(found)


def load_detector(name: str) -> Detector:
    """The detector of that name, on the CPU, float32, in evaluation mode.

    Args:
        name: `garments-detr` for the shipped one; the id of a Hugging Face object detector
            (`owner/model`), or a folder that holds one.

    Raises:
        UnavailableWeightsError: there is none, or it was never trained.
        ImportError: transformers is not installed.

    Example:
        >>> from captum_generic_attn.models.detectors import load_detector
        >>> load_detector("garments-detr").index("bag")
        5
    """
    if name == demo.DETR:
        require_transformers("the shipped DETR")
        return Detector(
            "the shipped DETR", demo.load_detr(), *shipped_preprocessing(), demo.CLASSES
        )
    model, processor, _ = from_hugging_face(
        name, "detector", "AutoModelForObjectDetection", "image processor", "AutoImageProcessor"
    )
    classes = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    return Detector(name, model, *preprocessing_of(processor), classes)
