"""Selects the relevance rule of an operation, and the tensors that the rule receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking import contraction
from captum_generic_attn.capture.tracking.operations import argument, canonical
from captum_generic_attn.lrp.norms import frozen
from captum_generic_attn.lrp.operations import Kind
from captum_generic_attn.lrp.rule_sets import RuleSet
from captum_generic_attn.lrp.rules import (
    Apply,
    Epsilon,
    Examples,
    JointRule,
    Step,
    WeightedRule,
    per_unit,
    shares,
)

Args = Sequence[Any]
Kwargs = Mapping[str, Any]
Rule = Callable[[Sequence[Tensor], Tensor, Tensor], Sequence[Tensor | None]]
"""Maps the operands, the result and the result's relevance to the relevance of each operand."""


class Tokens(Protocol):
    """Interface to what the capture knows about a tensor."""

    def is_data(self, tensor: Tensor) -> bool:
        """Whether any element depends on an input."""
        ...

    def is_input(self, tensor: Tensor) -> bool:
        """Whether its elements are elements of an input, which are not tokens yet."""
        ...

    def is_computed(self, tensor: Tensor) -> bool:
        """Whether it was computed from tokens, which may be parameters: then it is no weight."""
        ...

    def is_logits(self, tensor: Tensor) -> bool:
        """Whether it holds attention logits (products of queries and keys)."""
        ...

    def examples_of(self, tensor: Tensor) -> Examples:
        """The example that each element belongs to."""
        ...

    def is_probabilities(self, tensor: Tensor) -> bool:
        """Whether it holds attention probabilities."""
        ...


class Choice:
    """Selects the rules of operations from a rule set, by what the capture knows about their
    tensors.
    """

    def __init__(self, rules: RuleSet, tokens: Tokens) -> None:
        self._rules = rules
        self._tokens = tokens

    def carries(self, tensor: Tensor) -> bool:
        """Whether a tensor may receive relevance."""
        if not tensor.requires_grad:
            return False
        return self._rules.softmax == "passed" or not self._tokens.is_probabilities(tensor)

    def of(
        self, kind: Kind, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        operands: Sequence[Tensor],
    ) -> tuple[Rule, Sequence[Tensor]] | None:  # fmt: skip
        """The rule of an operation, and the tensors that the rule receives.

        Args:
            kind: the operation's kind.
            name: its canonical name.
            func: the operation itself.
            args: its positional arguments.
            kwargs: its keyword arguments.
            operands: the tensors among the arguments that carry relevance, at least one.

        Returns:
            `None` if the rule set has no rule for it.
        """
        rules = self._rules
        if kind is Kind.NORM and rules.norm == "frozen":
            linear = frozen(name, args, kwargs)
            if linear is None:
                return None
            frozen_norm = _of_one(lambda x, y, r: shares(linear, [x], per_unit(r, y, 0.0))[0])
            return frozen_norm, operands[:1]
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

        if not self.carries(x):
            return None
        if self.carries(weight):
            joint = self._rules.product
            return self._joint(joint, apply, x), (x, weight)
        first = "conv" in name and self._tokens.is_input(x)
        rule = self._rules.patches if first else self._rules.linear
        return self._of_weight(rule, apply, x, 0), (x, weight)

    def _product(
        self, name: str, args: Args, kwargs: Kwargs
    ) -> tuple[Rule, Sequence[Tensor]] | None:
        terms = contraction.read(name, args, kwargs)
        if terms is None or (terms.bias is not None and self.carries(terms.bias)):
            return None
        equation, scale = _equation(terms), kwargs.get("alpha", 1)

        def apply(left: Tensor, right: Tensor) -> Tensor:
            found: Tensor = torch.einsum(equation, left, right)
            return found if scale == 1 else found * scale

        factors = terms.left, terms.right
        carrying = [self.carries(factor) for factor in factors]
        side = carrying.index(True)
        constant = factors[1 - side]
        weighted = self._rules.linear
        if self._rules.softmax == "constant" and self._tokens.is_probabilities(constant):
            weighted = Epsilon(0.0)  # probabilities are no layer's weights: rows >= 0 that sum to 1
        elif (
            all(carrying)
            or self._tokens.is_computed(constant)
            or self._tokens.is_probabilities(factors[side])
        ):
            joint = self._rules.product
            return self._joint(joint, apply, factors[side]), factors

        return self._of_weight(weighted, apply, factors[side], side, terms), factors

    def _elementwise(
        self, kind: Kind, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        operands: Sequence[Tensor],
    ) -> tuple[Rule, Sequence[Tensor]] | None:  # fmt: skip
        """Select the rule of elementwise sums, products and quotients, and of pooling."""
        rules = self._rules
        if kind is Kind.POOLED:
            pooled = _rebound(func, args, kwargs, operands)
            return self._joint(rules.pooling, pooled, operands[0]), operands
        if kind is Kind.DIVIDED:
            numerator = argument(args, kwargs, 0, "input")
            above = [t for t in operands if t is numerator]
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
            # Save all tensors: what a checkpoint recomputes must not depend on what was known then.
            return partial(_to_one, place), tensors
        both = _rebound(func, args, kwargs, tensors)
        return self._joint(joint, both, operands[0]), tensors

    def _of_weight(
        self, rule: WeightedRule, apply: Apply, operand: Tensor, side: int,
        terms: contraction.Contraction | None = None,
    ) -> Rule:  # fmt: skip
        """The rule of an operation with two tensors: the operand at `side`, and a weight."""
        examples = self._tokens.examples_of(operand)
        of_result = examples
        if terms is not None and examples.owner is not None:
            label = terms.labels(side)[examples.axis]
            if label in terms.out_labels:
                place = terms.out_labels.index(label) - len(terms.out_labels)
                of_result = replace(examples, axis=place)
            else:
                of_result = Examples(known=False)

        def ordered(x: Tensor, weight: Tensor) -> Tensor:
            return apply(x, weight) if side == 0 else apply(weight, x)

        def of_weight(on: Sequence[Tensor], y: Tensor, r: Tensor) -> Sequence[Tensor | None]:
            step = Step(ordered, y, r, examples, of_result)
            found = rule(step, on[side], on[1 - side])
            return (found, None) if side == 0 else (None, found)

        return of_weight

    def _joint(self, rule: JointRule, apply: Apply, operand: Tensor) -> Rule:
        examples = self._tokens.examples_of(operand)
        return lambda on, y, r: rule(Step(apply, y, r, examples), on)


def without_aliasing(func: Callable[..., Any], args: Args) -> Args:
    """The arguments for running an operation again: a tensor that it writes to is copied."""
    return (args[0].clone(), *args[1:]) if canonical(func)[1] else args


def _as_it_is(_x: Tensor, _result: Tensor, relevance: Tensor) -> Tensor:
    return relevance


def _summed(x: Tensor, _: Tensor, relevance: Tensor) -> Tensor:
    """Pass relevance unchanged to an operand, which may have been broadcast to the result."""
    return relevance.sum_to_size(x.shape)


def _rebound(
    func: Callable[..., Any], args: Args, kwargs: Kwargs, operands: Sequence[Tensor]
) -> Apply:
    """An operation as a function of `operands`, with its other arguments fixed."""
    wanted = [id(operand) for operand in operands]

    def slot(value: object) -> int | None:
        """The index of this argument among the operands; a repeated tensor takes each once."""
        place = wanted.index(id(value)) if id(value) in wanted else None
        if place is not None:
            wanted[place] = -1
        return place

    known = [slot(value) for value in args]
    named = {key: slot(value) for key, value in kwargs.items()}
    rest = [None if place is not None else value for value, place in zip(args, known, strict=True)]
    others = {key: value for key, value in kwargs.items() if named[key] is None}

    def apply(*given: Tensor) -> Tensor:
        new = [v if p is None else given[p] for v, p in zip(rest, known, strict=True)]
        more = {key: given[place] for key, place in named.items() if place is not None}
        found: Tensor = func(*without_aliasing(func, new), **others, **more)
        return found

    return apply


def _to_one(
    place: int, on: Sequence[Tensor], _: Tensor, relevance: Tensor
) -> Sequence[Tensor | None]:
    """Give all relevance to one operand."""
    return [relevance.sum_to_size(x.shape) if i == place else None for i, x in enumerate(on)]


def _of_one(rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rule:
    return lambda on, y, r: [rule(on[0], y, r)]


def _equation(terms: contraction.Contraction) -> str:
    letters: dict[str, str] = {}
    for label in (*terms.left_labels, *terms.right_labels, *terms.out_labels):
        letters.setdefault(label, chr(ord("a") + len(letters)))
    left, right, out = (
        "".join(letters[label] for label in labels)
        for labels in (terms.left_labels, terms.right_labels, terms.out_labels)
    )
    return f"{left},{right}->{out}"
