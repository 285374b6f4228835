"""Raw attention: the probabilities of the last call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from captum_generic_attn.attribution import AttentionOptions
from captum_generic_attn.baselines.composition import LastCallAttribution
from captum_generic_attn.relevance.method import CallGradients


class RawAttention(LastCallAttribution):
    """Raw attention: probabilities of the last call, averaged over heads, at the explained rows.

    For each pair of streams (queries, keys) the last call that the score depends on is used, the
    last of those that `layers` selects. The target only decides which rows are explained.

    Args:
        forward_func: as in `GenericAttention`.

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
        self, forward_func: Callable[..., Any], **options: Unpack[AttentionOptions]
    ) -> None:
        super().__init__(forward_func, **options)

    def head_maps(self, call: CallGradients) -> Tensor:
        """`A` of each head, `[G, H, Nq, Nk]`."""
        return call.attention()
