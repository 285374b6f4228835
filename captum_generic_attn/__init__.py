"""Generic attention explainability for any unmodified PyTorch transformer, inside Captum.

The way of the data is the way of the modules: `capture` runs a model and records its attention,
`tokens` says what the tokens are, `rules` and `relevance` hold the equations and their order,
`explanation` applies them to one score, and `attribution` is the Captum class round it all.
"""

from captum_generic_attn.attribution import GenericAttention
from captum_generic_attn.capture import UnsupportedAttentionError
from captum_generic_attn.relevance import Call, Relevance, Stream

__all__ = ["Call", "GenericAttention", "Relevance", "Stream", "UnsupportedAttentionError"]
