"""Check of elements: what no gradient reaches has no relevance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_generic_attn.captum_api.base import Request
from captum_generic_attn.capture import Capture
from captum_generic_attn.verification.report import Check
from captum_generic_attn.verification.subject import Subject, input_edges


def check_elements(subject: Subject, maps: Sequence[Tensor]) -> Check:
    """Whether elements of the inputs with relevance have a gradient.

    Args:
        subject: what is checked.
        maps: what `attribute` returns, one tensor for each input.

    Random cotangents of the whole output are pulled back to the inputs, and to inputs near them.
    """
    read = _elements_with_a_gradient(subject, len(maps))
    wrong = []
    for name, heat, live in zip(subject.capture.input_names, maps, read, strict=True):
        unread = heat != 0 if live is None else (heat != 0) & ~live.to(heat.device)
        count = int(unread.sum())
        if count:
            wrong.append(f"{count} of {heat.numel()} elements of {name}")
    if not wrong:
        found = "none without a gradient has relevance"
        return Check("elements", "passed", found, subject.samples)
    found = f"no gradient reaches {', '.join(wrong)}, which have relevance"
    sampled = any(kind == "neighbourhood" for kind, _ in subject.capture.spaces.approximations)
    return Check("elements", "noted" if sampled else "failed", found, subject.samples)


def _elements_with_a_gradient(subject: Subject, inputs: int) -> list[Tensor | None]:
    """For each input, where some probe has a gradient; `None` where none is known."""
    live: list[Tensor | None] = [None] * inputs
    for sample in range(subject.samples):
        request = subject.request if sample == 0 else _near(subject.request, subject.generator)
        capture = subject.captured(request)
        cotangent = subject.normal(capture.output)
        left = iter(capture.products([capture.output], input_edges(capture), [cotangent]))
        for i, root in enumerate(capture.roots):
            gradient = next(left) if root is not None else None
            if gradient is not None:
                _add(live, i, gradient.isnan() | (gradient != 0))
        for ids, _ in capture.embedded:
            gradient = next(left)
            if gradient is not None:
                changed = (gradient != 0) | gradient.isnan()
                _add_integers(capture, live, ids, changed, subject.request.inputs)
    return live


def _near(request: Request, generator: torch.Generator) -> Request:
    """The same inputs with noise of a tenth of their standard deviation."""

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        spread = float(tensor.std()) if tensor.numel() > 1 else 1.0
        return tensor + 0.1 * spread * noise.to(tensor.dtype).to(tensor.device)

    own = {id(tensor): moved(tensor) for tensor in request.inputs}
    inputs = tuple(own[id(tensor)] for tensor in request.inputs)
    return Request(inputs, request.targets, request.additional, request.part)


def _add(live: list[Tensor | None], place: int, changed: Tensor) -> None:
    known = live[place]
    live[place] = changed if known is None else known | changed


def _add_integers(
    capture: Capture, live: list[Tensor | None], ids: Tensor, changed: Tensor,
    inputs: Sequence[Tensor],
) -> None:  # fmt: skip
    """Add the integers whose embeddings have a gradient."""
    changed = changed.any(-1) if changed.ndim > ids.ndim else changed
    index, example, local = capture.spaces.locate(ids)
    for i, (name, tensor) in enumerate(zip(capture.input_names, inputs, strict=True)):
        found = torch.zeros(tensor.shape, dtype=torch.bool).flatten(1)
        for space in capture.spaces:
            if space.name == name and space.kind == "element":
                here = changed.cpu() & (index == space.index)
                found[example[here], local[here]] = True
        if bool(found.any()):
            _add(live, i, found.view(tensor.shape))
