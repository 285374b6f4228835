"""Evidence on visual question answering: what `lxmert.py` and `visualbert.py` have in common.

Two tables. Does the model need the words and regions that an explanation ranks first: the paper's
perturbation tests. Does it rank those first that are known to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captum.attr import Attribution
from garments import (
    ANSWERS,
    GARMENTS,
    KINDS,
    Batch,
    Question,
    Split,
    ask,
    collate,
    load_split,
)
from methods import Methods
from tables import Column, Found, Points, Table, percent, points, through, versions
from torch import Tensor

from captum_generic_attn.comparison import run
from captum_generic_attn.metrics import (
    TOKENS,
    Estimate,
    Tokens,
    estimate,
    perturbation,
    pointing,
    soft_accuracy,
)

SEED = 2021
"""Of the questions, all about garments of the test split."""
SAMPLES = 1500
CHUNK = 100
NEEDED = (
    Column("image_positive", "image, positive", "less"),
    Column("image_negative", "image, negative", "more"),
    Column("text_positive", "text, positive", "less"),
    Column("text_negative", "text, negative", "more"),
)
DECIDING = (
    Column("region_relation", "region, relation", "more"),
    Column("answer_relation", "region, relation (answer only)", "more"),
    Column("region_place", "region, place", "more"),
    Column("region_existence", "region, existence", "more"),
    Column("word_relation", "word, relation", "more"),
    Column("word_place", "word, place", "more"),
    Column("word_existence", "word, existence", "more"),
)


@dataclass(frozen=True)
class Answerer:
    """A model that answers questions.

    `name` and `title` are those of its tables. `model` is what is explained; `scores` takes the
    same and gives those of the answers, `[B, A]`, also where no region is left. `inputs` makes of a
    batch of questions what both take: ids, regions, mask of the ids, and more. `of_regions` says
    which of these run along the regions, the last of them their mask. The last `kept` tokens of a
    question are never dropped (nor is the first). `fractions` of the regions are dropped in turn.
    """

    name: str
    title: str
    model: Callable[..., Any]
    scores: Callable[..., Tensor]
    inputs: Callable[[Batch], tuple[Tensor, ...]]
    of_regions: tuple[int, ...]
    kept: int
    fractions: Sequence[float]


@dataclass(frozen=True)
class Asked:
    """Questions, the model's inputs, its answers `[B]` and which of them are right; which words
    `[B, N]` and regions `[B, R]` decide, and which region is the answer where a garment is; which
    tokens are never dropped (`kept`).
    """

    questions: list[Question]
    inputs: tuple[Tensor, ...]
    answers: Tensor
    right: Tensor
    words: Tensor
    regions: Tensor
    answering: Tensor
    kept: Tensor


@torch.no_grad()
def asked(answerer: Answerer, questions: list[Question], split: Split) -> Asked:
    """What the model answers to questions."""
    batch: Batch = collate(questions, split)
    inputs = answerer.inputs(batch)
    answers = torch.cat(
        [
            answerer.scores(*chunk).argmax(1)
            for chunk in zip(*(tensor.split(CHUNK) for tensor in inputs), strict=True)
        ]
    )
    words = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    regions = torch.zeros(batch.visual_attention_mask.shape, dtype=torch.bool)
    answering = regions.clone()
    for row, question in enumerate(questions):
        words[row, [1 + place for place in question.deciding_words]] = True  # behind [CLS]
        regions[row, list(question.deciding_regions)] = True
        answering[row, : len(question.garments)] = torch.tensor(
            [GARMENTS[kind] == question.answer for kind in split.classes[question.garments]]
        )
    mask = batch.attention_mask.bool()
    places, lengths = torch.arange(mask.shape[1]), mask.sum(1, keepdim=True)
    return Asked(
        questions, inputs, answers, answers == batch.answers, words, regions, answering & regions,
        mask & ((places == 0) | (places >= lengths - answerer.kept)),
    )  # fmt: skip


def attributions(method: Attribution, data: Asked) -> tuple[Tensor, Tensor]:
    """Of the words `[B, N]` and the regions `[B, R]`, of the model's own answers."""
    text, image = [], []
    parts = zip(*(t.split(CHUNK) for t in (*data.inputs, data.answers)), strict=True)
    for chunk, (ids, features, *rest, answers) in enumerate(parts):
        given = {"additional_forward_args": tuple(rest), "return_input_shape": False}
        found = run(method, (ids, features), answers, given, SEED + chunk)
        text.append(found[0])
        image.append(found[1])
    return torch.cat(text), torch.cat(image)


def removals(answerer: Answerer, data: Asked) -> dict[str, Tokens]:
    """Words are dropped with their mask, regions with all that belongs to them."""
    of_regions = answerer.of_regions
    return {
        "image": Tokens(data.inputs, dropped=of_regions, present=data.inputs[of_regions[-1]]),
        "text": Tokens(data.inputs, dropped=(0, 2), present=data.inputs[2], protected=data.kept),
    }


def needed(
    answerer: Answerer, data: Asked, text: Tensor, image: Tensor
) -> tuple[dict[str, Estimate], dict[str, Points]]:
    """Figures of the first table for one method, and its curves."""
    answers = torch.tensor([ANSWERS.index(question.answer) for question in data.questions])
    credit = torch.nn.functional.one_hot(answers, len(ANSWERS)).double()
    found, curves = {}, {}
    given = {"image": (image, answerer.fractions), "text": (text, TOKENS)}
    for name, removal in removals(answerer, data).items():
        relevance, fractions = given[name]
        for test, first in (("positive", True), ("negative", False)):
            curve = perturbation(
                answerer.scores, removal, relevance, soft_accuracy(credit), fractions=fractions,
                most_relevant_first=first, batch_size=250,
            )  # fmt: skip
            found[f"{name}_{test}"] = curve.auc()
            curves[f"{name}_{test}"] = points(curve)
    return found, curves


def deciding(answerer: Answerer, data: Asked, text: Tensor, image: Tensor) -> dict[str, Estimate]:
    """Figures of the second table for one method, in percent, of questions answered rightly."""
    words = among(text, data.inputs[2].bool() & ~data.kept)
    regions = among(image, data.inputs[answerer.of_regions[-1]].bool())
    found = {}
    for kind in KINDS:
        mine = torch.tensor([question.kind == kind for question in data.questions]) & data.right
        known = mine & data.regions.any(1)  # no region denies that something is there
        found[f"region_{kind}"] = percent(estimate(pointing(regions[known], data.regions[known])))
        found[f"word_{kind}"] = percent(estimate(pointing(words[mine], data.words[mine])))
        if kind == "relation":
            answering = pointing(regions[mine], data.answering[mine])
            found["answer_relation"] = percent(estimate(answering))
    return found


def among(relevance: Tensor, candidates: Tensor) -> Tensor:
    """Relevance `[B, N]` in which what is no candidate lies below all that is."""
    relevance = relevance.double()
    below = relevance.amin(1, keepdim=True) - 1
    return torch.where(candidates, relevance, below)


def experiment(
    answerer: Answerer, methods: Methods, data: Path, samples: int, about: tuple[str, str]
) -> tuple[Table, Table]:
    """Both tables, of the first `samples` questions; `about` says in Markdown what each shows."""
    split = load_split("test", data)
    seen = asked(answerer, ask(split, SEED, 0, samples), split)

    def figures(method: Attribution) -> Found:
        text, image = attributions(method, seen)
        return *needed(answerer, seen, text, image), deciding(answerer, seen, text, image)

    first, curves, second, seconds = through(
        f"{answerer.title}, {samples} questions", methods, figures
    )
    settings = {
        "seed": SEED,
        "accuracy": f"{100 * seen.right.double().mean():.1f} %",
        "bootstrap": "2000 resamples, 95 %",
    }
    shared = {"settings": settings, "seconds": seconds, "versions": versions()}
    name, title = answerer.name, answerer.title
    return (
        Table(name, f"{title}, faithfulness: does the model need what is ranked first?", about[0],
              NEEDED, first, samples, curves=curves, **shared),
        Table(f"{name}_deciding", f"{title}, localisation: is the deciding evidence ranked first?",
              about[1], DECIDING, second, int(seen.right.sum()), **shared),
    )  # fmt: skip
