"""Attention calls as the rules see them: tokens as positions in their streams.

`explanation` makes a `MappedCall` of each record; `additions` and `pullback` go through them. A
`Layout` moves values between the positions of a stream and the queries or keys of a call.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.relevance.attention_maps import AttentionMap
from captum_generic_attn.tokens import TokenStream
from captum_generic_attn.tokens.memory import Memory

Own = Literal["zero", "keep"]
"""What the token of an example's only explained row gets: 0, or its value."""
OwnEntry = Literal[Own, "row_min"]
"""The same, or the least value of its row, which `TransformerAttribution` alone knows."""


@dataclass(frozen=True, eq=False)
class Source:
    """What a call reads of one stream: `keys` `[G, Nk]` are positions in it, -1 elsewhere.

    `columns` are those of the stream's tokens that made it up when the call ran; `None`: all.
    """

    stream: str
    keys: Tensor
    columns: Tensor | None = None


@dataclass(frozen=True, eq=False)
class MappedCall:
    """An attention call of `G` groups, the examples or their windows; `examples` `[G]` says whose.

    `queries` `[G, Nq]` are positions in the stream `stream`, whose tokens `columns` (`None`: all)
    made it up when the call ran. `query_ancestors` and `key_ancestors` are the calls that queries
    and keys depend on.
    """

    index: int
    stream: str
    examples: Tensor
    queries: Tensor
    sources: tuple[Source, ...]
    crosses: bool
    query_ancestors: frozenset[int]
    key_ancestors: frozenset[int]
    columns: Tensor | None = None


@dataclass(frozen=True)
class Switches:
    """The paper's switches, and the pairs of streams (queries, keys) that attend across.

    `row_normalize` is rollout's: after each call the rows of its queries are scaled to the sum that
    they had before it. `own` says what the token of an only explained row gets.
    """

    normalize: bool = True
    self_in_cross: bool = True
    aggregate: bool = True
    crossings: frozenset[tuple[str, str]] = frozenset()
    row_normalize: bool = False
    own: OwnEntry = "zero"

    def mutual(self, one: str, other: str) -> bool:
        """Whether two streams attend to each other."""
        return {(one, other), (other, one)} <= self.crossings

    def known_to(self, stream: str) -> frozenset[str]:
        """The streams that a stream may learn of, itself included."""
        known = {stream}
        while more := {key for query, key in self.crossings if query in known} - known:
            known |= more
        return frozenset(known)


class Reading(NamedTuple):
    """`weights` `[B, size]` of rows of a stream, which are read in the state after `ancestors`."""

    weights: Tensor
    ancestors: frozenset[int]


def total_weights(readings: Sequence[Reading]) -> Tensor:
    """`[B, size]` weights of the rows of a stream, in whatever state they are read."""
    return functools.reduce(torch.add, (reading.weights for reading in readings))


class Sum(ABC):
    """What takes the maps of calls as the backward pass brings them, and makes values of them."""

    @abstractmethod
    def read(self, stream: str, readings: Sequence[Reading]) -> None:
        """Ask for all the rows of a stream that are explained, each in its state."""

    @abstractmethod
    def arrive(self, index: int, attention_map: AttentionMap) -> None:
        """Take the map of a call, as the backward pass comes to it."""

    @abstractmethod
    def finish(self) -> dict[str, Tensor]:
        """`[B, roots]` values of the tokens of each stream, when the backward pass is over."""


class Collected(Sum):
    """A sum that keeps all maps till the backward pass is over: it has matrices too."""

    def __init__(self) -> None:
        self._maps: dict[int, AttentionMap] = {}
        self._readings: dict[str, Sequence[Reading]] = {}

    def read(self, stream: str, readings: Sequence[Reading]) -> None:  # noqa: D102 - as in the base class
        self._readings[stream] = readings

    def arrive(self, index: int, attention_map: AttentionMap) -> None:  # noqa: D102
        self._maps[index] = attention_map.kept()

    @abstractmethod
    def matrices(self, states: Mapping[str, frozenset[int]]) -> dict[tuple[str, str], Tensor]:
        """Between the pairs of streams that met, `[B, size, roots]`, in these states."""


class Layout:
    """The streams of a forward pass, and where the tokens of its calls stand in them.

    Positions live on the CPU. What is asked of the same positions again, as by the layers of a
    model, is answered from memory.
    """

    def __init__(self, streams: Iterable[TokenStream], examples: int, like: Tensor) -> None:
        self.streams: Mapping[str, TokenStream] = {stream.name: stream for stream in streams}
        self.examples = examples
        self.like = like
        self._memory = Memory()
        self._starts: dict[str, Tensor] = {}

    def start(self, stream: str) -> Tensor:
        """`[E, size, roots]`, where the tokens of a stream started; `E` is 1 or the batch."""
        if stream not in self._starts:
            self._starts[stream] = self.streams[stream].start(self.like)
        return self._starts[stream]

    def in_order(self, examples: Tensor, positions: Tensor, stream: str) -> bool:
        """Whether the groups of a call are the examples, each with all tokens in their order."""
        size = self.streams[stream].size
        return self._memory.of(
            (examples, positions),
            size,
            lambda: (
                positions.shape == (self.examples, size)
                and torch.equal(examples, torch.arange(self.examples))
                and bool((positions == torch.arange(size)).all())
            ),
        )

    def gather(self, rows: Tensor, examples: Tensor, positions: Tensor, stream: str) -> Tensor:
        """Values `[B, k, size]` of a stream at positions `[G, n]`: `[G, k, n]`, 0 for padding."""
        if self.in_order(examples, positions, stream):
            return rows
        places, known = positions.clamp(min=0).to(rows.device), (positions >= 0).to(rows.device)
        owners = examples.to(rows.device)
        index = places.unsqueeze(1).expand(-1, rows.shape[1], -1)
        return rows[owners].gather(2, index) * known.unsqueeze(1)

    def scatter(self, rows: Tensor, examples: Tensor, positions: Tensor, stream: str) -> Tensor:
        """The transpose of `gather`: `[G, k, n]` to `[B, k, size]`, what meets is added."""
        if self.in_order(examples, positions, stream):
            return rows
        size = self.streams[stream].size
        total = rows.new_zeros(self.examples, size + 1, rows.shape[1])  # the last takes the padding
        owners = examples.to(rows.device)[:, None].expand_as(positions)
        places = torch.where(positions < 0, size, positions).to(rows.device)
        total.index_put_((owners, places), rows.mT, accumulate=True)
        return total[:, :-1].mT

    def touched(self, call: MappedCall) -> Tensor:
        """`[B, size]` True for the tokens whose rows a call writes."""
        stream = self.streams[call.stream]
        rows = self.like.new_ones(*call.queries.shape).unsqueeze(1)
        rows = self.scatter(rows, call.examples, call.queries, call.stream)
        touched = stream.hand_on(rows.mT.clone()).squeeze(-1) > 0
        if call.crosses:
            touched[:, self.columns_or_all(call.columns, stream)] = True
        return touched

    def columns_or_all(self, columns: Tensor | None, stream: TokenStream) -> Tensor:
        """Positions of the tokens that made a stream up, all of its roots for `None`."""
        if columns is None:
            return torch.arange(stream.roots, device=self.like.device)
        return columns.to(self.like.device)
