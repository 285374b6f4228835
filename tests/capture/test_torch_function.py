"""Functions that hand themselves to a mode run as copies, whose operations the mode sees."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, overrides
from torch.overrides import (
    TorchFunctionMode,
    handle_torch_function,
    has_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from captum_generic_attn.capture.torch_function import bypass_torch_function, dispatches_itself


class Seen(TorchFunctionMode):
    """Keeps the names of the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def asks_by_name(x: Tensor, factor: float = 2.0) -> Tensor:
    if has_torch_function((x,)):
        return handle_torch_function(asks_by_name, (x,), x, factor=factor)
    return torch.mul(x, factor)


def asks_for_one(x: Tensor, factor: float = 2.0) -> Tensor:
    if has_torch_function_unary(x):
        return handle_torch_function(asks_for_one, (x,), x, factor=factor)
    return torch.mul(x, factor)


def asks_for_many(x: Tensor, factor: float = 2.0) -> Tensor:
    if has_torch_function_variadic(x, x):
        return handle_torch_function(asks_for_many, (x,), x, factor=factor)
    return torch.mul(x, factor)


def asks_a_module(x: Tensor, factor: float = 2.0) -> Tensor:
    if overrides.has_torch_function((x,)):
        return overrides.handle_torch_function(asks_a_module, (x,), x, factor=factor)
    return torch.mul(x, factor)


def asks_a_module_in_a_module(x: Tensor, factor: float = 2.0) -> Tensor:
    if torch.overrides.has_torch_function((x,)):
        return torch.overrides.handle_torch_function(
            asks_a_module_in_a_module, (x,), x, factor=factor
        )
    return torch.mul(x, factor)


def asks_functional(x: Tensor, factor: float = 2.0) -> Tensor:
    if F.has_torch_function((x,)):
        return F.handle_torch_function(asks_functional, (x,), x, factor=factor)
    return torch.mul(x, factor)


ASKING = [
    asks_by_name, asks_for_one, asks_for_many, asks_a_module, asks_a_module_in_a_module,
    asks_functional,
]  # fmt: skip


@pytest.mark.parametrize("function", ASKING, ids=lambda function: function.__name__)
def test_twins_run_their_body_under_a_mode(function) -> None:
    x = torch.randn(3)
    with Seen() as alone:
        function(x)
    assert alone.names[0] == function.__name__, "without a twin the mode gets the whole"

    before = dict(function.__globals__)
    with Seen() as seen:
        result = bypass_torch_function(function)(x, factor=3.0)
    assert seen.names == ["mul"]
    assert torch.equal(result, 3 * x)

    with Seen() as after:
        function(x)
    assert after.names[0] == function.__name__, "the function itself is as before"
    assert all(function.__globals__[name] is value for name, value in before.items())
    assert overrides.has_torch_function is has_torch_function


def test_a_twin_is_called_as_its_function() -> None:
    offset = torch.ones(2)

    def function(x: Tensor, scale: float = 2.0, *, shift: float = 0.5) -> Tensor:
        """Its documentation."""
        if has_torch_function((x,)):
            return handle_torch_function(function, (x,), x, scale, shift=shift)
        return x * scale + shift + offset

    twin = bypass_torch_function(function)
    assert twin.__name__ == "function"
    x = torch.randn(2)
    with Seen() as seen:
        assert torch.equal(twin(x), x * 2 + 0.5 + offset)
        assert torch.equal(twin(x, 3.0, shift=1.0), x * 3 + 1 + offset)
        with pytest.raises(TypeError, match="unexpected keyword"):
            twin(x, nothing=1)
    assert "function" not in seen.names


def test_multi_head_attention_of_pytorch_shows_its_inside() -> None:
    module = torch.nn.MultiheadAttention(8, 2).double()
    x = torch.randn(5, 3, 8, dtype=torch.float64)

    def call(function):
        return function(
            x, x, x, 8, 2, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
            module.out_proj.weight, module.out_proj.bias, training=False, need_weights=True,
        )  # fmt: skip

    expected, weights = call(F.multi_head_attention_forward)
    with Seen() as seen:
        ours, our_weights = call(bypass_torch_function(F.multi_head_attention_forward))
    assert torch.equal(ours, expected)
    assert torch.equal(our_weights, weights)
    assert {"linear", "softmax", "bmm"} <= set(seen.names)
    assert "multi_head_attention_forward" not in seen.names


def test_what_needs_a_twin() -> None:
    library = types.FunctionType(asks_by_name.__code__, {"__name__": "torch.nn.functional"})
    library.__module__ = "torch.nn.functional"
    expected = {
        F.multi_head_attention_forward: True,
        asks_by_name: True,
        library: False,
        F.softmax: False,
        torch.matmul: False,
        Tensor.add: False,
        Tensor.shape.__get__: False,
        torch.nn.Identity(): False,
    }
    assert {f: dispatches_itself(f) for f in expected} == expected


def test_libraries_whose_names_begin_like_pytorch_need_one() -> None:
    function = types.FunctionType(asks_by_name.__code__, {})
    function.__module__ = "torchscale.attention"
    assert dispatches_itself(function)
