"""Functions of users: tokens are tracked through them, and probing has no side effects."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.adversarial import Walker, maps, row
from laws.law import check, tokens_of
from laws.law_functions import (
    Flipped,
    InNumpy,
    OtherExample,
    RolledInNumpy,
    Scaled,
    SwapsTwo,
    python_function,
    scripted,
    scripted_flip,
)
from torch import Tensor
from torch.autograd import Function
from zoo import encoder

from captum_generic_attn import GenericAttention, UnsupportedAttentionError
from captum_generic_attn.capture.forward import capture_forward


class Rows(Function):
    """Normalises each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * (x * x).mean(-1, keepdim=True).rsqrt() * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x, weight = (t.detach().requires_grad_() for t in (x, weight))
            out = x * (x * x).mean(-1, keepdim=True).rsqrt() * weight
        one, other = torch.autograd.grad(out, (x, weight), gradient)
        return one, other


class Wider(Function):
    """A linear layer: rows of another size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.mT, None


class OfBoth(Function):
    """Two operands, in numpy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.from_numpy(x.detach().numpy() * y.detach().numpy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return gradient * y, gradient * x


class InPlace(Function):
    """Writes over its operand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


class InPlaceInNumpy(Function):
    """Writes over the memory of its operand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.detach().numpy()[...] *= 3
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


class OneUse(Function):
    """Frees in its backward pass what it saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = [x.detach().cos()]
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.kept.pop()


class Named(Function):
    """Has an attribute, and moves tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.name = "turned round"
        return torch.from_numpy(x.detach().numpy()[:, ::-1].copy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        assert ctx.name == "turned round"
        return gradient.flip(1)


class Deleting(Function):
    """Deletes in its backward pass what it saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach().exp()
        return ctx.kept.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient * ctx.kept
        del ctx.kept
        return gradient


class Refusing(Function):
    """Raises if its backward pass runs twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.used = False
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if ctx.used:
            raise RuntimeError("once is enough")
        ctx.used = True
        return gradient * 2


class Steps(Function):
    """Moves tokens; its gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach().flip(1).round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class HalfSilent(Function):
    """Adds a flipped tensor to another, and has a gradient for one of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, nothing: bool) -> Tensor:
        ctx.nothing = nothing
        return x + y.flip(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return gradient, None if ctx.nothing else torch.zeros_like(gradient), None


class Root(Function):
    """Its derivative at zero is infinite, and zero times infinity is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.detach().sqrt()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / (2 * ctx.saved_tensors[0].sqrt())


@torch.library.custom_op("captum_generic_attn_tests::swish", mutates_args=())
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swish_backward(ctx: Any, gradient: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    gate = torch.sigmoid(x)
    return gradient * (gate + x * gate * (1 - gate))


swish.register_autograd(_swish_backward, setup_context=_keep)


@torch.library.custom_op("captum_generic_attn_tests::scale", mutates_args=())
def scale(x: Tensor, factor: float) -> Tensor:
    return torch.from_numpy(x.detach().numpy() * factor)


scale.register_autograd(
    lambda ctx, gradient: (gradient * ctx.factor, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
)


@torch.library.custom_op("captum_generic_attn_tests::turn", mutates_args=())
def turn(x: Tensor) -> Tensor:
    return x.flip(1).clone()


turn.register_autograd(lambda ctx, gradient: gradient.flip(1))


@torch.jit.script
def scripted_gate(x: Tensor, y: Tensor) -> Tensor:
    return x * torch.sigmoid(y) + y


@torch.jit.script
def scripted_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x.mul_(2).add_(1)
    return x


def by_steps(x: Tensor) -> Tensor:
    return torch.stack([torch.special.entr(t.abs() + 0.1) for t in x.unbind(1)], 1)


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autograd: gate": lambda x, y: Scaled.apply(x),
    "autograd: rows": lambda x, y: Rows.apply(x, torch.ones(x.shape[-1], dtype=x.dtype)),
    "autograd: twice": lambda x, y: Scaled.apply(Scaled.apply(x)),
    "autograd: a root of zero": lambda x, y: Root.apply(x - x.detach()),
    "numpy: square": lambda x, y: InNumpy.apply(x),
    "numpy: of both": OfBoth.apply,
    "numpy: a weight": lambda x, y: Wider.apply(x, torch.ones(x.shape[-1], 7, dtype=x.dtype)),
    "script": lambda x, y: scripted(x),
    "script of both": scripted_gate,
    "script in place": lambda x, y: scripted_in_place(x),
    "operator": lambda x, y: torch.ops.captum_generic_attn_tests.swish(x),
    "operator with a number": lambda x, y: torch.ops.captum_generic_attn_tests.scale(x, 2.0),
    "operator as a function": lambda x, y: swish(x),
    "Python": lambda x, y: python_function(x),
    "Python, token by token": lambda x, y: by_steps(x),
    "Python, under vmap": lambda x, y: torch.vmap(lambda t: torch.special.i1e(t) * t)(x),
    "in place: of a copy": lambda x, y: InPlace.apply(x.clone()),
    "in place: in numpy": lambda x, y: InPlaceInNumpy.apply(x.clone()),
    "in place: by another name": lambda x, y: x.clone().arctan_(),
    "in place: of a result": lambda x, y: (x.tanh() / 2).arcsin_(),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions_of_each_element_or_row_are_followed(name: str) -> None:
    function = ELEMENTWISE[name]
    verdict = check(lambda w, x, y: (t := tokens_of(w, x), function(t, tokens_of(w, y)))[1])
    assert verdict.tracked, verdict.lost
    assert not verdict.breaches


MOVING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autograd: with a name": lambda x, y: Named.apply(x),
    "autograd: flip": lambda x, y: Flipped.apply(x),
    "autograd: flip and add": lambda x, y: x + Flipped.apply(x),
    "autograd: one reads one other": lambda x, y: SwapsTwo.apply(x),
    "numpy: roll": lambda x, y: RolledInNumpy.apply(x),
    "numpy: other example": lambda x, y: OtherExample.apply(x),
    "numpy: added": lambda x, y: y + RolledInNumpy.apply(x),
    "script": lambda x, y: scripted_flip(x),
    "script, then an operation": lambda x, y: F.gelu(scripted_flip(x)),
    "script of a sum": lambda x, y: scripted_flip(x + y),
    "operator": lambda x, y: torch.ops.captum_generic_attn_tests.turn(x),
    "operator added": lambda x, y: x + torch.ops.captum_generic_attn_tests.turn(x),
    "operator as a function": lambda x, y: turn(x) * y,
    "vmap": lambda x, y: torch.vmap(lambda t: t.flip(0))(x),
    "vmap over tokens": lambda x, y: torch.vmap(lambda t: t.roll(1, 0), 1, 1)(x),
    "vmap of a sum": lambda x, y: torch.vmap(lambda t: t + t.sum(0))(x),
}


@pytest.mark.parametrize("name", MOVING)
def test_functions_that_move_or_mix_tokens_lose_them(name: str) -> None:
    function = MOVING[name]
    verdict = check(lambda w, x, y: function(tokens_of(w, x), tokens_of(w, y)))
    assert not verdict.tracked
    assert verdict.lost


SILENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zeros": lambda x, y: Steps.apply(x),
    "zeros for one": lambda x, y: HalfSilent.apply(x, y, False),
    "none for one": lambda x, y: HalfSilent.apply(x, y, True),
}


@pytest.mark.parametrize("name", SILENT)
def test_functions_that_say_nothing_of_an_operand_lose_tokens(name: str) -> None:
    function = SILENT[name]
    verdict = check(lambda w, x, y: function(tokens_of(w, x), tokens_of(w, y)))
    assert not verdict.tracked
    assert "whose inside" in verdict.lost


@pytest.mark.parametrize("function", [Scaled.apply, InNumpy.apply, scripted, swish])
def test_tokens_that_were_lost_before_are_lost_where_they_were(function) -> None:
    verdict = check(lambda w, x, y: function(tokens_of(w, x).cumsum(1)))
    assert verdict.lost == "cumsum"


ONCE = {"a list": OneUse, "deleted": Deleting, "refused": Refusing}


@pytest.mark.parametrize("name", ONCE)
def test_functions_that_run_backward_once_are_lost_by_name(name: str) -> None:
    function = ONCE[name]
    model = Walker(lambda m, x: m.finish(m.encode(function.apply(m.start(x)))))
    with pytest.raises(UnsupportedAttentionError, match=function.__name__):
        GenericAttention(model).attribute(encoder.features(), target=1)


# --- a model with such a function is explained, and nothing is disturbed


def encoded(function: Callable[[Tensor], Tensor]) -> Walker:
    """The function stands before, between and behind the calls."""

    def walk(m: Walker, x: Tensor) -> Tensor:
        x = function(m.start(x))
        x = function(m.blocks[0](x))
        x = m.blocks[1](x)
        return m.head(function(x)[:, 0])

    return Walker(walk)


ONE = {
    "autograd": Scaled.apply, "numpy": InNumpy.apply, "script": scripted, "operator": swish,
    "in place": lambda x: InPlace.apply(x.clone()), "Python": by_steps,
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_models_with_functions_of_users_are_explained(name: str) -> None:
    model = encoded(ONE[name])
    x = encoder.features()
    (ours,) = GenericAttention(model).attribute((x,), target=1, return_input_shape=False)
    expected = row(maps(model, (x,), target=1))
    torch.testing.assert_close(ours, expected.to(ours))


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    **ONE, "numpy, wider": lambda x: Wider.apply(x, torch.ones(4, 4, dtype=x.dtype)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("together", "share"), [(lambda parts: torch.cat(parts, -1), 0.5), (sum, 1.0)]
)
def test_heads_pass_through_functions_of_users(name: str, together, share: float) -> None:
    """Concatenated they are heads of one layer; added they are branches."""

    def walk(m: Walker, x: Tensor) -> Tensor:
        x = m.start(x)
        parts = []
        for part in x.chunk(2, -1):
            head = part[:, None]
            parts.append(HEADS[name](F.scaled_dot_product_attention(head, head, head)[:, 0]))
        return m.head(F.pad(out := together(parts), (0, x.shape[-1] - out.shape[-1]))[:, 0])

    capture = capture_forward(Walker(walk), (encoder.features(),), (), lambda out: out)
    assert [record.head_fraction for record in capture.records] == [share] * 2


@pytest.mark.parametrize("name", ONE)
def test_random_state_is_left_alone(name: str) -> None:
    method = GenericAttention(encoded(ONE[name]))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    method.attribute(encoder.features(), target=1)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert all(np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))


@pytest.mark.parametrize("name", ONE)
def test_gradients_of_inputs_and_parameters_are_left_alone(name: str) -> None:
    model = encoded(ONE[name])
    x = encoder.features().requires_grad_()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    GenericAttention(model).attribute(x, target=1)
    assert x.grad is None
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert bool((model.head.weight.grad == 1).all())


HOOKED = {
    "the operand": lambda function, hook, x: (x.register_hook(hook), function(x))[1],
    "the result": lambda function, hook, x: (y := function(x), y.register_hook(hook))[0],
    "what was before": lambda function, hook, x: (
        y := x * 2, y.register_hook(hook), function(y + 1))[2],
    "the node of the result": lambda function, hook, x: (
        y := function(x), y.grad_fn.register_prehook(lambda g: hook(g[0])))[0],
}  # fmt: skip


@pytest.mark.parametrize("where", HOOKED)
@pytest.mark.parametrize("name", ["autograd", "numpy", "script", "operator"])
def test_hooks_of_users_see_no_probe(name: str, where: str) -> None:
    seen: list[Tensor] = []
    model = encoded(lambda x: HOOKED[where](ONE[name], lambda g: seen.append(g.clone()), x))
    GenericAttention(model).attribute(encoder.features(), target=1)
    ours = len(seen)
    seen.clear()
    known = encoded(lambda x: HOOKED[where](torch.tanh, lambda g: seen.append(g.clone()), x))
    GenericAttention(known).attribute(encoder.features(), target=1)
    assert ours == len(seen) > 0


@pytest.mark.parametrize("name", ["autograd", "numpy", "script"])
def test_hooks_of_modules_see_no_probe(name: str) -> None:
    def seen(function: Callable[[Tensor], Tensor]) -> list[str]:
        found: list[str] = []
        model = encoded(function)
        for i, block in enumerate(model.blocks):
            block.register_full_backward_hook(lambda m, inner, outer, i=i: found.append(f"< {i}"))
            block.register_full_backward_pre_hook(lambda m, outer, i=i: found.append(f"> {i}"))
        GenericAttention(model).attribute(encoder.features(), target=1)
        return found

    assert seen(ONE[name]) == seen(torch.tanh) != []


@pytest.mark.parametrize("name", ["autograd", "numpy", "script"])
def test_retained_gradients_are_those_of_the_score(name: str) -> None:
    kept: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        y = ONE[name](x)
        y.retain_grad()
        kept.append(y)
        return y

    seen: list[Any] = []

    def walk(m: Walker, x: Tensor) -> Tensor:
        start = m.start(x)
        start.retain_grad()
        out = m.finish(m.encode(function(start)))
        seen.extend([kept[-1].grad, start.grad])
        return out

    GenericAttention(Walker(walk)).attribute(encoder.features(), target=1)
    assert seen == [None, None]
