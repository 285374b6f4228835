"""How a program begins and ends: embeddings of its inputs, and what the scores are read from."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laws.random_programs.attention import WIDTH
from laws.random_programs.tape import Book, Tape

FEATURES, VOCABULARY, CLASSES = 4, 20, 3

# -- embeddings -------------------------------------------------------------------------------


class Embedding(nn.Module):
    """Some inputs to `[B, n, D]`.

    `shapes` are those of the maps of its inputs, without the batch; `origins` says for each token
    which of them it is made of, and where.
    """

    size: int
    shapes: list[tuple[int, ...]]
    names: list[str]

    def inputs(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        raise NotImplementedError

    def origins(self) -> list[tuple[int, int]]:
        sizes = [int(torch.tensor(shape).prod()) for shape in self.shapes]
        return [(i, n) for i, size in enumerate(sizes) for n in range(size)]

    def follow(self, inputs: Sequence[Tensor], tape: Tape, first: int = 0) -> tuple[Tensor, Book]:
        """`first`: the number of the first of its inputs among those of the program."""
        return self(*inputs), tape.born([(first + i, n) for i, n in self.origins()])


class Features(Embedding):
    def __init__(self, rng: random.Random, size: int) -> None:
        super().__init__()
        self.size, self.shapes, self.names = size, [(size,)], ["input: features"]
        self.inner = nn.Linear(FEATURES, WIDTH)
        self.position = nn.Parameter(torch.zeros(size, WIDTH))

    def inputs(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        shape = batch, self.size, FEATURES
        return [torch.randn(*shape, generator=generator, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.position


class Ids(Embedding):
    """Ids, of one argument or of two that are joined before the embedding."""

    KINDS = ("embedding", "index", "index_select", "one hot", "functional", "torch.embedding")

    def __init__(self, rng: random.Random, size: int) -> None:
        super().__init__()
        self.size, self.kind = size, rng.choice(self.KINDS)
        self.shapes = [(size,)]
        if rng.random() < 0.2:
            self.shapes = [(size // 2,), (size - size // 2,)]
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(1, size, WIDTH))
        self.names = [f"input: ids by {self.kind}"]
        self.names += ["ids of two arguments"] if len(self.shapes) > 1 else []

    def inputs(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        return [torch.randint(VOCABULARY, (batch, n), generator=generator) for (n,) in self.shapes]

    def forward(self, *parts: Tensor) -> Tensor:
        ids = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        W = self.table.weight
        if self.kind == "embedding":
            x = self.table(ids)
        elif self.kind == "functional":
            x = F.embedding(ids, W)
        elif self.kind == "torch.embedding":
            x = torch.embedding(W, ids)
        elif self.kind == "index":
            x = W[ids]
        elif self.kind == "index_select":
            x = W.index_select(0, ids.flatten()).view(*ids.shape, WIDTH)
        else:
            x = F.one_hot(ids, VOCABULARY).to(W.dtype) @ W
        return x + self.position


class Picture(Embedding):
    """Pictures of two channels in patches of 2 x 3."""

    KINDS = ("convolution", "unfold", "reshape")

    def __init__(self, rng: random.Random, size: int) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        rows = 2 if size % 2 == 0 else 3 if size % 3 == 0 else 1
        self.grid = rows, size // rows
        self.size, self.shapes = size, [self.grid]
        self.patches = nn.Conv2d(2, WIDTH, (2, 3), (2, 3))
        self.inner = nn.Linear(12, WIDTH)
        self.position = nn.Parameter(torch.zeros(1, size, WIDTH))
        self.names = [f"input: picture by {self.kind}"]

    def inputs(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        shape = batch, 2, 2 * self.grid[0], 3 * self.grid[1]
        return [torch.randn(*shape, generator=generator, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "convolution":
            x = self.patches(x).flatten(2).transpose(1, 2)
        elif self.kind == "unfold":
            x = self.inner(F.unfold(x, (2, 3), stride=(2, 3)).mT)
        else:
            rows, columns = self.grid
            x = x.reshape(len(x), 2, rows, 2, columns, 3).permute(0, 2, 4, 1, 3, 5)
            x = self.inner(x.reshape(len(x), self.size, 12))
        return x + self.position


def draw_embedding(rng: random.Random, size: int) -> Embedding:
    return rng.choices([Features, Ids, Picture], [40, 35, 25])[0](rng, size)


# -- pooling by attention ---------------------------------------------------------------------


class Pooling(nn.Module):
    """Attention of parameters to all tokens, `[B, n, D]` to `[B, D]`.

    Who asks is a parameter, or the weights are gated scores of the tokens; either way one token of
    a stream of its own.
    """

    KINDS = ("product", "times and sum", "fused", "einsum", "gated sum", "gated product", "scores")

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        self.query = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bare = rng.random() < 0.5
        self.up, self.gate, self.down = (
            nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        )  # fmt: skip
        self.names = [f"pooling: {self.kind}"]

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x, x) if self.bare else (self.key(x), self.value(x))

    def _gated(self, x: Tensor) -> Tensor:
        if self.kind == "scores":
            return self.down(x)
        return self.down(torch.tanh(self.up(x)) * torch.sigmoid(self.gate(x)))

    def forward(self, x: Tensor) -> Tensor:
        k, v = self._keys_and_values(x)
        if self.kind in {"gated sum", "scores"}:
            return (self._gated(x).softmax(1) * v).sum(1)
        if self.kind == "gated product":
            return (self._gated(x).mT.softmax(-1) @ v)[:, 0]
        q = self.query.expand(len(x), -1, -1)
        if self.kind == "product":
            return ((q @ k.mT).softmax(-1) @ v)[:, 0]
        if self.kind == "times and sum":
            return ((q @ k.mT).softmax(-1).mT * v).sum(1)
        if self.kind == "einsum":
            P = torch.einsum("bnd,d->bn", k, self.query[0, 0]).softmax(-1)
            return torch.einsum("bn,bnd->bd", P, v)
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]

    def follow(self, x: Tensor, book: Book, tape: Tape) -> Tensor:
        k, v = self._keys_and_values(x)
        if self.kind in {"gated sum", "gated product", "scores"}:
            logits = self._gated(x).mT
        else:
            logits = self.query @ k.mT
        asking = tape.parameters(1)
        out, _ = tape.attend(logits.softmax(-1).unsqueeze(1), v.unsqueeze(1), asking, book)
        return out[:, 0, 0]


# -- read-outs --------------------------------------------------------------------------------


class ReadOut(nn.Module):
    """What the score is made of, given the tokens after each layer.

    `targets` draws the index of the explained score of each example.
    """

    KINDS = (
        "first", "first", "last", "mean", "max", "some token", "first and mean", "two layers",
        "layers side by side", "exits", "pooling", "pooling", "pooling and first", "sum", "flat",
    )  # fmt: skip

    TWO_ROWS = ("first and mean", "layers side by side", "pooling and first")

    def __init__(self, rng: random.Random, sizes: Sequence[int]) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        size = sizes[-1]
        self.at = rng.randrange(size)
        widths = {
            "first and mean": 2,
            "layers side by side": 2,
            "pooling and first": 2,
            "flat": size,
        }
        self.head = nn.Linear(widths.get(self.kind, 1) * WIDTH, CLASSES)
        self.norm = nn.LayerNorm(WIDTH)
        self.pooling = Pooling(rng)
        self.layer = rng.randrange(len(sizes))
        self.names = [f"read: {self.kind}"]
        if "pooling" in self.kind:
            self.names += self.pooling.names

    def read(self, states: Sequence[Tensor], pooled: Tensor | None) -> Tensor:
        x, earlier = self.norm(states[-1]), states[self.layer]
        if self.kind == "exits":
            return torch.stack([self.head(s[:, 0]) for s in (earlier, states[-1])], 1)
        parts = {
            "first": lambda: x[:, 0],
            "last": lambda: x[:, -1],
            "mean": lambda: x.mean(1),
            "sum": lambda: x.sum(1),
            "max": lambda: x.max(1).values,
            "flat": lambda: x.flatten(1),
            "some token": lambda: x.select(1, self.at),
            "first and mean": lambda: torch.cat([x[:, 0], x[:, 1:].mean(1)], -1),
            "two layers": lambda: earlier[:, 0] + x[:, 0],
            "layers side by side": lambda: torch.cat([earlier[:, 0], x[:, 0]], -1),
            "pooling": lambda: pooled,
            "pooling and first": lambda: torch.cat([pooled, x[:, 0]], -1),
        }
        return self.head(parts[self.kind]())

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        pooled = self.pooling(self.norm(states[-1])) if "pooling" in self.kind else None
        return self.read(states, pooled)

    def follow(self, states: Sequence[Tensor], book: Book, tape: Tape) -> Tensor:
        pooled = None
        if "pooling" in self.kind:
            pooled = self.pooling.follow(self.norm(states[-1]), book, tape)
        return self.read(states, pooled)

    def targets(self, rng: random.Random, batch: int) -> list[tuple[int, ...]]:
        if self.kind == "exits":
            one = rng.randrange(2), rng.randrange(CLASSES)
            return [one] * batch
        if rng.random() < 0.3:
            return [(rng.randrange(CLASSES),) for _ in range(batch)]
        return [(rng.randrange(CLASSES),)] * batch
