"""Canvases: small colour pictures of several garments, whose places are known.

Used by `train_vit.py`, `train_swin.py`, `train_clip.py` and `train_detr.py` (training split), by
the reports and the tables of `benchmarks/evidence` (test split) and by `ship_canvases.py` (the
pictures inside the package). A canvas is a pure function of the split,
a seed and its own index, so that any canvas can be drawn again alone.

Fashion-MNIST's ten classes become seven: T-shirt, pullover, coat and shirt are one class "top",
because even people confuse them at this size.
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_generic_attn.demo import CLASSES, MEAN, SIZE, STD

SOURCE = 28
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
TEST_SEED = 2007
"""Seed of every canvas of the test split: those of the report and, as its first 24, those that the
package ships. It was taken for the looks of its first canvas, before any model had seen it."""

# Fashion-MNIST's own labels: 0 T-shirt, 1 trouser, 2 pullover, 3 dress, 4 coat, 5 sandal,
# 6 shirt, 7 sneaker, 8 bag, 9 ankle boot.
_CLASS_OF_LABEL = np.array([0, 1, 0, 2, 0, 3, 0, 4, 5, 6])
_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_MOST = 4
_LAYOUTS = 24
_SCALES = (26.0 / SOURCE, 32.0 / SOURCE)
_TINTS = np.float32(
    [
        [196, 94, 66],  # terracotta
        [52, 84, 148],  # navy
        [112, 124, 54],  # olive
        [134, 66, 122],  # plum
        [34, 124, 126],  # teal
        [84, 88, 100],  # slate
        [196, 146, 48],  # mustard
        [178, 54, 76],  # crimson
    ]
)
_GROUNDS = np.float32([[250, 245, 235], [240, 245, 250], [241, 247, 238], [250, 240, 240]])
# Fainter pixels are scanning noise round the garment, not cloth.
_FAINTEST = 24

Floats = NDArray[np.float64]
Planes = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """One split of Fashion-MNIST: `images` uint8 [N, 28, 28], `classes` [N] (index into
    `CLASSES`) and `boxes` [N, 4], each garment's (left, top, right, bottom), right and bottom
    exclusive.
    """

    images: NDArray[np.uint8]
    classes: Ints
    boxes: Ints

    def part(self, start: int, stop: int) -> Split:
        """The garments `start` to `stop` (exclusive) as a split of their own."""
        chosen = slice(start, stop)
        return Split(self.images[chosen], self.classes[chosen], self.boxes[chosen])


@dataclass(frozen=True)
class Drawn:
    """A batch of canvases: `pictures` uint8 [B, 64, 64, 3], `labels` [B, 7] of 0 and 1, `classes`
    [B, 4] (−1 where a place is empty), `boxes` [B, 4, 4] as (left, top, right, bottom), `masks`
    bool [B, 4, 64, 64]: the pixels that show each garment rather than the ground.
    """

    pictures: NDArray[np.uint8]
    labels: NDArray[np.float32]
    classes: Ints
    boxes: Ints
    masks: NDArray[np.bool_]

    def part(self, start: int, stop: int) -> Drawn:
        """The canvases `start` to `stop` (exclusive) alone."""
        return Drawn(*(values[start:stop] for values in vars(self).values()))


def load_split(name: str, folder: Path = DEBIAN_FOLDER) -> Split:
    """Reads the split "train" or "test" from the four idx files of Fashion-MNIST in `folder`.

    `FileNotFoundError` says how to get them; `ValueError` names a file that is not what it claims.
    """
    image_file, label_file = (folder / file for file in _FILES[name])
    for file in (image_file, label_file):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing. Install Debian's package dataset-fashion-mnist, or give the "
                f"folder that holds Fashion-MNIST's four .gz files with --data DIR."
            )
    images = _read_idx(image_file)
    labels = _read_idx(label_file)
    if images.shape[1:] != (SOURCE, SOURCE) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{image_file} holds {images.shape} and {label_file} {labels.shape}; "
            f"expected (N, {SOURCE}, {SOURCE}) and (N,)"
        )
    visible = images >= _FAINTEST
    boxes = np.stack([*_extent(visible.any(1)), *_extent(visible.any(2))])[[0, 2, 1, 3]].T
    return Split(images, _CLASS_OF_LABEL[labels], boxes.astype(np.int64))


def draw(split: Split, seed: int, start: int, count: int) -> Drawn:
    """Draws the canvases `start` to `start + count` of `seed`.

    Each holds two to four garments, each at its own scale (the 28-pixel source drawn 26 to 32
    pixels wide) and in a tint of its own, on a pale plain ground. Boxes never overlap. Classes are
    equally likely and independent, so that a garment says nothing about its neighbours: what tells
    a class is in its own boxes.
    """
    dice = _Dice(seed, start, count)
    amount = 2 + (dice.roll(1)[:, 0] * 3).astype(np.int64)
    classes = (dice.roll(_MOST) * len(CLASSES)).astype(np.int64)
    garments = _pick(split.classes, classes, dice.roll(_MOST))
    present = np.arange(_MOST) < amount[:, None]

    sources = split.boxes[garments]
    low, high = _SCALES
    scales = low + (high - low) * dice.roll(_MOST)
    extents = sources[..., 2:] - sources[..., :2]
    sizes = np.maximum(1, np.rint(extents * scales[..., None])).astype(np.int64)
    corners = _lay_out(sizes, present, dice)
    boxes = np.where(present[..., None], np.concatenate([corners, corners + sizes], -1), 0)

    cloth = _project(np.float32(split.images[garments]) / 255, sources, boxes)
    tints = np.argsort(dice.roll(len(_TINTS)), axis=1)[:, :_MOST]
    grounds = (dice.roll(1)[:, 0] * len(_GROUNDS)).astype(np.int64)
    pictures = paint(cloth, tints, grounds)

    classes = np.where(present, classes, -1)
    labels = (classes[..., None] == np.arange(len(CLASSES))).any(1).astype(np.float32)
    return Drawn(pictures, labels, classes, boxes, opacity(cloth) >= 0.5)


def inputs(drawn: Drawn) -> Tensor:
    """The canvases as the models take them: `[B, 3, 64, 64]`, normalised."""
    pixels = torch.from_numpy(drawn.pictures).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN) / STD


def right_places(drawn: Drawn) -> Tensor:
    """Where each class is on each canvas, by the boxes of its garments: bool [B, 7, 64, 64]."""
    places = torch.zeros(*drawn.labels.shape, SIZE, SIZE, dtype=torch.bool)
    for canvas, slot in zip(*np.nonzero(drawn.classes >= 0), strict=True):
        left, top, right, bottom = drawn.boxes[canvas, slot]
        places[canvas, drawn.classes[canvas, slot], top:bottom, left:right] = True
    return places


class _Dice:
    """Uniform numbers for a batch; every canvas has its own generator, so that neither the batch
    size nor its neighbours change it.
    """

    def __init__(self, seed: int, start: int, count: int) -> None:
        self._generators = [np.random.default_rng([seed, start + i]) for i in range(count)]

    def roll(self, amount: int) -> Floats:
        return np.stack([generator.random(amount) for generator in self._generators])


def _read_idx(file: Path) -> NDArray[np.uint8]:
    content = gzip.decompress(file.read_bytes())
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
    if zeros != 0 or kind != 8:
        raise ValueError(f"{file} is not an idx file of bytes (it starts with {content[:4]!r})")
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _extent(visible: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """First and one past the last True of each row."""
    return visible.argmax(1), visible.shape[1] - visible[:, ::-1].argmax(1)


def _pick(available: Ints, wanted: Ints, chances: Floats) -> Ints:
    """One garment of each wanted class."""
    by_class = np.argsort(available, kind="stable")
    counts = np.bincount(available, minlength=len(CLASSES))
    starts = np.cumsum(counts) - counts
    picked: Ints = by_class[starts[wanted] + (chances * counts[wanted]).astype(np.int64)]
    return picked


def _lay_out(sizes: Ints, present: NDArray[np.bool_], dice: _Dice) -> Ints:
    """The top left corners [B, 4, 2] of boxes that do not overlap.

    The first overlap-free of several free layouts; where there is none, one garment per quarter of
    the canvas, which always fits since no garment is larger than a quarter.
    """
    count = len(sizes)
    room = (SIZE - sizes + 1)[:, None]
    free = (dice.roll(_LAYOUTS * _MOST * 2).reshape(count, _LAYOUTS, _MOST, 2) * room).astype(int)
    quarter = SIZE // 2
    places = np.argsort(dice.roll(_MOST), axis=1)
    origin = np.stack([places % 2, places // 2], -1) * quarter
    safe = origin + (dice.roll(_MOST * 2).reshape(count, _MOST, 2) * (quarter - sizes + 1)).astype(
        int
    )
    layouts = np.concatenate([free, safe[:, None]], 1)

    clash = np.zeros(layouts.shape[:2], bool)
    for one in range(_MOST):
        for other in range(one):
            apart = (layouts[:, :, one] >= (layouts[:, :, other] + sizes[:, None, other])) | (
                layouts[:, :, other] >= (layouts[:, :, one] + sizes[:, None, one])
            )
            clash |= ~apart.any(-1) & (present[:, one] & present[:, other])[:, None]
    chosen: Ints = layouts[np.arange(count), clash.argmin(1)]
    return chosen


def _project(images: Planes, sources: Ints, boxes: Ints) -> Planes:
    """Each garment [B, 4, 28, 28], its source box stretched over its box on the canvas:
    [B, 4, 64, 64].
    """
    across = _resampling(sources[..., 0::2], boxes[..., 0::2])
    down = _resampling(sources[..., 1::2], boxes[..., 1::2])
    projected: Planes = down @ images @ across.swapaxes(-1, -2)
    return projected


def _resampling(source: Ints, target: Ints) -> Planes:
    """Linear interpolation along one axis as matrices [B, 4, 64, 28]; zero outside `target`."""
    (first, last), (start, stop) = np.moveaxis(source, -1, 0), np.moveaxis(target, -1, 0)
    pixels = np.arange(SIZE) + 0.5
    share = (pixels - start[..., None]) / np.maximum(stop - start, 1)[..., None]
    where = first[..., None] + share * (last - first)[..., None]
    distance = np.abs(np.float32(where)[..., None] - np.arange(0.5, SOURCE, dtype=np.float32))
    inside = (share > 0) & (share < 1) & (stop > start)[..., None]
    weights: Planes = np.maximum(1 - distance, 0) * inside[..., None]
    return weights


def opacity(cloth: Planes) -> Planes:
    """How much of the ground a garment's pixels hide, 0 … 1, by their brightness in the source."""
    cover: Planes = np.minimum(np.maximum((cloth - 0.047) * 5.3, 0), 1)
    return cover


def paint(cloth: Planes, tints: Ints, grounds: Ints | None = None) -> NDArray[np.uint8]:
    """Pictures [B, H, W, 3] of garments that do not overlap: `cloth` [B, M, H, W] in 0 … 1, the
    tint of each (`tints` [B, M], eight there are), and each picture's ground (`grounds` [B], four
    there are; without them the first).
    """
    count, _, height, width = cloth.shape
    ground = _GROUNDS[np.zeros(count, np.int64) if grounds is None else grounds]
    cloth = cloth.reshape(*cloth.shape[:2], -1)
    cover = opacity(cloth)
    # Boxes do not overlap, so the garments' contributions can be summed. The full range of shades
    # is kept: seams and collars tell a dress from a top.
    ink = (cover * (0.05 + 1.05 * cloth)).swapaxes(1, 2) @ _TINTS[tints]
    bare = (1 - cover.sum(1))[..., None] * ground[:, None]
    pictures = np.minimum(np.rint(ink + bare), 255).astype(np.uint8)
    return pictures.reshape(count, height, width, 3)
