"""Reductions along axes, and operations after which tokens are always lost."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role, ancestors_of
from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.families.elementwise import tokenwise
from captum_generic_attn.capture.tracking.operand import is_value
from captum_generic_attn.capture.tracking.operations import Operation
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.capture.tracking.token_creation import rows
from captum_generic_attn.tokens.ids import first_along, varies

_REDUCED_BY_ORDER = {"norm", "vector_norm", "linalg_norm", "linalg_vector_norm"}
"""Reductions whose second argument is the order of the norm, and the third the axes."""


def mix(state: TrackingState, op: Operation) -> Values:
    """Scans, Fourier transforms and similar operations: tokens are lost."""
    abstract_values = [state.of(t) for t in op.inputs]
    main = max(abstract_values, key=lambda abstract: abstract.data)
    lost = main._replace(ancestors=ancestors_of(abstract_values)).without_tokens(op.name)
    # Running sums of masks are positions, not values of tokens.
    return [lost if is_value(result) else None for result in op.results]


def reduce(state: TrackingState, op: Operation) -> Values:
    """Sums, means and maxima along axes.

    Tokens that are reduced together become one token. Elements of an example become a statistic.
    """
    if len(op.inputs) > 1 and isinstance(op.args[-1], Tensor):  # max(a, b): element by element
        return tokenwise(state, op)
    abstract = state.of(op.inputs[0])
    given = _reduced_axes(op)
    axes = range(op.inputs[0].ndim) if given is None else given
    calls = None if abstract.calls is None else state.heads.add_up(abstract.calls, axes)
    abstract = abstract._replace(calls=None, weighing=None)
    kept = not any(varies(ids, axis) for ids in abstract.token_ids for axis in axes)
    found: list[AbstractValue | None] = []
    for result in op.results:
        if not result.is_floating_point():
            found.append(None)
            continue
        if kept:
            value = _reduced(abstract, axes, result, op.name)
        else:
            value = _merged(state, op, abstract, given, result)
        found.append(_with_calls(state, value, calls, axes, result))
    return found


def _merged(
    state: TrackingState, op: Operation, abstract: AbstractValue, axes: Sequence[int] | None,
    result: Tensor,
) -> AbstractValue:  # fmt: skip
    """The value of a reduction of several tokens, or of several elements, to one."""
    if axes is None or not abstract.data or len(abstract.token_ids) != 1:
        return abstract.without_tokens(op.name)
    if abstract.role is Role.TOKENS:
        return rows.of_groups(state.spaces, abstract, op, axes)
    if _within_examples(state, abstract, op.inputs[0], axes):
        return _reduced(abstract._replace(role=Role.STATISTIC), axes, result, op.name)
    return abstract.without_tokens(op.name)


def _within_examples(
    state: TrackingState, abstract: AbstractValue, operand: Tensor, axes: Sequence[int]
) -> bool:
    """Whether a reduction of elements makes a statistic: each number is of one example alone."""
    if abstract.role not in (Role.RAW, Role.STATISTIC):
        return False
    examples = state.spaces.example_axes(abstract.token_ids[0])
    return examples.isdisjoint(axis % operand.ndim for axis in axes)


def _reduced(
    abstract: AbstractValue, axes: Sequence[int], result: Tensor, name: str
) -> AbstractValue:
    """The value of a reduction in which the first id along each axis stands for all of them."""
    token_ids = []
    for ids in abstract.token_ids:
        for axis in axes:
            ids = first_along(ids, axis)
        token_ids.append(ids)
    if not token_ids or any(ids.numel() != result.numel() for ids in token_ids):
        return abstract.without_tokens(name)
    return abstract._replace(token_ids=tuple(ids.reshape(result.shape) for ids in token_ids))


def _with_calls(
    state: TrackingState,
    value: AbstractValue,
    calls: Tensor | None,
    axes: Sequence[int],
    result: Tensor,
) -> AbstractValue:
    """The value with the attention calls of its elements, if tokens are known."""
    if calls is None or not value.token_ids:
        return value
    small = calls if calls.ndim == result.ndim else calls.squeeze(tuple(axes))
    return state.heads.noted(value._replace(calls=small))


def _reduced_axes(op: Operation) -> Sequence[int] | None:
    """The axes that a reduction removes; `None` for all."""
    place = 2 if op.name in _REDUCED_BY_ORDER else 1
    axes = op.argument(place, "dim", op.kwargs.get("axis"))
    if isinstance(axes, bool) or axes is None:
        return None
    if isinstance(axes, int):
        return [axes]
    return list(axes) if isinstance(axes, (tuple, list)) and axes else None
