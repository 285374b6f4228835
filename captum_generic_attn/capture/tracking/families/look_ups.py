"""Look-ups: integers of an input pick rows of a table. Rows of a weight are new tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.operand import is_value
from captum_generic_attn.capture.tracking.operations import Operation, on_cpu, tensors_in
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.capture.tracking.token_creation import integers


def looks_up(state: TrackingState, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether integers of an input pick rows of a table that is no data: an embedding."""
    if len(args) + len(kwargs) < 2 or not isinstance(args[0], Tensor):
        return False
    index = index_among(state, args[1:], kwargs)
    return index is not None and not (state.knows(args[0]) and state.of(args[0]).data)


def index_among(
    state: TrackingState, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The integers of an input among the arguments of an operation."""
    for tensor in tensors_in((tuple(args), tuple(kwargs.values()))):
        whole = not is_value(tensor) and tensor.dtype != torch.bool
        abstract = state.abstract_values.get(tensor) if whole else None
        if abstract is not None and abstract.data and abstract.role in (Role.RAW, Role.NOTHING):
            return tensor
    return None


def embedding(state: TrackingState, op: Operation) -> Values:
    """Each integer becomes a token; rows of tokens are moved."""
    tensors = tensors_in((op.args, op.kwargs))
    index = index_among(state, op.args, op.kwargs)
    index = next(t for t in tensors if not is_value(t)) if index is None else index
    table = next((t for t in tensors if is_value(t)), None)
    if table is not None and state.knows(table) and state.of(table).data:
        return [_rows_of(state, table, index, op)]
    label = state.parameters.get(id(table), op.name)
    abstract, result = state.of(index), op.results[0]
    found = integers.of_integers(state.spaces, abstract, label, index, op.name)
    places = integers.places_of_index(op, table, index, result.shape)
    if not found.token_ids or places is None:
        return [found.without_tokens(op.name)]
    if state.notes_embeddings and found.data and result.requires_grad:
        picked = integers.laid_out(abstract.token_ids[0], places, result.shape)
        state.embedded.append((picked.amax(-1), get_gradient_edge(result)))
    return [found.map(lambda ids: integers.laid_out(ids, places, result.shape))]


def _rows_of(state: TrackingState, table: Tensor, index: Tensor, op: Operation) -> AbstractValue:
    """The value of rows that integers pick from tokens."""
    abstract, places = state.of(table), on_cpu(index).long()
    if index.is_floating_point() or index.ndim + table.ndim - 1 != op.results[0].ndim:
        return abstract.without_tokens(op.name)
    return abstract.map(lambda ids: ids[places])._replace(
        calls=None if abstract.calls is None else abstract.calls[places], weighing=None
    )
