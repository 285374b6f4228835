"""Opens Python functions that hand themselves to a function mode as one opaque call.

`F.multi_head_attention_forward` (and copies of it in old model code) asks
`has_torch_function(...)` first and, under a mode, calls the mode with itself instead of running.
What it does inside would stay invisible. `undispatched` returns a twin whose question is always
answered with no; nothing global is changed.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _no(*_: object) -> bool:
    return False


class _Answering:
    """A module as the twin sees it: the same names, but the questions are answered with no."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name in _QUESTIONS:
            return _no
        value = getattr(self._module, name)
        return _Answering(value) if isinstance(value, types.ModuleType) else value


def undispatched(function: types.FunctionType) -> Callable[..., Any]:
    """A twin of `function` that runs its body under a function mode."""
    names = function.__code__.co_names
    scope = dict(function.__globals__)
    scope.update(dict.fromkeys(_QUESTIONS, _no))
    if any(question in names for question in _QUESTIONS):
        for name in names:  # `F.has_torch_function(...)`, `torch.overrides.has_torch_function(...)`
            if isinstance(scope.get(name), types.ModuleType):
                scope[name] = _Answering(scope[name])
    twin = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def dispatches_itself(function: object) -> bool:
    """Whether a function seen by a mode is Python code that may hide attention inside."""
    if not isinstance(function, types.FunctionType):
        return False
    module = function.__module__ or ""
    library = module.split(".")[0] == "torch"
    return not library or function.__name__ == "multi_head_attention_forward"
