"""Functions of users' own, in torch, in numpy and scripted: no capture sees their inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function


class Scaled(Function):
    """Element by element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.tanh() + x * (1 - x.tanh() ** 2))


class Flipped(Function):
    """Moves tokens, by torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.flip(1)


class InNumpy(Function):
    """Element by element, where no mode sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.square(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class RolledInNumpy(Function):
    """Moves tokens, where no mode sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.roll(x.detach().numpy(), 1, 1).copy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.roll(-1, 1)


class BothFlipped(Function):
    """Adds one to the other, turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + y.flip(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.flip(1)


class OtherExample(Function):
    """Reads the other example, in numpy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy()[::-1].copy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.flip(0)


class SwapsTwo(Function):
    """The last token of the last example reads its first, in numpy; all else stays."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.detach().numpy().copy()
        found[-1, -1] += found[-1, 0]
        return torch.from_numpy(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found = gradient.clone()
        found[-1, 0] += gradient[-1, -1]
        return found


class WrittenInPlace(Function):
    """Flips its argument in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.copy_(x.flip(1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.flip(1)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * torch.tanh(x) + 1


@torch.jit.script
def scripted_flip(x: Tensor) -> Tensor:
    return x + x.flip([1])


def python_function(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) * torch.erf(x) / (1 + x * x)
