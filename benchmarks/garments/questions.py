"""Questions about garments on a canvas, with their answers and with what decides them.

Used by `train_lxmert.py` and `train_visualbert.py` (training split) and by the tables of
`benchmarks/evidence` (test split).
A question is a pure function of the split, a seed and its own index, so that any can be asked again
alone.

A canvas here is a lattice of 3 × 3 places, four to eight of which hold a garment; a region is a
garment's 28 × 28 pixels with its box. Three kinds are asked, equally often:

- relation: "what is left of the bag ?" The bag is the only one, and something is beside it. The bag
  and what is beside it decide, and so do the words "left" and "bag".
- place: "which garment is in the upper left ?" That garment decides, and the words of its place.
- existence: "do you see a boot ?" Where there is one (it is alone of its class), it decides;
  where there is none, no single region does. The word "boot" decides.

Guessing fails: every garment is equally often the answer of the first two kinds (but never the one
that a relation starts from), and half of the third kind are to be denied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from canvases import SOURCE, Ints, Split, paint
from numpy.typing import NDArray
from torch import Tensor

SIDE = 3
CELL = 32
EXTENT = SIDE * CELL
FEWEST, MOST = 4, 8
"""So many garments are on a canvas, each number equally often."""

KINDS = ("relation", "place", "existence")
GARMENTS = ("top", "trouser", "dress", "sandal", "sneaker", "bag", "boot")
"""The seven classes of the canvases, one word each."""
ANSWERS = (*GARMENTS, "yes", "no")

_RELATIONS = {
    ("left", "of"): (0, -1),
    ("right", "of"): (0, 1),
    ("above",): (-1, 0),
    ("below",): (1, 0),
}
_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "center", "right")
_ASKING = (("what", "is"), ("which", "garment", "is"), ("do", "you", "know", "what", "is"))
_DOUBTING = (("is", "there", "a"), ("do", "you", "see", "a"), ("can", "you", "see", "a"))

PAD, CLS, SEP = "[PAD]", "[CLS]", "[SEP]"
VOCABULARY = (
    PAD,
    CLS,
    SEP,
    *sorted(
        {"?", "of", "in", "the", *GARMENTS, *_ROWS, *_COLUMNS}
        | {word for phrase in (*_RELATIONS, *_ASKING, *_DOUBTING) for word in phrase}
    ),
)
_ID = {word: index for index, word in enumerate(VOCABULARY)}
LONGEST = 16
"""No question has more tokens, [CLS] and [SEP] included."""


@dataclass(frozen=True)
class Question:
    """A question about one canvas.

    `kind` is one of `KINDS`; `words` without [CLS] and [SEP]; `answer` one of `ANSWERS`. Each
    region is a garment of the split (`garments`, indices) with its box (`boxes` [R, 4]: left, top,
    right, bottom in pixels of the canvas). `deciding_words` and `deciding_regions` are places in
    `words` and in `garments`.
    """

    kind: str
    words: tuple[str, ...]
    answer: str
    garments: Ints
    boxes: Ints
    deciding_words: tuple[int, ...]
    deciding_regions: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Questions as LXMERT takes them, padded: `input_ids` and `attention_mask` [B, N],
    `visual_feats` [B, R, 784] in 0 … 1, `visual_pos` [B, R, 4] in 0 … 1, `visual_attention_mask`
    [B, R], `answers` [B] (index into `ANSWERS`).
    """

    input_ids: Tensor
    attention_mask: Tensor
    visual_feats: Tensor
    visual_pos: Tensor
    visual_attention_mask: Tensor
    answers: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """All but the answers, by the names of the model's parameters."""
        return {name: value for name, value in vars(self).items() if name != "answers"}


def ask(split: Split, seed: int, start: int, count: int) -> list[Question]:
    """The questions `start` to `start + count` of `seed`."""
    by_class = [np.flatnonzero(split.classes == kind) for kind in range(len(GARMENTS))]
    return [_one(by_class, np.random.default_rng([seed, start + index])) for index in range(count)]


def collate(questions: Sequence[Question], split: Split) -> Batch:
    """The questions as one padded batch."""
    longest = max(len(question.words) for question in questions) + 2
    most = max(len(question.garments) for question in questions)
    ids = np.full((len(questions), longest), _ID[PAD])
    features = np.zeros((len(questions), most, SOURCE * SOURCE), np.float32)
    boxes = np.zeros((len(questions), most, 4), np.float32)
    present = np.zeros((len(questions), most), np.float32)
    for row, question in enumerate(questions):
        words = (CLS, *question.words, SEP)
        ids[row, : len(words)] = [_ID[word] for word in words]
        regions = len(question.garments)
        features[row, :regions] = split.images[question.garments].reshape(regions, -1) / 255
        boxes[row, :regions] = question.boxes / EXTENT
        present[row, :regions] = 1
    tokens = torch.from_numpy(ids)
    return Batch(
        tokens,
        (tokens != _ID[PAD]).float(),
        torch.from_numpy(features),
        torch.from_numpy(boxes),
        torch.from_numpy(present),
        torch.tensor([ANSWERS.index(question.answer) for question in questions]),
    )


def picture(question: Question, split: Split) -> NDArray[np.uint8]:
    """The canvas that the question is about, `[96, 96, 3]`, each garment in a tint of its own."""
    cloth = np.zeros((1, len(question.garments), EXTENT, EXTENT), np.float32)
    for place, (garment, box) in enumerate(zip(question.garments, question.boxes, strict=True)):
        left, top, right, bottom = box
        cloth[0, place, top:bottom, left:right] = split.images[garment] / 255
    painted: NDArray[np.uint8] = paint(cloth, np.arange(len(question.garments))[None])[0]
    return painted


def _one(by_class: list[Ints], dice: np.random.Generator) -> Question:
    kind = KINDS[dice.integers(len(KINDS))]
    amount = int(dice.integers(FEWEST, MOST + 1))
    if kind == "relation":
        words, held, deciding, answer, alone = _relation(dice)
    elif kind == "place":
        words, held, deciding, answer, alone = _place(dice)
    else:
        words, held, deciding, answer, alone = _existence(dice)
    others = [garment for garment in range(len(GARMENTS)) if garment != alone]
    free = dice.permutation([cell for cell in range(SIDE * SIDE) if cell not in held])
    cells = held | {int(cell): int(dice.choice(others)) for cell in free[: amount - len(held)]}
    # The order of the regions says nothing.
    order = [int(cell) for cell in dice.permutation(list(cells))]
    corners = np.array([divmod(cell, SIDE)[::-1] for cell in order]) * CELL
    corners += dice.integers(0, CELL - SOURCE + 1, corners.shape)
    return Question(
        kind,
        (*words, "?"),
        answer,
        np.array([dice.choice(by_class[cells[cell]]) for cell in order]),
        np.concatenate([corners, corners + SOURCE], 1),
        tuple(place for place, word in enumerate(words) if word in deciding),
        tuple(place for place, cell in enumerate(order) if cell in held and answer != "no"),
    )


_Asked = tuple[tuple[str, ...], dict[int, int], set[str], str, int | None]
"""Words; cells that must be held, with their garments; deciding words; answer; the garment that
no other cell may hold."""


def _relation(dice: np.random.Generator) -> _Asked:
    relation = list(_RELATIONS)[dice.integers(len(_RELATIONS))]
    down, right = _RELATIONS[relation]
    anchor, answer = (int(garment) for garment in dice.permutation(len(GARMENTS))[:2])
    row = int(dice.choice([r for r in range(SIDE) if 0 <= r + down < SIDE]))
    column = int(dice.choice([c for c in range(SIDE) if 0 <= c + right < SIDE]))
    held = {row * SIDE + column: anchor, (row + down) * SIDE + column + right: answer}
    words = (*_opening(_ASKING, dice), *relation, "the", GARMENTS[anchor])
    return words, held, {relation[0], GARMENTS[anchor]}, GARMENTS[answer], anchor


def _place(dice: np.random.Generator) -> _Asked:
    cell, answer = int(dice.integers(SIDE * SIDE)), int(dice.integers(len(GARMENTS)))
    row, column = divmod(cell, SIDE)
    place = _ROWS[row], _COLUMNS[column]
    words = (*_opening(_ASKING, dice), "in", "the", *place)
    return words, {cell: answer}, set(place), GARMENTS[answer], None


def _existence(dice: np.random.Generator) -> _Asked:
    garment, there = int(dice.integers(len(GARMENTS))), bool(dice.integers(2))
    words = (*_opening(_DOUBTING, dice), GARMENTS[garment])
    held = {int(dice.integers(SIDE * SIDE)): garment} if there else {}
    return words, held, {GARMENTS[garment]}, "yes" if there else "no", garment


def _opening(phrases: Sequence[tuple[str, ...]], dice: np.random.Generator) -> tuple[str, ...]:
    return phrases[dice.integers(len(phrases))]
