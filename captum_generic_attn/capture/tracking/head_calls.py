"""Which attention call each element of a tensor came from: heads that a model calls one by one.

Beside the ids of tokens runs a ids of calls, from the result of a call until a weight mixes
features of several calls. Calls whose results come to lie side by side, on different elements of
one tensor, are heads of one layer, and share its map. Calls whose results meet on the same elements
are branches, and their maps add up. `recorder` asks `Heads` at the end of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue
from captum_generic_attn.tokens.ids import squeeze_expanded, squeeze_expanded_together, varies

NO_CALL = -1
"""Elements that came from no call: constants, padding, the residual stream."""
SEVERAL = -2
"""Elements on which the results of several calls met."""


def of_call(index: int, shape: torch.Size) -> Tensor:
    """The ids of a call's result."""
    return torch.full((1,) * len(shape), index, dtype=torch.int32).expand(shape)


def no_call(shape: torch.Size) -> Tensor:
    """The ids of a tensor that no call made."""
    return of_call(NO_CALL, shape)


class Heads:
    """Which calls of one forward pass are heads of one layer, by the ids of their outputs."""

    def __init__(self) -> None:
        self._beside: set[tuple[int, int]] = set()
        self._met: set[tuple[int, int]] = set()

    def lie(self, calls: Tensor, tokens: Tensor | None) -> None:
        """Note the calls that lie side by side among the features of the same tokens."""
        found = _calls_in(calls)
        if len(found) < 2:
            return
        for axis in range(calls.ndim):
            if varies(calls, axis) and not (tokens is not None and varies(tokens, axis)):
                self._beside.update(combinations(found, 2))
                return

    def noted(self, abstract: AbstractValue) -> AbstractValue:
        """The abstract value itself; calls that lie side by side in its tensor are noted."""
        if abstract.calls is not None:
            self.lie(
                abstract.calls, abstract.token_ids[0] if len(abstract.token_ids) == 1 else None
            )
        return abstract

    def meet(self, one: Tensor | None, other: Tensor | None, shape: torch.Size) -> Tensor | None:
        """The ids of a sum; what meets on one element is noted.

        Args:
            one: the ids of an operand that broadcasts to `shape`; `None` if no call made it.
            other: likewise.
            shape: that of the sum.
        """
        if one is None or other is None:
            known = other if one is None else one
            return None if known is None else known.expand(shape)
        if (a := only_call(one)) is not None and (b := only_call(other)) is not None:
            if b in (a, NO_CALL):
                return one.expand(shape)
            if a != NO_CALL:
                self._met.add((min(a, b), max(a, b)))
            return other.expand(shape) if a == NO_CALL else None
        one, other = one.expand(shape), other.expand(shape)
        small, little = squeeze_expanded_together(one, other)
        clash = (small >= 0) & (little >= 0) & (small != little)
        if not bool(clash.any()):
            return torch.where(one == NO_CALL, other, one) if one is not other else one
        pairs = torch.unique(torch.stack([small[clash], little[clash]], -1), dim=0)
        self._met.update(tuple(sorted(pair)) for pair in pairs.tolist())
        joined = torch.where(small == NO_CALL, little, small)
        joined = torch.where(little == SEVERAL, SEVERAL, joined)
        return joined.masked_fill(clash, SEVERAL).expand(shape)

    def add_up(self, calls: Tensor, axes: Iterable[int]) -> Tensor | None:
        """The ids after axes were summed away, each of size 1; calls that meet there are noted.

        Calls with one element each in a line meet: their results were stacked. Where one call has
        several elements beside another's, features are mixed, and the ids is gone.
        """
        for axis in axes:
            small = squeeze_expanded(calls)
            if small.shape[axis] == 1:
                calls = calls.narrow(axis, 0, 1)
                continue
            lines = small.movedim(axis, -1)
            most = lines.amax(-1, keepdim=True)
            different = ((lines >= 0) & (lines != most)).any(-1, keepdim=True)
            met = [
                sorted(call for call in line if call >= 0)
                for line in torch.unique(lines[different.squeeze(-1)], dim=0).tolist()
            ]
            if any(len(set(line)) < len(line) for line in met):
                return None
            self._met.update(pair for line in met for pair in combinations(line, 2))
            several_in = different | (lines == SEVERAL).any(-1, keepdim=True)
            calls = most.masked_fill(several_in, SEVERAL).movedim(-1, axis)
            shape = [n if i != axis % calls.ndim else 1 for i, n in enumerate(calls.shape)]
            calls = calls.expand(shape)
        return calls

    def layers(self, alike: Sequence[Sequence[int]]) -> dict[int, tuple[int, ...]]:
        """The calls of each call's layer.

        Args:
            alike: groups of calls with the same queries, which alone can be heads of one layer.

        Returns:
            For each of these calls the heads that it is one of, in order; itself where it is alone.
        """
        found: dict[int, tuple[int, ...]] = {}
        if not self._beside:
            return {call: (call,) for group in alike for call in group}
        for group in alike:
            layer = {call: {call} for call in group}
            for one, other in combinations(sorted(group), 2):
                if (one, other) in self._beside and (one, other) not in self._met:
                    together = layer[one] | layer[other]
                    layer.update(dict.fromkeys(together, together))
            found.update({call: tuple(sorted(members)) for call, members in layer.items()})
        return found


def only_call(calls: Tensor) -> int | None:
    """The call of all elements alike, if they are of one."""
    small = squeeze_expanded(calls).reshape(-1)
    if len(small) == 0 or (len(small) > 1 and bool((small != small[0]).any())):
        return None
    return int(small[0])


def through_weight(calls: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The ids after a weight mixed features: as before if they were of one call alone."""
    call = None if calls is None else only_call(calls)
    return None if call is None else of_call(call, shape)


def _calls_in(calls: Tensor) -> list[int]:
    """The calls in a ids, in order."""
    small = squeeze_expanded(calls)
    if small.numel() == 1:
        return [int(small)] if int(small) >= 0 else []
    found: list[int] = torch.unique(small[small >= 0]).tolist()
    return found
