"""Unlisted operations and unseen functions: their gradient tells which tokens they keep.

The operands of an unlisted operation are noted before it runs, since it may overwrite them. The
result of an `autograd.Function` or of a script is traced back to the tensors where its graph began.
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
    """An operand and its token ids in the shape of a result.

    `features` is the axis of features if the result has another number of them.
    """

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
    """Give the results of an unlisted operation their abstract values, and return the results.

    Integers carry no tokens. If they were made of integers alone, the tokens of these are lost.
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
    """The abstract value of the result of an unseen function, such as an `autograd.Function`.

    Args:
        state: what is known of the forward pass.
        tensor: the result.
        origins: the nearest known tensors of its graph.
        inside: what the operations inside the function said. If that is weights of queries over
            keys, it is kept where the gradient shows that the function does not mix queries.
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
    lost = _lost(name, abstract_values)
    if not all(abstract.token_ids for abstract in abstract_values):
        return lost
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
    return mixture(state, name, [_laid_out(a, result.shape) for a in aligned], result.shape)


def _lost(name: str, abstract_values: Sequence[AbstractValue]) -> AbstractValue:
    """The value of a result that mixes tokens of some operands: lost here, or with an operand."""
    data = any(abstract.data for abstract in abstract_values)
    known = AbstractValue(Role.TOKENS, ancestors=ancestors_of(abstract_values), data=data)
    before = next((a.lost_at for a in abstract_values if not a.token_ids), "")
    return known.without_tokens(before or name)


def _laid_out(aligned: _Aligned, shape: torch.Size) -> Operand:
    """An operand as it enters an element-wise mixture of `shape`."""
    abstract = aligned.operand.abstract
    calls = through_weight(abstract.calls, shape)
    abstract = abstract._replace(token_ids=aligned.token_ids, softmax=None, calls=calls)
    return Operand(None, shape, abstract)


def _aligned(
    state: TrackingState, name: str, operand: Operand, shape: torch.Size
) -> _Aligned | None:
    """How an operand fits a result; `None` if the result has another layout.

    One axis may have another size. It must be of features: tokens do not differ along it.
    """
    if len(operand.shape) > len(shape):
        return None
    differ = [axis for axis, n in enumerate(operand.sizes(shape)) if n not in (1, shape[axis])]
    if not differ:
        token_ids = tuple(ids.expand(shape) for ids in operand.abstract.token_ids)
        return _Aligned(operand, token_ids, None)
    if len(differ) > 1 or len(operand.shape) < len(shape):
        return None
    (axis,) = differ
    if any(varies(ids, axis) for ids in operand.abstract.token_ids):
        rows = _as_tokens(state, name, operand) if axis == len(shape) - 1 else None
        if rows is None:
            return None
        operand = rows
    token_ids = tuple(first_along(p, axis).expand(shape) for p in operand.abstract.token_ids)
    return _Aligned(operand, token_ids, axis)


def _as_tokens(state: TrackingState, name: str, operand: Operand) -> Operand | None:
    """Elements of an input as tokens, the last axis as features; `None` if that is not possible."""
    if operand.abstract.role is not Role.RAW or operand.tensor is None:
        return None
    abstract = state.tokens_of(operand.tensor, name)
    return operand._replace(abstract=abstract) if abstract.token_ids else None
