"""Convolutions, poolings and resizings of maps."""

from __future__ import annotations

from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.head_calls import through_weight
from captum_generic_attn.capture.tracking.operations import Operation
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.capture.tracking.token_creation.maps import of_windows
from captum_generic_attn.capture.tracking.token_creation.resizing import of_resized


def window(state: TrackingState, op: Operation) -> Values:
    """Each place reads the elements of a window."""
    abstract = state.of(op.inputs[0])
    calls = through_weight(abstract.calls, op.results[0].shape)
    return [of_windows(state.spaces, abstract, op)._replace(calls=calls, weighing=None)]


def resize(state: TrackingState, op: Operation) -> Values:
    """A map is interpolated."""
    abstract = state.of(op.inputs[0])
    if not abstract.token_ids:
        return [abstract.without_tokens(op.name)]
    return [of_resized(state.spaces, abstract, op)]
