"""A small encoder whose attention can be written in any way, and its plain eager twin.

The tests of the forms of attention give it a function of q, k and v; the twin computes the same
probabilities in the plainest form, keeps them in the graph, and so tells what must come out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from zoo import oracles

BATCH, TOKENS, HEADS, HEAD_WIDTH = 2, 6, 2, 4
WIDTH = HEADS * HEAD_WIDTH
SCALE = 1 / math.sqrt(HEAD_WIDTH)

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
Probabilities = Callable[[Tensor, Tensor], Tensor]


def plain(query: Tensor, key: Tensor) -> Tensor:
    """Softmax over the keys of the scaled products of `[B, H, N, d]` queries and keys."""
    return (query @ key.mT * SCALE).softmax(dim=-1)


def grouped(tensor: Tensor) -> Tensor:
    """Repeat the heads of keys or values until there is one for every query head."""
    return tensor.repeat_interleave(HEADS // tensor.shape[1], dim=1)


class SelfAttention(nn.Module):
    def __init__(self, form: Form, key_heads: int = HEADS) -> None:
        super().__init__()
        self.form = form
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, key_heads * HEAD_WIDTH)
        self.value = nn.Linear(WIDTH, key_heads * HEAD_WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        return self.out(self.form(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """`order`: where the norm stands, or that there is no residual connection at all."""

    def __init__(self, form: Form, key_heads: int = HEADS, order: str = "pre-norm") -> None:
        super().__init__()
        self.order = order
        self.attention = SelfAttention(form, key_heads)
        self.norm = nn.LayerNorm(WIDTH)
        self.norm_mlp = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "no residual":
            return self.mlp(self.norm_mlp(self.attention(self.norm(x))))
        if self.order == "post-norm":
            x = self.norm(x + self.attention(x))
            return self.norm_mlp(x + self.mlp(x))
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm_mlp(x))


class Encoder(nn.Module):
    """Features `[B, N, 3]`, or ids `[B, N]` where `vocabulary` is given, to `[B, 4]` class scores.

    `read`: the row that the head reads (0, -1, ...), or "mean" of all rows.
    """

    def __init__(
        self,
        form: Form,
        *,
        depth: int = 2,
        key_heads: int = HEADS,
        order: str = "pre-norm",
        read: int | str = 0,
        vocabulary: int | None = None,
        blocks: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.read = read
        self.embed = nn.Embedding(vocabulary, WIDTH) if vocabulary else nn.Linear(3, WIDTH)
        self.position = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(blocks or [Block(form, key_heads, order) for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 4)
        oracles.randomise(self.double().eval())

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1) if self.read == "mean" else x[:, self.read])


def features(seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, TOKENS, 3, generator=generator, dtype=torch.float64)


def ids(seed: int = 3) -> Tensor:
    return torch.randint(20, (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed))


def twin(model: Encoder, probabilities: Probabilities = plain) -> tuple[Encoder, list[Tensor]]:
    """The same weights with eager attention, and the list that its probabilities go to."""
    kept: list[Tensor] = []

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = probabilities(query, grouped(key))
        kept.append(attention)
        return attention @ grouped(value)

    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, SelfAttention):
            module.form = form
    return reference.requires_grad_(True), kept


def expected_maps(
    model: Encoder,
    inputs: Tensor,
    target: int | Sequence[int],
    probabilities: Probabilities = plain,
) -> list[Tensor]:
    """Eq. 5 of every call, from the twin, after checking that it is the same function."""
    reference, kept = twin(model, probabilities)
    with torch.no_grad():
        torch.testing.assert_close(reference(inputs), model(inputs), rtol=1e-10, atol=1e-10)
    kept.clear()
    return oracles.maps_from(lambda: reference(inputs), kept, target)


def expected_tokens(
    model: Encoder,
    inputs: Tensor,
    target: int | Sequence[int],
    probabilities: Probabilities = plain,
) -> Tensor:
    """The value of every token, `[B, N]`."""
    maps = expected_maps(model, inputs, target, probabilities)
    rows = range(TOKENS) if model.read == "mean" else [model.read % TOKENS]
    return oracles.read_row(oracles.propagate(maps), list(rows))
