"""Check that the score of each example of a batch depends on that example alone.

All scores share one backward pass, so in-batch similarities, scores less the mean of the batch and
the like are refused: their maps would be sums over examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord, Capture

_SEED = 0
_ROUNDING = 32
"""Two gradients count as equal if they differ by no more than this many units in the last place of
the largest value of their row."""


def checkable(capture: Capture, examples: int) -> bool:
    """Whether there are other examples that a score might depend on, and must not.

    Batch norm in training mode depends on all of them; `attribute` warns of that.
    """
    return examples > 1 and "batch_norm" not in capture.in_training


def live_rows(
    capture: Capture, score: Tensor, records: Sequence[AttentionRecord]
) -> dict[int, Tensor]:
    """The rows of calls that the scores of a batch read, each of its own example.

    One gradient is taken for a random half of the scores, one for the other half: neither half may
    depend on the tokens of the other.

    Args:
        capture: the forward pass; its graph is kept.
        score: `[B]`.
        records: the calls.

    Returns:
        `[G, Nq]` by call, True for queries whose output is read without another call in between.

    Raises:
        ValueError: if a score reads tokens of another example.
    """
    half = _half(len(score))
    found: dict[int, Tensor] = {}
    for own in (half, ~half):
        gradients = capture.blocked(score[own.to(score.device)].sum(), records)
        for record, gradient in zip(records, gradients, strict=True):
            rows = record.read_rows(gradient)
            _check(own, rows, record)
            known = found.get(record.index)
            found[record.index] = rows if known is None else rows | known.to(rows.device)
    return found


class Compared:
    """The gradients of one half of the scores, to be compared with those of the sum of all.

    The backward pass of the sum computes gradients at the outputs of the calls anyway. Where such a
    gradient equals that of the first half, the scores of the second half do not depend on it. This
    saves the gradient of the second half.

    Args:
        capture: the forward pass; its graph is kept.
        score: `[B]`.
        records: calls, none of which the score reads through another call.

    Raises:
        ValueError: if a score of the first half reads tokens of the other.
    """

    def __init__(self, capture: Capture, score: Tensor, records: Sequence[AttentionRecord]) -> None:
        self.records = records
        self._own = _half(len(score))
        self._gradients = capture.blocked(score[self._own.to(score.device)].sum(), records)
        for record, gradient in zip(records, self._gradients, strict=True):
            _check(self._own, record.read_rows(gradient), record)

    def check(self, whole: Sequence[Tensor | None]) -> None:
        """Check that the scores of the second half do not depend on tokens of the first.

        Args:
            whole: the gradients of the sum of all scores at the outputs of the calls.

        Raises:
            ValueError: if one does.
        """
        for record, half, both in zip(self.records, self._gradients, whole, strict=True):
            if both is not None:
                rows = record.read_rows(both if half is None else _difference(both, half))
                _check(~self._own, rows, record)


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """The difference of two gradients `[..., d]`, 0 where it is no more than rounding."""
    difference = one - other
    size = other.abs().amax(-1, keepdim=True)
    return difference.masked_fill(
        difference.abs() <= _ROUNDING * torch.finfo(one.dtype).eps * size, 0
    )


def _check(own: Tensor, rows: Tensor, record: AttentionRecord) -> None:
    """Check that the scores of some examples read no rows `[G, Nq]` of other examples."""
    foreign = rows.any(-1).cpu() & ~own[record.examples]
    if bool(foreign.any()):
        raise ValueError(_message(own, record.examples[foreign], record))


def _half(examples: int) -> Tensor:
    half = torch.zeros(examples, dtype=torch.bool)
    half[halves(examples)] = True
    return half


def halves(examples: int) -> Tensor:
    """About half of the examples, drawn at random, the same for every batch of this size.

    Their number is odd, so that however examples form pairs, some pair is split.
    """
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randperm(examples, generator=generator)[: (examples // 2 - 1) | 1]


def _message(own: Tensor, read: Tensor, record: AttentionRecord) -> str:
    asked = own.nonzero().flatten().tolist()
    others = sorted(set(read.tolist()))
    return (
        f"the score of an example must depend on that example alone, but the scores of examples "
        f"{asked} read tokens of examples {others} ({record.module or 'the forward function'}). "
        "Where inputs are compared with each other (in-batch similarity, CLIP's logits for all "
        "pictures and texts), pair each with its own, as hf.pairs does, and return the "
        ".diagonal(); else explain one example at a time (internal_batch_size=1)"
    )
