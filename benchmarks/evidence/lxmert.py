"""Evidence on visual question answering: a small LXMERT on questions about garments.

Two tables. Does the model need the words and regions that an explanation ranks first: the paper's
perturbation tests. Does it rank those first that are known to decide. Run by `make evidence`;
alone, `python benchmarks/evidence/lxmert.py --data DIR`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from captum.attr import Attribution
from garments import (
    ANSWERS,
    DEBIAN_FOLDER,
    GARMENTS,
    KINDS,
    Batch,
    Question,
    Split,
    ask,
    collate,
    load_split,
)
from methods import Methods, broken_lxmert, of_lxmert
from safetensors import safe_open
from tables import Column, Found, Points, Table, percent, points, through, versions
from torch import Tensor
from transformers import LxmertConfig, LxmertForQuestionAnswering

from captum_generic_attn import hf
from captum_generic_attn.compare import run
from captum_generic_attn.metrics import (
    TOKENS,
    Estimate,
    Tokens,
    estimate,
    perturbation,
    pointing,
    soft_accuracy,
)

WEIGHTS = Path(__file__).resolve().parents[1] / "garments" / "lxmert.safetensors"
SEED = 2021
"""Of the questions, all about garments of the test split."""
SAMPLES = 1500
CHUNK = 100
NAMES = "input_ids", "visual_feats", "attention_mask", "visual_pos", "visual_attention_mask"
"""The order of the model's arguments: what is explained, then the rest."""

NEEDED = (
    Column("image_positive", "image, positive", "less"),
    Column("image_negative", "image, negative", "more"),
    Column("text_positive", "text, positive", "less"),
    Column("text_negative", "text, negative", "more"),
)
DECIDING = (
    Column("region_relation", "region, relation", "more"),
    Column("answer_relation", "its answer", "more"),
    Column("region_place", "region, place", "more"),
    Column("region_existence", "region, existence", "more"),
    Column("word_relation", "word, relation", "more"),
    Column("word_place", "word, place", "more"),
    Column("word_existence", "word, existence", "more"),
)


@dataclass(frozen=True)
class Asked:
    """Questions, the model's inputs in the order of `NAMES`, its answers `[B]` and which of them
    are right; which words `[B, N]` and regions `[B, R]` decide, and which region is the
    answer where a garment is.
    """

    questions: list[Question]
    inputs: tuple[Tensor, ...]
    answers: Tensor
    right: Tensor
    words: Tensor
    regions: Tensor
    answering: Tensor

    @property
    def special(self) -> Tensor:
        """`[B, N]`: [CLS] and [SEP]."""
        mask = self.inputs[2].bool()
        places = torch.arange(mask.shape[1])
        return mask & ((places == 0) | (places == mask.sum(1, keepdim=True) - 1))


def load_model() -> Callable[..., Any]:
    """The trained LXMERT as a function of tensors in the order of `NAMES`."""
    with safe_open(WEIGHTS, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    model = LxmertForQuestionAnswering(LxmertConfig(**config))
    model.load_state_dict(state)
    return hf.Keywords(model.eval(), NAMES)


@torch.no_grad()
def asked(model: Callable[..., Any], questions: list[Question], split: Split) -> Asked:
    """What the model answers to questions."""
    batch: Batch = collate(questions, split)
    given = batch.inputs()
    inputs = tuple(given[name] for name in NAMES)
    answers = torch.cat(
        [
            model(*chunk).question_answering_score.argmax(1)
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
    return Asked(
        questions, inputs, answers, answers == batch.answers, words, regions, answering & regions
    )


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


def removals(data: Asked) -> dict[str, Tokens]:
    """Words are dropped with their mask, [CLS] and [SEP] never; regions with box and mask."""
    mask, present = data.inputs[2], data.inputs[4]
    return {
        "image": Tokens(data.inputs, dropped=(1, 3, 4), present=present),
        "text": Tokens(data.inputs, dropped=(0, 2), present=mask, protected=data.special),
    }


def without_regions(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model, for inputs that may have lost all of their regions.

    Hugging Face's LXMERT cannot reshape a sequence of no regions. It gets one of zeros, in a box
    without extent.
    """

    def forward(*inputs: Tensor) -> Any:
        ids, features, mask, boxes, present = inputs
        if features.shape[1] == 0:
            features, boxes, present = (
                tensor.new_zeros(len(ids), 1, *tensor.shape[2:])
                for tensor in (features, boxes, present)
            )
        return model(ids, features, mask, boxes, present)

    return forward


def needed(
    model: Callable[..., Any], data: Asked, text: Tensor, image: Tensor
) -> tuple[dict[str, Estimate], dict[str, Points]]:
    """Figures of the first table for one method, and its curves."""
    answers = torch.tensor([ANSWERS.index(question.answer) for question in data.questions])
    credit = torch.nn.functional.one_hot(answers, len(ANSWERS)).double()
    found, curves = {}, {}
    for name, removal in removals(data).items():
        for test, first in (("positive", True), ("negative", False)):
            curve = perturbation(
                without_regions(model), removal, text if name == "text" else image,
                soft_accuracy(credit), fractions=TOKENS, most_relevant_first=first, batch_size=250,
            )  # fmt: skip
            found[f"{name}_{test}"] = curve.auc()
            curves[f"{name}_{test}"] = points(curve)
    return found, curves


def deciding(data: Asked, text: Tensor, image: Tensor) -> dict[str, Estimate]:
    """Figures of the second table for one method, in percent, of questions answered rightly."""
    words = _candidates(text, data.inputs[2].bool() & ~data.special)
    regions = _candidates(image, data.inputs[4].bool())
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


def _candidates(relevance: Tensor, candidates: Tensor) -> Tensor:
    """What is no candidate lies below all that is."""
    relevance = relevance.double()
    below = relevance.amin(1, keepdim=True) - 1
    return torch.where(candidates, relevance, below)


def every_method(model: Callable[..., Any]) -> Methods:
    """All methods, the control, and broken variants of ours."""
    return of_lxmert(model) | broken_lxmert(model)


def experiment(
    data: Path = DEBIAN_FOLDER, samples: int = SAMPLES, methods: Methods | None = None
) -> tuple[Table, Table]:
    """Both tables, of the first `samples` questions; of all methods, or these."""
    split, model = load_split("test", data), load_model()
    seen = asked(model, ask(split, SEED, 0, samples), split)

    def figures(method: Attribution) -> Found:
        text, image = attributions(method, seen)
        return *needed(model, seen, text, image), deciding(seen, text, image)

    first, curves, second, seconds = through(
        f"LXMERT, {samples} questions", methods or every_method(model), figures
    )
    settings = {
        "seed": SEED,
        "accuracy": f"{100 * seen.right.double().mean():.1f} %",
        "bootstrap": "2000 resamples, 95 %",
    }
    shared = {"settings": settings, "seconds": seconds, "versions": versions()}
    return (
        Table("lxmert", "LXMERT: does the model need what is ranked first?", _NEEDED, NEEDED,
              first, samples, curves=curves, **shared),
        Table("lxmert_deciding", "LXMERT: is what decides ranked first?", _DECIDING, DECIDING,
              second, int(seen.right.sum()), **shared),
    )  # fmt: skip


_NEEDED = """A small LXMERT answers questions about four to eight garments. Explained is its own
answer. Words or regions are dropped, a growing share of them (0 to 1, the authors' steps), the most
(*positive*) or the least relevant (*negative*) first; [CLS] and [SEP] stay. The area under the
accuracy of the new answers. (Where no region is left, Hugging Face's LXMERT gets one of zeros: it
cannot run without.)"""

_DECIDING = """The same explanations, of the questions that are answered rightly: how often one of
the regions, or words, that decide is ranked first, in percent. What decides is known from how a
question was made: of "what is left of the bag ?" the bag and what is left of it (*its answer*: the
latter alone), and the words "left" and "bag"; of "which garment is in the upper left ?" that
garment, and the words of the place; of "do you see a boot ?" the boot and its word."""


def main(data: Path = DEBIAN_FOLDER, samples: int = SAMPLES, threads: int = 1) -> None:
    """Make both tables and store them."""
    torch.set_num_threads(threads)
    for table in experiment(data, samples):
        print(table.store())


if __name__ == "__main__":
    typer.run(main)
