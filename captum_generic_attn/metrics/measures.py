"""What is watched while parts of the inputs are taken away: one number of each example's output.

A measure takes the model's output for some examples and their places in the data set, and returns
one value each. The functions here make the usual ones; any function of the same form will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], Tensor]
"""Of outputs `[b, ...]` and the examples' places `[b]`: values `[b]`."""

Targets = Tensor | Sequence[int] | int


def accuracy(targets: Targets) -> Measure:
    """1 where the largest score is that of the target (top-1 accuracy), else 0.

    Args:
        targets: `[B]` indices, one of each example of the data set, or one for all.

    Example:
        >>> accuracy([2, 0])(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([0])).tolist()
        [1.0]
    """
    picked = _picker(targets, against_others=True)
    return lambda scores, rows: (scores.argmax(-1) == picked(scores, rows)).double()


def probability(targets: Targets, *, multi_label: bool = False) -> Measure:
    """The target's probability: by softmax over the last axis, or by sigmoid if `multi_label`.

    Args:
        targets: as in `accuracy`.
        multi_label: whether each class is judged by itself.

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
    """1 where the target's score is above the threshold (a multi-label model names it), else 0.

    Args:
        targets: as in `accuracy`.
        threshold: of the raw score; 0 is a probability of one half.

    Example:
        >>> detected(1)(torch.tensor([[-3.0, 0.5]]), torch.tensor([0])).tolist()
        [1.0]
    """
    picked = _picker(targets, against_others=False)
    return lambda scores, rows: (
        scores.gather(-1, picked(scores, rows)[:, None])[:, 0] > threshold
    ).double()


def soft_accuracy(credit: Tensor) -> Measure:
    """The credit of the answer with the largest score, as VQA counts it.

    Args:
        credit: `[B, K]` in 0 … 1: what each answer is worth for each example (VQA:
            `min(people who gave it / 3, 1)`).

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
    """The targets of some examples, on the device of their scores."""
    known = torch.as_tensor(targets)
    if known.is_floating_point() or known.dtype == torch.bool or known.ndim > 1:
        raise ValueError(
            f"targets are one index, or one of each example; not {known.dtype} of shape "
            f"{list(known.shape)}"
        )

    def picked(scores: Tensor, rows: Tensor) -> Tensor:
        if scores.ndim != 2:
            raise ValueError(
                f"the output has shape {list(scores.shape)}, not [B, K]: pass output= to pick, or "
                "a measure of your own"
            )
        classes = scores.shape[1]
        if classes < 2 and against_others:
            raise ValueError(
                "the output has one score for each example, which is always the largest: pass a "
                "measure that looks at the score by itself, such as detected(0)"
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
