"""Evidence on detections: the shipped DETR on garment canvases, as in the paper's third table.

One table. Each detection's map, thresholded by Otsu's method, as its mask: COCO's average precision
and recall. Run by `make evidence`; alone, `python benchmarks/evidence/detr.py --data DIR`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from captum.attr import Attribution
from garments import DEBIAN_FOLDER, Drawn, draw, inputs, load_split
from grids import of_tokens, touched
from methods import Methods, broken_detr, of_detr, some
from tables import Column, Table, percent, timed, versions
from torch import Tensor

from captum_generic_attn import demo
from captum_generic_attn.comparison import run
from captum_generic_attn.metrics import (
    Detections,
    DetectionScores,
    Estimate,
    Objects,
    detection_scores,
    estimate,
    otsu_masks,
    pointing,
)
from captum_generic_attn.models import Detector, load_detector

SEED = 2021
"""Of the canvases, all of the test split."""
SAMPLES = 1000
SIDE = 16
"""So many tokens are along each side of a picture."""
CHUNK = 50
AREAS = (16.0**2, 20.0**2)
"""In pixels, where small garments end and large ones begin: about a third of all each."""

COLUMNS = (
    Column("AP", "AP", "more"),
    Column("AP_small", "AP, small", "more"),
    Column("AP_medium", "AP, medium", "more"),
    Column("AP_large", "AP, large", "more"),
    Column("AR", "AR", "more"),
    Column("AR_small", "AR, small", "more"),
    Column("AR_medium", "AR, medium", "more"),
    Column("AR_large", "AR, large", "more"),
    Column("pointing", "pointing", "more"),
)


@dataclass(frozen=True)
class Found:
    """Every detection of a set of canvases, one behind the other `[D]`: its canvas (a place in the
    set), query, class, probability and box `[D, 4]` (left, top, right, bottom in pixels).
    """

    canvases: Tensor
    queries: Tensor
    classes: Tensor
    probabilities: Tensor
    boxes: Tensor


def detected(detector: Detector, pictures: Tensor) -> Found:
    """What the detector finds: queries that are sure of a class."""
    found = [
        (canvas, detection)
        for canvas, picture in enumerate(pictures)
        for detection in detector.detections(picture)
    ]
    return Found(
        torch.tensor([canvas for canvas, _ in found]),
        torch.tensor([detection.query for _, detection in found]),
        torch.tensor([detection.target for _, detection in found]),
        torch.tensor([detection.probability for _, detection in found]),
        torch.tensor([detection.box for _, detection in found]),
    )


def filled(boxes: Tensor) -> Tensor:
    """The pixels of boxes `[D, 4]`, bool `[D, 64, 64]`: those whose centre lies inside."""
    centres = torch.arange(demo.SIZE) + 0.5
    left, top, right, bottom = (side[:, None] for side in boxes.unbind(1))
    across, down = (left <= centres) & (centres < right), (top <= centres) & (centres < bottom)
    return down[:, :, None] & across[:, None, :]


def attributions(method: Attribution, pictures: Tensor, found: Found) -> Tensor:
    """The map of each detection at the resolution of the model's tokens, `[D, 16, 16]`."""
    maps = []
    chunks = zip(
        *(values.split(CHUNK) for values in (found.canvases, found.queries, found.classes)),
        strict=True,
    )
    for chunk, (canvases, queries, classes) in enumerate(chunks):
        mine = pictures[canvases]
        targets = list(zip(queries.tolist(), classes.tolist(), strict=True))
        heat: Any = run(method, mine, targets, {"return_input_shape": False}, SEED + chunk)
        maps.append(of_tokens(heat, mine, SIDE))
    return torch.cat(maps)


def truth(drawn: Drawn) -> list[Objects]:
    """What is on each canvas."""
    masks, classes = torch.from_numpy(drawn.masks), torch.from_numpy(drawn.classes)
    return [
        Objects(mask[kinds >= 0], kinds[kinds >= 0])
        for mask, kinds in zip(masks, classes, strict=True)
    ]


def boxed(drawn: Drawn) -> list[Objects]:
    """Likewise, with boxes in place of masks."""
    every = filled(torch.from_numpy(drawn.boxes).flatten(0, 1))
    return [
        Objects(boxes[: len(objects.labels)], objects.labels)
        for boxes, objects in zip(
            every.unflatten(0, drawn.boxes.shape[:2]), truth(drawn), strict=True
        )
    ]


def scored(
    found: Found, masks: Tensor, objects: Sequence[Objects], **options: Any
) -> DetectionScores:
    """COCO's scores of the detections with these masks `[D, 64, 64]`."""
    mine = [found.canvases == canvas for canvas in range(len(objects))]
    each = [Detections(masks[its], found.classes[its], found.probabilities[its]) for its in mine]
    return detection_scores(each, objects, areas=AREAS, **options)


def pointed(found: Found, maps: Tensor, drawn: Drawn) -> Estimate:
    """How often the highest token reaches into a garment of the detected class that the detection's
    box overlaps most, of the detections that have one.
    """
    same = torch.from_numpy(drawn.classes)[found.canvases] == found.classes[:, None]
    boxes = torch.from_numpy(drawn.boxes)[found.canvases].float()
    shown = torch.stack([filled(its) for its in boxes])
    overlap = (shown & filled(found.boxes)[:, None]).sum((2, 3)) * same
    covered, slots = overlap.max(1)
    real = covered > 0
    right = shown[torch.arange(len(slots)), slots][real]
    hits = pointing(maps[real], touched(right, SIDE))
    return estimate(hits, groups=found.canvases[real].tolist())


def every_method(model: Callable[..., Any]) -> Methods:
    """All methods, the control, and broken variants of ours."""
    return of_detr(model, (SIDE, SIDE)) | broken_detr(model, (SIDE, SIDE))


def experiment(
    data: Path = DEBIAN_FOLDER, samples: int = SAMPLES, names: Collection[str] | None = None
) -> Table:
    """The table, of the first `samples` canvases of the test split; of all methods, or these."""
    detector = load_detector("garments-detr")
    drawn = draw(load_split("test", data), SEED, 0, samples)
    pictures, objects = inputs(drawn), truth(drawn)
    found = detected(detector, pictures)
    rows = {}
    with timed(f"DETR, {samples} canvases") as taken:
        for name, method in some(every_method(detector.logits), names).items():
            with timed(f"  {name}"):
                maps = attributions(method, pictures, found)
                masks = otsu_masks(maps, (demo.SIZE, demo.SIZE))
                figures = vars(scored(found, masks, objects))
                figures["pointing"] = pointed(found, maps, drawn)
            rows[name] = {column.key: percent(figures[column.key]) for column in COLUMNS}
    of_boxes = scored(found, filled(found.boxes), boxed(drawn), thresholds=[0.5])
    as_masks = scored(found, filled(found.boxes), objects)
    settings = {
        "seed": SEED,
        "detections": len(found.queries),
        "AP50 of the boxes": f"{100 * of_boxes.AP.value:.1f}",
        "AP of the boxes as masks": f"{100 * as_masks.AP.value:.1f}",
        "small up to 16² pixels": "large from 20²",
        "bootstrap": "200 resamples of canvases, of pointing 2000, 95 %",
    }
    return Table(
        "detr", "DETR, localisation: are the maps masks of the detections?", _ABOUT, COLUMNS, rows,
        samples, settings, taken[0], versions("pycocotools"),
    )  # fmt: skip


_ABOUT = """The shipped DETR, on canvases of two to four garments from the test split.
Detections are queries that give a class a probability above one half. We explain the logit of
that class at that query. Each map, at the resolution of the model's 16 × 16 tokens, is
binarised with Otsu's threshold and resized; the ground truth is the pixels of the garment. *AP*
and *AR* are COCO's metrics, averaged over IoU thresholds of 0.2 to 0.95 as in the paper, for
all garments and by size. *Pointing*: how often the highest token overlaps the box of the
garment. All values are in percent. The model was trained on boxes alone. All methods explain
the same detections, so only their masks differ. The settings below give the values of the boxes
themselves, and of filled boxes as masks."""


def main(data: Path = DEBIAN_FOLDER, samples: int = SAMPLES, threads: int = 1) -> None:
    """Make the table and store it."""
    torch.set_num_threads(threads)
    print(experiment(data, samples).store())


if __name__ == "__main__":
    typer.run(main)
