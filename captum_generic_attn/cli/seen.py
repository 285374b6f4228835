"""The image to explain, as its model takes it and as people will see it in the figure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from captum_generic_attn.cli.terminal import fail, warn

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from captum_generic_attn.files.images import Box
    from captum_generic_attn.models.preprocessing import ImageModel

# On its longer side, in pixels: as many as a panel of a figure can show to one who looks closely.
_DRAWN = 1200
# How many times as long as wide a panel may be.
_NARROWEST = 8


@dataclass(frozen=True)
class Seen:
    """An image, and what a model saw of it.

    Attributes:
        pixels: `[3, H, W]`, as the model takes it.
        image: the user's own; or what the model got, where its place in the former is not known.
        crop_box: the part of `image` that the model saw, in pixels.
        own: whether `image` is the user's own.
    """

    pixels: Tensor
    image: Image.Image
    crop_box: Box
    own: bool

    def on_image(self, box: Box) -> Box:
        """A box in pixels of what the model got, in pixels of `image`."""
        height, width = self.pixels.shape[-2:]
        left, top, right, bottom = self.crop_box
        x, y = (right - left) / width, (bottom - top) / height
        return left + box[0] * x, top + box[1] * y, left + box[2] * x, top + box[3] * y

    def drawn(self) -> Seen:
        """The same, with an image no larger than a figure can show."""
        size = self.image.size
        if max(size) <= _DRAWN:
            return self
        width, height = (max(1, round(side * _DRAWN / max(size))) for side in size)
        x, y = width / size[0], height / size[1]
        left, top, right, bottom = self.crop_box
        return replace(
            self,
            image=self.image.resize((width, height), reducing_gap=3),
            crop_box=(left * x, top * y, right * x, bottom * y),
        )


def see(model: ImageModel, image: Image.Image) -> Seen:
    """What the model sees of an RGB image; if it cannot take it, or if the figure will show
    another image than the user's own, that is said.
    """
    import numpy as np
    from PIL import Image

    from captum_generic_attn.models.seen_crop import seen_crop

    narrow = max(image.size) > _NARROWEST * min(image.size)
    try:
        pixels = model.preprocess(image)
        crop_box = None if narrow else seen_crop(model.preprocess, *image.size)
    except ValueError as error:
        fail(f"{model.name}: {error}")
    if crop_box is not None:
        return Seen(pixels, image, crop_box, own=True)
    reason = (
        f"the image is too narrow for a figure ({image.width} × {image.height} pixels)"
        if narrow
        else f"which part of the image {model.name} sees cannot be told from its preprocessing"
    )
    warn(f"{reason}: the figure shows it as the model got it")
    got = Image.fromarray((255 * model.image(pixels)).round().astype(np.uint8))
    return Seen(pixels, got, (0.0, 0.0, float(got.width), float(got.height)), own=False)
