"""Which rows the score reads, and in which state: asked before the backward pass where need be.

A token is explained if some call had it as a query and the score reads that call's result there,
with the results of all other calls held constant; it is read in the state after the last such call.
Where a model's last layer treats all tokens and nothing else reads them, the ordinary gradient at
the last calls says so in passing, and `explanation` needs no more. `readers` finds the streams for
which it does not; `Asked` asks the graph about these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord, Capture, Reached
from captum_generic_attn.relevance import independence
from captum_generic_attn.relevance.calls import Reading
from captum_generic_attn.relevance.explained_rows import equal_weights, explained_rows, placed
from captum_generic_attn.relevance.selection import read_calls, upstream
from captum_generic_attn.tokens import TokenStream


@dataclass(frozen=True, eq=False)
class Reader:
    """A stream that the score reads directly.

    `calls` are those that it may read, in execution order, `last` those of them that no other
    depends on. It is `plain` if the ordinary gradient at these tells which rows are explained.
    """

    stream: TokenStream
    calls: Sequence[AttentionRecord]
    last: Sequence[AttentionRecord]
    plain: bool


def readers(capture: Capture, reached: Reached) -> dict[str, Reader]:
    """The streams that a score reads directly, by name.

    Raises:
        UnsupportedAttentionError: if the score depends on calls in a way that was not followed.
    """
    behind = upstream(capture.records)
    by_stream: dict[str, list[AttentionRecord]] = {}
    for record in read_calls(capture, reached):
        by_stream.setdefault(record.query_stream, []).append(record)
    followed = frozenset[int]().union(*(behind[i] for i in reached))
    found = {}
    for name, calls in by_stream.items():
        passed = frozenset[int]().union(*(behind[r.index] for r in calls))
        last = [r for r in calls if r.index not in passed]
        earlier = [r for r in calls if r.index in passed]
        stream = capture.streams.having(calls[0].meeting.queries)
        plain = not any(r.index in followed for r in last) and (
            not earlier
            or (
                _cover(last, earlier, stream, capture)
                and not reached.parts_early(last, earlier, capture.records)
            )
        )
        found[name] = Reader(stream, calls, last, plain)
    return found


def _cover(
    last: Sequence[AttentionRecord], earlier: Sequence[AttentionRecord], stream: TokenStream,
    capture: Capture,
) -> bool:  # fmt: skip
    """Whether the last calls have all queries of the earlier ones, or what these were merged to."""
    known = {id(r.query_tokens) for r in last}
    others = [r for r in earlier if id(r.query_tokens) not in known]
    if not others:
        return True
    asked = [_asked(records, stream, capture) for records in (last, others)]
    return not bool((asked[1] & (stream.hand_back(asked[0].double())[:, 0] == 0)).any())


def _asked(records: Sequence[AttentionRecord], stream: TokenStream, capture: Capture) -> Tensor:
    """`[B, 1, size]` True for the queries of some calls."""
    examples = 1 + max(int(r.examples.max()) for r in records)
    found = torch.zeros(examples, stream.size, dtype=torch.bool)
    for record in records:
        every = torch.ones(record.query_tokens.shape, dtype=torch.bool)
        found |= placed(record, every, capture, examples)[:, :-1]
    return found.unsqueeze(1)


class Asked:
    """The graph of a score, asked which rows of the streams are explained.

    `readers` are the streams that the score reads directly; `like` is a tensor of the precision and
    device of weights.
    """

    def __init__(
        self, capture: Capture, score: Tensor, like: Tensor, readers: Mapping[str, Reader]
    ) -> None:
        self._capture = capture
        self._score = score
        self._like = like
        self._readers = readers
        self._checks = independence.checkable(capture, len(score))
        self.compared: independence.Compared | None = None

    def readings(self, names: Sequence[str], *, earlier: bool) -> dict[str, list[Reading]]:
        """The explained rows, with equal weights, each in the state that it is read in.

        In a batch, this sees that the score of each example is its own in any case, or leaves
        `compared` for the backward pass to see it by.

        Args:
            names: the streams that are asked for.
            earlier: whether the last calls alone are not to be trusted, even of plain streams.

        Returns:
            By stream; without those of which the gradient at the last calls is to tell.

        Raises:
            ValueError: if the score of an example reads another example, or padding.
        """
        readers = self._readers
        deep = {n for n, reader in readers.items() if earlier or not reader.plain}
        if not deep:
            last = [record for reader in readers.values() for record in reader.last]
            if self._checks and last:
                self.compared = independence.Compared(self._capture, self._score, last)
            return {}
        asked = readers if self._checks else deep.intersection(names)
        live = self._live(
            [r for n in asked for r in (readers[n].calls if n in deep else readers[n].last)]
        )
        found = {n: self._last(readers[n], live) for n in names if n in asked and n not in deep}
        silent = {n: r.weights.eq(0).all(-1, keepdim=True) for n, (r,) in found.items()}
        more = [
            n for n, examples in silent.items()
            if bool(examples.any()) and len(readers[n].calls) > len(readers[n].last)
        ]  # fmt: skip
        live = {**live, **self._live([r for n in more for r in readers[n].calls])}
        for name in more:
            found[name] += [
                Reading(weights * silent[name], state)
                for weights, state in self._each(readers[name], live)
            ]
        return found | {n: self._each(readers[n], live) for n in names if n in deep}

    def _live(self, records: Sequence[AttentionRecord]) -> Mapping[int, Tensor]:
        """`[G, Nq]` True for what the score reads of calls with no other in between, by call."""
        if not records:
            return {}
        if self._checks:
            return independence.live_rows(self._capture, self._score, records)
        gradients = self._capture.blocked(self._score.sum(), records)
        return {r.index: r.read_rows(g) for r, g in zip(records, gradients, strict=True)}

    def _rows(self, record: AttentionRecord, live: Mapping[int, Tensor]) -> Tensor:
        """`[B, N]` True for the tokens of a stream that are read at a call."""
        rows = live[record.index].to(self._like.device)
        return explained_rows(record, rows, self._capture, len(self._score))

    def _queried(self, record: AttentionRecord) -> Tensor:
        """`[B, N]` True for the tokens that are queries of a call."""
        every = torch.ones(record.query_tokens.shape, dtype=torch.bool, device=self._like.device)
        return placed(record, every, self._capture, len(self._score))[:, :-1]

    def _last(self, reader: Reader, live: Mapping[int, Tensor]) -> list[Reading]:
        """What is read of a plain stream: after all calls."""
        rows = torch.stack([self._rows(record, live) for record in reader.last]).any(0)
        return [Reading(equal_weights(rows, self._like), self._capture.ancestors)]

    def _each(self, reader: Reader, live: Mapping[int, Tensor]) -> list[Reading]:
        """What is read of a stream: each token after the calls that the score reads it at."""
        stream, ancestors = reader.stream, self._capture.ancestors
        rows = torch.stack([self._rows(record, live) for record in reader.calls])
        read = rows.any(0)
        whole = read.to(self._like)
        # What a token was merged from is read through it.
        read &= stream.hand_back(whole.unsqueeze(1))[:, 0] == whole
        weights = equal_weights(read, self._like)
        behind = upstream(self._capture.records)
        # Without a residual path a call's result replaces what the token was: calls before it that
        # had it as a query are not read.
        replaced = torch.stack([self._queried(record) for record in reader.calls]) & ~rows
        patterns, which = torch.unique(
            torch.cat([rows, replaced]).flatten(1), dim=1, return_inverse=True
        )
        indices = [r.index for r in reader.calls]
        found: dict[frozenset[int], Tensor] = {}
        for number, pattern in enumerate(patterns.mT.tolist()):
            calls = frozenset(compress(indices, pattern))
            state = ancestors & calls.union(*(behind[i] for i in calls))
            state -= frozenset(compress(indices, pattern[len(indices) :]))
            part = weights * (which.view(read.shape) == number)
            if bool(part.any()):
                found[state] = found[state] + part if state in found else part
        return [Reading(part, state) for state, part in found.items()] or [
            Reading(weights, ancestors)
        ]
