"""Pictures from files, upright and in colour. The command line and evaluations read theirs here.

Files come from anyone. Pillow warns of pictures with more than `PIL.Image.MAX_IMAGE_PIXELS` (89
million, 360 MB); here they are refused before they are decoded. Who needs them raises that number.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from captum_generic_attn.errors import UnreadablePictureError

if TYPE_CHECKING:
    from PIL.Image import Image


Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels of an image, whose left edge is 0 and whose right one W."""


def open_picture(path: Path) -> Image:
    """The picture in a file, turned as its camera says, in the colours of the file.

    Args:
        path: of any format that Pillow reads; of several frames or pages the first is read, with a
            warning.

    Returns:
        A Pillow picture with 8 bits for each value; greys of 16 bits are scaled down to them.

    Raises:
        UnreadablePictureError: if it cannot be read, has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`, or holds numbers of which nobody says which is white.

    Example:
        >>> from captum_generic_attn import demo
        >>> open_picture(demo.canvases()[0].path).size
        (64, 64)
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.verify()  # checksums, which Pillow does not look at while it decodes
            with Image.open(path) as picture:
                frames = getattr(picture, "is_animated", False)
                picture.load()
                # Phones write the turn beside the pixels.
                ImageOps.exif_transpose(picture, in_place=True)
    except UnidentifiedImageError:
        raise UnreadablePictureError(f"{str(path)!r} is no picture that Pillow can read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        seen = str(error).partition(",")[0]
        raise UnreadablePictureError(
            f"{str(path)!r} is too large: {seen[:1].lower()}{seen[1:]}; save it smaller, such as "
            "4000 pixels wide (models see far fewer), or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    # Each of Pillow's readers complains of a broken file in its own way.
    except Exception as error:
        raise UnreadablePictureError(f"{str(path)!r} cannot be read: {error}") from error
    if frames:
        warnings.warn(f"{str(path)!r} has several frames: the first is read", stacklevel=2)
    if picture.mode.startswith("I;16"):
        return _of_bytes(picture)
    if picture.mode in {"I", "F"}:
        kind = "whole numbers of 32 bits" if picture.mode == "I" else "floats"
        raise UnreadablePictureError(
            f"{str(path)!r} holds {kind}: which of them is white is not said; save it with 8 or 16 "
            "bits"
        )
    return picture


def open_rgb(path: Path) -> Image:
    """The picture in a file as people see it: `rgb` of `open_picture`, and a warning where that
    laid it on white.

    Args:
        path: of any format that Pillow reads.

    Raises:
        UnreadablePictureError: as by `open_picture`, or if its colours are not known.

    Example:
        >>> from captum_generic_attn import demo
        >>> open_rgb(demo.canvases()[0].path).mode
        'RGB'
    """
    picture = open_picture(path)
    try:
        shown = rgb(picture)
    except ValueError as error:
        raise UnreadablePictureError(f"{str(path)!r}: {error}") from error
    if _transparent(picture):
        warnings.warn(f"{str(path)!r} is transparent in places: it is laid on white", stacklevel=2)
    return shown


def rgb(picture: Image) -> Image:
    """A picture in red, green and blue, as people see it: where it is transparent, on white.

    Below transparent places, files hold any colours, which nobody ever sees.

    Args:
        picture: of any mode whose values say which is white; greys of 16 bits are scaled down.

    Returns:
        A picture of mode RGB; the given one, if it is that.

    Raises:
        ValueError: if its values do not say which colours they are.

    Example:
        >>> from PIL import Image
        >>> rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 51))).getpixel((0, 0))
        (204, 204, 204)
    """
    from PIL import Image

    if picture.mode.startswith("I;16"):
        picture = _of_bytes(picture)
    if picture.mode in {"I", "F"}:
        raise ValueError(
            f"a PIL picture of mode {picture.mode} does not say which value is white: make it one "
            "of 8 or 16 bits"
        )
    clear = picture.has_transparency_data
    if picture.mode == "RGB" and not clear:
        return picture
    try:
        shown = picture.convert("RGBA" if clear else "RGB")
    except ValueError as error:
        raise ValueError(
            f"Pillow knows no colours of a picture of mode {picture.mode} ({error}): save it as RGB"
        ) from error
    if not clear:
        return shown
    white = Image.new("RGB", picture.size, "white")
    white.paste(shown, mask=shown.getchannel("A"))
    return white


def _of_bytes(picture: Image) -> Image:
    """Greys of 16 bits in 8: Pillow would take all above 255 for white."""
    from PIL import Image

    values = np.asarray(picture)
    greys = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" not in picture.info:
        return greys
    opaque = (values != picture.info["transparency"]).astype(np.uint8)
    return Image.merge("LA", (greys, Image.fromarray(255 * opaque)))


def _transparent(picture: Image) -> bool:
    """Whether a picture is not opaque everywhere."""
    if not picture.has_transparency_data:
        return False
    alpha = picture.convert("RGBA").getchannel("A")
    return alpha.getextrema() != (255, 255)


def picture_endings() -> frozenset[str]:
    """The endings of files that `open_picture` can read: those of formats that Pillow opens by
    itself, in small letters.

    Example:
        >>> sorted({".png", ".jpg", ".pdf"} & picture_endings())
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
