"""Operations that act on each element by itself: the result is the join of their operands."""

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
"""What puts a number in the place of tokens, be it one that was computed."""


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
    """The value of an element-wise mixture of tensors."""
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
    common: AbstractValue | None = None
    for value in args:
        if isinstance(value, Tensor):
            abstract = state.abstract_values.get(value)
            if abstract is None or abstract.role is not Role.TOKENS or len(abstract.token_ids) != 1:
                return None
            if abstract.softmax is not None or abstract.weighing is not None:
                return None
            if abstract.calls is not None and len(args) > 1 and isinstance(args[1], Tensor):
                return None
            if value.shape != result.shape or value.dtype != result.dtype:
                return None
            if common is None:
                common = abstract
            elif abstract.token_ids[0] is not common.token_ids[0]:
                return None
            elif abstract is not common:
                ancestors = common.ancestors | abstract.ancestors
                common = common._replace(ancestors=ancestors, data=common.data or abstract.data)
        elif isinstance(value, (list, tuple)):
            return None
    return common


def _chosen(state: TrackingState, op: Operation) -> AbstractValue | None:
    """The value of `where` that chose between tokens: ids are chosen as elements are."""
    if len(op.args) != 3 or not all(isinstance(a, Tensor) for a in op.args):
        return None
    condition, *choices = op.args
    abstract_values = [state.of(choice) for choice in choices]
    if {s.role for s in abstract_values} != {Role.TOKENS} or not all(
        s.token_ids for s in abstract_values
    ):
        return None
    shape = op.results[0].shape
    ids = torch.where(
        on_cpu(condition), abstract_values[0].token_ids[0], abstract_values[1].token_ids[0]
    )
    calls = None
    if any(s.calls is not None for s in abstract_values):
        layers = [
            no_call(c.shape) if s.calls is None else s.calls
            for c, s in zip(choices, abstract_values, strict=True)
        ]
        calls = torch.where(on_cpu(condition), layers[0], layers[1]).expand(shape)
    return state.heads.noted(
        abstract_values[0]._replace(
            token_ids=(ids.expand(shape),),
            ancestors=ancestors_of(abstract_values),
            data=abstract_values[0].data or abstract_values[1].data,
            calls=calls,
            weighing=None,
        )
    )
