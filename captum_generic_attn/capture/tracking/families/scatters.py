"""Additions at places that an index names, as in mixtures of experts and sums over segments.

`index_add`, `scatter_add` and similar operations add rows of a source to rows of a target. Rows of
the same token stay that token. Rows of different tokens become a merged token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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
from captum_generic_attn.capture.tracking.operand import is_value
from captum_generic_attn.capture.tracking.operations import Operation, on_cpu
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.tokens.ids import first_along, varies
from captum_generic_attn.tokens.space import PADDING


def scatter(state: TrackingState, op: Operation) -> Values:
    """The value of the target after the source was added to it."""
    return [added_to(state, op) if is_value(result) else None for result in op.results]


def added_to(state: TrackingState, op: Operation) -> AbstractValue:
    """The value of a target to which a source was added at the places of an index."""
    tensors = op.args[0], _source(op)
    abstract_values = [state.of(tensor) for tensor in tensors]
    together = _together(abstract_values)
    if not all(map(_has_rows, abstract_values, tensors)):
        return together.without_tokens(op.name)
    onto, from_ = map(_rows, abstract_values, tensors)
    target, shape = tensors[0].shape, op.results[0].shape
    places = _places(op, target)
    if onto is None or from_ is None or places is None:
        return together.without_tokens(op.name)
    from_ = from_.expand(places.shape)  # values that are put may broadcast
    tokens = partial(merged, state.spaces)
    rows = _row_by_row(tokens, onto.reshape(-1), from_.reshape(-1), places.reshape(-1))
    if rows is None:
        return together.irregular(op.name)
    ids = rows.view(target[:-1]).unsqueeze(-1).expand(shape)
    calls = _merged_calls(state, abstract_values, tensors, places)
    if calls is not None:
        calls = calls.view(target[:-1]).unsqueeze(-1).expand(shape)
    return state.heads.noted(together._replace(token_ids=(ids,), calls=calls))


def _together(abstract_values: Sequence[AbstractValue]) -> AbstractValue:
    """The value of the result, apart from its token ids and calls."""
    main = leading(abstract_values)
    return main._replace(
        role=main.role if main.role.of_tokens else Role.TOKENS,
        ancestors=ancestors_of(abstract_values),
        data=any(abstract.data for abstract in abstract_values),
        calls=None,
        weighing=None,
        softmax=None,
    )


def _has_rows(abstract: AbstractValue, tensor: Tensor) -> bool:
    """Whether a tensor has rows of features, each of a token or of a constant."""
    of_tokens = len(abstract.token_ids) == 1 and abstract.role is Role.TOKENS
    return tensor.ndim > 0 and (of_tokens or not abstract.data)


def _merged_calls(
    state: TrackingState,
    abstract_values: Sequence[AbstractValue],
    tensors: Sequence[Tensor],
    places: Tensor,
) -> Tensor | None:
    """The call of each row of the target `[n]`; `None` if no call or several made a row."""
    if all(abstract.calls is None for abstract in abstract_values):
        return None
    rows = []
    for abstract, tensor in zip(abstract_values, tensors, strict=True):
        calls = no_call(tensor.shape) if abstract.calls is None else abstract.calls
        if bool((calls != calls[..., :1]).any()):
            return None
        rows.append(calls[..., 0])

    def met(one: Tensor, other: Tensor) -> Tensor | None:
        return state.heads.meet(one, other, one.shape)

    onto, from_ = rows[0].reshape(-1), rows[1].expand(places.shape).reshape(-1)
    return _row_by_row(met, onto, from_, places.reshape(-1))


def _source(op: Operation) -> Tensor:
    """The tensor whose rows are added."""
    place, name = {
        "index_add": (3, "source"),
        "index_reduce": (3, "source"),
        "index_put": (2, "values"),
    }.get(op.name, (3, "src"))
    found: Tensor = op.argument(place, name)
    return found


def _rows(abstract: AbstractValue, tensor: Tensor) -> Tensor | None:
    """The token of each row, the last axis being features; `None` if they differ along it."""
    if not abstract.data or not abstract.token_ids:
        return torch.full(tensor.shape[:-1], PADDING, dtype=torch.int32)
    ids = abstract.token_ids[0]
    return None if varies(ids, -1) else first_along(ids, -1).squeeze(-1)


def _places(op: Operation, target: torch.Size) -> Tensor | None:
    """The row of the target, numbered in order, to which each row of the source is added."""
    rows = torch.arange(target[:-1].numel()).view(target[:-1])
    if op.name == "index_put":
        lists = on_cpu(tuple(op.argument(1, "indices")))
        found: Tensor = rows[tuple(slice(None) if i is None else i for i in lists)]
        return found if len(lists) < len(target) else None
    axis = op.argument(1, "dim") % len(target)
    index: Tensor = on_cpu(op.argument(2, "index"))
    if axis == len(target) - 1:
        return None  # features are added to features
    if op.name in ("index_add", "index_reduce"):
        return rows.index_select(axis, index.reshape(-1))
    small = index[..., :1]
    if not bool((index == small).all()) or index.shape[-1] != target[-1]:
        return None  # each feature has places of its own
    others = tuple(slice(n) if i != axis else slice(None) for i, n in enumerate(small.shape[:-1]))
    return rows[others].gather(axis, small.squeeze(-1))


def _row_by_row(
    join: Callable[[Tensor, Tensor], Tensor | None], onto: Tensor, from_: Tensor, places: Tensor
) -> Tensor | None:
    """What is known of the target's rows `[n]` after the source's `[m]` joined them."""
    if len(places) != len(from_):
        return None
    order = torch.argsort(places, stable=True)
    sorted_places = places[order]
    first = torch.searchsorted(sorted_places, sorted_places)
    rank = torch.arange(len(order)) - first  # how many came before to the same row
    rows = onto
    for layer in range(int(rank.max()) + 1 if len(rank) else 0):
        mine = order[rank == layer]
        arriving = torch.full_like(rows, PADDING)
        arriving[places[mine]] = from_[mine]
        met = join(rows, arriving)
        if met is None:
            return None
        rows = met
    return rows
