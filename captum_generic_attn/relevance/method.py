"""What attribution methods over attention differ in: the map of a call, what maps come to.

`explanation` finds the calls that count and the rows that are explained, and takes every call to a
`Method` as the backward pass comes by. `Generic` is the paper's; the others are in `baselines`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord
from captum_generic_attn.capture.blocks import Blocks
from captum_generic_attn.lrp.rule_sets import RuleSet
from captum_generic_attn.relevance.attention_maps import AttentionMap, BlockMap, DenseMap
from captum_generic_attn.relevance.calls import Layout, MappedCall, OwnEntry, Sum, Switches
from captum_generic_attn.relevance.equations import positive_evidence
from captum_generic_attn.relevance.full_propagation import WholeSum
from captum_generic_attn.relevance.row_propagation import Pullback, pulls_back

Rule = Callable[[Tensor, Tensor], Tensor]
"""From probabilities and their gradient, `[G, H, Nq, Nk]`, to the map of a call, `[G, Nq, Nk]`."""

Last = Literal["no", "crossing", "every"]
"""Of which pairs of streams the last call alone counts."""


@dataclass(frozen=True, eq=False)
class SeenCall:
    """An attention call whose gradient has come.

    `positions` tells where tokens stand in their stream. `rows` are the `[B, N]` weights of the
    explained rows, by stream: of a stream that is read directly they are there when all its last
    calls have been seen. `relevance` is what LRP gave the probabilities, `[G * H, Nq, Nk]`, if the
    method asks for it.
    """

    record: AttentionRecord
    blocks: Blocks
    layout: Layout
    rows: Mapping[str, Tensor]
    positions: Callable[[Tensor], Tensor]
    relevance: Tensor | None = None

    def attention(self) -> Tensor:
        """Probabilities, `[G, H, Nq, Nk]`."""
        return self._by_head(self.blocks.probabilities())

    def gradient(self) -> Tensor:
        """Their gradient, `[G, H, Nq, Nk]`."""
        return self._by_head(self.blocks.gradient())

    def propagated(self) -> Tensor:
        """Their relevance by LRP, `[G, H, Nq, Nk]`."""
        assert self.relevance is not None  # noqa: S101
        return self._by_head(self.relevance)

    def positions_of_queries(self) -> Tensor:
        """Positions of the queries in their stream, `[G, Nq]`, -1 for padding."""
        return self.positions(self.record.query_tokens)

    def positions_of_keys(self) -> Tensor:
        """Positions of the keys in their stream, `[G, Nk]`, -1 for padding."""
        return self.positions(self.record.key_tokens)

    def _by_head(self, maps: Tensor) -> Tensor:
        maps = maps.view(*self.record.pick.shape, *maps.shape[1:])
        return maps.to(torch.promote_types(maps.dtype, self.layout.like.dtype))

    def finite(self) -> bool:
        """Whether all that the call's map is made of is finite."""
        known = self.relevance is None or bool(self.relevance.isfinite().all())
        return known and self.blocks.finite()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """How one attribution method makes a map of a call, and values of all maps.

    `rules`: the LRP rules that it needs the relevance of probabilities by. `last`: of which pairs
    of streams the last call alone counts. `reads`: the rows that the score is computed from, or all
    rows alike. `own`: what the token of an example's only explained row gets.
    """

    last: ClassVar[Last] = "no"
    reads: ClassVar[Literal["explained", "all"]] = "explained"
    own: OwnEntry = "zero"

    @property
    def rules(self) -> RuleSet | None:
        """LRP rules, if relevance of the probabilities is needed."""
        return None

    @property
    def needs_all_heads(self) -> bool:
        """Whether the map of a call is no mere mean over heads: then one head alone has none."""
        return False

    @abstractmethod
    def heads_of(self, seen: SeenCall) -> Tensor | None:
        """The maps of a call's heads, `[G, H, Nq, Nk]`, if it has a map for each."""

    def map_of(self, seen: SeenCall) -> AttentionMap:
        """The map of a call: the mean of its heads'."""
        heads = self.heads_of(seen)
        assert heads is not None  # noqa: S101
        return whole_map(seen, heads.mean(1))

    @abstractmethod
    def sum_of(
        self, calls: Sequence[MappedCall], readers: Sequence[str], layout: Layout,
        crossings: frozenset[tuple[str, str]], *, matrices: bool,
    ) -> Sum:  # fmt: skip
        """What takes the maps and makes values of them.

        Args:
            calls: the calls that count, in execution order.
            readers: the streams whose rows are explained.
            layout: the streams, and where the tokens of calls stand in them.
            crossings: the pairs of streams (queries, keys) that attend across.
            matrices: whether matrices are asked for, not values alone.
        """


def whole_map(seen: SeenCall, matrix: Tensor) -> DenseMap:
    """A map that was computed, in the layer's share and the precision of relevance."""
    return DenseMap((matrix * seen.record.share).to(seen.layout.like.dtype))


@dataclass(frozen=True)
class Generic(Method):
    """Generic attention explainability: eq. 5, or `rule` in its place, and eq. 6 to 11.

    With `lrp`, the relevance of the probabilities takes their place in eq. 5.
    """

    normalize: bool = True
    self_in_cross: bool = True
    aggregate: bool = True
    rule: Rule | None = None
    lrp: RuleSet | None = None

    @property
    def rules(self) -> RuleSet | None:  # noqa: D102
        return self.lrp

    @property
    def needs_all_heads(self) -> bool:  # noqa: D102
        return self.rule is not None

    def heads_of(self, seen: SeenCall) -> Tensor | None:  # noqa: D102
        if self.rule is not None:
            return None
        attention = seen.attention() if self.lrp is None else seen.propagated()
        return positive_evidence(attention, seen.gradient())

    def map_of(self, seen: SeenCall) -> AttentionMap:  # noqa: D102
        record = seen.record
        if self.rule is None and self.lrp is None:
            return BlockMap(seen.blocks, record.heads, record.share, seen.layout.like.dtype)
        if self.rule is None:
            return super().map_of(seen)
        attention = seen.attention() if self.lrp is None else seen.propagated()
        found = self.rule(attention, seen.gradient())
        _check_map(found, attention, record)
        return whole_map(seen, found.detach())

    def sum_of(  # noqa: D102
        self, calls: Sequence[MappedCall], readers: Sequence[str], layout: Layout,
        crossings: frozenset[tuple[str, str]], *, matrices: bool,
    ) -> Sum:  # fmt: skip
        switches = Switches(
            self.normalize, self.self_in_cross, self.aggregate, crossings, own=self.own
        )
        if not matrices and pulls_back(calls, switches):
            return Pullback(calls, readers, layout, switches)
        return WholeSum(calls, layout, switches)


def _check_map(found: object, attention: Tensor, record: AttentionRecord) -> None:
    place = record.module or "the forward function"
    expected = attention.shape[0], *attention.shape[2:]
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != expected:
        raise ValueError(
            f"rule= must make of {tuple(attention.shape)} probabilities and gradients a map "
            f"{expected}, without the axis of heads; at {place} it made {shape}"
        )
    if isinstance(found, Tensor) and not bool(torch.isfinite(found).all()):
        raise ValueError(f"rule= made numbers that are not finite at {place}")
