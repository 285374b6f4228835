"""Products with a weight: what it sums must be one token, or the tokens are lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.contraction import relabel
from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.head_calls import through_weight
from captum_generic_attn.capture.tracking.operations import Operation
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.capture.tracking.token_creation import rows
from captum_generic_attn.tokens.ids import first_along, varies


def linear(state: TrackingState, op: Operation) -> Values:
    """The last axis is mixed by a weight."""
    return [mixed(state, op.inputs[0], op.results[0], op.name)]


def mixed(state: TrackingState, tensor: Tensor, result: Tensor, name: str) -> AbstractValue:
    """The value after a weight mixed the last axis of a tensor."""
    shadow = state.tokens_of(tensor, name)
    shape = result.shape
    if shadow.role is Role.TOKENS and shadow.planes and shadow.softmax is None:
        ids = state.spaces.cache(_same_tokens, shadow.planes[0], shape)
        if ids is not None:
            if shadow.calls is None and shadow.weighing is None:
                return shadow._replace(planes=(ids,))
            calls = _calls_through(state, shadow, [tensor.ndim - 1], shape)
            return shadow._replace(planes=(ids,), calls=calls, weighing=None)
    if not shadow.planes or tensor.shape[:-1] != shape[:-1] or shadow.role is Role.STATISTIC:
        return shadow.without_tokens(name)
    calls = _calls_through(state, shadow, [tensor.ndim - 1], shape)
    shadow = shadow._replace(calls=calls, weighing=None)
    if not shadow.pairs:
        shadow = shadow._replace(role=Role.TOKENS, softmax=None)
    if any(varies(ids, -1) for ids in shadow.planes):
        if shadow.pairs:
            return shadow.without_tokens(name)  # keys are mixed, not heads
        if any(n > 1 and not varies(shadow.planes[0], i) for i, n in enumerate(shape[:-1])):
            return shadow.without_tokens(name)  # tokens are mixed, feature by feature
        shadow = rows.of_rows(state.spaces, shadow, tensor.shape, name)
    return shadow.map(lambda ids: first_along(ids, -1).expand(shape))


def _same_tokens(ids: Tensor, shape: torch.Size) -> Tensor | None:
    """The ids after a weight mixed the features of tokens; `None` if it mixed tokens."""
    if ids.shape[:-1] != shape[:-1] or varies(ids, -1):
        return None
    return first_along(ids, -1).expand(shape)


def weighted(
    state: TrackingState, tensor: Tensor, labels: Sequence[str], out_labels: Sequence[str],
    summed: set[str], result: Tensor, name: str,
) -> AbstractValue:  # fmt: skip
    """The value of a product of a tensor with a weight, given the labels of a `Contraction`."""
    if summed == {labels[-1]} and result.shape[:-1] == tensor.shape[:-1]:
        return mixed(state, tensor, result, name)
    shadow = state.of(tensor)
    carried = [relabel(ids, labels, out_labels, result.shape) for ids in shadow.planes]
    planes = tuple(ids for ids in carried if ids is not None)
    if len(planes) < len(carried) or shadow.role is Role.STATISTIC:
        return shadow.without_tokens(name)
    if shadow.role is Role.PARAMETER:
        shadow = shadow._replace(role=Role.TOKENS)
    axes = [i for i, label in enumerate(labels) if label not in out_labels]
    calls = _calls_through(state, shadow, axes, result.shape)
    return shadow._replace(planes=planes, calls=calls, weighing=None)


def _calls_through(
    state: TrackingState, shadow: AbstractValue, axes: Sequence[int], shape: torch.Size
) -> Tensor | None:
    """The attention call of each element after a weight summed axes of a tensor of this value.

    Stacked results that are summed over the stack alone, each feature by itself, meet.
    """
    if shadow.calls is None:
        return None
    through = through_weight(shadow.calls, shape)
    features = [
        axis for axis, n in enumerate(shadow.calls.shape)
        if n > 1 and axis not in axes and not any(varies(ids, axis) for ids in shadow.planes)
    ]  # fmt: skip
    if through is None and len(axes) == 1 and features:
        state.heads.add_up(shadow.calls, axes)
    return through
