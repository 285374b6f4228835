"""Copies, casts and norms: the result is the first argument, as far as tokens go."""

from __future__ import annotations

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue
from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.operations import NORMS, Operation, normed_axes
from captum_generic_attn.capture.tracking.state import TrackingState


def same(state: TrackingState, op: Operation) -> Values:
    """The value of the first argument, where the shape stays."""
    operand = op.inputs[0]
    abstract = state.of(operand)
    if op.name in NORMS:
        abstract = _normed(state, abstract, op)
    return [
        abstract if result.shape == operand.shape else abstract.without_tokens(op.name)
        for result in op.results
    ]


def _normed(state: TrackingState, abstract: AbstractValue, op: Operation) -> AbstractValue:
    """The value of a norm: tokens stay what they are, unless it runs over the examples."""
    abstract = abstract._replace(weighing=None)
    if not abstract.token_ids:
        return abstract
    axes = state.spaces.example_axes(abstract.token_ids[0])
    over = normed_axes(op.name, op.args, op.kwargs, op.inputs[0].ndim)
    if axes and not axes.isdisjoint(over):
        return abstract.without_tokens(f"{op.name} over the examples")
    if not state.spaces.token_axes(abstract.token_ids[0]).isdisjoint(over):
        state.spaces.approximate("statistics", op.name)
    return abstract
