"""The equations of the paper, as pure functions of tensors.

Called by `relevance`; nothing here knows a model, a layer or a stream. Notation: `A` attention
probabilities, `∇A` their gradient, `Ā` the map of one call, `R` relevance of tokens (columns) to
tokens (rows).

Source: Chefer, Gur, Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and
Encoder-Decoder Transformers", ICCV 2021 (arXiv 2103.15679).
"""

from __future__ import annotations

from torch import Tensor


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
    return (attention * gradient).clamp(min=0).mean(-3)


def self_attention_update(attention_map: Tensor, relevance: Tensor) -> Tensor:
    """Eq. 6 and 7: what a self-attention call adds to the relevance of its stream, `Ā R`.

    Args:
        attention_map: `[..., N, N]`, from `average_heads`.
        relevance: `[..., N, M]`, relevance of any stream's tokens to this one's before the call.

    Returns:
        `[..., N, M]`, to be added to `relevance`.

    Example:
        >>> import torch
        >>> attention_map = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> self_attention_update(attention_map, torch.eye(2))
        tensor([[0., 2.],
                [0., 0.]])
    """
    return attention_map @ relevance
