"""One token for each place of a resized map; a resized picture keeps elements of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.operations import Operation
from captum_generic_attn.capture.tracking.token_creation.geometry import centres_of, extent_of
from captum_generic_attn.capture.tracking.token_creation.rows import on_map
from captum_generic_attn.capture.tracking.token_creation.windows import Windows
from captum_generic_attn.tokens.ids import varies
from captum_generic_attn.tokens.spaces import TokenSpaces


def of_resized(spaces: TokenSpaces, abstract: AbstractValue, op: Operation) -> AbstractValue:
    """Each place of a resized map becomes a token, made of the token that it lies in.

    A resized picture has elements of its own. They lie where they were in the picture.
    """
    operand, result = op.inputs[0], op.results[0]
    abstract = abstract._replace(calls=None, weighing=None)
    lost = abstract.without_tokens(op.name)
    if operand.shape == result.shape:
        return abstract
    if len(abstract.token_ids) != 1:
        return lost  # keys may not be mixed
    ids = abstract.token_ids[0]
    if operand.ndim < 3 or abstract.role not in (Role.RAW, Role.TOKENS):
        return lost
    raw = abstract.role is Role.RAW
    if not raw and varies(ids, 1):
        return lost
    lines = ids[:, 0]
    steps = [n / m for n, m in zip(operand.shape[2:], result.shape[2:], strict=True)]
    starts = [(step - 1) / 2 for step in steps]
    centres = centres_of(spaces, lines, starts, steps, result.shape[2:])
    if raw:
        sampled = _sampled(op, operand.shape[2:], result.shape[2:])
        extent = extent_of(spaces, ids[:, :1], sampled, result.shape[2:])
        if centres is None or extent is None:
            return lost
        if any(n > 2 * m for n, m in zip(operand.shape[2:], result.shape[2:], strict=True)):
            spaces.approximate("neighbourhood", op.name)
        picture = spaces.of_picture(ids, centres, extent, result.shape)
        return abstract._replace(token_ids=(picture,))
    spaces.approximate("neighbourhood", op.name)
    nearest = F.interpolate(lines[:, None].double(), result.shape[2:], mode="nearest-exact")
    parents = nearest[:, 0].to(ids.dtype).unsqueeze(-1)
    return on_map(spaces, abstract, op, parents, centres)


def _sampled(op: Operation, spatial: torch.Size, out: torch.Size) -> Windows:
    """What each place of a resized map reads: the part that it stands for, and its neighbours."""
    taps = 2 if op.argument(3, "mode", "nearest") == "bicubic" else 1
    smooth = bool(op.argument(6, "antialias", False))
    along = []
    for n, m in zip(spatial, out, strict=True):
        half = max(n / m / 2, taps * (max(n / m, 1) if smooth else 1) - 1e-6)
        middles = [(i + 0.5) * n / m - 0.5 for i in range(m)]
        along.append([range(math.ceil(c - half), math.floor(c + half) + 1) for c in middles])
    return Windows(along)
