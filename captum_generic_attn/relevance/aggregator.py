"""Interface of the aggregation over calls: per-call attention maps in, relevance per token out.

`row_propagation`, `full_propagation` and `last_update` implement it for eq. 6 to 11, the baselines
for their own products and sums.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.relevance.attention_maps import AttentionMap

Own = Literal["zero", "keep"]
"""What the token of an example's only explained row gets: 0, or its value."""
OwnEntry = Literal[Own, "row_min"]
"""The same, or the least value of its row, which only `TransformerAttribution` offers."""


@dataclass(frozen=True)
class PropagationOptions:
    """Options of eq. 8 to 10, and the pairs (query stream, key stream) with cross-attention.

    `row_normalize` is rollout's: after each call the rows of its queries are rescaled to the sums
    that they had before it. `own`: what the token of an only explained row gets.
    """

    normalize: bool = True
    self_in_cross: bool = True
    cross_pairs: frozenset[tuple[str, str]] = frozenset()
    row_normalize: bool = False
    own: OwnEntry = "zero"

    def mutual(self, one: str, other: str) -> bool:
        """Whether two streams attend to each other."""
        return {(one, other), (other, one)} <= self.cross_pairs

    def known_to(self, stream: str) -> frozenset[str]:
        """The streams whose tokens can be relevant to a stream, itself included."""
        known = {stream}
        while more := {key for query, key in self.cross_pairs if query in known} - known:
            known |= more
        return frozenset(known)


class OutputRows(NamedTuple):
    """Explained rows of a stream: their weights `[B, size]`, and the state that they are read in.

    A state is the set of calls upstream of it.
    """

    weights: Tensor
    ancestors: frozenset[int]


def total_weights(rows: Sequence[OutputRows]) -> Tensor:
    """`[B, size]` weights of the explained rows of a stream, over all states."""
    return functools.reduce(torch.add, (part.weights for part in rows))


class Aggregator(ABC):
    """Receives the per-call maps during the backward pass and returns relevance per token."""

    @abstractmethod
    def add_output_rows(self, stream: str, rows: Sequence[OutputRows]) -> None:
        """Set the explained rows of a stream, each with its state."""

    @abstractmethod
    def add_map(self, index: int, attention_map: AttentionMap) -> None:
        """Add the map of the call `index`; calls come in the order of the backward pass."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """`[B, base tokens]` values of the tokens of each stream, after the backward pass."""


class BufferedAggregator(Aggregator):
    """An aggregator that keeps all maps until the backward pass is over, so it has matrices."""

    def __init__(self) -> None:
        self._maps: dict[int, AttentionMap] = {}
        self._output_rows: dict[str, Sequence[OutputRows]] = {}

    def add_output_rows(self, stream: str, rows: Sequence[OutputRows]) -> None:
        """Set the explained rows of a stream, each with its state."""
        self._output_rows[stream] = rows

    def add_map(self, index: int, attention_map: AttentionMap) -> None:
        """Keep the map of the call `index`."""
        self._maps[index] = attention_map.squeeze_expanded()

    @abstractmethod
    def matrices(self, states: Mapping[str, frozenset[int]]) -> dict[tuple[str, str], Tensor]:
        """`[B, size, base tokens]` relevance for each (query stream, key stream).

        Args:
            states: for each stream the state that it is read in. `result` comes first.
        """


def read_rows(
    relevance: Callable[[frozenset[int]], Tensor | None], rows: Sequence[OutputRows],
    columns: int, *, same_stream: bool,
) -> Tensor | None:  # fmt: skip
    """Values of a stream's tokens: the weighted explained rows of relevance.

    Args:
        relevance: `[B, N, columns]` of a state, `None` for zero. The result is used before the
            function is called again.
        rows: the explained rows with their states.
        columns: number of tokens that get values.
        same_stream: whether rows and columns are tokens of one stream.

    Returns:
        `[B, columns]`; `None` for zero between two streams.
    """
    weights = total_weights(rows)
    values = weights.new_zeros(len(weights), columns) if same_stream else None
    for part, ancestors in rows:
        state = relevance(ancestors)
        if state is not None:
            product = (part.unsqueeze(1) @ state).squeeze(1)
            values = product if values is None else values + product
    return values


def apply_own(values: Tensor, weights: Tensor, own: OwnEntry) -> Tensor:
    """Values of a stream's tokens, with `own` applied to the token of an only explained row.

    Args:
        values: `[B, n]`.
        weights: `[B, N]` weights of the explained rows of the same stream.
        own: `"keep"` leaves its value, anything else sets it to 0.

    Example:
        >>> apply_own(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]]), "zero")
        tensor([[0., 1.]])
    """
    if own == "keep":
        return values
    return values.masked_fill(self_entries(weights)[:, : values.shape[1]], 0.0)


def self_entries(weights: Tensor) -> Tensor:
    """`[B, N]` True for the token of an example's only explained row."""
    explained = weights != 0
    return explained & (explained.sum(-1, keepdim=True) == 1)
