"""Attention calls with their tokens as positions in token streams.

`IndexedCall` is what the propagation of relevance needs of a call. `TokenIndexing` moves values
between the positions of a stream and the queries or keys of a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord, Capture
from captum_generic_attn.tokens import StreamPair, TokenStream
from captum_generic_attn.tokens.identity_cache import IdentityCache


@dataclass(frozen=True, eq=False)
class KeySource:
    """The keys of a call that belong to one stream.

    `keys` `[G, Nk]` are positions in the stream, -1 for keys of other streams. `columns` are the
    positions of the tokens that the stream had when the call ran; `None`: all that it ever has.
    """

    stream: str
    keys: Tensor
    columns: Tensor | None = None


@dataclass(frozen=True, eq=False)
class IndexedCall:
    """An attention call of `G` groups, the examples or their windows; `examples` `[G]` maps them.

    `queries` `[G, Nq]` are positions in the stream `stream`, which had the tokens `columns`
    (`None`: all) when the call ran. `query_ancestors` and `key_ancestors` are the indices of the
    calls upstream of the queries and of the keys.
    """

    index: int
    stream: str
    examples: Tensor
    queries: Tensor
    sources: tuple[KeySource, ...]
    is_cross_attention: bool
    query_ancestors: frozenset[int]
    key_ancestors: frozenset[int]
    columns: Tensor | None = None


def indexed(record: AttentionRecord, capture: Capture) -> IndexedCall:
    """A recorded call with its tokens as positions in their streams."""
    streams, meeting = capture.streams, record.stream_pair
    return IndexedCall(
        record.index, record.query_stream, record.examples, streams.positions(record.query_tokens),
        capture.spaces.cache.of(
            (record.key_tokens,), meeting, lambda: _sources(record.key_tokens, meeting, capture)
        ),
        meeting.is_cross_attention, record.query_ancestors, record.key_ancestors,
        streams.columns(meeting.queries),
    )  # fmt: skip


def _sources(key_tokens: Tensor, meeting: StreamPair, capture: Capture) -> tuple[KeySource, ...]:
    streams = capture.streams
    keys, index = streams.positions(key_tokens), capture.spaces.locate(key_tokens)[0]
    return tuple(
        KeySource(
            streams.having(spaces).name,
            torch.where(torch.isin(index, torch.tensor([*spaces])), keys, -1),
            streams.columns(spaces),
        )
        for spaces in meeting.keys
    )


def cross_pairs(capture: Capture) -> frozenset[tuple[str, str]]:
    """The pairs (query stream, key stream) with cross-attention."""
    return frozenset(
        (record.query_stream, capture.streams.having(keys).name)
        for record in capture.records
        if record.stream_pair.is_cross_attention
        for keys in record.stream_pair.keys
    )


class TokenIndexing:
    """The streams of a forward pass, and how values move between them and attention calls.

    Positions live on the CPU. Answers about the same positions, as in the layers of a model, are
    cached.
    """

    def __init__(self, streams: Iterable[TokenStream], examples: int, like: Tensor) -> None:
        self.streams: Mapping[str, TokenStream] = {stream.name: stream for stream in streams}
        self.examples = examples
        self.like = like
        self._cache = IdentityCache()
        self._initial: dict[str, Tensor] = {}

    def initial_relevance(self, stream: str) -> Tensor:
        """`[E, size, base tokens]` relevance before any attention; `E` is 1 or the batch size.

        The identity for base tokens, shares of them for merged tokens.
        """
        if stream not in self._initial:
            self._initial[stream] = self.streams[stream].initial_relevance(self.like)
        return self._initial[stream]

    def in_order(self, examples: Tensor, positions: Tensor, stream: str) -> bool:
        """Whether the groups of a call are the examples, each with all tokens in their order."""
        size = self.streams[stream].size
        return self._cache.of(
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
        """Transpose of `gather`, `[G, k, n]` to `[B, k, size]`; duplicate positions accumulate."""
        if self.in_order(examples, positions, stream):
            return rows
        size = self.streams[stream].size
        total = rows.new_zeros(self.examples, size + 1, rows.shape[1])  # the last: padding
        owners = examples.to(rows.device)[:, None].expand_as(positions)
        places = torch.where(positions < 0, size, positions).to(rows.device)
        total.index_put_((owners, places), rows.mT, accumulate=True)
        return total[:, :-1].mT

    def columns_or_all(self, columns: Tensor | None, stream: str) -> Tensor:
        """`columns`, or the positions of all base tokens of a stream for `None`."""
        if columns is None:
            return torch.arange(self.streams[stream].num_base_tokens, device=self.like.device)
        return columns.to(self.like.device)
