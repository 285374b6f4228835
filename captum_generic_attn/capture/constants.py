"""Parameters taken as constants: what the operations of a forward pass are run on.

Without this each linear layer would keep its input for the gradient of its weight, which nobody
asks for. The parameters themselves are left alone: `mode` and `attention` run every operation
through one `Constants`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.capture.operations import Family


class Constants:
    """Runs operations with constants in place of the parameters whose ids it is given."""

    def __init__(self, parameters: Container[int]) -> None:
        self._parameters = parameters

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
            return func(*map(_began, args), **{key: _began(kwargs[key]) for key in kwargs})
        if family is Family.NOTHING:  # asks the parameter itself, or tells it something
            return func(*args, **kwargs)
        if writes:
            return func(*args[:1], *self._replaced(args[1:]), **kwargs)
        return self.run(func, args, kwargs)

    def _replaced(self, values: Sequence[Any]) -> Sequence[Any]:
        constants: list[Any] | None = None
        for place, value in enumerate(values):
            if id(value) in self._parameters:
                if not value.requires_grad:
                    continue
                constant = value.detach()
            elif type(value) is list or type(value) is tuple:
                constant = type(value)(self._replaced(value))
            else:
                continue
            if constants is None:
                constants = list(values)
            constants[place] = constant
        return values if constants is None else constants


def _began(value: Any) -> Any:
    """The weight of an embedding as where a graph begins.

    Integers lead no gradient to what was made of them, and a result that is a leaf itself could not
    be written to by the model.
    """
    if isinstance(value, Tensor) and value.is_leaf and value.is_floating_point():
        return value.detach().requires_grad_()
    return value
