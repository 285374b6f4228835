"""One token for each row of tokens or elements: projections, sums, groups that are pooled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.operations import Operation
from captum_generic_attn.tokens.extent import Extent
from captum_generic_attn.tokens.ids import distinct_along, first_along, repeats, varies
from captum_generic_attn.tokens.space import PADDING
from captum_generic_attn.tokens.spaces import TokenSpaces


def of_rows(
    spaces: TokenSpaces, abstract: AbstractValue, shape: torch.Size, name: str
) -> AbstractValue:
    """Each row of the last axis becomes a token: a projection of region features or patches."""
    (parents,) = abstract.token_ids
    if abstract.role is Role.TOKENS:
        parents = distinct_along(parents, -1)
    ids = spaces.created_of_rows(parents)
    if ids is None:
        return none_made(spaces, abstract, parents, name)
    return abstract._replace(role=Role.TOKENS, token_ids=(ids.unsqueeze(-1).expand(shape),))


def of_groups(
    spaces: TokenSpaces, abstract: AbstractValue, op: Operation, axes: Sequence[int]
) -> AbstractValue:
    """Tokens that are averaged or summed along axes become one token."""
    (ids,) = abstract.token_ids
    axes = [axis % ids.ndim for axis in axes]
    kept = [axis for axis in range(ids.ndim) if axis not in axes]
    small = [n if varies(ids, axis) else 1 for axis, n in enumerate(ids.shape)]
    rows = ids[tuple(slice(n) for n in small)].permute(*kept, *axes)
    rows = rows.reshape(*[small[axis] for axis in kept], -1)
    parents = spaces.created_of_rows(distinct_along(rows, -1))
    if parents is None:
        return none_made(spaces, abstract, rows, op.name)
    if op.results[0].ndim == ids.ndim:  # keepdim
        for axis in sorted(axes):
            parents = parents.unsqueeze(axis)
    return abstract._replace(token_ids=(parents.expand(op.results[0].shape),))


def of_sums(spaces: TokenSpaces, one: Tensor, other: Tensor) -> Tensor | None:
    """New token ids for the sum of two sequences of tokens; `None` if none can be made."""
    shape = one.shape
    for axis, n in enumerate(shape):  # features, be they written out
        first = [ids.narrow(axis, 0, min(1, n)) for ids in (one, other)]
        if (
            n
            and torch.equal(one, first[0].expand_as(one))
            and torch.equal(other, first[1].expand_as(other))
        ):
            one, other = first
    pairs = torch.stack([one, other], -1)
    pairs = torch.where((one == other).unsqueeze(-1), PADDING, pairs)  # a token stays itself
    born = spaces.created_of_rows(pairs)
    return None if born is None else torch.where(one == other, one, born).expand(shape)


def of_elements(spaces: TokenSpaces, elements: Tensor, tokens: Tensor) -> Tensor | None:
    """New token ids for elements of an input that are added to tokens: one at each of these.

    Args:
        spaces: the register of tokens.
        elements: ids of the elements.
        tokens: ids of the tokens, of the same shape.

    Returns:
        Ids of that shape; `None` if no tokens can be made.
    """
    features = [axis for axis in range(tokens.ndim) if not varies(tokens, axis)]
    places = [axis for axis in range(tokens.ndim) if axis not in features]
    narrow = elements
    for axis in features:
        if repeats(narrow, axis):
            narrow = first_along(narrow, axis)
    rows = narrow.permute(*places, *features)
    rows = rows.reshape(*[tokens.shape[axis] for axis in places], -1)
    ids = spaces.created_of_rows(rows)
    if ids is None:
        return None
    for axis in sorted(features):
        ids = ids.unsqueeze(axis)
    return ids.expand(tokens.shape)


def on_map(
    spaces: TokenSpaces, abstract: AbstractValue, op: Operation, parents: Tensor,
    centres: Tensor | None, extent: Extent | None = None,
) -> AbstractValue:  # fmt: skip
    """New tokens at the places of a map `[B, C, *out]`.

    Args:
        spaces: the register of tokens.
        abstract: the value of the operand.
        op: the operation.
        parents: `[B, *out, m]` ids.
        centres: `[B, *out, d]`, `None` if they are unknown.
        extent: with ranges `[B, *out, d, 2]`; `None`: that of the parents.
    """
    ids = spaces.created(parents, centres, extent)
    if ids is None:
        return none_made(spaces, abstract, parents, op.name)
    token_ids = (ids.unsqueeze(1).expand(op.results[0].shape),)
    return abstract._replace(role=Role.TOKENS, token_ids=token_ids)


def none_made(
    spaces: TokenSpaces, abstract: AbstractValue, parents: Tensor, name: str
) -> AbstractValue:
    """What is left where no tokens can be made of these parents.

    If some of them were lost before, the operation is named that lost them.
    """
    lost = [spaces[i].name for i in spaces.indices(parents) if spaces[i].kind == "unknown"]
    return abstract.without_tokens(lost[0]) if lost else abstract.irregular(name)
