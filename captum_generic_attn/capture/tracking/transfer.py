"""What each family of operations does to shadows: the transfer functions of the capture.

`mode` calls `Transfer.apply` after every operation of the forward pass. Each method below is one
family of `operations`; none of them knows a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

from captum_generic_attn.capture.tracking import births, joins, opaque, probe, scatters
from captum_generic_attn.capture.tracking.contraction import Contraction
from captum_generic_attn.capture.tracking.head_calls import Heads, no_call, through_weight
from captum_generic_attn.capture.tracking.mixture import Operand, is_value, mixture
from captum_generic_attn.capture.tracking.operations import (
    NORMS,
    Family,
    Operation,
    normed_axes,
    on_cpu,
    tensors_in,
)
from captum_generic_attn.capture.tracking.planes import first_along, relabel, varies
from captum_generic_attn.capture.tracking.shadow import NO_SHADOW, Role, Shadow, Shadows
from captum_generic_attn.tokens.ids import compact, hashable
from captum_generic_attn.tokens.spaces import PADDING, TokenSpaces

_METHODS = {family: f"_{family.name.lower()}" for family in Family}
_OF_THE_FIRST = {Family.SAME, Family.SHAPE, Family.LINEAR}
"""Where the first argument has tokens, those of the others do not matter."""
_MOVES = {Family.JOIN, Family.PAD, Family.WRITE, Family.SCATTER, Family.CHOICE}
_FILLS = {"masked_fill", "fill", "index_fill"}
"""What puts a number in the place of tokens, be it one that was computed."""
_REORDERS = {
    "unfold", "im2col", "gather", "index_select", "take", "take_along_dim", "flip", "roll",
    "repeat", "tile", "repeat_interleave", "rot90",
}  # fmt: skip
"""What lays tokens out anew, by family and by name."""


class Transfer:
    """The shadows of one forward pass, and what operations make of them."""

    def __init__(self, spaces: TokenSpaces, parameters: Mapping[int, str]) -> None:
        self.spaces = spaces
        self.shadows = Shadows()
        self._parameters = parameters
        self._written: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.heads = Heads()
        self.hooks = probe.Hooks()
        self.pools: dict[int, Pool] = {}
        self.queried: dict[int, Tensor] = {}
        self.notes_embeddings = False
        self.embedded: list[tuple[Tensor, GradientEdge]] = []

    # -- looking shadows up --------------------------------------------------------------------

    def of(self, tensor: Tensor) -> Shadow:
        """The shadow of a tensor; a parameter gets one when it is first asked for."""
        shadow = self.shadows.get(tensor)
        if shadow is not None:
            base = tensor._base if self._written else None  # noqa: SLF001
            if base is not None and base in self._written and base in self.shadows:
                # perhaps written to through another view
                return joins.seen_through_view(self.shadows[base], base, shadow, tensor)
            return shadow
        if not self.knows(tensor) or tensor.ndim == 0:
            return NO_SHADOW
        origins = [] if id(tensor) in self._parameters else self.shadows.origins(tensor)
        if origins:
            inside = self.shadows.inside(tensor)
            self.shadows[tensor] = opaque.found_behind(self, tensor, origins, inside)
            return self.shadows[tensor]
        name = self._parameters.get(id(tensor), "a parameter")
        planes = (self.spaces.of_parameter(name, tensor.shape),)
        self.shadows[tensor] = Shadow(Role.PARAMETER, planes)
        return self.shadows[tensor]

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor has a shadow, or would get one."""
        if tensor in self.shadows:
            return True
        return tensor.is_floating_point() and (
            id(tensor) in self._parameters
            or tensor.requires_grad
            or isinstance(tensor, nn.Parameter)
        )

    def settle(self, tensor: Tensor) -> None:
        """Note what a tensor is before it is written to: its graph tells another story after."""
        base = tensor._base  # noqa: SLF001
        unseen = base is not None and base not in self.shadows and tensor in self.shadows
        if unseen and base is not None and tensor.numel() == base.numel():
            part = self.shadows[tensor]  # an operation returned a view of what nobody saw
            self.shadows[base] = joins.seen_from_base(
                self, NO_SHADOW, base, part, tensor, part.lost
            )
        for one in (tensor,) if base is None else (tensor, base):
            if self.knows(one):
                self.of(one)
            else:
                self.shadows[one] = NO_SHADOW

    def weighing(self, tensor: Tensor) -> Contraction | None:
        """The product of weights and tokens that a tensor is, if a sum would make it attention."""
        shadow = self.shadows.get(tensor)
        return None if shadow is None else shadow.weighing

    def tokens_of(self, tensor: Tensor, name: str) -> Shadow:
        """The shadow of a tensor that is about to be read as tokens, its last axis as features."""
        shadow = self.of(tensor)
        if shadow.role is Role.STATISTIC:
            return shadow.without_tokens(name)
        if shadow.role is Role.LOGITS and not shadow.data:  # a product of parameters, no more
            return shadow._replace(role=Role.TOKENS, planes=shadow.planes[:1])
        if shadow.role is not Role.RAW or not shadow.planes or tensor.ndim == 1:
            return shadow
        # What is added to this very tensor later must find the same tokens.
        self.shadows[tensor] = births.of_rows(self.spaces, shadow, tensor.shape, name)
        return self.shadows[tensor]

    # -- families ------------------------------------------------------------------------------

    def apply(
        self, family: Family, name: str, func: Callable[..., Any], args: Sequence[Any],
        kwargs: Mapping[str, Any], out: object, *, in_place: bool,
    ) -> None:  # fmt: skip
        """Give the results of an operation their shadows."""
        if family is Family.NOTHING:
            return
        if family is Family.TOKENWISE and not (in_place or kwargs) and isinstance(out, Tensor):
            shadow = self._along(args, out)
            if shadow is not None:
                self.shadows[out] = shadow
                return
        first = args[0] if args else None
        if family in _OF_THE_FIRST and isinstance(first, Tensor) and self.knows(first):
            if out is first and not in_place:
                return  # a dropout that drops nothing
            inputs = [first]
            if name in NORMS and isinstance(out, Tensor) and not in_place:
                self.shadows[out] = self._normed(name, first, out, args, kwargs)
                return
            onward = _ONWARD.get(family)
            if onward and isinstance(out, Tensor) and not in_place and out.dtype != torch.bool:
                self.shadows[out] = onward(self, first, out, name)
                return
        else:
            inputs = tensors_in(args)
            if kwargs:
                inputs += tensors_in(kwargs)
            if not any(map(self.knows, inputs)):
                return
        given = set() if in_place else set(map(id, inputs))
        results = [
            t for t in tensors_in(args[0] if name == "setitem" else out)
            if t.dtype != torch.bool and id(t) not in given
        ]  # fmt: skip
        if results:
            transfer = getattr(self, _METHODS[family])
            transfer(Operation(name, func, args, kwargs, inputs, results))
            if family in _MOVES:
                self._note_move(results, name)
        if in_place:
            for result in results:
                self._note_write(result, name)

    def _along(self, args: Sequence[Any], result: Tensor) -> Shadow | None:
        """The shadow of a mixture of the same tokens throughout, as along a residual stream."""
        if self._written:
            return None
        common: Shadow | None = None
        for value in args:
            if isinstance(value, Tensor):
                shadow = self.shadows.get(value)
                if shadow is None or shadow.role is not Role.TOKENS or len(shadow.planes) != 1:
                    return None
                if shadow.softmax is not None or shadow.weighing is not None:
                    return None
                if shadow.calls is not None and len(args) > 1 and isinstance(args[1], Tensor):
                    return None
                if value.shape != result.shape or value.dtype != result.dtype:
                    return None
                if common is None:
                    common = shadow
                elif shadow.planes[0] is not common.planes[0]:
                    return None
                elif shadow is not common:
                    ancestors = common.ancestors | shadow.ancestors
                    common = common._replace(ancestors=ancestors, data=common.data or shadow.data)
            elif isinstance(value, (list, tuple)):
                return None
        return common

    def _note_write(self, result: Tensor, name: str) -> None:
        """What is written into a view stands in the tensor that it is a view of."""
        base = result._base  # noqa: SLF001
        if base is not None and result in self.shadows:
            part = self.shadows[result]
            self.shadows[base] = joins.seen_from_base(self, self.of(base), base, part, result, name)
        self._written[result if base is None else base] = True

    def _same(self, op: Operation) -> None:
        for result in op.results:
            self.shadows[result] = self.same(op.inputs[0], result, op.name)

    def same(self, tensor: Tensor, result: Tensor, name: str) -> Shadow:
        """The shadow of what is the same tensor to the capture, a copy or a norm of it."""
        shadow = self.of(tensor)
        return shadow if result.shape == tensor.shape else shadow.without_tokens(name)

    def _normed(
        self, name: str, tensor: Tensor, result: Tensor, args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Shadow:  # fmt: skip
        """The shadow of a norm: tokens stay what they are, unless it runs over the examples."""
        shadow = self.same(tensor, result, name)._replace(weighing=None)
        if not shadow.planes:
            return shadow
        axes = self.spaces.example_axes(shadow.planes[0])
        over = normed_axes(name, args, kwargs, tensor.ndim)
        if axes and not axes.isdisjoint(over):
            return shadow.without_tokens(f"{name} over the examples")
        if not self.spaces.token_axes(shadow.planes[0]).isdisjoint(over):
            self.spaces.approximate("statistics", name)
        return shadow

    def _shape(self, op: Operation) -> None:
        shadow = self.of(op.inputs[0])
        if not shadow.planes:  # what was lost stays lost, a softmax of it a softmax
            for result in op.results:
                self.shadows[result] = shadow._replace(calls=None, weighing=None)
            return
        followed = shadow.planes if shadow.calls is None else (*shadow.planes, shadow.calls)
        try:
            moved = [self._moved(plane, op) for plane in followed]
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            if probe.is_memory_error(error):
                raise
            moved = []  # the operation does not work on integers: tokens are lost, and it is named
        for result, *planes in zip_longest(op.results, *moved):
            if result is None:
                break
            complete = bool(planes) and all(
                p is not None and p.shape == result.shape for p in planes
            )
            if not complete:
                self.shadows[result] = shadow.without_tokens(op.name)
                continue
            calls = planes.pop() if shadow.calls is not None else None
            moved_by = op.name if op.name in _REORDERS else shadow.moved_by
            self.shadows[result] = shadow._replace(
                planes=tuple(planes), calls=calls, weighing=None, moved_by=moved_by
            )

    def _moved(self, plane: Tensor, op: Operation) -> list[Tensor]:
        """The planes of the results of an operation that moves elements."""
        try:
            question = op.func, hashable(op.args[1:]), hashable(op.kwargs)
        except TypeError:
            return moved(plane, op)
        return self.spaces.memory.of((plane,), question, lambda: moved(plane, op))

    def _tokenwise(self, op: Operation) -> None:
        if op.name == "where" and self._chosen(op):
            return
        if op.name in _FILLS and any(self.of(t).data and is_value(t) for t in op.inputs[1:]):
            for result in op.results:
                self.shadows[result] = self.summed(op.name, op.inputs, result).without_tokens(
                    f"{op.name} by a computed number"
                )
            return
        for result in op.results:
            self.shadows[result] = self.summed(op.name, op.inputs, result)

    def _chosen(self, op: Operation) -> bool:
        """Whether `where` chose between tokens, and so moved them as it moved their values."""
        if len(op.args) != 3 or not all(isinstance(a, Tensor) for a in op.args):
            return False
        condition, *choices = op.args
        shadows = [self.of(choice) for choice in choices]
        if {s.role for s in shadows} != {Role.TOKENS} or not all(s.planes for s in shadows):
            return False
        shape = op.results[0].shape
        plane = torch.where(on_cpu(condition), shadows[0].planes[0], shadows[1].planes[0])
        calls = None
        if any(s.calls is not None for s in shadows):
            layers = [
                no_call(c.shape) if s.calls is None else s.calls
                for c, s in zip(choices, shadows, strict=True)
            ]
            calls = torch.where(on_cpu(condition), layers[0], layers[1]).expand(shape)
        self.shadows[op.results[0]] = self.heads.noted(shadows[0]._replace(
            planes=(plane.expand(shape),),
            ancestors=shadows[0].ancestors | shadows[1].ancestors,
            data=shadows[0].data or shadows[1].data,
            calls=calls,
            weighing=None,
        ))  # fmt: skip
        return True

    def summed(self, name: str, inputs: Sequence[Tensor], result: Tensor) -> Shadow:
        """The shadow of an element-wise mixture of tensors."""
        found = [
            Operand(t, t.shape, shadow) for t in inputs
            if self.knows(t) and t.dtype != torch.bool
            and ((shadow := self.of(t)).role is Role.RAW or is_value(t) or not is_value(result))
        ]  # fmt: skip
        return mixture(self, name, found, result.shape)

    def replaced(self, shadows: Sequence[Shadow]) -> bool:
        """Whether calls that some of these depend on had tokens of others as queries.

        Without a residual path the result of a call takes the place of what tokens were before; a
        sequence of tokens of which some were replaced and others not has no one state.
        """
        together = frozenset[int]().union(*(s.ancestors for s in shadows))
        for shadow in shadows:
            missing = together - shadow.ancestors
            if not missing or not shadow.data or len(shadow.planes) != 1:
                continue
            mine = self.spaces.memory.of(
                (shadow.planes[0],), "tokens", functools.partial(_ids, shadow)
            )
            if any(
                i in self.queried and bool(torch.isin(mine, self.queried[i]).any()) for i in missing
            ):
                return True
        return False

    def hand_back(self, term: Shadow, main: Shadow, plane: Tensor) -> None:
        """Note calls whose pooled token goes back to all tokens that it was pooled from."""
        if not self.pools:
            return
        for call in term.ancestors - main.ancestors:
            pool = self.pools.get(call)
            if pool and pool.keys & set(self.spaces.indices(plane)):
                pool.problem = GLOBAL_CONTEXT

    def unknown(
        self, name: str, given: Sequence[opaque.Given], out: object, *, in_place: bool
    ) -> None:
        """Give the results of an operation in no list their shadows."""
        for result in opaque.results_of(self, name, given, out, in_place=in_place):
            if in_place:
                self._note_write(result, name)

    def _resize(self, op: Operation) -> None:
        shadow = self.of(op.inputs[0])
        self.shadows[op.results[0]] = (
            births.of_resized(self.spaces, shadow, op) if shadow.planes
            else shadow.without_tokens(op.name)
        )  # fmt: skip

    def _mix(self, op: Operation) -> None:
        for result in op.results:
            if is_value(result):  # sums of masks are positions, and say nothing of their tokens
                shadows = [self.of(t) for t in op.inputs]
                main = max(shadows, key=lambda shadow: shadow.data)
                self.shadows[result] = main._replace(
                    ancestors=frozenset[int]().union(*(s.ancestors for s in shadows))
                ).without_tokens(op.name)

    def _linear(self, op: Operation) -> None:
        self.shadows[op.results[0]] = self.mixed(op.inputs[0], op.results[0], op.name)

    def mixed(self, tensor: Tensor, result: Tensor, name: str) -> Shadow:
        """The shadow after a weight mixed the last axis of a tensor."""
        shadow = self.tokens_of(tensor, name)
        shape = result.shape
        if shadow.role is Role.TOKENS and shadow.planes and shadow.softmax is None:
            plane = self.spaces.memory(_same_tokens, shadow.planes[0], shape)
            if plane is not None:
                if shadow.calls is None and shadow.weighing is None:
                    return shadow._replace(planes=(plane,))
                calls = self._calls_through(shadow, [tensor.ndim - 1], shape)
                return shadow._replace(planes=(plane,), calls=calls, weighing=None)
        if not shadow.planes or tensor.shape[:-1] != shape[:-1] or shadow.role is Role.STATISTIC:
            return shadow.without_tokens(name)
        calls = self._calls_through(shadow, [tensor.ndim - 1], shape)
        shadow = shadow._replace(calls=calls, weighing=None)
        if shadow.role <= Role.TOKENS:
            shadow = shadow._replace(role=Role.TOKENS, softmax=None)
        if any(varies(plane, -1) for plane in shadow.planes):
            if shadow.role is not Role.TOKENS:
                return shadow.without_tokens(name)  # keys are mixed, not heads
            if any(n > 1 and not varies(shadow.planes[0], i) for i, n in enumerate(shape[:-1])):
                return shadow.without_tokens(name)  # tokens are mixed, feature by feature
            shadow = births.of_rows(self.spaces, shadow, tensor.shape, name)
        return shadow.map(lambda plane: first_along(plane, -1).expand(shape))

    def weighted(
        self, tensor: Tensor, labels: Sequence[str], out_labels: Sequence[str], summed: set[str],
        result: Tensor, name: str,
    ) -> Shadow:  # fmt: skip
        """The shadow of a product of a tensor with a weight."""
        if summed == {labels[-1]} and result.shape[:-1] == tensor.shape[:-1]:
            return self.mixed(tensor, result, name)
        shadow = self.of(tensor)
        planes = [relabel(plane, labels, out_labels, result.shape) for plane in shadow.planes]
        if any(plane is None for plane in planes):
            return shadow.without_tokens(name)
        if shadow.role is Role.PARAMETER:
            shadow = shadow._replace(role=Role.TOKENS)
        if shadow.role is Role.STATISTIC:
            return shadow.without_tokens(name)
        carried = tuple(p for p in planes if p is not None)
        axes = [i for i, label in enumerate(labels) if label not in out_labels]
        calls = self._calls_through(shadow, axes, result.shape)
        return shadow._replace(planes=carried, calls=calls, weighing=None)

    def _calls_through(
        self, shadow: Shadow, axes: Sequence[int], shape: torch.Size
    ) -> Tensor | None:
        """The plane of calls after a weight summed axes of a tensor with this shadow.

        Stacked results that are summed over the stack alone, each feature by itself, meet.
        """
        if shadow.calls is None:
            return None
        through = through_weight(shadow.calls, shape)
        features = [
            axis for axis, n in enumerate(shadow.calls.shape)
            if n > 1 and axis not in axes and not any(varies(p, axis) for p in shadow.planes)
        ]  # fmt: skip
        if through is None and len(axes) == 1 and features:
            self.heads.add_up(shadow.calls, axes)
        return through

    def looks_up(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether integers of an input pick rows of a table that is no data: an embedding."""
        if len(args) + len(kwargs) < 2 or not isinstance(args[0], Tensor):
            return False
        index = self._index_among(args[1:], kwargs)
        return index is not None and not (self.knows(args[0]) and self.of(args[0]).data)

    def _index_among(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The integers of an input among the arguments of an operation."""
        for tensor in tensors_in((tuple(args), tuple(kwargs.values()))):
            whole = not (tensor.is_floating_point() or tensor.is_complex())
            shadow = self.shadows.get(tensor) if whole and tensor.dtype != torch.bool else None
            if shadow is not None and shadow.data and shadow.role in (Role.RAW, Role.NOTHING):
                return tensor
        return None

    def _embedding(self, op: Operation) -> None:
        integers = [t for t in tensors_in((op.args, op.kwargs)) if not is_value(t)]
        index = self._index_among(op.args, op.kwargs)
        index = integers[0] if index is None else index
        table = next((t for t in tensors_in((op.args, op.kwargs)) if is_value(t)), None)
        if table is not None and self.knows(table) and self.of(table).data:
            self.shadows[op.results[0]] = self._rows_of(table, index, op)
            return
        label = self._parameters.get(id(table), op.name)
        shadow = self.of(index)
        result = op.results[0]
        rows = births.of_integers(self.spaces, shadow, label, index, op.name)
        places = births.places_of_index(op, table, index, result.shape)
        if not rows.planes or places is None:
            self.shadows[result] = rows.without_tokens(op.name)
            return
        self.shadows[result] = rows.map(lambda p: births.laid_out(p, places, result.shape))
        if self.notes_embeddings and rows.data and result.requires_grad:
            plane = births.laid_out(shadow.planes[0], places, result.shape)
            self.embedded.append((plane.amax(-1), get_gradient_edge(result)))

    def _rows_of(self, table: Tensor, index: Tensor, op: Operation) -> Shadow:
        """The shadow of rows that integers pick from tokens."""
        shadow, rows = self.of(table), on_cpu(index).long()
        if index.is_floating_point() or index.ndim + table.ndim - 1 != op.results[0].ndim:
            return shadow.without_tokens(op.name)
        return shadow.map(lambda plane: plane[rows])._replace(
            calls=None if shadow.calls is None else shadow.calls[rows], weighing=None
        )

    def _window(self, op: Operation) -> None:
        shadow = self.of(op.inputs[0])
        found = births.of_windows(self.spaces, shadow, op)
        calls = through_weight(shadow.calls, op.results[0].shape)
        self.shadows[op.results[0]] = found._replace(calls=calls, weighing=None)

    def _join(self, op: Operation) -> None:
        self.shadows[op.results[0]] = joins.joined(self, op)

    def _pad(self, op: Operation) -> None:
        width, mode = op.argument(1, "pad"), op.argument(2, "mode", "constant")
        mode = mode if isinstance(mode, str) else "constant"  # aten's takes the value there

        def pad(plane: Tensor) -> Tensor:
            if mode == "constant":
                return F.pad(plane, width, value=PADDING)
            return F.pad(plane.double(), width, mode=mode).to(plane.dtype)

        shadow = self.of(op.inputs[0])
        calls = None if shadow.calls is None else pad(shadow.calls)
        self.shadows[op.results[0]] = shadow.map(pad)._replace(calls=calls, weighing=None)

    def _write(self, op: Operation) -> None:
        if op.name == "index_put" and op.argument(3, "accumulate", default=False):
            self._scatter(op)
            return
        if op.name == "scatter" and self._marks(op):
            return
        self.shadows[op.results[0]] = joins.written(self, op)

    def _marks(self, op: Operation) -> bool:
        """Whether a number was written where integers of an input say: rows of zeros and a one."""
        index = self._index_among(op.args[2:3], op.kwargs)
        result = op.results[0]
        if index is None or len(op.inputs) != 2 or self.of(op.args[0]).data:
            return False
        if index.ndim != result.ndim or index.shape[-1] != 1 or op.argument(1, "dim") not in (
            -1, result.ndim - 1
        ):  # fmt: skip
            return False
        self.shadows[result] = self.of(index).map(lambda plane: plane.expand(result.shape))
        return True

    def _choice(self, op: Operation) -> None:
        """Values are moved as the result's indices say; who chose them has no derivative."""
        shadow = self.of(op.inputs[0])
        chosen, index = op.results[0], op.results[-1].detach().cpu()
        axis = op.argument(1 if op.name == "sort" else 2, "dim", -1)
        axis = axis if isinstance(axis, int) and not isinstance(axis, bool) else -1
        whole = index.ndim == op.inputs[0].ndim
        index = index if whole else index.unsqueeze(axis)

        def choose(plane: Tensor) -> Tensor:
            found = torch.take_along_dim(plane, index, axis)
            return found if whole else found.squeeze(axis)

        calls = None if shadow.calls is None else choose(shadow.calls)
        moved = shadow.map(choose)._replace(calls=calls, weighing=None)
        apart = any(
            varies(plane, i) and not varies(before, i)
            for plane, before in zip(moved.planes, shadow.planes, strict=True)
            for i in range(plane.ndim)
            if i != axis % op.inputs[0].ndim and whole and not shadow.pairs
        )  # each feature chose for itself
        self.shadows[chosen] = shadow.without_tokens(op.name) if apart else moved

    def _scatter(self, op: Operation) -> None:
        for result in op.results:
            if is_value(result):
                self.shadows[result] = scatters.added_to(self, op)

    def _one_hot(self, op: Operation) -> None:
        shape = op.results[0].shape
        self.shadows[op.results[0]] = self.of(op.inputs[0]).map(
            lambda plane: plane.unsqueeze(-1).expand(shape)
        )

    def _reduce(self, op: Operation) -> None:
        if len(op.inputs) > 1 and isinstance(op.args[-1], Tensor):  # max(a, b): element by element
            self._tokenwise(op)
            return
        shadow = self.of(op.inputs[0])
        axes = _reduced_axes(op)
        merges = axes is not None and shadow.data and len(shadow.planes) == 1
        if merges and shadow.role is not Role.TOKENS:  # elements of one example
            apart = self.spaces.example_axes(shadow.planes[0])
            merges = apart.isdisjoint(axis % op.inputs[0].ndim for axis in axes or ())
        axes = range(op.inputs[0].ndim) if axes is None else axes
        calls = None if shadow.calls is None else self.heads.add_up(shadow.calls, axes)
        shadow = shadow._replace(calls=None, weighing=None)
        kept = not any(varies(plane, axis) for plane in shadow.planes for axis in axes)
        for result in op.results:
            if not result.is_floating_point():
                continue
            if not kept and merges and shadow.role is Role.TOKENS:
                found = births.of_groups(self.spaces, shadow, op, axes)
            else:
                found = self._kept(op.name, shadow, axes, result, kept=kept, merges=merges)
            if calls is not None and found.planes:
                small = calls if calls.ndim == result.ndim else calls.squeeze(tuple(axes))
                found = self.heads.noted(found._replace(calls=small))
            self.shadows[result] = found

    def _kept(
        self, name: str, shadow: Shadow, axes: Sequence[int], result: Tensor, *, kept: bool,
        merges: bool,
    ) -> Shadow:  # fmt: skip
        """The shadow of a reduction that merges no tokens."""
        planes = []
        for plane in shadow.planes:
            for axis in axes:
                plane = first_along(plane, axis)
            planes.append(plane)
        complete = bool(planes) and all(p.numel() == result.numel() for p in planes)
        if not complete or not (
            kept or (merges and shadow.role in (Role.RAW, Role.STATISTIC))
        ):  # fmt: skip
            return shadow.without_tokens(name)
        role = shadow.role if kept else Role.STATISTIC
        return shadow._replace(planes=tuple(p.reshape(result.shape) for p in planes), role=role)

    def _foreign_attention(self, op: Operation) -> None:
        """A kernel that is refused: where it is skipped, its queries' tokens go on."""
        for result in op.results:
            self.shadows[result] = self.skipped(op.inputs, op.inputs[0], result, op.name)

    def skipped(self, inputs: Sequence[Tensor], query: Tensor, result: Tensor, name: str) -> Shadow:
        """The shadow behind an attention call that is no record: the queries' tokens go on.

        Those whose places the result has; else tokens are lost. What was refused is used on the
        user's word alone (`strict=False`, `layers=`).
        """
        shadows = [self.of(t) for t in inputs if self.knows(t)]
        ancestors = frozenset[int]().union(*(s.ancestors for s in shadows))
        asking = self.of(query)
        lost = Shadow(Role.TOKENS, ancestors=ancestors, data=True).without_tokens(name)
        if not asking.planes or result.ndim != query.ndim or result.ndim == 0:
            return lost._replace(lost=asking.lost or name)
        plane = asking.planes[0]
        if query.shape[:-1] != result.shape[:-1] or varies(plane, -1):
            return lost
        planes = (first_along(plane, -1).expand(result.shape),)
        return Shadow(Role.TOKENS, planes, ancestors, data=True)

    def _note_move(self, results: Sequence[Tensor], name: str) -> None:
        for result in results:
            shadow = self.shadows.get(result)
            if shadow is not None and shadow.planes:
                self.shadows[result] = shadow._replace(moved_by=name)


@dataclass(eq=False)
class Pool:
    """A call that pools tokens by weights that no tokens ask for: the spaces of both.

    `problem` is what was seen afterwards that makes it no attention.
    """

    queries: frozenset[int]
    keys: frozenset[int]
    problem: tuple[str, str] | None = None


GLOBAL_CONTEXT = (
    "tokens are pooled into one, which is handed back to all of them (global context)",
    "leave the module out with layers=, or pass strict=False to skip such calls",
)
WITHOUT_SOFTMAX = (
    "what a softmax over tokens pooled meets queries without a softmax (factorised attention)",
    "the method needs attention probabilities",
)
"""What was seen and what to do where a pooled token turns out to be no query."""

_ONWARD = {Family.SAME: Transfer.same, Family.LINEAR: Transfer.mixed}
"""What one tensor makes another of: most of a model's operations, so they take the short way."""


def _same_tokens(plane: Tensor, shape: torch.Size) -> Tensor | None:
    """The plane after a weight mixed the features of tokens; `None` if it mixed tokens."""
    if plane.shape[:-1] != shape[:-1] or varies(plane, -1):
        return None
    return first_along(plane, -1).expand(shape)


_REDUCED_BY_ORDER = {"norm", "vector_norm", "linalg_norm", "linalg_vector_norm"}
"""Reductions whose second argument is the order of the norm, and the third the axes."""


def _reduced_axes(op: Operation) -> Sequence[int] | None:
    """The axes that a reduction sums away; `None` for all."""
    place = 2 if op.name in _REDUCED_BY_ORDER else 1
    axes = op.argument(place, "dim", op.kwargs.get("axis"))
    if isinstance(axes, bool) or axes is None:
        return None
    if isinstance(axes, int):
        return [axes]
    return list(axes) if isinstance(axes, (tuple, list)) and axes else None


def _ids(shadow: Shadow) -> Tensor:
    """The tokens of a shadow, each once."""
    found: Tensor = torch.unique(compact(shadow.planes[0]))
    return found[found >= 0]


def moved(plane: Tensor, op: Operation) -> list[Tensor]:
    """The planes of the results of an operation that moves elements."""
    rest = on_cpu(tuple(op.args[1:]))
    if op.name == "view":
        return [plane if rest and isinstance(rest[0], torch.dtype) else plane.reshape(*rest)]
    if op.name in ("view_as", "reshape_as"):
        return [plane.reshape(rest[0].shape)]
    if op.name == "glu":
        axis = op.argument(1, "dim", -1)
        return [] if varies(plane, axis) else [plane.chunk(2, axis)[0]]
    if op.name == "view_as_complex":
        return [] if varies(plane, -1) else [first_along(plane, -1).squeeze(-1)]
    if op.name == "view_as_real":
        return [plane.unsqueeze(-1).expand(*plane.shape, 2)]
    keywords = {key: on_cpu(value) for key, value in op.kwargs.items() if key != "input"}
    if op.name in ("unfold", "im2col") and op.func is not torch.Tensor.unfold:
        # They know no integers, and pad with zeros: no token is one less than the first id.
        return [op.func(plane.double() + 1, *rest, **keywords).to(plane.dtype) - 1]
    return list(tensors_in(op.func(plane, *rest, **keywords)))
