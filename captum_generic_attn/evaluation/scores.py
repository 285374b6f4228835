"""The metrics that an evaluation can compute: names, columns, requirements and computation.

To add a metric, write a function in `captum_generic_attn.metrics` and an entry in `METRICS`; plans,
tables and reports use the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from captum_generic_attn.evaluation.batch import Batch, Examples
from captum_generic_attn.metrics import (
    Curve,
    Estimate,
    Measure,
    Pixels,
    Segmentation,
    accuracy,
    deletion,
    detected,
    estimate,
    insertion,
    joined,
    perturbation,
    pointing,
    probability,
    saco,
    segment,
    words_of,
)
from captum_generic_attn.metrics.rationales import token_f1_curve

P = TypeVar("P")

NEED = "Does the model need what the explanation points at?"
PLACE = "Does it point at the right place?"
WORDS = "Does it put first the words that people marked?"


@dataclass(frozen=True)
class Column:
    """How a result is shown: its title, whether higher is better, and its number of digits."""

    title: str
    higher_is_better: bool
    digits: int = 2


@dataclass(frozen=True)
class Metric(Generic[P]):
    """One metric of an evaluation.

    Attributes:
        name: what a TOML file calls it.
        question: what it asks; metrics of one question share a table.
        legend: a line on how to read it. `{named}` and `{most}` are filled in: what a model does
            with the explained class, and the greatest area there can be.
        columns: its figures by name. A figure at several numbers `k` is named `name@k`, and stands
            here as `name`.
        score: its values for one batch, or `None` if it is defined for none of the examples.
        figures: its figures from the values of all batches; further arguments are the numbers `k`
            and the seed of the confidence intervals.
        needs: the data without which it cannot be computed.
        removed: what removed pixels become in the paper that it is from; `None` if it removes
            nothing.
        library: a module that it needs and that the package does not require.
    """

    name: str
    question: str
    legend: str
    columns: Mapping[str, Column]
    score: Callable[[Examples, Batch, Tensor], P | None]
    figures: Callable[[Sequence[P], Sequence[int], int], dict[str, Estimate]]
    needs: Literal["nothing", "masks", "rationales"] = "nothing"
    removed: Literal["black", "mean", "blur"] | None = None
    library: str | None = None


def _area(
    name: str, *, higher_is_better: bool, removed: Literal["black", "blur"], legend: str,
    score: Callable[[Examples, Batch, Tensor], Curve],
) -> Metric[Curve]:  # fmt: skip
    """A metric that is the area under a curve, times 100."""

    def figures(parts: Sequence[Curve], _: Sequence[int], seed: int) -> dict[str, Estimate]:
        return {name: joined(parts).auc(seed=seed)}

    columns = {name: Column(name, higher_is_better, digits=1)}
    return Metric(name, NEED, legend, columns, score, figures, removed=removed)


def _means(name: str) -> Callable[[Sequence[Tensor], Sequence[int], int], dict[str, Estimate]]:
    """The mean over all examples, for a metric with one value per example."""
    return lambda parts, _, seed: {name: estimate(torch.cat(list(parts)), seed=seed)}


def _sure(examples: Examples, batch: Batch) -> Measure:
    return probability(batch.targets, multi_label=examples.multi_label)


def _perturbed(name: str) -> Callable[[Examples, Batch, Tensor], Curve]:
    def score(examples: Examples, batch: Batch, attributions: Tensor) -> Curve:
        # Softmax models rank the target first; multi-label models score it above the threshold.
        named = (detected if examples.multi_label else accuracy)(batch.targets)
        return perturbation(
            batch.forward,
            batch.removal(name),
            attributions,
            named,
            fractions=examples.fractions,
            most_relevant_first=name == "positive",
            batch_size=examples.batch_size,
        )

    return score


def _deletion(examples: Examples, batch: Batch, attributions: Tensor) -> Curve:
    return deletion(
        batch.forward,
        batch.removal("deletion"),
        attributions,
        _sure(examples, batch),
        batch_size=examples.batch_size,
    )


def _insertion(examples: Examples, batch: Batch, attributions: Tensor) -> Curve:
    return insertion(
        batch.forward,
        batch.removal("insertion"),
        attributions,
        _sure(examples, batch),
        batch_size=examples.batch_size,
    )


def _saco(examples: Examples, batch: Batch, attributions: Tensor) -> Tensor:
    return saco(
        batch.forward,
        batch.removal("saco"),
        attributions,
        _sure(examples, batch),
        batch_size=examples.batch_size,
    )


def _localised(
    compared: Callable[[Tensor, Tensor], P],
) -> Callable[[Examples, Batch, Tensor], P | None]:
    """The score of a batch for a metric of maps `[B, H, W]` and annotated places."""

    def score(_: Examples, batch: Batch, attributions: Tensor) -> P | None:
        assert batch.right is not None  # noqa: S101 - the plan asks for masks where it asks for this
        # Skip examples without an annotated place; `run` reports their number.
        marked = batch.right.flatten(1).any(1)
        if not marked.any():
            return None
        # The same map as in the other metrics, with one value per pixel.
        values = Pixels(batch.inputs).features(attributions)
        maps = values.view(len(batch.inputs), *batch.inputs.shape[-2:])[marked]
        return compared(maps, batch.right[marked])

    return score


def _segmentation(
    parts: Sequence[Segmentation], _: Sequence[int], seed: int
) -> dict[str, Estimate]:
    whole = Segmentation.joined(parts)
    return {
        "pixel_accuracy": whole.pixel_accuracy(seed=seed),
        "mean_iou": whole.mean_iou(seed=seed),
        "mean_average_precision": whole.mean_average_precision(seed=seed),
    }


def _token_f1(examples: Examples, batch: Batch, attributions: Tensor) -> Tensor | None:
    assert batch.present is not None  # noqa: S101 - this is a metric of texts
    scores, marked = [], []
    for row, kept, rationale in zip(attributions, batch.present, batch.rationales, strict=True):
        if rationale is not None:
            scores.append(words_of(row[kept], rationale.words))
            marked.append(rationale.marked)
    return token_f1_curve(scores, marked, examples.ks) if scores else None


def _token_f1_at(parts: Sequence[Tensor], ks: Sequence[int], seed: int) -> dict[str, Estimate]:
    rows = torch.cat(list(parts), -1)
    return {f"token_f1@{k}": estimate(row, seed=seed) for k, row in zip(ks, rows, strict=True)}


_PERTURBED = (
    "positive, negative: area × 100 under the share that still {named}, while the most or the "
    "least relevant parts are removed; {most} is the most."
)
_PROBABLE = "deletion, insertion: area × 100 under the class's probability."

_ENTRIES: tuple[Metric[Any], ...] = (
    _area(
        "positive", higher_is_better=False, removed="black", legend=_PERTURBED,
        score=_perturbed("positive"),
    ),
    _area(
        "negative", higher_is_better=True, removed="black", legend=_PERTURBED,
        score=_perturbed("negative"),
    ),
    _area(
        "deletion", higher_is_better=False, removed="black", legend=_PROBABLE, score=_deletion
    ),
    _area(
        "insertion", higher_is_better=True, removed="blur", legend=_PROBABLE, score=_insertion
    ),
    Metric(
        "saco", NEED, "SaCo: from -1 to 1; chance is 0.",
        {"saco": Column("SaCo", higher_is_better=True)},
        _saco, _means("saco"), removed="mean",
    ),
    Metric(
        "pointing", PLACE,
        "pointing game: the share of maps whose highest value is in the right place.",
        {"pointing": Column("pointing game", higher_is_better=True)},
        _localised(pointing), _means("pointing"), needs="masks",
    ),
    Metric(
        "segmentation", PLACE,
        "pixel accuracy, mean IoU: of what is above a map's mean, as foreground.",
        {
            "pixel_accuracy": Column("pixel accuracy", higher_is_better=True),
            "mean_iou": Column("mean IoU", higher_is_better=True),
            "mean_average_precision": Column("mean AP", higher_is_better=True),
        },
        _localised(segment), _segmentation, needs="masks",
        library="torchmetrics.functional.classification",
    ),
    Metric(
        "token_f1", WORDS, "F1 at k: of the k words that come first, against the marked ones.",
        {"token_f1": Column("F1", higher_is_better=True)},
        _token_f1, _token_f1_at, needs="rationales",
    ),
)  # fmt: skip

METRICS: Mapping[str, Metric[Any]] = MappingProxyType({metric.name: metric for metric in _ENTRIES})
"""All metrics, by their names in a TOML file."""


def names_of(*needs: str) -> tuple[str, ...]:
    """The metrics that given data allow.

    Args:
        needs: what the data have besides inputs: `"masks"`, `"rationales"`.

    Example:
        >>> names_of()
        ('positive', 'negative', 'deletion', 'insertion', 'saco')
    """
    return tuple(name for name, metric in METRICS.items() if metric.needs in ("nothing", *needs))


def metric_of(figure: str) -> Metric[Any]:
    """The metric of a result.

    Example:
        >>> metric_of("mean_iou").name, metric_of("token_f1@5").name
        ('segmentation', 'token_f1')
    """
    name = figure.partition("@")[0]
    return next(metric for metric in METRICS.values() if name in metric.columns)


def column(figure: str) -> Column:
    """The column of a result.

    Example:
        >>> column("token_f1@5").title
        'F1 at 5'
    """
    name, at, number = figure.partition("@")
    shown = metric_of(figure).columns[name]
    if not at:
        return shown
    return Column(f"{shown.title} at {number}", shown.higher_is_better, shown.digits)


def figures(metric: str, parts: Sequence[Any], ks: Sequence[int], seed: int) -> dict[str, Estimate]:
    """The figures of a metric over all batches; none if it was defined for no example.

    Args:
        metric: one of `METRICS`.
        parts: what its `score` gave for each batch.
        ks: how many words were taken, of `token_f1`.
        seed: of the confidence intervals.

    Example:
        >>> print(figures("saco", [torch.tensor([0.5, 0.5])], (), seed=0)["saco"])
        0.5 (0.5 to 0.5, n = 2)
    """
    return METRICS[metric].figures(parts, ks, seed) if parts else {}
