"""An encoder whose forward pass is any function, and what must come out of its explanation.

The tests of the models that are hard to follow give it a `walk` (what happens between the input and
the scores) and compare with the plain eager twin of `zoo.encoder`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import oracles
from zoo.encoder import HEADS, TOKENS, WIDTH, Encoder, Form, SelfAttention, plain

Walk = Callable[..., Tensor]
FORMS: dict[str, Form] = {
    "eager": lambda query, key, value: plain(query, key) @ value,
    "fused": F.scaled_dot_product_attention,
}


class Walker(Encoder):
    """`walk(model, *inputs)` is its whole forward pass; `cls`, `table` and `gate` are there to use.

    `patch`: patches of 4 x 4 pixels. `more`: further modules, drawn anew like all the others.
    """

    def __init__(self, walk: Walk, form: Form = FORMS["fused"], depth: int = 2, **more: nn.Module):
        super().__init__(form, depth=depth)
        self.walk = walk
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.table = nn.Embedding(20, WIDTH)
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        for name, module in more.items():
            self.add_module(name, module)
        oracles.randomise(self.double().eval(), seed=1)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.walk(self, *inputs)

    def start(self, x: Tensor) -> Tensor:
        """Tokens of their own memory, so that a walk may write into them."""
        return self.embed(x) + self.position[:, : x.shape[1]]

    def finish(self, x: Tensor) -> Tensor:
        return self.head(x[:, 0])

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def with_cls(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)


def maps(
    model: nn.Module, inputs: Sequence[Any], target: int = 1, walk: Walk | None = None
) -> list[Tensor]:
    """Eq. 5 of every call in order; `walk` replaces the model's where autograd needs another."""
    kept: list[Tensor] = []

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = plain(query, key)
        kept.append(attention)
        return attention @ value

    reference = copy.deepcopy(model).requires_grad_(True)
    for module in reference.modules():
        if isinstance(module, SelfAttention):
            module.form = form
    if walk is not None:
        reference.walk = walk
    return oracles.maps_from(lambda: reference(*inputs), kept, target)


def mean_of_heads(one_by_one: Sequence[Tensor], heads: int = HEADS) -> list[Tensor]:
    """Eq. 5 of calls of one head each: the mean over the heads of a layer."""
    return [sum(one_by_one[i : i + heads]) / heads for i in range(0, len(one_by_one), heads)]


def row(
    of: Sequence[Tensor], rows: int | Sequence[int] = 0, start: int = 0, stop: int | None = None
) -> Tensor:
    """Eq. 6 over the maps, the explained rows' values of the tokens `start:stop`."""
    return oracles.read_row(oracles.propagate(of), rows)[:, start:stop]


def everywhere(tokens: int = TOKENS) -> list[int]:
    return list(range(tokens))
