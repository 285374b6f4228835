"""Whether an operation that is in no list treats each token by itself: asked of its own gradient.

A few vector-Jacobian products, each on half of all positions (tokens and examples): what comes back
outside the half was moved or mixed between positions. The halves are chosen so that of any two
positions each is once inside without the other: also one token that reads one other is seen. Each
product is about the cost of one backward pass of the operation alone. Used by `tracker` for
operations in no list, and for what an `autograd.Function` returns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

_SEED = 103679


@dataclass(frozen=True, eq=False)
class Source:
    """An operand: where the graph holds it, its shape, and its place of features if that differs.

    `shape` broadcasts to the result's, but for the axis `features`, whose size may be another.
    """

    edge: GradientEdge
    shape: torch.Size
    features: int | None = None


class Hooks:
    """What users hung on tensors in the forward pass, which must not see what probes ask.

    `mode` tells of it. A tensor whose gradient is retained keeps the one that it had.
    """

    def __init__(self) -> None:
        self._hooks: list[dict[Any, Any]] = []
        self._retained: list[ReferenceType[Tensor]] = []

    def note(self, tensor: Tensor) -> None:
        """Note what hangs on a tensor by now."""
        hooks: dict[Any, Any] | None = tensor._backward_hooks  # noqa: SLF001
        if hooks is not None and not any(hooks is known for known in self._hooks):
            self._hooks.append(hooks)
        if tensor.retains_grad:
            self._retained.append(ref(tensor))

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """They are not called meanwhile."""
        held = [(hooks, dict(hooks)) for hooks in self._hooks]
        gradients = [(t, t.grad) for known in self._retained if (t := known()) is not None]
        for hooks, _ in held:
            hooks.clear()
        try:
            yield
        finally:
            for hooks, kept in held:
                hooks.update(kept)
            for tensor, gradient in gradients:
                tensor.grad = gradient


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that memory ran out; such an error is never taken for an answer."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def keeps_places(
    result: Tensor, sources: Sequence[Source], places: Sequence[int], hooks: Hooks
) -> bool | None:
    """Whether each position of a result depends on the same position of its sources alone.

    Args:
        result: what the operation returned.
        sources: its operands.
        places: the axes of the result that tell positions apart; the others are features.
        hooks: those of users, which do not see these gradients.

    Returns:
        `None` if that cannot be told: no gradient comes back, or the graph cannot be run twice.
    """
    if not result.requires_grad or not sources:
        return None
    generator = torch.Generator().manual_seed(_SEED + result.numel())
    shape = [n if axis in places else 1 for axis, n in enumerate(result.shape)]
    numbers = torch.rand(result.shape, generator=generator) + 0.5
    reached = [False] * len(sources)
    for half in halves(math.prod(shape)):
        inside = half.view(shape)
        cotangent = (numbers * inside).to(result.device, result.dtype)
        gradients = _gradients(result, [s.edge for s in sources], cotangent, hooks)
        if gradients is None:
            return None
        for i, (source, gradient) in enumerate(zip(sources, gradients, strict=True)):
            if gradient is None:
                continue
            changed = (gradient != 0) & ~gradient.isnan()
            reached[i] |= bool(changed.any())
            if bool((changed & ~_seen_from(inside, source).to(changed.device)).any()):
                return False
    return True if all(reached) else None


def keeps_examples(
    result: Tensor, owner: Tensor, sources: Sequence[tuple[GradientEdge, Tensor]], hooks: Hooks
) -> bool:
    """Whether a result depends on nothing of other examples than that of each element.

    Args:
        result: a tensor.
        owner: the example of its elements, in a shape that broadcasts to its own.
        sources: where the graph holds what it was made of, and likewise the example of its
            elements, negative for none.
        hooks: those of users, which do not see these gradients.
    """
    if not result.requires_grad:
        return True
    generator = torch.Generator().manual_seed(_SEED + result.numel())
    numbers = torch.rand(result.shape, generator=generator) + 0.5
    edges = [edge for edge, _ in sources]
    for half in halves(int(owner.max()) + 1):
        cotangent = (numbers * half[owner]).to(result.device, result.dtype)
        gradients = _gradients(result, edges, cotangent, hooks)
        if gradients is None:
            return False
        for (_, theirs), gradient in zip(sources, gradients, strict=True):
            if gradient is not None:
                changed = (gradient != 0) & ~gradient.isnan()
                others = (theirs >= 0) & ~half[theirs.clamp(min=0)]
                if bool((changed & others.to(changed.device)).any()):
                    return False
    return True


def halves(count: int) -> list[Tensor]:
    """Sets of `count` positions: of any two positions, each is in one that the other is not in.

    The digits of a position's number in base two, and those of how many of its digits are zero
    (Berger, 1961): of two numbers either each has a one where the other has none, or the one with
    fewer ones has more zeros.

    Example:
        >>> [half.int().tolist() for half in halves(4)]
        [[0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]
    """
    if count == 1:
        return [torch.ones(1, dtype=torch.bool)]
    digits = torch.arange(count).unsqueeze(0) >> torch.arange((count - 1).bit_length())[:, None] & 1
    zeros = len(digits) - digits.sum(0)
    counts = zeros >> torch.arange(len(digits).bit_length())[:, None] & 1
    return [half for half in torch.cat([digits, counts]).bool() if bool(half.any())]


def _seen_from(inside: Tensor, source: Source) -> Tensor:
    """Which elements of an operand the chosen positions may read, as it broadcasts to them."""
    if source.features is not None and inside.shape[source.features] > 1:
        inside = inside.any(source.features, keepdim=True)
    while inside.ndim > len(source.shape):
        inside = inside.any(0)
    for axis, n in enumerate(source.shape):
        if n == 1 and inside.shape[axis] > 1:
            inside = inside.any(axis, keepdim=True)
    return inside


def _gradients(
    result: Tensor, edges: Sequence[GradientEdge], cotangent: Tensor, hooks: Hooks
) -> Sequence[Tensor | None] | None:
    with torch._C.DisableTorchFunction(), torch.enable_grad(), hooks.asleep():  # noqa: SLF001
        try:
            return cast(
                "Sequence[Tensor | None]",
                torch.autograd.grad(result, edges, cotangent, retain_graph=True, allow_unused=True),
            )
        except Exception as error:
            if is_memory_error(error):
                raise
            return None
