"""The positive gradient of attention, summed over all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_generic_attn.attribution import AttentionAttribution, CommonOptions
from captum_generic_attn.relevance.aggregator import Aggregator, BufferedAggregator
from captum_generic_attn.relevance.attention_maps import ElementwiseRule
from captum_generic_attn.relevance.calls import IndexedCall, TokenIndexing


class GradientAttention(AttentionAttribution):
    """The positive gradient of attention: `relu(∇A)`, averaged over heads and queries, summed.

    Each token gets its values as a key, whatever the query, so there are no explained rows, and
    `own` has no effect. This is LeGrad (arXiv 2404.03214) for the score of the last layer alone;
    LeGrad itself also reads scores of the layers before.

    Args:
        forward_func: as in `GenericAttention`.
        start_layer: as in `GenericAttention`.

    Raises:
        ValueError: as `GenericAttention`.
        TypeError: as `GenericAttention`.

    Source: Bousselham et al. 2024, arXiv 2404.03214.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import GradientAttention
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> GradientAttention(model).attribute(torch.rand(1, 3, 160, 160), target=1).min() >= 0
        tensor(True)
    """

    row_source: ClassVar[Literal["explained", "all"]] = "all"

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        start_layer: int = 0,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(forward_func, start_layer=start_layer, **options)

    @property
    def elementwise_rule(self) -> ElementwiseRule:
        """`relu(∇A)`."""
        return positive_gradient

    def aggregator(
        self, calls: Sequence[IndexedCall], output_streams: Sequence[str],  # noqa: ARG002
        indexing: TokenIndexing, cross_pairs: frozenset[tuple[str, str]], *,  # noqa: ARG002
        matrices: bool,  # noqa: ARG002
    ) -> Aggregator:  # fmt: skip
        """The sum of all maps."""
        return MeanOverQueries(calls, indexing)


def positive_gradient(attention: Tensor, gradient: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`relu(∇A)`, 0 where a mask leaves no attention.

    Example:
        >>> positive_gradient(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([2.0, -1.0, 3.0]))
        tensor([2., 0., 0.])
    """
    return torch.clamp(gradient, min=0, out=out).masked_fill_(attention == 0, 0.0)


class MeanOverQueries(BufferedAggregator):
    """The sum of all maps, each averaged over the queries of its call."""

    def __init__(self, calls: Sequence[IndexedCall], indexing: TokenIndexing) -> None:
        super().__init__()
        self._calls = {call.index: call for call in calls}
        self._indexing = indexing

    def result(self) -> dict[str, Tensor]:
        """`[B, base tokens]` values of the tokens of each stream."""
        found = self._placed(each_query=False)
        values: dict[str, Tensor] = {}
        for (query, to), rows in found.items():
            if query in self._output_rows:
                part = rows.squeeze(1)
                values[to] = values[to] + part if to in values else part
        for name in self._output_rows:
            stream = self._indexing.streams[name]
            zeros = self._indexing.like.new_zeros(self._indexing.examples, stream.num_base_tokens)
            values.setdefault(name, zeros)
        return values

    def matrices(
        self, states: Mapping[str, frozenset[int]]  # noqa: ARG002
    ) -> dict[tuple[str, str], Tensor]:  # fmt: skip
        """`[B, size, base tokens]` sums of maps for each (query stream, key stream)."""
        found = self._placed(each_query=True)
        like, examples = self._indexing.like, self._indexing.examples
        for name, stream in self._indexing.streams.items():
            found.setdefault(
                (name, name), like.new_zeros(examples, stream.size, stream.num_base_tokens)
            )
        return found

    def _placed(self, *, each_query: bool) -> dict[tuple[str, str], Tensor]:
        """`[B, size or 1, base tokens]`: of each query, times the stream's size, or their sum."""
        indexing, like = self._indexing, self._indexing.like
        found: dict[tuple[str, str], Tensor] = {}
        for index, attention_map in self._maps.items():
            call = self._calls[index]
            size = indexing.streams[call.stream].size
            is_query = like.new_ones(*call.queries.shape) * (call.queries >= 0).to(like)
            count = indexing.scatter(
                is_query.unsqueeze(1), call.examples, call.queries, call.stream
            ).sum(-1, keepdim=True)  # [B, 1, 1]
            weights = like.new_ones(indexing.examples, 1, size) / count.clamp(min=1)
            if each_query:
                weights = torch.eye(size).to(like) * size / count.clamp(min=1)
            queries = indexing.gather(weights, call.examples, call.queries, call.stream)
            product = attention_map.left_multiply(queries)
            for source in call.sources:
                keys = indexing.scatter(product, call.examples, source.keys, source.stream)
                stream = indexing.streams[source.stream]
                part = stream.unpool(keys)[:, :, : stream.num_base_tokens]
                pair = call.stream, source.stream
                found[pair] = found[pair] + part if pair in found else part
        return found
