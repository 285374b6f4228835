"""Normalization layers with constant statistics: linear functions of their operand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_generic_attn.capture.tracking.operations import argument

Frozen = Callable[[Tensor], Tensor]


def frozen(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Frozen | None:
    """The norm as a linear function, without its bias; `None` if it is not one that is known.

    Args:
        name: the plain name of the operation.
        args: its arguments, the operand first.
        kwargs: its other arguments.
    """
    x = args[0].detach()

    def of(position: int, key: str, default: Any = None) -> Any:
        return argument(args, kwargs, position, key, default)

    if name in ("layer_norm", "rms_norm"):
        shape = of(1, "normalized_shape")
        axes = tuple(range(-len(shape), 0))
        weight = of(2, "weight")
        if name == "rms_norm":
            eps = of(3, "eps")
            eps = torch.finfo(x.dtype).eps if eps is None else eps
            scale = (x.pow(2).mean(axes, keepdim=True) + eps).rsqrt()
            return lambda t: t * scale * (1 if weight is None else weight)
        deviation = (x.var(axes, unbiased=False, keepdim=True) + of(4, "eps", 1e-5)).sqrt()
        return lambda t: (
            (t - t.mean(axes, keepdim=True)) / deviation * (1 if weight is None else weight)
        )
    if name == "normalize":
        length = x / F.normalize(x, *args[1:], **kwargs)
        length = torch.where(x == 0, torch.ones_like(x), length)
        return lambda t: t / length
    if name in ("group_norm", "instance_norm"):
        groups = of(1, "num_groups") if name == "group_norm" else x.shape[1]
        weight = of(2, "weight") if name == "group_norm" else of(3, "weight")
        eps = of(4 if name == "group_norm" else 7, "eps", 1e-5)
        grouped = x.reshape(len(x), groups, -1)
        deviation = (grouped.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        scale = None if weight is None else weight.view(1, -1, *[1] * (x.ndim - 2))

        def apply(t: Tensor) -> Tensor:
            parts = t.reshape(len(t), groups, -1)
            found: Tensor = ((parts - parts.mean(-1, keepdim=True)) / deviation).view(t.shape)
            return found if scale is None else found * scale

        return apply
    if name == "batch_norm" and not of(5, "training", default=False):
        shape = 1, -1, *[1] * (x.ndim - 2)
        scale = (of(2, "running_var") if len(args) < 3 else args[2]).add(of(7, "eps", 1e-5)).rsqrt()
        weight = of(3, "weight")
        scale = (scale if weight is None else scale * weight).view(shape)
        return lambda t: t * scale
    return None
