"""Recognises attention that a model computes itself: from queries times keys to the values.

A product of two tensors that hold tokens gives logits, a softmax of logits gives probabilities, and
what probabilities are multiplied with is values. The product with values may also be written as an
element-wise product and a sum. `explicit_calls` takes over once weights meet values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.capture.constants import Constants, require_gradient
from captum_generic_attn.capture.explicit_calls import ExplicitCalls
from captum_generic_attn.capture.recorder import Recorder
from captum_generic_attn.capture.scope import Scope
from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role, Softmax
from captum_generic_attn.capture.tracking.contraction import Contraction, elementwise, relabel
from captum_generic_attn.capture.tracking.operations import argument
from captum_generic_attn.capture.tracking.state import WITHOUT_SOFTMAX
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.capture.unsupported import NO_SOFTMAX
from captum_generic_attn.capture.weighing import Factor, Product
from captum_generic_attn.tokens.ids import varies

_ROW_SUM_TOLERANCE = 1e-3


def _normalised(weights: Tensor, axis: int) -> bool:
    """Whether numbers are probabilities: none negative, and their sum along an axis is 1."""
    sums = weights.sum(axis)
    return bool((weights >= 0).all()) and bool(((sums - 1).abs() < _ROW_SUM_TOLERANCE).all())


class Attention:
    """Finds logits, probabilities and their products with values in one forward pass."""

    def __init__(
        self, tracker: TokenTracker, recorder: Recorder, scope: Scope, constants: Constants
    ) -> None:
        self._run = constants.run
        self._tracker = tracker
        self._recorder = recorder
        self._scope = scope
        self._calls = ExplicitCalls(tracker, recorder, scope)

    # -- softmax -------------------------------------------------------------------------------

    def softmax(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        """Note what a softmax returns: of logits, probabilities with keys along its axis."""
        operand = argument(args, kwargs, 0, "input")
        axis = argument(args, kwargs, 1, "dim", -1)
        abstract = self._tracker.of(operand)
        logits = abstract.role is Role.LOGITS
        along = [varies(ids, axis) for ids in abstract.token_ids]
        several = self._tracker.spaces.several
        apart = not logits and any(several(ids) for ids in abstract.token_ids)
        softmax = Softmax(*self._scope.current(), logits, any(along), apart)
        self._recorder.softmaxes.append(softmax)
        if logits and abstract.token_ids:
            if along == [True, False]:
                abstract = _keys_last(abstract)
            elif all(along) or (not any(along) and operand.shape[axis] > 1):
                abstract = abstract._replace(
                    token_ids=(), lost_at="softmax over neither queries nor keys"
                )
        role = Role.PROBABILITIES if logits else abstract.role
        self._tracker.abstract_values[result] = abstract._replace(
            role=role, softmax=softmax, calls=None, weighing=None
        )

    # -- products ------------------------------------------------------------------------------

    def product(
        self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any],
        terms: Contraction,
    ) -> Tensor:  # fmt: skip
        """Run a product of two tensors: attention, logits, or any other.

        Returns:
            The result, whose tokens are known from then on.
        """
        product = Product(name, terms, functools.partial(self._run, func, args, kwargs))
        left, right = (Factor.of(terms, side, self._tracker) for side in (0, 1))
        abstract_values = left.abstract, right.abstract
        for side, abstract in enumerate(abstract_values):
            if abstract.role is Role.PROBABILITIES or abstract.softmax is not None:
                return self._calls.multiply(product, side)
        for side, abstract in enumerate(abstract_values):
            if abstract.role is Role.LOGITS and self._may_be_weights(terms, side):
                return self._multiply_logits(product, side)
        return self._multiply_tokens(product, left, right)

    def _multiply_tokens(self, product: Product, left: Factor, right: Factor) -> Tensor:
        """Run a product of tokens with tokens, or with a parameter."""
        terms, abstract_values = product.terms, (left.abstract, right.abstract)
        result = product.run()
        of_one = left.abstract.data != right.abstract.data
        if of_one and not result.requires_grad and torch.is_grad_enabled():
            result = result.requires_grad_().clone()  # one-hot rows times a table: no leaf
        if all(abstract.data or abstract.role.of_tokens for abstract in abstract_values):
            by_hand = self._side_of_weights(terms)
            if by_hand is not None:
                return self._calls.multiply(product, by_hand)
            abstract = self._logits(terms, result, product.name)
        else:
            abstract = self._weighted(product, left, right, result)
        if terms.bias is not None:
            self._tracker.abstract_values[result] = abstract
            abstract = self._tracker.summed(product.name, [result, terms.bias], result)
        self._tracker.abstract_values[result] = abstract
        return result

    def _weighted(
        self, product: Product, left: Factor, right: Factor, result: Tensor
    ) -> AbstractValue:
        """What is known of a product of tokens and a parameter, as of a linear layer."""
        tokens = left if left.abstract.data or not right.abstract.data else right
        return self._tracker.weighted(
            tokens.tensor, tokens.labels, product.terms.out_labels, product.terms.summed, result,
            product.name,
        )  # fmt: skip

    def _logits(self, terms: Contraction, result: Tensor, name: str) -> AbstractValue:
        """What is known of a product of tokens and tokens: it may be of queries and keys."""
        token_ids: list[Tensor] = []
        abstract_values: list[AbstractValue] = []
        mixed = False
        for side, tensor in enumerate((terms.left, terms.right)):
            labels = terms.labels(side)
            features_summed = labels[-1] in terms.summed
            abstract = (
                self._tracker.tokens_of(tensor, name)
                if features_summed
                else self._tracker.of(tensor)
            )
            abstract_values.append(abstract)
            ids = (
                abstract.token_ids[0]
                if abstract.token_ids
                else self._lost_tokens(tensor, terms, side)
            )
            carried = relabel(ids, labels, terms.out_labels, result.shape)
            mixed |= carried is None
            if carried is None:
                self._check_pooled(abstract, ids)
            token_ids.append(ids if carried is None else carried)
        return AbstractValue(
            Role.LOGITS,
            () if mixed else tuple(token_ids),
            abstract_values[0].ancestors | abstract_values[1].ancestors,
            factors=tuple(s.ancestors for s in abstract_values),
            data=any(s.data for s in abstract_values),
            mixed=mixed,
        )

    def _check_pooled(self, abstract: AbstractValue, ids: Tensor) -> None:
        """Note pooled tokens that a product with tokens sums over: no softmax is there."""
        pools = self._tracker.pools
        for call in abstract.ancestors & pools.keys():
            if pools[call].queries & set(self._tracker.spaces.indices(ids)):
                pools[call].problem = WITHOUT_SOFTMAX

    def _lost_tokens(self, tensor: Tensor, terms: Contraction, side: int) -> Tensor:
        reason = self._tracker.of(tensor).lost_at or "an operation that is not known"
        shape = torch.Size(
            1 if label in terms.summed else n
            for label, n in zip(terms.labels(side), tensor.shape, strict=True)
        )
        return self._tracker.spaces.unknown(shape, reason).expand(tensor.shape)

    # -- weights that were normalised without a softmax ----------------------------------------

    def _multiply_logits(self, product: Product, side: int) -> Tensor:
        """Logits times values: attention if the logits were normalised by hand, else refused."""
        factor = Factor.of(product.terms, side, self._tracker)
        abstract = factor.abstract
        if len(factor.summed) == 1 and not abstract.mixed:
            (axis,) = factor.summed
            if _normalised(factor.tensor, axis):
                softmax = Softmax(*self._scope.current(), has_logits=True, over_tokens=True)
                if [varies(ids, axis) for ids in abstract.token_ids] == [True, False]:
                    abstract = _keys_last(abstract)
                self._tracker.abstract_values[factor.tensor] = abstract._replace(
                    role=Role.PROBABILITIES, softmax=softmax
                )
                return self._calls.multiply(product, side)
        result = product.run()
        self._recorder.refuse(NO_SOFTMAX)
        return self._calls.pass_over(product.name, product.terms, result)

    def _may_be_weights(self, terms: Contraction, side: int) -> bool:
        """Whether logits in a product are data, or weights that were made of parameters."""
        factor, other = (Factor.of(terms, i, self._tracker) for i in (side, 1 - side))
        if factor.abstract.data:
            return other.abstract.data
        if len(factor.summed) != 1 or len(factor.abstract.token_ids) != 2:
            return False
        return other.abstract.role.of_tokens and _normalised(factor.tensor, factor.summed[0])

    def _side_of_weights(self, terms: Contraction) -> int | None:
        """Which factor holds weights over tokens that were normalised by hand; notes it."""
        return next((side for side in (0, 1) if self._weighs_by_hand(terms, side)), None)

    def _weighs_by_hand(self, terms: Contraction, side: int) -> bool:
        factor = Factor.of(terms, side, self._tracker)
        abstract = factor.abstract
        if abstract.role is not Role.TOKENS or not abstract.data or len(abstract.token_ids) != 1:
            return False
        if len(factor.summed) != 1 or not varies(abstract.token_ids[0], factor.summed[0]):
            return False
        if not _normalised(factor.tensor, factor.summed[0]):
            return False
        softmax = Softmax(*self._scope.current(), has_logits=False, over_tokens=True)
        self._tracker.abstract_values[factor.tensor] = abstract._replace(softmax=softmax)
        return True

    # -- an element-wise product of weights and tokens, then a sum -----------------------------

    def weighs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Contraction | None:
        """The element-wise product of weights and tokens that a sum would make attention.

        The weights are broadcast over the features of what they weigh.
        """
        if len(args) != 2 or kwargs or not all(isinstance(value, Tensor) for value in args):
            return None
        for side in (0, 1):
            weights, values = args[side], args[1 - side]
            if not self._may_weigh(weights, values):
                continue
            terms = elementwise(*args)
            if not _broadcast(terms, side, values):
                continue
            abstract = self._tracker.abstract_values[weights]
            if abstract.softmax is not None:
                abstract.softmax.gates |= abstract.data and bool(abstract.token_ids)
            if abstract.softmax is not None or abstract.pairs:
                require_gradient(weights)
            return terms
        return None

    def _may_weigh(self, weights: Tensor, values: Tensor) -> bool:
        """Whether a factor may hold weights over the tokens of the other."""
        abstract = self._tracker.abstract_values.get(weights)
        if abstract is None or weights.ndim == 0 or values.ndim == 0:
            return False
        other = self._tracker.of(values)
        if other.pairs or other.softmax is not None:
            return False
        return self._may_hold_weights(abstract) and (other.data or abstract.pairs)

    def _may_hold_weights(self, abstract: AbstractValue) -> bool:
        """Whether numbers may be weights over tokens: of a softmax, learned, or made by hand."""
        if abstract.pairs:
            return bool(abstract.token_ids)
        if abstract.softmax is not None:
            return not abstract.data or abstract.softmax.over_tokens or not abstract.token_ids
        one = abstract.role is Role.TOKENS and abstract.data and len(abstract.token_ids) == 1
        return one and bool(self._tracker.spaces.token_axes(abstract.token_ids[0]))

    def summed(
        self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any],
        terms: Contraction,
    ) -> Tensor | None:  # fmt: skip
        """Run the sum of an element-wise product if both are attention; `None` if they are not."""
        product: Tensor = args[0]
        self._tracker.abstract_values[product] = self._tracker.of(product)._replace(weighing=None)
        labels = _labels_of_sum(terms, args, kwargs)
        if labels is None:
            return None
        terms = replace(terms, out_labels=labels)
        whole = Product(name, terms, functools.partial(self._run, func, args, kwargs))
        for side in (0, 1):
            if not self._sums_over_tokens(terms, side):
                continue
            abstract = self._tracker.of((terms.left, terms.right)[side])
            if abstract.softmax is not None or self._weighs_by_hand(terms, side):
                return self._calls.multiply(whole, side)
            if abstract.pairs and self._may_be_weights(terms, side):
                return self._multiply_logits(whole, side)
        return None

    def _sums_over_tokens(self, terms: Contraction, side: int) -> bool:
        """Whether a sum runs over the tokens that a factor would weigh, as far as is known."""
        abstract, labels = self._tracker.of((terms.left, terms.right)[side]), terms.labels(side)
        if abstract.data and not abstract.token_ids and abstract.softmax is not None:
            return bool(terms.summed)
        return any(
            label in terms.summed and (not abstract.data or varies(ids, i))
            for ids in abstract.token_ids[0 if abstract.softmax is None else -1 :]
            for i, label in enumerate(labels)
        )


def _keys_last(abstract: AbstractValue) -> AbstractValue:
    """Logits whose first factor were the keys, with the queries first."""
    return abstract._replace(token_ids=abstract.token_ids[::-1], factors=abstract.factors[::-1])


def _broadcast(terms: Contraction, side: int, values: Tensor) -> bool:
    """Whether one factor is broadcast over an axis of the other, as weights over features are."""
    labels, others = terms.labels(side), terms.labels(1 - side)
    return any(n > 1 and label not in labels for n, label in zip(values.shape, others, strict=True))


def _labels_of_sum(
    terms: Contraction, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, ...] | None:
    """The labels that the sum of an element-wise product has; `None` if it names no axes."""
    axes = argument(args, kwargs, 1, "dim", kwargs.get("axis"))
    axes = [axes] if isinstance(axes, int) else axes
    if not isinstance(axes, (list, tuple)):
        return None
    gone = {terms.out_labels[axis] for axis in axes}
    keep = bool(argument(args, kwargs, 2, "keepdim", default=False))
    return tuple(
        f"kept {label}" if label in gone else label
        for label in terms.out_labels if keep or label not in gone
    )  # fmt: skip
