"""Equations 5 to 11 of the paper, as pure functions of tensors.

Notation: `A` attention probabilities, `∇A` their gradient, `Ā` the attention map of one call, `R`
the relevance of tokens (columns) to tokens (rows).

Source: Chefer, Gur, Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and
Encoder-Decoder Transformers", ICCV 2021 (arXiv 2103.15679).
"""

from __future__ import annotations

import torch
from torch import Tensor


def positive_contribution(attention: Tensor, gradient: Tensor, out: Tensor | None = None) -> Tensor:
    """Eq. 5 before its mean over heads, `relu(∇A ⊙ A)`.

    Args:
        attention: `[..., Nq, Nk]` probabilities.
        gradient: gradient of the score with respect to them, of the same shape.
        out: where to write the result; may be one of the two.

    Returns:
        `[..., Nq, Nk]`, non-negative, in the unit of the score.

    Example:
        >>> positive_contribution(torch.tensor([[0.5, 0.5]]), torch.tensor([[2.0, -1.0]]))
        tensor([[1., 0.]])
    """
    return torch.mul(attention, gradient, out=out).relu_()


def average_heads(attention: Tensor, gradient: Tensor) -> Tensor:
    """Eq. 5: the map of one call, `Ā = mean_h relu(∇A ⊙ A)`.

    Args:
        attention: `[..., H, Nq, Nk]` probabilities.
        gradient: gradient of the score with respect to them, of the same shape.

    Returns:
        `[..., Nq, Nk]`, non-negative, in the unit of the score.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import torch
        >>> attention = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])  # two heads, one query
        >>> average_heads(attention, torch.tensor([[[2.0, -1.0]], [[1.0, 3.0]]]))
        tensor([[1., 0.]])
    """
    if attention.shape != gradient.shape:
        raise ValueError(
            f"attention {tuple(attention.shape)} and its gradient {tuple(gradient.shape)} must "
            "have one shape"
        )
    return positive_contribution(attention, gradient).mean(-3)


def self_attention_update(attention_map: Tensor, relevance: Tensor) -> Tensor:
    """Eq. 6 and 7: the update `Ā R` that self-attention adds to the relevance of its stream.

    Eq. 11 has the same form: cross-attention adds `Ā R^{qs}`, with `R^{qs}` the relevance of the
    queries' stream to the keys.

    Args:
        attention_map: `[..., Nq, Nk]`, from `average_heads`.
        relevance: `[..., Nk, M]`, relevance of any stream's tokens to the keys before the call.

    Returns:
        `[..., Nq, M]`, to be added to the relevance of the same tokens to the queries.

    Example:
        >>> import torch
        >>> attention_map = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> self_attention_update(attention_map, torch.eye(2))
        tensor([[0., 2.],
                [0., 0.]])
    """
    return attention_map @ relevance


def normalize_relevance(delta: Tensor) -> Tensor:
    """Eq. 8 and 9 without the identity: `R̂ / S`, with `R̂ = R − I` and `S` its row sums.

    `R̄` of the paper is this plus the identity.

    Args:
        delta: `[..., N, M]`, `R̂`, non-negative.

    Returns:
        `[..., N, M]`, rows that sum to 1. A row of zeros stays one (the paper divides 0 by 0).

    Example:
        >>> import torch
        >>> normalize_relevance(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([[0.2500, 0.7500],
                [0.0000, 0.0000]])
    """
    return delta / divisor(delta.sum(-1, keepdim=True))


def divisor(sums: Tensor) -> Tensor:
    """The divisor of eq. 8: row sums, with 1 in place of 0, so that a zero row stays zero.

    A sum that overflowed becomes NaN: division by infinity would give a row of zeros.

    Example:
        >>> divisor(torch.tensor([4.0, 0.0, torch.inf]))
        tensor([4., 1., nan])
    """
    return sums.masked_fill(sums == 0, 1.0).masked_fill(sums.isinf(), torch.nan)


def cross_attention_update(
    attention_map: Tensor, queries: Tensor | None, keys: Tensor | None
) -> Tensor:
    """Eq. 10: the update `(R̄^{ss})ᵀ Ā R̄^{qq}` that cross-attention adds to `R^{sq}`.

    Args:
        attention_map: `[..., Ns, Nq]`, from `average_heads`; rows are tokens of the queries' stream
            s, columns those of the keys' stream q.
        queries: `[..., Ns, Ns]`, `R̄^{ss} − I`; `None` for zero.
        keys: `[..., Nq, M]`, `R̄^{qq}`, identity included; `None` for the identity.

    Returns:
        `[..., Ns, M]`, to be added to the relevance of the keys' stream to the queries'.

    Example:
        >>> import torch
        >>> attention_map = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> queries = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # the first token read the second
        >>> cross_attention_update(attention_map, queries, None)
        tensor([[1., 0.],
                [1., 2.]])
    """
    update = attention_map if keys is None else attention_map @ keys
    return update if queries is None else update + queries.mT @ update
