"""Writes into a tensor: values that are set, copied or scattered into some of its elements."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.families.look_ups import index_among
from captum_generic_attn.capture.tracking.families.scatters import added_to
from captum_generic_attn.capture.tracking.head_calls import no_call
from captum_generic_attn.capture.tracking.operand import is_value
from captum_generic_attn.capture.tracking.operations import Operation, on_cpu
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.capture.tracking.views import higher_role, unlike
from captum_generic_attn.tokens.space import PADDING


def write(state: TrackingState, op: Operation) -> Values:
    """Elements of the first argument are replaced."""
    if op.name == "index_put" and op.argument(3, "accumulate", default=False):
        return [added_to(state, op) if is_value(result) else None for result in op.results]
    if op.name == "scatter" and (marked := _marked(state, op)) is not None:
        return [marked]
    return [_written(state, op)]


def _marked(state: TrackingState, op: Operation) -> AbstractValue | None:
    """The value of one-hot rows, written by integers of an input; `None` if it is another write."""
    index = index_among(state, op.args[2:3], op.kwargs)
    result = op.results[0]
    if index is None or len(op.inputs) != 2 or state.of(op.args[0]).data:
        return None
    last = op.argument(1, "dim") in (-1, result.ndim - 1)
    if index.ndim != result.ndim or index.shape[-1] != 1 or not last:
        return None
    return state.of(index).map(lambda ids: ids.expand(result.shape))


def _written(state: TrackingState, op: Operation) -> AbstractValue:
    """The value of a tensor after values were written into some of its elements."""
    target = op.inputs[0]
    abstract = state.of(target)
    new = _new_values(state, op)
    ancestors = abstract.ancestors.union(*(state.of(t).ancestors for t in op.inputs[1:]))
    if new is None:
        return abstract._replace(ancestors=ancestors, weighing=None)
    among_tokens = abstract.role is Role.TOKENS and is_value(new)
    source = _as_tokens(state, op, new) if among_tokens else state.of(new)
    data = source.data or abstract.data
    for lost in (source, abstract):
        if lost.data and not lost.token_ids:
            return lost._replace(ancestors=ancestors, data=data).without_tokens(op.name)
    if source.data and abstract.data and unlike(source, abstract):
        return source._replace(role=Role.TOKENS, ancestors=ancestors).without_tokens(op.name)
    return state.heads.noted(
        source._replace(
            role=higher_role(source.role, abstract.role if abstract.data else Role.NOTHING),
            token_ids=_ids(op, target, abstract, new, source),
            ancestors=ancestors,
            data=data,
            calls=_calls(op, target, abstract, new, source),
            weighing=None,
        )
    )


def _new_values(state: TrackingState, op: Operation) -> Tensor | None:
    """The tensor whose values are written, if anything is known of it."""
    known = [t for t in op.inputs[1:] if state.knows(t)]
    sources = [t for t in known if state.of(t).token_ids or state.of(t).data]
    return sources[-1] if sources else None


def _as_tokens(state: TrackingState, op: Operation, new: Tensor) -> AbstractValue:
    """The value of what is written among tokens: elements of an input become tokens."""
    source = state.of(new)
    return state.tokens_of(new, op.name) if source.role is Role.RAW else source


def _ids(
    op: Operation, target: Tensor, abstract: AbstractValue, new: Tensor, source: AbstractValue
) -> tuple[Tensor, ...]:
    """The token ids of the target after elements of `new` were written to it."""
    if len(abstract.token_ids) == len(source.token_ids):
        before = [ids.clone() for ids in abstract.token_ids]
    else:
        before = [torch.full(target.shape, PADDING, dtype=torch.int32) for _ in source.token_ids]
    return tuple(_run(op, b, new, ids) for b, ids in zip(before, source.token_ids, strict=True))


def _calls(
    op: Operation, target: Tensor, abstract: AbstractValue, new: Tensor, source: AbstractValue
) -> Tensor | None:
    """The attention call of each element, after elements of `new` were written to the target."""
    if source.calls is None and abstract.calls is None:
        return None
    before = no_call(target.shape) if abstract.calls is None else abstract.calls
    calls = no_call(new.shape) if source.calls is None else source.calls
    return _run(op, before.clone(), new, calls)


def _run(op: Operation, before: Tensor, new: Tensor, ids: Tensor) -> Tensor:
    """The operation on ids: `before` in place of the target, and `ids` in place of `new`."""
    given = [ids if a is new else on_cpu(a) for a in op.args[1:]]
    if op.name == "setitem":
        before[given[0]] = given[1]
        return before
    if op.name == "copy":
        return given[0].expand(before.shape)
    keywords = {key: ids if value is new else on_cpu(value) for key, value in op.kwargs.items()}
    found: Tensor = getattr(torch.Tensor, op.name)(before, *given, **keywords)
    return found
