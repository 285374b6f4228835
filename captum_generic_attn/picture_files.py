"""Pictures from files, upright and in colour. The command line and evaluations read theirs here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


class UnreadablePictureError(ValueError):
    """A file is no picture, or a broken one; the message names it."""


def open_picture(path: Path) -> Image:
    """The picture in a file, turned as its camera says, in the colours of the file.

    Args:
        path: of any format that Pillow reads.

    Raises:
        UnreadablePictureError: if it cannot be read.

    Example:
        >>> from captum_generic_attn import demo
        >>> open_picture(demo.canvases()[0].path).size
        (64, 64)
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.load()
            # Phones write the turn beside the pixels.
            return ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        raise UnreadablePictureError(f"{str(path)!r} is no picture that Pillow can read") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise UnreadablePictureError(f"{str(path)!r} cannot be read: {error}") from error
