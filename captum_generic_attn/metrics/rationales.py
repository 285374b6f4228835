"""Agreement of the most relevant words of a text with human rationales.

The inputs are token scores of texts with rationales. `statistics.estimate` aggregates each row of
`token_f1_curve` with a confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORD_COUNTS = tuple(range(5, 81, 5))
"""The numbers of selected words in the paper's protocol."""


def words_of(scores: Tensor, words: Sequence[int | None]) -> Tensor:
    """Compute scores of words: the highest score among a word's tokens.

    Args:
        scores: the scores of the tokens, `[N]`.
        words: the index of each token's word, `None` for special tokens (`word_ids()` of what a
            Hugging Face tokenizer returns).

    Returns:
        `[W]`, where `W - 1` is the highest index in `words`.

    Raises:
        ValueError: if the lengths differ, a word of 0 … W - 1 has no token, or the score of a
            word's token is not finite.

    Source: H. Chefer et al., *Generic Attention-model Explainability*, ICCV 2021, section 5.

    Example:
        >>> words_of(torch.tensor([0.9, 0.1, 0.4, 0.2, 0.8]), [None, 0, 0, 1, None])
        tensor([0.4000, 0.2000])
    """
    if scores.shape != (len(words),):
        raise ValueError(
            f"scores {tuple(scores.shape)} must be [{len(words)}], one for each entry of words"
        )
    indices = [word for word in words if word is not None]
    if not indices:
        raise ValueError("words has no word: all its entries are None")
    if min(indices) < 0:
        raise ValueError(f"words has {min(indices)}: word indices begin at 0")
    missing = sorted(set(range(max(indices) + 1)) - set(indices))
    if missing:
        raise ValueError(
            f"the words {missing} of {max(indices) + 1} have no token, so no score: remove them "
            "from the text and from its rationale"
        )
    own = scores[torch.tensor([word is not None for word in words], device=scores.device)]
    _check_finite(own, "scores")
    result = own.new_full((max(indices) + 1,), -math.inf)
    return result.scatter_reduce(0, torch.tensor(indices, device=own.device), own, "amax")


def token_f1(scores: Tensor, rationale: Tensor, k: int) -> float:
    """The F1 score of the `k` words with the highest scores against a text's rationale.

    Args:
        scores: the scores of the words, `[W]`; among equal scores, earlier words come first.
        rationale: bool, `[W]`: the words that annotators marked.
        k: the number of selected words; all words if there are fewer.

    Returns:
        2 · hits / (selected words + marked words), in 0 … 1.

    Raises:
        ValueError: if shapes differ, a score is not finite, no word is marked, or k < 1.
        TypeError: if `rationale` is not bool.

    Source: J. DeYoung et al., *ERASER: A Benchmark to Evaluate Rationalized NLP Models*, ACL 2020,
    section 4.1.

    Example:
        >>> rationale = torch.tensor([True, True, False, False])
        >>> token_f1(torch.tensor([0.9, 0.2, 0.8, 0.1]), rationale, 2)
        0.5
    """
    return float(_f1(scores, rationale, [k], "rationale"))


def token_f1_curve(
    scores: Sequence[Tensor], rationales: Sequence[Tensor], ks: Sequence[int] = WORD_COUNTS
) -> Tensor:
    """`token_f1` of several texts, for several numbers of selected words.

    Args:
        scores: the scores of each text's words, `[W]`; texts may differ in length.
        rationales: the rationale of each text, bool, `[W]`.
        ks: the numbers of selected words.

    Returns:
        `[len(ks), B]`, float64, in 0 … 1; the protocol's result for each `k` is the mean of its
        row.

    Raises:
        ValueError: as `token_f1`, and if there are not as many rationales as scores, or none.
        TypeError: if a rationale is not bool.

    Source: as `token_f1`.

    Example:
        >>> rationale = torch.tensor([True, False, False, True])
        >>> scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> token_f1_curve([scores, -scores], [rationale, rationale], ks=[1, 2])
        tensor([[0.6667, 0.6667],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    if not scores or len(scores) != len(rationales):
        raise ValueError(
            f"there are scores of {len(scores)} texts and {len(rationales)} rationales: each text "
            "needs both"
        )
    pairs = enumerate(zip(scores, rationales, strict=True))
    return torch.stack([_f1(*pair, ks, f"rationale {index}") for index, pair in pairs], 1)


def _f1(scores: Tensor, rationale: Tensor, ks: Sequence[int], name: str) -> Tensor:
    """The F1 scores of one text, `[len(ks)]`."""
    if not ks or min(ks) < 1:
        raise ValueError(f"k={list(ks)}: it must be at least 1")
    if scores.ndim != 1 or rationale.shape != scores.shape:
        raise ValueError(
            f"{name} {tuple(rationale.shape)} and its scores {tuple(scores.shape)} must both be "
            "[W]; if the text was truncated, truncate the rationale as well, and report it"
        )
    if rationale.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, not {rationale.dtype}: compare it, such as > 0")
    if not rationale.any():
        raise ValueError(f"{name} marks no word: leave the text out, and report it")
    _check_finite(scores, f"the scores of {name}")
    order = scores.detach().argsort(descending=True, stable=True).cpu()
    hits = rationale.cpu()[order].cumsum(0)
    taken = torch.tensor(ks).clamp(max=len(scores))
    return 2 * hits[taken - 1].double() / (taken + hits[-1])


def _check_finite(scores: Tensor, name: str) -> None:
    if not scores.isfinite().all():
        raise ValueError(
            f"{name}: {int((~scores.isfinite()).sum())} of {scores.numel()} are NaN or infinite: "
            "leave the text out, and report it"
        )
