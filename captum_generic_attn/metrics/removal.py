"""Removes features of inputs: pixels or patches are replaced by a baseline, tokens are dropped.

A removal holds the inputs of a whole data set, and returns the model's inputs when only some
features of each example are kept; `curves` and `saco` choose these features. A new kind of features
needs a class with the four members of `Removal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

Attributions = Tensor | tuple[Tensor, ...]


class Removal(Protocol):
    """Inputs whose features can be removed."""

    removable: Tensor
    """`[B, N]` bool: the features that may be removed; the others are always kept."""

    def features(self, attributions: Attributions) -> Tensor:
        """The relevance of each feature, `[B, N]`, from the result of an attribution method."""

    def removed(self, fraction: float, count: int) -> int:
        """The number of features, of `count`, that a fraction removes."""

    def perturbed(
        self, keep: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Yield batches: the indices of examples, and their inputs with only `keep` `[B, N]`."""


class Pixels:
    """Images whose pixels or square patches are replaced by a baseline.

    Args:
        images: `[B, C, H, W]`, as the model takes them.
        baseline: the value of removed pixels: a number, a tensor that broadcasts to `images` (`[C,
            1, 1]` for black before normalisation), or whole images such as `blurred(images)`.
        patch: side in pixels of patches that are removed as a whole; it must divide height and
            width; `None`: single pixels.
        further: further arguments of the model, tensors `[B, ...]`.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> removal = Pixels(torch.ones(1, 1, 2, 2), baseline=0)
        >>> [(rows, (images,))] = removal.perturbed(torch.tensor([[True, False, True, True]]), 8)
        >>> images[0, 0].tolist()
        [[1.0, 0.0], [1.0, 1.0]]
    """

    def __init__(
        self, images: Tensor, baseline: Tensor | float = 0.0, *, patch: int | None = None,
        further: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        if images.ndim != 4:
            raise ValueError(f"images are [B, C, H, W], not {list(images.shape)}")
        height, width = images.shape[-2:]
        self.patch = 1 if patch is None else patch
        if self.patch < 1 or height % self.patch or width % self.patch:
            raise ValueError(f"patches of {patch} pixels do not tile {height} × {width} pixels")
        if not images.is_floating_point():
            raise ValueError(f"images must be floats, as the model takes them, not {images.dtype}")
        _check_sizes(images, further)
        self.images = images
        fill = torch.as_tensor(baseline, dtype=images.dtype, device=images.device)
        try:
            self.baseline = fill.broadcast_to(images.shape)
        except RuntimeError:
            raise ValueError(
                f"a baseline {list(fill.shape)} does not broadcast to images "
                f"{list(images.shape)}: pass a number, [C, 1, 1], or images"
            ) from None
        self.further = tuple(further)
        self.grid = height // self.patch, width // self.patch
        self.removable = torch.ones(
            len(images), self.grid[0] * self.grid[1], dtype=torch.bool, device=images.device
        )

    def features(self, attributions: Attributions) -> Tensor:
        """Relevance per pixel or patch, `[B, N]`.

        Channels are summed (if all are equal, as in maps over tokens, one of them is taken); then
        pixels are averaged over each patch.

        Args:
            attributions: `[B, C, H, W]` or `[B, H, W]`; the first entry of a tuple.
        """
        maps = _part(attributions, 0).detach().to(self.images.device)
        if maps.ndim == 4:
            alike = (maps == maps[:, :1]).all().item()
            maps = maps[:, 0] if alike else maps.sum(1)
        if maps.shape != (len(self.images), *self.images.shape[-2:]):
            raise ValueError(
                f"attributions {list(maps.shape)} do not fit images {list(self.images.shape)}"
            )
        return avg_pool2d(maps.double()[:, None], self.patch).flatten(1)

    def removed(self, fraction: float, count: int) -> int:
        """`int(fraction · count)`, as the authors of the method count pixels."""
        return int(fraction * count)

    def perturbed(  # noqa: D102 - as in the protocol
        self, keep: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        for rows in torch.split(torch.arange(len(keep), device=keep.device), batch_size):
            kept = keep[rows].view(-1, 1, *self.grid)
            kept = kept.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
            images = torch.where(kept, self.images[rows], self.baseline[rows])
            yield rows, (images, *(tensor[rows] for tensor in self.further))


class Tokens:
    """Sequences whose tokens or region features are dropped; the remaining ones keep their order.

    Tokens are dropped, not masked: the sequence becomes shorter, so the model needs no mask.
    Padding is dropped as well, and sequences of equal length form a batch.

    Args:
        inputs: all arguments of the model, tensors `[B, ...]`.
        dropped: indices in `inputs` of the arguments whose axis 1 is the token axis (ids and their
            mask; region features, boxes and their mask).
        present: `[B, N]`, true or nonzero where a token is not padding; `None`: everywhere.
        protected: `[B, N]`, true for tokens that are never removed, such as CLS and SEP; `None`: no
            token.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if an input is not a tensor.

    Example:
        >>> ids = torch.tensor([[101, 7, 8, 102], [101, 9, 102, 0]])
        >>> removal = Tokens([ids], present=ids > 0, protected=ids > 100)
        >>> keep = removal.removable & (ids != 8) | ~removal.removable
        >>> [[t.tolist() for t in given] for _, given in removal.perturbed(keep, batch_size=8)]
        [[[[101, 7, 102], [101, 9, 102]]]]
    """

    def __init__(
        self, inputs: Sequence[Tensor], *, dropped: Sequence[int] = (0,),
        present: Tensor | None = None, protected: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.inputs = tuple(inputs)
        self.dropped = frozenset(range(len(self.inputs))[place] for place in dropped)
        if not self.dropped:
            raise ValueError("dropped names no input: give the indices of those with tokens")
        _check_sizes(self.inputs[min(self.dropped)], self.inputs)
        shapes = {tuple(self.inputs[place].shape[:2]) for place in self.dropped}
        given = {"present": present, "protected": protected}
        shapes |= {tuple(mask.shape) for mask in given.values() if mask is not None}
        if len(shapes) > 1 or len(next(iter(shapes))) != 2:
            raise ValueError(
                "the dropped inputs, present and protected must agree in [B, N]; they have "
                f"{sorted(shapes)}"
            )
        like = self.inputs[min(self.dropped)]
        everywhere = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
        self.present = everywhere if present is None else present.bool()
        self.removable = self.present if protected is None else self.present & ~protected.bool()

    def features(self, attributions: Attributions) -> Tensor:
        """Relevance per token, `[B, N]`.

        The features of regions `[B, N, D]` are summed (if all are equal, as in maps over tokens,
        one of them is taken).

        Args:
            attributions: the attributions of the dropped input; in a tuple, the entry at the first
                dropped index.
        """
        attributions = _part(attributions, min(self.dropped))
        values = attributions.detach().to(self.removable.device).double()
        if values.ndim > 2:
            values = values.flatten(2)
            alike = (values == values[..., :1]).all().item()
            values = values[..., 0] if alike else values.sum(-1)
        if values.shape != self.removable.shape:
            raise ValueError(
                f"attributions {list(attributions.shape)} do not fit tokens "
                f"{list(self.removable.shape)}"
            )
        return values

    def removed(self, fraction: float, count: int) -> int:
        """All but `int((1 − fraction) · count)`, as the authors of the method count tokens."""
        return count - int((1 - fraction) * count)

    def perturbed(  # noqa: D102 - as in the protocol
        self, keep: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        keep = keep & self.present
        lengths = keep.sum(1)
        for length in sorted(set(lengths.tolist())):
            for rows in torch.split((lengths == length).nonzero()[:, 0], batch_size):
                # Kept positions first, in their order.
                places = (~keep[rows]).byte().argsort(dim=1, stable=True)[:, :length]
                yield (
                    rows,
                    tuple(
                        self._picked(tensor[rows], places)
                        if place in self.dropped
                        else tensor[rows]
                        for place, tensor in enumerate(self.inputs)
                    ),
                )

    @staticmethod
    def _picked(tensor: Tensor, places: Tensor) -> Tensor:
        index = places.view(*places.shape, *[1] * (tensor.ndim - 2))
        return tensor.gather(1, index.expand(*places.shape, *tensor.shape[2:]))


def _part(attributions: Attributions, place: int) -> Tensor:
    if not isinstance(attributions, tuple):
        return attributions
    if len(attributions) <= place:
        raise ValueError(
            f"there are {len(attributions)} attributions, but those of the input at index {place} "
            "are needed: pass these alone"
        )
    return attributions[place]


def _check_sizes(first: object, others: Sequence[object]) -> None:
    sizes = set()
    for tensor in (first, *others):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"an argument is {type(tensor).__name__}, not a tensor: bind it in the function "
                "that calls the model"
            )
        sizes.add(len(tensor))
    if len(sizes) > 1:
        raise ValueError(
            f"all arguments must have the same number of examples; they have {sorted(sizes)}"
        )


def blurred(images: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Blur images, as the starting point of insertion.

    Args:
        images: `[B, C, H, W]`.
        size: size of the Gaussian kernel, odd.
        sigma: standard deviation of the kernel, in pixels.

    Raises:
        ValueError: if an image is smaller than half the kernel.

    Source: V. Petsiuk, A. Das, K. Saenko, *RISE*, BMVC 2018, whose kernel is the default.

    Example:
        >>> bool((blurred(torch.ones(1, 3, 16, 16)) - 1).abs().max() < 1e-6)
        True
    """
    if min(images.shape[-2:]) <= size // 2:
        raise ValueError(
            f"a kernel of {size} pixels is too large for {images.shape[-2]} × {images.shape[-1]} "
            "pixels: pass a smaller size="
        )
    from torchvision.transforms.v2 import functional as transforms

    soft: Tensor = transforms.gaussian_blur(images, [size, size], [sigma, sigma])
    return soft
