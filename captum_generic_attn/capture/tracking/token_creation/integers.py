"""Look-ups: one token for each integer, as in embeddings of words, positions and types."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.operations import Operation, on_cpu
from captum_generic_attn.tokens.ids import repeats
from captum_generic_attn.tokens.spaces import TokenSpaces


def of_integers(
    spaces: TokenSpaces, abstract: AbstractValue, weight: str, index: Tensor, name: str
) -> AbstractValue:
    """The value of looked-up vectors: each integer becomes a token.

    Integers that come from no input are tokens of the parameter `weight`. Constants among integers
    of an input (the start token of a decoder) are tokens of their own.

    Returns:
        A value whose token ids have the shape of the integers.
    """
    if not abstract.token_ids:
        if abstract.data:
            return abstract.without_tokens(name)
        return AbstractValue(Role.TOKENS, (spaces.of_table(weight, index.detach().cpu()),))
    ids = spaces.created_of_rows(abstract.token_ids[0].unsqueeze(-1))
    if ids is None:
        return abstract.irregular(name)
    if bool((ids < 0).any()):
        ids = torch.where(ids < 0, spaces.of_constants(weight, ids < 0), ids)
    return AbstractValue(Role.TOKENS, (ids,), abstract.ancestors, data=abstract.data)


def places_of_index(
    op: Operation, table: Tensor | None, index: Tensor, shape: torch.Size
) -> Tensor | None:
    """The place in `index` of the integer that chose each element of a look-up's result.

    The look-up runs on a table whose rows hold these places.

    Returns:
        `None` if the operation does not choose rows along one axis.
    """
    places = torch.arange(index.numel()).view(index.shape)
    if op.name == "embedding":
        return places.unsqueeze(-1).expand(shape)
    if op.name in ("gather", "take", "take_along_dim"):
        return places.expand(shape)
    if table is None:
        return None
    if op.name in ("index_select", "select"):
        axis = op.argument(1, "dim", 0)
        return _rows_along(table, axis, index.numel()).index_select(axis, places.flatten())
    if op.name in ("getitem", "index"):
        return _places_of_list(op, table, places, shape)
    return None


def _places_of_list(
    op: Operation, table: Tensor, places: Tensor, shape: torch.Size
) -> Tensor | None:
    """As `places_of_index`, for an index with one list of integers among slices."""
    rest = on_cpu(tuple(op.args[1:]))
    picked = rest[0] if rest else None
    parts = list(picked) if isinstance(picked, (tuple, list)) else [picked]
    lists = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]
    if len(lists) != 1 or Ellipsis in parts[: lists[0]]:
        return None
    (axis,) = lists
    parts[axis] = places
    if op.name == "index":
        parts = [slice(None) if part is None else part for part in parts]
    found = _rows_along(table, axis, places.numel())[tuple(parts)]
    return found if found.shape == shape else None


def _rows_along(table: Tensor, axis: int, count: int) -> Tensor:
    """A table with `count` rows along an axis, each of which holds its number."""
    shape = [1] * table.ndim
    shape[axis] = count
    size = [count if i == axis % table.ndim else n for i, n in enumerate(table.shape)]
    return torch.arange(count).view(shape).expand(size)


def laid_out(ids: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """The token ids of integers, laid out as a look-up laid out their vectors."""
    if places.ndim > 1 and repeats(places, -1):
        return ids.reshape(-1)[places[..., 0]].unsqueeze(-1).expand(shape)
    return ids.reshape(-1)[places]
