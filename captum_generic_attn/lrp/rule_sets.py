"""Rule sets: a rule for each kind of operation, as in the tables of the papers.

To change a single rule, use `dataclasses.replace`.
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
    """The relevance rules of a model's operations.

    Some operations have the same rule in every set. Activations (GELU, SiLU, tanh), dropout, masks
    and scaling by constants pass relevance unchanged. Clones, slices and concatenations return it
    to the elements that they moved. Inside a model, a sigmoid and the addition of a constant pass
    it unchanged too, although the sign of the result may differ from that of the operand.

    Args:
        linear: linear layers, convolutions, products with a constant matrix.
        patches: the convolution that an input goes into.
        product: products of two tensors that both depend on the input, such as queries with keys
            and probabilities with values.
        addition: sums of two tensors.
        pooling: means, sums and resizing (linear operations without a weight).
        norm: normalization layers: `"passed"` passes relevance unchanged; `"frozen"` subtracts the
            mean, a linear operation, and holds the standard deviation constant.
        softmax: `"passed"` passes relevance unchanged; with `"constant"`, attention probabilities
            get no relevance, and values get all.
        masks: tensors that are added to attention logits: `"passed"` passes relevance unchanged;
            `"added"` treats them as any other sum.
        start: the relevance of the explained score: its value (`"score"`) or 1 (`"one"`). Rules
            that distribute a result in proportion (ε, γ) need `"score"`: from 1, evidence for a
            negative score would get the wrong sign. αβ with β = 0 counts only evidence for a
            result, which is positive for any sign of the score; there the authors start from 1.
        inert: whether a summand without input tokens (such as a position embedding) gets no
            relevance, and the other summand gets all.
        divided_copies: whether a tensor that is used several times, or selected by an index, gets
            `x · R / x`, whose stabiliser changes the ninth digit.

    Raises:
        ValueError: if `start` is none of these, or `"one"` with ε or γ in linear layers.

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
                f"start='one' with linear={self.linear!r}: a rule that distributes results in "
                "proportion would flip all signs in the map of a negative score; use start='score'"
            )

    @property
    def signed(self) -> bool:
        """Whether maps are signed: the map of a negated score is the negated map.

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
"""The authors' rules for full and partial LRP."""

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
"""`CHEFER2021` as in the authors' DETR: linear layers conserve relevance, and position embeddings
get none.
"""

EPSILON = RuleSet(
    linear=Epsilon(1e-6),
    patches=Epsilon(1e-6),
    product=Halved(1e-12),
    addition=Proportional(1e-12),
    pooling=Proportional(1e-12),
    norm="frozen",
)
"""ε everywhere; softmax and activations pass relevance unchanged."""

GAMMA = RuleSet(
    linear=Gamma(0.25),
    patches=Gamma(0.25),
    product=Halved(1e-12),
    addition=Proportional(1e-12),
    pooling=Proportional(1e-12),
    norm="frozen",
)
"""γ in linear layers; the rest is as in `EPSILON`."""

FROZEN = RuleSet(
    linear=Epsilon(0.0),
    patches=Epsilon(0.0),
    product=Halved(0.0),
    addition=Proportional(0.0),
    pooling=Proportional(0.0),
    norm="frozen",
    softmax="constant",
)
"""Gradient times input with gates, norm statistics and probabilities held constant.

Without biases it conserves relevance exactly: the relevance of all inputs sums to the score.
"""

RULE_SETS = {
    "chefer2021_full": CHEFER2021_FULL,
    "chefer2021": CHEFER2021,
    "chefer2021_detr": CHEFER2021_DETR,
    "epsilon": EPSILON,
    "gamma": GAMMA,
    "frozen": FROZEN,
}
"""The rule sets, by their name for `rules=`."""


Rules = str | RuleSet
"""Type of `rules=`: a name in `RULE_SETS`, or a rule set."""


def rule_set(chosen: Rules) -> RuleSet:
    """Return a rule set, given its name or the set itself.

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
    """Return a rule set that propagates relevance to attention probabilities.

    Raises:
        ValueError: if there is none of that name, or it holds probabilities constant.
        TypeError: if it is neither a name nor a rule set.
    """
    rules = rule_set(chosen)
    if rules.softmax == "constant":
        raise ValueError(
            f"rules={chosen!r} holds attention constant, so that it has no relevance: choose "
            f"{', '.join(name for name, of in RULE_SETS.items() if of.softmax != 'constant')}, or "
            'a RuleSet with softmax="passed"'
        )
    return rules
