"""LRP through unmodified models: relevance propagated layer by layer, from a score to the inputs.

`rules` are functions of tensors; `rule_sets` say which rule goes where, as data; `operations` sorts
the operations of PyTorch into kinds, `choice` chooses a rule for each, and `mode` runs a model so
that its backward pass applies it. `propagation` goes through a model; `baselines` are the methods
that users call.
"""

from captum_generic_attn.lrp.rule_sets import RULE_SETS, RuleSet
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

__all__ = [
    "RULE_SETS",
    "AlphaBeta",
    "Balanced",
    "Conserved",
    "Epsilon",
    "Gamma",
    "Halved",
    "JointRule",
    "Proportional",
    "RuleSet",
    "WeightedRule",
    "ZBox",
]
