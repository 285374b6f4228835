"""Tracks tokens through a forward pass: runs the transfer function of each operation.

The transfer functions are in `families`. They read and write the state in `state`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking import opaque
from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Origin
from captum_generic_attn.capture.tracking.families import (
    Values,
    concatenation,
    copies,
    elementwise,
    foreign,
    layout,
    look_ups,
    reductions,
    scatters,
    weights,
    windows,
    writes,
)
from captum_generic_attn.capture.tracking.operations import Family, Operation, tensors_in
from captum_generic_attn.capture.tracking.state import TrackingState

_TRANSFERS: dict[Family, Callable[[TrackingState, Operation], Values]] = {
    Family.SAME: copies.same,
    Family.SHAPE: layout.shape,
    Family.TOKENWISE: elementwise.tokenwise,
    Family.JOIN: concatenation.joined,
    Family.PAD: layout.pad,
    Family.WRITE: writes.write,
    Family.REDUCE: reductions.reduce,
    Family.CHOICE: layout.choice,
    Family.SCATTER: scatters.scatter,
    Family.ONE_HOT: layout.one_hot,
    Family.MIX: reductions.mix,
    Family.RESIZE: windows.resize,
    Family.LINEAR: weights.linear,
    Family.WINDOW: windows.window,
    Family.EMBEDDING: look_ups.embedding,
    Family.FOREIGN_ATTENTION: foreign.skipped,
}
_OF_THE_FIRST = {Family.SAME, Family.SHAPE, Family.LINEAR}
"""Families whose result has the tokens of the first argument, if it has any."""
_MOVES = {Family.JOIN, Family.PAD, Family.WRITE, Family.SCATTER, Family.CHOICE}
"""Families that change the layout of tokens."""


class TokenTracker(TrackingState):
    """The abstract values of one forward pass, and what operations make of them."""

    def apply(
        self, family: Family, name: str, func: Callable[..., Any], args: Sequence[Any],
        kwargs: Mapping[str, Any], out: object, *, in_place: bool,
    ) -> None:  # fmt: skip
        """Give the results of an operation their values."""
        if family is Family.NOTHING:
            return
        if family is Family.TOKENWISE and not (in_place or kwargs) and self._keeps(args, out):
            return  # most operations of a model
        inputs = self._operands(family, args, kwargs)
        if not inputs:
            return  # nothing here is tracked
        results = _results(args[0] if name == "setitem" else out, [] if in_place else inputs)
        if results:
            self._run(family, Operation(name, func, args, kwargs, inputs, results))
        if in_place:
            for result in results:
                self.note_write(result, name)

    def _keeps(self, args: Sequence[Any], out: object) -> bool:
        """Whether an element-wise operation has operands of the very same tokens.

        Its result then gets these tokens.
        """
        if not isinstance(out, Tensor):
            return False
        abstract = elementwise.of_the_same_tokens(self, args, out)
        if abstract is None:
            return False
        self.abstract_values[out] = abstract
        return True

    def _run(self, family: Family, op: Operation) -> None:
        """Give the results of an operation what its transfer function says."""
        values = _TRANSFERS[family](self, op)
        if family in _MOVES:
            values = [v._replace(moved_by=op.name) if v and v.token_ids else v for v in values]
        for result, value in zip(op.results, values, strict=False):
            if value is not None:
                self.abstract_values[result] = value

    def _operands(
        self, family: Family, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[Tensor]:
        """The tensors whose values matter; none if no value is known."""
        first = args[0] if args else None
        if family in _OF_THE_FIRST and isinstance(first, Tensor) and self.knows(first):
            return [first]
        inputs = tensors_in(args)
        if kwargs:
            inputs += tensors_in(kwargs)
        return inputs if any(map(self.knows, inputs)) else []

    def unknown(
        self, name: str, given: Sequence[opaque.Given], out: object, *, in_place: bool
    ) -> None:
        """Give the results of an operation in no list their values."""
        for result in opaque.results_of(self, name, given, out, in_place=in_place):
            if in_place:
                self.note_write(result, name)

    def behind(
        self, tensor: Tensor, origins: Sequence[Origin], inside: AbstractValue
    ) -> AbstractValue:
        """The value of a tensor that an unseen function returned."""
        return opaque.found_behind(self, tensor, origins, inside)

    def summed(self, name: str, inputs: Sequence[Tensor], result: Tensor) -> AbstractValue:
        """The value of an element-wise mixture of tensors."""
        return elementwise.summed(self, name, inputs, result)

    def weighted(
        self, tensor: Tensor, labels: Sequence[str], out_labels: Sequence[str], summed: set[str],
        result: Tensor, name: str,
    ) -> AbstractValue:  # fmt: skip
        """The value of a product of a tensor with a weight."""
        return weights.weighted(self, tensor, labels, out_labels, summed, result, name)

    def looks_up(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether integers of an input pick rows of a table that is no data: an embedding."""
        return look_ups.looks_up(self, args, kwargs)


def _results(out: object, given: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in an operation's output that may carry tokens, without those it was given."""
    known = set(map(id, given))
    return [t for t in tensors_in(out) if t.dtype != torch.bool and id(t) not in known]
