"""The figures of `docs/evidence.md`: perturbation curves, and explained examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import detr
import numpy as np
import torch
from garments import (
    EXTENT,
    GARMENTS,
    KINDS,
    Drawn,
    Split,
    ask,
    draw,
    inputs,
    load_split,
    picture,
)
from lxmert import answerer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from methods import OURS
from numpy.typing import NDArray
from tables import RANDOM, Table
from vqa import SEED, asked, attributions

from captum_generic_attn import GenericAttention, demo, hf
from captum_generic_attn.models import load_detector
from captum_generic_attn.visualization import detections_figure, pairs_figure
from captum_generic_attn.visualization.overlays import checked_image
from captum_generic_attn.visualization.regions import draw_regions
from captum_generic_attn.visualization.words import colours_of

SHOWN = (
    OURS,
    "Transformer attribution",
    "Attention rollout",
    "Raw attention",
    "Integrated gradients",
    "Kernel SHAP",
    RANDOM,
)
# Paul Tol's "bright": told apart by colour-blind eyes as well; the control is grey.
COLOURS = ("#AA3377", "#4477AA", "#228833", "#CCBB44", "#66CCEE", "#EE6677", "#888888")
ASKED = (0, 1, 2)
"""Of each kind, which of the questions with a deciding region are drawn."""


def curves(table: Table, columns: Sequence[tuple[str, str]], unit: str, watched: str) -> Figure:
    """Perturbation curves of the methods in `SHOWN`, one panel for each column."""
    figure = Figure(figsize=(3.3 * len(columns), 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(columns), sharey=True))
    for axes, (key, title) in zip(panels, columns, strict=True):
        for name, colour in zip(SHOWN, COLOURS, strict=True):
            if name in table.curves:
                xs, ys = table.curves[name][key]
                style = {"color": colour, "linestyle": "--" if name == RANDOM else "-"}
                axes.plot(xs, ys, **style, linewidth=2.2 if name == OURS else 1.3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"share of {unit} removed", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 1.02)
    panels[0].set_ylabel(watched, fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  fontsize=8, frameon=False)  # fmt: skip
    return figure


def questions(split: Split) -> Figure:
    """Explained questions, each kind in a row: regions and words in the colours of relevance."""
    lxmert = answerer()
    pool = ask(split, SEED, 0, 100)
    chosen = [
        [q for q in pool if q.kind == kind and q.deciding_regions][place]
        for kind in KINDS
        for place in ASKED
    ]
    seen = asked(lxmert, chosen, split)
    text, image = attributions(GenericAttention(lxmert.model), seen)
    figure = Figure(figsize=(10.5, 11.4), layout="constrained")
    panels = figure.subplots(len(KINDS), len(ASKED))
    for axes, question, words, regions, right in zip(
        panels.flat, chosen, text, image, seen.right.tolist(), strict=True
    ):
        boxes = question.boxes.astype(np.float64)
        shares = _shares(regions[: len(boxes)])
        draw_regions(axes, checked_image(picture(question, split)), boxes, shares, 1.0)
        for left, top, right, bottom in boxes[list(question.deciding_regions)].tolist():
            corner = left - 0.5, top - 0.5  # Matplotlib's pixels have whole numbers in their middle
            axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, linewidth=1.6))
        axes.set(xlim=(-1, EXTENT + 1), ylim=(EXTENT + 9, -14))
        axes.set_axis_off()
        _words(axes, question.words, _shares(words[1 : 1 + len(question.words)]))
        axes.text(
            EXTENT / 2, EXTENT + 6, f"{question.answer} ({'right' if right else 'wrong'})",
            ha="center", va="center", fontsize=10,
        )  # fmt: skip
    return figure


def _shares(relevance: torch.Tensor) -> NDArray[np.float64]:
    values: NDArray[np.float64] = relevance.double().numpy()
    return values / max(float(values.max()), 1e-12)


def _words(axes: Axes, words: Sequence[str], shares: NDArray[np.float64]) -> None:
    """The words in a row, each on the colour of its relevance."""
    lengths = np.array([len(word) + 1.2 for word in words])
    ends = lengths.cumsum() * EXTENT / max(lengths.sum(), 26)
    starts = np.concatenate([[0], ends[:-1]])
    for word, start, end, share in zip(words, starts, ends, shares, strict=True):
        back, ink = colours_of(float(share))
        size = (end - start - 0.6, 8)
        axes.add_patch(Rectangle((start, -11), *size, facecolor=tuple(back.tolist())))
        style = {"ha": "center", "va": "center", "fontsize": 8}
        axes.text(start + size[0] / 2, -7, word, color=ink, **style)


def first_full_canvas(split: Split) -> tuple[Drawn, int]:
    """The first canvas of four garments: some canvases, and which of them it is."""
    drawn = draw(split, SEED, 0, 50)
    return drawn, int((drawn.classes >= 0).all(1).argmax())


def detections(split: Split) -> Figure:
    """The first canvas of four garments: each detection's box, class and map."""
    drawn, canvas = first_full_canvas(split)
    detector, pictures = load_detector("garments-detr"), inputs(drawn.part(canvas, canvas + 1))
    found = detr.detected(detector, pictures)
    pairs = zip(found.queries.tolist(), found.classes.tolist(), strict=True)
    maps = GenericAttention(detector.model).attribute_targets(pictures, list(pairs))[:, 0, 0]
    labels = [
        f"{demo.CLASSES[kind]}  {share:.2f}"
        for kind, share in zip(found.classes.tolist(), found.probabilities.tolist(), strict=True)
    ]
    boxes = found.boxes.tolist()
    return detections_figure(drawn.pictures[canvas], boxes, labels, maps.numpy(), title="canvas")


def captions(split: Split) -> Figure:
    """The first canvas of four garments with a caption for each class on it, and one for two."""
    drawn, canvas = first_full_canvas(split)
    names = [GARMENTS[kind] for kind in dict.fromkeys(drawn.classes[canvas].tolist())]
    texts = [f"a {name}" for name in names] + [f"a {names[0]} and a {names[1]}"]
    model, ids = hf.pairs(demo.load_clip()), demo.tokenize(texts)
    pictures = inputs(drawn.part(canvas, canvas + 1)).expand(len(texts), -1, -1, -1)
    heat, words = GenericAttention(model).attribute((pictures, ids))
    with torch.no_grad():
        titles = [f"score {score:.1f}" for score in model(pictures, ids).tolist()]
    told = [
        [[(word, value)] for word, value in zip(text.split(), values[1:].tolist(), strict=False)]
        for text, values in zip(texts, words, strict=True)
    ]
    return pairs_figure(drawn.pictures[canvas], heat[:, 0].numpy(), told, titles, title="canvas")


_QUESTIONED = (
    ("image_positive", "regions, positive"),
    ("image_negative", "regions, negative"),
    ("text_positive", "words, positive"),
    ("text_negative", "words, negative"),
)
DRAWN = {
    "vit": (
        (
            ("positive_black", "positive, black"),
            ("negative_black", "negative, black"),
            ("positive_ground", "positive, ground"),
            ("negative_ground", "negative, ground"),
        ),
        "pixels",
        "canvases whose class is still named",
    ),
    "lxmert": (_QUESTIONED, "tokens", "answers that are right"),
    "visualbert": (_QUESTIONED, "tokens", "answers that are right"),
}
"""Columns of the tables whose curves are drawn, what is removed, and what is watched."""


def draw_all(tables: Mapping[str, Table], data: Path, folder: Path) -> None:
    """Writes the figures of these tables into `folder`."""
    for name, asked_for in DRAWN.items():
        if name in tables:
            curves(tables[name], *asked_for).savefig(folder / f"evidence_{name}.png", dpi=130)
    split = load_split("test", data)
    for name, figure in (
        ("questions", questions),
        ("captions", captions),
        ("detections", detections),
    ):
        figure(split).savefig(folder / f"evidence_{name}.png", dpi=100)
