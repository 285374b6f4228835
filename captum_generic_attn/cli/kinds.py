"""The kinds of models that the command line explains.

A new kind is a loader in `models` and a class here, in `KINDS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from captum_generic_attn import demo
from captum_generic_attn.attribution import GenericAttention
from captum_generic_attn.cli.kind import Findings, Kind, KindWithClasses, Score
from captum_generic_attn.cli.terminal import fail, short, wrong
from captum_generic_attn.errors import UnavailableWeightsError
from captum_generic_attn.models.checkpoints import (
    hugging_face_classes,
    hugging_face_config,
    is_hugging_face,
)
from captum_generic_attn.models.classifiers import ImageClassifier, load_classifier
from captum_generic_attn.models.detectors import Detection, Detector, load_detector
from captum_generic_attn.models.dual_encoders import DualEncoder, load_dual_encoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from captum_generic_attn.cli.seen import Seen


class ImageClassifiers(KindWithClasses):
    """Models that score the classes of an image."""

    name = "an image classifier"
    shipped = demo.VIT
    table = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    model: ImageClassifier

    def load(self) -> ImageClassifier:  # noqa: D102
        return load_classifier(self.choices.model, self.choices.weights)

    def read_options(self) -> None:  # noqa: D102
        super().read_options()
        if self.choices.several_methods and len(self.classes) > 1:
            wrong("--target", "several methods explain one class: give one --target")

    def look(self, seen: Seen) -> Findings:  # noqa: D102
        model = self.model
        probabilities = model.probabilities(seen.pixels[None])[0]
        count = min(self.choices.top or 3, len(model.classes))
        best = probabilities.topk(count).indices.tolist()
        explained = list(dict.fromkeys(self.classes or best))
        if self.choices.several_methods:
            explained = explained[:1]
        listed = list(dict.fromkeys([*best, *self.classes]))
        function = "sigmoid" if model.multi_label else "softmax"
        return Findings(
            heading=f"What {model.name} sees ({len(model.classes)} classes, probabilities by "
            f"{function}):",
            columns={
                "index": [str(i) for i in listed],
                "class": [model.classes[i] for i in listed],
                "probability": [f"{probabilities[i]:.3f}" for i in listed],
                "": ["explained" if i in explained else "" for i in listed],
            },
            left=("class", ""),
            labels=[f"{short(model.classes[i])}  {probabilities[i]:.2f}" for i in explained],
            title=model.classes[explained[0]],
            targets=explained,
        )

    def draw(self, seen: Seen, findings: Findings, maps: Any) -> Figure:  # noqa: D102
        from captum_generic_attn.visualization import heatmap_figure

        return heatmap_figure(
            seen.image, maps, findings.labels, title=self.choices.title, crop_box=seen.crop_box
        )

    def checked_target(self, pixels: Tensor) -> int:  # noqa: D102
        best = int(self.model.probabilities(pixels[None])[0].argmax())
        return self.classes[0] if self.classes else best


class DualEncoders(Kind):
    """Models that compare an image with texts."""

    name = "a dual encoder of images and texts"
    shipped = demo.CLIP
    table = "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    model: DualEncoder

    def refuse_options(self) -> None:  # noqa: D102
        name = self.choices.model
        if self.choices.targets:
            wrong("--target", f"{name} scores texts, not classes: give --text in its place")
        if self.choices.top is not None:
            wrong("--top", f"{name} scores the texts that it is given, all of which are explained")
        if not self.choices.texts:
            wrong(
                "--text",
                f"{name} compares the image with texts: give at least one (two to verify it), "
                'such as --text "a bag and a boot"',
            )

    def load(self) -> DualEncoder:  # noqa: D102
        return load_dual_encoder(str(self.choices.model))

    def read_options(self) -> None:  # noqa: D102
        self.given = list(dict.fromkeys(self.choices.texts))
        try:
            self.texts = self.model.encode(self.given)
        except ValueError as error:
            wrong("--text", str(error))

    def look(self, seen: Seen) -> Findings:  # noqa: D102
        model, given = self.model, self.given
        scores = model.scores(seen.pixels, self.texts)
        columns = {
            "text": given,
            "cosine": [f"{cosine:.3f}" for cosine in scores.cosines],
            "logit": [f"{logit:.2f}" for logit in scores.logits],
        }
        labels = [f"logit {logit:.2f}" for logit in scores.logits]
        if model.multi_label or len(given) > 1:
            function = "sigmoid" if model.multi_label else "softmax"
            shares = scores.logits.sigmoid() if model.multi_label else scores.logits.softmax(0)
            columns[function] = [f"{share:.3f}" for share in shares]
            labels = [
                f"{label}, {function} {p:.2f}" for label, p in zip(labels, shares, strict=True)
            ]
        explained = given[:1] if self.choices.several_methods else given
        columns[""] = ["explained" if text in explained else "" for text in given]
        return Findings(
            heading=f"How well {model.name} finds that texts fit the image:",
            columns=columns,
            left=("text", ""),
            labels=labels,
            title=given[0],
        )

    def explain(self, seen: Seen, findings: Findings) -> Any:  # noqa: ARG002, D102
        forward, inputs, rest = self.model.pairs(seen.pixels, self.texts)
        method = GenericAttention(forward, start_layer=self.choices.start_layer)
        return method.attribute(inputs, None, rest)

    def draw(self, seen: Seen, findings: Findings, maps: Any) -> Figure:  # noqa: D102
        from captum_generic_attn.visualization import pairs_figure, word_relevance

        in_image, in_texts = maps
        words = [
            word_relevance(text, values)
            for text, values in zip(self.texts.words, in_texts, strict=True)
        ]
        # The map is the same in every colour channel.
        return pairs_figure(
            seen.image, in_image[:, 0].numpy(), words, findings.labels,
            title=self.choices.title, crop_box=seen.crop_box,
        )  # fmt: skip

    def first_score(self, seen: Seen, findings: Findings) -> Score:  # noqa: ARG002, D102
        forward, inputs, rest = self.model.pairs(seen.pixels, self.texts)
        first = tuple(tensor[:1] for tensor in inputs)
        return Score(forward, first, None, tuple(tensor[:1] for tensor in rest))

    def checked_score(self, seen: Seen) -> Score:  # noqa: D102
        forward, inputs, rest = self.model.pairs(seen.pixels, self.texts)
        return Score(forward, inputs, None, rest)


class Detectors(KindWithClasses):
    """Models that find objects of their classes in an image, with a box for each."""

    name = "a detector"
    shipped = demo.DETR
    table = "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES"
    model: Detector
    _threshold = 0.5

    def load(self) -> Detector:  # noqa: D102
        return load_detector(str(self.choices.model))

    def look(self, seen: Seen) -> Findings:  # noqa: D102
        found = self._found(seen)
        explained = found[: 1 if self.choices.several_methods else self.choices.top or 8]
        boxes = [seen.on_image(detection.box) for detection in found]
        which = "image" if seen.own else "image as the model gets it"
        edges = {
            edge: [f"{box[i]:.0f}" for box in boxes]
            for i, edge in enumerate(("left", "top", "right", "bottom"))
        }
        return Findings(
            heading=f"What {self.model.name} detects with a probability above {self._threshold} "
            f"(boxes in pixels of the {which}, {seen.image.width} wide and {seen.image.height} "
            "high):",
            columns={
                "query": [str(detection.query) for detection in found],
                "class": [detection.name for detection in found],
                "probability": [f"{detection.probability:.3f}" for detection in found],
                **edges,
                "": ["explained" if detection in explained else "" for detection in found],
            },
            left=("class", ""),
            labels=[f"{short(one.name)}  {one.probability:.2f}" for one in found],
            title=explained[0].name,
            targets=[(detection.query, detection.target) for detection in explained],
            boxes=[detection.box for detection in found],
        )

    def _found(self, seen: Seen) -> list[Detection]:
        """The detections that are listed: above the threshold, and of the chosen classes."""
        everything = self.model.detections(seen.pixels, threshold=0)
        found = [detection for detection in everything if detection.probability > self._threshold]
        if not found:
            nearest = "".join(
                f"; the nearest to it is {detection.name} with {detection.probability:.3f}"
                for detection in everything[:1]
            )
            fail(
                f"{self.model.name} detects nothing in the image: no query has a class with a "
                f"probability above {self._threshold}{nearest}"
            )
        chosen = [one for one in found if not self.classes or one.target in self.classes]
        if not chosen:
            wanted = " or ".join(self.model.classes[target] for target in self.classes)
            wrong(
                "--target",
                f"{self.model.name} detects no {wanted} in the image; it detects: "
                f"{', '.join(dict.fromkeys(detection.name for detection in found))}",
            )
        return chosen

    def draw(self, seen: Seen, findings: Findings, maps: Any) -> Figure:  # noqa: D102
        from captum_generic_attn.visualization import detections_figure

        boxes = [seen.on_image(box) for box in findings.boxes]
        return detections_figure(
            seen.image,
            boxes,
            findings.labels,
            maps,
            title=self.choices.title,
            crop_box=seen.crop_box,
        )

    def checked_target(self, pixels: Tensor) -> tuple[int, int]:  # noqa: D102
        found = self.model.detections(pixels, threshold=0)  # the most probable first
        chosen = [one for one in found if not self.classes or one.target in self.classes]
        if not chosen:
            wrong("--target", f"{self.model.name} finds none in the image, not even improbably")
        return chosen[0].query, chosen[0].target


KINDS: tuple[type[Kind], ...] = (Detectors, DualEncoders, ImageClassifiers)
"""CLIP's configuration belongs to a dual encoder and to a classifier: where it does not say which
was saved, it was most likely the first."""


def kind_of(name: str | None) -> type[Kind]:
    """The kind of a model, told before its weights are loaded.

    Args:
        name: as `load_classifier`, `load_dual_encoder` and `load_detector` take it; of a Hugging
            Face model its configuration is read.

    Raises:
        UnavailableWeightsError: a Hugging Face model is of another kind, or has no configuration.
        ImportError: a Hugging Face model without transformers installed.

    Example:
        >>> [kind_of(name).name for name in (None, "vit_b_16", "garments-detr")]
        ['an image classifier', 'an image classifier', 'a detector']
    """
    for kind in KINDS:
        if name == kind.shipped:
            return kind
    if name is None or not is_hugging_face(name):
        return ImageClassifiers
    config = hugging_face_config(name)
    saved = set(config.architectures or ())
    classes = {kind: hugging_face_classes(kind.table, config) for kind in KINDS}
    kinds = [kind for kind, known in classes.items() if known & saved]
    # A class of the same type without the head that does it: what loads the model tells what lacks.
    kinds += [kind for kind, known in classes.items() if known]
    if not kinds:
        raise UnavailableWeightsError(
            f"{name!r} is of type {config.model_type} ({', '.join(saved) or 'no architecture'}): "
            f"what is needed is {' or '.join(kind.name for kind in reversed(KINDS))}"
        )
    return kinds[0]


def brings_weights(name: str | None) -> bool:
    """Whether weights belong to that name: others may be given to timm's and torchvision's models.

    Example:
        >>> brings_weights("garments-clip"), brings_weights("vit_b_16")
        (True, False)
    """
    return name is None or name in {kind.shipped for kind in KINDS} or is_hugging_face(name)
