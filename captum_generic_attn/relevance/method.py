"""Interface of attention-based methods: one call's attention becomes a map, all maps relevance.

`backward` finds the calls that count and the rows that are explained, and hands every call to the
method when its gradient is there. `GenericAttention` and each baseline implement `Method`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from captum_generic_attn.capture import AttentionRecord
from captum_generic_attn.capture.blocks import Blocks
from captum_generic_attn.relevance.aggregator import Aggregator, OwnEntry
from captum_generic_attn.relevance.attention_maps import (
    AttentionMap,
    BlockMap,
    DenseMap,
    ElementwiseRule,
)
from captum_generic_attn.relevance.calls import IndexedCall, TokenIndexing

if TYPE_CHECKING:
    from captum_generic_attn.lrp.rule_sets import RuleSet

Layers = str | nn.Module | Sequence[str | nn.Module] | None
"""What `layers=` takes: module names, name prefixes or modules; `None` for all."""

KeepLast = Literal["none", "cross", "all"]
"""For which (query stream, key stream) pairs only the last call is used."""


@dataclass(frozen=True, eq=False)
class CallGradients:
    """An attention call whose gradient has arrived.

    `positions` gives the positions of tokens in their stream. `rows` are the `[B, N]` weights of
    the explained rows by stream; those of a stream that the score reads are there once the
    gradients of all its last calls have arrived. `relevance` is the relevance of the probabilities
    by LRP, `[G * H, Nq, Nk]`, if the method asks for it.
    """

    record: AttentionRecord
    blocks: Blocks
    indexing: TokenIndexing
    rows: Mapping[str, Tensor]
    positions: Callable[[Tensor], Tensor]
    relevance: Tensor | None = None

    def attention(self) -> Tensor:
        """The probabilities, `[G, H, Nq, Nk]`."""
        return self._by_head(self.blocks.probabilities())

    def gradient(self) -> Tensor:
        """Their gradient, `[G, H, Nq, Nk]`."""
        return self._by_head(self.blocks.gradient())

    def propagated(self) -> Tensor:
        """Their relevance by LRP, `[G, H, Nq, Nk]`."""
        assert self.relevance is not None  # noqa: S101 - the method has `lrp_rules`
        return self._by_head(self.relevance)

    def query_positions(self) -> Tensor:
        """Positions of the queries in their stream, `[G, Nq]`, -1 for padding."""
        return self.positions(self.record.query_tokens)

    def key_positions(self) -> Tensor:
        """Positions of the keys in their stream, `[G, Nk]`, -1 for padding."""
        return self.positions(self.record.key_tokens)

    def dense_map(self, matrix: Tensor) -> DenseMap:
        """A map of the method, `[G, Nq, Nk]`: this call's fraction of the mean over heads, in the
        precision of relevance.
        """
        return DenseMap((matrix * self.record.head_fraction).to(self.indexing.like.dtype))

    def block_map(self, rule: ElementwiseRule) -> BlockMap:
        """The mean over heads of an element-wise rule, computed block by block."""
        record = self.record
        return BlockMap(
            self.blocks, rule, record.heads, record.head_fraction, self.indexing.like.dtype
        )

    def _by_head(self, maps: Tensor) -> Tensor:
        maps = maps.view(*self.record.head_index.shape, *maps.shape[1:])
        return maps.to(torch.promote_types(maps.dtype, self.indexing.like.dtype))


class Method(ABC):
    """How one method makes an attention map of each call, and relevance of all maps.

    A method with an element-wise rule (`elementwise_rule`) needs nothing more for its maps. Others
    define `head_maps`, or `call_map` too where a map is not the mean over heads.

    Attributes:
        keep_last: for which pairs of streams only the last call is used.
        row_source: whether the rows that the score is computed from are read, or all rows alike.
        layers: the modules whose calls are used, as in `GenericAttention`.
        start_layer: how many calls of each pair of streams are left out, as in `GenericAttention`.
        own: what the token of an example's only explained row gets.
    """

    keep_last: ClassVar[KeepLast] = "none"
    row_source: ClassVar[Literal["explained", "all"]] = "explained"
    layers: Layers = None
    start_layer: int = 0
    own: OwnEntry = "zero"

    @property
    def lrp_rules(self) -> RuleSet | None:
        """The rules, if the method needs the relevance of probabilities by LRP."""
        return None

    @property
    def needs_all_heads(self) -> bool:
        """Whether a call's map depends on all heads jointly, so that no head has one of its own."""
        return False

    @property
    def elementwise_rule(self) -> ElementwiseRule | None:
        """The rule of a head's map, if it is element-wise in probabilities and gradient."""
        return None

    def head_maps(self, call: CallGradients) -> Tensor | None:
        """The maps of a call's heads, `[G, H, Nq, Nk]`; `None` if heads have no map of their own.

        The default applies `elementwise_rule`.
        """
        rule = self.elementwise_rule
        return None if rule is None else rule(call.attention(), call.gradient())

    def call_map(self, call: CallGradients) -> AttentionMap:
        """The map of a call: by default the mean of the maps of its heads."""
        if self.elementwise_rule is not None:
            return call.block_map(self.elementwise_rule)
        heads = self.head_maps(call)
        if heads is None:
            raise NotImplementedError(f"{type(self).__name__} defines neither rule nor map")
        return call.dense_map(heads.mean(1))

    @abstractmethod
    def aggregator(
        self, calls: Sequence[IndexedCall], output_streams: Sequence[str], indexing: TokenIndexing,
        cross_pairs: frozenset[tuple[str, str]], *, matrices: bool,
    ) -> Aggregator:  # fmt: skip
        """What combines the maps into relevance.

        Args:
            calls: the calls that are used, in execution order.
            output_streams: the streams whose rows are explained.
            indexing: the streams, and where the tokens of calls stand in them.
            cross_pairs: the pairs (query stream, key stream) with cross-attention.
            matrices: whether `[B, N, M]` matrices are asked for; else values per token suffice.
        """
