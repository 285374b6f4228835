"""The function mode under which the backward pass of a model propagates relevance.

Every operation of the forward pass computes what it always does, and gets the backward of a rule
of a `RuleSet`. `capture` enters it beneath its own mode, so it sees each operation alone, with
parameters as constants and attention written out; the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_generic_attn.capture import contraction
from captum_generic_attn.capture.operations import argument, canonical, tensors_in
from captum_generic_attn.lrp.norms import frozen
from captum_generic_attn.lrp.operations import Kind, kind_of
from captum_generic_attn.lrp.rule_sets import RuleSet
from captum_generic_attn.lrp.rules import (
    Apply,
    Epsilon,
    Examples,
    JointRule,
    Step,
    per_unit,
    shares,
)

Args = Sequence[Any]
Kwargs = Mapping[str, Any]
Rule = Callable[[Sequence[Tensor], Tensor, Tensor], Sequence[Tensor | None]]
"""From operands, result and the result's relevance to the relevance of each operand."""


_REFUSAL = (
    "{} has no relevance rule: write that step with other operations, or use a method that needs "
    "none (GenericAttention without lrp=True)"
)


class UnsupportedOperationError(ValueError):
    """An operation of the model has no relevance rule; the message names it.

    Example:
        >>> import torch
        >>> from captum_generic_attn import Lrp
        >>> model = lambda x: torch.linalg.inv(x)[:, 0]
        >>> try:
        ...     Lrp(model).attribute(torch.eye(2)[None], target=0)
        ... except UnsupportedOperationError as error:
        ...     print(str(error).split(":")[0])
        linalg_inv has no relevance rule
    """


class Tokens(Protocol):
    """What the capture knows of a tensor."""

    def is_data(self, tensor: Tensor) -> bool:
        """Whether any of it comes from an input."""
        ...

    def is_input(self, tensor: Tensor) -> bool:
        """Whether it consists of elements of an input, no tokens yet."""
        ...

    def is_computed(self, tensor: Tensor) -> bool:
        """Whether the model computed it of tokens, be they parameters: it is no weight."""
        ...

    def is_logits(self, tensor: Tensor) -> bool:
        """Whether it holds products of queries and keys."""
        ...

    def examples_of(self, tensor: Tensor) -> Examples:
        """Whose its elements are."""
        ...

    def is_probabilities(self, tensor: Tensor) -> bool:
        """Whether it holds attention probabilities."""
        ...


class _Propagated(torch.autograd.Function):
    """One operation whose backward is a rule."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], Tensor], rule: Rule, *operands: Tensor) -> Tensor:
        result = run()
        if any(result is operand for operand in operands):
            result = result.clone()
        ctx.rule = rule
        ctx.save_for_backward(*operands, result)
        return result

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> Any:
        saved = ctx.saved_tensors  # may run a piece of the model again, under the modes
        with torch._C.DisableTorchFunction(), torch.no_grad():  # noqa: SLF001
            *operands, result = (tensor.detach() for tensor in saved)
            return None, None, *ctx.rule(operands, result, relevance[0])


class RelevanceMode(TorchFunctionMode):
    """Gives every operation of this thread the backward of a relevance rule."""

    def __init__(self, rules: RuleSet, tokens: Tokens) -> None:
        super().__init__()
        self._rules = rules
        self._tokens = tokens
        self._used: dict[int, Used] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Args = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """Run one operation."""
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
        carrying = [t for t in tensors_in((args, kwargs)) if self._carries(t)]
        if not carrying:
            return func(*args, **kwargs)
        if kind is Kind.UNKNOWN:
            return self._without_rule(name, func, args, kwargs)
        for tensor in carrying:
            self._note_use(tensor)
        if kind in (Kind.MOVED, Kind.PICKED):
            return self._moved(kind, name, func, args, kwargs)
        if in_place:  # the rule needs what was there before
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
        """Autograd itself hands back what was moved."""
        result = func(*args, **kwargs)
        one = kind is Kind.PICKED or (name == "getitem" and _is_one(args[1]))
        if one and self._rules.divided_copies and result.grad_fn is not None:
            result.register_hook(partial(_divided, result.detach()))
        return result

    def _note_use(self, tensor: Tensor) -> None:
        """Note that an operation uses a tensor: several hand back `x · R / x`."""
        if not self._rules.divided_copies:
            return
        known = self._used.get(id(tensor))
        if known is None or known.tensor() is not tensor:
            known = self._used[id(tensor)] = Used(tensor)
        known.times += 1

    def _carries(self, tensor: Tensor) -> bool:
        if not tensor.requires_grad:
            return False
        return self._rules.softmax == "passed" or not self._tokens.is_probabilities(tensor)

    def _run(
        self, kind: Kind, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        operands = [t for t in tensors_in((args, kwargs)) if self._carries(t)]
        if kind is Kind.SOFTMAX and self._rules.softmax == "constant":
            with torch.no_grad():
                return func(*args, **kwargs)
        rule = self._rule(kind, name, func, args, kwargs, operands)
        if rule is None:
            raise UnsupportedOperationError(_REFUSAL.format(name))
        rule_of, on = rule

        def run() -> Tensor:
            found: Tensor = func(*_without_aliasing(func, args), **kwargs)
            return found

        return _Propagated.apply(run, rule_of, *on)

    def _without_rule(self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Run an operation that no list knows: it may only ask, not compute with its operands."""
        result = func(*args, **kwargs)
        if any(tensor.requires_grad for tensor in tensors_in(result)):
            raise UnsupportedOperationError(_REFUSAL.format(name))
        return result

    # -- rules ---------------------------------------------------------------------------------

    def _rule(
        self, kind: Kind, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        operands: Sequence[Tensor],
    ) -> tuple[Rule, Sequence[Tensor]] | None:  # fmt: skip
        """The rule of an operation, and the tensors that it is to be given."""
        rules = self._rules
        if kind is Kind.NORM and rules.norm == "frozen":
            linear = frozen(name, args, kwargs)
            if linear is None:
                return None
            return _of_one(lambda x, y, r: shares(linear, [x], per_unit(r, y, 0.0))[0]), operands[
                :1
            ]
        if kind in (Kind.PASSED, Kind.NORM, Kind.SOFTMAX):
            return (_of_one(_as_it_is), operands) if len(operands) == 1 else None
        if kind is Kind.GATED:
            axis = argument(args, kwargs, 1, "dim", -1)
            gated = _of_one(lambda _x, _y, r: torch.cat([r, torch.zeros_like(r)], axis))
            return gated, operands
        if kind is Kind.WEIGHTED:
            return self._weighted(name, func, args, kwargs)
        if kind is Kind.PRODUCT:
            return self._product(name, args, kwargs)
        return self._elementwise(kind, func, args, kwargs, operands)

    def _weighted(
        self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> tuple[Rule, Sequence[Tensor]] | None:
        x, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
        others = {
            key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")
        }
        rest = args[3:]

        def apply(x: Tensor, weight: Tensor) -> Tensor:
            found: Tensor = func(x, weight, None, *rest, **others)
            return found

        if not self._carries(x):
            return None
        if self._carries(weight):
            joint = self._rules.product
            return self._joint(joint, apply, x), (x, weight)
        first = "conv" in name and self._tokens.is_input(x)
        rule = self._rules.patches if first else self._rules.linear
        examples = self._tokens.examples_of(x)
        return (lambda on, y, r: (rule(Step(apply, y, r, examples), on[0], on[1]), None)), (
            x,
            weight,
        )

    def _product(
        self, name: str, args: Args, kwargs: Kwargs
    ) -> tuple[Rule, Sequence[Tensor]] | None:
        terms = contraction.read(name, args, kwargs)
        if terms is None or (terms.bias is not None and self._carries(terms.bias)):
            return None
        equation = _equation(terms)

        def apply(left: Tensor, right: Tensor) -> Tensor:
            found: Tensor = torch.einsum(equation, left, right)
            return found

        factors = terms.left, terms.right
        carrying = [self._carries(factor) for factor in factors]
        side = carrying.index(True)
        constant = factors[1 - side]
        weighted = self._rules.linear
        if self._rules.softmax == "constant" and self._tokens.is_probabilities(constant):
            weighted = Epsilon(0.0)  # no weights of a layer: positive, and rows that sum to 1
        elif (
            all(carrying)
            or self._tokens.is_computed(constant)
            or self._tokens.is_probabilities(factors[side])
        ):
            joint = self._rules.product
            return self._joint(joint, apply, factors[side]), factors

        examples = self._tokens.examples_of(factors[side])

        def of_weight(on: Sequence[Tensor], y: Tensor, r: Tensor) -> Sequence[Tensor | None]:
            def ordered(x: Tensor, weight: Tensor) -> Tensor:
                return apply(x, weight) if side == 0 else apply(weight, x)

            found = weighted(Step(ordered, y, r, examples), on[side], on[1 - side])
            return (found, None) if side == 0 else (None, found)

        return of_weight, factors

    def _elementwise(
        self, kind: Kind, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        operands: Sequence[Tensor],
    ) -> tuple[Rule, Sequence[Tensor]] | None:  # fmt: skip
        """Sums, products and quotients of elements, and pooling."""
        rules = self._rules
        if kind is Kind.POOLED:
            pooled = _rebound(func, args, kwargs, operands)
            return self._joint(rules.pooling, pooled, operands[0]), operands
        if kind is Kind.DIVIDED:
            above = [t for t in operands if t is args[0]]
            return _of_one(_summed), (above or operands)[:1]
        joint = {Kind.ADDED: rules.addition, Kind.MULTIPLIED: rules.product}.get(kind)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if joint is None or len(tensors) > 2:
            return None
        alone = len(operands) == 1
        if alone and len(tensors) > 1 and kind is Kind.ADDED:
            masks = self._tokens.is_logits(operands[0])
            alone = rules.masks == "passed" if masks else rules.inert
        if alone:
            place = next(i for i, tensor in enumerate(tensors) if tensor is operands[0])
            # All are kept: what a checkpoint computes anew must not depend on what was known then.
            return partial(_to_one, place), tensors
        both = _rebound(func, args, kwargs, tensors)
        return self._joint(joint, both, operands[0]), tensors

    def _joint(self, rule: JointRule, apply: Apply, operand: Tensor) -> Rule:
        examples = self._tokens.examples_of(operand)
        return lambda on, y, r: rule(Step(apply, y, r, examples), on)

    # -- where relevance ends and is shared ----------------------------------------------------

    def _embedded(self, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Tensor:
        """Relevance ends at the vectors of integers that come from an input."""
        with torch.no_grad():
            result: Tensor = func(*args, **kwargs)
        if not self._tokens.is_data(argument(args, kwargs, 0, "input")):
            return result
        return result.requires_grad_().clone()  # no leaf: the model may write to it


class Used:
    """How often a tensor is used; what is handed back to it from several uses is divided by it."""

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


def _as_it_is(_x: Tensor, _result: Tensor, relevance: Tensor) -> Tensor:
    return relevance


def _summed(x: Tensor, _: Tensor, relevance: Tensor) -> Tensor:
    """Relevance as it is, of a result that its operand may have been broadcast to."""
    return relevance.sum_to_size(x.shape)


def _rebound(
    func: Callable[..., Any], args: Args, kwargs: Kwargs, operands: Sequence[Tensor]
) -> Apply:
    """An operation as a function of some of its tensors, the others being what they are."""
    slots = {id(operand): place for place, operand in enumerate(operands)}
    known = [slots.get(id(value)) for value in args]
    named = {key: slots.get(id(value)) for key, value in kwargs.items()}
    rest = [None if place is not None else value for value, place in zip(args, known, strict=True)]
    others = {key: value for key, value in kwargs.items() if named[key] is None}

    def apply(*given: Tensor) -> Tensor:
        new = [v if p is None else given[p] for v, p in zip(rest, known, strict=True)]
        more = {key: given[place] for key, place in named.items() if place is not None}
        found: Tensor = func(*_without_aliasing(func, new), **others, **more)
        return found

    return apply


def _to_one(
    place: int, on: Sequence[Tensor], _: Tensor, relevance: Tensor
) -> Sequence[Tensor | None]:
    """All relevance to one of the operands."""
    return [relevance.sum_to_size(x.shape) if i == place else None for i, x in enumerate(on)]


def _of_one(rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rule:
    return lambda on, y, r: [rule(on[0], y, r)]


def _is_one(index: object) -> bool:
    """Whether an index picks one element along some axis."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(type(part) is int for part in parts)


def _equation(terms: contraction.Contraction) -> str:
    letters: dict[str, str] = {}
    for label in (*terms.left_labels, *terms.right_labels, *terms.out_labels):
        letters.setdefault(label, chr(ord("a") + len(letters)))
    left, right, out = (
        "".join(letters[label] for label in labels)
        for labels in (terms.left_labels, terms.right_labels, terms.out_labels)
    )
    return f"{left},{right}->{out}"


def _without_aliasing(func: Callable[..., Any], args: Args) -> Args:
    """The arguments of an operation that may be run again: what it writes to is a copy."""
    return (args[0].clone(), *args[1:]) if canonical(func)[1] else args
