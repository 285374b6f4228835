"""Taking parts of inputs away: pixels or patches that are painted over, tokens that are dropped.

A removal holds the inputs of a whole data set and makes what the model sees when only some features
of each example are kept; `curves` and `saco` decide which. New kinds of features need a class with
the four members of `Removal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

Attributions = Tensor | tuple[Tensor, ...]


class Removal(Protocol):
    """Inputs whose features can be taken away."""

    removable: Tensor
    """`[B, N]` bool: the features that may be removed; all others are always kept."""

    def features(self, attributions: Attributions) -> Tensor:
        """The relevance of each feature, `[B, N]`, in what an attribution method returned."""

    def removed(self, fraction: float, count: int) -> int:
        """How many of `count` features a fraction is."""

    def perturbed(
        self, keep: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """For `keep` `[B, N]`: indices of examples, and the model's inputs for them, in batches."""


class Pixels:
    """Images whose pixels, or square patches of them, are painted over.

    Args:
        images: `[B, C, H, W]`, as the model takes them.
        baseline: what a removed pixel becomes: a number, a tensor that broadcasts to `images`
            (`[C, 1, 1]` for black before normalisation), or a whole image such as `blurred`.
        patch: side of the patches that are removed as one, in pixels, which must divide height and
            width; `None`: single pixels.
        further: more arguments of the model, tensors `[B, ...]`.

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
        """Relevance per pixel or patch, `[B, N]`: channels summed (where all are alike, as in maps
        over tokens, their common value), then the mean over each patch.

        Args:
            attributions: `[B, C, H, W]` or `[B, H, W]`; of a tuple, the first.
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
        """`int(fraction · count)`, as the method's authors count pixels."""
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
    """Sequences whose tokens, or region features, are dropped; those that stay keep their order.

    Nothing is masked instead: the sequence gets shorter, so that a model without a mask will do.
    Padding is dropped as well, and sequences of one length are put in one batch.

    Args:
        inputs: all arguments of the model, tensors `[B, ...]`.
        dropped: places in `inputs` of those whose axis 1 are the tokens (ids and their mask; region
            features, boxes and their mask).
        present: `[B, N]`, true or not 0 where a token is no padding; `None`: everywhere.
        protected: `[B, N]`, true for tokens that are never removed, such as CLS and SEP; `None`:
            none.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if an input is no tensor.

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
            raise ValueError("dropped names no input: say which of them hold the tokens")
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
        """Relevance per token, `[B, N]`; of region features `[B, N, D]`, the sum over D (where all
        D are alike, as in maps over tokens, their common value).

        Args:
            attributions: of the dropped input; of a tuple, the part at the first dropped place.
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
        """All but `int((1 − fraction) · count)`, as the method's authors count tokens."""
        return count - int((1 - fraction) * count)

    def perturbed(  # noqa: D102 - as in the protocol
        self, keep: Tensor, batch_size: int
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        keep = keep & self.present
        lengths = keep.sum(1)
        for length in sorted(set(lengths.tolist())):
            for rows in torch.split((lengths == length).nonzero()[:, 0], batch_size):
                # Kept places first, in their order.
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
            f"{len(attributions)} attributions, but that of the input at {place} is needed: pass "
            "it alone"
        )
    return attributions[place]


def _check_sizes(first: object, others: Sequence[object]) -> None:
    sizes = set()
    for tensor in (first, *others):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"an argument is {type(tensor).__name__}, no tensor: fix it in the function that "
                "calls the model"
            )
        sizes.add(len(tensor))
    if len(sizes) > 1:
        raise ValueError(f"all arguments must hold as many examples; they hold {sorted(sizes)}")


def blurred(images: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """The images out of focus: what insertion starts from.

    Args:
        images: `[B, C, H, W]`.
        size: of the Gaussian kernel, odd.
        sigma: its standard deviation, in pixels.

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
