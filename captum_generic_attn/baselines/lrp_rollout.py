"""LRP rollout: rollout of the relevance of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from captum_generic_attn.attribution import AttentionOptions
from captum_generic_attn.baselines.composition import ComposedAttribution, CompositionOptions
from captum_generic_attn.lrp.rule_sets import Rules, RuleSet, attention_rules
from captum_generic_attn.relevance.method import CallGradients


class LrpRollout(ComposedAttribution):
    """LRP rollout: products of `I + E relu(C)`, `C` the relevance of attention.

    Args:
        forward_func: as in `GenericAttention`.
        start_layer: leave out the first `start_layer` calls of each pair of streams.
        rules: the LRP rules, `"chefer2021"`, another name of `lrp.RULE_SETS`, or a `RuleSet`.

    Raises:
        UnsupportedOperationError: if an operation of the model has no relevance rule.
        ValueError: as `GenericAttention`.
        TypeError: as `GenericAttention`.

    Source: an ablation of arXiv 2012.09838. Between streams it is combined as `AttentionRollout`,
    which the paper does not cover.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import LrpRollout
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> LrpRollout(model).attribute(torch.rand(1, 3, 160, 160), target=1).min() >= 0
        tensor(True)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        start_layer: int = 0,
        rules: Rules = "chefer2021",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(forward_func, start_layer=start_layer, **options)
        attention_rules(rules)
        self.rules = rules

    @property
    def lrp_rules(self) -> RuleSet:
        """The rules of `rules=`."""
        return attention_rules(self.rules)

    @property
    def composition(self) -> CompositionOptions:
        """Products of both streams around the last cross-attention call."""
        return CompositionOptions(between=True)

    def head_maps(self, call: CallGradients) -> Tensor:
        """`relu(C)` of each head, `[G, H, Nq, Nk]`."""
        return call.propagated().clamp(min=0)
