"""Image classifiers by name, with their own preprocessing and class names: the shipped one, timm's,
torchvision's and Hugging Face's. The command line calls `load_classifier`; explaining a model needs
none of this.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from captum_generic_attn.checkpoints import (
    UnavailableWeightsError,
    cached_file,
    fill,
    from_hugging_face,
    pretrained_weights,
    read_state,
    require_host,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["ImageClassifier", "UnknownModelError", "load_classifier"]


class UnknownModelError(ValueError):
    """No library has a model of that name; the message lists the nearest names."""


@dataclass(frozen=True)
class ImageClassifier:
    """A model in evaluation mode with what is needed to feed it a picture and to read its scores.

    Attributes:
        name: how to call it in a message.
        model: `[B, 3, H, W]` to logits `[B, K]` (or to an output with `.logits`).
        preprocess: a PIL picture to the model's `[3, H, W]`, normalised.
        classes: the K names; `"class 3"` where the model brings none.
        multi_label: whether each class is judged by itself (sigmoid) instead of against the others
            (softmax).
        mean: what `preprocess` subtracted from each channel, for values in 0 … 1.
        std: what it divided each channel by.
    """

    name: str
    model: nn.Module
    preprocess: Callable[[Image], Tensor]
    classes: tuple[str, ...]
    multi_label: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` to probabilities `[B, K]`: sigmoid if `multi_label`, else softmax."""
        output = self.model(pixels)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)

    def picture(self, pixels: Tensor) -> NDArray[np.float32]:
        """What the model was shown, for people: `[3, H, W]` as `preprocess` made it to
        `[H, W, 3]` in 0 … 1.
        """
        shape = (-1, 1, 1)
        restored = pixels * torch.tensor(self.std).view(shape) + torch.tensor(self.mean).view(shape)
        array: NDArray[np.float32] = restored.clamp(0, 1).permute(1, 2, 0).contiguous().numpy()
        return array

    def index(self, target: str) -> int:
        """The index of a class given by its index or its name.

        A whole number is always an index. A name counts whatever its case, and each of the
        synonyms that an ImageNet name lists (`"tabby, tabby cat"`) counts by itself.

        Raises:
            ValueError: there is no such class (the message lists the nearest names), or several
                classes share the name.

        Example:
            >>> from captum_generic_attn.classifiers import load_classifier
            >>> garments = load_classifier()
            >>> garments.index("Ankle boot"), garments.index("2")
            (6, 2)
        """
        count = len(self.classes)
        if target.strip().lstrip("+-").isdecimal():
            index = int(target)
            if not 0 <= index < count:
                raise ValueError(
                    f"class index {index} is out of range: {self.name} has the classes "
                    f"0 to {count - 1}"
                )
            return index
        wanted = target.strip().casefold()
        whole = [i for i, name in enumerate(self.classes) if name.casefold() == wanted]
        parts = [_synonyms(name) for name in self.classes]
        found = whole or [i for i, names in enumerate(parts) if wanted in names]
        if len(found) == 1:
            return found[0]
        if found:
            listed = "; ".join(f"{i} = {self.classes[i]!r}" for i in found)
            raise ValueError(f"class {target!r} is ambiguous, give its index: {listed}")
        known = sorted({name for names in parts for name in names})
        near = [name for name in known if wanted and wanted in name][:5]
        near = near or difflib.get_close_matches(wanted, known, n=5)
        if not near and count <= 20:
            near = list(self.classes)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"{self.name} has no class {target!r} among its {count}{hint}")


def load_classifier(name: str | None = None, weights: Path | None = None) -> ImageClassifier:
    """The classifier of that name, on the CPU, float32, in evaluation mode.

    Args:
        name: `None` for the shipped one; a timm name (`vit_tiny_patch16_224`, also
            `timm/vit_tiny_patch16_224`); a torchvision name (`vit_b_16`, also
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
        >>> from captum_generic_attn.classifiers import load_classifier
        >>> load_classifier().classes[:3]
        ('top', 'trouser', 'dress')
    """
    if name is None:
        if weights is not None:
            raise UnavailableWeightsError(
                "weights need the name of the model that they belong to (--model NAME)"
            )
        return _shipped()
    if weights is not None and not weights.is_file():
        raise UnavailableWeightsError(f"there is no file of weights {str(weights)!r}")
    owner, _, rest = name.partition("/")
    if Path(name).is_dir():
        return _hugging_face(name, weights)
    if rest and owner not in {"timm", "torchvision"}:
        return _hugging_face(name, weights)

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
    from captum_generic_attn import demo

    return ImageClassifier(
        "the shipped model",
        demo.load_model(),
        demo.preprocess,
        demo.CLASSES,
        True,
        (demo.MEAN,) * 3,
        (demo.STD,) * 3,
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
        _numbered(model.num_classes)
        if subset is None
        else tuple(ImageNetInfo(subset).label_descriptions()),
        False,
        tuple(data["mean"]),
        tuple(data["std"]),
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
        classes,
        False,
        tuple(transform.mean),
        tuple(transform.std),
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

    def preprocess(image: Image) -> Tensor:
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    normalised = getattr(processor, "do_normalize", False)
    return ImageClassifier(
        name,
        model,
        preprocess,
        tuple(model.config.id2label[i] for i in range(model.config.num_labels)),
        model.config.problem_type == "multi_label_classification",
        tuple(processor.image_mean) if normalised else (0.0,),
        tuple(processor.image_std) if normalised else (1.0,),
    )


def _rows(state: dict[str, Tensor], layer: object) -> int | None:
    """How many classes the last layer of a state dict tells apart."""
    weight = state.get(f"{layer}.weight") if isinstance(layer, str) else None
    return None if weight is None else len(weight)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(count))


def _synonyms(name: str) -> Sequence[str]:
    return [part.strip().casefold() for part in name.split(",")]
