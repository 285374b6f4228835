"""What each family of operations does to shadows: the transfer functions of the capture.

`mode` calls `Transfer.apply` after every operation of the forward pass. Each method below is one
family of `operations`; none of them knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

from captum_generic_attn.capture import births, joins
from captum_generic_attn.capture.operations import Family, Operation, on_cpu, tensors_in
from captum_generic_attn.capture.planes import first_along, relabel, same_plane, varies
from captum_generic_attn.capture.shadow import NO_SHADOW, Role, Shadow, Shadows
from captum_generic_attn.tokens.ids import compact_together, hashable
from captum_generic_attn.tokens.spaces import PADDING, TokenSpaces

_METHODS = {family: f"_{family.name.lower()}" for family in Family}
_OF_THE_FIRST = {Family.SAME, Family.SHAPE, Family.LINEAR}
"""Where the first argument has tokens, those of the others do not matter."""


class Transfer:
    """The shadows of one forward pass, and what operations make of them."""

    def __init__(self, spaces: TokenSpaces, parameters: Mapping[int, str]) -> None:
        self.spaces = spaces
        self.shadows = Shadows()
        self._parameters = parameters
        self._written: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._stacked: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.joined_heads: list[tuple[int, ...]] = []
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
        name = self._parameters.get(id(tensor), "a parameter")
        if tensor.grad_fn is None or id(tensor) in self._parameters:
            planes = (self.spaces.of_parameter(name, tensor.shape),)
            self.shadows[tensor] = Shadow(Role.PARAMETER, planes)
            return self.shadows[tensor]
        return Shadow(Role.TOKENS, data=True, lost="a function that torch does not show (a script)")

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor has a shadow, or would get one."""
        if tensor in self.shadows:
            return True
        return tensor.is_floating_point() and (
            id(tensor) in self._parameters
            or tensor.requires_grad
            or isinstance(tensor, nn.Parameter)
        )

    def tokens_of(self, tensor: Tensor, name: str) -> Shadow:
        """The shadow of a tensor that is about to be read as tokens, its last axis as features."""
        shadow = self.of(tensor)
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
            self.shadows[base] = joins.seen_from_base(self.of(base), base, part, result, name)
        self._written[result if base is None else base] = True

    def _same(self, op: Operation) -> None:
        for result in op.results:
            self.shadows[result] = self.same(op.inputs[0], result, op.name)

    def same(self, tensor: Tensor, result: Tensor, name: str) -> Shadow:
        """The shadow of what is the same tensor to the capture, a copy or a norm of it."""
        shadow = self.of(tensor)
        return shadow if result.shape == tensor.shape else shadow.without_tokens(name)

    def _shape(self, op: Operation) -> None:
        shadow = self.of(op.inputs[0])
        if op.inputs[0] in self._stacked:
            calls = self._stacked[op.inputs[0]]
            self.note_heads(calls, op.results[0], joined=op.results[0].ndim < op.inputs[0].ndim)
        try:
            moved = [self._moved(plane, op) for plane in shadow.planes]
        except (RuntimeError, TypeError, IndexError, ValueError):
            moved = []  # the operation does not work on integers: tokens are lost, and it is named
        for result, *planes in zip_longest(op.results, *moved):
            if result is None:
                break
            complete = bool(planes) and all(
                p is not None and p.shape == result.shape for p in planes
            )
            self.shadows[result] = (
                shadow._replace(planes=tuple(planes)) if complete
                else shadow.without_tokens(op.name)
            )  # fmt: skip

    def _moved(self, plane: Tensor, op: Operation) -> list[Tensor]:
        """The planes of the results of an operation that moves elements."""
        try:
            question = op.func, hashable(op.args[1:]), hashable(op.kwargs)
        except TypeError:
            return moved(plane, op)
        return self.spaces.memory.of((plane,), question, lambda: moved(plane, op))

    def note_heads(self, calls: tuple[int, ...], result: Tensor, *, joined: bool) -> None:
        """Note calls that stand side by side: heads called one by one, once they are features.

        What is stacked and then summed are branches, whose maps add; what is stacked and then
        flattened into the features are heads, whose maps are averaged.
        """
        if joined:
            self.joined_heads.append(calls)
        else:
            self._stacked[result] = calls

    def _tokenwise(self, op: Operation) -> None:
        if op.name == "where" and self._chosen(op):
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
        plane = torch.where(on_cpu(condition), shadows[0].planes[0], shadows[1].planes[0])
        self.shadows[op.results[0]] = shadows[0]._replace(
            planes=(plane.expand(op.results[0].shape),),
            ancestors=shadows[0].ancestors | shadows[1].ancestors,
            data=shadows[0].data or shadows[1].data,
        )
        return True

    def summed(self, name: str, inputs: Iterable[Tensor], result: Tensor) -> Shadow:
        """The shadow of an element-wise mixture of tensors."""
        found = [
            (t, shadow) for t in inputs
            if self.knows(t) and t.dtype != torch.bool
            and ((shadow := self.of(t)).role is Role.RAW or _is_value(t) or not _is_value(result))
        ]  # fmt: skip
        if not found:
            return NO_SHADOW
        ancestors = frozenset[int]().union(*(s.ancestors for _, s in found))
        data = any(s.data for _, s in found)
        best, main = max(found, key=lambda f: _precedence(f[0], f[1], result.shape))
        lost = main._replace(ancestors=ancestors, data=data).without_tokens(name)
        if not main.planes and not main.mixed:
            others = [f for f in found if f[1].planes and f[1].data and f[1].role is main.role]
            if main.role is not Role.TOKENS or not others or best.shape == result.shape:
                return lost
            best, main = others[0]
        try:
            planes = tuple(
                plane if plane.shape == result.shape else plane.expand(result.shape)
                for plane in main.planes
            )
        except RuntimeError:
            return lost
        for tensor, shadow in found:
            if (
                shadow.role is Role.RAW and main.role is Role.TOKENS and name in ("add", "sub")
                and tensor.shape == result.shape == best.shape and varies(shadow.planes[0], -1)
            ):  # fmt: skip
                shadow = self.tokens_of(tensor, name)  # features added to tokens
            if shadow is not main and shadow.role is main.role is Role.RAW and (
                tensor.shape == result.shape == best.shape
            ):  # fmt: skip
                self.spaces.same_input(main.planes[0], shadow.planes[0])
            if (
                shadow is not main and shadow.data and shadow.role is main.role is Role.TOKENS
                and shadow.planes and main.data and tensor.shape == result.shape == best.shape
            ):  # fmt: skip
                together = self.added(planes[0], shadow.planes[0])
                if together is None:
                    return lost
                planes = (together,)
        # A parameter that is computed with is no longer a weight, but perhaps a token.
        role = Role.TOKENS if main.role is Role.PARAMETER else main.role
        return main._replace(role=role, planes=planes, ancestors=ancestors, data=data)

    def added(self, kept: Tensor, absorbed: Tensor) -> Tensor | None:
        """The plane of two planes of tokens whose features are added or joined."""
        if same_plane(kept, absorbed):
            return kept
        one, other = compact_together(kept, absorbed)
        differ = one != other
        try:
            if self.spaces.nothing_new(other[differ], one[differ]):
                self.spaces.same(kept, absorbed)
                return kept
            if self.spaces.nothing_new(one[differ], other[differ]):
                self.spaces.same(absorbed, kept)
                return absorbed
        except ValueError:
            pass  # neighbours are merged
        return births.of_sums(self.spaces, kept, absorbed)

    def _resize(self, op: Operation) -> None:
        shadow = self.of(op.inputs[0])
        self.shadows[op.results[0]] = (
            births.of_resized(self.spaces, shadow, op) if shadow.planes
            else shadow.without_tokens(op.name)
        )  # fmt: skip

    def _mix(self, op: Operation) -> None:
        for result in op.results:
            if _is_value(result):  # sums of masks are positions, and say nothing of their tokens
                self.shadows[result] = self.of(op.inputs[0]).without_tokens(op.name)

    def _linear(self, op: Operation) -> None:
        self.shadows[op.results[0]] = self.mixed(op.inputs[0], op.results[0], op.name)

    def mixed(self, tensor: Tensor, result: Tensor, name: str) -> Shadow:
        """The shadow after a weight mixed the last axis of a tensor."""
        shadow = self.tokens_of(tensor, name)
        shape = result.shape
        if shadow.role is Role.TOKENS and shadow.planes and shadow.softmax is None:
            plane = self.spaces.memory(_same_tokens, shadow.planes[0], shape)
            if plane is not None:
                return shadow._replace(planes=(plane,))
        if not shadow.planes or tensor.shape[:-1] != shape[:-1]:
            return shadow.without_tokens(name)
        if shadow.role <= Role.TOKENS:
            shadow = shadow._replace(role=Role.TOKENS, softmax=None)
        if any(varies(plane, -1) for plane in shadow.planes):
            if shadow.role is not Role.TOKENS:
                return shadow.without_tokens(name)  # keys are mixed, not heads
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
        return shadow._replace(planes=tuple(p for p in planes if p is not None))

    def _embedding(self, op: Operation) -> None:
        index, weight = op.argument(0, "input"), op.argument(1, "weight")
        label = self._parameters.get(id(weight), op.name)
        shadow = self.of(index)
        result = op.results[0]
        if self.notes_embeddings and shadow.planes and result.requires_grad:
            self.embedded.append((shadow.planes[0], get_gradient_edge(result)))
        self.shadows[result] = births.of_integers(
            self.spaces, shadow, label, index, result, op.name
        )

    def _window(self, op: Operation) -> None:
        shadow = self.of(op.inputs[0])
        self.shadows[op.results[0]] = births.of_windows(self.spaces, shadow, op)

    def _join(self, op: Operation) -> None:
        self.shadows[op.results[0]] = joins.joined(self, op)

    def _pad(self, op: Operation) -> None:
        width = op.argument(1, "pad")
        shadow = self.of(op.inputs[0])
        self.shadows[op.results[0]] = shadow.map(lambda p: F.pad(p, width, value=PADDING))

    def _write(self, op: Operation) -> None:
        self.shadows[op.results[0]] = joins.written(self, op)

    def _reduce(self, op: Operation) -> None:
        if len(op.inputs) > 1 and isinstance(op.args[-1], Tensor):  # max(a, b): element by element
            self._tokenwise(op)
            return
        shadow = self.of(op.inputs[0])
        axes = op.argument(1, "dim", op.kwargs.get("axis"))
        axes = [axes] if isinstance(axes, int) else axes
        if op.name in ("topk", "sort", "kthvalue") or not isinstance(axes, (tuple, list)):
            axes = range(op.inputs[0].ndim)
        kept = not any(varies(plane, axis) for plane in shadow.planes for axis in axes)
        pools = op.name in ("mean", "sum", "amax", "max", "nanmean") and shadow.data
        if not kept and pools and shadow.role is Role.TOKENS and len(shadow.planes) == 1 and (
            isinstance(axes, (tuple, list)) and op.results[0].is_floating_point()
        ):  # fmt: skip
            self.shadows[op.results[0]] = births.of_groups(self.spaces, shadow, op, axes)
            return
        for result in op.results:
            if not result.is_floating_point():
                continue
            planes = []
            for plane in shadow.planes:
                for axis in axes:
                    plane = first_along(plane, axis)
                planes.append(plane)
            self.shadows[result] = (
                shadow._replace(planes=tuple(p.reshape(result.shape) for p in planes))
                if kept and all(p.numel() == result.numel() for p in planes)
                else shadow.without_tokens(op.name)
            )


_ONWARD = {Family.SAME: Transfer.same, Family.LINEAR: Transfer.mixed}
"""What one tensor makes another of: most of a model's operations, so they take the short way."""


def _same_tokens(plane: Tensor, shape: torch.Size) -> Tensor | None:
    """The plane after a weight mixed the features of tokens; `None` if it mixed tokens."""
    if plane.shape[:-1] != shape[:-1] or varies(plane, -1):
        return None
    return first_along(plane, -1).expand(shape)


def _is_value(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


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
        return [plane[..., 0]]
    if op.name == "view_as_real":
        return [plane.unsqueeze(-1).expand(*plane.shape, 2)]
    keywords = {key: on_cpu(value) for key, value in op.kwargs.items() if key != "input"}
    if op.name == "unfold" and op.func is not torch.Tensor.unfold:  # F.unfold knows no integers
        return [op.func(plane.double(), *rest, **keywords).to(plane.dtype)]
    return list(tensors_in(op.func(plane, *rest, **keywords)))


def _precedence(tensor: Tensor, shadow: Shadow, shape: torch.Size) -> tuple[bool, int, bool, bool]:
    """Whose shadow an element-wise mixture takes: data first, then the higher role.

    Probabilities that are broadcast over values gate them, and the values stay values.
    """
    whole = tensor.shape == shape
    gates = shadow.role >= Role.LOGITS and not whole
    return shadow.data, Role.RAW if gates else shadow.role, whole, bool(shadow.planes)
