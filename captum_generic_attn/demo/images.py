"""The shipped canvases, and the preprocessing of the shipped models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from captum_generic_attn.files.images import rgb

if TYPE_CHECKING:
    from torch import Tensor

CLASSES: tuple[str, ...] = ("top", "trouser", "dress", "sandal", "sneaker", "bag", "ankle boot")
"""The classes, in the order of the logits. "top" is Fashion-MNIST's T-shirt, pullover, coat and
shirt."""

SIZE = 64
"""Height and width of the model's images, in pixels."""

MEAN, STD = 0.95, 0.3
"""`preprocess` subtracts `MEAN` from every channel (in 0 … 1) and divides by `STD`. The pale
background of a canvas is then near zero, and only garments are far from it."""

# Files are read by path, so the package cannot be imported from a zip file.
FOLDER = Path(str(resources.files("captum_generic_attn.demo")))


@dataclass(frozen=True)
class Garment:
    """One garment on a canvas.

    Attributes:
        name: one of `CLASSES`.
        box: (left, top, right, bottom) in pixels; right and bottom are exclusive.
    """

    name: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Canvas:
    """An image of two to four garments, some of which may be of the same class.

    Attributes:
        path: the PNG file, 64 × 64 pixels, RGB.
        garments: its garments, with boxes that do not overlap.
    """

    path: Path
    garments: tuple[Garment, ...]

    def image(self) -> Image.Image:
        """The image, read from `path`: RGB, 64 × 64 pixels."""
        with Image.open(self.path) as image:
            return image.convert("RGB")


def canvases() -> tuple[Canvas, ...]:
    """The 24 shipped canvases, the first 24 of their seed.

    The garments are from Fashion-MNIST's test split, which the models were not trained on.

    Example:
        >>> from captum_generic_attn import demo
        >>> first = demo.canvases()[0]
        >>> first.image().size
        (64, 64)
        >>> all(garment.name in demo.CLASSES for garment in first.garments)
        True
    """
    entries = json.loads((FOLDER / "canvases" / "canvases.json").read_text("utf-8"))
    return tuple(
        Canvas(
            path=FOLDER / "canvases" / entry["file"],
            garments=tuple(
                Garment(garment["name"], tuple(garment["box"])) for garment in entry["garments"]
            ),
        )
        for entry in entries
    )


def preprocess(image: Image.Image) -> Tensor:
    """Preprocess an image for the shipped models: `[3, 64, 64]`, float32.

    Converts to RGB (transparent parts become white), crops the largest centred square, scales it to
    64 × 64 pixels (bilinear, antialiased; an image of this size is not changed) and normalises by
    `MEAN` and `STD`, so that values are in −3.17 … 0.17.

    Raises:
        TypeError: `image` is not a PIL image.
        ValueError: its mode does not define which value is white.

    Example:
        >>> from PIL import Image
        >>> from captum_generic_attn.demo import preprocess
        >>> white = preprocess(Image.new("L", (300, 200), 255))
        >>> white.shape, round(white.min().item(), 2)
        (torch.Size([3, 64, 64]), 0.17)
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"preprocess takes a PIL.Image.Image, not {type(image).__name__}")
    from torchvision.transforms.v2 import functional as transforms

    square = transforms.center_crop(rgb(image), [min(image.size)])
    pixels: Tensor = transforms.pil_to_tensor(transforms.resize(square, [SIZE, SIZE]))
    return (pixels.to(torch.float32) / 255 - MEAN) / STD
