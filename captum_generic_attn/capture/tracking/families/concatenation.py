"""Concatenation and stacking: along the batch, along tokens, or along features.

Along the batch and along tokens, ids stand side by side as the elements do. Along features, tokens
at one position are merged. What brings no tokens of its own to a sequence is told apart: padding,
values from outside the forward pass, tokens that were lost before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import (
    AbstractValue,
    Role,
    ancestors_of,
    leading,
)
from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.head_calls import no_call
from captum_generic_attn.capture.tracking.join import merged
from captum_generic_attn.capture.tracking.operations import Operation, tensors_in
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.tokens.ids import first_along, same_ids, varies
from captum_generic_attn.tokens.space import EXTERNAL, PADDING


class _Part(NamedTuple):
    """A tensor that is joined with others, and its value."""

    tensor: Tensor
    abstract: AbstractValue


def joined(state: TrackingState, op: Operation) -> Values:
    """The value of tensors that are joined."""
    parts = _parts(state, op)
    main = leading(part.abstract for part in parts)
    if main.role is Role.RAW:  # its statistics are no elements
        lost = f"{op.name} with a statistic"
        parts = [
            p._replace(abstract=p.abstract.without_tokens(lost))
            if p.abstract.role is Role.STATISTIC
            else p
            for p in parts
        ]
    whole = main._replace(
        ancestors=ancestors_of(part.abstract for part in parts),
        data=any(part.abstract.data for part in parts),
        calls=_calls(op, parts),
        weighing=None,
    )
    ids = _merged_features(state, parts, main, op) if _along_features(parts, main, op) else None
    if ids is not None:
        return [state.heads.noted(whole._replace(token_ids=(ids,)))]
    return [_side_by_side(state, op, parts, main, whole)]


def _parts(state: TrackingState, op: Operation) -> list[_Part]:
    """What is joined; elements of inputs that are joined with tokens are tokens."""
    parts = [_Part(t, state.of(t)) for t in tensors_in(op.argument(0, "tensors")) if t.numel()]
    if not any(part.abstract.role is Role.TOKENS for part in parts):
        return parts
    return [
        _Part(t, state.tokens_of(t, op.name) if t.is_floating_point() else state.of(t))
        for t, _ in parts
    ]


def _axis(op: Operation) -> int:
    """The axis along which tensors are joined."""
    axis: int = op.argument(1, "dim", op.kwargs.get("axis", 0))
    return axis % op.results[0].ndim


def _run(op: Operation, tensors: Sequence[Tensor]) -> Tensor:
    """The operation on other tensors."""
    rest = {key: value for key, value in op.kwargs.items() if key not in ("tensors", "out")}
    found: Tensor = op.func(tensors, *op.args[1:], **rest)
    return found


def _calls(op: Operation, parts: Sequence[_Part]) -> Tensor | None:
    """The attention call of each element of the result."""
    if all(part.abstract.calls is None for part in parts):
        return None
    return _run(op, [no_call(t.shape) if s.calls is None else s.calls for t, s in parts])


def _along_features(parts: Sequence[_Part], main: AbstractValue, op: Operation) -> bool:
    """Whether features of tokens are joined, of which no part has tokens along the axis."""
    axis = _axis(op)
    if main.role is not Role.TOKENS or not main.data or not main.token_ids or "cat" not in op.name:
        return False
    if axis == 0 or any(s.data and not s.token_ids for _, s in parts):
        return False
    last = axis == op.results[0].ndim - 1
    return all(
        (last or tensor.shape[axis] > 1)
        and not any(varies(ids, axis) for ids in abstract.token_ids)
        for tensor, abstract in parts
    )


def _merged_features(
    state: TrackingState, parts: Sequence[_Part], main: AbstractValue, op: Operation
) -> Tensor | None:
    """The ids of tokens whose features are joined: content and position, a skip connection.

    Different tokens of one space that are joined (patch merging) are told apart until a weight
    mixes them: `None` for those.
    """
    axis = _axis(op)
    kept = first_along(main.token_ids[0], axis)
    for abstract in (part.abstract for part in parts if part.abstract.data):
        line = first_along(abstract.token_ids[0], axis)
        one, other = (set(state.spaces.indices(ids)) for ids in (kept, line))
        if one & other and not same_ids(kept, line):
            return None
        together = merged(state.spaces, kept, line)
        if together is None:
            return None
        kept = together
    return kept.expand(op.results[0].shape)


def _side_by_side(
    state: TrackingState,
    op: Operation,
    parts: Sequence[_Part],
    main: AbstractValue,
    whole: AbstractValue,
) -> AbstractValue:
    """The value of tensors that are joined along the batch or along tokens."""
    token_ids = []
    for number in range(max((len(part.abstract.token_ids) for part in parts), default=0)):
        layers = [
            part.abstract.token_ids[number]
            if part.abstract.token_ids and part.abstract.pairs == main.pairs
            else _without_tokens(state, part, main, op.name)
            for part in parts
        ]
        ids = _run(op, layers)
        if ids.ndim == layers[0].ndim and not varies(ids, -1):
            ids = ids[..., :1].expand(ids.shape)  # halves of a feature axis
        token_ids.append(ids)
    role = Role.TOKENS if main.role is Role.PARAMETER and len(parts) > 1 else main.role
    found = whole._replace(role=role, token_ids=tuple(token_ids))
    along_tokens = state.replaced([part.abstract for part in parts]) and (
        _axis(op) in state.spaces.token_axes(token_ids[0])
    )
    if along_tokens:
        return found.without_tokens(f"{op.name} of tokens that attention replaced and others")
    return state.heads.noted(found)


def _without_tokens(state: TrackingState, part: _Part, main: AbstractValue, name: str) -> Tensor:
    """The ids of a tensor that brings no tokens of its own to those that it is joined with."""
    tensor, abstract = part
    if main.pairs or not tensor.is_floating_point():
        return torch.full(tensor.shape, PADDING, dtype=torch.int32)
    if abstract.data:
        rows = state.spaces.unknown(tensor.shape[:-1], abstract.lost_at or name)
        return rows.unsqueeze(-1).expand(tensor.shape)
    constant = bool((tensor == 0).all())
    return torch.full(tensor.shape, PADDING if constant else EXTERNAL, dtype=torch.int32)
