"""Images in files that anyone may have made: the image that people see, or an error by name."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.image_mutations import HEIGHT, NOISE, WIDTH, files, png, written
from PIL import Image

from captum_generic_attn import demo
from captum_generic_attn.errors import UnreadableImageError
from captum_generic_attn.files import images as picture_files
from captum_generic_attn.files.images import open_image, open_rgb, rgb
from captum_generic_attn.models.seen_crop import _shaded
from captum_generic_attn.visualization import overlay

RGB = NOISE[..., :3]


def read(tmp_path: Path, data: bytes, *remarks: str, name: str = "one") -> np.ndarray:
    """The values in a file, whose reading must give these remarks and no others."""
    path = tmp_path / name
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = open_rgb(path)
    assert [str(w.message) for w in caught] == [f"{str(path)!r} {remark}" for remark in remarks]
    assert all(w.category is UserWarning for w in caught)
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


def refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "one").write_bytes(data)
    with pytest.raises(UnreadableImageError, match=f"one': {message}|one' {message}"):
        open_rgb(tmp_path / "one")


# ---------------------------------------------------------------- damage


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
@pytest.mark.parametrize(
    "count", [12, pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_damaged_files_are_refused_or_read_in_bounded_memory(tmp_path, count):
    paths = os.pathsep.join(
        map(str, (Path(picture_files.__file__).parents[2], Path(__file__).parents[1]))
    )
    done = subprocess.run(
        [
            sys.executable, "-c",
            f"from helpers import image_mutations as m; m.run({count}, 1200)",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("large") == {"refused": 1}
    assert {*found} == {"png", "jpg", "gif", "webp", "bmp", "tif"}
    assert sum(sum(became.values()) for became in found.values()) == 18 * count
    assert all(became["refused"] > count / 3 for became in found.values())


@pytest.mark.parametrize("name", ["rgb.png", "rgba.png", "palette.png"])
def test_a_png_file_with_any_byte_changed_is_no_other_picture(tmp_path, name):
    """Its parts have checksums, of which Pillow's decoder does not ask all."""
    whole = files()[name]
    path = tmp_path / "one.png"
    path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = np.asarray(open_rgb(path))
        draw = np.random.default_rng(0)
        for place in draw.choice(len(whole), 150, replace=False):
            changed = bytearray(whole)
            changed[place] ^= 1 << int(draw.integers(8))
            path.write_bytes(changed)
            try:
                found = np.asarray(open_rgb(path))
            except UnreadableImageError:
                continue
            assert np.array_equal(found, expected), place


def test_what_is_no_picture(tmp_path):
    refused(tmp_path, b"", "is no image that Pillow can read")
    refused(tmp_path, b"a text", "is no image that Pillow can read")
    refused(tmp_path, bytes(1000), "is no image that Pillow can read")
    for name, data in files().items():
        if name in {"moving.gif", "pages.tif"}:  # the first of their frames is whole
            continue
        path = tmp_path / f"cut {name}"
        path.write_bytes(data[: len(data) // 3])
        with pytest.raises(UnreadableImageError, match=re.escape(repr(str(path)))):
            open_rgb(path)
    with pytest.raises(UnreadableImageError, match=r"cannot be read: .*directory"):
        open_rgb(tmp_path)
    with pytest.raises(UnreadableImageError, match=r"cannot be read: .*No such file"):
        open_rgb(tmp_path / "missing.png")


# ---------------------------------------------------------------- size


@pytest.mark.parametrize(
    "name", ["rgb.png", "plain.jpg", "still.gif", "lossy.webp", "rgb.bmp", "rgb.tif"]
)
@pytest.mark.parametrize("limit", [HEIGHT * WIDTH - 1, HEIGHT * WIDTH // 3])
def test_pictures_beyond_pillows_limit_are_refused(tmp_path, monkeypatch, name, limit):
    """Of those that Pillow refuses (beyond twice the number), and of those that it warns of."""
    data = files()[name]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = rf"is too large: image size \(2640 pixels\) exceeds limit of {limit}.* pixels"
    if limit < HEIGHT * WIDTH // 2:
        message = message.replace(str(limit), str(2 * limit))
    refused(tmp_path, data, message + "; save it smaller, such as 4000 pixels wide")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH)
    assert open_image(tmp_path / "one").size == (WIDTH, HEIGHT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "one").size == (WIDTH, HEIGHT)


def test_shades_of_a_large_picture_take_a_byte_a_pixel():
    x, y = np.linspace(0, 1, 3000, dtype=np.float32), np.linspace(0, 1, 2000, dtype=np.float32)
    tracemalloc.start()
    found = _shaded(0.9 * x[None], 0.2 * y[:, None])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 3000 * 2000
    expected = (255 * (0.9 * x[None] + 0.2 * y[:, None])).clip(0, 255).round()
    assert np.abs(np.asarray(found) - expected).max() <= 1
    assert (np.asarray(found) != expected).mean() < 1e-3


# ---------------------------------------------------------------- transparency

CLEAR = "is transparent in places: it is laid on white"
ALPHA = NOISE[..., 3:] / 255
ON_WHITE = ALPHA * RGB + (1 - ALPHA) * 255


def test_transparent_pictures_are_laid_on_white(tmp_path):
    clear = Image.fromarray(NOISE)
    for kind in ("PNG", "TIFF"):
        assert np.abs(read(tmp_path, written(clear, kind), CLEAR) - ON_WHITE).max() <= 1, kind
    lossless = read(tmp_path, written(clear, "WEBP", lossless=True, exact=True), CLEAR)
    assert np.abs(lossless - ON_WHITE).max() <= 1
    grey = Image.merge("LA", (clear.getchannel(0), clear.getchannel(3)))
    found = read(tmp_path, written(grey, "PNG"), CLEAR)
    assert np.abs(found - ON_WHITE[..., :1]).max() <= 1


def test_one_colour_that_is_transparent(tmp_path):
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    palette = Image.fromarray(values)
    palette.putpalette([40 * i for i in range(6) for _ in range(3)])
    expected = 40 * values.astype(int)
    for transparency in (2, bytes([255, 255, 0])):
        found = read(tmp_path, written(palette, "PNG", transparency=transparency), CLEAR)
        assert np.array_equal(found[..., 0], np.where(values == 2, 255, expected))
    half = read(tmp_path, written(palette, "PNG", transparency=bytes([255, 255, 51])), CLEAR)
    assert half[0, 2].tolist() == [220, 220, 220]  # 0.2 * 80 + 0.8 * 255
    found = read(tmp_path, written(palette, "GIF", transparency=2), CLEAR)
    assert np.array_equal(found[..., 0], np.where(values == 2, 255, expected))
    grey = Image.fromarray(values)
    found = read(tmp_path, written(grey, "PNG", transparency=3), CLEAR)
    assert np.array_equal(found[..., 0], np.where(values == 3, 255, values))
    colour = Image.fromarray(np.stack([values, values, 0 * values], axis=2))
    found = read(tmp_path, written(colour, "PNG", transparency=(1, 1, 0)), CLEAR)
    assert found[0].tolist() == [[0, 0, 0], [255, 255, 255], [2, 2, 0]]


def test_one_grey_of_sixteen_bits_that_is_transparent(tmp_path):
    rows = b"\0" + np.array([0, 700, 65535], dtype=">u2").tobytes()
    plain = png(3, 1, 16, 0, rows)
    assert read(tmp_path, plain)[0, :, 0].tolist() == [0, 2, 255]
    clear = png(3, 1, 16, 0, rows, b"tRNS" + (700).to_bytes(2, "big"))
    assert read(tmp_path, clear, CLEAR)[0, :, 0].tolist() == [0, 255, 255]


def test_opaque_pictures_are_as_they_are(tmp_path):
    opaque = Image.fromarray(RGB).convert("RGBA")
    assert np.array_equal(read(tmp_path, written(opaque, "PNG")), RGB)
    picture = Image.fromarray(RGB)
    assert rgb(picture) is picture


def test_masks_keep_their_transparency(tmp_path):
    """What marks in a mask is its values; white would be laid where nothing is marked."""
    (tmp_path / "one").write_bytes(written(Image.fromarray(NOISE), "PNG"))
    assert np.array_equal(np.asarray(open_image(tmp_path / "one")), NOISE)


def test_pictures_that_are_given_are_laid_on_white_as_well():
    clear = Image.fromarray(NOISE)
    white = rgb(clear)
    assert np.array_equal(demo.preprocess(clear), demo.preprocess(white))
    heat = np.arange(HEIGHT * WIDTH, dtype=float).reshape(HEIGHT, WIDTH)
    assert np.array_equal(overlay(clear, heat), overlay(white, heat))
    assert not np.array_equal(overlay(clear, heat), overlay(clear.convert("RGB"), heat))


# ---------------------------------------------------------------- turns, colours, frames


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    turned = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1],
        5: RGB.transpose(1, 0, 2), 6: np.rot90(RGB, -1), 7: np.rot90(RGB, 2).transpose(1, 0, 2),
        8: np.rot90(RGB),
    }  # fmt: skip
    for turn, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        for kind in ("PNG", "WEBP", "TIFF", "JPEG"):
            options = {"lossless": True} if kind == "WEBP" else {}
            options |= {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
            found = read(tmp_path, written(Image.fromarray(RGB), kind, exif=exif, **options))
            assert found.shape == expected.shape, (turn, kind)
            assert np.abs(found - expected).mean() < (1 if kind == "JPEG" else 1e-9), (turn, kind)


def test_colours_of_other_kinds(tmp_path):
    picture = Image.new("RGB", (16, 16), (200, 100, 50))
    for kind, options in (("JPEG", {"quality": 100}), ("TIFF", {})):
        found = read(tmp_path, written(picture.convert("CMYK"), kind, **options))
        assert np.abs(found - [200, 100, 50]).max() <= 3, kind
    found = read(tmp_path, written(picture.convert("YCbCr"), "TIFF"))
    assert np.abs(found - [200, 100, 50]).max() <= 3
    found = read(tmp_path, written(picture.convert("1"), "PNG"))
    assert {*found.flatten().tolist()} <= {0, 255}
    rows = b"\0" + np.array([[65535, 256, 0], [0, 512, 300]], dtype=">u2").tobytes()
    assert read(tmp_path, png(2, 1, 16, 2, rows))[0].tolist() == [[255, 1, 0], [0, 2, 1]]
    lab = Image.new("LAB", (8, 8), (255, 128, 128))
    assert np.abs(read(tmp_path, written(lab, "TIFF")) - 255).max() <= 2
    with pytest.raises(ValueError, match=r"no colours of an image of mode La \(.*save it as RGB"):
        rgb(Image.new("La", (8, 8)))
    with pytest.raises(ValueError, match="mode F does not say which value is white"):
        demo.preprocess(Image.new("F", (8, 8)))
    ramp = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert np.asarray(rgb(ramp))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("name", ["moving.gif", "moving.png", "pages.tif", "moving.webp"])
def test_the_first_of_several_frames_is_read_and_told(tmp_path, name):
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    if name == "moving.webp":
        data = written(first, "WEBP", lossless=True, save_all=True, append_images=[second])
    else:
        data = files()[name]
    found = read(tmp_path, data, "has several frames: the first is read", name=name)
    expected = first.convert("P", palette=Image.Palette.ADAPTIVE) if name == "moving.gif" else first
    assert np.abs(found - np.asarray(expected.convert("RGB"))).mean() < (
        30 if "gif" in name else 1e-9
    )
