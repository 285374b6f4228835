"""Grad-CAM on attention: heads of the last call, weighted by their mean gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from captum_generic_attn.attribution import AttentionOptions, check_choice
from captum_generic_attn.baselines.composition import LastCallAttribution
from captum_generic_attn.baselines.scaling import Scale, min_max
from captum_generic_attn.relevance.attention_maps import AttentionMap, DeferredMap
from captum_generic_attn.relevance.method import CallGradients


class AttentionGradCam(LastCallAttribution):
    """Grad-CAM on attention: the last call's heads, weighted by the means of their gradients.

    `relu(mean_h(w_h A_h))`, with `w_h` the mean of the gradient of head `h`'s probabilities. The
    last call of each pair of streams is used, the last of those that `layers` selects.

    Args:
        forward_func: as in `GenericAttention`.
        weights_from: `"explained_rows"`: `w_h` is the mean over the explained rows, without the
            own entry of an only one unless `own="keep"`, and scaling looks there; `"all"`: over the
            whole matrix.
        scale: `"minmax"`: each example's values are scaled to reach from 0 to 1; `None`: not.

    Raises:
        ValueError: if an option is none of those named, and as `GenericAttention`.
        TypeError: as `GenericAttention`.

    Source: Selvaraju et al. 2017, arXiv 1610.02391, as arXiv 2012.09838 applies it to attention.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import AttentionGradCam
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> method = AttentionGradCam(model)
        >>> tokens = method.attribute(
        ...     torch.rand(1, 3, 160, 160), target=1, return_input_shape=False
        ... )
        >>> tokens.shape, bool((tokens >= 0).all() and (tokens <= 1).all())
        (torch.Size([1, 10, 10]), True)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        weights_from: Literal["explained_rows", "all"] = "explained_rows",
        scale: Scale = "minmax",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(forward_func, **options)
        check_choice("weights_from", weights_from, ("explained_rows", "all"))
        check_choice("scale", scale, ("minmax", None))
        self.weights_from = weights_from
        self.scale = scale

    @property
    def needs_all_heads(self) -> bool:
        """True: the mean over heads is clamped."""
        return True

    def head_maps(self, call: CallGradients) -> Tensor:
        """`w_h A_h` of each head, `[G, H, Nq, Nk]`."""
        gradient = call.gradient()
        counted = self._counted(call, gradient)
        total = counted.sum((-2, -1), keepdim=True)
        share = counted / total.clamp(min=torch.finfo(total.dtype).tiny)
        return (gradient * share).sum((-2, -1), keepdim=True) * call.attention()

    def call_map(self, call: CallGradients) -> AttentionMap:
        """The map of a call, computed after the backward pass, when explained rows are known."""
        return DeferredMap(lambda: self._map(call))

    def _map(self, call: CallGradients) -> Tensor:
        heads = self.head_maps(call)
        found = call.dense_map(heads.mean(1).clamp(min=0)).matrix
        if self.scale is None:
            return found
        counted = self._counted(call, heads)[:, 0] > 0
        return min_max(found, call.record.examples, counted.expand_as(found))

    def _counted(self, call: CallGradients, like: Tensor) -> Tensor:
        """`[G, 1, Nq, Nk]`, how much each entry of the gradient counts for the head's weight.

        All equally; or those of the explained rows, without the column of their own token where
        that gets 0. In a stream of which no row is explained, all equally too.
        """
        record, indexing = call.record, call.indexing
        everything = like.new_ones(1, 1, 1, 1).expand(len(like), 1, *like.shape[-2:])
        if self.weights_from == "all" or record.query_stream not in call.rows:
            return everything
        weights = call.rows[record.query_stream].to(like)
        queries = call.query_positions()
        explained = indexing.gather(
            weights.unsqueeze(1), record.examples, queries, record.query_stream
        )
        counted = explained.mT.unsqueeze(1) * everything
        if record.stream_pair.is_cross_attention or self.own == "keep":
            return counted
        keys = call.key_positions()
        single = ((weights != 0).sum(-1) == 1)[record.examples.to(weights.device)]
        own = (queries.unsqueeze(-1) == keys.unsqueeze(-2)).to(like.device)
        return counted.masked_fill((own & single.view(-1, 1, 1)).unsqueeze(1), 0.0)
