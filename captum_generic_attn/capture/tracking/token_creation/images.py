"""One token for each window of a picture: patch convolutions over the elements of inputs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue
from captum_generic_attn.capture.tracking.operations import Operation
from captum_generic_attn.capture.tracking.token_creation.geometry import (
    centres_of,
    channel_offsets,
    extent_of,
)
from captum_generic_attn.capture.tracking.token_creation.rows import on_map
from captum_generic_attn.capture.tracking.token_creation.windows import Windows, windows_read_by
from captum_generic_attn.tokens.space import PADDING
from captum_generic_attn.tokens.spaces import TokenSpaces


def of_picture(spaces: TokenSpaces, abstract: AbstractValue, op: Operation) -> AbstractValue:
    """Each window of the elements of an input becomes a token.

    Channels may be of several inputs (bands, two dates), each of which makes tokens; at one place
    they are one token.
    """
    ids = abstract.token_ids[0]
    windows = windows_read_by(op)
    channels = _channels_by_input(spaces, ids)
    if channels is None:
        return abstract.irregular(f"{op.name} of channels whose elements lie at different places")
    together: AbstractValue | None = None
    for alike in channels:
        born = _of_channels(spaces, abstract, op, ids[:, alike], windows)
        if together is None or not born.token_ids:
            together = born
        elif not spaces.identify(together.token_ids[0], born.token_ids[0]):
            return abstract.irregular(op.name)
        if not born.token_ids:
            break
    assert together is not None  # noqa: S101 - a picture has a channel
    return together


def _of_channels(
    spaces: TokenSpaces, abstract: AbstractValue, op: Operation, ids: Tensor, windows: Windows
) -> AbstractValue:
    """Tokens of the windows over channels `[B, c, *spatial]`, whose rows may be of several inputs.

    Two pictures that are joined along the batch go through one convolution.
    """
    out = op.results[0].shape
    lines = ids[:, 0]
    one = lines.reshape(len(lines), -1).amax(1)  # any element will do to tell the picture
    owner = spaces.locate(one)[0]
    together: AbstractValue | None = None
    for i in torch.unique(owner).tolist():
        mine = torch.where(owner == i, one, PADDING).view(-1, *[1] * (lines.ndim - 1), 1)
        centres = extent = None
        if windows.regular:
            steps = windows.starts, windows.steps
            centres = _of_own(owner == i, centres_of(spaces, lines[owner == i], *steps, out[2:]))
        if centres is not None:
            extent = extent_of(spaces, ids[owner == i], windows, out[2:])
            apart = channel_offsets(spaces, ids[owner == i])
            if apart is not None:  # in the middle of the channels
                centres = centres + (apart.amin(0) + apart.amax(0)) / 2
        if extent is not None:
            ranges = _of_own(owner == i, extent.ranges)
            assert ranges is not None  # noqa: S101 - they are known
            extent = extent._replace(ranges=ranges)
        mine = mine.expand(len(lines), *out[2:], 1)
        born = on_map(spaces, abstract, op, mine, centres, extent)
        if not born.token_ids:
            return born
        if together is not None:
            born = born.map(partial(_filled, together.token_ids[0]))
        together = born
    assert together is not None  # noqa: S101 - a channel has rows
    return together


def _channels_by_input(spaces: TokenSpaces, ids: Tensor) -> list[list[int]] | None:
    """The channels of each input in a ids `[B, C, *spatial]` of elements.

    `None` if the channels of an input hold elements of different places.
    """
    corner = ids[(slice(None), slice(None), *[slice(0, 1)] * (ids.ndim - 2))]
    shifted = ids - corner  # [B, C, *spatial]: as far from the corner in each channel
    same = (shifted == shifted[:, :1]) | ((ids < 0) & (ids[:, :1] < 0))
    if not bool(same.all()):
        padding = ids < 0
        if not bool(padding.any()):
            return None
        # The corner is padding: compare with the first element that is none.
        known = (~padding[0, 0]).flatten().nonzero()
        if not len(known) or not bool((padding == padding[:, :1]).all()):
            return None
        flat = ids.flatten(2)
        shifted = flat - flat[:, :, int(known[0]), None]
        kept = ~padding.flatten(2)
        if not bool(((shifted == shifted[:, :1]) | ~kept).all()):
            return None
    middle = ids[0].flatten(1).amax(1)
    index = spaces.locate(middle)[0]
    return [(index == i).nonzero().flatten().tolist() for i in dict.fromkeys(index.tolist())]


def _of_own(own: Tensor, values: Tensor | None) -> Tensor | None:
    """Values of some rows of a batch, as values of all."""
    if values is None or bool(own.all()):
        return values
    every = values.new_zeros(len(own), *values.shape[1:])
    every[own] = values
    return every


def _filled(ids: Tensor, other: Tensor) -> Tensor:
    """A ids whose padding is filled from another."""
    return torch.where(ids >= 0, ids, other)
