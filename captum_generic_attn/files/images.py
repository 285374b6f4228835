"""Images from files, upright and in colour. The command line and evaluations read theirs here.

Files come from anyone. Pillow warns of images with more than `PIL.Image.MAX_IMAGE_PIXELS` (89
million, 360 MB); here they are refused before they are decoded. Who needs them raises that number.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from captum_generic_attn.errors import UnreadableImageError

if TYPE_CHECKING:
    from PIL.Image import Image


Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of an image, whose left edge is 0 and whose right one W."""


def open_image(path: Path) -> Image:
    """The image in a file, turned as its camera says, in the colours of the file.

    Args:
        path: of any format that Pillow reads; of several frames or pages the first is read, with a
            warning.

    Returns:
        A Pillow image with 8 bits for each value; greys of 16 bits are scaled down to them.

    Raises:
        UnreadableImageError: if it cannot be read, has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`, or holds numbers of which nobody says which is white.

    Example:
        >>> from captum_generic_attn import demo
        >>> open_image(demo.canvases()[0].path).size
        (64, 64)
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.verify()  # checksums, which Pillow does not look at while it decodes
            with Image.open(path) as image:
                frames = getattr(image, "is_animated", False)
                image.load()
                # Phones write the turn beside the pixels.
                ImageOps.exif_transpose(image, in_place=True)
    except UnidentifiedImageError:
        raise UnreadableImageError(f"{str(path)!r} is no image that Pillow can read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        seen = str(error).partition(",")[0]
        raise UnreadableImageError(
            f"{str(path)!r} is too large: {seen[:1].lower()}{seen[1:]}; save it smaller, such as "
            "4000 pixels wide (models see far fewer), or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    # Each of Pillow's readers complains of a broken file in its own way.
    except Exception as error:
        raise UnreadableImageError(f"{str(path)!r} cannot be read: {error}") from error
    if frames:
        warnings.warn(f"{str(path)!r} has several frames: the first is read", stacklevel=2)
    if image.mode.startswith("I;16"):
        return _of_bytes(image)
    if image.mode in {"I", "F"}:
        kind = "whole numbers of 32 bits" if image.mode == "I" else "floats"
        raise UnreadableImageError(
            f"{str(path)!r} holds {kind}: which of them is white is not said; save it with 8 or 16 "
            "bits"
        )
    return image


def open_rgb(path: Path) -> Image:
    """The image in a file as people see it: `rgb` of `open_image`, and a warning where that
    laid it on white.

    Args:
        path: of any format that Pillow reads.

    Raises:
        UnreadableImageError: as by `open_image`, or if its colours are not known.

    Example:
        >>> from captum_generic_attn import demo
        >>> open_rgb(demo.canvases()[0].path).mode
        'RGB'
    """
    image = open_image(path)
    try:
        shown = rgb(image)
    except ValueError as error:
        raise UnreadableImageError(f"{str(path)!r}: {error}") from error
    if _transparent(image):
        warnings.warn(f"{str(path)!r} is transparent in places: it is laid on white", stacklevel=2)
    return shown


def rgb(image: Image) -> Image:
    """An image in red, green and blue, as people see it: where it is transparent, on white.

    Below transparent places, files hold any colours, which nobody ever sees.

    Args:
        image: of any mode whose values say which is white; greys of 16 bits are scaled down.

    Returns:
        An image of mode RGB; the given one, if it is that.

    Raises:
        ValueError: if its values do not say which colours they are.

    Example:
        >>> from PIL import Image
        >>> rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 51))).getpixel((0, 0))
        (204, 204, 204)
    """
    from PIL import Image

    if image.mode.startswith("I;16"):
        image = _of_bytes(image)
    if image.mode in {"I", "F"}:
        raise ValueError(
            f"a PIL image of mode {image.mode} does not say which value is white: make it one "
            "of 8 or 16 bits"
        )
    clear = image.has_transparency_data
    if image.mode == "RGB" and not clear:
        return image
    try:
        shown = image.convert("RGBA" if clear else "RGB")
    except ValueError as error:
        raise ValueError(
            f"Pillow knows no colours of an image of mode {image.mode} ({error}): save it as RGB"
        ) from error
    if not clear:
        return shown
    white = Image.new("RGB", image.size, "white")
    white.paste(shown, mask=shown.getchannel("A"))
    return white


def _of_bytes(image: Image) -> Image:
    """Convert 16-bit greys to 8 bits: Pillow would clip all above 255 to white."""
    from PIL import Image

    values = np.asarray(image)
    greys = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" not in image.info:
        return greys
    opaque = (values != image.info["transparency"]).astype(np.uint8)
    return Image.merge("LA", (greys, Image.fromarray(255 * opaque)))


def _transparent(image: Image) -> bool:
    """Whether an image is not opaque everywhere."""
    if not image.has_transparency_data:
        return False
    alpha = image.convert("RGBA").getchannel("A")
    return alpha.getextrema() != (255, 255)


def image_endings() -> frozenset[str]:
    """The endings of files that `open_image` can read: those of formats that Pillow opens by
    itself, in small letters.

    Example:
        >>> sorted({".png", ".jpg", ".pdf"} & image_endings())
        ['.jpg', '.png']
    """
    from PIL import Image
    from PIL.ImageFile import StubImageFile

    endings = Image.registered_extensions()
    # Of stubs and of films Pillow reads the size alone.
    readable = {
        kind
        for kind, (reader, _) in Image.OPEN.items()
        if kind != "MPEG" and not (isinstance(reader, type) and issubclass(reader, StubImageFile))
    }
    return frozenset(ending for ending, kind in endings.items() if kind in readable)
