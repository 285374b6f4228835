"""Pictures from files, upright and in colour. The command line and evaluations read theirs here."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


class UnreadablePictureError(ValueError):
    """A file is no picture, or a broken one; the message names it."""


def open_picture(path: Path) -> Image:
    """The picture in a file, turned as its camera says, in the colours of the file.

    Args:
        path: of any format that Pillow reads.

    Returns:
        A Pillow picture with 8 bits for each value; greys of 16 bits are scaled down to them.

    Raises:
        UnreadablePictureError: if it cannot be read, or holds numbers of which nobody says which
            is white.

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
            upright = ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        raise UnreadablePictureError(f"{str(path)!r} is no picture that Pillow can read") from None
    except (
        OSError, EOFError, RuntimeError, SyntaxError, ValueError, struct.error,
        Image.DecompressionBombError,
    ) as error:  # fmt: skip
        # Each of Pillow's readers complains of a broken file in its own way.
        raise UnreadablePictureError(f"{str(path)!r} cannot be read: {error}") from error
    if upright.mode.startswith("I;16"):
        # Pillow would take all above 255 for white.
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode in {"I", "F"}:
        raise UnreadablePictureError(
            f"{str(path)!r} holds {'whole numbers of 32 bits' if upright.mode == 'I' else 'floats'}"
            ": which of them is white is not said; save it with 8 or 16 bits"
        )
    return upright


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
