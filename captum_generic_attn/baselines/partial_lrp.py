"""Partial LRP: the relevance of the last call's probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from captum_generic_attn.attribution import AttentionOptions, check_choice
from captum_generic_attn.baselines.composition import LastCallAttribution
from captum_generic_attn.baselines.scaling import Scale, min_max
from captum_generic_attn.lrp.rule_sets import Rules, RuleSet, attention_rules
from captum_generic_attn.relevance.attention_maps import AttentionMap, DenseMap
from captum_generic_attn.relevance.method import CallGradients


class PartialLrp(LastCallAttribution):
    """Partial LRP: the relevance of the last call's probabilities, averaged over heads.

    The last call of each pair of streams is used, the last of those that `layers` selects.

    Args:
        forward_func: as in `GenericAttention`.
        clamp: whether negative relevance counts as none.
        scale: `"minmax"`: each example's whole matrix is scaled to reach from 0 to 1; `None`: not.
        rules: the LRP rules, `"chefer2021_full"`, another name of `lrp.RULE_SETS`, or a `RuleSet`.

    Raises:
        UnsupportedOperationError: if an operation of the model has no relevance rule.
        ValueError: if an option is none of those named, and as `GenericAttention`.
        TypeError: as `GenericAttention`.

    Source: Voita et al. 2019, arXiv 1905.09418, as arXiv 2012.09838 applies it.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import PartialLrp
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> PartialLrp(model).attribute(torch.rand(1, 3, 160, 160), target=1).min() >= 0
        tensor(True)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        clamp: bool = True,
        scale: Scale = None,
        rules: Rules = "chefer2021_full",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(forward_func, **options)
        check_choice("scale", scale, ("minmax", None))
        attention_rules(rules)
        self.clamp = clamp
        self.scale = scale
        self.rules = rules

    @property
    def lrp_rules(self) -> RuleSet:
        """The rules of `rules=`."""
        return attention_rules(self.rules)

    @property
    def needs_all_heads(self) -> bool:
        """True if maps are scaled: that needs the mean over all heads."""
        return self.scale is not None

    def head_maps(self, call: CallGradients) -> Tensor:
        """The relevance of each head's probabilities, `[G, H, Nq, Nk]`."""
        found = call.propagated()
        return found.clamp(min=0) if self.clamp else found

    def call_map(self, call: CallGradients) -> AttentionMap:
        """The mean over heads, scaled if asked for."""
        found = call.dense_map(self.head_maps(call).mean(1))
        if self.scale is None:
            return found
        return DenseMap(min_max(found.matrix, call.record.examples))
