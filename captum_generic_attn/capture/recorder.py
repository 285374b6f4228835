"""Keeps the records of one forward pass, and the calls that cannot be explained.

`explicit_calls` and `fused_calls` hand each attention call over. Here its tokens are sorted into
examples and heads; at the end of the forward pass, streams get names and heads that were called one
by one are put together.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from captum_generic_attn.capture.heads import Groups, group_heads
from captum_generic_attn.capture.operands import Operands, Saved, save
from captum_generic_attn.capture.record import AttentionRecord, Source, Tap
from captum_generic_attn.capture.scope import Scope
from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role, Softmax
from captum_generic_attn.capture.tracking.head_calls import of_call
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.capture.unsupported import (
    NO_GRADIENTS,
    SHARED_TOKENS,
    Reason,
    UnsupportedCall,
    UnsupportedCallError,
    unused_softmax,
)
from captum_generic_attn.capture.witness import Witness
from captum_generic_attn.tokens import StreamPair
from captum_generic_attn.tokens.ids import squeeze_expanded
from captum_generic_attn.tokens.space import OVERWRITTEN, PADDING
from captum_generic_attn.tokens.streams import TokenStreams


class CallTokens(NamedTuple):
    """The tokens of one call.

    `queries` `[*lead, Nq]` and `keys` `[*lead, Nk]` are their ids. `result` has the shape of the
    call's result and says whose tokens it is at; `None` if its shape has no places for them.
    `ancestors` are the calls that the queries, and the keys, depend on.
    """

    queries: Tensor
    keys: Tensor
    result: Tensor | None
    ancestors: tuple[frozenset[int], frozenset[int]]


def _after_attention(ids: Tensor) -> Tensor:
    """Token ids of a call's result: attention wrote to padding, so it becomes `OVERWRITTEN`."""
    if not bool((squeeze_expanded(ids) == PADDING).any()):
        return ids
    return torch.where(ids == PADDING, OVERWRITTEN, ids)


class Recorder:
    """The attention calls of one forward pass, in execution order.

    Attributes:
        records: the calls that can be explained.
        refusals: those that cannot.
        softmaxes: all softmaxes.
        streams: the streams of tokens that attention reads.
        in_training: operations that behave as in training mode, in order.
        witness: is told what the calls read, for a check; `None` without one.
    """

    def __init__(
        self, tracker: TokenTracker, scope: Scope, examples: int, *, copies: bool = False,
        witness: Witness | None = None,
    ) -> None:  # fmt: skip
        self.records: list[AttentionRecord] = []
        self.refusals: list[UnsupportedCall] = []
        self.softmaxes: list[Softmax] = []
        self.streams = TokenStreams(tracker.spaces)
        self.in_training: dict[str, None] = {}
        self.witness = witness
        self._calls = 0
        self._softmax_of: dict[int, Softmax] = {}
        self._tracker = tracker
        self._scope = scope
        self._examples = examples
        self._copies = copies

    def operands(self, *tensors: Tensor) -> Operands:
        """The tensors of a call, to be read after the forward pass."""
        return Operands.of(*tensors, copies=self._copies)

    def saved(self, *tensors: Tensor) -> Operands | Saved:
        """The same, saved in the graph where autograd records."""
        if not torch.is_grad_enabled():
            return self.operands(*tensors)
        return save(*tensors, copies=self._copies)

    def refuse(self, reason: Reason | tuple[str, str], *, harmless: bool = False) -> None:
        """Note that the running module makes a call that cannot be explained."""
        index, (module, module_type) = self._next_index(), self._scope.current()
        seen, advice = reason
        self.refusals.append(UnsupportedCall(index, module, module_type, seen, advice, harmless))

    def _next_index(self) -> int:
        self._calls += 1
        return self._calls - 1

    def record(
        self, source: Source, at: Tensor, result: Tensor, tokens: CallTokens,
        softmax: Softmax | None = None,
    ) -> int | None:  # fmt: skip
        """Record a call.

        Args:
            source: computes its attention and gradient.
            at: the tensor whose gradient the source needs.
            result: what the call returns.
            tokens: of its queries, keys and result.
            softmax: the softmax that the model computed, of a call that is not fused.

        Returns:
            Its index; `None` if it cannot be explained.
        """
        ids = tokens.result
        if ids is not None:
            memory = self._tracker.spaces.cache
            ids = memory(_after_attention, ids)
            ids = memory.one(ids)  # the next layer does the same to the same tokens
        token_ids = () if ids is None else (ids,)
        lost = "" if token_ids else "attention"
        of_queries, of_keys = tokens.ancestors
        passed = AbstractValue(
            Role.TOKENS, token_ids, of_queries | of_keys, data=True, lost_at=lost
        )
        self._tracker.abstract_values[result] = passed
        groups = self._groups_or_refusal(tokens)
        if groups is None:
            return None
        index = self._next_index()
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - no use of it that a mode may count
            edge = get_gradient_edge(result)
        self.records.append(
            AttentionRecord(
                index, *self._scope.current(), source, get_gradient_edge(at),
                edge, Tap(at, source.operands), groups.query_tokens, groups.key_tokens,
                groups.examples, groups.head_index, groups.in_order, groups.has_padding_queries,
                of_queries, of_keys,
            )
        )  # fmt: skip
        self._tracker.queried[index] = groups.query_tokens
        if softmax is not None:
            self._softmax_of[index] = softmax
        self._tracker.abstract_values[result] = passed._replace(
            ancestors=frozenset([index]), calls=of_call(index, result.shape)
        )
        return index

    def _groups_or_refusal(self, tokens: CallTokens) -> Groups | None:
        """The call's tokens, sorted into examples and heads; `None` after it was refused."""
        queries, keys = tokens.queries, tokens.keys
        if not torch.is_grad_enabled():
            self.refuse(NO_GRADIENTS)
            return None
        memory = self._tracker.spaces.cache
        try:
            groups = memory.of((queries, keys), "groups", lambda: self._groups(queries, keys))
        except UnsupportedCallError as problem:
            self.refuse(problem.reason)
            return None
        if groups is None:
            self.refuse(SHARED_TOKENS, harmless=True)
        return groups

    def _groups(self, queries: Tensor, keys: Tensor) -> Groups | None:
        """The call's tokens, sorted into examples and heads; `None` if all examples share them.

        The first call of the same tokens notes that they were read, and that its queries were.

        Raises:
            UnsupportedCallError: if the call cannot be explained.
        """
        self._check_lost(queries)
        self._check_lost(keys)
        if self._shared(queries) and self._shared(keys):
            return None
        spaces = self._tracker.spaces
        groups = group_heads(queries, keys, spaces, self._examples)
        self._check_present(groups.query_tokens, groups.key_tokens)
        spaces.mark_read(groups.query_tokens)
        spaces.mark_read(groups.key_tokens)
        spaces.mark_queried(groups.query_tokens)
        return groups

    def _check_lost(self, rows: Tensor) -> None:
        spaces = self._tracker.spaces
        found = spaces.indices(rows)
        lost = dict.fromkeys(spaces[i].name for i in found if spaces[i].kind == "unknown")
        if lost:
            raise UnsupportedCallError(
                f"its tokens could not be followed through {', '.join(lost)}",
                "write that step with operations that keep tokens apart, or leave the call out "
                "with layers=",
            )

    def _shared(self, rows: Tensor) -> bool:
        spaces = self._tracker.spaces
        found = spaces.indices(rows)
        return bool(found) and all(spaces[i].kind == "shared" for i in found)

    def _check_present(self, queries: Tensor, keys: Tensor) -> None:
        spaces = self._tracker.spaces
        for ids, which in ((queries, "queries"), (keys, "keys")):
            if not spaces.indices(ids):
                raise UnsupportedCallError(
                    f"its {which} are tokens of no input and no parameter, but constants",
                    "leave the call out with layers=, or pass strict=False to skip such calls",
                )

    # -- the end of the forward pass -----------------------------------------------------------

    def close(self) -> list[AttentionRecord]:
        """The records that can be explained, with their streams and layers."""
        self._drop_pools()
        self._drop_split_products()
        self._refuse_unused_softmaxes()
        self._name_streams()
        self._group_head_calls()
        return self.records

    def _drop_pools(self) -> None:
        """Refuse calls that pool tokens where later operations show that it is no attention."""
        kept = []
        for record in self.records:
            pool = self._tracker.pools.get(record.index)
            if pool is None or pool.problem is None:
                kept.append(record)
                continue
            place = record.module, record.module_type
            self.refusals.append(UnsupportedCall(record.index, *place, *pool.problem))
        self.records = kept

    def _drop_split_products(self) -> None:
        """Drop calls whose probabilities entered a second product, which was refused."""
        split = {i for i, softmax in self._softmax_of.items() if softmax.products > 1}
        self.records = [record for record in self.records if record.index not in split]

    def _refuse_unused_softmaxes(self) -> None:
        for softmax in self.softmaxes:
            reason = None if softmax.products else unused_softmax(softmax)
            if reason is not None:
                place = softmax.module, softmax.module_type
                self.refusals.append(UnsupportedCall(self._next_index(), *place, *reason))

    def _name_streams(self) -> None:
        """Find the streams of tokens, and give each record the names of its own."""
        records, streams = self.records, self.streams
        streams.trace([ids for r in records for ids in (r.key_tokens, r.query_tokens)])
        pairs = [streams.meet(r.query_tokens, r.key_tokens) for r in records]
        streams.close([(r.module, ids) for r in records for ids in (r.key_tokens, r.query_tokens)])
        self.records = [
            replace(
                record, query_stream=streams.having(pair.queries).name,
                key_stream=self._key_stream(pair), stream_pair=pair,
            )
            for record, pair in zip(records, pairs, strict=True)
        ]  # fmt: skip

    def _key_stream(self, pair: StreamPair) -> str:
        names = (self.streams.having(keys).name for keys in pair.keys)
        return "+".join(dict.fromkeys(names))

    def _group_head_calls(self) -> None:
        """Give each record its layer, and its part of the layer's heads.

        A layer is one call, or all calls of a model that calls its heads one by one.
        """
        alike: dict[Hashable, list[int]] = {}
        for record in self.records:
            queries = tuple(torch.unique(record.query_tokens).tolist())
            alike.setdefault((queries, record.query_ancestors), []).append(record.index)
        layers = self._tracker.heads.layers(list(alike.values()))
        heads = {record.index: record.heads for record in self.records}
        self.records = [
            replace(r, layer=min(layer), head_fraction=r.heads / sum(heads[i] for i in layer))
            for r in self.records for layer in [layers[r.index]]
        ]  # fmt: skip
