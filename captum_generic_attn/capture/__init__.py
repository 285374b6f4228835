"""Capture: runs a model once and records its attention. No other room touches a model.

`forward` runs the model under the function mode of `mode`, which tracks the token of each element
(`tracking`) and takes parameters as `constants`. `attention` recognises attention that the model
computes itself, `fused_kernels` lists the fused functions; `explicit_calls` and `fused_calls` hand
both to the `recorder`. `scope` knows which module is running.

The result is a `Capture` (`captured`). Each `record` holds the `operands` of a call, from which
`blocks` computes attention and its gradient during the backward pass. `graph` finds the calls that
a score depends on. `unsupported` says why a call cannot be explained.
"""

from captum_generic_attn.capture.captured import Capture, name_of_input, no_attention_message
from captum_generic_attn.capture.forward import capture_forward
from captum_generic_attn.capture.graph import Reached, reached_by
from captum_generic_attn.capture.record import AttentionRecord
from captum_generic_attn.capture.unsupported import UnsupportedCall
from captum_generic_attn.capture.witness import Witness

__all__ = [
    "AttentionRecord",
    "Capture",
    "Reached",
    "UnsupportedCall",
    "Witness",
    "capture_forward",
    "name_of_input",
    "no_attention_message",
    "reached_by",
]
