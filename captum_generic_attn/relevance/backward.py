"""From the records of one forward pass to the relevance of every token, for one score.

`attribution` captures a forward pass and asks `explain` for each target. Here the choices of the
user (`Options`: which calls count, which rows are explained) meet the records; the equations are
in `rules`, their order in `additions`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord, Capture, Refusal, reached_by
from captum_generic_attn.capture.blocks import computing_dtype
from captum_generic_attn.errors import UnsupportedAttentionError
from captum_generic_attn.relevance.calls import (
    Collected,
    Layout,
    MappedCall,
    Reading,
    Source,
    total_weights,
)
from captum_generic_attn.relevance.explained_rows import (
    all_rows,
    equal_weights,
    explained_rows,
    given_rows,
    without_gradient,
)
from captum_generic_attn.relevance.method import SeenCall
from captum_generic_attn.relevance.padding import Padding
from captum_generic_attn.relevance.reading import Asked, readers
from captum_generic_attn.relevance.result import Call, Relevance, Stream
from captum_generic_attn.relevance.selection import (
    Options,
    check_heads,
    counting,
    unused_calls,
)
from captum_generic_attn.tokens import Meeting, TokenStream


@dataclass(frozen=True, eq=False)
class Explanation:
    """Values `[B, roots]` of each stream's tokens, and the relevance that they were read from.

    `dark` are the examples whose scores have no gradient, `padded` those whose explained tokens are
    padding, by stream.
    """

    values: Mapping[str, Tensor]
    relevance: Relevance | None
    dark: Sequence[int]
    padded: Mapping[str, Sequence[int]]


def explain(
    capture: Capture, score: Tensor, options: Options, *, retain_graph: bool, matrices: bool,
    keep_calls: bool, propagated: Mapping[int, Tensor] = MappingProxyType({}),
    earlier: bool = False, exact: bool = False, masks: Sequence[Tensor] = (),
) -> Explanation:  # fmt: skip
    """Explain one score of each example.

    Args:
        capture: the forward pass.
        score: `[B]`, one raw score per example, part of the forward pass's graph.
        options: the user's choices.
        retain_graph: whether another score of the same forward pass follows.
        matrices: whether to return a `Relevance` too.
        keep_calls: whether that keeps the maps of each call.
        propagated: relevance of the probabilities of each call by LRP, if the method needs it.
        earlier: whether rows are looked for at calls before the last ones in any case.
        exact: whether relevance is computed in float64, whatever the model's precision; values are
            then in float64 too, for `narrowed` to see whether they fit.
        masks: `padding.token_masks` of the model's arguments.

    Raises:
        ValueError: if an option does not fit the model, relevance is not finite, or the score of
            an example reads another example.
        Again: if it is to be asked once more: with `earlier`, since the last calls have no
            gradient, or `exact`, since relevance was not finite.
    """
    return _Explaining(
        capture,
        score,
        options,
        propagated,
        matrices=matrices,
        keep_calls=keep_calls,
        earlier=earlier,
        exact=exact,
        masks=masks,
    ).run(retain_graph=retain_graph)


class Again(Exception):  # noqa: N818 - it asks for another try, and never reaches the user
    """The score is to be explained once more, with `option` of `explain`."""

    def __init__(self, option: Literal["earlier", "exact"]) -> None:
        super().__init__(option)
        self.option = option


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in the precision of the result.

    Raises:
        ValueError: if they are too large for it.

    Example:
        >>> narrowed(torch.tensor([1e39], dtype=torch.float64), torch.float32)
        Traceback (most recent call last):
            ...
        ValueError: relevance is too large for float32 (its largest number is 3.4e+38): ...
    """
    if values.dtype == dtype:
        return values
    result = values.to(dtype)
    if not bool(result.isfinite().all()):
        raise ValueError(_too_large(dtype))
    return result


def _too_large(dtype: torch.dtype) -> str:
    name, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    other = "" if dtype == torch.float64 else "take model and inputs to float64 (.double()), or "
    return (
        f"relevance is too large for {name} (its largest number is {most:.2g}): it grows with "
        f"each layer as the score's gradients do. The model's weights are not at fault: {other}"
        "explain a smaller score, such as output=lambda scores: scores / 1e4"
    )


class _Explaining:
    """The backward pass of one score: rows are chosen and maps are used as gradients come."""

    def __init__(
        self, capture: Capture, score: Tensor, options: Options, propagated: Mapping[int, Tensor],
        *, matrices: bool, keep_calls: bool, earlier: bool, exact: bool,
        masks: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self._capture = capture
        self._score = score
        self._method = options.method
        self._propagated = propagated
        self._keep_calls = keep_calls
        self._matrices = matrices
        reached = reached_by(score, capture.records)
        self._readers = readers(capture, reached)
        names = list(self._readers)
        self._exact = exact
        self._dtype = computing_dtype(score)
        self._not_finite: dict[str, None] = {}
        self._padding = Padding(capture, masks)
        kind = torch.float64 if exact else self._dtype
        like = torch.empty(0, dtype=kind, device=score.device)
        self._layout = Layout(capture.streams, len(score), like)
        self._automatic = options.rows is None
        given = given_rows(capture, names, options.rows, len(score), like)
        asked = Asked(capture, score, like, self._readers)
        known = asked.readings(
            [] if self._method.reads == "all" else [n for n in names if n not in given],
            earlier=earlier,
        )
        self._compared = asked.compared
        states = {n: [state for _, state in found] for n, found in known.items()}
        self._unused = unused_calls(capture, reached, options, states)
        if self._method.reads == "all":
            asking = {r.query_stream for r in capture.records if r.index not in self._unused}
            given = all_rows(capture, asking, len(score), like)
        used = [r for r in capture.records if r.index not in self._unused]
        everything = frozenset(r.index for r in capture.records)
        self._finals = {
            stream.name: counting(
                used, self._method, capture.ancestors if stream.name in names else everything
            )
            for stream in capture.streams
        }  # fmt: skip
        known |= {n: [Reading(weights, self._finals[n])] for n, weights in given.items()}
        awaited = [r for n, reader in self._readers.items() if n not in known for r in reader.last]
        self._read = {r.index for r in awaited}
        self._to_come = Counter(r.query_stream for r in awaited)
        self._found: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._seen: dict[int, SeenCall] = {}
        self._arrived: set[int] = set()
        check_heads(used, self._method)
        self._calls = [_mapped(r, capture) for r in used]
        self._reached = reached
        self._sum = self._method.sum_of(
            self._calls, list(dict.fromkeys([*names, *known])), self._layout,
            _crossings(capture), matrices=matrices,
        )  # fmt: skip
        for name, found in known.items():
            self._read_rows(
                name, [Reading(w, counting(used, self._method, state)) for w, state in found]
            )

    def run(self, *, retain_graph: bool) -> Explanation:
        """Run the backward pass."""
        listening = self._read | {c.index for c in self._calls}
        records = [r for r in self._capture.records if r.index in listening]
        padded: list[tuple[AttentionRecord, Tensor]] = []
        try:
            for record in records:
                record.tap.listener = functools.partial(self._arrive, record, padded)
            edges = [r.edge for r in self._reached.deepest(records)]
            results = [] if self._compared is None else [r.result for r in self._compared.records]
            if edges or results:
                gradients = self._capture.backward(
                    self._score.sum(), [*edges, *results], retain_graph=retain_graph
                )
        finally:
            for record in records:
                record.tap.listener = None
        if self._compared is not None:
            self._compared.check(gradients[len(edges) :])
        _check_padding(padded)
        for name in self._found:
            if name not in self._rows:  # an operation of the model kept the gradient of some call
                self._read_explained(name)
        self._check_silent()
        examples = len(self._score)
        dark = without_gradient(self._rows, examples) if self._automatic else []
        if not self._rows:
            for stream in self._capture.streams:
                zeros = self._layout.like.new_zeros(examples, stream.size)
                self._read_rows(stream.name, [Reading(zeros, self._finals[stream.name])])
        values = self._sum.finish()
        if self._method.reads == "all":  # all rows are explained, whether they have a gradient
            dark = [
                i for i in range(examples) if not any(bool(v[i].any()) for v in values.values())
            ]
        calls = [self._call(record) for record in self._capture.records]
        self._check_finite(values.values())
        relevance = self._relevance(calls) if self._matrices else None
        return Explanation(values, relevance, dark, self._padding.found())

    def _arrive(
        self, record: AttentionRecord, padded: list[tuple[AttentionRecord, Tensor]],
        operands: Sequence[Tensor], gradient: Tensor,
    ) -> None:  # fmt: skip
        """Take the gradient of a call, as the backward pass comes to it."""
        self._arrived.add(record.index)
        blocks = record.blocks(operands, gradient)
        if record.index in self._read or record.padded:
            live = blocks.live_rows().view(*record.pick.shape, -1).any(1)
            if record.padded:
                padded.append((record, live))
            if record.index in self._read:
                self._explain_rows(record, live)
        self._padding.see(record, blocks)
        if record.index in self._unused:
            return
        relevance = self._propagated.get(record.index)
        if self._method.rules is not None and relevance is None:
            raise UnsupportedAttentionError(
                f"{record.module or 'the forward function'} ({record.module_type}): LRP hands no "
                "relevance to its attention: its queries are bare parameters, or what follows ends "
                "relevance (a norm, logsumexp); use a method without LRP, or leave it out with "
                "layers="
            )
        seen = SeenCall(
            record, blocks, self._layout, self._rows, self._capture.streams.positions, relevance
        )
        if self._keep_calls:
            self._seen[record.index] = seen
        if self._exact and not seen.finite():
            self._not_finite[record.module or "the forward function"] = None
        self._sum.arrive(record.index, self._method.map_of(seen))

    def _explain_rows(self, record: AttentionRecord, live: Tensor) -> None:
        """Note which rows of a call the score reads, and explain them when its stream has all."""
        name = record.query_stream
        explained = explained_rows(record, live, self._capture, len(self._score))
        self._found[name] = self._found[name] | explained if name in self._found else explained
        self._to_come[name] -= 1
        if self._to_come[name] == 0:
            self._read_explained(name)

    def _read_explained(self, name: str) -> None:
        weights = equal_weights(self._found[name], self._layout.like)
        self._read_rows(name, [Reading(weights, self._finals[name])])

    def _read_rows(self, name: str, readings: Sequence[Reading]) -> None:
        self._rows[name] = total_weights(readings)
        self._padding.explain(name, self._rows[name])
        self._sum.read(name, readings)

    def _check_silent(self) -> None:
        """See that the last calls of each stream told which rows are explained, if others could."""
        for name, explained in self._found.items():
            reader = self._readers[name]
            if len(reader.calls) > len(reader.last) and not bool(explained.any(-1).all()):
                raise Again("earlier")

    def _check_finite(self, found: Iterable[Tensor]) -> None:
        if all(bool(tensor.isfinite().all()) for tensor in found):
            return
        if not self._exact:
            raise Again("exact")
        if not self._not_finite:
            raise ValueError(_too_large(self._layout.like.dtype))
        raise ValueError(
            "relevance is not finite: attention probabilities or their gradients hold NaN or "
            "infinity. Look for NaN in the weights of, or overflow in: "
            + ", ".join(sorted(self._not_finite))
        )

    def _call(self, record: AttentionRecord) -> Call:
        missed = "" if record.index in self._arrived else "does not reach the score"
        reason = self._unused.get(record.index, missed)
        seen = self._seen.get(record.index)
        heads = None if seen is None else self._method.heads_of(seen)
        positions = self._capture.streams.positions
        return Call(
            record.index, record.module, record.query_stream, record.key_stream, record.heads,
            not reason, reason, positions(record.query_tokens), positions(record.key_tokens),
            None if seen is None else self._method.map_of(seen).dense().to(self._dtype),
            None if heads is None else heads.to(self._dtype),
        )  # fmt: skip

    def _relevance(self, calls: list[Call]) -> Relevance:
        assert isinstance(self._sum, Collected)  # noqa: S101 - matrices are asked for
        refused = map(_refused, self._capture.refusals)
        matrices = self._sum.matrices(self._finals)
        self._check_finite(matrices.values())
        return Relevance(
            MappingProxyType({s.name: _stream(s) for s in self._capture.streams}),
            MappingProxyType({n: narrowed(w, self._dtype) for n, w in self._rows.items()}),
            tuple(sorted([*calls, *refused], key=lambda c: c.index)),
            MappingProxyType({p: narrowed(m, self._dtype) for p, m in matrices.items()}),
        )


def _crossings(capture: Capture) -> frozenset[tuple[str, str]]:
    """The pairs of streams (queries, keys) that attend across."""
    return frozenset(
        (record.query_stream, capture.streams.having(keys).name)
        for record in capture.records
        if record.meeting.crosses
        for keys in record.meeting.keys
    )


def _mapped(record: AttentionRecord, capture: Capture) -> MappedCall:
    """A record as the rules see it: tokens as positions in their streams."""
    streams, meeting = capture.streams, record.meeting
    return MappedCall(
        record.index, record.query_stream, record.examples, streams.positions(record.query_tokens),
        capture.spaces.memory.of(
            (record.key_tokens,), meeting, lambda: _sources(record.key_tokens, meeting, capture)
        ),
        meeting.crosses, record.query_ancestors, record.key_ancestors,
        streams.columns(meeting.queries),
    )  # fmt: skip


def _sources(key_tokens: Tensor, meeting: Meeting, capture: Capture) -> tuple[Source, ...]:
    """What a call reads of each stream of its keys."""
    streams = capture.streams
    keys, index = streams.positions(key_tokens), capture.spaces.locate(key_tokens)[0]
    return tuple(
        Source(
            streams.having(spaces).name,
            torch.where(torch.isin(index, torch.tensor([*spaces])), keys, -1),
            streams.columns(spaces),
        )
        for spaces in meeting.keys
    )


def _check_padding(padded: Sequence[tuple[AttentionRecord, Tensor]]) -> None:
    """See that no padding among the queries has a gradient `[G, Nq]`."""
    for record, live in padded:
        if bool((live & (record.query_tokens < 0).to(live.device)).any()):
            raise UnsupportedAttentionError(
                f"{record.module or 'the forward function'} ({record.module_type}): padding stays "
                "among the tokens and hands relevance on; pad with a parameter or an embedding, "
                "whose tokens can be followed"
            )


def _refused(refusal: Refusal) -> Call:
    none = torch.zeros(0, 0, dtype=torch.long)
    return Call(refusal.index, refusal.module, "", "", 0, False, str(refusal), none, none)


def _stream(stream: TokenStream) -> Stream:
    return Stream(stream.size, MappingProxyType(stream.parts))
