"""Records the calls of fused attention functions, which the table of `fused_kernels` lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.capture.constants import Constants, require_gradient
from captum_generic_attn.capture.fused_kernels import FusedCall, Kernel
from captum_generic_attn.capture.recorder import CallTokens, Recorder
from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.capture.unsupported import CHANNELS, OTHER_VALUES, Reason, values_lost
from captum_generic_attn.tokens.ids import varies


class FusedCalls:
    """Records the fused calls of one forward pass."""

    def __init__(self, tracker: TokenTracker, recorder: Recorder, constants: Constants) -> None:
        self._run = constants.run
        self._tracker = tracker
        self._recorder = recorder

    def run(
        self, kernel: Kernel, func: Callable[..., Any], args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        """Run a fused attention function and record its call.

        Returns:
            The result, whose tokens are known from then on.
        """
        call = kernel.read(*args, **kwargs)
        queries = self._tracker.tokens_of(call.query, "attention")
        keys = self._tracker.tokens_of(call.key, "attention")
        result: Tensor = self._run(func, args, kwargs)
        require_gradient(result)
        self._note_dropout(call, queries, keys)
        token_ids = self._tracker.spaces.cache(
            _ids_of_call, self._ids(call.query, queries), self._ids(call.key, keys),
            result.shape, grouped=call.grouped,
        )  # fmt: skip
        values = self._tracker.of(call.value)
        if values.role is Role.RAW:
            values = self._tracker.tokens_of(call.value, "attention")
        reason = CHANNELS if token_ids is None else self._unsupported_values(keys, values)
        if token_ids is None or reason is not None:
            self._recorder.refuse(reason or CHANNELS)
            ids = None if token_ids is None else token_ids[2]
            return self._pass_over(result, queries, keys, ids)
        query_tokens, key_tokens, ids = token_ids
        if values.token_ids and not call.grouped and bool((key_tokens < 0).any()):
            of_values = values.token_ids[0][..., 0].expand(key_tokens.shape)
            key_tokens = torch.where(key_tokens < 0, of_values, key_tokens)  # keys are constants
        source = kernel.source(self._recorder.saved(*call.tensors), call, result)
        ancestors = queries.ancestors, keys.ancestors | self._tracker.of(call.value).ancestors
        tokens = CallTokens(query_tokens, key_tokens, ids, ancestors)
        index = self._recorder.record(source, result, result, tokens)
        if self._recorder.witness is not None and index is not None:
            self._recorder.witness.see(
                index, result, ids, queries=(call.query, queries.token_ids),
                keys=(call.key, keys.token_ids), values=(call.value, values.token_ids),
            )  # fmt: skip
        return result

    def _note_dropout(self, call: FusedCall, queries: AbstractValue, keys: AbstractValue) -> None:
        """Note that attention of data drops probabilities, as in training mode."""
        values = self._tracker.of(call.value)
        if call.dropout > 0 and (queries.data or keys.data or values.data):
            self._recorder.in_training["dropout of fused attention"] = None

    def _ids(self, tensor: Tensor, abstract: AbstractValue) -> Tensor:
        """The token ids of queries or keys; of unknown tokens where they were lost."""
        if abstract.token_ids and not abstract.pairs:
            return abstract.token_ids[0]
        reason = abstract.lost_at or "a tensor that no input feeds"
        reason = "pairs of tokens" if abstract.pairs else reason
        return self._tracker.spaces.unknown(tensor.shape[:-1], reason).unsqueeze(-1)

    def _pass_over(
        self, result: Tensor, queries: AbstractValue, keys: AbstractValue, ids: Tensor | None
    ) -> Tensor:
        """The result of a call that was refused: its queries keep their tokens.

        Tokens are lost where the result has no places for them.
        """
        passed = AbstractValue(Role.TOKENS, (), queries.ancestors | keys.ancestors, data=True)
        if ids is None and queries.token_ids:
            ids = queries.token_ids[0]
        fits = ids is not None and ids.shape == result.shape and not queries.pairs
        self._tracker.abstract_values[result] = (
            passed._replace(token_ids=(ids,))
            if fits and ids is not None
            else passed.without_tokens("attention")
        )
        return result

    def _unsupported_values(self, keys: AbstractValue, values: AbstractValue) -> Reason | None:
        """Whether the values are of other tokens than the keys at their places."""
        if not values.data:
            return None
        if not values.token_ids or values.pairs:
            return values_lost(values)
        if not keys.token_ids:
            return None
        token_ids = keys.token_ids[0], values.token_ids[0]
        differ = self._tracker.spaces.cache.of(
            token_ids, "values", lambda: self._differ(*token_ids)
        )
        return OTHER_VALUES if differ else None

    def _differ(self, keys: Tensor, values: Tensor) -> bool:
        if varies(values, -1):
            return True
        of_keys, of_values = keys[..., 0], values[..., 0]
        shape = torch.Size(map(max, of_keys.shape, of_values.shape))
        spaces = self._tracker.spaces
        return not spaces.belong(of_keys.expand(shape), of_values.expand(shape))


def _ids_of_call(
    query: Tensor, key: Tensor, shape: torch.Size, *, grouped: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The tokens of queries and keys for each map, `[*lead, N]`, and those of the result.

    Args:
        query: token ids of the query, in its shape.
        key: token ids of the key.
        shape: that of the result.
        grouped: whether heads of the query share a head of the key.

    Returns:
        `None` if the axis of features holds tokens.
    """
    if varies(query, -1) or varies(key, -1):
        return None
    queries = _of_heads(query[..., 0], shape[:-2], grouped=False)
    keys = _of_heads(key[..., 0], shape[:-2], grouped=grouped)
    return queries, keys, queries.unsqueeze(-1).expand(shape)


def _of_heads(tokens: Tensor, lead: torch.Size, *, grouped: bool) -> Tensor:
    """The token ids `[..., N]` of queries or keys for each map of a call, `[*lead, N]`."""
    if grouped:
        tokens = tokens.repeat_interleave(lead[-1] // tokens.shape[-2], -2)
    return tokens if tokens.shape[:-1] == lead else tokens.expand(*lead, tokens.shape[-1])
