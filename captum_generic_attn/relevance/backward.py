"""One backward pass: explain one score of a captured forward pass by a method.

`plan` decides which calls are used and which rows are explained. During the backward pass each call
hands out its attention and gradient; the method makes a map of it, and an aggregator combines the
maps into relevance per token.
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

from captum_generic_attn.capture import (
    AttentionRecord,
    Capture,
    UnsupportedCall,
)
from captum_generic_attn.capture.blocks import computing_dtype
from captum_generic_attn.errors import UnsupportedAttentionError
from captum_generic_attn.relevance.aggregator import (
    Aggregator,
    BufferedAggregator,
    OutputRows,
    total_weights,
)
from captum_generic_attn.relevance.attention_maps import BlockMap
from captum_generic_attn.relevance.calls import TokenIndexing, cross_pairs, indexed
from captum_generic_attn.relevance.equations import positive_contribution
from captum_generic_attn.relevance.explained_rows import (
    RowsOption,
    equal_weights,
    explained_rows,
    without_gradient,
)
from captum_generic_attn.relevance.method import CallGradients, Method
from captum_generic_attn.relevance.padding import Padding
from captum_generic_attn.relevance.plan import Plan, plan
from captum_generic_attn.relevance.result import Call, Relevance, Stream
from captum_generic_attn.tokens import TokenStream


@dataclass(frozen=True, eq=False)
class Explanation:
    """Values `[B, base tokens]` of each stream's tokens, and the relevance they were read from.

    `without_gradient` are the examples whose score has no gradient at any attention call, `padded`
    those whose explained tokens are padding, by stream.
    """

    values: Mapping[str, Tensor]
    relevance: Relevance | None
    without_gradient: Sequence[int]
    padded: Mapping[str, Sequence[int]]


class Again(Exception):  # noqa: N818 - it asks for another try, and never reaches the user
    """The score must be explained once more, with `option` of `explain`."""

    def __init__(self, option: Literal["earlier", "exact"]) -> None:
        super().__init__(option)
        self.option = option


def explain(
    capture: Capture, score: Tensor, method: Method, *, rows: RowsOption = None,
    retain_graph: bool, matrices: bool, keep_calls: bool,
    propagated: Mapping[int, Tensor] = MappingProxyType({}), masks: Sequence[Tensor] = (),
    earlier: bool = False, exact: bool = False,
) -> Explanation:  # fmt: skip
    """Explain one score of each example.

    Args:
        capture: the forward pass.
        score: `[B]`, one raw score per example, part of the forward pass's graph.
        method: the method, with its options.
        rows: the user's `rows=` for these examples.
        retain_graph: whether another score of the same forward pass follows.
        matrices: whether to return a `Relevance` too.
        keep_calls: whether the `Relevance` keeps the map of each call.
        propagated: relevance of the probabilities of each call by LRP, if the method needs it.
        masks: `padding.token_masks` of the model's arguments.
        earlier: whether to look for explained rows at calls before the last ones in any case.
        exact: whether to compute relevance in float64, whatever the model's precision. The values
            are then float64 too; `narrowed` checks whether they fit a lower precision.

    Raises:
        ValueError: if an option does not fit the model, relevance is not finite, or the score of
            an example reads another example.
        UnsupportedAttentionError: if attention cannot be explained.
        Again: if the score must be explained with `earlier`, since the last calls have no gradient,
            or with `exact`, since relevance was not finite.
    """
    dtype = torch.float64 if exact else computing_dtype(score)
    indexing = TokenIndexing(
        capture.streams, len(score), torch.empty(0, dtype=dtype, device=score.device)
    )
    planned = plan(capture, score, method, rows, indexing.like, earlier=earlier)
    aggregator = method.aggregator(
        [indexed(record, capture) for record in planned.used],
        list(dict.fromkeys([*planned.outputs, *planned.rows])), indexing, cross_pairs(capture),
        matrices=matrices,
    )  # fmt: skip
    run = _BackwardPass(
        capture, method, planned, indexing, aggregator, propagated, Padding(capture, masks),
        examine=exact, keep=keep_calls,
    )  # fmt: skip
    run.run(score, retain_graph=retain_graph)
    missing = [] if rows is not None else without_gradient(run.rows, len(score))
    values = run.values()
    if method.row_source == "all":  # all rows are explained, whether they have a gradient or not
        missing = [
            i for i in range(len(score)) if not any(bool(v[i].any()) for v in values.values())
        ]
    calls = [run.public_call(record, computing_dtype(score)) for record in capture.records]
    run.check_finite(values.values())
    relevance = None
    if isinstance(aggregator, BufferedAggregator) and matrices:
        found = aggregator.matrices(planned.final)
        run.check_finite(found.values())
        relevance = _relevance(capture, run.rows, calls, found, computing_dtype(score))
    return Explanation(values, relevance, missing, run.padding.found())


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


class _BackwardPass:
    """Receives the gradient of each call and feeds the aggregator.

    Attributes:
        rows: `[B, size]` weights of the explained rows, by stream, once they are known.
    """

    def __init__(
        self, capture: Capture, method: Method, planned: Plan, indexing: TokenIndexing,
        aggregator: Aggregator, propagated: Mapping[int, Tensor], padding: Padding, *,
        examine: bool, keep: bool,
    ) -> None:  # fmt: skip
        self.rows: dict[str, Tensor] = {}
        self.padding = padding
        self._capture = capture
        self._method = method
        self._plan = planned
        self._indexing = indexing
        self._aggregator = aggregator
        self._propagated = propagated
        self._needs_lrp = method.lrp_rules is not None
        self._examine = examine
        self._keep = keep
        self._awaited = {record.index for record in planned.awaited}
        self._missing = Counter(record.query_stream for record in planned.awaited)
        self._explained: dict[str, Tensor] = {}
        self._with_padding: list[tuple[AttentionRecord, Tensor]] = []
        self._received: set[int] = set()
        self._kept: dict[int, CallGradients] = {}
        self._not_finite: dict[str, None] = {}
        for name, rows in planned.rows.items():
            self._set_rows(name, rows)

    def run(self, score: Tensor, *, retain_graph: bool) -> None:
        """Run the backward pass of the summed scores `[B]`."""
        planned = self._plan
        listening = self._awaited | {record.index for record in planned.used}
        records = [r for r in self._capture.records if r.index in listening]
        edges = [r.edge for r in planned.reached.deepest(records)]
        results = [] if planned.compared is None else [r.result for r in planned.compared.records]
        try:
            for record in records:
                record.tap.listener = functools.partial(self._receive, record)
            if edges or results:
                gradients = self._capture.backward(
                    score.sum(), [*edges, *results], retain_graph=retain_graph
                )
        finally:
            for record in records:
                record.tap.listener = None
        if planned.compared is not None:
            planned.compared.check(gradients[len(edges) :])
        check_padding(self._with_padding)
        for name in self._explained:
            if name not in self.rows:  # an operation of the model kept the gradient of some call
                self._set_equal_rows(name)
        self._check_silent()
        if not self.rows:
            for stream in self._capture.streams:
                zeros = self._indexing.like.new_zeros(len(score), stream.size)
                self._set_rows(stream.name, [OutputRows(zeros, planned.final[stream.name])])

    def values(self) -> dict[str, Tensor]:
        """`[B, base tokens]` values of the tokens of each stream."""
        return self._aggregator.result()

    def _receive(
        self, record: AttentionRecord, operands: Sequence[Tensor], gradient: Tensor
    ) -> None:
        """Use the gradient of a call."""
        self._received.add(record.index)
        blocks = record.blocks(operands, gradient)
        if record.index in self._awaited or record.has_padding_queries:
            live = blocks.live_rows().view(*record.head_index.shape, -1).any(1)
            if record.has_padding_queries:
                self._with_padding.append((record, live))
            if record.index in self._awaited:
                self._add_explained(record, live)
        self.padding.see(record, blocks)
        if record.index in self._plan.unused:
            return
        relevance = self._propagated.get(record.index)
        if self._needs_lrp and relevance is None:
            raise UnsupportedAttentionError(
                f"{record.module or 'the forward function'} ({record.module_type}): LRP hands no "
                "relevance to its attention: its queries are bare parameters, or what follows ends "
                "relevance (a norm, logsumexp); use a method without LRP, or leave it out with "
                "layers="
            )
        call = CallGradients(
            record, blocks, self._indexing, self.rows, self._capture.streams.positions, relevance
        )
        if self._keep:
            self._kept[record.index] = call
        attention_map = self._method.call_map(call)
        if self._examine and not _is_finite(call, attention_map):
            self._not_finite[record.module or "the forward function"] = None
        self._aggregator.add_map(record.index, attention_map)

    # -- explained rows -----------------------------------------------------------------------

    def _add_explained(self, record: AttentionRecord, live: Tensor) -> None:
        """Add the rows that the score reads at a call; with the last call, set the stream's."""
        name = record.query_stream
        rows = explained_rows(record, live, self._capture, self._indexing.examples)
        self._explained[name] = self._explained[name] | rows if name in self._explained else rows
        self._missing[name] -= 1
        if self._missing[name] == 0:
            self._set_equal_rows(name)

    def _set_equal_rows(self, name: str) -> None:
        weights = equal_weights(self._explained[name], self._indexing.like)
        self._set_rows(name, [OutputRows(weights, self._plan.final[name])])

    def _set_rows(self, name: str, rows: Sequence[OutputRows]) -> None:
        self.rows[name] = total_weights(rows)
        self.padding.explain(name, self.rows[name])
        self._aggregator.add_output_rows(name, rows)

    # -- checks -------------------------------------------------------------------------------

    def _check_silent(self) -> None:
        """Check that the last calls of each stream have a gradient, if earlier ones might."""
        for name, explained in self._explained.items():
            output = self._plan.outputs[name]
            if len(output.calls) > len(output.last) and not bool(explained.any(-1).all()):
                raise Again("earlier")

    def check_finite(self, found: Iterable[Tensor]) -> None:
        """Check that relevance is finite.

        Raises:
            Again: if it was not computed in float64 yet.
            ValueError: otherwise.
        """
        if all(bool(tensor.isfinite().all()) for tensor in found):
            return
        if not self._examine:
            raise Again("exact")
        if not self._not_finite:
            raise ValueError(_too_large(self._indexing.like.dtype))
        raise ValueError(
            "relevance is not finite: attention probabilities or their gradients hold NaN or "
            "infinity. Look for NaN in the weights of, or overflow in: "
            + ", ".join(sorted(self._not_finite))
        )

    def public_call(self, record: AttentionRecord, dtype: torch.dtype) -> Call:
        """A call as `Relevance` shows it, with its maps if they were kept."""
        missed = "" if record.index in self._received else "does not reach the score"
        reason = self._plan.unused.get(record.index, missed)
        call = self._kept.get(record.index)
        heads = None if call is None else self._method.head_maps(call)
        positions = self._capture.streams.positions
        return Call(
            record.index, record.module, record.query_stream, record.key_stream, record.heads,
            not reason, reason, positions(record.query_tokens), positions(record.key_tokens),
            None if call is None else self._method.call_map(call).dense().to(dtype),
            None if heads is None else heads.to(dtype),
        )  # fmt: skip


def _is_finite(call: CallGradients, attention_map: object) -> bool:
    """Whether a call's attention, its gradient and what its map is made of are finite."""
    known = call.relevance is None or bool(call.relevance.isfinite().all())
    contribution = (
        attention_map
        if isinstance(attention_map, BlockMap)
        else call.block_map(positive_contribution)
    )
    return known and call.blocks.operands_are_finite() and contribution.is_finite()


def check_padding(calls: Sequence[tuple[AttentionRecord, Tensor]]) -> None:
    """Check that no padding among the queries of calls has a gradient `[G, Nq]`.

    Raises:
        UnsupportedAttentionError: if some has.
    """
    for record, live in calls:
        if bool((live & (record.query_tokens < 0).to(live.device)).any()):
            raise UnsupportedAttentionError(
                f"{record.module or 'the forward function'} ({record.module_type}): padding stays "
                "among the tokens and hands relevance on; pad with a parameter or an embedding, "
                "whose tokens can be followed"
            )


def _relevance(
    capture: Capture, rows: Mapping[str, Tensor], calls: Sequence[Call],
    matrices: Mapping[tuple[str, str], Tensor], dtype: torch.dtype,
) -> Relevance:  # fmt: skip
    refused = map(_refused, capture.refusals)
    return Relevance(
        MappingProxyType({s.name: _stream(s) for s in capture.streams}),
        MappingProxyType({name: narrowed(w, dtype) for name, w in rows.items()}),
        tuple(sorted([*calls, *refused], key=lambda call: call.index)),
        MappingProxyType({pair: narrowed(m, dtype) for pair, m in matrices.items()}),
    )


def _refused(refusal: UnsupportedCall) -> Call:
    none = torch.zeros(0, 0, dtype=torch.long)
    return Call(refusal.index, refusal.module, "", "", 0, False, str(refusal), none, none)


def _stream(stream: TokenStream) -> Stream:
    return Stream(stream.size, MappingProxyType(stream.parts))
