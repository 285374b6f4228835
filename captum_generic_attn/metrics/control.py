"""The random control: an uninformed attribution, which gives the chance level of a metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor
from torch.nn.functional import interpolate

from captum_generic_attn.captum_api.inputs import (
    TargetType,
    TensorOrTupleOfTensorsGeneric,
    shaped_like,
)


class RandomAttribution(Attribution):
    """Random attributions at the resolution of the method to compare with.

    A result is meaningful only relative to the chance level, and that depends on resolution:
    removing random pixels destroys an image sooner than removing random patches.

    Args:
        forward_func: the model; it is never called.
        grid: rows and columns of tokens in an image: one number per token, resized bilinearly like
            the maps of attention methods; `None`: one number per pixel.
        seed: the seed of each call; `None`: the numbers continue PyTorch's random state, as in
            Captum's methods.

    Example:
        >>> control = RandomAttribution(torch.nn.Identity(), grid=(2, 2))
        >>> maps = control.attribute(torch.zeros(1, 3, 8, 8))
        >>> maps.shape, bool((maps[:, 0] == maps[:, 2]).all())
        (torch.Size([1, 3, 8, 8]), True)
    """

    def __init__(
        self, forward_func: Callable[..., Any], *, grid: tuple[int, int] | None = None,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(forward_func)
        self.grid = grid
        self.seed = seed

    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,  # noqa: ARG002 - part of Captum's contract
        additional_forward_args: object = None,  # noqa: ARG002
        return_input_shape: bool = True,
    ) -> TensorOrTupleOfTensorsGeneric:
        """Uniform numbers in 0 … 1, in the shape of the inputs.

        Args:
            inputs: a tensor or a tuple of tensors, batch first. Images `[B, C, H, W]` get one map
                for all channels, other inputs one number for each position along axis 1.
            target: not used.
            additional_forward_args: not used.
            return_input_shape: with `False`, the numbers themselves: `[B, h, w]` for images, `[B,
                N]` for other inputs.

        Returns:
            A tensor, or a tuple like `inputs`, float32.
        """
        generator = torch.default_generator
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        maps = tuple(
            self._of(part, generator, whole=return_input_shape).to(part.device).contiguous()
            for part in parts
        )
        return shaped_like(inputs, maps)

    def _of(self, part: Tensor, generator: torch.Generator, *, whole: bool) -> Tensor:
        if part.ndim == 4:
            size = part.shape[-2:]
            values = torch.rand(len(part), 1, *(self.grid or size), generator=generator)
            if not whole:
                return values[:, 0]
            return interpolate(values, size, mode="bilinear").expand(part.shape)
        values = torch.rand(part.shape[:2], generator=generator)
        if not whole:
            return values
        return values.view(*part.shape[:2], *[1] * (part.ndim - 2)).expand(part.shape)
