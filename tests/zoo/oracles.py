"""Independent references for the explanations: plain autograd over probabilities that are exposed.

Nothing here uses the package. The probabilities of a model are made visible in one of three ways:
an eager replacement of `F.scaled_dot_product_attention`, a hook on the dropout that stands between
softmax and V in timm's eager attention, and Captum's public `LayerGradientXActivation`.
The tests of the forms of attention, of the model families and of the equations call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that matter, so that no map is zero and no attention uniform.

    Zero heads, layer scales of 1e-5 and weights of standard deviation 0.02 would let a wrong
    explanation pass: every gradient vanishes or every row of the attention looks the same.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim in (2, 4):
                noise *= 1.5 / math.sqrt(parameter[0].numel())
            elif parameter.ndim == 3:
                noise *= 0.5
            else:
                # Biases, and the scales of norms, which are born as ones and stay around one.
                noise = 0.2 * noise + float(parameter.double().mean() > 0.5)
            parameter.copy_(noise)
    return model


def score(output: Tensor, target: int | Sequence[int] | None) -> Tensor:
    """The sum over the batch of the explained raw scores; every example depends on itself alone."""
    if target is None:
        return output.sum()
    targets = [target] * len(output) if isinstance(target, int) else list(target)
    return torch.stack([output[i, t] for i, t in enumerate(targets)]).sum()


def attention_map(attention: Tensor, gradient: Tensor | None) -> Tensor:
    """Eq. 5 of one call, straight from the formula: `[B, H, Nq, Nk]` twice -> `[B, Nq, Nk]`."""
    if gradient is None:
        return torch.zeros_like(attention[:, 0])
    return torch.where(attention * gradient > 0, attention * gradient, 0.0).mean(dim=1)


def propagate(maps: Sequence[Tensor | Sequence[Tensor]], tokens: int | None = None) -> Tensor:
    """Eq. 6 over the calls in order; calls grouped in a sequence all read the same state.

    A map may have fewer rows than tokens (class attention): it then updates the first ones.
    """
    groups = [group if isinstance(group, (list, tuple)) else [group] for group in maps]
    last = groups[-1][0]
    tokens = tokens or last.shape[-1]
    relevance = torch.eye(tokens, dtype=last.dtype).expand(len(last), -1, -1).clone()
    for group in groups:
        additions = torch.zeros_like(relevance)
        for one in group:
            additions[:, : one.shape[1]] += one @ relevance
        relevance = relevance + additions
    return relevance


def read_row(relevance: Tensor, rows: int | Sequence[int] | Tensor) -> Tensor:
    """The explained rows of `relevance` minus identity, `[B, N]`; one row's own entry is zero.

    `rows`: one row, several rows of equal weight, or `[B, N]` weights.
    """
    change = relevance - torch.eye(relevance.shape[-1], dtype=relevance.dtype)
    batch, tokens = len(relevance), relevance.shape[-1]
    if isinstance(rows, Tensor):
        weights = rows.to(relevance.dtype)
    else:
        chosen = [rows] if isinstance(rows, int) else list(rows)
        weights = torch.zeros(batch, tokens, dtype=relevance.dtype)
        weights[:, chosen] = 1 / len(chosen)
    values = torch.einsum("bm,bmn->bn", weights, change)
    single = (weights != 0).sum(dim=1, keepdim=True) == 1
    return torch.where(single & (weights != 0), 0.0, values)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """`F.scaled_dot_product_attention` written out: its output and its probabilities."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    logits = query @ key.transpose(-1, -2)
    logits = logits * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    allowed = torch.ones(logits.shape[-2:], dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = allowed & attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask
    logits = logits.masked_fill(~allowed, -math.inf)
    empty = (logits == -math.inf).all(dim=-1, keepdim=True)
    probabilities = torch.where(empty, 0.0, logits.masked_fill(empty, 0.0).softmax(dim=-1))
    return probabilities @ value, probabilities


@contextmanager
def exposed_fused_attention() -> Iterator[list[Tensor]]:
    """Collect the probabilities of each `F.scaled_dot_product_attention` call, in graph."""
    probabilities: list[Tensor] = []

    def recording(*arguments: Tensor, **options: object) -> Tensor:
        output, attention = eager_attention(*arguments, **options)  # type: ignore[arg-type]
        probabilities.append(attention)
        return output

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", recording):
            yield probabilities
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def exposed_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what each call of `modules` puts out, in graph.

    They are the dropouts that stand between softmax and V, or modules that return
    `(output, probabilities)`.
    """
    probabilities: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        probabilities.append(output if isinstance(output, Tensor) else output[1])

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield probabilities
    finally:
        for handle in handles:
            handle.remove()


def maps_from(
    forward: Callable[[], Tensor], probabilities: list[Tensor], target: int | Sequence[int] | None
) -> list[Tensor]:
    """Eq. 5 of every probability tensor that `forward` leaves in `probabilities`."""
    with torch.enable_grad():
        output = forward()
        gradients = torch.autograd.grad(score(output, target), probabilities, allow_unused=True)
    return [
        attention_map(attention.detach(), gradient)
        for attention, gradient in zip(probabilities, gradients, strict=True)
    ]


def captum_maps(
    forward: Callable[..., Tensor],
    layers: Sequence[nn.Module],
    inputs: Tensor | tuple[Tensor, ...],
    target: int | Sequence[int] | Tensor | None,
    additional_forward_args: object = None,
) -> list[Tensor]:
    """Eq. 5 of attention modules that return `(output, probabilities)`, through Captum alone."""
    products = LayerGradientXActivation(forward, list(layers)).attribute(
        inputs, target, additional_forward_args=additional_forward_args
    )
    return [product[1].detach().clamp(min=0).mean(dim=1) for product in products]
