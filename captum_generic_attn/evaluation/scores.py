"""From attributions to figures: each metric on one batch, and the figures of all batches.

`run` calls it. Which metrics there are is `plan.METRICS`; what they compute is in
`captum_generic_attn.metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from captum_generic_attn.evaluation.batch import Batch, Examples
from captum_generic_attn.metrics import (
    Curve,
    Estimate,
    Measure,
    Pixels,
    accuracy,
    deletion,
    detected,
    estimate,
    insertion,
    joined,
    perturbation,
    probability,
    saco,
)
from captum_generic_attn.metrics.localization import Segmentation, pointing, segment
from captum_generic_attn.metrics.rationales import token_f1_curve, words_of

Part = Curve | Segmentation | Tensor
"""What a metric gives for one batch: values of each example."""

AREAS = ("positive", "negative", "deletion", "insertion")
"""The metrics that are areas under curves."""


@dataclass(frozen=True)
class Column:
    """A figure that a metric gives, and how it is to be shown."""

    metric: str
    title: str
    higher_is_better: bool
    digits: int = 2


COLUMNS = {
    "positive": Column("positive", "positive", higher_is_better=False, digits=1),
    "negative": Column("negative", "negative", higher_is_better=True, digits=1),
    "deletion": Column("deletion", "deletion", higher_is_better=False, digits=1),
    "insertion": Column("insertion", "insertion", higher_is_better=True, digits=1),
    "saco": Column("saco", "SaCo", higher_is_better=True),
    "pointing": Column("pointing", "pointing game", higher_is_better=True),
    "pixel_accuracy": Column("segmentation", "pixel accuracy", higher_is_better=True),
    "mean_iou": Column("segmentation", "mean IoU", higher_is_better=True),
    "mean_average_precision": Column("segmentation", "mean AP", higher_is_better=True),
}
"""The figures of all metrics but `token_f1`, whose figures are one for each number of words."""


def column(figure: str) -> Column:
    """How a figure is to be shown.

    Example:
        >>> column("token_f1@5").title
        'F1 at 5'
    """
    if figure in COLUMNS:
        return COLUMNS[figure]
    return Column("token_f1", f"F1 at {figure.partition('@')[2]}", higher_is_better=True)


def score(metric: str, examples: Examples, batch: Batch, attributions: Tensor) -> Part | None:
    """One metric on one batch.

    Args:
        metric: one of `plan.METRICS`.
        examples: the data set that the batch is of.
        batch: some of its examples.
        attributions: of `batch.inputs`.

    Returns:
        Values of each example; `None` if the metric is defined for none of them.
    """
    if metric in {"pointing", "segmentation"}:
        return _localised(metric, batch, attributions)
    if metric == "token_f1":
        return _of_words(examples, batch, attributions)
    # Token ids are the first of the arguments that tokens are dropped from.
    removal, size = batch.removal(metric), examples.batch_size
    sure = probability(batch.targets, multi_label=examples.multi_label)
    if metric == "deletion":
        return deletion(batch.forward, removal, attributions, sure, batch_size=size)
    if metric == "insertion":
        return insertion(batch.forward, removal, attributions, sure, batch_size=size)
    if metric == "saco":
        return saco(batch.forward, removal, attributions, sure, batch_size=size)
    return perturbation(
        batch.forward,
        removal,
        attributions,
        _named(examples, batch),
        fractions=examples.fractions,
        most_relevant_first=metric == "positive",
        batch_size=size,
    )


def figures(
    metric: str, parts: Sequence[Part], ks: Sequence[int], seed: int
) -> dict[str, Estimate]:
    """The figures of a metric over all batches; none if it was defined for no example.

    Args:
        metric: one of `plan.METRICS`.
        parts: what `score` gave for each batch.
        ks: how many words were taken, of `token_f1`.
        seed: of the confidence intervals.

    Example:
        >>> print(figures("saco", [torch.tensor([0.5, 0.5])], (), seed=0)["saco"])
        0.5 (0.5 to 0.5, n = 2)
    """
    if not parts:
        return {}
    if metric in AREAS:
        return {metric: joined(cast(Sequence[Curve], parts)).auc(seed=seed)}
    if metric == "segmentation":
        whole = Segmentation.joined(cast(Sequence[Segmentation], parts))
        return {
            "pixel_accuracy": whole.pixel_accuracy(seed=seed),
            "mean_iou": whole.mean_iou(seed=seed),
            "mean_average_precision": whole.mean_average_precision(seed=seed),
        }
    values = torch.cat(list(cast(Sequence[Tensor], parts)), -1)
    if metric == "token_f1":
        return {
            f"token_f1@{k}": estimate(row, seed=seed) for k, row in zip(ks, values, strict=True)
        }
    return {metric: estimate(values, seed=seed)}


def _named(examples: Examples, batch: Batch) -> Measure:
    """Whether the model still names the class: among others it is first, by itself it is likely."""
    return (detected if examples.multi_label else accuracy)(batch.targets)


def _localised(metric: str, batch: Batch, attributions: Tensor) -> Part | None:
    assert batch.right is not None  # noqa: S101 - the plan asks for masks where it asks for this
    # Without a right place there is no right answer: `run` says how many these are.
    marked = batch.right.flatten(1).any(1)
    if not marked.any():
        return None
    # The same map as in the other metrics: one value for each pixel.
    values = Pixels(batch.inputs).features(attributions)
    maps = values.view(len(batch.inputs), *batch.inputs.shape[-2:])[marked]
    right = batch.right[marked]
    return pointing(maps, right) if metric == "pointing" else segment(maps, right)


def _of_words(examples: Examples, batch: Batch, attributions: Tensor) -> Tensor | None:
    assert batch.present is not None  # noqa: S101 - this is a metric of texts
    scores, marked = [], []
    for row, kept, rationale in zip(attributions, batch.present, batch.rationales, strict=True):
        if rationale is not None:
            scores.append(words_of(row[kept], rationale.words))
            marked.append(rationale.marked)
    return token_f1_curve(scores, marked, examples.ks) if scores else None
