"""Whether a score has the sign of what it was made of.

Signed rules share a result out in proportion to what each operand makes of it. That tells for from
against as long as a result of nothing is nothing. A sigmoid, an exponential, a softmax or a
constant that is added break this: a probability is positive whatever sign its logit has, a
log-probability is negative. `mode` notes for each operation what becomes of the sign; `propagation`
asks for that of the score before relevance starts from it.

Their own gradient would have the right sign, but then relevance would sum to anything but the
score, and vanish with certainty. So such scores are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor

from captum_generic_attn.capture.tracking.operations import argument
from captum_generic_attn.lrp.operations import Kind


class Sign(Enum):
    """What becomes of the sign of operands in a result."""

    OWN = "a result has a sign of its own: weighted sums of features"
    KEPT = "the result of any operand without a sign has none"
    FACTORS = "the result of a factor with a sign has one: the others are gates"
    LOST = "the result is not nothing where the operand is"


class Passage(NamedTuple):
    """What an operation, by its plain name, makes of the sign of its operands."""

    name: str
    sign: Sign


_LOST = {
    "sigmoid", "log_sigmoid", "hardsigmoid", "softplus", "exp", "log", "log_softmax", "reciprocal",
    "logit", "cos", "sinc",
}  # fmt: skip
_REFLECTED = {"__rpow__", "__rtruediv__", "__rdiv__"}
"""A constant to the power of the operand, or divided by it."""


def passage(
    kind: Kind, name: str, func: Callable[..., Any], args: Sequence[Any],
    kwargs: Mapping[str, Any], operands: Sequence[Tensor],
) -> Passage:  # fmt: skip
    """What an operation makes of the sign of its operands.

    Args:
        kind: the operation's kind.
        name: its plain name.
        func: itself.
        args: its arguments.
        kwargs: its arguments by name.
        operands: those tensors among them that carry relevance.
    """
    if kind is Kind.SOFTMAX or name in _LOST or getattr(func, "__name__", "") in _REFLECTED:
        return Passage(name, Sign.LOST)
    first, second = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "other")
    if kind is Kind.ADDED:
        constant = any(isinstance(v, (int, float)) and v != 0 for v in (first, second))
        return Passage(name, Sign.LOST if constant else Sign.KEPT)
    if kind is Kind.DIVIDED:
        above = any(operand is first for operand in operands)
        return Passage(name, Sign.KEPT if above else Sign.LOST)
    if kind is Kind.MULTIPLIED:
        return Passage(name, Sign.FACTORS)
    return Passage(name, Sign.KEPT if kind in (Kind.PASSED, Kind.POOLED) else Sign.OWN)


def lost_at(score: Tensor) -> str | None:
    """The plain name of the operation at which a score lost its sign; `None` if it has one.

    The graph is followed from the score to the last weighted sums, through what moves elements. Of
    several operations it is the first that ran: of a log of a softmax, the softmax.

    Args:
        score: part of a graph whose nodes have a `passage`, unless they move elements.
    """
    found: dict[Any, str | None] = {}
    waiting = [score.grad_fn]
    while waiting:
        node = waiting[-1]
        name, sign = getattr(node, "passage", None) or Passage("", Sign.KEPT)
        before = [] if node is None or sign is Sign.OWN else node.next_functions
        operands = [operand for operand, _ in before if operand is not None]
        missing = [operand for operand in operands if operand not in found]
        if missing:
            waiting += missing
            continue
        waiting.pop()
        names = [found[operand] for operand in operands]
        lost = next((earlier for earlier in names if earlier is not None), None)
        if sign is Sign.LOST:
            lost = lost or name
        elif sign is Sign.FACTORS and None in names:
            lost = None
        found[node] = lost
    return found[score.grad_fn]
