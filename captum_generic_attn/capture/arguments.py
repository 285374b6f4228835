"""The arguments of the forward pass: their names, their device, and the tensors the model gets."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.capture.scope import Scope, signature_of
from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.tracker import TokenTracker


def argument_names(forward_func: Callable[..., Any], count: int) -> list[str]:
    """The names of the first arguments of a function; `input3` where its signature has none.

    Example:
        >>> argument_names(lambda pixels, *others: pixels, 3)
        ['pixels', 'input1', 'input2']
    """
    names: list[str] = []
    with contextlib.suppress(TypeError, ValueError):
        for parameter in inspect.signature(signature_of(forward_func)).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
            else:
                break
    return [*names[:count], *(f"input{i}" for i in range(len(names), count))]


def check_devices(scope: Scope, arguments: dict[str, Any]) -> None:
    """See that inputs and model are on one device, unless the model is spread over several.

    Raises:
        ValueError: if they are not, or if a tensor holds no values (device "meta").
    """
    tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
    devices = set(map(str, {tensor.device for tensor in scope.tensors()}))
    places = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(devices) == 1:
        places["the model"] = devices.pop()
    if len(devices) > 1 and "meta" not in places.values():
        return
    if len(set(places.values())) > 1 or "meta" in places.values():
        listed = ", ".join(f"{name} is on {device}" for name, device in places.items())
        raise ValueError(f"{listed}: move the inputs and the model to one device that holds values")


class Arguments:
    """Makes what the model gets: aliases of the user's tensors, whose tokens are tracked."""

    def __init__(self, tracker: TokenTracker, examples: int) -> None:
        self._tracker = tracker
        self._examples = examples
        self._aliases: dict[int, Tensor] = {}

    def alias(self, value: object, name: str, *, explained: bool) -> Any:
        """An argument as the model gets it. One tensor that is passed twice has one alias.

        A tensor of another batch size is shared by all examples (position ids, the texts of a
        zero-shot classifier): its tokens carry no batch index.

        Args:
            value: the argument.
            name: of its tokens.
            explained: whether it is an input, so that the graph begins there.
        """
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(
                self.alias(item, f"{name}[{i}]", explained=False) for i, item in enumerate(value)
            )
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._aliases:
            alias = self._aliases[id(value)] = _alias(value, explained=explained)
            if alias.ndim > 0 and alias.dtype != torch.bool:
                shared = len(alias) != self._examples
                ids = self._tracker.spaces.of_input(name, alias.shape, shared=shared)
                self._tracker.abstract_values[alias] = AbstractValue(
                    Role.RAW, (ids,), data=not shared
                )
        return self._aliases[id(value)]


def _alias(value: Tensor, *, explained: bool) -> Tensor:
    if not explained:
        return value.clone() if value.is_inference() else value.view_as(value)
    leaf = value.detach().clone() if value.is_inference() else value.detach()
    # A copy that is no leaf: the model may write into what it is given.
    return leaf.requires_grad_(leaf.is_floating_point()).clone()
