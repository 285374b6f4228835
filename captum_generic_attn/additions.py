"""The sum over ancestors: equations 6 to 11 over the attention calls of one forward pass.

A residual stream is a sum, and each rule has the form `R += addition`. So each call gets the
additions that it makes, and the relevance of a state is where its tokens started plus the additions
of the calls that the state depends on: parallel branches read the same old state by themselves.

`explanation` fills `Additions` and reads the answer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_generic_attn.rules import (
    cross_attention_update,
    normalize_relevance,
    self_attention_update,
)
from captum_generic_attn.tokens import TokenStream


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
    """An attention call as the rules see it.

    `map` is Ā of eq. 5, `[G, Nq, Nk]`, of `G` groups (the examples, or their windows); `examples`
    `[G]` says whose. `queries` `[G, Nq]` are positions in the stream `stream`, whose tokens
    `columns` (`None`: all) made it up when the call ran.
    """

    index: int
    stream: str
    map: Tensor
    examples: Tensor
    queries: Tensor
    sources: tuple[Source, ...]
    crosses: bool
    query_ancestors: frozenset[int]
    key_ancestors: frozenset[int]
    columns: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """What a call adds: `[B, n, columns]` rows of its stream from position `first` to the end."""

    first: int
    rows: Tensor


@dataclass(frozen=True)
class Switches:
    """The paper's switches, and the pairs of streams (queries, keys) that attend across."""

    normalize: bool = True
    self_in_cross: bool = True
    aggregate: bool = True
    crossings: frozenset[tuple[str, str]] = frozenset()

    def mutual(self, one: str, other: str) -> bool:
        """Whether two streams attend to each other."""
        return {(one, other), (other, one)} <= self.crossings


class Additions:
    """What each attention call adds to the relevance of its stream.

    Relevance is kept without its identity (`R − I`), so nothing cancels and a zero row is exact;
    with `aggregate=False` (the authors' ablation, each `+=` an `=`) it is `R` of the latest call.
    One sum for each pair of streams runs on from state to state; a state that another branch of
    the model left behind is summed anew.
    """

    def __init__(
        self, streams: Iterable[TokenStream], examples: int, like: Tensor, switches: Switches
    ) -> None:
        self._streams = {stream.name: stream for stream in streams}
        self._starts: dict[str, Tensor] = {}
        self._examples = examples
        self._like = like
        self._switches = switches
        self._added: dict[int, dict[str, Block]] = {}
        self._touched: dict[int, Tensor] = {}
        self._stream_of: dict[int, str] = {}
        self._sums: dict[tuple[str, str], tuple[frozenset[int], Tensor]] = {}

    def add(self, call: MappedCall) -> None:
        """Eq. 6, 7, 10 and 11: what a call adds to the relevance of its queries' stream."""
        added: dict[str, Tensor] = {}
        for source in call.sources:
            for to in self._known(call, source):
                if call.crosses and to == source.stream:
                    update = self._crossing(call, source)
                else:
                    update = self._carried(call, source, to)
                added[to] = added[to] + update if to in added else update
        stream = self._streams[call.stream]
        first = self._first(call)
        self._added[call.index] = {
            to: Block(first, stream.hand_on(rows, first)) for to, rows in added.items()
        }
        self._stream_of[call.index] = call.stream
        if not self._switches.aggregate:
            self._touched[call.index] = self._rows_touched(call)

    def _known(self, call: MappedCall, source: Source) -> list[str]:
        """The streams to which a call adds: the keys', and all that these know of."""
        own = self._records(source.stream, call.key_ancestors)
        found = {to for i in own for to in self._added[i]}
        switches = self._switches
        if call.crosses and not switches.aggregate:
            mutual = switches.mutual(call.stream, source.stream)
            found = {to for to in found if mutual} | ({call.stream} if mutual else set())
        return [to for to in self._streams if to in found or to == source.stream]

    def _carried(self, call: MappedCall, source: Source, to: str) -> Tensor:
        """`Ā R^{q,to}`: eq. 6, 7 and 11."""
        parts = self._parts(source.stream, call.key_ancestors, to)
        if not parts:
            size = self._streams[call.stream].size - self._first(call)
            return self._like.new_zeros(self._examples, size, self._streams[to].roots)
        if self._whole(call, source):
            return self_attention_update(call.map, functools.reduce(torch.add, parts))
        device = self._like.device
        owner, keys = call.examples.to(device)[:, None], source.keys.to(device)
        read = [part.expand(self._examples, -1, -1)[owner, keys.clamp(min=0)] for part in parts]
        weights = call.map * (keys >= 0).unsqueeze(-2)
        return self._rows(call, self_attention_update(weights, functools.reduce(torch.add, read)))

    def _crossing(self, call: MappedCall, source: Source) -> Tensor:
        """Eq. 10 for the tokens of the keys' stream."""
        key_stream, query_stream = self._streams[source.stream], self._streams[call.stream]
        dense = self._dense(call, source)
        columns = self._all_or(source.columns, key_stream)
        own = None
        if self._switches.self_in_cross:
            own, tokens = self._of_queries(call)
            keys = self._barred(source.stream, call.key_ancestors, columns)
        else:
            tokens = torch.arange(query_stream.size, device=dense.device)
            keys = self._start(source.stream)[:, :, columns]
        if source.columns is None:
            update = self._zeros(call.stream, source.stream)
        else:  # what joined the keys' stream later is a third stream
            update = self._carried(call, source, source.stream)
        update[:, tokens[:, None], columns] = cross_attention_update(dense[:, tokens], own, keys)
        return update

    def _of_queries(self, call: MappedCall) -> tuple[Tensor | None, Tensor]:
        """`R̄^{ss} − I` (`R^{ss} − I` unless normalised) over tokens of s, and which those are.

        They are all tokens of the stream; or, where merged tokens ask, those that ask, each with
        the relevance of all that it was merged from.
        """
        stream = self._streams[call.stream]
        columns = self._all_or(call.columns, stream)
        asking = torch.unique(call.queries[call.queries >= 0]).to(self._like.device)
        merged = bool((asking >= stream.roots).any())
        tokens = asking if merged else columns
        learnt = self.learnt(call.stream, call.query_ancestors, call.stream)
        if learnt is None:
            return None, tokens
        own = learnt[:, tokens[:, None], columns]
        if merged:
            shares = self._start(call.stream)[:, tokens[:, None], columns]
            shares = shares / shares.sum(-2, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
            own = own @ shares.mT
        return (normalize_relevance(own) if self._normalizes else own), tokens

    def _barred(self, stream: str, ancestors: frozenset[int], columns: Tensor) -> Tensor:
        """`R̄^{qq}` (`R^{qq}` unless normalised) of all tokens of a stream, identity included."""
        start = self._start(stream)[:, :, columns]
        learnt = self.learnt(stream, ancestors, stream)
        if learnt is None:
            return start
        learnt = learnt[:, :, columns]
        return start + (normalize_relevance(learnt) if self._normalizes else learnt)

    @property
    def _normalizes(self) -> bool:
        return self._switches.normalize and self._switches.aggregate

    # -- states -------------------------------------------------------------------------------

    def learnt(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """`R − I` of a state: what attention added to where its tokens started.

        Args:
            stream: the stream whose tokens are the rows.
            ancestors: the calls that the state depends on.
            to: the stream whose tokens are the columns.

        Returns:
            `[B, size, roots]`, or `None` for zero.
        """
        if not self._switches.aggregate:
            relevance = self._latest(stream, ancestors, to)
            if relevance is None or stream != to:
                return relevance
            return relevance - self._start(stream)
        own = frozenset(i for i in self._records(stream, ancestors) if to in self._added[i])
        if not own:
            return None
        known, total = self._sums.get((stream, to), (frozenset[int](), None))
        if total is None or not known <= own:
            known, total = frozenset[int](), self._zeros(stream, to)
        for i in sorted(own - known):
            block = self._added[i][to]
            total[:, block.first :] += block.rows
        self._sums[stream, to] = own, total
        return total

    def relevance(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """R of the paper, `[B, size, roots]`, identity included; `None` for zero."""
        parts = self._parts(stream, ancestors, to)
        if len(parts) < 2:
            return parts[0].clone() if parts else None
        return functools.reduce(torch.add, parts)

    def _parts(self, stream: str, ancestors: frozenset[int], to: str) -> list[Tensor]:
        """The summands of R: what was learnt, and where the tokens started."""
        gain = self.gain(stream, ancestors, to)
        parts = [] if gain is None else [gain]
        if stream == to and (self._switches.aggregate or gain is None):
            parts.append(self._start(stream))
        return parts

    def gain(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """What values are read from: `R − I`, or without aggregation `R` as it is."""
        if self._switches.aggregate:
            return self.learnt(stream, ancestors, to)
        return self._latest(stream, ancestors, to)

    def _latest(self, stream: str, ancestors: frozenset[int], to: str) -> Tensor | None:
        """R without aggregation: each row from the last call that wrote to it."""
        own = [i for i in sorted(self._records(stream, ancestors)) if to in self._added[i]]
        if not own:
            return None
        rows = self._zeros(stream, to)
        if stream == to:
            rows = rows + self._start(stream)
        for i in own:
            block = self._added[i][to]
            touched = self._touched[i][:, block.first :]
            rows[:, block.first :] = torch.where(touched, block.rows, rows[:, block.first :])
        return rows

    def _zeros(self, stream: str, to: str) -> Tensor:
        size, roots = self._streams[stream].size, self._streams[to].roots
        return self._like.new_zeros(self._examples, size, roots)

    def _records(self, stream: str, ancestors: frozenset[int]) -> list[int]:
        return [i for i in ancestors if self._stream_of.get(i) == stream]

    def _start(self, stream: str) -> Tensor:
        if stream not in self._starts:
            self._starts[stream] = self._streams[stream].start(self._like)
        return self._starts[stream]

    # -- layout -------------------------------------------------------------------------------

    def _in_order(self, examples: Tensor, positions: Tensor, stream: str) -> bool:
        """Whether the groups of a call are the examples, each with all tokens in their order."""
        size = self._streams[stream].size
        return (
            positions.shape == (self._examples, size)
            and torch.equal(examples, torch.arange(self._examples))
            and bool((positions == torch.arange(size)).all())
        )

    def _whole(self, call: MappedCall, source: Source) -> bool:
        """Whether all tokens of one stream attend to all of another, in their order."""
        return self._in_order(call.examples, call.queries, call.stream) and self._in_order(
            call.examples, source.keys, source.stream
        )

    def _first(self, call: MappedCall) -> int:
        """The first row of its stream that a call can add to."""
        if call.crosses:
            return 0
        return int(call.queries.clamp(min=0).min())

    def _rows(self, call: MappedCall, rows: Tensor) -> Tensor:
        """`[G, Nq, n]` rows of a call's queries as `[B, size - first, n]` rows of their stream."""
        first, size = self._first(call), self._streams[call.stream].size
        placed = rows.new_zeros(self._examples, size - first + 1, rows.shape[-1])  # last: padding
        owners = call.examples.to(rows.device)[:, None].expand_as(call.queries)
        places = torch.where(call.queries < 0, size, call.queries) - first
        placed.index_put_((owners, places.to(rows.device)), rows, accumulate=True)
        return placed[:, :-1]

    def _dense(self, call: MappedCall, source: Source) -> Tensor:
        """Ā over all tokens of both streams: `[B, size, size of the keys' stream]`."""
        if self._whole(call, source):
            return call.map
        device = call.map.device
        size = self._streams[call.stream].size, self._streams[source.stream].size
        dense = call.map.new_zeros(self._examples, size[0] + 1, size[1] + 1)
        where = (
            call.examples.to(device)[:, None, None],
            call.queries.to(device)[:, :, None],
            source.keys.to(device)[:, None, :],
        )
        dense.index_put_(where, call.map, accumulate=True)
        return dense[:, :-1, :-1]

    def _rows_touched(self, call: MappedCall) -> Tensor:
        """`[B, size, 1]`, the rows that a call writes."""
        stream = self._streams[call.stream]
        rows = self._rows(call, self._like.new_ones(*call.queries.shape, 1))
        touched = self._like.new_zeros(self._examples, stream.size, 1)
        touched[:, stream.size - rows.shape[1] :] = rows
        touched = stream.hand_on(touched)
        if call.crosses:
            touched[:, self._all_or(call.columns, stream)] = 1
        return touched > 0

    def _all_or(self, columns: Tensor | None, stream: TokenStream) -> Tensor:
        if columns is None:
            return torch.arange(stream.roots, device=self._like.device)
        return columns.to(self._like.device)


def read_out(relevance: Tensor | None, rows: Tensor, columns: int, *, own: bool) -> Tensor:
    """Values of a stream's tokens: the explained rows of relevance, weighted.

    Args:
        relevance: `[B, N, columns]`, `None` for zero.
        rows: `[B, N]` weights of the explained rows.
        columns: number of tokens that get values.
        own: whether rows and columns are of one stream.

    Returns:
        `[B, columns]`. In its own stream, the token of an example's only explained row gets 0.
    """
    if relevance is None:
        return rows.new_zeros(len(rows), columns)
    values = (rows.unsqueeze(1) @ relevance).squeeze(1)
    if not own:
        return values
    single = (rows != 0).sum(-1, keepdim=True) == 1
    return values.masked_fill(single & (rows[:, :columns] != 0), 0.0)
