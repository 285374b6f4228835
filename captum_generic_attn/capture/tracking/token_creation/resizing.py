"""Resizing: each place of a resized map is a token; a resized image has elements of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.operations import Operation
from captum_generic_attn.capture.tracking.token_creation.geometry import centres_of, extent_of
from captum_generic_attn.capture.tracking.token_creation.rows import on_map
from captum_generic_attn.capture.tracking.token_creation.windows import Windows
from captum_generic_attn.tokens.ids import varies
from captum_generic_attn.tokens.spaces import TokenSpaces


def of_resized(spaces: TokenSpaces, abstract: AbstractValue, op: Operation) -> AbstractValue:
    """The value of a resized map or image.

    Each place of a map becomes a token, made of the token in which it lies. An image gets elements
    of its own, which lie where they were in the original.
    """
    abstract = abstract._replace(calls=None, weighing=None)
    lost = abstract.without_tokens(op.name)
    if op.inputs[0].shape == op.results[0].shape:
        return abstract
    if len(abstract.token_ids) != 1 or op.inputs[0].ndim < 3:
        return lost  # keys may not be mixed
    if abstract.role is Role.RAW:
        return _of_image(spaces, abstract, op)
    if abstract.role is not Role.TOKENS or varies(abstract.token_ids[0], 1):
        return lost
    spaces.approximate("neighbourhood", op.name)
    lines = abstract.token_ids[0][:, 0]
    out = op.results[0].shape[2:]
    nearest = F.interpolate(lines[:, None].double(), out, mode="nearest-exact")
    parents = nearest[:, 0].to(lines.dtype).unsqueeze(-1)
    return on_map(spaces, abstract, op, parents, _centres(spaces, lines, out))


def _of_image(spaces: TokenSpaces, abstract: AbstractValue, op: Operation) -> AbstractValue:
    """The value of a resized image, with elements of its own."""
    ids, spatial, out = abstract.token_ids[0], op.inputs[0].shape[2:], op.results[0].shape[2:]
    centres = _centres(spaces, ids[:, 0], out)
    extent = extent_of(spaces, ids[:, :1], _sampled(op, spatial, out), out)
    if centres is None or extent is None:
        return abstract.without_tokens(op.name)
    if any(n > 2 * m for n, m in zip(spatial, out, strict=True)):
        spaces.approximate("neighbourhood", op.name)
    image = spaces.of_picture(ids, centres, extent, op.results[0].shape)
    return abstract._replace(token_ids=(image,))


def _centres(spaces: TokenSpaces, lines: Tensor, out: torch.Size) -> Tensor | None:
    """`[B, *out, d]` centres of the places of maps `[B, *spatial]` that are resized to `out`."""
    steps = [n / m for n, m in zip(lines.shape[1:], out, strict=True)]
    return centres_of(spaces, lines, [(step - 1) / 2 for step in steps], steps, out)


def _sampled(op: Operation, spatial: torch.Size, out: torch.Size) -> Windows:
    """The elements that each place of a resized map reads: what it covers, and neighbours."""
    taps = 2 if op.argument(3, "mode", "nearest") == "bicubic" else 1
    smooth = bool(op.argument(6, "antialias", False))
    along = []
    for n, m in zip(spatial, out, strict=True):
        half = max(n / m / 2, taps * (max(n / m, 1) if smooth else 1) - 1e-6)
        middles = [(i + 0.5) * n / m - 0.5 for i in range(m)]
        along.append([range(math.ceil(c - half), math.floor(c + half) + 1) for c in middles])
    return Windows(along)
