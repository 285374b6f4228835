"""Which module of the model is running: hooks on modules keep the stack of running modules.

The hooks return nothing, so they change nothing, and they are removed with the `with` block. Calls
from other threads are not seen.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

_CALLABLE = (nn.Module, functools.partial, types.MethodType, types.FunctionType)
"""What may be, or call, a module."""
_PASSIVE = (nn.Softmax, nn.Dropout, nn.Identity)
"""Modules that count as a part of the module that calls them."""


def modules_of(forward_func: object) -> dict[str, nn.Module]:
    """The outermost modules behind a forward function, by name.

    A module, a bound method of one or a `functools.partial` of either has one module, named `""`.
    A closure may have several, which have the names of its variables; one alone is named `""`.

    Example:
        >>> head = nn.Linear(2, 1)
        >>> list(modules_of(head)), list(modules_of(lambda x: head(x)))
        ([''], [''])
    """
    found: dict[str, nn.Module] = {}
    for name, value in _reachable(forward_func, depth=0):
        if not any(value is known for known in found.values()):
            found[name] = value
    if len(found) == 1:
        return {"": next(iter(found.values()))}
    inner = {id(m) for root in found.values() for m in root.modules() if m is not root}
    found = {name: module for name, module in found.items() if id(module) not in inner}
    return {"": next(iter(found.values()))} if len(found) == 1 else found


def _reachable(value: object, depth: int, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that a value is, is bound to, or has in its variables, each with a name."""
    if isinstance(value, nn.Module):
        original = getattr(value, "_orig_mod", None)  # torch.compile wraps
        yield name, original if isinstance(original, nn.Module) else value
        return
    if depth > 3:
        return
    if isinstance(value, functools.partial):
        for i, item in enumerate((value.func, *value.args, *value.keywords.values())):
            yield from _reachable(item, depth + 1, name or (f"partial{i}" if i else ""))
        return
    owner = getattr(value, "__self__", None)
    if owner is not None and not isinstance(owner, (types.ModuleType, type)):
        yield from _reachable(owner, depth + 1, name)
    for variable, content in _variables(value, depth):
        if isinstance(content, _CALLABLE):
            yield from _reachable(content, depth + 1, variable)


def _variables(value: object, depth: int) -> Iterator[tuple[str, object]]:
    """The variables that a function reads, or the attributes of an object that is called."""
    function = getattr(value, "__func__", value)
    if isinstance(function, types.FunctionType):
        function = getattr(function, "_torchdynamo_orig_callable", function)
        function = getattr(function, "__wrapped__", function)
    if isinstance(function, types.FunctionType):
        code = function.__code__
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                yield variable, cell.cell_contents
        for variable in code.co_names:
            if variable in function.__globals__:
                yield variable, function.__globals__[variable]
    elif depth == 0 and hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
        yield from vars(value).items()


def _is_block(module: nn.Module) -> bool:
    """Whether a module is PyTorch's own and has no other inside, as a linear layer or a norm.

    Such a module calls no attention and stores no tensors.
    """
    return type(module).__module__.startswith("torch.nn.modules") and not module._modules  # noqa: SLF001


def qualified(prefix: str, name: str) -> str:
    """`prefix.name`, either of which may be empty.

    Example:
        >>> qualified("encoder", "norm"), qualified("", "norm")
        ('encoder.norm', 'norm')
    """
    return f"{prefix}.{name}" if prefix and name else prefix or name


class Scope:
    """A context that knows which module is running.

    If no module is found behind the forward function, the names start at the outermost module that
    runs. A global hook of PyTorch tells, which ignores other threads.

    Attributes:
        modules: the modules that are known, by their qualified names.
        parameters: the names of parameters and buffers, by the ids of the tensors.
    """

    def __init__(self, roots: dict[str, nn.Module]) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.parameters: dict[int, str] = {}
        self._names: dict[int, str] = {}
        self._own: list[tuple[str, nn.Module]] = []  # without the single modules of PyTorch
        self._stack: list[tuple[str, nn.Module]] = []
        self._handles: list[RemovableHandle] = []
        self._thread = threading.get_ident()
        self._kept: list[Any] = []  # keeps tensors alive, so that no other gets their id
        self._roots = roots
        for prefix, root in roots.items():
            self._learn(prefix, root)

    def _learn(self, prefix: str, root: nn.Module) -> None:
        self._kept.append(root)
        waiting = [(prefix, root)]
        while waiting:  # in the order of `named_modules`, which is slower
            name, module = waiting.pop()
            if id(module) in self._names:
                continue
            self._names[id(module)] = name
            self.modules.setdefault(name, module)
            if not _is_block(module):
                self._own.append((name, module))
            for tensors in (module._parameters, module._buffers):  # noqa: SLF001
                for own, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in self.parameters:
                        self.parameters[id(tensor)] = qualified(name, own)
                        self._kept.append(tensor)
            inside = [(qualified(name, n), m) for n, m in module._modules.items() if m is not None]  # noqa: SLF001
            waiting += reversed(inside)

    def __enter__(self) -> Scope:  # noqa: PYI034 - Self needs Python 3.11
        try:
            if not self._roots:
                self._handles.append(register_module_forward_pre_hook(self._enter))
                self._handles.append(register_module_forward_hook(self._leave, always_call=True))
            for _, module in self._own:
                if not isinstance(module, torch.jit.ScriptModule):
                    self._handles.append(module.register_forward_pre_hook(self._enter))
                    self._handles.append(
                        module.register_forward_hook(self._leave, always_call=True)
                    )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, module: nn.Module, _args: object) -> None:
        if threading.get_ident() != self._thread:
            return
        if not self._stack and id(module) not in self._names:
            self._learn("", module)
        self._stack.append((self._names.get(id(module), type(module).__name__), module))

    def _leave(self, module: nn.Module, _args: object, _output: object) -> None:
        if threading.get_ident() == self._thread:
            while self._stack and self._stack.pop()[1] is not module:
                pass

    @contextlib.contextmanager
    def keeping_state(self) -> Iterator[None]:
        """Detach the tensors that the model stores on its modules meanwhile.

        A model may store them under `torch.no_grad`, which the capture switches off.
        """
        before = {id(t) for _, _, t in self._stored() if t.grad_fn is not None}
        try:
            yield
        finally:
            for holder, name, tensor in self._stored():
                if tensor.grad_fn is not None and id(tensor) not in before:
                    holder[name] = tensor.detach()

    def _stored(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        return [
            (holder, name, value)
            for _, module in self._own
            for holder in (module._buffers, vars(module))  # noqa: SLF001
            for name, value in holder.items()
            if isinstance(value, Tensor)
        ]

    def name_of(self, module: nn.Module) -> tuple[str, str]:
        """Name and type of a module."""
        return self._names.get(id(module), ""), type(module).__name__

    def current(self) -> tuple[str, str]:
        """Name and type of the running module; of its owner, for a softmax or dropout module."""
        for name, module in reversed(self._stack):
            if not isinstance(module, _PASSIVE):
                return name, type(module).__name__
        return "", "function"

    def scripted_attention(self) -> list[str]:
        """Names of scripted or traced modules that contain a softmax, which no hook sees."""
        found = []
        for name, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                text = str(getattr(module, "inlined_graph", ""))
                if "softmax" in text or "scaled_dot_product" in text:
                    found.append(name or type(module).__name__)
        return found

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers of the modules that are known."""
        return (kept for kept in self._kept if isinstance(kept, Tensor))


def signature_of(forward_func: Callable[..., Any]) -> Callable[..., Any]:
    """The function whose signature names the arguments: the `forward` of a module."""
    if isinstance(forward_func, nn.Module):
        original = getattr(forward_func, "_orig_mod", forward_func)
        return cast(Callable[..., Any], original.forward)
    return forward_func
