"""Element-wise operations: the value of the result is the join of those of its operands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role, ancestors_of
from captum_generic_attn.capture.tracking.families import Values
from captum_generic_attn.capture.tracking.head_calls import no_call
from captum_generic_attn.capture.tracking.join import mixture
from captum_generic_attn.capture.tracking.operand import Operand, is_value
from captum_generic_attn.capture.tracking.operations import Operation, on_cpu
from captum_generic_attn.capture.tracking.state import TrackingState

_FILLS = {"masked_fill", "fill", "index_fill"}
"""Operations that replace elements by one number, which may be a computed one."""


def tokenwise(state: TrackingState, op: Operation) -> Values:
    """Sums, products, activations, masks."""
    if op.name == "where" and (chosen := _chosen(state, op)) is not None:
        return [chosen]
    found = [summed(state, op.name, op.inputs, result) for result in op.results]
    if op.name in _FILLS and any(state.of(t).data and is_value(t) for t in op.inputs[1:]):
        return [abstract.without_tokens(f"{op.name} by a computed number") for abstract in found]
    return found


def summed(
    state: TrackingState, name: str, inputs: Sequence[Tensor], result: Tensor
) -> AbstractValue:
    """The value of an element-wise mixture of tensors, such as their sum."""
    found = [
        Operand(t, t.shape, abstract) for t in inputs
        if state.knows(t) and t.dtype != torch.bool
        and ((abstract := state.of(t)).role is Role.RAW or is_value(t) or not is_value(result))
    ]  # fmt: skip
    return mixture(state, name, found, result.shape)


def of_the_same_tokens(
    state: TrackingState, args: Sequence[object], result: Tensor
) -> AbstractValue | None:
    """The value of a mixture whose operands all have the very same token ids.

    Most operations are such: activations, and the sums of a residual stream. `None` if this one is
    not.
    """
    if state.wrote:
        return None
    several = len(args) > 1 and isinstance(args[1], Tensor)
    common: AbstractValue | None = None
    for value in args:
        if isinstance(value, (list, tuple)):
            return None
        if not isinstance(value, Tensor):
            continue
        if value.shape != result.shape or value.dtype != result.dtype:
            return None
        abstract = state.abstract_values.get(value)
        if abstract is None or not _has_plain_tokens(abstract, several=several):
            return None
        if common is not None and abstract.token_ids[0] is not common.token_ids[0]:
            return None
        common = abstract if common is None else _united(common, abstract)
    return common


def _has_plain_tokens(abstract: AbstractValue, *, several: bool) -> bool:
    """Whether a value is of tokens, and nothing else of it matters to a mixture.

    Attention calls matter to a mixture of `several` operands.
    """
    return (
        abstract.role is Role.TOKENS
        and len(abstract.token_ids) == 1
        and abstract.softmax is None
        and abstract.weighing is None
        and (abstract.calls is None or not several)
    )


def _united(one: AbstractValue, other: AbstractValue) -> AbstractValue:
    """The first of two values of the same tokens, with the ancestors of both."""
    if one is other:
        return one
    return one._replace(ancestors=one.ancestors | other.ancestors, data=one.data or other.data)


def _chosen(state: TrackingState, op: Operation) -> AbstractValue | None:
    """The value of `where` that chooses between tokens; `None` if it does not.

    The same condition chooses between their ids.
    """
    if len(op.args) != 3 or not all(isinstance(a, Tensor) for a in op.args):
        return None
    condition, *choices = op.args
    one, other = abstract_values = [state.of(choice) for choice in choices]
    if any(a.role is not Role.TOKENS or not a.token_ids for a in abstract_values):
        return None
    shape = op.results[0].shape
    ids = torch.where(on_cpu(condition), one.token_ids[0], other.token_ids[0])
    calls = None
    if any(a.calls is not None for a in abstract_values):
        before = [
            no_call(c.shape) if a.calls is None else a.calls
            for c, a in zip(choices, abstract_values, strict=True)
        ]
        calls = torch.where(on_cpu(condition), before[0], before[1]).expand(shape)
    return state.heads.noted(
        one._replace(
            token_ids=(ids.expand(shape),),
            ancestors=ancestors_of(abstract_values),
            data=one.data or other.data,
            calls=calls,
            weighing=None,
        )
    )
