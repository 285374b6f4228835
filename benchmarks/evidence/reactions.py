"""Evidence on text: a BERT that tells 50 classes of chemical reactions apart.

Does the model need the tokens that an explanation ranks first: the authors' perturbation tests, and
SaCo. Run by `make evidence`; alone, `python benchmarks/evidence/reactions.py`. Model and reactions
are real ones that other projects publish; neither is stored here:

- `pip install --no-deps rxnfp==0.1.0` brings the model (P. Schwaller et al., *Mapping the space of
  chemical reactions using attention-based neural networks*, Nature Machine Intelligence 2021; MIT).
- `pip download --no-deps --no-binary :all: -d ~/.cache/captum-generic-attn drfp==0.3.7` brings the
  reactions, from patents, with the classes and the split that the model was trained with
  (N. Schneider et al., *Development of a Novel Fingerprint for Chemical Reactions*, J. Chem. Inf.
  Model. 2015), in a source distribution of 97 MB (MIT), which is read as it is.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import typer
from captum.attr import Attribution
from methods import OURS, Methods, ablations
from tables import RANDOM, Column, Table, timed, versions
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from captum_generic_attn import (
    AttentionGradCam,
    AttentionRollout,
    GenericAttention,
    GradientAttention,
    Lrp,
    LrpRollout,
    PartialLrp,
    RawAttention,
    TransformerAttribution,
)
from captum_generic_attn.comparison import run
from captum_generic_attn.lrp import RULE_SETS
from captum_generic_attn.metrics import (
    TOKENS,
    Estimate,
    RandomAttribution,
    Tokens,
    accuracy,
    estimate,
    perturbation,
    probability,
    saco,
)

DATA = Path.home() / ".cache" / "captum-generic-attn" / "drfp-0.3.7.tar.gz"
MEMBER = "drfp-0.3.7/data/schneider50k.tsv"
SEED = 2021
"""Of the reactions, all of the test split."""
SAMPLES = 1000
LONGEST = 64
"""Tokens of a reaction, [CLS] and [SEP] among them: a matter of time alone."""
CHUNK = 50
CLASSES = 50

# As the model's authors cut reactions: atoms in brackets, elements, bonds, rings, the arrow.
TOKEN = re.compile(
    r"%\([0-9]{3}\)|\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?"
    r"|>>?|\*|\$|%[0-9]{2}|[0-9]"
)
PAD, UNKNOWN, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"

COLUMNS = (
    Column("positive_accuracy", "positive, accuracy", "less"),
    Column("negative_accuracy", "negative, accuracy", "more"),
    Column("positive_probability", "positive, probability", "less"),
    Column("negative_probability", "negative, probability", "more"),
    Column("saco", "SaCo", "more", 3),
)
Forward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reaction:
    """Precursors and product in SMILES, joined by `>>`; its class by name; the patent it is of."""

    smiles: str
    kind: str
    patent: str


@dataclass(frozen=True)
class Asked:
    """Reactions by rising length, as ids `[B, N]` with `[PAD]` behind and the mask that tells it;
    the class that the model answers `[B]` and the patents they are of.
    """

    ids: Tensor
    mask: Tensor
    answers: Tensor
    patents: tuple[str, ...]

    @property
    def special(self) -> Tensor:
        """`[B, N]`: [CLS] and [SEP]."""
        places = torch.arange(self.ids.shape[1])
        return (places == 0) | (places == self.mask.sum(1, keepdim=True) - 1)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Ids, mask and answers of reactions of like length, with one place of padding or more."""
        for rows in torch.arange(len(self.ids)).split(CHUNK):
            # The authors' models always add a mask; Transformers leaves out one that hides nothing.
            width = int(self.mask[rows].sum(1).max()) + 1
            yield self.ids[rows, :width], self.mask[rows, :width], self.answers[rows]


def load() -> tuple[BertForSequenceClassification, dict[str, int]]:
    """The classifier, in evaluation mode, and its vocabulary.

    Raises:
        FileNotFoundError: if the package that brings it is not installed.
    """
    found = importlib.util.find_spec("rxnfp")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            "rxnfp, which brings the classifier of reactions, is not installed: "
            "pip install --no-deps rxnfp==0.1.0"
        )
    # Found without an import: the package's own needs what only its training needs.
    folder = Path(found.submodule_search_locations[0], "models/transformers/bert_ft_10k_25s")
    config = BertConfig.from_pretrained(folder)
    config.num_labels = CLASSES
    model = BertForSequenceClassification(config)
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    # LRP's rule for masks is about those that are added to the logits of attention.
    model.set_attn_implementation("eager")
    lines = (folder / "vocab.txt").read_text("utf-8").splitlines()
    return model.eval(), {token: number for number, token in enumerate(lines)}


def tokenize(smiles: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Ids of a reaction: `[CLS]`, its tokens, `[SEP]`; a token that the model never saw is `[UNK]`.

    Raises:
        ValueError: if a part of it is no token.
    """
    tokens = TOKEN.findall(smiles)
    if "".join(tokens) != smiles:
        raise ValueError(f"{smiles!r} is no reaction in SMILES: cut up, it is {tokens}")
    unknown = vocabulary[UNKNOWN]
    inside = [vocabulary.get(token, unknown) for token in tokens]
    return [vocabulary[CLS], *inside, vocabulary[SEP]]


def text(ids: Sequence[int], vocabulary: Mapping[str, int]) -> str:
    """The reaction of ids, without what stands round it."""
    tokens = list(vocabulary)
    round_it = {vocabulary[PAD], vocabulary[CLS], vocabulary[SEP]}
    return "".join(tokens[number] for number in ids if number not in round_it)


def read(data: Path = DATA) -> list[Reaction]:
    """The reactions of the test split, each once, without those of the training split.

    Raises:
        FileNotFoundError: if the file is not there.
    """
    if not data.is_file():
        raise FileNotFoundError(
            f"{data}, which brings the reactions, is not there: pip download --no-deps "
            f"--no-binary :all: -d {data.parent} drfp==0.3.7"
        )
    with tarfile.open(data) as archive:
        member = archive.extractfile(MEMBER)
        if member is None:
            raise FileNotFoundError(f"{data} holds no file {MEMBER}")
        rows = list(csv.DictReader(io.TextIOWrapper(member, "utf-8"), delimiter="\t"))
    trained = {row["rxn"] for row in rows if row["split"] == "train"}
    distinct = {
        row["rxn"]: Reaction(row["rxn"], row["rxn_class"], row["source"])
        for row in rows
        if row["split"] == "test" and row["rxn"] not in trained
    }
    return list(distinct.values())


def short(reactions: Sequence[Reaction], vocabulary: Mapping[str, int]) -> list[Reaction]:
    """Those of at most `LONGEST` tokens, in their order."""
    return [each for each in reactions if len(tokenize(each.smiles, vocabulary)) <= LONGEST]


def drawn(
    reactions: Sequence[Reaction], vocabulary: Mapping[str, int], samples: int
) -> list[Reaction]:
    """So many of them by chance, by rising length.

    Raises:
        ValueError: if there are fewer.
    """
    if len(reactions) < samples:
        raise ValueError(f"{samples} reactions are asked for; {len(reactions)} are short enough")
    found = random.Random(SEED).sample(reactions, samples)
    return sorted(found, key=lambda each: (len(tokenize(each.smiles, vocabulary)), each.smiles))


@torch.no_grad()
def asked(forward: Forward, reactions: Sequence[Reaction], vocabulary: Mapping[str, int]) -> Asked:
    """What the model answers to reactions, which stand by rising length."""
    rows = [tokenize(each.smiles, vocabulary) for each in reactions]
    width = max(map(len, rows)) + 1
    ids = torch.full((len(rows), width), vocabulary[PAD])
    for row, numbers in enumerate(rows):
        ids[row, : len(numbers)] = torch.tensor(numbers)
    mask = (ids != vocabulary[PAD]).long()
    patents = tuple(each.patent for each in reactions)
    open_ = Asked(ids, mask, torch.zeros(len(rows), dtype=torch.long), patents)
    answers = [forward(given, seen).argmax(1) for given, seen, _ in open_.chunks()]
    return replace(open_, answers=torch.cat(answers))


def methods(forward: Forward) -> Methods:
    """Ours, the authors' baselines with the options of their BERT, and the control."""
    at_words = {"inert": True, "masks": "added", "divided_copies": False}
    return {
        OURS: GenericAttention(forward),
        **ablations(forward, across=False),
        "Raw attention": RawAttention(forward),
        "Attention rollout": AttentionRollout(forward),
        "Attention Grad-CAM": AttentionGradCam(forward, weights_from="all"),
        "Gradient attention": GradientAttention(forward),
        "Transformer attribution": TransformerAttribution(
            forward, row_normalize=True, own="row_min"
        ),
        "Partial LRP": PartialLrp(forward),
        "LRP rollout": LrpRollout(forward),
        "LRP": Lrp(forward, rules=replace(RULE_SETS["chefer2021_full"], **at_words)),
        "LRP, frozen": Lrp(forward, rules="frozen"),
        RANDOM: RandomAttribution(forward),
    }


def attributions(method: Attribution, data: Asked) -> Tensor:
    """Relevance of all tokens for the model's own answers, `[B, N]`."""
    relevance = torch.zeros(data.ids.shape, dtype=torch.float64)
    first = 0
    for chunk, (ids, mask, answers) in enumerate(data.chunks()):
        found = run(method, ids, answers, {"additional_forward_args": (mask,)}, SEED + chunk)
        relevance[first : first + len(ids), : ids.shape[1]] = found
        first += len(ids)
    return relevance


def remembered(forward: Forward) -> Forward:
    """The model, which computes each batch once: measures watch the same ones, and methods that
    rank alike leave the same ones.
    """
    known: dict[tuple[object, ...], Tensor] = {}

    def recalled(ids: Tensor, mask: Tensor) -> Tensor:
        content = torch.stack([ids, mask]).numpy().tobytes()
        key = ids.shape, hashlib.sha256(content).digest()
        if key not in known:
            known[key] = forward(ids, mask)
        return known[key]

    return recalled


def needed(model: Forward, data: Asked, relevance: Tensor) -> dict[str, Estimate]:
    """The figures of one method; `model` is best one that is `remembered`."""
    removal = Tokens(
        (data.ids, data.mask), dropped=(0, 1), present=data.mask, protected=data.special
    )
    sure = probability(data.answers)
    measures = {"accuracy": accuracy(data.answers), "probability": sure}
    found = {}
    for test, first in (("positive", True), ("negative", False)):
        for name, measure in measures.items():
            curve = perturbation(
                model, removal, relevance, measure,
                fractions=TOKENS, most_relevant_first=first, batch_size=CHUNK,
            )  # fmt: skip
            found[f"{test}_{name}"] = curve.auc(groups=data.patents)
    faithful = saco(model, removal, relevance, sure, batch_size=CHUNK)
    found["saco"] = estimate(faithful, groups=data.patents)
    return found


def experiment(samples: int = SAMPLES, data: Path = DATA) -> Table:
    """The table of so many reactions.

    Raises:
        FileNotFoundError: if the model or the reactions are not there.
        ValueError: if there are fewer reactions.
    """
    model, vocabulary = load()

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits

    known = read(data)
    candidates = short(known, vocabulary)
    reactions = drawn(candidates, vocabulary, samples)
    # The model's classes are those of the data by their names in order.
    kinds = sorted({each.kind for each in known})
    rows: dict[str, dict[str, Estimate]] = {}
    with timed(f"BERT, {samples} reactions") as taken:
        seen = asked(forward, reactions, vocabulary)
        right = [
            kinds[answer] == each.kind
            for answer, each in zip(seen.answers.tolist(), reactions, strict=True)
        ]
        recalled = remembered(forward)
        for name, method in methods(forward).items():
            with timed(f"  {name}"):
                rows[name] = needed(recalled, seen, attributions(method, seen))
    settings = {
        "seed": SEED,
        "drawn from": f"{len(candidates)} of {len(known)} reactions, of at most {LONGEST} tokens",
        "accuracy": f"{100 * sum(right) / samples:.1f} %",
        "patents": len(set(seen.patents)),
        "reactions of": "drfp 0.3.7",
        "bootstrap": "2000 resamples of patents, 95 %",
    }
    return Table(
        "reactions", "BERT, faithfulness: does the model need the tokens that are ranked first?",
        _ABOUT, COLUMNS, rows, samples, settings, taken[0], versions("rxnfp"),
    )  # fmt: skip


_ABOUT = f"""A BERT with 12 layers (rxnfp) classifies chemical reactions into 50 classes.
Reactions are written in SMILES; the tokens are atoms, bonds and brackets. The reactions come
from patents and were drawn at random from the test split, with at most {LONGEST} tokens. We
explain the predicted class. A growing share of the tokens is dropped (0 to 1, the authors'
steps), starting with the most (*positive*) or the least relevant ones (*negative*); [CLS] and
[SEP] stay. The value is the area under the share of unchanged predictions (*accuracy*) or under
the probability of the prediction. *SaCo* uses 10 subsets and the same probability; it ranges
from −1 to 1. For the intervals, reactions of one patent are resampled together. Eq. 8 and 9
have no effect here, because they concern attention between streams."""


def main(samples: int = SAMPLES, data: Path = DATA, threads: int = 1) -> None:
    """Make the table and store it; without model or reactions, say so and leave it as it is."""
    torch.set_num_threads(threads)
    try:
        print(experiment(samples, data).store())
    except FileNotFoundError as error:
        print(f"Left out, so the stored table stays: {error}")


if __name__ == "__main__":
    typer.run(main)
