"""Views and their base tensors: what is written to one of them is also in the other."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.head_calls import Heads, no_call
from captum_generic_attn.tokens.space import PADDING


def unlike(one: AbstractValue, other: AbstractValue) -> bool:
    """Whether only one of two values is of pairs of tokens, or only one is a statistic."""
    statistic = Role.STATISTIC in (one.role, other.role)
    return one.pairs != other.pairs or (statistic and one.role is not other.role)


def higher_role(one: Role, other: Role) -> Role:
    """The role of a tensor that holds elements of two roles."""
    return max(one, other, key=lambda role: role.rank)


def seen_from_base(
    heads: Heads, whole: AbstractValue, base: Tensor, part: AbstractValue, view: Tensor, name: str
) -> AbstractValue:
    """The value of a tensor after a view of it was written to.

    Args:
        heads: the register of attention calls.
        whole: the value of the tensor before.
        base: the tensor.
        part: the value of the view.
        view: the view.
        name: the operation that wrote to it.
    """
    merged = whole._replace(
        ancestors=whole.ancestors | part.ancestors, data=whole.data or part.data, weighing=None
    )
    if not part.token_ids:
        return merged.without_tokens(part.lost_at or name) if part.data else merged
    if whole.data and part.data and unlike(whole, part):
        return merged._replace(role=Role.TOKENS).without_tokens(name)
    if not base.is_contiguous() or (whole.token_ids and part.pairs != whole.pairs):
        return merged.without_tokens(f"{name} through a view")
    before = whole.token_ids or [torch.full(base.shape, PADDING, dtype=torch.int32)] * 2
    token_ids = tuple(
        _written_through(old, base, new, view)
        for old, new in zip(before, part.token_ids, strict=False)
    )
    role = higher_role(whole.role, part.role)
    calls = _calls_from_base(whole, base, part, view)
    return heads.noted(merged._replace(role=role, token_ids=token_ids, calls=calls))


def _calls_from_base(
    whole: AbstractValue, base: Tensor, part: AbstractValue, view: Tensor
) -> Tensor | None:
    """The attention call of each element of a tensor after a view of it was written to."""
    if whole.calls is None and part.calls is None:
        return None
    before = no_call(base.shape) if whole.calls is None else whole.calls
    new = no_call(view.shape) if part.calls is None else part.calls
    return _written_through(before, base, new, view)


def _written_through(old: Tensor, base: Tensor, new: Tensor, view: Tensor) -> Tensor:
    """Ids `old` of a tensor, with ids `new` at the places that a view of it shows."""
    found = old.contiguous().clone()
    offset = view.storage_offset() - base.storage_offset()
    found.as_strided(view.shape, view.stride(), offset).copy_(new)
    return found


def seen_through_view(
    whole: AbstractValue, base: Tensor, part: AbstractValue, view: Tensor
) -> AbstractValue:
    """The value of a view after its base tensor was written to.

    Args:
        whole: the value of the base tensor.
        base: the base tensor.
        part: the value of the view before.
        view: the view.
    """
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
