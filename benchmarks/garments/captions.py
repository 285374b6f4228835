"""Captions of canvases, true ones and ones that are wrong in a single word or place.

Used by `train_clip.py` (training split) and by CLIP's table of `benchmarks/evidence` (test split).
A caption is a pure function of the canvas, a seed and its own index.

It names one garment of the canvas or several, each class once, in any order: "a boot and a bag in
the upper left". Where a garment lies is said of most that lie clearly in one quarter of the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from canvases import Drawn
from numpy.typing import NDArray
from questions import GARMENTS
from torch import Tensor

from captum_generic_attn.demo import SIZE

PLACES = ("upper left", "upper right", "lower left", "lower right")
CLEARLY = 5
"""A garment lies clearly in a quarter if its centre is at least so many pixels away from both
midlines of the canvas; nearer to them, either side may be meant."""
_TOLD = 0.75


@dataclass(frozen=True)
class Mention:
    """One garment of a caption: `garment` (index into `GARMENTS`) and `place` (index into `PLACES`,
    or None where none is told).
    """

    garment: int
    place: int | None

    def words(self) -> tuple[str, ...]:
        """As the caption has it."""
        where = () if self.place is None else ("in", "the", *PLACES[self.place].split())
        return "a", GARMENTS[self.garment], *where


@dataclass(frozen=True)
class Caption:
    """What a caption says, in order."""

    mentions: tuple[Mention, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """Without [START] and [END]."""
        first, *others = (mention.words() for mention in self.mentions)
        return sum((("and", *words) for words in others), first)

    def __str__(self) -> str:
        return " ".join(self.words)


EVERY_MENTION = tuple(
    Mention(garment, place)
    for garment in range(len(GARMENTS))
    for place in (*range(len(PLACES)), None)
)
"""Each class in each place and, last, anywhere: the order in which `certain` and `possible` run."""


def certain(drawn: Drawn) -> NDArray[np.bool_]:
    """Which mentions are true: bool [B, 7, 5], each class in each of the `PLACES` and, last,
    anywhere.
    """
    return _places_of(drawn, CLEARLY)


def possible(drawn: Drawn) -> NDArray[np.bool_]:
    """Which mentions are not false, likewise: a garment near a midline may be on either side."""
    return _places_of(drawn, -CLEARLY)


def describe(drawn: Drawn, seed: int, start: int) -> list[Caption]:
    """A true caption of each canvas; `start` is the index of the first canvas."""
    return [
        _describe(known, _dice(seed, start + row, _DESCRIBING))
        for row, known in enumerate(certain(drawn))
    ]


def distort(
    captions: Sequence[Caption], drawn: Drawn, seed: int, start: int, amount: int | None = None
) -> list[list[Caption]]:
    """For each canvas up to `amount` captions that are false of it and differ from its own in one
    garment or one place, all different and in random order.
    """
    found = []
    for row, (caption, holds) in enumerate(zip(captions, possible(drawn), strict=True)):
        wrong = _distortions(caption, holds)
        order = _dice(seed, start + row, _DISTORTING).permutation(len(wrong))
        found.append([wrong[place] for place in order[:amount]])
    return found


def meant(drawn: Drawn, row: int, mention: Mention) -> NDArray[np.bool_]:
    """Which garments of a canvas a mention may mean: bool [4]."""
    where = _where(drawn.part(row, row + 1), -CLEARLY)[0, :, _column(mention.place)]
    found: NDArray[np.bool_] = (drawn.classes[row] == mention.garment) & where
    return found


def true_of(captions: Sequence[Caption], drawn: Drawn) -> Tensor:
    """Whether each canvas may be what each caption means: bool [canvases, captions]."""
    holds = possible(drawn)
    return torch.from_numpy(
        np.stack(
            [
                np.all([holds[:, m.garment, _column(m.place)] for m in caption.mentions], 0)
                for caption in captions
            ],
            1,
        )
    )


# Not 0: NumPy takes trailing zeros for nothing, so that would be the numbers that drew the canvas.
_DESCRIBING, _DISTORTING = 1, 2


def _dice(seed: int, index: int, use: int) -> np.random.Generator:
    return np.random.default_rng([seed, index, use])


def _column(place: int | None) -> int:
    return len(PLACES) if place is None else place


def _places_of(drawn: Drawn, margin: int) -> NDArray[np.bool_]:
    """Each class in each place, [B, 7, 5], by garments whose centre lies beyond the midlines by
    `margin`.
    """
    is_class = drawn.classes[..., None] == np.arange(len(GARMENTS))
    holds: NDArray[np.bool_] = (is_class[..., None] & _where(drawn, margin)[:, :, None]).any(1)
    return holds


def _where(drawn: Drawn, margin: int) -> NDArray[np.bool_]:
    """In which of the `PLACES` each garment lies, [B, 4, 5]; the last stands for anywhere."""
    centres = (drawn.boxes[..., :2] + drawn.boxes[..., 2:] - SIZE) / 2
    x, y = centres[..., 0], centres[..., 1]
    above, below, left, right = y <= -margin, y >= margin, x <= -margin, x >= margin
    corners = above & left, above & right, below & left, below & right
    return np.stack([*corners, np.ones(x.shape, bool)], -1)


def _describe(known: NDArray[np.bool_], dice: np.random.Generator) -> Caption:
    present = dice.permutation(np.flatnonzero(known[:, -1]))
    mentions = []
    for garment in present[: dice.integers(1, len(present) + 1)]:
        places = np.flatnonzero(known[garment, :-1])
        told = len(places) > 0 and dice.random() < _TOLD
        mentions.append(Mention(int(garment), int(dice.choice(places)) if told else None))
    return Caption(tuple(mentions))


def _distortions(caption: Caption, holds: NDArray[np.bool_]) -> list[Caption]:
    named = {mention.garment for mention in caption.mentions}
    found = []
    for place, mention in enumerate(caption.mentions):
        others = [
            Mention(garment, mention.place)
            for garment in range(len(GARMENTS))
            if garment not in named
        ]
        if mention.place is not None:
            others += [
                Mention(mention.garment, where)
                for where in range(len(PLACES))
                if where != mention.place
            ]
        found += [
            Caption((*caption.mentions[:place], other, *caption.mentions[place + 1 :]))
            for other in others
            if not holds[other.garment, _column(other.place)]
        ]
    return found
