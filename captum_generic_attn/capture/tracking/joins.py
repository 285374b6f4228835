"""Where tensors come to stand side by side: cat and stack, and writes into parts of a tensor.

Called by `transfer`. What brings no tokens of its own to a sequence of tokens is told apart here:
padding, values from outside the forward pass, tokens that were lost on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.head_calls import no_call
from captum_generic_attn.capture.tracking.mixture import added, is_value
from captum_generic_attn.capture.tracking.operations import Operation, on_cpu, tensors_in
from captum_generic_attn.capture.tracking.planes import first_along, same_plane, varies
from captum_generic_attn.capture.tracking.shadow import Role, Shadow
from captum_generic_attn.tokens.spaces import FOREIGN, PADDING

if TYPE_CHECKING:
    from captum_generic_attn.capture.tracking.transfer import Transfer


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
    if main.role is Role.RAW:  # its statistics are no elements
        shadows = [
            s.without_tokens(f"{op.name} with a statistic") if s.role is Role.STATISTIC else s
            for s in shadows
        ]
    rest = {key: value for key, value in op.kwargs.items() if key not in ("tensors", "out")}
    calls = None
    if any(s.calls is not None for s in shadows):
        layers = [
            no_call(t.shape) if s.calls is None else s.calls
            for t, s in zip(parts, shadows, strict=True)
        ]
        calls = op.func(layers, *op.args[1:], **rest)
    together = main._replace(
        ancestors=frozenset[int]().union(*(s.ancestors for s in shadows)),
        data=any(s.data for s in shadows),
        calls=calls,
        weighing=None,
    )
    plane = _features_side_by_side(transfer, op, parts, shadows, main)
    if plane is not None:
        return transfer.heads.noted(together._replace(planes=(plane,)))
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
    whole = together._replace(role=role, planes=tuple(planes))
    if transfer.replaced(shadows):
        axis = op.argument(1, "dim", op.kwargs.get("axis", 0)) % planes[0].ndim
        if axis in transfer.spaces.token_axes(planes[0]):
            return whole.without_tokens(f"{op.name} of tokens that attention replaced and others")
    return transfer.heads.noted(whole)


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
        together = added(transfer.spaces, kept, line)
        if together is None:
            return None
        kept = together
    return kept.expand(shape)


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
    shadow = transfer.of(target)
    sources = [t for t in op.inputs[1:] if transfer.knows(t)]
    sources = [t for t in sources if transfer.of(t).planes or transfer.of(t).data]
    ancestors = shadow.ancestors.union(*(transfer.of(t).ancestors for t in op.inputs[1:]))
    if not sources:
        return shadow._replace(ancestors=ancestors, weighing=None)
    source = transfer.of(sources[-1])
    if source.role is Role.RAW and shadow.role is Role.TOKENS and is_value(sources[-1]):
        source = transfer.tokens_of(sources[-1], op.name)
    data = source.data or shadow.data
    if (source.data and not source.planes) or (shadow.data and not shadow.planes):
        lost = source if source.data and not source.planes else shadow
        return lost._replace(ancestors=ancestors, data=data).without_tokens(op.name)
    if source.data and shadow.data and _unlike(source, shadow):
        return source._replace(role=Role.TOKENS, ancestors=ancestors).without_tokens(op.name)

    def write(before: Tensor, new: Tensor) -> Tensor:
        given = [new if a is sources[-1] else on_cpu(a) for a in op.args[1:]]
        if op.name == "setitem":
            before[given[0]] = given[1]
            return before
        if op.name == "copy":
            return given[0].expand(before.shape)
        keywords = {
            key: new if value is sources[-1] else on_cpu(value) for key, value in op.kwargs.items()
        }
        found: Tensor = getattr(torch.Tensor, op.name)(before, *given, **keywords)
        return found

    planes = []
    for number, new in enumerate(source.planes):
        whole = len(shadow.planes) == len(source.planes)
        blank = torch.full(target.shape, PADDING, dtype=torch.int32)
        planes.append(write(shadow.planes[number].clone() if whole else blank, new))
    calls = None
    if source.calls is not None or shadow.calls is not None:
        before, new = (
            no_call(t.shape) if known.calls is None else known.calls
            for t, known in ((target, shadow), (sources[-1], source))
        )
        calls = write(before.clone(), new)
    role = max(source.role, shadow.role if shadow.data else Role.NOTHING)
    return transfer.heads.noted(source._replace(
        role=role, planes=tuple(planes), ancestors=ancestors, data=data, calls=calls, weighing=None
    ))  # fmt: skip


def _unlike(one: Shadow, other: Shadow) -> bool:
    """Whether the planes of two shadows say different things: pairs, statistics."""
    statistic = Role.STATISTIC in (one.role, other.role)
    return one.pairs != other.pairs or (statistic and one.role is not other.role)


def seen_from_base(
    transfer: Transfer, whole: Shadow, base: Tensor, part: Shadow, result: Tensor, name: str
) -> Shadow:
    """The shadow of a tensor after a view of it, `result`, was written to."""
    merged = whole._replace(
        ancestors=whole.ancestors | part.ancestors, data=whole.data or part.data, weighing=None
    )
    pairs = part.role >= Role.LOGITS
    if not part.planes:
        return merged.without_tokens(part.lost or name) if part.data else merged
    if whole.data and part.data and _unlike(whole, part):
        return merged._replace(role=Role.TOKENS).without_tokens(name)
    if not base.is_contiguous() or (whole.planes and pairs != (whole.role >= Role.LOGITS)):
        return merged.without_tokens(f"{name} through a view")
    blank = torch.full(base.shape, PADDING, dtype=torch.int32)

    def write(old: Tensor, new: Tensor) -> Tensor:
        plane = old.contiguous().clone()
        offset = result.storage_offset() - base.storage_offset()
        plane.as_strided(result.shape, result.stride(), offset).copy_(new)
        return plane

    planes = tuple(map(write, whole.planes or [blank] * 2, part.planes))
    calls = None
    if whole.calls is not None or part.calls is not None:
        before = no_call(base.shape) if whole.calls is None else whole.calls
        calls = write(before, no_call(result.shape) if part.calls is None else part.calls)
    role = max(whole.role, part.role)
    return transfer.heads.noted(merged._replace(role=role, planes=planes, calls=calls))


def seen_through_view(whole: Shadow, base: Tensor, part: Shadow, view: Tensor) -> Shadow:
    """The shadow of a view, after the tensor that it is a view of was written to."""
    part = part._replace(ancestors=part.ancestors | whole.ancestors)
    if whole.data and not whole.planes:
        return part.without_tokens(whole.lost)
    if not part.planes or len(whole.planes) != len(part.planes) or not base.is_contiguous():
        return part
    offset = view.storage_offset() - base.storage_offset()

    def see(plane: Tensor) -> Tensor:
        return plane.contiguous().as_strided(view.shape, view.stride(), offset)

    calls = None if whole.calls is None else see(whole.calls)
    return part._replace(planes=tuple(map(see, whole.planes)), calls=calls)
