"""The table of fused attention functions, `KERNELS`: all that the capture knows of each.

A fused function computes attention in one call and does not return its probabilities. An entry says
how the arguments of a call are read and how its attention and gradient are computed from them. To
support one more function, add its entry: nothing else in the package knows kernels by name.

Functions that match `WITHOUT_ENTRY` and have no entry are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_generic_attn.capture.operands import Operands, Saved
from captum_generic_attn.capture.record import Fused, Source


class FusedCall(NamedTuple):
    """The arguments of one call of a fused attention function.

    `query` is `[..., H, Nq, D]`, `key` is `[..., H, Nk, D]`, `value` is `[..., H, Nk, Dv]`, and so
    is the result `[..., H, Nq, Dv]`. `mask` broadcasts to `[..., H, Nq, Nk]`: booleans, True where
    a query attends, or numbers that are added to the logits. With `causal`, a query attends to no
    later key. `scale` multiplies the logits; `None` is `1 / sqrt(D)`. With `grouped`, neighbouring
    heads of the query share one head of key and value (grouped-query attention).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    grouped: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Query, key, value and the mask, if there is one."""
        first = self.query, self.key, self.value
        return first if self.mask is None else (*first, self.mask)


def scaled_dot_product_call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> FusedCall:  # fmt: skip
    """The call that the arguments of `F.scaled_dot_product_attention` make."""
    return FusedCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def eager_attention(call: FusedCall) -> Tensor:
    """The result of a fused call, from single operations of PyTorch.

    The capture runs it in place of the function where each step needs a relevance rule (LRP).

    Returns:
        `[..., H, Nq, Dv]`. A query whose mask leaves no key gets zeros.

    Example:
        >>> query, key, value = torch.rand(3, 1, 2, 5, 4)
        >>> fused = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> eager = eager_attention(FusedCall(query, key, value, causal=True))
        >>> torch.allclose(eager, fused, atol=1e-6)
        True
    """
    query, key, value, mask = call.query, call.key, call.value, call.mask
    if call.grouped:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if call.scale is None else call.scale
    logits = (query @ key.transpose(-2, -1)) * scale
    hidden = None
    if call.causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    if mask is not None and mask.dtype == torch.bool:
        hidden = ~mask if hidden is None else hidden | ~mask
    elif mask is not None:
        logits = logits + mask
    if hidden is not None:
        logits = logits.masked_fill(hidden, -math.inf)
    probabilities = torch.softmax(logits, -1)
    if mask is not None:
        nothing = (logits == -math.inf).all(-1, keepdim=True)
        probabilities = probabilities.masked_fill(nothing, 0.0)
    if call.dropout > 0:
        probabilities = F.dropout(probabilities, call.dropout)
    return probabilities @ value


_KEEPING_NODES = {
    "ScaledDotProductFlashAttentionForCpuBackward0",
    "ScaledDotProductFlashAttentionBackward0",
}
"""Backward nodes of PyTorch that save the logsumexp of each query's logits."""


def logsumexp_of(result: Tensor) -> Tensor | None:
    """The logsumexp of each query's logits, `[..., Nq]`, if the kernel saved it.

    `_saved_logsumexp` is a private attribute of PyTorch, so it is only a short cut: without it, the
    softmax is computed. It is not read where the model checkpoints its activations, because there
    it would run the model again.
    """
    node = result.grad_fn
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # noqa: SLF001
    if node is None or node.name() not in _KEEPING_NODES or hooks is None or hooks(False):
        return None
    sums = getattr(node, "_saved_logsumexp", None)
    if not isinstance(sums, Tensor) or sums.shape != result.shape[:-1]:
        return None
    return sums.detach()


def softmax_source(operands: Operands | Saved, call: FusedCall, result: Tensor) -> Fused:
    """Attention and gradient of a function that computes `softmax(q kᵀ scale + mask) v`."""
    return Fused(operands, call.causal, call.scale, call.grouped, logsumexp_of(result))


@dataclass(frozen=True)
class Kernel:
    """One fused attention function.

    Attributes:
        name: of the function, as `canonical` gives it: `__name__`, or the name of the operator
            without its overload.
        read: takes the arguments of a call and returns a `FusedCall`.
        source: takes what the record keeps of `FusedCall.tensors`, the call and its result, and
            returns what gives attention and gradient in blocks.
        eager: computes the same result from single operations.
    """

    name: str
    read: Callable[..., FusedCall]
    source: Callable[[Operands | Saved, FusedCall, Tensor], Source] = softmax_source
    eager: Callable[[FusedCall], Tensor] = eager_attention


KERNELS: tuple[Kernel, ...] = (Kernel("scaled_dot_product_attention", scaled_dot_product_call),)
"""The functions that the capture explains."""

WITHOUT_ENTRY = re.compile(
    r"flash_attn|flex_attention|efficient_attention|varlen_attn|flash_attention"
    r"|_fused_sdp|native_multi_head|transformer_encoder_layer_fwd|sage_?attn"
)
"""Names of other fused attention functions, whose probabilities cannot be known."""


def kernel_named(name: str) -> Kernel | None:
    """The entry of a function.

    Example:
        >>> kernel_named("scaled_dot_product_attention").eager.__name__, kernel_named("softmax")
        ('eager_attention', None)
    """
    return next((kernel for kernel in KERNELS if kernel.name == name), None)


def is_foreign(name: str) -> bool:
    """Whether a function is fused attention that has no entry.

    Example:
        >>> is_foreign("flash_attn_func"), is_foreign("scaled_dot_product_attention")
        (True, False)
    """
    return WITHOUT_ENTRY.search(name) is not None and kernel_named(name) is None
