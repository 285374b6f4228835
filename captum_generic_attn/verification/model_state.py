"""Check of traces: the model and the process are left as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from captum_generic_attn.capture.scope import modules_of
from captum_generic_attn.verification.report import Check, listed

State = dict[str, object]


def state_of(forward_func: Callable[..., Any]) -> State:
    """All that a method must leave as it was, under names that a report can show."""
    found: State = {
        "random state": torch.get_rng_state().tolist(),
        "function modes": torch._C._len_torch_function_stack(),  # noqa: SLF001
        "gradients enabled": torch.is_grad_enabled(),
    }
    for name, module in _modules(forward_func):
        whole = name or "the model"
        found[f"hooks of {whole}"] = {
            key: len(value)
            for key, value in vars(module).items()
            if "hooks" in key and isinstance(value, dict)
        }
        found[f"training flag of {whole}"] = module.training
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:  # noqa: SLF001
            if tensor is not None:
                found.update(_state_of_tensor(f"{name}.{own}".strip("."), tensor))
    return found


def _modules(forward_func: Callable[..., Any]) -> Iterator[tuple[str, nn.Module]]:
    for root, outer in modules_of(forward_func).items():
        for name, module in outer.named_modules():
            yield f"{root}.{name}".strip("."), module


def _state_of_tensor(name: str, tensor: Tensor) -> State:
    state: State = {
        f"{name} itself": (id(tensor), tensor.requires_grad),
        f"numbers of {name}": -1 if tensor.is_inference() else tensor._version,  # noqa: SLF001
    }
    if tensor.is_leaf:
        state[f"gradient of {name}"] = id(tensor.grad) if tensor.grad is not None else 0
    return state


def check_traces(before: State, after: State) -> Check:
    """Whether two states are the same."""
    changed = {k: None for k in {**before, **after} if before.get(k) != after.get(k)}
    if changed:
        return Check("traces", "failed", f"changed: {listed(changed)}", 1)
    found = "hooks, flags, gradients, numbers and random state are as they were"
    return Check("traces", "passed", found, 1)
