"""Operations in no list, and functions whose inside no mode sees: tokens as their gradient tells.

`mode` notes the operands before an unknown operation runs, since it may write over them; what an
`autograd.Function` or a script returned is followed to the tensors that its graph began from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_generic_attn.capture.tracking import probe
from captum_generic_attn.capture.tracking.abstract_value import (
    AbstractValue,
    Origin,
    Role,
    ancestors_of,
)
from captum_generic_attn.capture.tracking.head_calls import through_weight
from captum_generic_attn.capture.tracking.join import mixture
from captum_generic_attn.capture.tracking.operand import Operand, is_value
from captum_generic_attn.capture.tracking.operations import tensors_in
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.tokens.ids import first_along, varies


class Given(NamedTuple):
    """An operand of an unknown operation, and where the graph held it before the operation ran."""

    operand: Operand
    edge: GradientEdge | None


class _Aligned(NamedTuple):
    """An operand, its token_ids in the shape of a result, its axis of features if that differs."""

    operand: Operand
    token_ids: tuple[Tensor, ...]
    features: int | None


def given_to(state: TrackingState, args: object, kwargs: object) -> list[Given]:
    """The operands of an operation that is about to run."""
    return [
        Given(
            Operand(t, t.shape, state.of(t)),
            get_gradient_edge(t) if t.requires_grad and is_value(t) else None,
        )
        for t in tensors_in((args, kwargs))
        if state.knows(t)
    ]


def results_of(
    state: TrackingState, name: str, given: Sequence[Given], out: object, *, in_place: bool
) -> list[Tensor]:
    """Give the results of an operation in no list their abstract_values, and return them.

    Integers carry no tokens, unless they were made of integers alone: those of ids are lost.
    """
    feeding = [g for g in given if g.operand.abstract.data]
    known = set() if in_place else {id(g.operand.tensor) for g in given}
    results = [t for t in tensors_in(out) if id(t) not in known and t.dtype != torch.bool]
    for result in results:
        if not feeding:
            operands = [g.operand for g in given]
            state.abstract_values[result] = mixture(state, name, operands, result.shape)
        elif is_value(result):
            found = [g for g in feeding if g.operand.differentiable]
            state.abstract_values[result] = _probed(state, name, found, result)
        elif not any(g.operand.differentiable for g in feeding):
            state.abstract_values[result] = feeding[0].operand.abstract.without_tokens(name)
    return results


def found_behind(
    state: TrackingState, tensor: Tensor, origins: Sequence[Origin], inside: AbstractValue
) -> AbstractValue:
    """The abstract value of what a function made that no mode sees, such as an `autograd.Function`.

    Args:
        state: what is known of the forward pass.
        tensor: what came out.
        origins: the nearest tensors of its graph that are known.
        inside: what the operations inside the function said; where they made weights of queries
            over keys, it is asked whether queries stay apart.
    """
    name = type(tensor.grad_fn).__name__.rstrip("0").removesuffix("Backward")  # .name is the user's
    name = f"{name}, a function whose inside torch does not show"
    given = [Given(Operand(None, o.shape, o.abstract), o.edge) for o in origins]
    if inside.pairs and len(inside.token_ids) == 2:
        keys = [axis for axis in range(tensor.ndim) if varies(inside.token_ids[1], axis)]
        places = [
            axis for axis in range(tensor.ndim)
            if varies(inside.token_ids[0], axis) and axis not in keys
        ]  # fmt: skip
        sources = [probe.Source(o.edge, o.shape) for o in origins if o.shape == tensor.shape]
        whole = len(sources) == len(origins)
        if whole and probe.keeps_places(tensor, sources, places, state.hooks):
            return inside
    return _probed(state, name, given, tensor)


def _probed(
    state: TrackingState, name: str, given: Sequence[Given], result: Tensor
) -> AbstractValue:
    """The abstract value of a result whose operation is known by its gradient alone."""
    abstract_values = [g.operand.abstract for g in given]
    ancestors = ancestors_of(abstract_values)
    data = any(abstract.data for abstract in abstract_values)
    lost = AbstractValue(Role.TOKENS, ancestors=ancestors, data=data).without_tokens(name)
    for abstract in abstract_values:
        if not abstract.token_ids:
            return lost._replace(lost_at=abstract.lost_at or name)
    aligned: list[_Aligned] = []
    sources: list[probe.Source] = []
    for operand, edge in given:
        found = _aligned(state, name, operand, result.shape)
        if found is None or edge is None:
            return lost
        aligned.append(found)
        sources.append(probe.Source(edge, operand.shape, found.features))
    places = [
        axis for axis in range(result.ndim)
        if any(varies(ids, axis) for found in aligned for ids in found.token_ids)
    ]  # fmt: skip
    if not probe.keeps_places(result, sources, places, state.hooks):
        return lost
    laid_out = []
    for found in aligned:
        abstract = found.operand.abstract
        calls = through_weight(abstract.calls, result.shape)
        abstract = abstract._replace(token_ids=found.token_ids, softmax=None, calls=calls)
        laid_out.append(Operand(None, result.shape, abstract))
    return mixture(state, name, laid_out, result.shape)


def _aligned(
    state: TrackingState, name: str, operand: Operand, shape: torch.Size
) -> _Aligned | None:
    """How an operand fits a result; `None` if the result has another layout."""
    token_ids = operand.abstract.token_ids
    if len(operand.shape) > len(shape):
        return None
    sizes = [1] * (len(shape) - len(operand.shape)) + list(operand.shape)
    apart = [axis for axis, n in enumerate(shape) if sizes[axis] not in (1, n)]
    if not apart:
        return _Aligned(operand, tuple(ids.expand(shape) for ids in token_ids), None)
    if len(apart) > 1 or len(operand.shape) < len(shape):
        return None
    (axis,) = apart
    if any(varies(ids, axis) for ids in token_ids):
        rows = operand.abstract.role is Role.RAW and axis == len(shape) - 1
        if not rows or operand.tensor is None:
            return None
        operand = operand._replace(abstract=state.tokens_of(operand.tensor, name))
        token_ids = operand.abstract.token_ids
        if not token_ids:
            return None
    return _Aligned(operand, tuple(first_along(p, axis).expand(shape) for p in token_ids), axis)
