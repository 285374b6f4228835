"""Checks that a score has kept the sign of the evidence that it was computed from.

Signed rules distribute a result in proportion to the contributions of the operands. This separates
evidence for a score from evidence against it only if zero operands give a zero result. A sigmoid,
an exponential, a softmax and the addition of a constant break this: a probability is positive for
any sign of its logit, and a log-probability is negative. `mode` attaches to each operation what it
does to the sign. `propagation` checks a score before relevance starts from it.

The gradients of such operations would give the right sign. But then relevance would not sum to the
score, and would vanish where the model is certain. Therefore such scores are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor

from captum_generic_attn.capture.tracking.operations import argument
from captum_generic_attn.lrp.operations import Kind


class Sign(Enum):
    """How the sign of a result relates to the signs of the operands."""

    OWN = "the result has its own sign, as weighted sums of features have"
    KEPT = "the result has lost its sign if any operand has"
    FACTORS = "the result has a sign if one factor has: the other factors are gates"
    LOST = "the result is not zero where the operand is"


class Passage(NamedTuple):
    """An operation's canonical name, and what it does to the sign of its operands."""

    name: str
    sign: Sign


_LOST = {
    "sigmoid", "log_sigmoid", "hardsigmoid", "softplus", "exp", "log", "log_softmax", "reciprocal",
    "logit", "cos", "sinc",
}  # fmt: skip
_REFLECTED = {"__rpow__", "__rtruediv__", "__rdiv__"}
"""A constant raised to the power of the operand, or divided by it."""


def passage(
    kind: Kind, name: str, func: Callable[..., Any], args: Sequence[Any],
    kwargs: Mapping[str, Any], operands: Sequence[Tensor],
) -> Passage:  # fmt: skip
    """Classify what an operation does to the sign of its operands.

    Args:
        kind: the operation's kind.
        name: its canonical name.
        func: the operation itself.
        args: its positional arguments.
        kwargs: its keyword arguments.
        operands: the tensors among the arguments that carry relevance.
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
    """The canonical name of the operation at which a score lost its sign; `None` if it did not.

    The search follows the graph from the score back to the last weighted sums, through operations
    that move elements. Of several such operations, the result is the one that ran first: the
    softmax in the log of a softmax.

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
