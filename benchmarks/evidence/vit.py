"""Evidence on pictures: the shipped vision transformer on garment canvases.

Two tables. Does the model need what a map points at: perturbation, deletion, insertion, SaCo. Does
it point at the garment: segmentation and the pointing game. Run by `make evidence`; alone,
`python benchmarks/evidence/vit.py --data DIR`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from captum.attr import Attribution, GradientShap
from garments import DEBIAN_FOLDER, Drawn, draw, inputs, load_split, right_places
from methods import Methods, broken_vit, of_vit, some
from tables import Column, Found, Points, Table, percent, points, through, versions
from torch import Tensor, nn

from captum_generic_attn import demo
from captum_generic_attn.comparison import patch_mask, run
from captum_generic_attn.metrics import (
    PIXELS,
    Estimate,
    Pixels,
    blurred,
    deletion,
    detected,
    estimate,
    insertion,
    perturbation,
    pointing,
    probability,
    saco,
    segment,
)

SEED = 2021
"""Of the canvases, all of the test split."""
SAMPLES = 1000
GRID = (8, 8)
CHUNK = 50
BLACK = (0 - demo.MEAN) / demo.STD

NEEDED = (
    Column("positive_black", "positive, black", "less"),
    Column("negative_black", "negative, black", "more"),
    Column("positive_ground", "positive, ground", "less"),
    Column("negative_ground", "negative, ground", "more"),
    Column("deletion", "deletion", "less"),
    Column("insertion", "insertion", "more"),
    Column("saco", "SaCo", "more", 2),
)
POINTED = (
    Column("accuracy", "pixel accuracy", "more"),
    Column("iou", "mIoU", "more"),
    Column("precision", "mAP", "more"),
    Column("pixel", "pointing, pixel", "more"),
    Column("token", "pointing, token", "more"),
)


@dataclass(frozen=True)
class Explained:
    """Canvases `[B, 3, 64, 64]`, the class that the model is surest of on each `[B]`, and the
    pixels `[B, 64, 64]` and boxes (as pixels) of its garments, empty where it is wrong.
    """

    pictures: Tensor
    targets: Tensor
    masks: Tensor
    boxes: Tensor


@torch.no_grad()
def explained(model: nn.Module, drawn: Drawn) -> Explained:
    """What the model says of canvases."""
    pictures = inputs(drawn)
    targets = torch.cat([model(chunk).argmax(1) for chunk in pictures.split(CHUNK)])
    mine = torch.from_numpy(drawn.classes) == targets[:, None]
    masks = torch.from_numpy(drawn.masks) & mine[:, :, None, None]
    boxes = right_places(drawn)[torch.arange(len(targets)), targets]
    return Explained(pictures, targets, masks.any(1), boxes)


def attributions(method: Attribution, data: Explained) -> Tensor:
    """`[B, 3, 64, 64]` of all canvases, in chunks; each chunk has random numbers of its own."""
    gradients = isinstance(method, GradientShap)
    given = {
        "baselines": torch.zeros(1, 3, demo.SIZE, demo.SIZE),
        "feature_mask": patch_mask((demo.SIZE, demo.SIZE), GRID[0]),
        "n_samples": 30 if gradients else 300,
        "perturbations_per_eval": 100,
    }
    chunks = zip(data.pictures.split(CHUNK), data.targets.split(CHUNK), strict=True)
    return torch.cat(
        [
            run(method, pictures, targets, given, SEED + chunk)
            for chunk, (pictures, targets) in enumerate(chunks)
        ]
    )


def needed(
    model: nn.Module, data: Explained, maps: Tensor
) -> tuple[dict[str, Estimate], dict[str, Points]]:
    """Figures of the first table for one method, and its curves."""
    named, sure = detected(data.targets), probability(data.targets, multi_label=True)
    found, curves = {}, {}
    for fill, value in (("black", BLACK), ("ground", 0.0)):
        for test, first in (("positive", True), ("negative", False)):
            curve = perturbation(
                model, Pixels(data.pictures, value), maps, named, fractions=PIXELS,
                most_relevant_first=first, batch_size=250,
            )  # fmt: skip
            found[f"{test}_{fill}"] = curve.auc()
            curves[f"{test}_{fill}"] = points(curve)
    found["deletion"] = deletion(model, Pixels(data.pictures), maps, sure, batch_size=250).auc()
    soft = Pixels(data.pictures, blurred(data.pictures))
    found["insertion"] = insertion(model, soft, maps, sure, batch_size=250).auc()
    mean = Pixels(data.pictures, data.pictures.mean((2, 3), keepdim=True))
    found["saco"] = estimate(saco(model, mean, maps, sure, batch_size=250))
    return found, curves


def pointed(data: Explained, maps: Tensor) -> dict[str, Estimate]:
    """Figures of the second table for one method, in percent."""
    right = data.masks.flatten(1).any(1)
    heat = Pixels(data.pictures).features(maps).view(len(maps), *maps.shape[2:])[right]
    masks, boxes = data.masks[right], data.boxes[right]
    found = segment(heat, masks)
    side = maps.shape[-1] // GRID[0]
    tokens = torch.nn.functional.avg_pool2d(heat[:, None], side)[:, 0]
    touched = torch.nn.functional.max_pool2d(boxes[:, None].float(), side)[:, 0] > 0
    return {
        "accuracy": percent(found.pixel_accuracy()),
        "iou": percent(found.mean_iou()),
        "precision": percent(found.mean_average_precision()),
        "pixel": percent(estimate(pointing(heat, boxes))),
        "token": percent(estimate(pointing(tokens, touched))),
    }


def every_method(model: nn.Module) -> Methods:
    """All methods, the control, and broken variants of ours."""
    return of_vit(model, GRID) | broken_vit(model, GRID, demo.SIZE)


def experiment(
    data: Path = DEBIAN_FOLDER, samples: int = SAMPLES, names: Collection[str] | None = None
) -> tuple[Table, Table]:
    """Both tables, of the first `samples` canvases of the test split; of all methods, or these."""
    model = demo.load_model()
    seen = explained(model, draw(load_split("test", data), SEED, 0, samples))
    right = int(seen.masks.flatten(1).any(1).sum())

    def figures(method: Attribution) -> Found:
        maps = attributions(method, seen)
        return *needed(model, seen, maps), pointed(seen, maps)

    first, curves, second, seconds = through(
        f"ViT, {samples} canvases", some(every_method(model), names), figures
    )
    settings = {"seed": SEED, "bootstrap": "2000 resamples, 95 %"}
    shared = {"settings": settings, "seconds": seconds, "versions": versions("torchmetrics")}
    return (
        Table("vit", "ViT, faithfulness: does the model need what the map highlights?", _NEEDED,
              NEEDED, first, samples, curves=curves, **shared),
        Table("vit_pointing", "ViT, localisation: does the map point at the garment?", _POINTED,
              POINTED, second, right, **shared),
    )  # fmt: skip


_NEEDED = """The shipped vision transformer, on canvases of two to four garments from the test
split. We explain the most confident class. *Positive* and *negative*: a growing share of the
pixels (0.1 to 0.9) is painted over, starting with the most or the least relevant ones. The
value is the area under the share of canvases on which the model still predicts the class
(probability above one half; a multi-label model has no top 1). The maximum is 90. *Black* is
the authors' choice. On these pale canvases it adds dark shapes that look like garments, so we
also paint with the mean colour of the backgrounds (*ground*). *Deletion* and *insertion* follow
RISE, in 20 steps: the area under the probability of the class. Deleted pixels get the mean
colour of the backgrounds; inserted pixels replace a blurred image. The model often recognises
the blurred image, so chance scores high. *SaCo* uses 10 subsets and ranges from −1 to 1;
removed pixels get the mean of the image."""

_POINTED = """The same explanations, for the canvases that contain the explained class. *Pixel
accuracy* and *mIoU* (background and foreground, over the whole set) compare the map,
thresholded at its mean, with the pixels of the garment. *mAP* takes the values of the map as
pixel scores, per image. *Pointing*: the highest pixel lies in the box of the garment, or the
highest of the 64 tokens overlaps it. All values are in percent."""


def main(data: Path = DEBIAN_FOLDER, samples: int = SAMPLES, threads: int = 1) -> None:
    """Make both tables and store them."""
    torch.set_num_threads(threads)
    for table in experiment(data, samples):
        print(table.store())


if __name__ == "__main__":
    typer.run(main)
