"""Where tensors come to stand side by side: cat and stack, and writes into parts of a tensor.

Called by `transfer`. What brings no tokens of its own to a sequence of tokens is told apart here:
padding, values from outside the forward pass, tokens that were lost on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_generic_attn.capture.operations import Operation, on_cpu, tensors_in
from captum_generic_attn.capture.planes import first_along, same_plane, varies
from captum_generic_attn.capture.shadow import Role, Shadow
from captum_generic_attn.tokens.spaces import FOREIGN, PADDING

if TYPE_CHECKING:
    from captum_generic_attn.capture.transfer import Transfer


def joined(transfer: Transfer, op: Operation) -> Shadow:
    """The shadow of tensors that are joined."""
    parts = [t for t in tensors_in(op.argument(0, "tensors")) if t.numel()]
    shadows = [transfer.of(t) for t in parts]
    if any(s.role is Role.TOKENS for s in shadows):  # raw features join tokens as tokens
        shadows = [
            transfer.tokens_of(t, op.name) if t.is_floating_point() else transfer.of(t)
            for t in parts
        ]
    main = max(shadows, key=lambda s: (s.data, s.role))
    rest = {key: value for key, value in op.kwargs.items() if key not in ("tensors", "out")}
    if calls := heads_side_by_side(parts, shadows):
        grows = op.results[0].ndim == parts[0].ndim and op.results[0].shape[-1] > parts[0].shape[-1]
        transfer.note_heads(calls, op.results[0], joined=grows)
    together = main._replace(
        ancestors=frozenset[int]().union(*(s.ancestors for s in shadows)),
        data=any(s.data for s in shadows),
    )
    plane = _features_side_by_side(transfer, op, parts, shadows, main)
    if plane is not None:
        return together._replace(planes=(plane,))
    planes = []
    pairs = main.role >= Role.LOGITS  # logits have two planes, all else one
    for number in range(max((len(s.planes) for s in shadows), default=0)):
        layers = [
            s.planes[number] if s.planes and (s.role >= Role.LOGITS) == pairs
            else _stranger(transfer, t, s, main, op.name)
            for t, s in zip(parts, shadows, strict=True)
        ]  # fmt: skip
        joined = op.func(layers, *op.args[1:], **rest)
        if joined.ndim == layers[0].ndim and not varies(joined, -1):
            joined = joined[..., :1].expand(joined.shape)  # halves of a feature axis
        planes.append(joined)
    role = Role.TOKENS if main.role is Role.PARAMETER and len(parts) > 1 else main.role
    return together._replace(role=role, planes=tuple(planes))


def _features_side_by_side(
    transfer: Transfer, op: Operation, parts: Sequence[Tensor], shadows: Sequence[Shadow],
    main: Shadow,
) -> Tensor | None:  # fmt: skip
    """The plane of tokens whose features are joined: content and position, a skip connection.

    Tokens of one sequence that are joined as features (patch merging) are told apart until a
    weight mixes them; `None` for those, and where it is the sequence that grows.
    """
    shape = op.results[0].shape
    axis = op.argument(1, "dim", op.kwargs.get("axis", 0))
    if main.role is not Role.TOKENS or not main.data or not main.planes or "cat" not in op.name:
        return None
    axis %= len(shape)
    last = axis == len(shape) - 1
    if axis == 0 or any(s.data and not s.planes for s in shadows):
        return None
    lines = []
    for part, shadow in zip(parts, shadows, strict=True):
        if not (last or part.shape[axis] > 1) or any(varies(p, axis) for p in shadow.planes):
            return None
        if shadow.data:
            lines.append(first_along(shadow.planes[0], axis))
    kept = first_along(main.planes[0], axis)
    for line in lines:
        found = [set(transfer.spaces.indices(plane)) for plane in (kept, line)]
        if found[0] & found[1] and not same_plane(kept, line):
            return None
        together = transfer.added(kept, line)
        if together is None:
            return None
        kept = together
    return kept.expand(shape)


def heads_side_by_side(
    parts: Sequence[Tensor], shadows: Sequence[Shadow]
) -> tuple[int, ...] | None:
    """The calls whose results these are, if each is of one call and all are of the same tokens."""
    calls = [shadow.ancestors for shadow in shadows]
    if len(set(calls)) < 2 or any(len(call) != 1 for call in calls):
        return None
    if not all(s.planes and p.shape == parts[0].shape for p, s in zip(parts, shadows, strict=True)):
        return None
    tokens = [first_along(shadow.planes[0], -1) for shadow in shadows]
    if not all(same_plane(plane, tokens[0]) for plane in tokens):
        return None
    return tuple(i for call in calls for i in call)


def _stranger(
    transfer: Transfer, tensor: Tensor, shadow: Shadow, main: Shadow, name: str
) -> Tensor:
    """The plane of a tensor that is joined to tokens without bringing tokens of its own."""
    if main.role >= Role.LOGITS or not tensor.is_floating_point():
        return torch.full(tensor.shape, PADDING, dtype=torch.int32)
    if shadow.data:
        rows = transfer.spaces.unknown(tensor.shape[:-1], shadow.lost or name)
        return rows.unsqueeze(-1).expand(tensor.shape)
    constant = bool((tensor == 0).all())
    return torch.full(tensor.shape, PADDING if constant else FOREIGN, dtype=torch.int32)


def written(transfer: Transfer, op: Operation) -> Shadow:
    """The shadow of a tensor after values were written into places of it."""
    target = op.inputs[0]
    shadow, sources = transfer.of(target), [t for t in op.inputs[1:] if transfer.of(t).planes]
    ancestors = frozenset[int]().union(*(transfer.of(t).ancestors for t in op.inputs))
    if not sources:
        return shadow._replace(ancestors=ancestors)
    source = transfer.of(sources[-1])
    planes = []
    for number, written in enumerate(source.planes):
        whole = len(shadow.planes) == len(source.planes)
        plane = (
            shadow.planes[number].clone() if whole
            else torch.full(target.shape, PADDING, dtype=torch.int32)
        )  # fmt: skip
        given = [written if a is sources[-1] else on_cpu(a) for a in op.args[1:]]
        if op.name == "setitem":
            plane[given[0]] = given[1]
        elif op.name == "copy":
            plane = given[0].expand(plane.shape)
        else:
            keywords = {key: on_cpu(value) for key, value in op.kwargs.items()}
            plane = getattr(torch.Tensor, op.name)(plane, *given, **keywords)
        planes.append(plane)
    role = max(source.role, shadow.role if shadow.data else Role.NOTHING)
    data = source.data or shadow.data
    return source._replace(role=role, planes=tuple(planes), ancestors=ancestors, data=data)


def seen_from_base(whole: Shadow, base: Tensor, part: Shadow, result: Tensor, name: str) -> Shadow:
    """The shadow of a tensor after a view of it, `result`, was written to."""
    merged = whole._replace(
        ancestors=whole.ancestors | part.ancestors, data=whole.data or part.data
    )
    pairs = part.role >= Role.LOGITS
    if not part.planes:
        return merged
    if not base.is_contiguous() or (whole.planes and pairs != (whole.role >= Role.LOGITS)):
        return merged.without_tokens(f"{name} through a view")
    blank = torch.full(base.shape, PADDING, dtype=torch.int32)
    planes = []
    for old, new in zip(whole.planes or [blank] * 2, part.planes, strict=False):
        plane = old.contiguous().clone()
        offset = result.storage_offset() - base.storage_offset()
        plane.as_strided(result.shape, result.stride(), offset).copy_(new)
        planes.append(plane)
    role = max(whole.role, part.role)
    return merged._replace(role=role, planes=tuple(planes))


def seen_through_view(whole: Shadow, base: Tensor, part: Shadow, view: Tensor) -> Shadow:
    """The shadow of a view, after the tensor that it is a view of was written to."""
    part = part._replace(ancestors=part.ancestors | whole.ancestors)
    if not part.planes or len(whole.planes) != len(part.planes) or not base.is_contiguous():
        return part
    offset = view.storage_offset() - base.storage_offset()
    return part._replace(
        planes=tuple(
            plane.contiguous().as_strided(view.shape, view.stride(), offset)
            for plane in whole.planes
        ),
    )
