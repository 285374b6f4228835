"""Streams: groups of tokens that attend to each other, and the order in which they stand.

Built by the capture when the forward is over. Tokens join a stream when an attention call reads
them together (CLS and patches, prompt and text), so two towers stay two streams and a class token
that is added half-way belongs to the stream of its patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

import torch
from torch import Tensor

from captum_generic_attn.tokens.spaces import TokenSpaces


@dataclass(frozen=True, eq=False)
class TokenStream:
    """One stream: its name, its tokens in order, and where each of its spaces went.

    `places` maps the index of a space to `[size]` positions in the stream; `parts` maps part names
    (inputs, parameters) to slices of the stream.
    """

    name: str
    size: int
    places: dict[int, Tensor]
    parts: dict[str, slice]


class TokenStreams:
    """All streams of one forward pass."""

    def __init__(self, spaces: TokenSpaces) -> None:
        self._spaces = spaces
        self._parent: dict[int, int] = {}
        self._streams: dict[int, TokenStream] = {}

    def _root(self, space: int) -> int:
        while self._parent.setdefault(space, space) != space:
            space = self._parent[space]
        return space

    def join(self, ids: Tensor) -> None:
        """Make one stream of all tokens among `ids`."""
        indices = self._spaces.indices(ids)
        for other in indices[1:]:
            self._parent[self._root(other)] = self._root(indices[0])

    def roots(self, ids: Tensor) -> set[int]:
        """The streams that tokens belong to so far; new tokens are a stream of their own."""
        return {self._root(i) for i in self._spaces.indices(ids)}

    def close(self, sequences: Sequence[tuple[str, Tensor]]) -> None:
        """Fix the streams, given the module and the `[rows, N]` ids of what each call reads.

        The longest sequence gives the order of a stream's tokens. If it does not hold them all
        (windows), they stand space by space, in the order in which they were born.
        """
        longest: dict[int, Tensor] = {}
        modules: dict[int, list[str]] = {}
        for module, ids in sequences:
            if indices := self._spaces.indices(ids):
                root = self._root(indices[0])
                row = ids[0][ids[0] >= 0]
                if len(row) > len(longest.get(root, ())):
                    longest[root] = row
                modules.setdefault(root, []).append(module)
        names: list[str] = []
        for root, row in longest.items():
            members = [i for i in list(self._parent) if self._root(i) == root]
            order = self._order(row, members)
            name = self._name(order)
            if name in names and (place := _common_owner(modules[root])):
                name = f"{name}@{place}"
            names.append(_unique(name, names))
            self._streams[root] = self._lay_out(names[-1], order)

    def _order(self, row: Tensor, members: list[int]) -> list[tuple[int, int]]:
        index, _, local = self._spaces.locate(row)
        order = list(dict.fromkeys(zip(index.tolist(), local.tolist(), strict=True)))
        ranked = sorted(members, key=[*dict.fromkeys(o[0] for o in order), *members].index)
        every = [(i, n) for i in ranked for n in range(self._spaces[i].size)]
        return order if len(order) == len(every) else every

    def _name(self, order: list[tuple[int, int]]) -> str:
        members = [self._spaces[i] for i in dict.fromkeys(o[0] for o in order)]
        named = [s for s in members if s.examples] or members[:1]
        return "+".join(dict.fromkeys(s.name for s in named))

    def _lay_out(self, name: str, order: list[tuple[int, int]]) -> TokenStream:
        places = {i: torch.full((self._spaces[i].size,), -1) for i, _ in order}
        for place, (space, number) in enumerate(order):
            places[space][number] = place
        parts: dict[str, slice] = {}
        start = 0
        for space, run in groupby(o[0] for o in order):
            stop = start + len(list(run))
            parts[_unique(self._spaces[space].name, parts)] = slice(start, stop)
            start = stop
        return TokenStream(name, len(order), places, parts)

    def __iter__(self) -> Iterator[TokenStream]:
        return iter(self._streams.values())

    def of(self, ids: Tensor) -> TokenStream:
        """The stream that holds these tokens."""
        return self._streams[self._root(self._spaces.indices(ids)[0])]

    def positions(self, ids: Tensor) -> Tensor:
        """Position in its stream of each id; -1 for no token."""
        index, _, local = self._spaces.locate(ids)
        positions = torch.full(ids.shape, -1)
        for i in self._spaces.indices(ids):
            table = self._streams[self._root(i)].places[i]
            positions = torch.where(index == i, table[local.clamp(0, len(table) - 1)], positions)
        return positions


def _unique(name: str, taken: Sequence[str] | dict[str, slice]) -> str:
    if name not in taken:
        return name
    return next(n for k in range(2, len(taken) + 3) if (n := f"{name}#{k}") not in taken)


def _common_owner(modules: list[str]) -> str:
    """`model.decoder` for calls in `model.decoder.layers.0.self_attn`, `….layers.1.self_attn`."""
    owners = []
    for module in modules:
        path = list(takewhile(lambda part: not part.isdigit(), module.split(".")))
        owners.append(path[:-1] if len(path) < len(module.split(".")) else path)
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*owners, strict=False))
    return ".".join(level[0] for level in shared)
