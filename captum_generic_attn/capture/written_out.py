"""Fused attention written out in plain operations, for what must see its probabilities.

`mode` runs it in place of `scaled_dot_product_attention` where relevance is propagated: each of its
steps gets a relevance rule, and the call is recorded with the probabilities that it computes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What `scaled_dot_product_attention` returns for the same arguments.

    Example:
        >>> query, key, value = torch.rand(3, 1, 2, 5, 4)
        >>> theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> torch.allclose(attention(query, key, value, is_causal=True), theirs, atol=1e-6)
        True
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (query @ key.transpose(-2, -1)) * scale
    hidden = None
    if is_causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = ~attn_mask if hidden is None else hidden | ~attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask
    if hidden is not None:
        logits = logits.masked_fill(hidden, -math.inf)
    probabilities = torch.softmax(logits, -1)
    if attn_mask is not None:  # a query that may attend to nothing gets zeros
        nothing = (logits == -math.inf).all(-1, keepdim=True)
        probabilities = probabilities.masked_fill(nothing, 0.0)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return probabilities @ value
