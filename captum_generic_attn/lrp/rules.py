"""Relevance rules: how the relevance of an operation's result is distributed to its operands.

The rules are pure functions of tensors, independent of any model. All have one form (`shares`):
operands times the gradient of `⟨S, operation⟩`, where `S` is the relevance per unit of the result.

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
"""Added to every divisor, as in the authors' code."""

Apply = Callable[..., Tensor]
"""Type of an operation without its bias, as a function of its operands."""


def per_unit(relevance: Tensor, result: Tensor, stabiliser: float = STABILISER) -> Tensor:
    """Relevance per unit of a result, `S = R / (z + ε)`; 0 where the result is 0.

    Args:
        relevance: of the result.
        result: `z`, of the same shape.
        stabiliser: `ε`; it keeps its own sign, whatever the sign of `z`.

    Example:
        >>> per_unit(torch.tensor([2.0, 2.0]), torch.tensor([4.0, 0.0]), 0.0)
        tensor([0.5000, 0.0000])
    """
    divisor = result + stabiliser
    divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return torch.where(result == 0, torch.zeros_like(result), relevance / divisor)


def shares(apply: Apply, operands: Sequence[Tensor], unit: Tensor) -> list[Tensor]:
    """Operand times gradient, `x · ∂⟨S, apply(x, …)⟩/∂x`, for each operand.

    If the operation is linear in an operand, these are the contributions of its elements to the
    result, in units of relevance.

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
    """Maps the elements of an operation's tensors to examples, for rules that sum over an example.

    `owner` holds the example of each position along `axis`. `axis` is counted from the end, since
    operands may lack leading axes. If `owner` is `None`, all elements belong to one example, or the
    mapping is not `known`.
    """

    axis: int = 0
    owner: Tensor | None = None
    known: bool = True

    def sums(self, tensor: Tensor) -> Tensor:
        """The sum over each element's example, broadcastable to the tensor.

        Raises:
            ValueError: if the examples of the elements are not known.
        """
        return self.spread(self.by_example(tensor), tensor)

    def by_example(self, tensor: Tensor) -> Tensor:
        """The sum over each example, `[B]`, or a scalar if there is one example.

        Raises:
            ValueError: if the examples of the elements are not known.
        """
        if not self.known:
            raise ValueError(
                "these relevance rules rescale by sums over each example, but it is not known "
                f"which example each element of a tensor {tuple(tensor.shape)} belongs to: explain "
                "one example at a time, or use other rules"
            )
        if self.owner is None:
            return tensor.sum()
        owner = self.owner.to(tensor.device)
        others = [a for a in range(tensor.ndim) if a != tensor.ndim + self.axis]
        each = tensor.sum(others) if others else tensor
        return each.new_zeros(int(owner.max()) + 1).index_add(0, owner, each)

    def spread(self, values: Tensor, tensor: Tensor) -> Tensor:
        """Reshape `[B]` values of the examples so that they broadcast to a tensor."""
        if self.owner is None:
            return values
        axis = tensor.ndim + self.axis
        shape = [-1 if a == axis else 1 for a in range(tensor.ndim)]
        return values[self.owner.to(tensor.device)].view(shape)


def first_axis(tensor: Tensor) -> Examples:
    """The mapping of a tensor whose first axis is the batch.

    Example:
        >>> first_axis(torch.zeros(2, 3)).sums(torch.ones(2, 3))
        tensor([[3.],
                [3.]])
    """
    return Examples(-tensor.ndim, torch.arange(len(tensor)))


@dataclass(frozen=True, eq=False)
class Step:
    """One operation, its result, and the relevance of the result.

    `examples` maps the elements of the operands to examples, `of_result` those of the result;
    `None` if both have the same mapping.
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
        """The relevance of `x`; only `step.result` includes the bias, not `step.apply`."""
        ...


@dataclass(frozen=True)
class Epsilon:
    """The ε rule: `x (S W)` with `S = R / (z + ε sign z)`; `z` includes the bias, unless
    `bias=False`.

    With `epsilon=0`, relevance flows as in gradient times input.
    """

    epsilon: float = 1e-6
    bias: bool = True

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:
        """The relevance of `x`."""
        z = step.result if self.bias else step.apply(x, weight)
        unit = per_unit(step.relevance, z + self.epsilon * z.sign(), 0.0)
        return shares(lambda operand: step.apply(operand, weight), [x], unit)[0]


@dataclass(frozen=True)
class Gamma:
    """The γ rule: as ε, with the weights `W + γ W⁺`, which favour positive contributions.

    It is generalized to operands of either sign: contributions that have the sign of the result are
    scaled by `1 + γ`. The bias counts as a contribution, so that it cannot flip the sign of the
    others.
    """

    gamma: float = 0.25
    epsilon: float = 1e-6

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:
        """The relevance of `x`."""
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
    """The αβ rule: `α` times the positive contributions to a result less `β` times the negative
    ones.

    With the positive and negative parts `x⁺, x⁻, W⁺, W⁻`, the positive contributions are `x⁺ (S W⁺)
    + x⁻ (S W⁻)`; biases are left out. If `joint`, both products share `S = R / (x⁺ W⁺ + x⁻ W⁻)`,
    which for positive operands is the z⁺ rule; otherwise each of the two products has its own `S`.
    """

    alpha: float = 1.0
    beta: float = 0.0
    joint: bool = True

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:
        """The relevance of `x`."""
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
    """The zᴮ rule, for layers that read images, whose elements are bounded.

    With `S = R / (x W − lo W⁺ − hi W⁻)`, relevance is `x (S W) − lo (S W⁺) − hi (S W⁻)`; `lo` and
    `hi` are the minimum and maximum of each example's image.
    """

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:
        """The relevance of `x`."""
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
    """Rescales the result of another rule so that each example keeps its sum of relevance."""

    rule: WeightedRule

    def __call__(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:
        """The relevance of `x`."""
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
    """Gives each factor of a product half of the relevance: `A (S Bᵀ) / 2` and `B (Aᵀ S) / 2`.

    The product is one of matrices or of elements.
    """

    stabiliser: float = STABILISER

    def __call__(self, step: Step, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        """The relevance of each operand."""
        unit = per_unit(step.relevance, step.result, self.stabiliser)
        return [part / 2 for part in shares(step.apply, operands, unit)]


@dataclass(frozen=True)
class Proportional:
    """Distributes relevance to summands in proportion to them: `a R / (a + b)`, `b R / (a + b)`."""

    stabiliser: float = STABILISER

    def __call__(self, step: Step, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        """The relevance of each operand."""
        return shares(step.apply, operands, per_unit(step.relevance, step.result, self.stabiliser))


@dataclass(frozen=True)
class Balanced:
    """The normalized rule for sums: proportional within each summand, with rescaled totals.

    Summands of opposite sign cannot blow each other up. With `a'` and `b'` the proportional
    relevance, the first summand gets `a' · |Σa'| / (|Σa'| + |Σb'|) · ΣR / Σa'`, and the second
    likewise; the sums are over an example.
    """

    stabiliser: float = STABILISER

    def __call__(self, step: Step, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        """The relevance of each operand."""
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
