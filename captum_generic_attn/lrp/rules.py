"""Relevance rules: how an operation hands the relevance of its result on to what went in.

Pure functions of tensors; nothing here knows a model. `rule_sets` says which rule goes where,
`mode` runs a model so that its backward pass applies them. All rules come to one form: operands
times the gradient of `⟨S, operation⟩`, where `S` is relevance per unit of the result (`shares`).

Sources: Bach et al. 2015, "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by
Layer-Wise Relevance Propagation" (ε and αβ); Montavon et al. 2017, "Explaining NonLinear
Classification Decisions with Deep Taylor Decomposition" (z⁺ and zᴮ); Montavon et al. 2019,
"Layer-Wise Relevance Propagation: An Overview" (γ); Chefer, Gur, Wolf 2021, "Transformer
Interpretability Beyond Attention Visualization", arXiv 2012.09838 (products and additions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

STABILISER = 1e-9
"""What the authors' code adds to every divisor."""

Apply = Callable[..., Tensor]
"""An operation without its bias, as a function of its operands."""


def per_unit(relevance: Tensor, result: Tensor, stabiliser: float = STABILISER) -> Tensor:
    """`S = R / (z + ε)`, relevance per unit of a result; 0 where the result is 0.

    Args:
        relevance: of the result.
        result: `z`, of the same shape.
        stabiliser: `ε`, added with its sign whatever that of `z`.

    Example:
        >>> per_unit(torch.tensor([2.0, 2.0]), torch.tensor([4.0, 0.0]), 0.0)
        tensor([0.5000, 0.0000])
    """
    divisor = result + stabiliser
    divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return torch.where(result == 0, torch.zeros_like(result), relevance / divisor)


def shares(apply: Apply, operands: Sequence[Tensor], unit: Tensor) -> list[Tensor]:
    """`x · ∂⟨S, apply(x, …)⟩/∂x` for each operand.

    Of an operation that is linear in an operand these are the parts of its result that each element
    makes, in units of relevance.

    Example:
        >>> shares(torch.mul, [torch.tensor(2.0), torch.tensor(3.0)], torch.tensor(1.0))
        [tensor(6.), tensor(6.)]
    """
    with torch.enable_grad():
        free = [operand.detach().requires_grad_() for operand in operands]
        gradients = torch.autograd.grad(apply(*free), free, unit)
    return [operand * gradient for operand, gradient in zip(operands, gradients, strict=True)]


@dataclass(frozen=True, eq=False)
class Examples:
    """Whose the elements of an operation's tensors are, for rules that take sums over examples.

    `owner` says it of the places along one axis, counted from the end, since operands may lack
    leading axes; `None`: all are of one example, or it is not `known`.
    """

    axis: int = 0
    owner: Tensor | None = None
    known: bool = True

    def sums(self, tensor: Tensor) -> Tensor:
        """The sum over the example of each element, to be multiplied with the tensor.

        Raises:
            ValueError: if it is not known whose they are.
        """
        return self.spread(self.by_example(tensor), tensor)

    def by_example(self, tensor: Tensor) -> Tensor:
        """The sums over the examples, `[B]`, or one number.

        Raises:
            ValueError: if it is not known whose the elements are.
        """
        if not self.known:
            raise ValueError(
                "these relevance rules rescale by sums over examples, and whose the elements of a "
                f"tensor {tuple(tensor.shape)} are could not be told: explain one example at a "
                "time, or use other rules"
            )
        if self.owner is None:
            return tensor.sum()
        owner = self.owner.to(tensor.device)
        others = [a for a in range(tensor.ndim) if a != tensor.ndim + self.axis]
        each = tensor.sum(others) if others else tensor
        return each.new_zeros(int(owner.max()) + 1).index_add(0, owner, each)

    def spread(self, values: Tensor, tensor: Tensor) -> Tensor:
        """`[B]` values of the examples, to be multiplied with a tensor."""
        if self.owner is None:
            return values
        axis = tensor.ndim + self.axis
        shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
        return values[self.owner.to(tensor.device)].view(shape)


def first_axis(tensor: Tensor) -> Examples:
    """The examples of a batch in its usual place.

    Example:
        >>> first_axis(torch.zeros(2, 3)).sums(torch.ones(2, 3))
        tensor([[3.],
                [3.]])
    """
    return Examples(-tensor.ndim, torch.arange(len(tensor)))


@dataclass(frozen=True, eq=False)
class Step:
    """One operation whose relevance is handed on: what it does, what came out, what that got.

    `examples` tells whose its operands' elements are, `of_result` its result's; `None`: alike.
    """

    apply: Apply
    result: Tensor
    relevance: Tensor
    examples: Examples = Examples()
    of_result: Examples | None = None


# -- operations with a weight ----------------------------------------------------------------------


class WeightedRule(Protocol):
    """A rule for an operation that is linear in its operand `x`, with a constant weight."""

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:
        """The relevance of `x`; `step.apply(x, weight)` has no bias, `step.result` has it."""
        ...


@dataclass(frozen=True)
class Epsilon:
    """`x (S W)` with `S = R / (z + ε sign z)`; `z` with its bias, unless `bias=False`.

    With `epsilon=0` this is gradient times input of this one operation.
    """

    epsilon: float = 1e-6
    bias: bool = True

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        z = step.result if self.bias else step.apply(x, weight)
        unit = per_unit(step.relevance, z + self.epsilon * z.sign(), 0.0)
        return shares(lambda operand: step.apply(operand, weight), [x], unit)[0]


@dataclass(frozen=True)
class Gamma:
    """Like ε, with the weights `W + γ W⁺`, which favours what speaks for the result.

    For operands of either sign: parts of the result with its own sign are favoured by `1 + γ`. The
    bias is one of the parts, so that it cannot turn the sign of the others.
    """

    gamma: float = 0.25
    epsilon: float = 1e-6

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        apply, relevance = step.apply, step.relevance
        up, down = x.clamp(min=0), x.clamp(max=0)
        for_it, against_it = weight.clamp(min=0), weight.clamp(max=0)
        z = step.result
        bias = z - apply(x, weight)
        favoured = apply(up, for_it) + apply(down, against_it) + bias.clamp(min=0)
        disfavoured = apply(up, against_it) + apply(down, for_it) + bias.clamp(max=0)
        plus, minus = z + self.gamma * favoured, z + self.gamma * disfavoured
        total = torch.zeros_like(x)
        for sign, sums, pairs in (
            (z > 0, plus, ((up, for_it), (down, against_it))),
            (z < 0, minus, ((up, against_it), (down, for_it))),
        ):
            unit = per_unit(relevance * sign, sums + self.epsilon * sums.sign(), 0.0)
            total += shares(lambda operand: apply(operand, weight), [x], unit)[0]
            for operand, part in pairs:
                given = shares(lambda o, part=part: apply(o, part), [operand], unit)[0]
                total += self.gamma * given
        return total


@dataclass(frozen=True)
class AlphaBeta:
    """`α` times the parts that speak for a result less `β` times those that speak against it.

    With `x⁺, x⁻, W⁺, W⁻` the positive and negative parts, `x⁺ (S W⁺) + x⁻ (S W⁻)` is what speaks
    for it; biases are left out. `joint`: one `S = R / (x⁺ W⁺ + x⁻ W⁻)`, which for positive operands
    is the z⁺ rule; else each of the two parts has an `S` of its own.
    """

    alpha: float = 1.0
    beta: float = 0.0
    joint: bool = True

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        apply, relevance = step.apply, step.relevance
        up, down = x.clamp(min=0), x.clamp(max=0)
        for_it, against_it = weight.clamp(min=0), weight.clamp(max=0)
        total = self.alpha * self._part(apply, ((up, for_it), (down, against_it)), relevance)
        if self.beta != 0:
            against = self._part(apply, ((up, against_it), (down, for_it)), relevance)
            total = total - self.beta * against
        return total

    def _part(
        self, apply: Apply, pairs: Sequence[tuple[Tensor, Tensor]], relevance: Tensor
    ) -> Tensor:
        sums = [apply(x, weight) for x, weight in pairs]
        if self.joint:
            sums = [sums[0] + sums[1]] * 2
        parts = [
            shares(lambda operand, weight=weight: apply(operand, weight), [x], unit)[0]
            for (x, weight), unit in zip(pairs, [per_unit(relevance, z) for z in sums], strict=True)
        ]
        return parts[0] + parts[1]


@dataclass(frozen=True)
class ZBox:
    """zᴮ, for what reads an image: elements between its least and its greatest value.

    `S = R / (x W − lo W⁺ − hi W⁻)`, relevance `x (S W) − lo (S W⁺) − hi (S W⁻)`; `lo` and `hi` are
    those of each example's image.
    """

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        apply, relevance = step.apply, step.relevance
        flat = x.flatten(1)
        shape = -1, *[1] * (x.ndim - 1)
        low = flat.amin(1).view(shape).expand_as(x)
        high = flat.amax(1).view(shape).expand_as(x)
        triples = (x, weight, 1), (low, weight.clamp(min=0), -1), (high, weight.clamp(max=0), -1)
        z = torch.stack([sign * apply(o, part) for o, part, sign in triples]).sum(0)
        unit = per_unit(relevance, z)
        parts = [
            sign * shares(lambda o, part=part: apply(o, part), [operand], unit)[0]
            for operand, part, sign in triples
        ]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class Conserved:
    """Another rule, its outcome scaled so that each example keeps the sum of its relevance."""

    rule: WeightedRule

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        found = self.rule(step, x, weight)
        of_result = step.of_result or step.examples
        each = of_result.by_example(step.relevance), step.examples.by_example(found)
        return found * step.examples.spread(per_unit(*each, 0.0), found)


# -- operations of two operands that carry relevance -----------------------------------------------


class JointRule(Protocol):
    """A rule for an operation of two operands."""

    def __call__(self, step: Step, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        """The relevance of each operand."""
        ...


@dataclass(frozen=True)
class Halved:
    """A product, of matrices or elements: half to each factor, `A (S Bᵀ) / 2`, `B (Aᵀ S) / 2`."""

    stabiliser: float = STABILISER

    def __call__(  # noqa: D102
        self, step: Step, operands: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        unit = per_unit(step.relevance, step.result, self.stabiliser)
        return [part / 2 for part in shares(step.apply, operands, unit)]


@dataclass(frozen=True)
class Proportional:
    """A sum: to each summand what it makes of the result, `a R / (a + b)` and `b R / (a + b)`."""

    stabiliser: float = STABILISER

    def __call__(  # noqa: D102
        self, step: Step, operands: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        return shares(step.apply, operands, per_unit(step.relevance, step.result, self.stabiliser))


@dataclass(frozen=True)
class Balanced:
    """A sum, proportional within each summand, and of `ΣR` to each what its own sum is of both.

    Summands of opposite sign cannot blow each other up: with `a'` and `b'` the proportional
    relevance, `a' · |Σa'| / (|Σa'| + |Σb'|) · ΣR / Σa'`, and `b'` alike, sums over an example.
    """

    stabiliser: float = STABILISER

    def __call__(  # noqa: D102
        self, step: Step, operands: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        full = [operand.expand_as(step.result).contiguous() for operand in operands]
        unit = per_unit(step.relevance, step.result, self.stabiliser)
        parts = shares(step.apply, full, unit)
        sums = [step.examples.sums(part) for part in parts]
        whole = torch.stack([s.abs() for s in sums]).sum(0)
        total = step.examples.sums(step.relevance)
        return [
            (part * per_unit(per_unit(s.abs(), whole, self.stabiliser) * total, s, self.stabiliser))
            .sum_to_size(operand.shape)
            for part, s, operand in zip(parts, sums, operands, strict=True)
        ]  # fmt: skip
