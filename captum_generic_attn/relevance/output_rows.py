"""The rows that the score is computed from, and the state in which each is read.

A token is explained if it is a query of some call and the score depends on that call's output at
this token, with the outputs of all other calls held constant. It is read in the state after the
last such call. In most models the ordinary gradient at the last calls shows this during the
backward pass. `output_streams` finds the streams where it does not, and `RowFinder` computes the
gradients that decide for these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord, Capture, Reached
from captum_generic_attn.relevance import independence
from captum_generic_attn.relevance.aggregator import OutputRows
from captum_generic_attn.relevance.explained_rows import equal_weights, explained_rows, placed
from captum_generic_attn.relevance.selection import read_calls, upstream
from captum_generic_attn.tokens import TokenStream


@dataclass(frozen=True, eq=False)
class OutputStream:
    """A stream that the score reads directly, with no other attention call in between.

    `calls` are those that it may read, in execution order; `last` those of them that no other of
    them depends on. `last_suffice` is True if the ordinary gradient at `last` tells which rows are
    explained.
    """

    stream: TokenStream
    calls: Sequence[AttentionRecord]
    last: Sequence[AttentionRecord]
    last_suffice: bool


def output_streams(capture: Capture, reached: Reached) -> dict[str, OutputStream]:
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
        stream = capture.streams.having(calls[0].stream_pair.queries)
        suffice = not any(r.index in followed for r in last) and (
            not earlier
            or (
                _cover(last, earlier, stream, capture)
                and not reached.parts_early(last, earlier, capture.records)
            )
        )
        found[name] = OutputStream(stream, calls, last, suffice)
    return found


def _cover(
    last: Sequence[AttentionRecord], earlier: Sequence[AttentionRecord], stream: TokenStream,
    capture: Capture,
) -> bool:  # fmt: skip
    """Whether all queries of the earlier calls, or tokens merged from them, are queries of the
    last.
    """
    known = {id(r.query_tokens) for r in last}
    others = [r for r in earlier if id(r.query_tokens) not in known]
    if not others:
        return True
    asked = [_asked(records, stream, capture) for records in (last, others)]
    return not bool((asked[1] & (stream.unpool(asked[0].double())[:, 0] == 0)).any())


def _asked(records: Sequence[AttentionRecord], stream: TokenStream, capture: Capture) -> Tensor:
    """`[B, 1, size]` True for the queries of some calls."""
    examples = 1 + max(int(r.examples.max()) for r in records)
    found = torch.zeros(examples, stream.size, dtype=torch.bool)
    for record in records:
        every = torch.ones(record.query_tokens.shape, dtype=torch.bool)
        found |= placed(record, every, capture, examples)[:, :-1]
    return found.unsqueeze(1)


class RowFinder:
    """Computes which rows of the output streams the score reads.

    Args:
        capture: the forward pass.
        score: `[B]`.
        like: a tensor of the precision and device of weights.
        streams: the output streams, by name.

    Attributes:
        compared: set by `rows_of` where the backward pass is to finish the check that the examples
            of a batch are independent.
    """

    def __init__(
        self, capture: Capture, score: Tensor, like: Tensor, streams: Mapping[str, OutputStream]
    ) -> None:
        self._capture = capture
        self._score = score
        self._like = like
        self._streams = streams
        self._checks = independence.checkable(capture, len(score))
        self.compared: independence.Compared | None = None

    def rows_of(self, names: Sequence[str], *, earlier: bool) -> dict[str, list[OutputRows]]:
        """The explained rows, with equal weights, each with its state.

        For a batch, this also checks that the score of each example depends on no other example.

        Args:
            names: the streams that are asked for.
            earlier: whether to look at the calls before the last ones in any case.

        Returns:
            Rows by stream, without the streams for which the gradient at the last calls will tell.

        Raises:
            ValueError: if the score of an example reads another example, or padding.
        """
        streams = self._streams
        deep = {n for n, stream in streams.items() if earlier or not stream.last_suffice}
        if not deep:
            last = [record for stream in streams.values() for record in stream.last]
            if self._checks and last:
                self.compared = independence.Compared(self._capture, self._score, last)
            return {}
        asked = streams if self._checks else deep.intersection(names)
        live = self._live(
            [r for n in asked for r in (streams[n].calls if n in deep else streams[n].last)]
        )
        shallow = [n for n in names if n in asked and n not in deep]
        return self._after_all_calls(shallow, live) | {
            n: self._each_token(streams[n], live) for n in names if n in deep
        }

    def _after_all_calls(
        self, names: Sequence[str], live: Mapping[int, Tensor]
    ) -> dict[str, list[OutputRows]]:
        """The rows of streams whose last calls suffice, but for examples without a gradient there.

        The rows of those examples are looked for at the earlier calls too.
        """
        found = {name: [self._at_last_calls(self._streams[name], live)] for name in names}
        silent = {n: rows.weights.eq(0).all(-1, keepdim=True) for n, (rows,) in found.items()}
        more = [
            n for n, examples in silent.items()
            if bool(examples.any()) and len(self._streams[n].calls) > len(self._streams[n].last)
        ]  # fmt: skip
        live = {**live, **self._live([r for n in more for r in self._streams[n].calls])}
        for name in more:
            found[name] += [
                OutputRows(weights * silent[name], state)
                for weights, state in self._each_token(self._streams[name], live)
            ]
        return found

    def _live(self, records: Sequence[AttentionRecord]) -> Mapping[int, Tensor]:
        """`[G, Nq]` by call, True for the queries whose output the score reads directly."""
        if not records:
            return {}
        if self._checks:
            return independence.live_rows(self._capture, self._score, records)
        gradients = self._capture.blocked(self._score.sum(), records)
        return {r.index: r.read_rows(g) for r, g in zip(records, gradients, strict=True)}

    def _rows(self, record: AttentionRecord, live: Mapping[int, Tensor]) -> Tensor:
        """`[B, N]` True for the tokens of a stream that the score reads at a call."""
        rows = live[record.index].to(self._like.device)
        return explained_rows(record, rows, self._capture, len(self._score))

    def _queried(self, record: AttentionRecord) -> Tensor:
        """`[B, N]` True for the tokens that are queries of a call."""
        every = torch.ones(record.query_tokens.shape, dtype=torch.bool, device=self._like.device)
        return placed(record, every, self._capture, len(self._score))[:, :-1]

    def _at_last_calls(self, output: OutputStream, live: Mapping[int, Tensor]) -> OutputRows:
        """The rows that the score reads at the last calls, in the state after all calls."""
        rows = torch.stack([self._rows(record, live) for record in output.last]).any(0)
        return OutputRows(equal_weights(rows, self._like), self._capture.ancestors)

    def _each_token(self, output: OutputStream, live: Mapping[int, Tensor]) -> list[OutputRows]:
        """The rows of a stream, each in the state after the calls that the score reads it at."""
        stream, ancestors = output.stream, self._capture.ancestors
        rows = torch.stack([self._rows(record, live) for record in output.calls])
        read = rows.any(0)
        whole = read.to(self._like)
        # A token that was merged into another is read through that one.
        read &= stream.unpool(whole.unsqueeze(1))[:, 0] == whole
        weights = equal_weights(read, self._like)
        behind = upstream(self._capture.records)
        # Without a residual path the output of a call replaces the token: the calls before it that
        # had the token as a query are not read.
        replaced = torch.stack([self._queried(record) for record in output.calls]) & ~rows
        patterns, which = torch.unique(
            torch.cat([rows, replaced]).flatten(1), dim=1, return_inverse=True
        )
        indices = [r.index for r in output.calls]
        found: dict[frozenset[int], Tensor] = {}
        for number, pattern in enumerate(patterns.mT.tolist()):
            calls = frozenset(compress(indices, pattern))
            state = ancestors & calls.union(*(behind[i] for i in calls))
            state -= frozenset(compress(indices, pattern[len(indices) :]))
            part = weights * (which.view(read.shape) == number)
            if bool(part.any()):
                found[state] = found[state] + part if state in found else part
        return [OutputRows(part, state) for state, part in found.items()] or [
            OutputRows(weights, ancestors)
        ]
