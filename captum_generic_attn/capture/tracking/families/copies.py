"""Copies, casts and norms: the result is the first argument, as far as tokens go."""

from __future__ import annotations

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue
from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.operations import NORMS, Operation, normed_axes
from captum_generic_attn.capture.tracking.state import TrackingState


def same(state: TrackingState, op: Operation) -> Values:
    """The value of the first argument, where the shape stays."""
    operand = op.inputs[0]
    shadow = state.of(operand)
    if op.name in NORMS:
        shadow = _normed(state, shadow, op)
    return [
        shadow if result.shape == operand.shape else shadow.without_tokens(op.name)
        for result in op.results
    ]


def _normed(state: TrackingState, shadow: AbstractValue, op: Operation) -> AbstractValue:
    """The value of a norm: tokens stay what they are, unless it runs over the examples."""
    shadow = shadow._replace(weighing=None)
    if not shadow.planes:
        return shadow
    axes = state.spaces.example_axes(shadow.planes[0])
    over = normed_axes(op.name, op.args, op.kwargs, op.inputs[0].ndim)
    if axes and not axes.isdisjoint(over):
        return shadow.without_tokens(f"{op.name} over the examples")
    if not state.spaces.token_axes(shadow.planes[0]).isdisjoint(over):
        state.spaces.approximate("statistics", op.name)
    return shadow
