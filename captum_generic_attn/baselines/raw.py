"""Baselines that read attention alone: the last layer's, and rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from captum_generic_attn.attribution import AttentionAttribution, AttentionOptions
from captum_generic_attn.baselines.methods import Raw, Rollout
from captum_generic_attn.captum_api.targets import OutputChoice
from captum_generic_attn.relevance.calls import Own
from captum_generic_attn.relevance.explained_rows import RowsOption
from captum_generic_attn.relevance.method import Method
from captum_generic_attn.relevance.selection import Layers


class RawAttention(AttentionAttribution):
    """Raw attention: probabilities of the last call, averaged over heads, at the explained rows.

    Of each pair of streams (queries, keys) the last call that the score depends on stands for
    itself. The target only decides which rows are explained.

    Args:
        forward_func: as in `GenericAttention`.
        layers: as in `GenericAttention`; the last call is the last of these.
        rows: as in `GenericAttention`.
        own: as in `GenericAttention`.
        output: as in `GenericAttention`.
        interpolation: as in `GenericAttention`.
        strict: as in `GenericAttention`.

    Raises:
        ValueError: as `GenericAttention`.
        TypeError: as `GenericAttention`.

    Source: a baseline of arXiv 2103.15679.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import RawAttention
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> RawAttention(model).attribute(torch.rand(1, 3, 160, 160), target=1).shape
        torch.Size([1, 3, 160, 160])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        layers: Layers = None,
        rows: RowsOption = None,
        own: Own = "zero",
        output: OutputChoice = None,
        interpolation: str = "bilinear",
        strict: bool = True,
    ) -> None:
        options = AttentionOptions(layers, 0, rows, own, output, interpolation, strict)
        super().__init__(forward_func, options)

    @property
    def _method(self) -> Method:
        return Raw(own=self.own)


class AttentionRollout(AttentionAttribution):
    """Attention rollout: products of `I + E A` over the calls, from the first to the last.

    Between streams `R = Tᵀ A I`, with `A` the last call in which they attend across, `T` the
    rollout of its queries' stream before it and `I` that of its keys'.

    Args:
        forward_func: as in `GenericAttention`.
        row_normalize: whether the rows of `I + E A` are scaled to sum to 1.
        start_layer: leave out the first `start_layer` calls of each pair of streams.
        layers: as in `GenericAttention`.
        rows: as in `GenericAttention`.
        own: as in `GenericAttention`.
        output: as in `GenericAttention`.
        interpolation: as in `GenericAttention`.
        strict: as in `GenericAttention`.

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
        layers: Layers = None,
        rows: RowsOption = None,
        own: Own = "zero",
        output: OutputChoice = None,
        interpolation: str = "bilinear",
        strict: bool = True,
    ) -> None:
        options = AttentionOptions(layers, start_layer, rows, own, output, interpolation, strict)
        super().__init__(forward_func, options)
        self.row_normalize = row_normalize

    @property
    def _method(self) -> Method:
        return Rollout(self.row_normalize, own=self.own)
