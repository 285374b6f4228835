"""The baselines as methods: the map of a call, and how maps are combined.

One line of the table in `docs/baselines.md` each; the classes of `baselines` make them of the
user's options.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from captum_generic_attn.baselines.composition import Composition, Total
from captum_generic_attn.baselines.maps import LateMap, min_max
from captum_generic_attn.lrp.rule_sets import RuleSet
from captum_generic_attn.relevance.attention_maps import AttentionMap
from captum_generic_attn.relevance.calls import Layout, MappedCall, Sum
from captum_generic_attn.relevance.equations import positive_evidence
from captum_generic_attn.relevance.method import Last, Method, SeenCall, whole_map

Scale = Literal["minmax"] | None
WeightsFrom = Literal["explained_rows", "all"]


class _Composed(Method):
    """Self-attention and crossing calls, combined by a `Composition` with these options."""

    last: ClassVar[Last] = "crossing"

    @property
    @abstractmethod
    def options(self) -> Mapping[str, Any]:
        """Options of `Composition`."""

    def sum_of(
        self, calls: Sequence[MappedCall], readers: Sequence[str], layout: Layout,  # noqa: ARG002
        crossings: frozenset[tuple[str, str]], *, matrices: bool,  # noqa: ARG002
    ) -> Sum:  # fmt: skip
        return Composition(calls, layout, own=self.own, **self.options)


class _LastCalls(_Composed):
    """The last call of each pair of streams stands for itself."""

    last: ClassVar[Last] = "every"

    @property
    def options(self) -> Mapping[str, Any]:
        return {"identity": False}


@dataclass(frozen=True)
class Raw(_LastCalls):
    """`E A` of the last calls."""

    def heads_of(self, seen: SeenCall) -> Tensor:  # noqa: D102
        return seen.attention()


@dataclass(frozen=True)
class GradCam(_LastCalls):
    """`relu(E w A)` of the last calls, `w` the mean of a head's gradient."""

    weights_from: WeightsFrom
    scale: Scale

    @property
    def needs_all_heads(self) -> bool:  # noqa: D102
        return True

    def heads_of(self, seen: SeenCall) -> Tensor:  # noqa: D102
        gradient = seen.gradient()
        counted = self._counted(seen, gradient)
        total = counted.sum((-2, -1), keepdim=True)
        share = counted / total.clamp(min=torch.finfo(total.dtype).tiny)
        return (gradient * share).sum((-2, -1), keepdim=True) * seen.attention()

    def map_of(self, seen: SeenCall) -> AttentionMap:  # noqa: D102
        return LateMap(lambda: self._map(seen))

    def _map(self, seen: SeenCall) -> Tensor:
        heads = self.heads_of(seen)
        found = whole_map(seen, heads.mean(1).clamp(min=0)).matrix
        if self.scale is None:
            return found
        counted = self._counted(seen, heads)[:, 0] > 0
        return min_max(found, seen.record.examples, counted.expand_as(found))

    def _counted(self, seen: SeenCall, like: Tensor) -> Tensor:
        """`[G, 1, Nq, Nk]`, how much each entry of the gradient counts for the head's weight.

        All alike; or those of the explained rows, without the column of their own token where that
        gets 0. In a stream of which no row is explained, all alike too.
        """
        record, layout = seen.record, seen.layout
        everything = like.new_ones(1, 1, 1, 1).expand(len(like), 1, *like.shape[-2:])
        if self.weights_from == "all" or record.query_stream not in seen.rows:
            return everything
        weights = seen.rows[record.query_stream].to(like)
        queries = seen.positions_of_queries()
        asking = layout.gather(weights.unsqueeze(1), record.examples, queries, record.query_stream)
        counted = asking.mT.unsqueeze(1) * everything
        if record.meeting.crosses or self.own == "keep":
            return counted
        keys = seen.positions_of_keys()
        single = ((weights != 0).sum(-1) == 1)[record.examples.to(weights.device)]
        own = (queries.unsqueeze(-1) == keys.unsqueeze(-2)).to(like.device)
        return counted.masked_fill((own & single.view(-1, 1, 1)).unsqueeze(1), 0.0)


@dataclass(frozen=True)
class Rollout(_Composed):
    """Products of `I + E A`, with the last crossing call between those of both sides."""

    row_normalize: bool

    @property
    def options(self) -> Mapping[str, Any]:  # noqa: D102
        return {"between": True, "row_normalize": self.row_normalize}

    @property
    def needs_all_heads(self) -> bool:  # noqa: D102
        return self.row_normalize

    def heads_of(self, seen: SeenCall) -> Tensor:  # noqa: D102
        return seen.attention()


@dataclass(frozen=True)
class PositiveGradient(Method):
    """`E relu(∇A)` of all calls, averaged over the queries and summed."""

    reads: ClassVar[Literal["explained", "all"]] = "all"

    def heads_of(self, seen: SeenCall) -> Tensor:  # noqa: D102
        # What a mask hides has a gradient, but no attention.
        return seen.gradient().clamp(min=0).masked_fill(seen.attention() == 0, 0.0)

    def sum_of(  # noqa: D102
        self, calls: Sequence[MappedCall], readers: Sequence[str], layout: Layout,  # noqa: ARG002
        crossings: frozenset[tuple[str, str]], *, matrices: bool,  # noqa: ARG002
    ) -> Sum:  # fmt: skip
        return Total(calls, layout)


@dataclass(frozen=True)
class LrpWeighted(_Composed):
    """Products of `I + E relu(∇A ⊙ C)`, and the last crossing call alone."""

    lrp: RuleSet
    row_normalize: bool

    @property
    def options(self) -> Mapping[str, Any]:  # noqa: D102
        return {"row_normalize": self.row_normalize}

    @property
    def rules(self) -> RuleSet:  # noqa: D102
        return self.lrp

    @property
    def needs_all_heads(self) -> bool:  # noqa: D102
        return self.row_normalize

    def heads_of(self, seen: SeenCall) -> Tensor:  # noqa: D102
        return positive_evidence(seen.propagated(), seen.gradient())


@dataclass(frozen=True)
class LrpAlone(_LastCalls):
    """`E C` of the last calls."""

    lrp: RuleSet
    clamp: bool
    scale: Scale

    @property
    def rules(self) -> RuleSet:  # noqa: D102
        return self.lrp

    @property
    def needs_all_heads(self) -> bool:  # noqa: D102
        return self.scale is not None

    def heads_of(self, seen: SeenCall) -> Tensor:  # noqa: D102
        found = seen.propagated()
        return found.clamp(min=0) if self.clamp else found

    def map_of(self, seen: SeenCall) -> AttentionMap:  # noqa: D102
        found = whole_map(seen, self.heads_of(seen).mean(1))
        if self.scale is None:
            return found
        return type(found)(min_max(found.matrix, seen.record.examples))


@dataclass(frozen=True)
class LrpRolled(_Composed):
    """Products of `I + E relu(C)`, with the last crossing call between those of both sides."""

    lrp: RuleSet

    @property
    def options(self) -> Mapping[str, Any]:  # noqa: D102
        return {"between": True}

    @property
    def rules(self) -> RuleSet:  # noqa: D102
        return self.lrp

    def heads_of(self, seen: SeenCall) -> Tensor:  # noqa: D102
        return seen.propagated().clamp(min=0)
