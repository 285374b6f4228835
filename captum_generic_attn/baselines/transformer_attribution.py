"""Transformer attribution: LRP weighted by gradients, multiplied over the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from captum_generic_attn.attribution import AttentionOptions
from captum_generic_attn.baselines.composition import ComposedAttribution, CompositionOptions
from captum_generic_attn.lrp.rule_sets import Rules, RuleSet, attention_rules
from captum_generic_attn.relevance.equations import positive_contribution
from captum_generic_attn.relevance.method import CallGradients


class TransformerAttribution(ComposedAttribution):
    """Transformer attribution: products of `I + E relu(∇A ⊙ C)`, `C` the relevance of attention.

    Between streams the map of the last cross-attention call is read as it is. `own` may also be
    `"row_min"`: the least value of its row, as the authors' code for BERT has it.

    Args:
        forward_func: as in `GenericAttention`.
        row_normalize: whether the rows of each factor are scaled to sum to 1.
        start_layer: leave out the first `start_layer` calls of each pair of streams.
        rules: the LRP rules, `"chefer2021"`, another name of `lrp.RULE_SETS`, or a `RuleSet`.

    Raises:
        UnsupportedOperationError: if an operation of the model has no relevance rule.
        ValueError: if an option is none of those named, and as `GenericAttention`.
        TypeError: as `GenericAttention`.

    Source: Chefer, Gur, Wolf 2021, arXiv 2012.09838.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import TransformerAttribution
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> TransformerAttribution(model).attribute(torch.rand(1, 3, 160, 160), target=1).shape
        torch.Size([1, 3, 160, 160])
    """

    _own_choices: ClassVar[tuple[str, ...]] = ("zero", "keep", "row_min")

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        row_normalize: bool = False,
        start_layer: int = 0,
        rules: Rules = "chefer2021",
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__(forward_func, start_layer=start_layer, **options)
        attention_rules(rules)
        self.row_normalize = row_normalize
        self.rules = rules

    @property
    def lrp_rules(self) -> RuleSet:
        """The rules of `rules=`."""
        return attention_rules(self.rules)

    @property
    def needs_all_heads(self) -> bool:
        """True if rows are scaled: that needs the mean over all heads."""
        return self.row_normalize

    @property
    def composition(self) -> CompositionOptions:
        """Products within each stream."""
        return CompositionOptions(row_normalize=self.row_normalize)

    def head_maps(self, call: CallGradients) -> Tensor:
        """`relu(∇A ⊙ C)` of each head, `[G, H, Nq, Nk]`."""
        return positive_contribution(call.propagated(), call.gradient())
