"""Products in which the result of a softmax is a factor: what weighs what, and along which axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role, Softmax
from captum_generic_attn.capture.tracking.contraction import Contraction
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.tokens.ids import varies


class Product(NamedTuple):
    """A product of two tensors that the model asks for, and the function that computes it."""

    name: str
    terms: Contraction
    run: Callable[[], Tensor]


class Factor(NamedTuple):
    """One factor of a product: its tensor, the labels of its axes, and what is known of it.

    `summed` are those of its axes that the product sums over.
    """

    tensor: Tensor
    labels: tuple[str, ...]
    abstract: AbstractValue
    summed: list[int]

    @classmethod
    def of(cls, terms: Contraction, side: int, tracker: TokenTracker) -> Factor:
        """The left (0) or right (1) factor."""
        tensor, labels = (terms.left, terms.right)[side], terms.labels(side)
        gone = terms.summed
        summed = [i for i, label in enumerate(labels) if label in gone]
        return cls(tensor, labels, tracker.of(tensor), summed)


class Case(Enum):
    """What a product makes of weights that a softmax gave."""

    ATTENTION = "weights over tokens times these tokens, or others at their places"
    MIXED = "weights times a parameter: heads or features are mixed, no token is weighed"
    LOST = "a softmax over tokens that were lost weighs tokens"
    UNRELATED = "a softmax over other things than tokens, such as gates or channels"


@dataclass(frozen=True, eq=False)
class Weighing:
    """The weights of a softmax times values. `over_keys` are summed axes with different keys."""

    weights: Factor
    values: Factor
    out_labels: tuple[str, ...]
    softmax: Softmax
    over_keys: list[int]

    @classmethod
    def of(cls, terms: Contraction, side: int, tracker: TokenTracker) -> Weighing:
        """The product, with the weights as its left (0) or right (1) factor."""
        weights = Factor.of(terms, side, tracker)
        token_ids, softmax = weights.abstract.token_ids, weights.abstract.softmax
        assert softmax is not None  # noqa: S101 - only such a factor is asked for
        over_keys = [i for i in weights.summed if not token_ids or varies(token_ids[-1], i)]
        values = Factor.of(terms, 1 - side, tracker)
        return cls(weights, values, terms.out_labels, softmax, over_keys)

    @property
    def by_queries(self) -> bool:
        """Whether the softmax is of products of queries and keys."""
        return self.weights.abstract.role is Role.PROBABILITIES

    @property
    def case(self) -> Case:
        """What the product is."""
        if self._by_a_parameter:
            return Case.MIXED
        if self._lost and not self.by_queries:
            return Case.LOST
        learned = self._over_positions()
        weighs = self._over_tokens if learned is None else learned
        return Case.ATTENTION if weighs else Case.UNRELATED

    @property
    def _over_tokens(self) -> bool:
        """Whether the softmax runs over tokens of the data."""
        return self.by_queries or (self.softmax.over_tokens and self.weights.abstract.data)

    @property
    def _by_a_parameter(self) -> bool:
        """Whether the weights meet what is no token."""
        weights, values = self.weights.abstract, self.values.abstract
        by_keys = self.by_queries and self.over_keys
        if self._over_tokens and not values.data and not by_keys:
            return True
        return not weights.token_ids and values.role.is_weight

    @property
    def _lost(self) -> bool:
        """Whether the tokens of the weights were lost."""
        weights = self.weights.abstract
        known = weights.token_ids or weights.mixed
        return weights.data and not known and self.values.abstract.data

    def _over_positions(self) -> bool | None:
        """Whether learned weights run over positions of tokens; `None` of weights of the data."""
        weights, values = self.weights, self.values
        if weights.abstract.data or not values.abstract.token_ids or len(weights.summed) != 1:
            return None
        label = weights.labels[weights.summed[0]]
        return varies(values.abstract.token_ids[0], values.labels.index(label))

    @property
    def key_axes(self) -> list[int]:
        """The axes of the weights that may be the axis of keys."""
        if not self.over_keys or not self.weights.abstract.data:
            return self.weights.summed
        return self.over_keys

    @property
    def rows(self) -> list[int]:
        """The axes of the weights that the result has and the values do not have: of queries."""
        return [
            i for i, label in enumerate(self.weights.labels)
            if label in self.out_labels and label not in self.values.labels
        ]  # fmt: skip

    @property
    def has_own_features(self) -> bool:
        """Whether the values have an axis of their own, over which the weights are broadcast."""
        return any(
            n > 1 and label in self.out_labels and label not in self.weights.labels
            for n, label in zip(self.values.tensor.shape, self.values.labels, strict=True)
        )
