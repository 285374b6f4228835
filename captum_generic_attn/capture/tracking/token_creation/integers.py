"""One token for each integer of a look-up: embeddings of words, positions and types."""

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
    """Each integer becomes a token; a token of the parameter `weight` if it comes from no input.

    Among integers of an input, constants (the start token of a decoder) are tokens of their own.

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
    """Of each element of a look-up's result, the place of its integer in `index`.

    The operation runs on a table whose rows hold these places. `None` if the operation does not
    pick rows along one axis.
    """
    places = torch.arange(index.numel()).view(index.shape)
    if op.name == "embedding":
        return places.unsqueeze(-1).expand(shape)
    if op.name in ("gather", "take", "take_along_dim"):
        return places.expand(shape)
    if table is None:
        return None
    axis, rest = 0, on_cpu(tuple(op.args[1:]))
    if op.name in ("index_select", "select"):
        axis = op.argument(1, "dim", 0)
        flat = places.flatten()
        rows = _rows_along(table, axis, index.numel())
        return rows.index_select(axis, flat)
    picked = rest[0] if rest else None
    parts = list(picked) if isinstance(picked, (tuple, list)) else [picked]
    lists = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]
    if op.name not in ("getitem", "index") or len(lists) != 1 or Ellipsis in parts[: lists[0]]:
        return None
    axis = lists[0]
    parts[axis] = places
    found = _rows_along(table, axis, index.numel())[tuple(
        slice(None) if part is None and op.name == "index" else part for part in parts
    )]  # fmt: skip
    return found if found.shape == shape else None


def _rows_along(table: Tensor, axis: int, count: int) -> Tensor:
    """`count` numbered rows along an axis of a table of otherwise the same shape."""
    shape = [1] * table.ndim
    shape[axis] = count
    size = [count if i == axis % table.ndim else n for i, n in enumerate(table.shape)]
    return torch.arange(count).view(shape).expand(size)


def laid_out(ids: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """The token ids of integers, where a look-up put them."""
    if places.ndim > 1 and repeats(places, -1):
        return ids.reshape(-1)[places[..., 0]].unsqueeze(-1).expand(shape)
    return ids.reshape(-1)[places]
