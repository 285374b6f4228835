"""Parameters taken as constants: what the operations of a forward pass are run on.

Without this each linear layer would keep its input for the gradient of its weight, which nobody
asks for. The parameters themselves are left alone: `mode` and `attention` run every operation
through one `Constants`. Parameters of a model that was built under `torch.inference_mode`, which
autograd cannot keep, are copied for the time of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.operations import Family


class Constants:
    """Runs operations with constants in place of the parameters whose ids it is given."""

    def __init__(self, parameters: Container[int]) -> None:
        self._parameters = parameters
        self._copies: dict[int, Tensor] = {}

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation that only reads."""
        if kwargs:
            kwargs = dict(zip(kwargs, self._replaced(tuple(kwargs.values())), strict=True))
        return func(*self._replaced(args), **kwargs)

    def run_any(
        self, family: Family, func: Callable[..., Any], args: Sequence[Any],
        kwargs: Mapping[str, Any], *, writes: bool,
    ) -> Any:  # fmt: skip
        """Run an operation; one that `writes` does so to its first argument itself."""
        if family is Family.EMBEDDING and torch.is_grad_enabled():
            return func(*map(self._began, args), **{k: self._began(v) for k, v in kwargs.items()})
        if family is Family.NOTHING:  # asks the parameter itself, or tells it something
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
        """An ordinary tensor of the values of an inference tensor, one for the whole pass."""
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.clone()
        return self._copies[id(tensor)]

    def _began(self, value: Any) -> Any:
        """The weight of an embedding as where a graph begins.

        Integers lead no gradient to what was made of them, and a result that is a leaf itself could
        not be written to by the model.
        """
        if not isinstance(value, Tensor):
            return value
        if value.is_inference():
            value = self._copied(value)
        if value.is_leaf and value.is_floating_point():
            return value.detach().requires_grad_()
        return value
