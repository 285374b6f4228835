"""What image models share: `classifiers`, `dual_encoders`
and `detectors` build on it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_generic_attn import demo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageModel:
    """A model in evaluation mode with what is needed to feed it an image and to show what it saw.

    Attributes:
        name: how to call it in a message.
        model: takes `[B, 3, H, W]` first.
        preprocess: a PIL image to the model's `[3, H, W]`, normalised.
        mean: what `preprocess` subtracted from each channel, for values in 0 … 1.
        std: what it divided each channel by.
    """

    name: str
    model: nn.Module
    preprocess: Callable[[Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def image(self, pixels: Tensor) -> NDArray[np.float32]:
        """The image that the model got, for display: `[3, H, W]` as `preprocess` made it to
        `[H, W, 3]` in 0 … 1.
        """
        shape = (-1, 1, 1)
        restored = pixels * torch.tensor(self.std).view(shape) + torch.tensor(self.mean).view(shape)
        array: NDArray[np.float32] = restored.clamp(0, 1).permute(1, 2, 0).contiguous().numpy()
        return array


@dataclass(frozen=True)
class ClassModel(ImageModel):
    """A model that names classes.

    Attributes:
        classes: their names, in the order of the logits; `"class 3"` where the model brings none.
    """

    classes: tuple[str, ...]

    def index(self, target: str) -> int:
        """The index of a class given by its index or its name.

        A whole number is always an index. A name counts whatever its case, and each of the
        synonyms that an ImageNet name lists (`"tabby, tabby cat"`) counts by itself.

        Raises:
            ValueError: there is no such class (the message lists the nearest names), or several
                classes share the name.

        Example:
            >>> from captum_generic_attn.models.classifiers import load_classifier
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


class Preprocessing(NamedTuple):
    """The three fields of `ImageModel` about preprocessing."""

    preprocess: Callable[[Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def shipped_preprocessing() -> Preprocessing:
    """The preprocessing of the models that come with the package."""
    return Preprocessing(demo.preprocess, (demo.MEAN,) * 3, (demo.STD,) * 3)


def preprocessing_of(processor: Any) -> Preprocessing:
    """The preprocessing of a Hugging Face model's image processor.

    The padding that some processors add, so that images of several sizes make a batch, is cut off
    again: a single image needs none, and a detector's boxes are shares of the image without it.
    """

    def preprocess(image: Image) -> Tensor:
        encoding = processor(images=image, return_tensors="pt")
        pixels: Tensor = encoding["pixel_values"][0]
        if pixels.ndim != 3:
            raise ValueError(
                f"its image processor makes {tuple(pixels.shape)} of an image, on which nothing "
                "can be drawn: a model of images (3, height, width) is needed"
            )
        if "pixel_mask" in encoding:
            seen = encoding["pixel_mask"][0].bool()
            return pixels[:, : int(seen.any(1).sum()), : int(seen.any(0).sum())].contiguous()
        return pixels

    normalised = getattr(processor, "do_normalize", False)
    return Preprocessing(
        preprocess,
        tuple(processor.image_mean) if normalised else (0.0,),
        tuple(processor.image_std) if normalised else (1.0,),
    )


def _synonyms(name: str) -> Sequence[str]:
    return [part.strip().casefold() for part in name.split(",")]
