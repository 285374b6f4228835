"""Normalization layers with constant statistics: linear functions of their operand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_generic_attn.capture.tracking.operations import argument

Linear = Callable[[Tensor], Tensor]
Option = Callable[..., Any]
"""From the position and the name of an argument, and its default, to its value."""


def frozen(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Linear | None:
    """The norm as a linear function, without its bias; `None` if it is not one that is known.

    Args:
        name: the plain name of the operation.
        args: its arguments, the operand first.
        kwargs: its other arguments.
    """
    build, option = _BUILDERS.get(name), functools.partial(argument, args, kwargs)
    if build is None or (name == "batch_norm" and option(5, "training")):
        return None
    return build(args[0].detach(), option)


def _layer_norm(x: Tensor, option: Option) -> Linear:
    axes = tuple(range(-len(option(1, "normalized_shape")), 0))
    weight = option(2, "weight")
    deviation = (x.var(axes, unbiased=False, keepdim=True) + option(4, "eps", 1e-5)).sqrt()
    return lambda t: (
        (t - t.mean(axes, keepdim=True)) / deviation * (1 if weight is None else weight)
    )


def _rms_norm(x: Tensor, option: Option) -> Linear:
    axes = tuple(range(-len(option(1, "normalized_shape")), 0))
    weight, eps = option(2, "weight"), option(3, "eps")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = (x.pow(2).mean(axes, keepdim=True) + eps).rsqrt()
    return lambda t: t * scale * (1 if weight is None else weight)


def _normalize(x: Tensor, option: Option) -> Linear:
    unit = F.normalize(x, option(1, "p", 2.0), option(2, "dim", 1), option(3, "eps", 1e-12))
    length = torch.where(x == 0, torch.ones_like(x), x / unit)
    return lambda t: t / length


def _group_norm(x: Tensor, option: Option) -> Linear:
    return _of_groups(x, option(1, "num_groups"), option(2, "weight"), option(4, "eps", 1e-5))


def _instance_norm(x: Tensor, option: Option) -> Linear:
    return _of_groups(x, x.shape[1], option(3, "weight"), option(7, "eps", 1e-5))


def _of_groups(x: Tensor, groups: int, weight: Tensor | None, eps: float) -> Linear:
    """Each of `groups` groups of channels is normalised by itself."""
    grouped = x.reshape(len(x), groups, -1)
    deviation = (grouped.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    scale = None if weight is None else weight.view(1, -1, *[1] * (x.ndim - 2))

    def apply(t: Tensor) -> Tensor:
        parts = t.reshape(len(t), groups, -1)
        found: Tensor = ((parts - parts.mean(-1, keepdim=True)) / deviation).view(t.shape)
        return found if scale is None else found * scale

    return apply


def _batch_norm(x: Tensor, option: Option) -> Linear:
    """In evaluation mode: the running statistics are constants."""
    scale = option(2, "running_var").add(option(7, "eps", 1e-5)).rsqrt()
    weight = option(3, "weight")
    scale = (scale if weight is None else scale * weight).view(1, -1, *[1] * (x.ndim - 2))
    return lambda t: t * scale


_BUILDERS: dict[str, Callable[[Tensor, Option], Linear]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "normalize": _normalize,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
}
