"""Products with a weight. The elements that it sums must be of one token, or tokens are lost."""

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
    """A linear layer: a weight mixes the last axis."""
    return [mixed(state, op.inputs[0], op.results[0], op.name)]


def mixed(state: TrackingState, tensor: Tensor, result: Tensor, name: str) -> AbstractValue:
    """The value after a weight mixed the last axis of a tensor."""
    abstract = state.tokens_of(tensor, name)
    shape = result.shape
    if abstract.role is Role.TOKENS and abstract.token_ids and abstract.softmax is None:
        ids = state.spaces.cache(_same_tokens, abstract.token_ids[0], shape)
        if ids is not None:
            return _through(state, abstract, tensor.ndim - 1, shape)._replace(token_ids=(ids,))
    if not abstract.token_ids or tensor.shape[:-1] != shape[:-1] or abstract.role is Role.STATISTIC:
        return abstract.without_tokens(name)
    abstract = _through(state, abstract, tensor.ndim - 1, shape)
    if not abstract.pairs:
        abstract = abstract._replace(role=Role.TOKENS, softmax=None)
    if any(varies(ids, -1) for ids in abstract.token_ids):
        abstract = _of_mixed_rows(state, abstract, tensor.shape, name)
    return abstract.map(lambda ids: first_along(ids, -1).expand(shape))


def _of_mixed_rows(
    state: TrackingState, abstract: AbstractValue, shape: torch.Size, name: str
) -> AbstractValue:
    """The value where a weight mixes rows of several tokens: each row becomes one token of them."""
    if abstract.pairs:
        return abstract.without_tokens(name)  # keys are mixed, not heads
    ids = abstract.token_ids[0]
    if any(n > 1 and not varies(ids, axis) for axis, n in enumerate(shape[:-1])):
        return abstract.without_tokens(name)  # tokens are mixed, feature by feature
    return rows.of_rows(state.spaces, abstract, shape, name)


def _through(
    state: TrackingState, abstract: AbstractValue, axis: int, shape: torch.Size
) -> AbstractValue:
    """The value without what a weight ends that sums an axis: calls of features, a weighing."""
    if abstract.calls is None and abstract.weighing is None:
        return abstract
    calls = _calls_through(state, abstract, [axis], shape)
    return abstract._replace(calls=calls, weighing=None)


def _same_tokens(ids: Tensor, shape: torch.Size) -> Tensor | None:
    """The ids after a weight mixed the features of tokens; `None` if it mixed tokens."""
    if ids.shape[:-1] != shape[:-1] or varies(ids, -1):
        return None
    return first_along(ids, -1).expand(shape)


def weighted(
    state: TrackingState, tensor: Tensor, labels: Sequence[str], out_labels: Sequence[str],
    summed: set[str], result: Tensor, name: str,
) -> AbstractValue:  # fmt: skip
    """The value of a product of a tensor with a weight, by the labels of its `Contraction`."""
    if summed == {labels[-1]} and result.shape[:-1] == tensor.shape[:-1]:
        return mixed(state, tensor, result, name)
    abstract = state.of(tensor)
    carried = [relabel(ids, labels, out_labels, result.shape) for ids in abstract.token_ids]
    token_ids = tuple(ids for ids in carried if ids is not None)
    if len(token_ids) < len(carried) or abstract.role is Role.STATISTIC:
        return abstract.without_tokens(name)
    if abstract.role is Role.PARAMETER:
        abstract = abstract._replace(role=Role.TOKENS)
    axes = [i for i, label in enumerate(labels) if label not in out_labels]
    calls = _calls_through(state, abstract, axes, result.shape)
    return abstract._replace(token_ids=token_ids, calls=calls, weighing=None)


def _calls_through(
    state: TrackingState, abstract: AbstractValue, axes: Sequence[int], shape: torch.Size
) -> Tensor | None:
    """The attention call of each element after a weight summed axes of a tensor of this value.

    Results of several calls that are stacked, and summed over the stack alone, are added up.
    """
    if abstract.calls is None:
        return None
    through = through_weight(abstract.calls, shape)
    features = [
        axis for axis, n in enumerate(abstract.calls.shape)
        if n > 1 and axis not in axes and not any(varies(ids, axis) for ids in abstract.token_ids)
    ]  # fmt: skip
    if through is None and len(axes) == 1 and features:
        state.heads.add_up(abstract.calls, axes)
    return through
