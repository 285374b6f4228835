"""What holds for every model of the zoo, in numbers; the tests of each family call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captum_generic_attn import GenericAttention, Relevance

TOLERANCE = 1e-10
Explained = TypeVar("Explained")


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal shapes and values, relative to the greatest expected one, which must not be zero."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    greatest = expected.abs().max().item()
    assert greatest > 1e-9, f"the expected values are all zero ({greatest}): nothing is compared"
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= tolerance * greatest, f"differs by {difference / greatest:.3g} of the peak"


def used_modules(relevance: Relevance) -> list[str]:
    """The names of the modules whose calls counted, in execution order."""
    return [call.module for call in relevance.calls if call.used]


def output_under_capture(
    model: nn.Module, explain: Callable[[], Explained], field: str | None = None
) -> tuple[Tensor, Explained]:
    """What `model` itself returned while `explain` ran, and what that returned.

    A hook of the test's own looks at the model.
    """
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        result = explain()
    finally:
        handle.remove()
    assert seen, "the model did not run"
    output = seen[-1] if field is None else seen[-1][field]
    return output.detach(), result


def assert_batch_is_its_examples(
    method: GenericAttention,
    inputs: Tensor,
    targets: Sequence[int | tuple[int, int]],
    extra: tuple[Tensor, ...] = (),
) -> None:
    """The explanation of a batch equals those of its examples alone, padding kept."""
    target = list(targets) if isinstance(targets[0], tuple) else torch.tensor(targets)
    together = method.attribute(inputs, target, extra or None, return_input_shape=False)
    for i, one in enumerate(targets):
        alone = method.attribute(
            inputs[i : i + 1],
            one,
            tuple(tensor[i : i + 1] for tensor in extra) or None,
            return_input_shape=False,
        )
        assert_same(together[i : i + 1], alone)


def assert_grid_order(
    stem: Callable[[Tensor], Tensor], picture: Tensor, grid: tuple[int, int]
) -> None:
    """Token j of the stem looks at cell (j // width, j % width) of the picture.

    `stem` gives `[1, h·w, D]`. Where its windows are disjoint, every pixel that moves the token
    lies in the cell; where they overlap, what the tokens see moves on from row to row and from
    column to column (windows that stick out of the picture have their centres pulled inwards).
    """
    height, width = grid
    cell = (picture.shape[-2] // height, picture.shape[-1] // width)
    centres = torch.zeros(height, width, 2, dtype=picture.dtype)
    for token in range(height * width):
        place = [token // width, token % width]
        leaf = picture.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(stem(leaf)[0, token].square().sum(), leaf)
        seen = gradient.abs().sum(dim=(0, 1))
        found = (seen > 0).nonzero()
        extent = (found.amax(dim=0) - found.amin(dim=0) + 1).tolist()
        if extent[0] <= cell[0] and extent[1] <= cell[1]:
            assert (found // torch.tensor(cell)).unique(dim=0).tolist() == [place]
        for axis in (0, 1):
            profile = seen.sum(dim=1 - axis)
            positions = torch.arange(len(profile), dtype=profile.dtype)
            centres[place[0], place[1], axis] = (profile * positions).sum() / profile.sum()
    assert (centres[..., 0].diff(dim=0) > 0).all(), centres[..., 0]
    assert (centres[..., 1].diff(dim=1) > 0).all(), centres[..., 1]
