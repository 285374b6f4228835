"""Draws a program, its inputs and its target from a seed.

The structure comes from `random.Random`, weights and inputs from a `torch.Generator`; nothing
depends on the global random state, so that a seed is the same program in every run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laws.random_programs.attention import NO_MASK, WIDTH, Form, plain_probabilities, split
from laws.random_programs.ends import (
    CLASSES,
    Embedding,
    Features,
    Ids,
    ReadOut,
    draw_embedding,
)
from laws.random_programs.steps import (
    Block,
    Gate,
    Neighbours,
    Part,
    Repeated,
    Skip,
    Step,
    Windows,
    draw_between,
    draw_layer,
)
from laws.random_programs.tape import Book, LostTokensError, Tape

LAYERS = (Block, Part, Repeated, Skip, Windows)
SPREADING = (Gate, Neighbours)
READ_ALL = ("mean", "sum", "flat", "pooling")


@dataclass(frozen=True, eq=False)
class Case:
    """A program with what to explain.

    `hazard`: a refusal is right, whether or not there is a reference. `shapes` are those of the
    maps of its inputs, without the batch.
    """

    seed: int
    program: Program
    inputs: tuple[Tensor, ...]
    target: list[tuple[int, ...]]
    features: frozenset[str]
    hazard: bool

    @property
    def captum_target(self) -> int | tuple[int, ...] | list[int]:
        """The target as `attribute` takes it."""
        one = self.target[0]
        if any(t != one for t in self.target):
            return [t[0] for t in self.target]
        return one[0] if len(one) == 1 else one

    def follow(self, tape: Tape) -> Tensor:
        return self.program.follow(self.inputs, tape)


class Program(nn.Module):
    """A model; `follow` computes the same on a tape."""

    shapes: list[tuple[int, ...]]
    names: list[str]
    hazard = False

    def inputs(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        raise NotImplementedError

    def targets(self, rng: random.Random, batch: int) -> list[tuple[int, ...]]:
        return [(rng.randrange(CLASSES),)] * batch

    def follow(self, inputs: Sequence[Tensor], tape: Tape) -> Tensor:
        raise NotImplementedError


class Stack(nn.Module):
    """Steps one after the other; the tokens after each layer are kept for a read-out."""

    def __init__(self, rng: random.Random, batch: int, size: int, depth: int) -> None:
        super().__init__()
        steps: list[Step] = []
        for layer in range(depth):
            steps.append(draw_layer(rng, batch, steps[-1].size if steps else size))
            last = layer + 1 == depth
            if rng.random() < (0.15 if last else 0.45):
                mixing = rng.random() < 0.12
                steps.append(draw_between(rng, batch, steps[-1].size, mixing=mixing))
        if rng.random() < 0.3:
            first = draw_between(rng, batch, size, mixing=rng.random() < 0.1)
            if first.size == size:
                steps.insert(0, first)
        self.steps = nn.ModuleList(steps)
        self.size = steps[-1].size
        self.sizes = [s.size for s in steps if isinstance(s, LAYERS)]
        self.sizes[-1] = self.size
        self.hazard = any(step.hazard for step in steps)

    @property
    def names(self) -> list[str]:
        return [name for step in self.steps for name in step.names]

    def drop_spreading(self, *, to_the_end: bool = False) -> None:
        """Leave out what spreads a gradient over rows between two layers, or behind the first.

        A gate of the mean, or a convolution, keeps the tokens of its places by agreement. Where one
        row is read behind it, whether its neighbours are read as well is not agreed on.
        """
        layers = [n for n, step in enumerate(self.steps) if isinstance(step, LAYERS)]
        self.steps = nn.ModuleList(
            step
            for n, step in enumerate(self.steps)
            if not (
                layers[0] < n and (to_the_end or n < layers[-1]) and isinstance(step, SPREADING)
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        states = []
        for step in self.steps:
            x = step(x)
            if isinstance(step, LAYERS):
                states.append(x)
        return [*states[:-1], x]

    def follow(self, x: Tensor, book: Book, tape: Tape) -> tuple[list[Tensor], Book]:
        states = []
        for step in self.steps:
            x, book = step.follow(x, book, tape)
            if isinstance(step, LAYERS):
                states.append(x)
        return [*states[:-1], x], book


class Encoder(Program):
    """One sequence of tokens."""

    def __init__(self, rng: random.Random, batch: int) -> None:
        super().__init__()
        self.embed = draw_embedding(rng, rng.randint(4, 8))
        self.stack = Stack(rng, batch, self.embed.size, rng.randint(1, 3))
        self.read = ReadOut(rng, self.stack.sizes)
        if self.read.kind not in READ_ALL:
            self.stack.drop_spreading()
        self.shapes, self.hazard = self.embed.shapes, self.stack.hazard
        self.names = ["program: encoder", *self.embed.names, *self.stack.names, *self.read.names]

    def inputs(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        return self.embed.inputs(batch, generator)

    def targets(self, rng: random.Random, batch: int) -> list[tuple[int, ...]]:
        return self.read.targets(rng, batch)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.read(self.stack(self.embed(*inputs)))

    def follow(self, inputs: Sequence[Tensor], tape: Tape) -> Tensor:
        states, book = self.stack.follow(*self.embed.follow(inputs, tape), tape)
        return self.read.follow(states, book, tape)


class Pair(Program):
    """What two streams have in common: each is embedded and has layers of its own."""

    def __init__(self, rng: random.Random, batch: int, *, one_input: bool = False) -> None:
        super().__init__()
        size = rng.randint(3, 6)
        self.one_input = one_input
        if one_input:  # the same ids are embedded twice, for an encoder and a decoder
            self.embeds = nn.ModuleList(_single_ids(rng, size) for _ in range(2))
        else:
            sizes = size, rng.choice([size, rng.randint(3, 6)])
            self.embeds = nn.ModuleList(draw_embedding(rng, n) for n in sizes)
        one, other = self.embeds
        self.stacks = nn.ModuleList(
            Stack(rng, batch, embed.size, rng.randint(1, 2)) for embed in self.embeds
        )
        for stack in self.stacks:
            stack.drop_spreading(to_the_end=True)
        self.shapes = one.shapes if one_input else one.shapes + other.shapes
        self.hazard = any(stack.hazard for stack in self.stacks)
        self.names = [name for part in [*self.embeds, *self.stacks] for name in part.names]
        self.names += ["one input, two streams"] if one_input else []

    def inputs(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        embeds = self.embeds[:1] if self.one_input else self.embeds
        return [x for embed in embeds for x in embed.inputs(batch, generator)]

    def _shared_out(self, inputs: Sequence[Tensor]) -> list[tuple[int, Sequence[Tensor]]]:
        if self.one_input:
            return [(0, inputs), (0, inputs)]
        count = len(self.embeds[0].shapes)
        return [(0, inputs[:count]), (count, inputs[count:])]

    def encoded(self, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        return [
            stack(embed(*given))
            for embed, stack, (_, given) in zip(
                self.embeds, self.stacks, self._shared_out(inputs), strict=True
            )
        ]

    def followed(
        self, inputs: Sequence[Tensor], tape: Tape
    ) -> tuple[list[list[Tensor]], list[Book]]:
        states, books = [], []
        for embed, stack, (first, given) in zip(
            self.embeds, self.stacks, self._shared_out(inputs), strict=True
        ):
            found, book = stack.follow(*embed.follow(given, tape, first), tape)
            states.append(found)
            books.append(book)
        return states, books


def _single_ids(rng: random.Random, size: int) -> Embedding:
    while True:
        embed = Ids(rng, size)
        if len(embed.shapes) == 1:
            return embed


class Crossing(Pair):
    """Two streams that attend to each other, in one direction or both."""

    KINDS = ("a from b", "b from a", "both at once", "one after the other")

    def __init__(self, rng: random.Random, batch: int) -> None:
        super().__init__(rng, batch, one_input=rng.random() < 0.15)
        a, b = (stack.size for stack in self.stacks)
        direction = rng.choice(["one way", "both ways"])
        kinds = ["a from b"] if direction == "one way" else self.KINDS
        self.kinds = [rng.choice(kinds) for _ in range(rng.randint(1, 2))]
        self.to_a = nn.ModuleList(Block(rng, batch, a, b) for _ in self.kinds)
        self.to_b = nn.ModuleList(Block(rng, batch, b, a) for _ in self.kinds)
        self.own = nn.ModuleList(Block(rng, batch, a) for _ in self.kinds)
        self.with_own = rng.random() < 0.5
        self.both = rng.random() < 0.4
        self.read = ReadOut(rng, [a] * len(self.kinds))
        self.head = nn.Linear(2 * WIDTH, CLASSES)
        self.at_b = rng.choice(["first", "mean"])
        self.names += ["program: crossing", *(f"cross: {kind}" for kind in self.kinds)]
        self.names += [name for block in self.to_a for name in block.names]
        self.names += [f"read: both, {self.at_b}"] if self.both else self.read.names

    def targets(self, rng: random.Random, batch: int) -> list[tuple[int, ...]]:
        return super().targets(rng, batch) if self.both else self.read.targets(rng, batch)

    def _end(self, a: Tensor, b: Tensor) -> Tensor:
        read = b[:, 0] if self.at_b == "first" else b.mean(1)
        return self.head(torch.cat([a[:, 0], read], -1))

    def forward(self, *inputs: Tensor) -> Tensor:
        (*_, a), (*_, b) = self.encoded(inputs)
        states = []
        for kind, to_a, to_b, own in zip(self.kinds, self.to_a, self.to_b, self.own, strict=True):
            if kind == "both at once":
                a, b = to_a(a, b), to_b(b, a)
            if kind in {"b from a", "one after the other"}:
                b = to_b(b, a)
            if kind in {"a from b", "one after the other"}:
                a = to_a(a, b)
            if self.with_own:
                a = own(a)
            states.append(a)
        return self._end(a, b) if self.both else self.read(states)

    def follow(self, inputs: Sequence[Tensor], tape: Tape) -> Tensor:
        ((*_, a), (*_, b)), (of_a, of_b) = self.followed(inputs, tape)
        states = []
        for kind, to_a, to_b, own in zip(self.kinds, self.to_a, self.to_b, self.own, strict=True):
            if kind == "both at once":
                (a, of_a), (b, of_b) = (
                    to_a.follow(a, of_a, tape, b, of_b), to_b.follow(b, of_b, tape, a, of_a)
                )  # fmt: skip
            if kind in {"b from a", "one after the other"}:
                b, of_b = to_b.follow(b, of_b, tape, a, of_a)
            if kind in {"a from b", "one after the other"}:
                a, of_a = to_a.follow(a, of_a, tape, b, of_b)
            if self.with_own:
                a, of_a = own.follow(a, of_a, tape)
            states.append(a)
        return self._end(a, b) if self.both else self.read.follow(states, of_a, tape)


class Queries(Program):
    """Parameters that attend to each other and to the tokens of an input, as DETR's queries do."""

    def __init__(self, rng: random.Random, batch: int) -> None:
        super().__init__()
        self.embed = draw_embedding(rng, rng.randint(4, 6))
        self.stack = Stack(rng, batch, self.embed.size, 1)
        self.count = rng.randint(2, 4)
        self.queries = nn.Parameter(torch.zeros(1, self.count, WIDTH))
        depth = rng.randint(1, 2)
        self.own = nn.ModuleList(Block(rng, batch, self.count) for _ in range(depth))
        self.cross = nn.ModuleList(
            Block(rng, batch, self.count, self.stack.size) for _ in range(depth)
        )
        self.with_own = rng.random() < 0.7
        self.read = ReadOut(rng, [self.count] * depth)
        self.shapes, self.hazard = self.embed.shapes, self.stack.hazard
        self.names = ["program: queries", *self.embed.names, *self.stack.names, *self.read.names]
        self.names += [name for block in self.cross for name in block.names]

    def inputs(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        return self.embed.inputs(batch, generator)

    def targets(self, rng: random.Random, batch: int) -> list[tuple[int, ...]]:
        return self.read.targets(rng, batch)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = self.stack(self.embed(*inputs))[-1]
        z, states = self.queries.expand(len(x), -1, -1), []
        for own, cross in zip(self.own, self.cross, strict=True):
            if self.with_own:
                z = own(z)
            z = cross(z, x)
            states.append(z)
        return self.read(states)

    def follow(self, inputs: Sequence[Tensor], tape: Tape) -> Tensor:
        (*_, x), of_x = self.stack.follow(*self.embed.follow(inputs, tape), tape)
        z, of_z, states = self.queries.expand(len(x), -1, -1), tape.parameters(self.count), []
        for own, cross in zip(self.own, self.cross, strict=True):
            if self.with_own:
                z, of_z = own.follow(z, of_z, tape)
            z, of_z = cross.follow(z, of_z, tape, x, of_x)
            states.append(z)
        return self.read.follow(states, of_z, tape)


class Towers(Pair):
    """Two towers whose outputs are compared, each example with its own pair or with all."""

    KINDS = ("product", "cosine", "product", "all pairs")

    def __init__(self, rng: random.Random, batch: int) -> None:
        super().__init__(rng, batch)
        self.kind = rng.choice(self.KINDS)
        self.mean = rng.random() < 0.4
        self.project = nn.Linear(WIDTH, WIDTH)
        self.names += [
            "program: towers",
            f"towers: {self.kind}, {'mean' if self.mean else 'first'}",
        ]
        self.others = self.kind == "all pairs" and batch > 1
        self.hazard |= self.others

    def targets(self, rng: random.Random, batch: int) -> list[tuple[int, ...]]:
        return [(rng.randrange(batch) if self.kind == "all pairs" else 0,)] * batch

    def _end(self, states: Sequence[Sequence[Tensor]]) -> Tensor:
        u, v = (s[-1].mean(1) if self.mean else s[-1][:, 0] for s in states)
        u = self.project(u)
        if self.kind == "cosine":
            u, v = u / u.norm(dim=-1, keepdim=True), v / v.norm(dim=-1, keepdim=True)
        return u @ v.T if self.kind == "all pairs" else (u * v).sum(-1, keepdim=True)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._end(self.encoded(inputs))

    def follow(self, inputs: Sequence[Tensor], tape: Tape) -> Tensor:
        output = self._end(self.followed(inputs, tape)[0])
        if self.others:
            raise LostTokensError
        return output


class ForeignValues(Program):
    """Values that belong to other tokens than the keys at their places."""

    KINDS = ("other input", "flipped", "rolled")
    hazard = True

    def __init__(self, rng: random.Random, batch: int) -> None:
        super().__init__()
        self.kind = rng.choice(self.KINDS)
        size = rng.randint(4, 6)
        count = 2 if self.kind == "other input" else 1
        self.embeds = nn.ModuleList(Features(rng, size) for _ in range(count))
        self.shapes = [(size,)] * count
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.names = ["program: foreign values", f"values: {self.kind}"]

    def inputs(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        return [x for embed in self.embeds for x in embed.inputs(batch, generator)]

    def forward(self, *inputs: Tensor) -> Tensor:
        x, y = self.embeds[0](inputs[0]), self.embeds[-1](inputs[-1])
        if self.kind == "flipped":
            y = y.flip(1)
        elif self.kind == "rolled":
            y = y.roll(1, 1)
        q, k, v = (split(t, 2) for t in (self.query(x), self.key(x), self.value(y)))
        P = plain_probabilities(Form("dot", "", "", "", ""), q, k, NO_MASK, 0.5, torch.zeros(()))
        return self.head(x[:, 0] + (P @ v).transpose(1, 2).flatten(2)[:, 0])

    def follow(self, inputs: Sequence[Tensor], tape: Tape) -> Tensor:
        raise LostTokensError


PROGRAMS: dict[type[Program], int] = {
    Encoder: 62, Crossing: 17, Queries: 10, Towers: 8, ForeignValues: 3,
}  # fmt: skip


def draw(seed: int, kind: type[Program] | None = None) -> Case:
    """The program of a seed, in evaluation mode; of one kind, if that is given."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = rng.randint(1, 3)
    with torch.random.fork_rng(devices=[]):  # modules are born with weights of the global state
        drawn = rng.choices(list(PROGRAMS), list(PROGRAMS.values()))[0]
        program = (kind or drawn)(rng, batch).double().eval()
    if any(name in program.names for name in TWICE):
        keep_residuals(program)
    randomise(program, generator)
    inputs = tuple(program.inputs(batch, generator))
    target = program.targets(rng, batch)
    names = frozenset([*program.names, f"batch: {batch}"])
    return Case(seed, program, inputs, target, names, program.hazard)


TWICE = ("read: two layers", "read: layers side by side")


def keep_residuals(program: Program) -> None:
    """Give every block its residual: without one, a token that is read twice has two states."""
    for module in program.modules():
        if isinstance(module, Block) and module.order == "no residual":
            module.order = "no norm"
    program.names = [name for name in program.names if name != "block: no residual"]


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Weights that matter: no map is zero, and no attention is the same for all keys."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                noise = 1 + 0.2 * noise
            elif parameter.ndim == 1 and not name.endswith("bias"):
                pass  # the weights of additive logits
            elif parameter.ndim == 1:
                noise *= 0.2
            elif name.endswith(("position", "tokens", "queries", "query")) and parameter.ndim < 4:
                noise *= 0.7
            else:
                noise *= 1.3 / math.sqrt(parameter[0].numel())
            parameter.copy_(noise)
