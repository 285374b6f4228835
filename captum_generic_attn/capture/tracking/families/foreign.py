"""Attention kernels that keep their probabilities to themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role, ancestors_of
from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.operations import Operation
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.tokens.ids import first_along, varies


def skipped(state: TrackingState, op: Operation) -> Values:
    """The value behind a refused call where it is skipped: the queries' tokens go on.

    They do if the result has their places; else tokens are lost. What was refused is used on the
    user's word alone (`strict=False`, `layers=`).
    """
    return [_passed(state, op.inputs, result, op.name) for result in op.results]


def _passed(
    state: TrackingState, inputs: Sequence[Tensor], result: Tensor, name: str
) -> AbstractValue:
    """The value of one result; the first input holds the queries."""
    query = inputs[0]
    asking = state.of(query)
    ancestors = ancestors_of(state.of(t) for t in inputs if state.knows(t))
    lost = AbstractValue(Role.TOKENS, ancestors=ancestors, data=True).without_tokens(name)
    if not asking.token_ids or result.ndim != query.ndim or result.ndim == 0:
        return lost._replace(lost_at=asking.lost_at or name)
    ids = asking.token_ids[0]
    if query.shape[:-1] != result.shape[:-1] or varies(ids, -1):
        return lost
    return AbstractValue(
        Role.TOKENS, (first_along(ids, -1).expand(result.shape),), ancestors, data=True
    )
