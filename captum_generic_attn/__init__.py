"""Generic attention explainability for any unmodified PyTorch transformer, inside Captum.

The way of the data is the way of the modules: `capture` runs a model and records its attention,
`tokens` says what the tokens are, `rules` and `relevance` hold the equations and their order,
`selection` says which calls count, `explanation` applies the equations to one score, and
`attribution` is the Captum class round it all. `lrp` propagates relevance through a model, and
`baselines` are the methods to compare with. `verify` checks maps on a model
of the user's, `metrics` measure how good an explanation is, and `evaluation` that of many pictures
or texts.
"""

from captum_generic_attn.attribution import GenericAttention
from captum_generic_attn.baselines import (
    AttentionGradCam,
    AttentionRollout,
    GradientAttention,
    Lrp,
    LrpRollout,
    PartialLrp,
    RawAttention,
    TransformerAttribution,
)
from captum_generic_attn.comparison import Comparison, all_methods, compare
from captum_generic_attn.errors import UnsupportedAttentionError, UnsupportedOperationError
from captum_generic_attn.lrp import RuleSet
from captum_generic_attn.relevance.result import Call, Relevance, Stream
from captum_generic_attn.verification import Check, Verification, verify

__version__ = "0.1.0"

__all__ = [
    "AttentionGradCam",
    "AttentionRollout",
    "Call",
    "Check",
    "Comparison",
    "GenericAttention",
    "GradientAttention",
    "Lrp",
    "LrpRollout",
    "PartialLrp",
    "RawAttention",
    "Relevance",
    "RuleSet",
    "Stream",
    "TransformerAttribution",
    "UnsupportedAttentionError",
    "UnsupportedOperationError",
    "Verification",
    "all_methods",
    "compare",
    "verify",
]
