"""What stands between an embedding and a read-out: `[B, n, D]` to `[B, m, D]`.

Each step is an ordinary module; its `follow` also says which token stands where afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laws.random_programs.attention import NO_MASK, WIDTH, draw_attention, draw_mask
from laws.random_programs.tape import Book, Tape


class Step(nn.Module):
    """`size` is how many positions come out; `hazard`: refusing it is right."""

    size: int
    names: Sequence[str] = ()
    hazard = False

    def follow(self, x: Tensor, book: Book, tape: Tape) -> tuple[Tensor, Book]:
        """Row by row, unless a step says otherwise."""
        return self(x), book


# -- row by row -------------------------------------------------------------------------------


class Rows(Step):
    """A multilayer perceptron, perhaps gated."""

    KINDS = ("gelu", "tanh", "swiglu", "relu")

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        self.up, self.gate = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.names = [f"mlp: {self.kind}"]

    def forward(self, x: Tensor) -> Tensor:
        act = {"gelu": F.gelu, "tanh": torch.tanh, "relu": F.relu, "swiglu": F.silu}[self.kind]
        up = act(self.up(x))
        return self.down(up * self.gate(x) if self.kind == "swiglu" else up)


class Experts(Step):
    """Rows are sent to one of three experts, whose results come back to their places."""

    KINDS = ("mask assignment", "index_add", "sorted", "dense", "one hot")

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.names = [f"experts: {self.kind}"]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        weights, chosen = self.router(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        if self.kind == "mask assignment":
            for e, expert in enumerate(self.experts):
                mine = chosen == e
                out[mine] = torch.tanh(expert(rows[mine]))
        elif self.kind == "index_add":
            for e, expert in enumerate(self.experts):
                (mine,) = torch.where(chosen == e)
                out.index_add_(0, mine, torch.tanh(expert(rows[mine])))
        elif self.kind == "sorted":
            order = chosen.argsort()
            counts = torch.bincount(chosen, minlength=3).tolist()
            parts = rows[order].split(counts)
            done = [torch.tanh(f(p)) for f, p in zip(self.experts, parts, strict=True)]
            out = torch.cat(done)[order.argsort()]
        else:
            every = torch.stack([torch.tanh(expert(rows)) for expert in self.experts], 1)
            if self.kind == "dense":
                out = every.gather(1, chosen[:, None, None].expand(-1, 1, WIDTH))[:, 0]
            else:
                out = (F.one_hot(chosen, 3).to(every.dtype)[..., None] * every).sum(1)
        return (out * weights[:, None]).view_as(x)


def draw_rows(rng: random.Random) -> Step:
    return Experts(rng) if rng.random() < 0.25 else Rows(rng)


class Gate(Step):
    """Squeeze and excitation: all rows times a gate made of the mean of all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, ["gate by the mean"]
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.inner(x.mean(1, keepdim=True)))


class Neighbours(Step):
    """A convolution along the sequence, which keeps its places."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, ["convolution"]
        self.inner = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x.mT).mT


# -- attention --------------------------------------------------------------------------------


class Block(Step):
    """Residual attention of x to y (or to itself), perhaps in two branches, then row by row."""

    def __init__(self, rng: random.Random, batch: int, size: int, keys: int | None = None) -> None:
        super().__init__()
        self.size = size
        mask = draw_mask(rng, batch, size, keys or size)
        self.branches = nn.ModuleList(
            draw_attention(rng, mask) for _ in range(rng.choices([1, 2], [85, 15])[0])
        )
        self._rest(rng)
        self.names = [*self.names, *self.branches[0].names, *self.branches[-1].names]
        self.names += ["two branches"] if len(self.branches) > 1 else []

    def _rest(self, rng: random.Random) -> None:
        self.order = rng.choice(["pre-norm", "post-norm", "no norm", "no residual"])
        self.norm, self.norm_rows = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.rows = draw_rows(rng)
        self.names = [f"block: {self.order}", *self.rows.names]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        a, b = self._read(x, y)
        total = self.branches[0](a, b)
        for branch in self.branches[1:]:
            total = total + branch(a, b)
        return self._finish(x, total)

    def follow(
        self, x: Tensor, book: Book, tape: Tape, y: Tensor | None = None, other: Book | None = None
    ) -> tuple[Tensor, Book]:
        a, b = self._read(x, y)
        total, found = torch.zeros(()), frozenset[int]()
        for branch in self.branches:
            out, ancestors = branch.follow(a, book, b, book if other is None else other, tape)
            total, found = total + out, found | ancestors
        return self._finish(x, total), self._after(book, found)

    def _read(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.order == "pre-norm":
            return self.norm(x), self.norm(x) if y is None else self.norm(y)
        return x, x if y is None else y

    def _after(self, book: Book, calls: frozenset[int]) -> Book:
        return replace(book, ancestors=calls) if self.order == "no residual" else book.after(calls)

    def _finish(self, x: Tensor, total: Tensor) -> Tensor:
        if self.order == "pre-norm":
            x = x + total
            return x + self.rows(self.norm_rows(x))
        if self.order == "post-norm":
            x = self.norm(x + total)
            return self.norm_rows(x + self.rows(x))
        if self.order == "no residual":
            return total + self.rows(total)
        x = x + total
        return x + self.rows(x)


class Windows(Block):
    """Attention within windows, perhaps shifted, or along one axis of a grid after the other."""

    def __init__(self, rng: random.Random, size: int, kind: str) -> None:
        nn.Module.__init__(self)
        self.size, self.kind = size, kind
        self.count = rng.choice([w for w in range(2, size) if size % w == 0 and size // w > 1])
        self.shift = rng.randint(1, size - 1) if kind == "shifted windows" else 0
        self.branches = nn.ModuleList(
            draw_attention(rng, NO_MASK, windows=True) for _ in range(2 if kind == "axial" else 1)
        )
        self._rest(rng)
        self.names += [kind, *self.branches[0].names, *self.branches[-1].names]

    def cut(self, x: Tensor, along: int) -> Tensor:
        """`[B, n, ...]` to `[B times windows, w, ...]`."""
        if self.shift:
            x = torch.roll(x, -self.shift, 1)
        x = x.unflatten(1, (self.count, -1))
        return (x.transpose(1, 2) if along else x).flatten(0, 1)

    def put_back(self, x: Tensor, along: int, batch: int) -> Tensor:
        x = x.unflatten(0, (batch, -1))
        x = (x.transpose(1, 2) if along else x).flatten(1, 2)
        return torch.roll(x, self.shift, 1) if self.shift else x

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        total = torch.zeros(())
        start = x
        for along, branch in enumerate(self.branches):
            windows = self.cut(self._read(x, None)[0], along)
            total = self.put_back(branch(windows, windows), along, len(x))
            if along + 1 < len(self.branches):
                x = start = start + total
        return self._finish(start, total)

    def follow(
        self, x: Tensor, book: Book, tape: Tape, y: Tensor | None = None, other: Book | None = None
    ) -> tuple[Tensor, Book]:
        total, batch = torch.zeros(()), len(x)
        for along, branch in enumerate(self.branches):
            windows = self.cut(self._read(x, None)[0], along)
            inside = book
            if book.tokens is not None:
                tokens = self.cut(book.tokens, along)
                owners = book.examples.repeat_interleave(len(tokens) // batch)
                inside = Book(tokens, owners, book.ancestors)
            out, ancestors = branch.follow(windows, inside, windows, inside, tape)
            total = self.put_back(out, along, batch)
            if along + 1 < len(self.branches):
                x, book = x + total, book.after(ancestors)
        return self._finish(x, total), self._after(book, ancestors)


class Part(Step):
    """A block on the first tokens only, which perhaps attend to all; the others stay."""

    def __init__(self, rng: random.Random, batch: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.first = rng.randint(2, size - 1)
        self.of_all = rng.random() < 0.5
        if self.of_all:
            self.first = rng.choice([1, 1, self.first])
        self.inner = Block(rng, batch, self.first, size if self.of_all else None)
        kind = "class attention" if self.of_all else "layer on a part"
        self.names = [kind, *self.inner.names]

    def forward(self, x: Tensor) -> Tensor:
        part = x[:, : self.first]
        part = self.inner(part, x) if self.of_all else self.inner(part)
        return torch.cat([part, x[:, self.first :]], 1)

    def follow(self, x: Tensor, book: Book, tape: Tape) -> tuple[Tensor, Book]:
        tokens = None if book.tokens is None else book.tokens[:, : self.first]
        part, inner = x[:, : self.first], book.moved(tokens)
        if self.of_all:
            part, inner = self.inner.follow(part, inner, tape, x, book)
        else:
            part, inner = self.inner.follow(part, inner, tape)
        return torch.cat([part, x[:, self.first :]], 1), book.after(inner.ancestors)


class Repeated(Step):
    """One block, called several times."""

    def __init__(self, inner: Step) -> None:
        super().__init__()
        self.inner, self.size = inner, inner.size
        self.names = ["shared layer", *inner.names]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))

    def follow(self, x: Tensor, book: Book, tape: Tape) -> tuple[Tensor, Book]:
        return self.inner.follow(*self.inner.follow(x, book, tape), tape)


class Skip(Step):
    """A skip connection round a block: both are joined as features, then mixed."""

    def __init__(self, inner: Step) -> None:
        super().__init__()
        self.inner, self.size = inner, inner.size
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        self.names = ["skip by cat", *inner.names]

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([x, self.inner(x)], -1))

    def follow(self, x: Tensor, book: Book, tape: Tape) -> tuple[Tensor, Book]:
        y, after = self.inner.follow(x, book, tape)
        return self.mix(torch.cat([x, y], -1)), book.after(after.ancestors)


# -- tokens move, go and come -----------------------------------------------------------------


class Move(Step):
    """Tokens change places, or some go; `KINDS` without an index keep their order in the name."""

    KINDS = (
        "flip", "roll", "index", "index_select", "gather", "sorted by a score", "slice", "stride",
        "top-k", "take_along_dim", "split and swapped", "constant permutation matrix",
    )  # fmt: skip

    def __init__(self, rng: random.Random, batch: int, size: int) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        if self.kind == "stride" and size < 5:  # attention wants some tokens
            self.kind = "flip"
        self.names = [f"move: {self.kind}"]
        self.hazard = self.kind == "constant permutation matrix"
        self.kept = size
        if self.kind in {"slice", "top-k"}:
            self.kept = rng.randint(min(4, size), size)
        self.size = (size + 1) // 2 if self.kind == "stride" else self.kept
        self.shift = rng.randint(1, size - 1)
        self.order = torch.tensor(rng.sample(range(size), size))
        self.orders = torch.stack(
            [torch.tensor(rng.sample(range(size), size)) for _ in range(batch)]
        )
        self.score = nn.Linear(WIDTH, 1)

    def index(self, x: Tensor) -> Tensor | None:
        """`[B, m]` places, for the kinds that have them."""
        if self.kind in {"gather", "take_along_dim"}:
            return self.orders
        if self.kind == "sorted by a score":
            return self.score(x)[..., 0].argsort(-1)
        if self.kind == "top-k":
            return self.score(x)[..., 0].topk(self.kept, -1).indices
        return None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "constant permutation matrix":
            return torch.eye(x.shape[1], dtype=x.dtype)[self.order] @ x
        return self.move(x, self.index(x))

    def move(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Any `[B, n, ...]`: features or token numbers."""
        if index is not None:
            if self.kind == "take_along_dim" and x.ndim == 3:
                return torch.take_along_dim(x, index[..., None], 1)
            if x.ndim == 3:
                return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
            return x.gather(1, index)
        moves: dict[str, Callable[[], Tensor]] = {
            "flip": lambda: x.flip(1),
            "roll": lambda: x.roll(self.shift, 1),
            "index": lambda: x[:, self.order],
            "constant permutation matrix": lambda: x[:, self.order],
            "index_select": lambda: x.index_select(1, self.order),
            "slice": lambda: x[:, x.shape[1] - self.kept :],
            "stride": lambda: x[:, ::2],
            "split and swapped": lambda: torch.cat([x[:, self.shift :], x[:, : self.shift]], 1),
        }
        return moves[self.kind]()

    def follow(self, x: Tensor, book: Book, tape: Tape) -> tuple[Tensor, Book]:
        index = self.index(x)
        tokens = None if book.tokens is None else self.move(book.tokens, index)
        return self.move(x, index), book.moved(tokens)


class Added(Step):
    """Parameters become tokens: a class token in front, registers behind."""

    def __init__(self, rng: random.Random, size: int) -> None:
        super().__init__()
        self.count = rng.choice([1, 1, 2])
        self.front = rng.random() < 0.7
        self.size = size + self.count
        self.tokens = nn.Parameter(torch.zeros(1, self.count, WIDTH))
        self.how = rng.choice(["expand", "repeat", "broadcast"])
        self.names = [f"added tokens: {'front' if self.front else 'behind'}, {self.how}"]

    def join(self, x: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new, x] if self.front else [x, new], 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "expand":
            new = self.tokens.expand(len(x), -1, -1)
        elif self.how == "repeat":
            new = self.tokens.repeat(len(x), 1, 1)
        else:
            new = self.tokens + x.new_zeros(len(x), 1, 1)
        return self.join(x, new)

    def follow(self, x: Tensor, book: Book, tape: Tape) -> tuple[Tensor, Book]:
        new = tape.parameters(self.count).tokens
        tokens = None if book.tokens is None else self.join(book.tokens, new)
        return self(x), book.moved(tokens)


# -- positions that are no tokens any more ----------------------------------------------------


class Mixing(Step):
    """What mixes positions without attention: refused wherever attention reads it afterwards."""

    KINDS = (
        "cumsum",
        "sort",
        "fft",
        "constant matrix",
        "lstm",
        "gru",
        "linear over tokens",
        "cumprod",
    )
    hazard = True

    def __init__(self, rng: random.Random, size: int) -> None:
        super().__init__()
        self.size = size
        self.kind = rng.choice(self.KINDS)
        self.residual = rng.random() < 0.5
        self.names = [f"mixing: {self.kind}" + " in a residual" * self.residual]
        self.inner = nn.Linear(size, size)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        rows = [[rng.gauss(0, 1) for _ in range(size)] for _ in range(size)]
        self.matrix = torch.tensor(rows, dtype=torch.float64)

    def mixed(self, x: Tensor) -> Tensor:
        mixes: dict[str, Callable[[], Tensor]] = {
            "cumsum": lambda: x.cumsum(1),
            "cumprod": lambda: torch.tanh(x).cumprod(1),
            "sort": lambda: x.sort(1).values,
            "fft": lambda: torch.fft.fft(x, dim=1).real,
            "constant matrix": lambda: self.matrix @ x,
            "lstm": lambda: self.lstm(x)[0],
            "gru": lambda: self.gru(x)[0],
            "linear over tokens": lambda: self.inner(x.mT).mT,
        }
        return mixes[self.kind]()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixed(x) if self.residual else self.mixed(x)

    def follow(self, x: Tensor, book: Book, tape: Tape) -> tuple[Tensor, Book]:
        return self(x), book.moved(None)


# -- drawing ----------------------------------------------------------------------------------


def _divides(size: int) -> bool:
    return any(size % w == 0 and size // w > 1 for w in range(2, size))


def draw_layer(rng: random.Random, batch: int, size: int) -> Step:
    """A step that has attention in it."""
    kind = rng.choices(
        ["block", "windows", "shifted windows", "axial", "part", "repeated", "skip"],
        [50, 8, 8, 8, 10, 8, 8],
    )[0]
    if kind in {"windows", "shifted windows", "axial"} and _divides(size):
        return Windows(rng, size, kind)
    if kind == "part":
        return Part(rng, batch, size)
    if kind == "repeated":
        return Repeated(Block(rng, batch, size))
    if kind == "skip":
        return Skip(Block(rng, batch, size))
    return Block(rng, batch, size)


def draw_between(rng: random.Random, batch: int, size: int, *, mixing: bool) -> Step:
    """A step without attention."""
    if mixing:
        return Mixing(rng, size)
    kind = rng.choices(["move", "added", "gate", "neighbours"], [60, 20, 12, 8])[0]
    if kind == "move":
        return Move(rng, batch, size)
    if kind == "added":
        return Added(rng, size)
    return Gate(size) if kind == "gate" else Neighbours(size)
