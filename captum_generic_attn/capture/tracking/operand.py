"""An operand of a mixture: its shape, its abstract value, and how it broadcasts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue
from captum_generic_attn.tokens.spaces import TokenSpaces


class Operand(NamedTuple):
    """What is known of a tensor that enters a mixture; `tensor` is `None` if it is gone."""

    tensor: Tensor | None
    shape: torch.Size
    abstract: AbstractValue

    @property
    def ids(self) -> Tensor:
        """Its token ids, those of its first factor if it has two."""
        return self.abstract.token_ids[0]

    @property
    def differentiable(self) -> bool:
        """Whether a derivative with respect to it exists: not of integers, such as masks."""
        return self.tensor is None or is_value(self.tensor)

    def sizes(self, shape: torch.Size) -> list[int]:
        """Its shape as it broadcasts to `shape`."""
        return [1] * (len(shape) - len(self.shape)) + list(self.shape)

    def token_axes(self, spaces: TokenSpaces, shape: torch.Size) -> frozenset[int]:
        """The axes of `shape` along which its tokens differ within an example."""
        missing = len(shape) - self.ids.ndim
        return frozenset(axis + missing for axis in spaces.token_axes(self.ids))


def is_value(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that a gradient may lead to."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_crosswise(spaces: TokenSpaces, one: Operand, other: Operand, shape: torch.Size) -> bool:
    """Whether each of two operands has tokens along an axis that the other is broadcast over."""
    sizes = one.sizes(shape), other.sizes(shape)
    return any(sizes[1][axis] == 1 for axis in one.token_axes(spaces, shape)) and any(
        sizes[0][axis] == 1 for axis in other.token_axes(spaces, shape)
    )
