"""Capture: the only room that touches a model.

`forward` runs the model under `mode`, a function mode that carries a shadow (`shadow`) beside each
tensor by the transfers of `transfer` (with `births` and `joins`), looked up by the families of
`operations`, on `constants` in place of parameters; `scope` knows which module is running;
`attention` recognises attention calls and `recorder` keeps them as records (`record`). What of them
a score reaches tells `graph`; their attention and its gradient come in `blocks`. What calls read is
kept by a `witness` where `verify` asks for it.
"""

from captum_generic_attn.capture.forward import (
    Capture,
    capture_forward,
    name_of_input,
    no_attention_message,
)
from captum_generic_attn.capture.graph import Reached, reached_by
from captum_generic_attn.capture.record import AttentionRecord
from captum_generic_attn.capture.recorder import Refusal
from captum_generic_attn.capture.witness import Witness

__all__ = [
    "AttentionRecord",
    "Capture",
    "Reached",
    "Refusal",
    "Witness",
    "capture_forward",
    "name_of_input",
    "no_attention_message",
    "reached_by",
]
