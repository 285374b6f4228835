"""Which rule goes where: the tables of the papers, as data.

A `RuleSet` names a rule for each kind of operation. `mode` reads one; users change single lines
with `dataclasses.replace`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from captum_generic_attn.lrp.rules import (
    AlphaBeta,
    Balanced,
    Conserved,
    Epsilon,
    Gamma,
    Halved,
    JointRule,
    Proportional,
    WeightedRule,
    ZBox,
)


@dataclass(frozen=True)
class RuleSet:
    """Relevance rules of a model's operations.

    Activations (GELU, SiLU, tanh), dropout, masks and scales by constants hand relevance on as it
    is, clones, slices and concatenations hand it back to where the elements came from; no rule set
    differs there. Inside a model that holds for a sigmoid and for a number that is added too,
    though the result need not have the sign of the operand.

    Args:
        linear: linear layers, convolutions, products with a constant matrix.
        patches: the convolution that reads an input.
        product: products of two tensors that both depend on the input, queries with keys and
            probabilities with values among them.
        addition: sums of two tensors.
        pooling: means, sums and resizing: linear operations without a weight.
        norm: layer norms: `"passed"` hands relevance on as it is; `"frozen"` takes the mean off as
            the linear operation that it is, with the deviation a constant.
        softmax: `"passed"`, or `"constant"`: probabilities get no relevance, values all.
        masks: what is added to the logits of attention: `"passed"` hands relevance on as it is;
            `"added"` takes it for a sum like any other.
        start: the relevance of the explained score: its own value, `"score"`, or `"one"`. A rule
            that shares a result out (ε, γ) needs the former: from 1, what made a negative score
            negative would be positive. αβ with β = 0 counts what speaks for a result alone, which
            is positive whatever sign the score has: there the authors start from 1.
        inert: whether a summand that carries no token of an input (a position code) gets no
            relevance, and the other one all.
        divided_copies: whether a value that is used several times, or picked out of others,
            gets `x · R / x`, whose stabiliser is felt in the ninth digit.

    Raises:
        ValueError: if `start` is neither of the two, or `"one"` with ε or γ in linear layers.

    Example:
        >>> from dataclasses import replace
        >>> replace(CHEFER2021_FULL, inert=True).linear
        AlphaBeta(alpha=1, beta=0, joint=False)
    """

    linear: WeightedRule
    patches: WeightedRule
    product: JointRule
    addition: JointRule
    pooling: JointRule
    norm: Literal["passed", "frozen"] = "passed"
    softmax: Literal["passed", "constant"] = "passed"
    masks: Literal["passed", "added"] = "passed"
    start: Literal["score", "one"] = "score"
    inert: bool = False
    divided_copies: bool = False

    def __post_init__(self) -> None:
        if self.start not in ("score", "one"):
            raise ValueError(f"start={self.start!r} is none of 'score', 'one'")
        linear = self.linear.rule if isinstance(self.linear, Conserved) else self.linear
        if self.start == "one" and isinstance(linear, Epsilon | Gamma):
            raise ValueError(
                f"start='one' with linear={self.linear!r}: a rule that shares results out would "
                "turn all signs of the map of a negative score; use start='score'"
            )

    @property
    def signed(self) -> bool:
        """Whether maps tell for from against: the map of a negated score is the negated map.

        Example:
            >>> [name for name, rules in RULE_SETS.items() if rules.signed]
            ['epsilon', 'gamma', 'frozen']
        """
        return self.start == "score"


CHEFER2021_FULL = RuleSet(
    linear=AlphaBeta(alpha=1, beta=0, joint=False),
    patches=ZBox(),
    product=Halved(),
    addition=Proportional(),
    pooling=Proportional(),
    start="one",
    divided_copies=True,
)
"""The rules that the authors use for LRP itself (full and partial)."""

CHEFER2021 = RuleSet(
    linear=AlphaBeta(alpha=1, beta=0, joint=True),
    patches=ZBox(),
    product=Halved(),
    addition=Balanced(),
    pooling=Proportional(),
    start="one",
    divided_copies=True,
)
"""The rules of transformer attribution (arXiv 2012.09838)."""

CHEFER2021_DETR = RuleSet(
    linear=Conserved(AlphaBeta(alpha=1, beta=0, joint=True)),
    patches=ZBox(),
    product=Halved(),
    addition=Balanced(),
    pooling=Proportional(),
    start="one",
    inert=True,
    divided_copies=True,
)
"""`CHEFER2021` as in the authors' DETR: linear layers conserve, position codes get nothing."""

EPSILON = RuleSet(
    linear=Epsilon(1e-6),
    patches=Epsilon(1e-6),
    product=Halved(1e-12),
    addition=Proportional(1e-12),
    pooling=Proportional(1e-12),
    norm="frozen",
)
"""ε everywhere; softmax and activations hand relevance on."""

GAMMA = RuleSet(
    linear=Gamma(0.25),
    patches=Gamma(0.25),
    product=Halved(1e-12),
    addition=Proportional(1e-12),
    pooling=Proportional(1e-12),
    norm="frozen",
)
"""γ in linear layers, else as ε."""

FROZEN = RuleSet(
    linear=Epsilon(0.0),
    patches=Epsilon(0.0),
    product=Halved(0.0),
    addition=Proportional(0.0),
    pooling=Proportional(0.0),
    norm="frozen",
    softmax="constant",
)
"""Gradient times input with gates, norms and probabilities held constant.

Without biases it conserves exactly: the relevance of all inputs sums to the score.
"""

RULE_SETS = {
    "chefer2021_full": CHEFER2021_FULL,
    "chefer2021": CHEFER2021,
    "chefer2021_detr": CHEFER2021_DETR,
    "epsilon": EPSILON,
    "gamma": GAMMA,
    "frozen": FROZEN,
}
"""The rule sets by the names that `rules=` takes."""


Rules = str | RuleSet
"""What `rules=` takes: a name of `RULE_SETS`, or a rule set."""


def rule_set(chosen: Rules) -> RuleSet:
    """A rule set by its name, or itself.

    Raises:
        ValueError: if there is none of that name.
        TypeError: if it is neither.

    Example:
        >>> rule_set("frozen").start
        'score'
    """
    if isinstance(chosen, RuleSet):
        return chosen
    if not isinstance(chosen, str):
        raise TypeError(f"rules= takes a name or a RuleSet, not {type(chosen).__name__}")
    if chosen not in RULE_SETS:
        raise ValueError(f"rules={chosen!r} is none of {', '.join(RULE_SETS)}")
    return RULE_SETS[chosen]


def attention_rules(chosen: Rules) -> RuleSet:
    """A rule set by its name, or itself, for the relevance of attention probabilities.

    Raises:
        ValueError: if there is none of that name, or it holds probabilities constant.
        TypeError: if it is neither.
    """
    rules = rule_set(chosen)
    if rules.softmax == "constant":
        raise ValueError(
            f"rules={chosen!r} holds attention constant, so that it has no relevance: choose "
            f"{', '.join(name for name, of in RULE_SETS.items() if of.softmax != 'constant')}, or "
            'a RuleSet with softmax="passed"'
        )
    return rules
