"""Measures of a model's output while parts of its inputs are removed: one number per example.

A measure takes the model's output for some examples and their indices in the data set, and returns
one value per example. The functions here create the usual measures; any function of this form is a
measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], Tensor]
"""Maps outputs `[b, ...]` and the indices of the examples `[b]` to values `[b]`."""

Targets = Tensor | Sequence[int] | int


def accuracy(targets: Targets) -> Measure:
    """Top-1 accuracy: 1 where the target has the largest score, else 0.

    Args:
        targets: `[B]` class indices, one per example of the data set, or one for all.

    Example:
        >>> accuracy([2, 0])(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([0])).tolist()
        [1.0]
    """
    picked = _picker(targets, against_others=True)
    return lambda scores, rows: (scores.argmax(-1) == picked(scores, rows)).double()


def probability(targets: Targets, *, multi_label: bool = False) -> Measure:
    """The target's probability: softmax over the last axis, or sigmoid if `multi_label`.

    Args:
        targets: as in `accuracy`.
        multi_label: whether the model scores each class independently.

    Example:
        >>> probability(0)(torch.zeros(1, 4), torch.tensor([0])).tolist()
        [0.25]
    """
    picked = _picker(targets, against_others=not multi_label)

    def measure(scores: Tensor, rows: Tensor) -> Tensor:
        scores = scores.double()
        shares = scores.sigmoid() if multi_label else scores.softmax(-1)
        return shares.gather(-1, picked(scores, rows)[:, None])[:, 0]

    return measure


def detected(targets: Targets, threshold: float = 0.0) -> Measure:
    """1 where the target's score is above the threshold (as in multi-label models), else 0.

    Args:
        targets: as in `accuracy`.
        threshold: threshold of the logit; 0 is a probability of one half.

    Example:
        >>> detected(1)(torch.tensor([[-3.0, 0.5]]), torch.tensor([0])).tolist()
        [1.0]
    """
    picked = _picker(targets, against_others=False)
    return lambda scores, rows: (
        scores.gather(-1, picked(scores, rows)[:, None])[:, 0] > threshold
    ).double()


def soft_accuracy(credit: Tensor) -> Measure:
    """VQA's soft accuracy: the credit of the answer with the largest score.

    Args:
        credit: `[B, K]` in 0 … 1: the credit of each answer for each example (in VQA, `min(people
            who gave it / 3, 1)`).

    Example:
        >>> credit = torch.tensor([[1.0, 0.3, 0.0]])
        >>> soft_accuracy(credit)(torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([0])).tolist()
        [0.3...]
    """

    def measure(scores: Tensor, rows: Tensor) -> Tensor:
        given = credit.to(scores.device)[rows.to(scores.device)].double()
        return given.gather(-1, scores.argmax(-1, keepdim=True))[:, 0]

    return measure


def _picker(targets: Targets, *, against_others: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Create a function that selects the targets of some examples, on the device of
    their scores.
    """
    known = torch.as_tensor(targets)
    if known.is_floating_point() or known.dtype == torch.bool or known.ndim > 1:
        raise ValueError(
            f"targets are one index, or one index per example; not {known.dtype} of shape "
            f"{list(known.shape)}"
        )

    def picked(scores: Tensor, rows: Tensor) -> Tensor:
        if scores.ndim != 2:
            raise ValueError(
                f"the output has shape {list(scores.shape)}, not [B, K]: select an output with "
                "output=, or pass a measure of your own"
            )
        classes = scores.shape[1]
        if classes < 2 and against_others:
            raise ValueError(
                "the output has one score per example, which is always the largest: pass a measure "
                "that does not compare scores, such as detected(0)"
            )
        if known.ndim == 1 and int(rows.max()) >= len(known):
            raise ValueError(f"there are {len(known)} targets, but an example {int(rows.max())}")
        chosen = known.expand(len(rows)) if known.ndim == 0 else known[rows.to(known.device)]
        if bool(((chosen < -classes) | (chosen >= classes)).any()):
            raise ValueError(
                f"targets {sorted(set(chosen.tolist()))} are out of range for {classes} classes"
            )
        return (chosen % classes).to(scores.device)

    return picked
