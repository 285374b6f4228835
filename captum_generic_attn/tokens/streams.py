"""Token streams: groups of tokens that attend to each other, and the order of their tokens.

The capture builds them after the forward pass. Tokens of one sequence (CLS and patches, prompt and
text) are one stream, so two encoders have two streams until an operation joins their sequences.
Tokens that were merged or pooled from others belong to the stream of their parents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile

import torch
from torch import Tensor

from captum_generic_attn.tokens.spaces import TokenSpaces


@dataclass(frozen=True, eq=False)
class Merge:
    """Tokens of a stream that were merged or pooled from other tokens of it.

    `tokens` are their positions `[n]`. `parents` are the positions `[E, n, m]` of their parents,
    where -1 is none. `E` is 1 if they are the same for all examples.
    """

    tokens: Tensor
    parents: Tensor

    def shares(self, like: Tensor, first: int = 0) -> Tensor:
        """The share `[E, n, m]` of each parent in a merged token: all parents have the same.

        Parents before position `first` have a share of 0 here.
        """
        known = self.parents >= 0
        return (self.parents >= first).to(like) / known.sum(-1, keepdim=True).clamp(min=1).to(like)


@dataclass(frozen=True, eq=False)
class TokenStream:
    """One stream: its name, its tokens in order, and the positions of its token spaces.

    The first `num_base_tokens` of its `size` tokens were made of inputs or parameters. Those behind
    them were merged or pooled from tokens before, as `merges` says. `places` maps the index of a
    space to `[size]` positions in the stream; `parts` maps part names to slices of the stream.
    """

    name: str
    size: int
    num_base_tokens: int
    places: dict[int, Tensor]
    parts: dict[str, slice]
    merges: tuple[Merge, ...] = ()

    def pool(self, rows: Tensor, first: int = 0) -> Tensor:
        """Add to each merged token the mean of its parents' rows, in place.

        Args:
            rows: `[E, n, m]` rows of the last `n` tokens of the stream. The rows of all tokens
                before them are zero.
            first: the position of the first of these tokens, `size - n`.

        Returns:
            `rows`.
        """
        alive = (rows != 0).flatten(2).any(-1).any(0).cpu() if self.merges else None
        for merge in self.merges:
            assert alive is not None  # noqa: S101 - there are merges
            parents = merge.parents - first
            known = parents >= 0
            if not bool((alive[parents.clamp(min=0)] & known).any()):
                continue
            share = merge.shares(rows, first)
            tokens, parents = (merge.tokens - first).to(rows.device), parents.to(rows.device)
            examples = torch.arange(len(rows), device=rows.device)[:, None]
            for k in range(parents.shape[-1]):
                picked = rows[examples, parents[..., k].clamp(min=0).expand(len(rows), -1)]
                rows[:, tokens] += picked * share[..., k, None]
            alive[tokens.cpu()] = True
        return rows

    def unpool(self, rows: Tensor) -> Tensor:
        """Add to each token its share of the merged tokens' weights: the transpose of `pool`.

        Args:
            rows: `[B, k, size]` weights of the tokens of the stream.

        Returns:
            `[B, k, size]`; `rows` itself if the stream has no merged tokens.
        """
        if not self.merges:
            return rows
        rows = rows.mT.clone()
        examples = torch.arange(len(rows), device=rows.device)[:, None]
        for merge in reversed(self.merges):
            share = merge.shares(rows)
            given = rows[:, merge.tokens.to(rows.device)]
            parents = merge.parents.clamp(min=0).to(rows.device)
            for k in range(parents.shape[-1]):
                places = parents[..., k].expand(len(rows), -1)
                rows.index_put_((examples, places), given * share[..., k, None], accumulate=True)
        return rows.mT

    def initial_relevance(self, like: Tensor) -> Tensor:
        """What each token was made of before any attention.

        Returns:
            `[E, size, num_base_tokens]`, whose rows sum to 1: the identity, and for merged tokens
            equal shares of their parents. `E` is 1 if it is the same for all examples.
        """
        examples = max((len(merge.parents) for merge in self.merges), default=1)
        rows = torch.zeros(
            examples, self.size, self.num_base_tokens, dtype=like.dtype, device=like.device
        )
        rows.diagonal(dim1=1, dim2=2).fill_(1)
        return self.pool(rows)


@dataclass(frozen=True)
class StreamPair:
    """The query stream and the key streams of a call, as sets of token spaces at that time.

    In self-attention, the only key stream is the query stream.
    """

    queries: frozenset[int]
    keys: tuple[frozenset[int], ...]

    @property
    def is_cross_attention(self) -> bool:
        """Whether queries attend to keys of other streams."""
        return self.queries not in self.keys


UNRESOLVED = StreamPair(frozenset(), ())
"""The streams of a call before they are known."""


class TokenStreams:
    """All streams of one forward pass."""

    def __init__(self, spaces: TokenSpaces) -> None:
        self._spaces = spaces
        self._parent: dict[int, int] = {}
        self._merged: list[int] = []
        self._streams: dict[int, TokenStream] = {}

    def _root(self, space: int) -> int:
        """The space that stands for all spaces that were joined with this one (union-find)."""
        while self._parent.setdefault(space, space) != space:
            space = self._parent[space]
        return space

    def _join(self, indices: Sequence[int]) -> None:
        """Make these spaces one stream."""
        for other in indices[1:]:
            self._parent[self._root(other)] = self._root(indices[0])

    def _component(self, space: int) -> frozenset[int]:
        """All spaces of the stream of this one."""
        root = self._root(space)
        return frozenset(i for i in list(self._parent) if self._root(i) == root)

    def trace(self, read: Sequence[Tensor]) -> None:
        """Find the merged tokens that attention calls read, and join them with their parents.

        Args:
            read: the token ids of queries and keys of all calls.
        """
        wanted = {i for ids in read for i in self._spaces.indices(ids)}
        made_of = {
            s.index: self._spaces.made_of(s.index) for s in self._spaces if s.parents is not None
        }
        alive = set(wanted)  # what attention reads, and what was merged from that
        for index, parents in made_of.items():
            if alive.intersection(parents):
                alive.add(index)
        for index in reversed(made_of):
            if index in wanted and alive.intersection(made_of[index]):
                wanted.update(made_of[index])
                self._merged.insert(0, index)
                self._join([index, *made_of[index]])

    def meet(self, queries: Tensor, keys: Tensor) -> StreamPair:
        """The streams of an attention call, whose queries are one stream from now on.

        If some keys are tokens of that stream, all keys join it (self-attention). Otherwise the
        keys stay in their own streams (cross-attention).
        """
        asking, asked = self._spaces.indices(queries), self._spaces.indices(keys)
        self._join(asking)
        own = self._root(asking[0])
        if own in map(self._root, asked):
            self._join(asked)
            component = self._component(own)
            return StreamPair(component, (component,))
        return StreamPair(
            self._component(own),
            tuple(self._component(i) for i in dict.fromkeys(map(self._root, asked))),
        )

    def close(self, sequences: Sequence[tuple[str, Tensor]]) -> None:
        """Fix the streams, given the module and the `[rows, N]` ids of what each call reads.

        The longest sequence gives the order of a stream's tokens. If it does not hold all of them
        (windows), the tokens are ordered by space, in the order in which they were created. Merged
        tokens come last.
        """
        modules: dict[int, list[str]] = {}
        readers: dict[int, list[str]] = {}
        for module, ids in sequences:
            for space in self._spaces.indices(ids):
                readers.setdefault(space, []).append(module)
                modules.setdefault(self._root(space), []).append(module)
        names: list[str] = []
        for root, row in self._longest([ids for _, ids in sequences]).items():
            members = self._component(root)
            base = [i for i in self._parent if i in members and i not in self._merged]
            order = self._order(row, base)
            name = self._name(order)
            if name in names and (place := _common_owner(modules[root])):
                name = f"{name}@{place}"
            names.append(_unique(name, names))
            merged = [i for i in self._merged if i in members]
            self._streams[root] = self._lay_out(names[-1], order, merged, readers)

    def _longest(self, sequences: Sequence[Tensor]) -> dict[int, Tensor]:
        """The longest row of base tokens of each stream, by the root of the stream."""
        longest: dict[int, Tensor] = {}
        merged = torch.tensor(self._merged, dtype=torch.long)
        for ids in {id(ids): ids for ids in sequences}.values():  # layers often share their ids
            row = ids[0][ids[0] >= 0]
            index = self._spaces.locate(row)[0]
            roots = torch.tensor([self._root(i) for i in index.tolist()])
            for root in set(roots.tolist()):
                own = row[(roots == root) & ~torch.isin(index, merged)]
                if root not in longest or len(own) > len(longest[root]):
                    longest[root] = own
        return longest

    def _order(self, row: Tensor, members: list[int]) -> list[tuple[int, int]]:
        """The tokens of a stream in order, each as its space and its number there.

        Args:
            row: ids of the longest sequence of the stream.
            members: the spaces of its base tokens.
        """
        index, _, local = self._spaces.locate(row)
        order = list(dict.fromkeys(zip(index.tolist(), local.tolist(), strict=True)))
        ranked = sorted(members, key=[*dict.fromkeys(o[0] for o in order), *members].index)
        every = [(i, n) for i in ranked for n in range(self._spaces[i].size)]
        return order if len(order) == len(every) else every

    def _name(self, order: list[tuple[int, int]]) -> str:
        """The names of a stream's inputs, or of its parameters if it has no input."""
        members = [self._spaces[i] for i in dict.fromkeys(o[0] for o in order)]
        named = [s for s in members if s.examples] or members[:1]
        return "+".join(dict.fromkeys(s.name for s in named))

    def _lay_out(
        self, name: str, order: list[tuple[int, int]], merged: list[int],
        readers: dict[int, list[str]],
    ) -> TokenStream:  # fmt: skip
        """The stream of base tokens in an order, and of spaces of merged tokens behind them."""
        num_base_tokens = len(order)
        order = order + [(i, n) for i in merged for n in range(self._spaces[i].size)]
        spaces, numbers = torch.tensor(order).unbind(1)
        places = {}
        for i in dict.fromkeys(space for space, _ in order):
            places[i] = torch.full((self._spaces[i].size,), -1)
            own = (spaces == i).nonzero().flatten()
            places[i][numbers[own]] = own
        merges = []
        for space in merged:
            parents = self._spaces[space].parents
            assert parents is not None  # noqa: S101 - merged tokens have parents
            positions = self._positions(parents, places)
            alike = bool((positions == positions[:1]).all())
            merges.append(Merge(places[space], positions[:1] if alike else positions))
        parts = self._parts(order, merged, readers)
        return TokenStream(name, len(order), num_base_tokens, places, parts, tuple(merges))

    def _parts(
        self, order: list[tuple[int, int]], merged: list[int], readers: dict[int, list[str]]
    ) -> dict[str, slice]:
        """The slice of each run of tokens of one space.

        A part of merged tokens is named after its input and the modules that read it.
        """
        parts: dict[str, slice] = {}
        start = 0
        for space, run in groupby(o[0] for o in order):
            stop = start + len(list(run))
            part = self._spaces[space].name
            if space in merged and (owner := _common_owner(readers.get(space, []))):
                part = f"{part}@{owner}"
            parts[_unique(part, parts)] = slice(start, stop)
            start = stop
        return parts

    def _positions(self, ids: Tensor, places: dict[int, Tensor]) -> Tensor:
        """The position of each id, given those of some spaces; -1 for no token of theirs."""
        index, _, local = self._spaces.locate(ids)
        positions = torch.full(ids.shape, -1)
        for i, table in places.items():
            inside = local.clamp(0, len(table) - 1)
            positions = torch.where(index == i, table[inside], positions)
        return positions

    def __iter__(self) -> Iterator[TokenStream]:
        return iter(self._streams.values())

    def of(self, ids: Tensor) -> TokenStream:
        """The stream that holds these tokens."""
        return self._streams[self._root(self._spaces.indices(ids)[0])]

    def having(self, spaces: frozenset[int]) -> TokenStream:
        """The stream that holds these spaces."""
        return self._streams[self._root(next(iter(spaces)))]

    def columns(self, spaces: frozenset[int]) -> Tensor | None:
        """Positions of those base tokens of a stream that are in `spaces`; `None` if all are."""
        stream = self.having(spaces)
        own = [i for i in stream.places if i not in self._merged]
        if spaces.issuperset(own):
            return None
        return torch.cat([stream.places[i] for i in own if i in spaces])

    def positions(self, ids: Tensor) -> Tensor:
        """The position of each id in its stream; -1 for no token."""
        return self._spaces.cache.of((ids,), "positions", lambda: self._positions_of(ids))

    def _positions_of(self, ids: Tensor) -> Tensor:
        """`positions`, computed."""
        places = {i: t for s in self._streams.values() for i, t in s.places.items()}
        return self._positions(ids, {i: places[i] for i in self._spaces.indices(ids)})


def _unique(name: str, taken: Sequence[str] | dict[str, slice]) -> str:
    """The name, with the first free number behind it if it is taken: `text#2`."""
    if name not in taken:
        return name
    return next(n for k in range(2, len(taken) + 3) if (n := f"{name}#{k}") not in taken)


def _common_owner(modules: list[str]) -> str:
    """The module that holds these, without the lists of layers.

    `model.decoder` for `model.decoder.layers.0.self_attn` and `model.decoder.layers.1.self_attn`.
    """
    owners = []
    for module in modules:
        path = list(takewhile(lambda part: not part.isdigit(), module.split(".")))
        owners.append(path[:-1] if len(path) < len(module.split(".")) else path)
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*owners, strict=False))
    return ".".join(level[0] for level in shared)
