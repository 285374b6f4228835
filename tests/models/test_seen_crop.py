"""The part of an image that a model sees, found by trying, against what each library does."""

import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms import v2

from captum_generic_attn import demo
from captum_generic_attn.models.preprocessing import preprocessing_of
from captum_generic_attn.models.seen_crop import seen_crop

SIZES = [(4000, 3000), (1000, 700), (700, 1000), (64, 64), (100, 4000), (37, 23)]
TO_TENSOR = v2.ToImage(), v2.ToDtype(torch.float32, scale=True)


def centre(width, height, shorter, side):
    """The shorter side scaled to some length, and a square cut out of the middle."""
    scale = shorter / min(width, height)
    wide, high = (
        shorter if edge == min(width, height) else int(edge * scale) for edge in (width, height)
    )
    left, top = round((wide - side) / 2), round((high - side) / 2)
    x, y = width / wide, height / high
    return left * x, top * y, (left + side) * x, (top + side) * y


def whole(width, height):
    return 0, 0, width, height


def square(width, height):
    side = min(width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return left, top, left + side, top + side


def hugging_face(name, **options):
    transformers = pytest.importorskip("transformers")
    return preprocessing_of(getattr(transformers, name)(**options)).preprocess


def pads():
    """Scales to 20 pixels and cuts out 32, most of which are black."""
    crop = {"height": 32, "width": 32}
    return hugging_face("CLIPImageProcessor", size={"shortest_edge": 20}, crop_size=crop)


PREPROCESSINGS = {
    "shipped": (lambda: demo.preprocess, square, 64),
    "timm": (
        lambda: create_transform((3, 224, 224), crop_pct=0.9, interpolation="bicubic"),
        lambda width, height: centre(width, height, 248, 224),
        224,
    ),
    "torchvision": (
        ViT_B_16_Weights.DEFAULT.transforms,
        lambda width, height: centre(width, height, 256, 224),
        224,
    ),
    "CLIP": (
        lambda: hugging_face("CLIPImageProcessor"),
        lambda width, height: centre(width, height, 224, 224),
        224,
    ),
    "SigLIP": (lambda: hugging_face("SiglipImageProcessor"), whole, 224),
    "DETR": (lambda: hugging_face("DetrImageProcessor"), whole, None),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("library", PREPROCESSINGS)
def test_the_area_is_what_the_library_cuts_out(library, size):
    make, expected, side = PREPROCESSINGS[library]
    crop_box = seen_crop(make(), *size)
    left, top, right, bottom = expected(*size)
    # A tenth of a pixel of what the model sees, or of the image, whichever is larger.
    x, y = (max(1.0, edge / (side or edge)) / 10 for edge in (right - left, bottom - top))
    assert crop_box[::2] == pytest.approx((left, right), abs=x)
    assert crop_box[1::2] == pytest.approx((top, bottom), abs=y)


def test_timm_squashes():
    squash = create_transform((3, 224, 224), crop_pct=0.9, crop_mode="squash")
    # All of it is scaled to 248 × 248 pixels, of which 12 on each side are cut off.
    expected = 1000 * 12 / 248, 700 * 12 / 248, 1000 * 236 / 248, 700 * 236 / 248
    assert seen_crop(squash, 1000, 700) == pytest.approx(expected, abs=0.2)


def test_a_small_part_of_a_large_picture_is_found_to_a_fraction_of_a_pixel():
    crop = v2.Compose([v2.CenterCrop(224), *TO_TENSOR])
    assert seen_crop(crop, 4000, 3000) == pytest.approx((1888, 1388, 2112, 1612), abs=0.02)


@pytest.mark.parametrize("normalise", ["none", "inverted", "grey", "swapped"])
def test_colours_and_their_scale_do_not_matter(normalise):
    scaled = v2.Compose([v2.Resize((50, 50)), *TO_TENSOR])

    def preprocess(picture):
        pixels = scaled(ImageOps.grayscale(picture) if normalise == "grey" else picture)
        return {"inverted": 7 - 300 * pixels, "swapped": pixels.flip(0)}.get(normalise, pixels)

    assert seen_crop(preprocess, 90, 60) == (0, 0, 90, 60)


@pytest.mark.parametrize(
    "change",
    [
        v2.RandomHorizontalFlip(1.0),
        v2.RandomVerticalFlip(1.0),
        v2.RandomRotation((90, 90)),
        v2.RandomRotation((4, 4)),
        v2.Pad(3),
        v2.Pad(3, fill=255),
        v2.RandomSolarize(0.5, p=1.0),
        v2.Lambda(lambda image: image.transpose(Image.Transpose.TRANSPOSE)),
        v2.Lambda(lambda image: image.point(lambda grey: int(255 * (grey / 255) ** 2))),
        v2.Lambda(lambda image: Image.new("RGB", image.size)),
        v2.Lambda(lambda image: image.resize((2, 2))),
    ],
    ids=[
        "mirror", "upside down", "quarter turn", "slant", "frame", "white frame", "solarise",
        "transpose", "square", "blank", "two pixels",
    ],
)  # fmt: skip
def test_what_is_more_than_to_cut_and_scale_has_no_area(change):
    preprocess = v2.Compose([v2.Resize((60, 60)), change, *TO_TENSOR])
    assert seen_crop(preprocess, 90, 80) is None


def test_a_crop_beyond_the_picture_has_no_area():
    assert seen_crop(pads(), 64, 64) is None
    assert seen_crop(pads(), 640, 480) is None


def test_the_bent_values_at_the_ends_of_a_picture_do_not_count():
    # 14 pixels for each of the image's; no filter can look beyond the outermost.
    corner = v2.Lambda(lambda image: image.crop((0, 0, 112, 112)))
    crop_box = seen_crop(v2.Compose([v2.Resize((224, 224)), corner, *TO_TENSOR]), 16, 16)
    assert crop_box[:2] == (0, 0)
    assert crop_box[2:] == pytest.approx((8, 8), abs=0.05)
