"""Attention that a model computes itself: weights of a softmax times values.

A product that is attention is recorded, one that looks like attention and cannot be explained is
refused, and any other is computed and its tokens are tracked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.capture.constants import require_gradient
from captum_generic_attn.capture.record import Explicit
from captum_generic_attn.capture.recorder import CallTokens, Recorder
from captum_generic_attn.capture.scope import Scope
from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.contraction import Contraction, relabel
from captum_generic_attn.capture.tracking.state import Pool
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.capture.unsupported import (
    BROADCAST_QUERY,
    CHANNELS,
    LEARNED_WEIGHTS,
    NO_QUERIES_AND_KEYS,
    OTHER_VALUES,
    PROBABILITIES_TWICE,
    SPLIT_PRODUCT,
    Reason,
    unknown_layout,
    values_lost,
    weights_lost,
)
from captum_generic_attn.capture.weighing import Case, Product, Weighing
from captum_generic_attn.tokens.ids import first_along, squeeze_expanded, varies


class _Planes(NamedTuple):
    """Token ids of queries and of keys, each in the shape of the weights, and their calls."""

    queries: Tensor
    keys: Tensor
    rows: list[int]
    ancestors: tuple[frozenset[int], frozenset[int]]


class ExplicitCalls:
    """Records the calls of one forward pass whose probabilities the model computes itself."""

    def __init__(self, tracker: TokenTracker, recorder: Recorder, scope: Scope) -> None:
        self._tracker = tracker
        self._recorder = recorder
        self._scope = scope

    def multiply(self, product: Product, side: int) -> Tensor:
        """Run a product in which a softmax gave the left (0) or right (1) factor.

        Returns:
            The result, whose tokens are known from then on.
        """
        weighing = Weighing.of(product.terms, side, self._tracker)
        case = weighing.case
        if case is Case.MIXED:
            return self._mix(product, weighing)
        if case is Case.UNRELATED:
            return self._pass_unrelated(product, weighing)
        weighing.softmax.products += 1
        if case is Case.LOST:
            reason: Reason | None = weights_lost(weighing.weights.abstract)
        else:
            reason = self._unsupported(weighing)
        if reason is not None:
            self._recorder.refuse(reason)
            return self.pass_over(product.name, product.terms, product.run())
        return self._record(product, weighing)

    def _mix(self, product: Product, weighing: Weighing) -> Tensor:
        """The product with a parameter."""
        result, weights = product.run(), weighing.weights
        self._tracker.abstract_values[result] = self._tracker.weighted(
            weights.tensor, weights.labels, weighing.out_labels, product.terms.summed, result,
            product.name,
        )  # fmt: skip
        return result

    def _pass_unrelated(self, product: Product, weighing: Weighing) -> Tensor:
        """The product with a softmax over no tokens, refused where it stands for attention."""
        result, softmax = product.run(), weighing.softmax
        if softmax.over_tokens or softmax.in_attention_module:
            softmax.products += 1
            self._recorder.refuse(NO_QUERIES_AND_KEYS)
        return self.pass_over(product.name, product.terms, result)

    def pass_over(self, name: str, terms: Contraction, result: Tensor) -> Tensor:
        """The result of a product that is no record: its queries keep their tokens.

        The user may accept refused calls (`strict=False`, `layers=`). Tokens are lost where the
        result has no places for them.
        """
        abstract_values = [self._tracker.of(tensor) for tensor in (terms.left, terms.right)]
        ancestors = frozenset[int]().union(*(s.ancestors for s in abstract_values))
        passed = AbstractValue(Role.TOKENS, ancestors=ancestors, data=True)
        found = passed.without_tokens(next((s.lost_at for s in abstract_values if s.lost_at), name))
        for side in sorted((0, 1), key=lambda side: not abstract_values[side].pairs):
            if not abstract_values[side].token_ids:
                continue
            labels = terms.labels(side)
            ids = relabel(
                abstract_values[side].token_ids[0], labels, terms.out_labels, result.shape
            )
            if ids is not None:
                found = passed._replace(token_ids=(ids,))
                break
        self._tracker.abstract_values[result] = found
        return result

    # -- records -------------------------------------------------------------------------------

    def _record(self, product: Product, weighing: Weighing) -> Tensor:
        weights, key = weighing.weights.tensor, weighing.key_axes[0]
        require_gradient(weights)
        result = product.run()
        token_ids = (
            self._of_queries(weighing) if weighing.by_queries else self._of_pool(weighing, key)
        )
        source = self._source(weighing, token_ids.rows, key)
        labels = weighing.weights.labels
        ids = relabel(token_ids.queries, labels, weighing.out_labels, result.shape)
        queries, keys = (p.permute(source.order) for p in (token_ids.queries, token_ids.keys))
        if source.single_query:
            queries, keys = queries.unsqueeze(-2), keys.unsqueeze(-2)
        tokens = CallTokens(
            first_along(queries, -1).squeeze(-1),
            first_along(keys, -2).squeeze(-2),
            ids,
            token_ids.ancestors,
        )
        index = self._recorder.record(source, weights, result, tokens, weighing.softmax)
        if index is not None:
            self._observe(index, weighing, result, ids)
            if not weighing.by_queries:
                spaces = self._tracker.spaces
                pooled, pooled_from = (frozenset(spaces.indices(p)) for p in token_ids[:2])
                self._tracker.pools[index] = Pool(pooled, pooled_from)
        return result

    def _of_queries(self, weighing: Weighing) -> _Planes:
        """The tokens of a softmax of queries times keys."""
        abstract, values = weighing.weights.abstract, weighing.values.abstract
        queries, keys = abstract.token_ids
        rows = [i for i in weighing.rows if varies(queries, i)] or weighing.rows[-1:]
        ancestors = abstract.factors[0], abstract.factors[1] | values.ancestors
        return _Planes(queries, self._keys_or_values(weighing, keys), rows, ancestors)

    def _of_pool(self, weighing: Weighing, key: int) -> _Planes:
        """The tokens of weights that no token asks for, as in attention pooling."""
        abstract, values = weighing.weights.abstract, weighing.values.abstract
        keys = abstract.token_ids[0] if abstract.data else self._tokens_of_values(weighing)
        queries = self._pooled_tokens(weighing, keys, key)
        ancestors = frozenset[int](), abstract.ancestors | values.ancestors
        return _Planes(queries, keys, weighing.rows, ancestors)

    def _source(self, weighing: Weighing, rows: list[int], key: int) -> Explicit:
        weights, labels = weighing.weights.tensor, weighing.weights.labels
        lead = [i for i in range(weights.ndim) if i not in (key, *rows[-1:])]
        order = (*lead, *rows[-1:], key)
        of_result = tuple(labels.index(x) if x in labels else None for x in weighing.out_labels)
        return Explicit(self._recorder.operands(weights), order, not rows, of_result)

    def _observe(self, index: int, weighing: Weighing, result: Tensor, ids: Tensor | None) -> None:
        witness, weights = self._recorder.witness, weighing.weights
        if witness is not None and ids is not None:
            logits = weights.abstract.token_ids if weighing.by_queries else ()
            values = weighing.values.tensor, weighing.values.abstract.token_ids
            witness.see(index, result, ids, logits=(weights.tensor, logits), values=values)

    def _keys_or_values(self, weighing: Weighing, keys: Tensor) -> Tensor:
        """The tokens of the keys; of the values where the keys are constants."""
        values = weighing.values
        if not values.abstract.token_ids or bool((squeeze_expanded(keys) >= 0).all()):
            return keys
        labels = weighing.weights.labels
        tokens = relabel(values.abstract.token_ids[0], values.labels, labels, keys.shape)
        return keys if tokens is None else torch.where(keys < 0, tokens, keys)

    def _tokens_of_values(self, weighing: Weighing) -> Tensor:
        """The tokens that learned weights run over, in the shape of the weights."""
        weights, values = weighing.weights, weighing.values
        shape = weights.tensor.shape
        ids = relabel(values.abstract.token_ids[0], values.labels, weights.labels, shape)
        assert ids is not None  # noqa: S101 - values with several tokens in a row are refused
        return ids

    def _pooled_tokens(self, weighing: Weighing, keys: Tensor, key: int) -> Tensor:
        """New tokens as the queries of a pool: one for each row of weights and each window.

        They are the same for all examples, as tokens of a parameter are.
        """
        spaces, weights = self._tracker.spaces, weighing.weights.tensor
        apart = set(weighing.rows) | (spaces.token_axes(keys) - {key})
        shape = [n if i in apart else 1 for i, n in enumerate(weights.shape)]
        name = self._scope.current()[0] or "pooled"
        ids = spaces.of_parameter(name, torch.Size([*shape, 1])).squeeze(-1)
        return ids.expand(weights.shape)

    # -- calls that cannot be explained --------------------------------------------------------

    def _unsupported(self, weighing: Weighing) -> Reason | None:
        """Why a call cannot be explained; `None` if it can be."""
        reason = self._unsupported_weights(weighing) or self._unsupported_values(weighing)
        if reason is None and not weighing.by_queries:
            reason = self._unsupported_pool(weighing)
        return reason

    def _unsupported_weights(self, weighing: Weighing) -> Reason | None:
        abstract = weighing.weights.abstract
        if abstract.mixed:
            return CHANNELS
        if weighing.values.abstract.role is Role.PROBABILITIES:
            return PROBABILITIES_TWICE
        if weighing.softmax.products > 1:
            return SPLIT_PRODUCT
        count = 2 if weighing.by_queries else 1
        if len(weighing.key_axes) != 1 or (abstract.data and len(abstract.token_ids) != count):
            return unknown_layout(abstract)
        return None

    def _unsupported_values(self, weighing: Weighing) -> Reason | None:
        """Whether the values are of other tokens than the keys at their places."""
        weights, values = weighing.weights, weighing.values
        if not values.abstract.data:
            return None
        if not values.abstract.token_ids or values.abstract.pairs:
            return values_lost(values.abstract)
        if not weights.abstract.data:  # learned weights: the values are their own keys
            return None
        token_ids = weights.abstract.token_ids[-1], values.abstract.token_ids[0]
        question = "values", weights.labels, values.labels
        differ = self._tracker.spaces.cache.of(token_ids, question, lambda: self._differ(weighing))
        return OTHER_VALUES if differ else None

    def _differ(self, weighing: Weighing) -> bool:
        weights, values = weighing.weights, weighing.values
        common = [label for label in weights.labels if label in values.labels]
        shape = torch.Size(
            max(
                weights.tensor.shape[weights.labels.index(label)],
                values.tensor.shape[values.labels.index(label)],
            )
            for label in common
        )
        of_keys = relabel(weights.abstract.token_ids[-1], weights.labels, common, shape)
        of_values = relabel(values.abstract.token_ids[0], values.labels, common, shape)
        if of_keys is None or of_values is None:
            return True
        return not self._tracker.spaces.belong(of_keys, of_values)

    def _unsupported_pool(self, weighing: Weighing) -> Reason | None:
        """Whether weights that no token asks for are none of whole tokens.

        Where they differ along an axis that is none of queries, windows, examples or heads, each
        feature of a token has weights of its own.
        """
        abstract, shape = weighing.weights.abstract, weighing.weights.tensor.shape
        known = {weighing.key_axes[0], *weighing.rows, *self._token_and_example_axes(abstract)}
        heads = [i for i, n in enumerate(shape) if n > 1 and i not in known]
        if heads and not weighing.has_own_features:
            return CHANNELS
        if abstract.guided:
            return BROADCAST_QUERY
        if not abstract.data and any(shape[i] > 1 for i in weighing.rows):
            return LEARNED_WEIGHTS
        return None

    def _token_and_example_axes(self, abstract: AbstractValue) -> set[int]:
        """The axes of weights along which tokens and examples differ."""
        spaces = self._tracker.spaces
        tokens = spaces.token_axes(abstract.token_ids[0]) if abstract.token_ids else frozenset()
        examples = spaces.example_axes(abstract.token_ids[0]) if abstract.data else frozenset({0})
        return {*tokens, *examples}
