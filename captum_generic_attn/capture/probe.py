"""Whether an operation that is in no list treats each token by itself: asked of its own gradient.

Two vector-Jacobian products with random cotangents, on a random half of all positions (tokens and
examples) and on the other half: what comes back outside the half was moved or mixed between
positions. Each is about the cost of one backward pass of the operation alone. Used by `transfer`
for operations in no list, and for what an `autograd.Function` returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

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


def is_memory_error(error: BaseException) -> bool:
    """Whether an error says that memory ran out; such an error is never taken for an answer."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def keeps_places(
    result: Tensor, sources: Sequence[Source], places: Sequence[int], tensors: Sequence[Tensor]
) -> bool | None:
    """Whether each position of a result depends on the same position of its sources alone.

    Args:
        result: what the operation returned.
        sources: its operands.
        places: the axes of the result that tell positions apart; the others are features.
        tensors: the operands that are alive; their users' hooks do not see these gradients.

    Returns:
        `None` if that cannot be told: no gradient comes back, or the graph cannot be run twice.
    """
    if not result.requires_grad or not sources:
        return None
    generator = torch.Generator().manual_seed(_SEED + result.numel())
    shape = [n if axis in places else 1 for axis, n in enumerate(result.shape)]
    half = torch.rand(shape, generator=generator) < 0.5
    flat = half.view(-1)
    if len(flat) > 1:  # both halves hold something
        flat[int(torch.randint(len(flat), (1,), generator=generator))] = True
        if bool(flat.all()):
            flat[int(torch.randint(len(flat), (1,), generator=generator))] = False
    numbers = torch.rand(result.shape, generator=generator) + 0.5
    reached = [False] * len(sources)
    for inside in (half, ~half):
        cotangent = (numbers * inside).to(result.device, result.dtype)
        gradients = _gradients(result, sources, cotangent, tensors)
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
    result: Tensor, sources: Sequence[Source], cotangent: Tensor, tensors: Sequence[Tensor]
) -> Sequence[Tensor | None] | None:
    with torch._C.DisableTorchFunction(), torch.enable_grad(), _hooks_asleep(tensors):  # noqa: SLF001
        try:
            return cast(
                "Sequence[Tensor | None]",
                torch.autograd.grad(
                    result, [s.edge for s in sources], cotangent, retain_graph=True,
                    allow_unused=True,
                ),
            )  # fmt: skip
        except Exception as error:
            if is_memory_error(error):
                raise
            return None


@contextlib.contextmanager
def _hooks_asleep(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Hooks of users on these tensors are not called meanwhile."""
    held: list[tuple[Any, dict[Any, Any]]] = []
    for tensor in tensors:
        hooks: Any = getattr(tensor, "_backward_hooks", None)
        if hooks:
            held.append((hooks, dict(hooks)))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in held:
            hooks.update(kept)
