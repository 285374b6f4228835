"""What each family of operations does to shadows: the transfer functions of the capture.

`mode` calls `Transfer.apply` after every operation of the forward pass. Each method below is one
family of `operations`; none of them knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_generic_attn.capture.operations import Family
from captum_generic_attn.capture.planes import (
    first_along,
    relabel,
    same_plane,
    varies,
    window_centres,
)
from captum_generic_attn.capture.shadow import NO_SHADOW, Role, Shadow, Shadows
from captum_generic_attn.tokens.spaces import FOREIGN, PADDING, TokenSpaces

Args = Sequence[Any]
Kwargs = Mapping[str, Any]


def tensors_in(value: object, depth: int = 0) -> Iterator[Tensor]:
    """All tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        yield value
    elif depth < 4 and isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, depth + 1)
    elif depth < 4 and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth + 1)


def _on_cpu(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value


def argument(args: Args, kwargs: Kwargs, position: int, name: str, default: Any = None) -> Any:  # noqa: ANN401
    """An argument that may be given by place or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


class Transfer:
    """The shadows of one forward pass, and what operations make of them."""

    def __init__(self, spaces: TokenSpaces, parameters: Mapping[int, str]) -> None:
        self.spaces = spaces
        self.shadows = Shadows()
        self._parameters = parameters
        self._families: dict[Family, Callable[..., None]] = {
            Family.SAME: self._same,
            Family.SHAPE: self._shape,
            Family.JOIN: self._join,
            Family.PAD: self._pad,
            Family.WRITE: self._write,
            Family.REDUCE: self._reduce,
            Family.LINEAR: self._linear,
            Family.WINDOW: self._window,
            Family.EMBEDDING: self._embedding,
            Family.TOKENWISE: self._tokenwise,
        }

    # -- looking shadows up ------------------------------------------------------------------

    def of(self, tensor: Tensor) -> Shadow:
        """The shadow of a tensor; a parameter gets one when it is first asked for."""
        if tensor in self.shadows:
            return self.shadows[tensor]
        name = self._parameters.get(id(tensor))
        if name is None or tensor.ndim == 0 or not tensor.is_floating_point():
            return NO_SHADOW
        planes = (self.spaces.of_parameter(name, tensor.shape),)
        self.shadows[tensor] = Shadow(Role.PARAMETER, planes)
        return self.shadows[tensor]

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor has a shadow, or would get one."""
        return tensor in self.shadows or id(tensor) in self._parameters

    def apply(
        self, family: Family, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        out: object, in_place: bool,
    ) -> None:  # fmt: skip
        """Give the results of an operation their shadows."""
        if family is Family.NOTHING:
            return
        inputs = list(tensors_in((args, kwargs)))
        if not any(tensor in self.shadows for tensor in inputs) and (
            family not in (Family.SHAPE, Family.JOIN, Family.LINEAR, Family.EMBEDDING)
            and family is not Family.TOKENWISE
            or not any(id(tensor) in self._parameters for tensor in inputs)
        ):
            return
        if name == "setitem":
            out = args[0]
        results = [
            t for t in tensors_in(out)
            if t.dtype != torch.bool and (in_place or not any(t is i for i in inputs))
        ]  # fmt: skip
        if results:
            self._families[family](name, func, args, kwargs, inputs, results)

    # -- families ----------------------------------------------------------------------------

    def _same(
        self, _name: str, _func: object, _a: Args, _k: Kwargs, inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:  # fmt: skip
        shadow = self.of(inputs[0])
        for result in results:
            self.shadows[result] = (
                shadow if result.shape == inputs[0].shape else shadow.without_tokens(_name)
            )

    def _shape(
        self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        inputs: list[Tensor], results: list[Tensor],
    ) -> None:  # fmt: skip
        shadow = self.of(inputs[0])
        rest = _on_cpu(tuple(args[1:]))
        keywords = {key: _on_cpu(value) for key, value in kwargs.items() if key != "input"}

        def moved(plane: Tensor) -> list[Tensor]:
            if name in ("view", "reshape_as", "view_as"):
                if rest and isinstance(rest[0], torch.dtype):
                    return [plane]
                shape = rest[0].shape if name != "view" else rest
                return [plane.reshape(*shape) if name == "view" else plane.reshape(shape)]
            if name == "view_as_complex":
                return [plane[..., 0]]
            if name == "view_as_real":
                return [plane.unsqueeze(-1).expand(*plane.shape, 2)]
            if name == "unfold" and len(rest) != 3:  # F.unfold: patches become columns
                columns = func(plane.double(), *rest, **keywords)
                return [columns.to(plane.dtype)]
            return list(tensors_in(func(plane, *rest, **keywords)))

        try:
            planes = [moved(plane) for plane in shadow.planes]
        except (RuntimeError, TypeError, IndexError, ValueError):
            planes = []
        for i, result in enumerate(results):
            parts = tuple(p[i] for p in planes if i < len(p) and p[i].shape == result.shape)
            self.shadows[result] = (
                replace(shadow, planes=parts)
                if parts and len(parts) == len(shadow.planes)
                else shadow.without_tokens(name)
            )

    def _tokenwise(
        self, name: str, _func: object, _a: Args, _k: Kwargs, inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:  # fmt: skip
        for result in results:
            self.shadows[result] = self.summed(name, inputs, result)

    def summed(self, name: str, inputs: Iterable[Tensor], result: Tensor) -> Shadow:
        """The shadow of an element-wise mixture of tensors."""
        floating = result.is_floating_point() or result.is_complex()
        found = [
            (t, self.of(t)) for t in inputs
            if self.knows(t) and t.dtype != torch.bool
            and (t.is_floating_point() or t.is_complex() or not floating
                 or self.of(t).role is Role.RAW)
        ]  # fmt: skip
        if not found:
            return NO_SHADOW
        ancestors = frozenset[int]().union(*(s.ancestors for _, s in found))
        data = any(s.data for _, s in found)
        best, main = max(
            found,
            key=lambda f: (f[1].data, f[1].role, f[0].shape == result.shape, bool(f[1].planes)),
        )
        lost = replace(main, ancestors=ancestors, data=data).without_tokens(name)
        if not main.planes and not main.mixed:
            others = [f for f in found if f[1].planes and f[1].data and f[1].role is main.role]
            if main.role is not Role.TOKENS or not others or best.shape == result.shape:
                return lost
            best, main = others[0]
        try:
            planes = tuple(plane.expand(result.shape) for plane in main.planes)
        except RuntimeError:
            return lost
        for tensor, shadow in found:
            if (
                shadow is not main and shadow.data and shadow.role is main.role is Role.TOKENS
                and shadow.planes and tensor.shape == result.shape == best.shape
                and not same_plane(main.planes[0], shadow.planes[0])
            ):  # fmt: skip
                self.spaces.same(main.planes[0], shadow.planes[0])
        role = main.role
        if role is Role.PARAMETER:  # computed with, so no longer just a weight
            role = Role.TOKENS
        return replace(main, role=role, planes=planes, ancestors=ancestors, data=data)

    def _linear(
        self, name: str, _func: object, _a: Args, _k: Kwargs, inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:  # fmt: skip
        self.shadows[results[0]] = self.mixed(inputs[0], results[0], name)

    def mixed(self, tensor: Tensor, result: Tensor, name: str) -> Shadow:
        """The shadow after a weight mixed the last axis of a tensor (of the same leading shape)."""
        shadow = self.of(tensor)
        if tensor.shape[:-1] != result.shape[:-1]:
            return shadow.without_tokens(name)
        if shadow.role is Role.PARAMETER:
            shadow = replace(shadow, role=Role.TOKENS)
        if not any(varies(plane, -1) for plane in shadow.planes):
            if shadow.role is Role.RAW and shadow.planes:
                shadow = self._born_of_rows(tensor, shadow, name)
            return shadow.map(lambda plane: first_along(plane, -1).expand(result.shape))
        if shadow.role not in (Role.RAW, Role.TOKENS):
            return shadow.without_tokens(name)
        born = self._born_of_rows(tensor, shadow, name)
        return born.map(lambda plane: plane[..., :1].expand(result.shape))

    def tokens_of(self, tensor: Tensor, name: str) -> Shadow:
        """The shadow of a tensor that is about to be read as tokens, its last axis as features."""
        shadow = self.of(tensor)
        if shadow.role is Role.RAW and shadow.planes and tensor.ndim > 1:
            return self._born_of_rows(tensor, shadow, name)
        return shadow

    def _born_of_rows(self, tensor: Tensor, shadow: Shadow, name: str) -> Shadow:
        """Each row of the last axis becomes a token; the tensor itself is then read as tokens."""
        (parents,) = shadow.planes
        plane = self.spaces.born_of_rows(parents, shadow.ancestors)
        if plane is None:
            return shadow.without_tokens(name)
        born = replace(shadow, role=Role.TOKENS, planes=(plane.unsqueeze(-1).expand(tensor.shape),))
        if shadow.role is Role.RAW:  # what is added to it later must find the same tokens
            self.shadows[tensor] = born
        return born

    def _embedding(
        self, name: str, _func: object, args: Args, kwargs: Kwargs, inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:  # fmt: skip
        index, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
        if not index.is_floating_point() and (shadow := self.of(index)).planes:
            plane = self.spaces.born_of_rows(shadow.planes[0].unsqueeze(-1), shadow.ancestors)
            data = True
        else:
            label = self._parameters.get(id(weight), name)
            plane = self.spaces.of_parameter(label, results[0].shape)[..., 0]
            data = False
        if plane is not None:
            planes = (plane.unsqueeze(-1).expand(results[0].shape),)
            self.shadows[results[0]] = Shadow(Role.TOKENS, planes, data=data)

    def _window(
        self, name: str, _func: object, args: Args, kwargs: Kwargs, inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:  # fmt: skip
        operand, result = inputs[0], results[0]
        shadow = self.of(operand)
        axes = int(name[-2])
        lost = shadow.without_tokens(name)
        self.shadows[result] = lost
        if not shadow.planes or operand.ndim != axes + 2 or not shadow.data:
            return
        keeps_grid = operand.shape[2:] == result.shape[2:]
        one_to_one = "conv" not in name or all(n == 1 for n in inputs[1].shape[2:])
        if shadow.role is not Role.RAW and varies(shadow.planes[0], 1):
            return
        if shadow.role in (Role.LOGITS, Role.PROBABILITIES):  # heads may be mixed, keys may not
            if keeps_grid and one_to_one and not any(varies(p, 1) for p in shadow.planes):
                self.shadows[result] = shadow.map(lambda p: first_along(p, 1).expand(result.shape))
            return
        if keeps_grid and shadow.role is Role.TOKENS:
            self.shadows[result] = shadow.map(lambda p: first_along(p, 1).expand(result.shape))
            return
        lines = shadow.planes[0][:, 0]
        geometry = _windows(name, args, kwargs, inputs, result)
        known = lines[0] >= 0
        centres = self.spaces.coordinates(torch.where(known, lines[0], lines[0].amax()))
        if geometry is None or centres is None:
            centres = None
        elif (moved := window_centres(centres, known, *geometry, result.shape[2:])) is not None:
            centres = moved.flatten(0, -2)
        else:
            centres = None
        parents = lines.reshape(len(lines), -1).amax(1).view(-1, *[1] * axes)
        plane = self.spaces.born(
            parents.expand(len(lines), *result.shape[2:]), centres, shadow.ancestors
        )
        if plane is not None:
            planes = (plane.unsqueeze(1).expand(result.shape),)
            self.shadows[result] = replace(shadow, role=Role.TOKENS, planes=planes)

    def _join(
        self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        inputs: list[Tensor], results: list[Tensor],
    ) -> None:  # fmt: skip
        parts = [t for t in tensors_in(argument(args, kwargs, 0, "tensors")) if t.numel()]
        shadows = [self.of(t) for t in parts]
        main = max(shadows, key=lambda s: (s.data, s.role))
        count = max(len(main.planes), 1)
        rest = {key: value for key, value in kwargs.items() if key not in ("tensors", "out")}
        planes = []
        for number in range(count):
            layers = [
                s.planes[number] if len(s.planes) == count and (count == 1 or s.role is main.role)
                else self._stranger(t, s, main, name)
                for t, s in zip(parts, shadows, strict=True)
            ]  # fmt: skip
            planes.append(self._concatenated(func, layers, args[1:], rest))
        self.shadows[results[0]] = replace(
            main,
            role=Role.TOKENS if main.role is Role.PARAMETER and len(parts) > 1 else main.role,
            planes=tuple(planes) if main.planes or any(s.planes for s in shadows) else (),
            ancestors=frozenset[int]().union(*(s.ancestors for s in shadows)),
            data=any(s.data for s in shadows),
        )

    def _concatenated(
        self, func: Callable[..., Any], layers: list[Tensor], rest: Args, kwargs: Kwargs
    ) -> Tensor:
        joined: Tensor = func(layers, *rest, **kwargs)
        if joined.ndim == layers[0].ndim and not varies(joined, -1):
            joined = joined[..., :1].expand(joined.shape)  # halves of a feature axis: keep it thin
        return joined

    def _stranger(self, tensor: Tensor, shadow: Shadow, main: Shadow, name: str) -> Tensor:
        """The plane of a tensor that is joined to tokens without bringing tokens of its own."""
        if main.role >= Role.LOGITS or not tensor.is_floating_point():
            return torch.full(tensor.shape, PADDING, dtype=torch.int32)
        if shadow.data:
            rows = self.spaces.unknown(tensor.shape[:-1], shadow.lost or name)
            return rows.unsqueeze(-1).expand(tensor.shape)
        constant = bool((tensor == 0).all())
        return torch.full(tensor.shape, PADDING if constant else FOREIGN, dtype=torch.int32)

    def _pad(
        self, name: str, _func: object, args: Args, kwargs: Kwargs, inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:  # fmt: skip
        width = argument(args, kwargs, 1, "pad")
        shadow = self.of(inputs[0])
        self.shadows[results[0]] = shadow.map(lambda plane: F.pad(plane, width, value=PADDING))

    def _write(
        self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        inputs: list[Tensor], results: list[Tensor],
    ) -> None:  # fmt: skip
        target, result = args[0], results[0]
        shadow, values = self.of(target), [t for t in inputs[1:] if self.of(t).planes]
        ancestors = frozenset[int]().union(*(self.of(t).ancestors for t in inputs))
        if not values:
            if shadow.planes or shadow.ancestors:
                self.shadows[result] = replace(shadow, ancestors=ancestors)
            return
        source = self.of(values[-1])
        count = len(source.planes)
        planes = []
        for number in range(count):
            plane = (
                shadow.planes[number].clone() if len(shadow.planes) == count
                else torch.full(target.shape, PADDING, dtype=torch.int32)
            )  # fmt: skip
            given = [source.planes[number] if a is values[-1] else _on_cpu(a) for a in args[1:]]
            if name == "setitem":
                plane[given[0]] = given[1]
            elif name == "copy":
                plane = given[0].expand(plane.shape)
            else:
                keywords = {key: _on_cpu(value) for key, value in kwargs.items()}
                plain = func.__name__.rstrip("_")
                plane = getattr(torch.Tensor, plain)(plane, *given, **keywords)
            planes.append(plane)
        role = max(source.role, shadow.role if shadow.data else Role.NOTHING)
        self.shadows[result] = replace(
            source, role=role, planes=tuple(planes), ancestors=ancestors,
            data=source.data or shadow.data,
        )  # fmt: skip
        base = result._base  # noqa: SLF001 - a view was written: its base holds the values
        if base is not None and base in self.shadows:
            known = self.shadows[base]
            self.shadows[base] = replace(known, ancestors=known.ancestors | ancestors)

    def _reduce(
        self, name: str, _func: object, args: Args, kwargs: Kwargs, inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:  # fmt: skip
        if len(inputs) > 1 and isinstance(args[-1], Tensor):  # torch.max(a, b) is element-wise
            self._tokenwise(name, _func, args, kwargs, inputs, results)
            return
        shadow = self.of(inputs[0])
        axes = argument(args, kwargs, 1, "dim", kwargs.get("axis"))
        axes = (axes,) if isinstance(axes, int) else axes
        lost = shadow.without_tokens(name)
        whole = axes is None or not isinstance(axes, (tuple, list)) or name in (
            "topk", "sort", "kthvalue",
        )  # fmt: skip
        for result in results:
            if not result.is_floating_point():
                continue
            self.shadows[result] = lost
            if whole or any(varies(plane, axis) for plane in shadow.planes for axis in axes):
                continue
            planes = []
            for plane in shadow.planes:
                for axis in axes:
                    plane = first_along(plane, axis)
                planes.append(plane.reshape(result.shape))
            if planes:
                self.shadows[result] = replace(shadow, planes=tuple(planes))

    # -- products, called by the mode ---------------------------------------------------------

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
        role = Role.TOKENS if shadow.role is Role.PARAMETER else shadow.role
        return replace(shadow, role=role, planes=tuple(p for p in planes if p is not None))


def _windows(
    name: str, args: Args, kwargs: Kwargs, inputs: list[Tensor], result: Tensor
) -> tuple[list[float], list[int]] | None:
    """Centre of the first window and distance of windows, along each spatial axis."""
    axes = result.ndim - 2

    def each(value: Any) -> list[int]:  # noqa: ANN401
        value = list(value) if isinstance(value, (list, tuple)) else [value]
        return [int(v) for v in value * (axes if len(value) == 1 else 1)]

    if name.startswith("adaptive"):
        if any(n % m for n, m in zip(inputs[0].shape[2:], result.shape[2:], strict=True)):
            return None
        stride = [n // m for n, m in zip(inputs[0].shape[2:], result.shape[2:], strict=True)]
        return [(n - 1) / 2 for n in stride], stride
    if name.startswith("conv"):
        kernel = list(inputs[1].shape[2:])
        stride = each(argument(args, kwargs, 3, "stride", 1))
        padding = argument(args, kwargs, 4, "padding", 0)
        dilation = each(argument(args, kwargs, 5, "dilation", 1))
    else:
        kernel = each(argument(args, kwargs, 1, "kernel_size"))
        given = argument(args, kwargs, 2, "stride")
        stride = each(given) if given is not None and given != [] else kernel
        padding = argument(args, kwargs, 3, "padding", 0)
        dilation = each(argument(args, kwargs, 4, "dilation", 1) if "max" in name else 1)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        margins = [span // 2 if padding == "same" else 0 for span in spans]
    else:
        margins = each(padding)
    starts = [span / 2 - margin for span, margin in zip(spans, margins, strict=True)]
    return starts, stride
