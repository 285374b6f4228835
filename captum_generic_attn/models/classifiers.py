"""Image classifiers by name, with their own preprocessing and class names: the shipped one, timm's,
torchvision's and Hugging Face's. Explaining a model of one's own needs none of this.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from captum_generic_attn import demo
from captum_generic_attn.errors import UnavailableWeightsError, UnknownModelError
from captum_generic_attn.models.checkpoints import (
    cached_file,
    fill,
    from_hugging_face,
    is_hugging_face,
    pretrained_weights,
    read_state,
    require_host,
)
from captum_generic_attn.models.preprocessing import (
    ClassModel,
    preprocessing_of,
    shipped_preprocessing,
)

__all__ = ["ImageClassifier", "load_classifier"]


@dataclass(frozen=True)
class ImageClassifier(ClassModel):
    """A model that gives each image a score for each of its classes.

    Attributes:
        model: `[B, 3, H, W]` to logits `[B, K]` (or to an output with `.logits`).
        multi_label: whether each class is judged by itself (sigmoid) instead of against the others
            (softmax).
    """

    multi_label: bool

    def logits(self, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` to the model's scores `[B, K]`, as a tensor whatever it returns."""
        output = self.model(pixels)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` to probabilities `[B, K]`: sigmoid if `multi_label`, else softmax."""
        logits = self.logits(pixels)
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)


def load_classifier(name: str | None = None, weights: Path | None = None) -> ImageClassifier:
    """The classifier of that name, on the CPU, float32, in evaluation mode.

    Args:
        name: `None` or `garments-vit` for the shipped one; a timm name (`vit_tiny_patch16_224`,
            also `timm/vit_tiny_patch16_224`); a torchvision name (`vit_b_16`, also
            `torchvision/vit_b_16`); the id of a Hugging Face image classifier (`owner/model`) or a
            folder that holds one. A name that both timm and torchvision have is timm's.
        weights: a state dict (safetensors, or what `torch.save` wrote; nothing but tensors is
            unpickled) to load into a timm or torchvision model in place of its pretrained weights.
            The number of classes follows from its last layer.

    Raises:
        UnknownModelError: nobody has a model of that name.
        UnavailableWeightsError: there are no weights, or they do not fit the model.
        ImportError: a Hugging Face model without transformers installed.

    Example:
        >>> from captum_generic_attn.models.classifiers import load_classifier
        >>> load_classifier().classes[:3]
        ('top', 'trouser', 'dress')
    """
    if name is None or name == demo.VIT:
        if weights is not None:
            raise UnavailableWeightsError(
                "the shipped model brings its own weights: these need the name of the model that "
                "they belong to (--model NAME)"
            )
        return _shipped()
    if name in {demo.CLIP, demo.DETR}:
        raise UnknownModelError(f"{name} is no image classifier; the shipped one is {demo.VIT}")
    if weights is not None and not weights.is_file():
        raise UnavailableWeightsError(f"there is no file of weights {str(weights)!r}")
    if is_hugging_face(name):
        return _hugging_face(name, weights)
    owner, _, rest = name.partition("/")

    import timm
    from torchvision import models

    if owner != "torchvision" and timm.is_model(rest or name):
        return _timm(rest or name, weights)
    if owner != "timm" and (rest or name) in models.list_models(module=models):
        return _torchvision(rest or name, weights)
    known = sorted({*timm.list_models(), *models.list_models(module=models)})
    near = difflib.get_close_matches(rest or name, known, n=5, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise UnknownModelError(
        f"there is no folder {name!r}, and neither timm nor torchvision has a model of that name"
        f"{hint}. A model of the Hugging Face hub is given as owner/model."
    )


def _shipped() -> ImageClassifier:
    return ImageClassifier(
        "the shipped model", demo.load_model(), *shipped_preprocessing(), demo.CLASSES, True
    )


def _timm(name: str, weights: Path | None) -> ImageClassifier:
    import timm
    from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
    from timm.data import resolve_model_data_config as data_config

    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UnknownModelError(str(error)) from None
    if weights is None:
        overlay: dict[str, object] = {}
        if config and config.hf_hub_id:
            file = cached_file(config.hf_hub_id, config.hf_hub_filename)
            # `custom_load` is about the format of another source than the hub, unless it is "hf".
            custom = config.custom_load == "hf"
            overlay = {"file": file, "custom_load": custom} if file else {}
        with pretrained_weights(f"timm/{name}"):
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    else:
        state = read_state(weights)
        count = _rows(state, config and config.classifier)
        model = timm.create_model(name, **({} if count is None else {"num_classes": count}))
        fill(model, state, f"timm/{name}", weights)
    if not model.num_classes:
        raise UnavailableWeightsError(f"timm/{name} ends without a classifier: it names no classes")
    subset = infer_imagenet_subset(model)
    data = data_config(model)
    return ImageClassifier(
        f"timm/{name}",
        model.eval(),
        create_transform(**data, is_training=False),
        tuple(data["mean"]),
        tuple(data["std"]),
        _numbered(model.num_classes)
        if subset is None
        else tuple(ImageNetInfo(subset).label_descriptions()),
        False,
    )


def _torchvision(name: str, weights: Path | None) -> ImageClassifier:
    from torchvision import models

    pretrained = models.get_model_weights(name).DEFAULT
    classes = tuple(pretrained.meta["categories"])
    if weights is None:
        saved = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(pretrained.url).path).name)
        with pretrained_weights(f"torchvision/{name}"):
            if not saved.exists():
                require_host(pretrained.url)
            model = models.get_model(name, weights=pretrained)
    else:
        state = read_state(weights)
        last = [layer for layer, m in models.get_model(name).named_modules() if _is_linear(m)][-1]
        count = _rows(state, last) or len(classes)
        model = models.get_model(name, num_classes=count)
        fill(model, state, f"torchvision/{name}", weights)
        classes = classes if count == len(classes) else _numbered(count)
    transform = pretrained.transforms()
    return ImageClassifier(
        f"torchvision/{name}",
        model.eval(),
        transform,
        tuple(transform.mean),
        tuple(transform.std),
        classes,
        False,
    )


def _hugging_face(name: str, weights: Path | None) -> ImageClassifier:
    if weights is not None:
        raise UnavailableWeightsError(
            "a Hugging Face model brings its own weights: leave --weights out, or give a timm or "
            "torchvision name"
        )
    model, processor, _ = from_hugging_face(
        name, "image classifier", "AutoModelForImageClassification",
        "image processor", "AutoImageProcessor",
    )  # fmt: skip
    return ImageClassifier(
        name,
        model,
        *preprocessing_of(processor),
        tuple(model.config.id2label[i] for i in range(model.config.num_labels)),
        model.config.problem_type == "multi_label_classification",
    )


def _rows(state: dict[str, Tensor], layer: object) -> int | None:
    """The number of classes of the last layer of a state dict."""
    weight = state.get(f"{layer}.weight") if isinstance(layer, str) else None
    return None if weight is None else len(weight)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(count))
