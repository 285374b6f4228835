"""Layer-wise relevance propagation (LRP) through unmodified models, from a score to the inputs.

`rules` holds the rules as functions of tensors. `rule_sets` assigns a rule to each kind of
operation. `operations` sorts the operations of PyTorch into kinds, `choice` selects the rule of one
operation, and `mode` runs a model so that its backward pass applies the rules. `propagation` runs
the forward and backward passes. The methods for users are in `baselines`.
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
