"""Operations that move elements: the same operation moves token ids."""

from __future__ import annotations

from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_generic_attn.capture.tracking import probe
from captum_generic_attn.capture.tracking.abstract_value import AbstractValue
from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.operations import Operation, on_cpu, tensors_in
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.tokens.identity_cache import hashable
from captum_generic_attn.tokens.ids import first_along, varies
from captum_generic_attn.tokens.space import PADDING

_REORDERS = {
    "unfold", "im2col", "gather", "index_select", "take", "take_along_dim", "flip", "roll",
    "repeat", "tile", "repeat_interleave", "rot90",
}  # fmt: skip
"""What gives tokens another layout."""


def shape(state: TrackingState, op: Operation) -> Values:
    """Views, transpositions, slices, splits and the like."""
    abstract = state.of(op.inputs[0])
    if not abstract.token_ids:  # what was lost stays lost, a softmax of it a softmax
        return [abstract._replace(calls=None, weighing=None)] * len(op.results)
    followed = (
        abstract.token_ids if abstract.calls is None else (*abstract.token_ids, abstract.calls)
    )
    try:
        moves = [_cached(state, ids, op) for ids in followed]
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        if probe.is_memory_error(error):
            raise
        moves = []  # the operation does not work on integers: tokens are lost, and it is named
    found = []
    for result, *ids in zip_longest(op.results, *moves):
        if result is None:
            break
        fits = bool(ids) and all(i is not None and i.shape == result.shape for i in ids)
        found.append(
            _laid_out(abstract, ids, op.name) if fits else abstract.without_tokens(op.name)
        )
    return found


def _laid_out(abstract: AbstractValue, ids: list[Tensor], name: str) -> AbstractValue:
    """The value of moved elements, given their ids and then their calls."""
    calls = ids.pop() if abstract.calls is not None else None
    moved_by = name if name in _REORDERS else abstract.moved_by
    return abstract._replace(token_ids=tuple(ids), calls=calls, weighing=None, moved_by=moved_by)


def _cached(state: TrackingState, ids: Tensor, op: Operation) -> list[Tensor]:
    """`moved`, from the cache if these ids were moved this way before."""
    try:
        question = op.func, hashable(op.args[1:]), hashable(op.kwargs)
    except TypeError:
        return moved(ids, op)
    return state.spaces.cache.of((ids,), question, lambda: moved(ids, op))


def moved(ids: Tensor, op: Operation) -> list[Tensor]:
    """The ids of the results of an operation that moves elements."""
    rest = on_cpu(tuple(op.args[1:]))
    if op.name == "view":
        return [ids if rest and isinstance(rest[0], torch.dtype) else ids.reshape(*rest)]
    if op.name in ("view_as", "reshape_as"):
        return [ids.reshape(rest[0].shape)]
    if op.name == "glu":
        axis = op.argument(1, "dim", -1)
        return [] if varies(ids, axis) else [ids.chunk(2, axis)[0]]
    if op.name == "view_as_complex":
        return [] if varies(ids, -1) else [first_along(ids, -1).squeeze(-1)]
    if op.name == "view_as_real":
        return [ids.unsqueeze(-1).expand(*ids.shape, 2)]
    keywords = {key: on_cpu(value) for key, value in op.kwargs.items() if key != "input"}
    if op.name in ("unfold", "im2col") and op.func is not torch.Tensor.unfold:
        # They know no integers, and pad with zeros: no token is one less than the first id.
        return [op.func(ids.double() + 1, *rest, **keywords).to(ids.dtype) - 1]
    return list(tensors_in(op.func(ids, *rest, **keywords)))


def pad(state: TrackingState, op: Operation) -> Values:
    """Padding is of no token, unless it repeats elements."""
    width, mode = op.argument(1, "pad"), op.argument(2, "mode", "constant")
    mode = mode if isinstance(mode, str) else "constant"  # aten's takes the value there

    def padded(ids: Tensor) -> Tensor:
        if mode == "constant":
            return F.pad(ids, width, value=PADDING)
        return F.pad(ids.double(), width, mode=mode).to(ids.dtype)

    abstract = state.of(op.inputs[0])
    calls = None if abstract.calls is None else padded(abstract.calls)
    return [abstract.map(padded)._replace(calls=calls, weighing=None)]


def one_hot(state: TrackingState, op: Operation) -> Values:
    """Each integer becomes a row of zeros and a one."""
    size = op.results[0].shape
    return [state.of(op.inputs[0]).map(lambda ids: ids.unsqueeze(-1).expand(size))]


def choice(state: TrackingState, op: Operation) -> Values:
    """Values are moved as the result's indices say. What chose them has no derivative."""
    abstract = state.of(op.inputs[0])
    index = op.results[-1].detach().cpu()
    axis = op.argument(1 if op.name == "sort" else 2, "dim", -1)
    axis = axis if isinstance(axis, int) and not isinstance(axis, bool) else -1
    whole = index.ndim == op.inputs[0].ndim
    index = index if whole else index.unsqueeze(axis)

    def choose(ids: Tensor) -> Tensor:
        found = torch.take_along_dim(ids, index, axis)
        return found if whole else found.squeeze(axis)

    calls = None if abstract.calls is None else choose(abstract.calls)
    chosen = abstract.map(choose)._replace(calls=calls, weighing=None)
    apart = any(
        varies(ids, i) and not varies(before, i)
        for ids, before in zip(chosen.token_ids, abstract.token_ids, strict=True)
        for i in range(ids.ndim)
        if i != axis % op.inputs[0].ndim and whole and not abstract.pairs
    )  # each feature chose for itself
    return [abstract.without_tokens(op.name) if apart else chosen]
