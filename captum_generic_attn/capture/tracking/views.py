"""Views and the tensors that they are views of: what is written to one stands in the other."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.head_calls import Heads, no_call
from captum_generic_attn.tokens.space import PADDING


def unlike(one: AbstractValue, other: AbstractValue) -> bool:
    """Whether the token ids of two values say different things: pairs, statistics."""
    statistic = Role.STATISTIC in (one.role, other.role)
    return one.pairs != other.pairs or (statistic and one.role is not other.role)


def higher_role(one: Role, other: Role) -> Role:
    """The role of a tensor that holds elements of two."""
    return max(one, other, key=lambda role: role.rank)


def seen_from_base(
    heads: Heads, whole: AbstractValue, base: Tensor, part: AbstractValue, view: Tensor, name: str
) -> AbstractValue:
    """The value of a tensor `base`, of value `whole`, after a view of it was written to."""
    merged = whole._replace(
        ancestors=whole.ancestors | part.ancestors, data=whole.data or part.data, weighing=None
    )
    if not part.token_ids:
        return merged.without_tokens(part.lost_at or name) if part.data else merged
    if whole.data and part.data and unlike(whole, part):
        return merged._replace(role=Role.TOKENS).without_tokens(name)
    if not base.is_contiguous() or (whole.token_ids and part.pairs != whole.pairs):
        return merged.without_tokens(f"{name} through a view")
    blank = torch.full(base.shape, PADDING, dtype=torch.int32)

    def write(old: Tensor, new: Tensor) -> Tensor:
        found = old.contiguous().clone()
        offset = view.storage_offset() - base.storage_offset()
        found.as_strided(view.shape, view.stride(), offset).copy_(new)
        return found

    token_ids = tuple(map(write, whole.token_ids or [blank] * 2, part.token_ids))
    calls = None
    if whole.calls is not None or part.calls is not None:
        before = no_call(base.shape) if whole.calls is None else whole.calls
        calls = write(before, no_call(view.shape) if part.calls is None else part.calls)
    role = higher_role(whole.role, part.role)
    return heads.noted(merged._replace(role=role, token_ids=token_ids, calls=calls))


def seen_through_view(
    whole: AbstractValue, base: Tensor, part: AbstractValue, view: Tensor
) -> AbstractValue:
    """The value of a view, of value `part` before, after the tensor `base` was written to."""
    part = part._replace(ancestors=part.ancestors | whole.ancestors)
    if whole.data and not whole.token_ids:
        return part.without_tokens(whole.lost_at)
    if (
        not part.token_ids
        or len(whole.token_ids) != len(part.token_ids)
        or not base.is_contiguous()
    ):
        return part
    offset = view.storage_offset() - base.storage_offset()

    def see(ids: Tensor) -> Tensor:
        return ids.contiguous().as_strided(view.shape, view.stride(), offset)

    calls = None if whole.calls is None else see(whole.calls)
    return part._replace(token_ids=tuple(map(see, whole.token_ids)), calls=calls)
