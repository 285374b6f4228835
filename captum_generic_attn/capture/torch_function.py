"""Runs the body of Python functions that follow the `__torch_function__` protocol.

`F.multi_head_attention_forward` (and its copies in old model code) first calls
`has_torch_function(...)`. Under a function mode the answer is True, and the function hands itself
to the mode as one call, so the mode would not see its operations. `bypass_torch_function` returns a
copy of such a function for which the answer is always False. Nothing global is changed.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _no(*_: object) -> bool:
    return False


class _Answering:
    """A module as the copy sees it: its `has_torch_function` returns False."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name in _QUESTIONS:
            return _no
        value = getattr(self._module, name)
        return _Answering(value) if isinstance(value, types.ModuleType) else value


def bypass_torch_function(function: types.FunctionType) -> Callable[..., Any]:
    """A copy of `function` that runs its body under a function mode."""
    names = function.__code__.co_names
    scope = dict(function.__globals__)
    scope.update(dict.fromkeys(_QUESTIONS, _no))
    if any(question in names for question in _QUESTIONS):
        for name in names:  # `F.has_torch_function(...)`, `torch.overrides.has_torch_function(...)`
            if isinstance(scope.get(name), types.ModuleType):
                scope[name] = _Answering(scope[name])
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def dispatches_itself(function: object) -> bool:
    """Whether a function that a mode sees is Python code that may call attention."""
    if not isinstance(function, types.FunctionType):
        return False
    module = function.__module__ or ""
    library = module.split(".")[0] == "torch"
    return not library or function.__name__ == "multi_head_attention_forward"
