"""The score of an example may depend on this example alone: all are explained in one backward pass.

`explanation` asks for each score of a batch. In-batch similarities, scores less the mean of the
batch and the like are refused; their maps would be sums over examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord, Capture

_SEED = 0


def checkable(capture: Capture, examples: int) -> bool:
    """Whether there are other examples that a score might read, and should not.

    Batch norm in training mode reads them all, which `attribution` warns of.
    """
    return examples > 1 and "batch_norm" not in capture.in_training


def live_rows(
    capture: Capture, score: Tensor, records: Sequence[AttentionRecord]
) -> dict[int, Tensor]:
    """Which rows of calls the scores of a batch read, each of its own example.

    A random half of the scores is asked, then the other half: neither may read the other's tokens.

    Args:
        capture: the forward pass; its graph is kept.
        score: `[B]`.
        records: the calls.

    Returns:
        `[G, Nq]` by call, True for what is read without another call in between.

    Raises:
        ValueError: if a score reads tokens of another example.
    """
    half = torch.zeros(len(score), dtype=torch.bool)
    half[halves(len(score))] = True
    found: dict[int, Tensor] = {}
    for own in (half, ~half):
        live = capture.blocked(score[own.to(score.device)].sum(), records)
        for record in records:
            rows = live[record.index]
            foreign = rows.any(-1).cpu() & ~own[record.examples]
            if bool(foreign.any()):
                raise ValueError(_message(own, record.examples[foreign], record))
            known = found.get(record.index)
            found[record.index] = rows if known is None else rows | known.to(rows.device)
    return found


def halves(examples: int) -> Tensor:
    """About a random half of the examples, the same for every batch of this size.

    They are odd in number: so however examples are paired off, some pair is split.
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
