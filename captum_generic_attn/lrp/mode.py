"""The function mode under which the backward pass of a model propagates relevance.

Every operation of the forward pass computes its usual result; its backward is a rule of a
`RuleSet`. `capture` enters this mode beneath its own, so the mode sees single operations, with
parameters as constants and attention in elementary operations. The model is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_generic_attn.capture.tracking.operations import argument, canonical, tensors_in
from captum_generic_attn.errors import UnsupportedOperationError
from captum_generic_attn.lrp.choice import Args, Choice, Kwargs, Rule, Tokens, without_aliasing
from captum_generic_attn.lrp.operations import Kind, kind_of
from captum_generic_attn.lrp.rule_sets import RuleSet
from captum_generic_attn.lrp.rules import per_unit
from captum_generic_attn.lrp.signs import Passage, passage

_REFUSAL = (
    "{} has no relevance rule: write that step with other operations, or use a method that needs "
    "none (GenericAttention without lrp=True)"
)


Note = Callable[[Tensor, Sequence[Tensor | None]], None]
"""Called with the relevance of an operation's result and the relevance of each operand."""


class _Propagated(torch.autograd.Function):
    """An operation whose backward is a relevance rule, computed in float32 or float64."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[], Tensor], rule: Rule, passage: Passage, note: Note | None,
        *operands: Tensor,
    ) -> Tensor:  # fmt: skip
        result = run()
        if any(result is operand for operand in operands):
            result = result.clone()
        ctx.rule = rule
        ctx.passage = passage
        ctx.note = note
        ctx.save_for_backward(*operands, result)
        return result

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> Any:
        saved = (
            ctx.saved_tensors
        )  # checkpointing may rerun a part of the model here, under the modes
        with torch._C.DisableTorchFunction(), torch.no_grad():  # noqa: SLF001
            dtype = torch.float64 if saved[-1].dtype == torch.float64 else torch.float32
            *operands, result, given = (
                t.detach().to(dtype) if t.is_floating_point() else t.detach()
                for t in (*saved, relevance[0])
            )
            found = ctx.rule(operands, result, given)
            if ctx.note is not None:
                ctx.note(given, found)
            handed = [
                None if r is None else r.to(t.dtype) for r, t in zip(found, saved, strict=False)
            ]
            return None, None, None, None, *handed


class RelevanceMode(TorchFunctionMode):
    """Replaces the backward of every operation of this thread by a relevance rule."""

    def __init__(
        self, rules: RuleSet, tokens: Tokens, leaks: dict[str, float] | None = None
    ) -> None:
        """Apply `rules`; `leaks` collects, by operation, the relevance that is not propagated."""
        super().__init__()
        self._leaks = leaks
        self._rules = rules
        self._tokens = tokens
        self._choice = Choice(rules, tokens)
        self._used: dict[int, Used] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Args = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """Run one operation, and give its result the backward of its rule."""
        kwargs = kwargs or {}
        name, in_place = canonical(func)
        kind = kind_of(name)
        if kind is Kind.NOTHING or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if kind is Kind.STATISTIC:
            with torch.no_grad():
                return func(*args, **kwargs)
        if kind is Kind.EMBEDDED:
            return self._embedded(func, args, kwargs)
        carrying = [t for t in tensors_in((args, kwargs)) if self._choice.carries(t)]
        if not carrying:
            return func(*args, **kwargs)
        if kind is Kind.UNKNOWN:
            return self._without_rule(name, func, args, kwargs)
        for tensor in carrying:
            self._note_use(tensor)
        if kind in (Kind.MOVED, Kind.PICKED):
            return self._moved(kind, name, func, args, kwargs)
        if in_place:  # the rule needs the values before the write
            target = args[0]
            before = target.clone()
            if id(target) not in map(id, carrying):
                before = before.detach()
            target.copy_(self._run(kind, name, func, (before, *args[1:]), kwargs))
            return target
        return self._run(kind, name, func, args, kwargs)

    def _moved(
        self, kind: Kind, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        """Run an operation that moves elements: autograd's own backward returns their relevance."""
        result = func(*args, **kwargs)
        one = kind is Kind.PICKED or (name == "getitem" and _is_one(args[1]))
        if one and self._rules.divided_copies and result.grad_fn is not None:
            result.register_hook(partial(_divided, result.detach()))
        return result

    def _note_use(self, tensor: Tensor) -> None:
        """Count a use of a tensor; a tensor with several uses receives `x · R / x`."""
        if not self._rules.divided_copies:
            return
        known = self._used.get(id(tensor))
        if known is None or known.tensor() is not tensor:
            known = self._used[id(tensor)] = Used(tensor)
        known.times += 1

    def _run(
        self, kind: Kind, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        operands = [t for t in tensors_in((args, kwargs)) if self._choice.carries(t)]
        if kind is Kind.SOFTMAX and self._rules.softmax == "constant":
            with torch.no_grad():
                return func(*args, **kwargs)
        rule = self._choice.of(kind, name, func, args, kwargs, operands)
        if rule is None:
            raise UnsupportedOperationError(_REFUSAL.format(name))
        rule_of, on = rule

        def run() -> Tensor:
            found: Tensor = func(*without_aliasing(func, args), **kwargs)
            return found

        sign = passage(kind, name, func, args, kwargs, operands)
        note = None if self._leaks is None else partial(self._leaked, name)
        return _Propagated.apply(run, rule_of, sign, note, *on)

    def _leaked(self, name: str, given: Tensor, found: Sequence[Tensor | None]) -> None:
        """Add to `leaks` the relevance that an operation did not propagate, with its sign."""
        assert self._leaks is not None  # noqa: S101 - the caller has checked
        handed = sum(float(r.double().sum()) for r in found if r is not None)
        left = float(given.double().sum()) - handed
        self._leaks[name] = self._leaks.get(name, 0.0) + left

    def _without_rule(self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Run an operation without a kind: it may query its operands, but not compute with them."""
        result = func(*args, **kwargs)
        if any(tensor.requires_grad for tensor in tensors_in(result)):
            raise UnsupportedOperationError(_REFUSAL.format(name))
        return result

    # -- where relevance ends, and tensors with several uses -----------------------------------

    def _embedded(self, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Tensor:
        """Embed integers of an input: relevance ends at their embedding vectors."""
        with torch.no_grad():
            result: Tensor = func(*args, **kwargs)
        if not self._tokens.is_data(argument(args, kwargs, 0, "input")):
            return result
        return result.requires_grad_().clone()  # not a leaf, since the model may write to it


class Used:
    """Counts the uses of a tensor; with several, its relevance is divided by its values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = ref(tensor)
        self.times = 0
        hook = partial(self._handed_back, tensor.detach())
        tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def _handed_back(self, value: Tensor, relevance: Tensor) -> Tensor:
        return _divided(value, relevance) if self.times > 1 else relevance


def _divided(value: Tensor, relevance: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction(), torch.no_grad():  # noqa: SLF001
        return value * per_unit(relevance, value)


def _is_one(index: object) -> bool:
    """Whether an index selects a single element along some axis."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(type(part) is int for part in parts)
