"""Images in files of many kinds, whole and damaged: for the tests of what is read from files."""

import io
import json
import random
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from captum_generic_attn.errors import UnreadableImageError
from captum_generic_attn.files.images import open_rgb
from helpers.memory_limit import memory

HEIGHT, WIDTH = 44, 60
NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)


def written(picture: Image.Image, kind: str, **options: object) -> bytes:
    """An image's file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colours: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG file, written out: `rows` each begin with a 0, `chunks` stand before them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content
            + struct.pack(">I", zlib.crc32(name + content))
        )  # fmt: skip

    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)),
            *(chunk(content[:4], content[4:]) for content in chunks),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def files() -> dict[str, bytes]:
    """Files of all usual formats, by name."""
    clear = Image.fromarray(NOISE)
    picture, grey = clear.convert("RGB"), clear.convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6
    others = {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    return {
        "rgb.png": written(picture, "PNG"),
        "rgba.png": written(clear, "PNG"),
        "palette.png": written(picture.quantize(16), "PNG"),
        "grey16.png": written(Image.fromarray(NOISE[..., 0].astype(np.uint16) << 8), "PNG"),
        "moving.png": written(picture, "PNG", **others),
        "plain.jpg": written(picture, "JPEG"),
        "progressive.jpg": written(picture, "JPEG", progressive=True),
        "turned.jpg": written(picture, "JPEG", exif=turned.tobytes()),
        "cmyk.jpg": written(picture.convert("CMYK"), "JPEG"),
        "still.gif": written(picture, "GIF"),
        "moving.gif": written(picture, "GIF", **others),
        "lossy.webp": written(clear, "WEBP"),
        "lossless.webp": written(picture, "WEBP", lossless=True),
        "rgb.bmp": written(picture, "BMP"),
        "grey.bmp": written(grey, "BMP"),
        "rgb.tif": written(picture, "TIFF"),
        "lzw.tif": written(clear, "TIFF", compression="tiff_lzw"),
        "pages.tif": written(picture, "TIFF", **others),
    }


def damaged(data: bytes, seed: int) -> bytes:
    """A file cut, or with some bits or bytes of its beginning or all of it changed."""
    draw = random.Random(seed)
    changed = bytearray(data)
    if seed % 4 == 0:
        return data[: draw.randrange(len(data))]
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(len(data) if seed % 4 > 1 else 80)
        changed[place] = draw.choice(
            [changed[place] ^ (1 << draw.randrange(8)), draw.randrange(256), 255]
        )
    return bytes(changed)


def check(path: Path) -> str:
    """What becomes of a file: it is `"read"`, or `"refused"` by name."""
    try:
        found = open_rgb(path)
    except UnreadableImageError as error:
        assert repr(str(path)) in str(error), error  # noqa: PT017
        assert "memory" not in str(error).lower(), error  # noqa: PT017
        assert len(str(error)) < 1000, error  # noqa: PT017
        return "refused"
    assert found.mode == "RGB"
    assert np.asarray(found).shape == (found.height, found.width, 3)
    return "read"


def run(count: int, mib: int) -> None:
    """Damage each file in so many ways, here, and print how many were read."""
    warnings.simplefilter("ignore", UserWarning)
    Image.init()
    found: dict[str, Counter[str]] = {}
    for name, data in files().items():
        path = Path(name)
        path.write_bytes(data)
        assert check(path) == "read", name
        for seed in range(count):
            path.write_bytes(damaged(data, seed))
            try:
                with memory(mib):
                    became = check(path)
            except BaseException as error:
                raise AssertionError(f"{name}, damage {seed}") from error
            found.setdefault(path.suffix[1:], Counter())[became] += 1
    # 20 KB that are 169 million pixels: refused before anything is decoded.
    Path("large.png").write_bytes(png(13_000, 13_000, 8, 2, bytes(20_000_000)))
    with memory(32):
        found["large"] = Counter([check(Path("large.png"))])
    print(json.dumps(found))  # noqa: T201
