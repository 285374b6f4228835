"""Attention rollout: products of attention over all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from captum_generic_attn.attribution import AttentionOptions
from captum_generic_attn.baselines.composition import ComposedAttribution, CompositionOptions
from captum_generic_attn.relevance.method import CallGradients


class AttentionRollout(ComposedAttribution):
    """Attention rollout: products of `I + E A` over the calls, from the first to the last.

    Between streams `R = Tᵀ A I`, with `A` the last cross-attention call, `T` the rollout of its
    queries' stream before it and `I` that of its keys'.

    Args:
        forward_func: as in `GenericAttention`.
        row_normalize: whether the rows of `I + E A` are scaled to sum to 1.
        start_layer: leave out the first `start_layer` calls of each pair of streams.

    Raises:
        ValueError: as `GenericAttention`.
        TypeError: as `GenericAttention`.

    Source: Abnar and Zuidema 2020, arXiv 2005.00928; between streams, the baseline of arXiv
    2103.15679.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import AttentionRollout
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> relevance = AttentionRollout(model).relevance(torch.rand(1, 3, 160, 160), target=1)
        >>> rows = relevance.matrix("x", "x").sum(-1)
        >>> torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        row_normalize: bool = True,
        start_layer: int = 0,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(forward_func, start_layer=start_layer, **options)
        self.row_normalize = row_normalize

    @property
    def needs_all_heads(self) -> bool:
        """True if rows are scaled: that needs the mean over all heads."""
        return self.row_normalize

    @property
    def composition(self) -> CompositionOptions:
        """Products of both streams around the last cross-attention call."""
        return CompositionOptions(between=True, row_normalize=self.row_normalize)

    def head_maps(self, call: CallGradients) -> Tensor:
        """`A` of each head, `[G, H, Nq, Nk]`."""
        return call.attention()
