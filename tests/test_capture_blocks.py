"""Attention and its gradient in blocks, against whole matrices written from the formulas.

The twin is float64 and knows no blocks: `P = softmax(q kᵀ scale + mask)`, `∂y/∂P = ∂y/∂O Vᵀ`, and
eq. 5 before its mean over heads, `relu(P ⊙ ∂y/∂P)`. Limits of a block are made small, so that tiles,
rests and what causality hides all occur at tiny sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.capture import blocks as module
from captum_generic_attn.capture.blocks import Block, Blocks, FusedBlocks, Maps, computing_dtype
from captum_generic_attn.capture.record import Explicit, Fused, Operands, sums_kept_by

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@contextmanager
def limits(
    rows: int = 4, columns: int = 5, whole: int = 6, elements: int = 64, threads: int = 1
) -> Iterator[None]:
    """Blocks of at most this size; the fixture of `conftest` gives the threads back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS", rows)
        patch.setattr(module, "_COLUMNS", columns)
        patch.setattr(module, "_WHOLE", whole)
        patch.setattr(module, "_DEVICE_ELEMENTS", elements)
        torch.set_num_threads(threads)
        yield


@dataclass(frozen=True)
class Whole:
    """The maps of a call, `[maps, Nq, Nk]`; `hidden` `[maps, Nq, Nk]` is what causality hides."""

    probabilities: Tensor
    gradient: Tensor
    live: Tensor
    hidden: Tensor

    @property
    def evidence(self) -> Tensor:
        return (self.probabilities * self.gradient).clamp(min=0)

    def at(self, rows: Tensor) -> Whole:
        """The same of the queries `rows` `[maps, n]` alone."""
        maps = torch.arange(len(rows))[:, None]
        return Whole(
            self.probabilities[maps, rows], self.gradient[maps, rows], self.live[maps, rows],
            self.hidden[maps, rows],
        )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """What a fused kernel reads, with the mask as the model gave it."""

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    grouped: bool = False
    pick: Tensor | None = None
    sums: Tensor | None = None

    def twin(self) -> Whole:
        query, key, value, gradient = (
            t.detach().double() for t in (self.query, self.key, self.value, self.gradient)
        )
        lead, queries, keys = query.shape[:-2], query.shape[-2], key.shape[-2]
        if self.grouped:
            share = lead[-1] // key.shape[-3]
            key, value = key.repeat_interleave(share, -3), value.repeat_interleave(share, -3)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        logits = query @ key.mT * scale
        hidden = torch.zeros(queries, keys, dtype=torch.bool)
        if self.causal:
            hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
            logits = torch.where(hidden, -math.inf, logits)
        if self.mask is not None:
            boolean = self.mask.dtype == torch.bool
            added = torch.where(self.mask, 0.0, -math.inf) if boolean else self.mask
            logits = logits + added.double()
        powers = logits.exp()
        sums = powers.sum(-1, keepdim=True)
        probabilities = torch.where(sums > 0, powers / sums, 0.0)
        maps = (probabilities, (gradient @ value.mT).expand(*lead, queries, keys),
                (gradient != 0).any(-1), hidden.expand(*lead, queries, keys))  # fmt: skip
        flat = [t.reshape(-1, *t.shape[len(lead) :]) for t in maps]
        return Whole(*(t if self.pick is None else t[self.pick] for t in flat))

    def with_sums(self) -> Call:
        """The same where the kernel kept the logarithm of each query's sum; 0 for an empty sum."""
        probabilities = replace(self, pick=None).twin().probabilities
        assert not (probabilities < 0).any()
        plain = replace(self, pick=None, mask=None, causal=False).twin().probabilities
        # log Σ_visible = log Σ_all + log(part of the plain softmax that is visible), by hand
        logits = self.query.double() @ (
            self.key.repeat_interleave(self.query.shape[-3] // self.key.shape[-3], -3)
            if self.grouped
            else self.key
        ).double().mT
        del plain, logits
        raise NotImplementedError
