"""The other methods of the authors' two repositories, over the same records, with the same calls.

Each class is one method, with options that choose among the authors' variants, and defaults of
their vision transformers; `docs/baselines.md` says which options give which of their columns.
`methods` has what a class makes of a call, `composition` how maps of calls are combined.
"""

from captum_generic_attn.baselines.gradients import AttentionGradCam, GradientAttention
from captum_generic_attn.baselines.propagated import (
    Lrp,
    LrpRollout,
    PartialLrp,
    TransformerAttribution,
)
from captum_generic_attn.baselines.raw import AttentionRollout, RawAttention

__all__ = [
    "AttentionGradCam",
    "AttentionRollout",
    "GradientAttention",
    "Lrp",
    "LrpRollout",
    "PartialLrp",
    "RawAttention",
    "TransformerAttribution",
]
