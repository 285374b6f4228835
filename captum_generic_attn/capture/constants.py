"""Runs the operations of a forward pass with the parameters as constants.

Otherwise each linear layer would save its input for the gradient of its weight, which is not
needed. The parameters themselves stay as they are. Parameters that were made under
`torch.inference_mode`, which autograd cannot save, are copied for one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.operations import Family


def require_gradient(tensor: Tensor) -> None:
    """Let the graph begin at a tensor of attention if nothing before it needs a gradient."""
    if torch.is_grad_enabled() and not tensor.requires_grad:
        tensor.requires_grad_(True)


class Constants:
    """Runs operations with detached tensors in place of some parameters, given by their ids."""

    def __init__(self, parameters: Container[int]) -> None:
        self._parameters = parameters
        self._copies: dict[int, Tensor] = {}

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation that writes to none of its arguments."""
        if kwargs:
            kwargs = dict(zip(kwargs, self._replaced(tuple(kwargs.values())), strict=True))
        return func(*self._replaced(args), **kwargs)

    def run_any(
        self, family: Family, func: Callable[..., Any], args: Sequence[Any],
        kwargs: Mapping[str, Any], *, writes: bool,
    ) -> Any:  # fmt: skip
        """Run any operation.

        Args:
            family: of the operation.
            func: the operation.
            args: its arguments.
            kwargs: its keyword arguments.
            writes: whether it writes to its first argument, which it then gets as it is.
        """
        if family is Family.EMBEDDING and torch.is_grad_enabled():
            return func(*map(self._leaf, args), **{k: self._leaf(v) for k, v in kwargs.items()})
        if family is Family.NOTHING:  # may read or set attributes of the parameter itself
            return func(*args, **kwargs)
        if writes:
            return func(*args[:1], *self._replaced(args[1:]), **kwargs)
        return self.run(func, args, kwargs)

    def _replaced(self, values: Sequence[Any]) -> Sequence[Any]:
        constants: list[Any] | None = None
        constant: Any
        for place, value in enumerate(values):
            if id(value) in self._parameters:
                if value.is_inference():
                    constant = self._copied(value)
                elif value.requires_grad:
                    constant = value.detach()
                else:
                    continue
            elif type(value) is list or type(value) is tuple:
                constant = type(value)(self._replaced(value))
            else:
                continue
            if constants is None:
                constants = list(values)
            constants[place] = constant
        return values if constants is None else constants

    def _copied(self, tensor: Tensor) -> Tensor:
        """A normal tensor with the values of an inference tensor, the same for the whole pass."""
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.clone()
        return self._copies[id(tensor)]

    def _leaf(self, value: Any) -> Any:
        """The weight of an embedding as a leaf of the graph.

        The graph cannot begin at integers. It cannot begin at the vectors either: the model may
        write into them, which autograd forbids for leaves.
        """
        if not isinstance(value, Tensor):
            return value
        if value.is_inference():
            value = self._copied(value)
        if value.is_leaf and value.is_floating_point():
            return value.detach().requires_grad_()
        return value
