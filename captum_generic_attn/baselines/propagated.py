"""Baselines of layer-wise relevance propagation: to the inputs, or to attention alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from captum_generic_attn.attribution import AttentionAttribution, AttentionOptions, check_choice
from captum_generic_attn.baselines.methods import LrpAlone, LrpRolled, LrpWeighted
from captum_generic_attn.captum_api.base import Attributed, ModelAttribution, Request, retried
from captum_generic_attn.captum_api.targets import OutputChoice
from captum_generic_attn.capture.blocks import computing_dtype
from captum_generic_attn.lrp.propagation import Propagation
from captum_generic_attn.lrp.rule_sets import RuleSet, attention_rules, rule_set
from captum_generic_attn.relevance.calls import Own, OwnEntry
from captum_generic_attn.relevance.explained_rows import RowsOption
from captum_generic_attn.relevance.method import Method
from captum_generic_attn.relevance.selection import Layers

Rules = str | RuleSet


class TransformerAttribution(AttentionAttribution):
    """Transformer attribution: products of `I + E relu(∇A ⊙ C)`, `C` the relevance of attention.

    Between streams the map of the last call in which they attend across stands for itself.

    Args:
        forward_func: as in `GenericAttention`.
        row_normalize: whether the rows of each factor are scaled to sum to 1.
        start_layer: leave out the first `start_layer` calls of each pair of streams.
        rules: the LRP rules, `"chefer2021"`, another name of `lrp.RULE_SETS`, or a `RuleSet`.
        layers: as in `GenericAttention`.
        rows: as in `GenericAttention`.
        own: as in `GenericAttention`; or `"row_min"`: the least value of its row, as the authors'
            code for BERT has it.
        output: as in `GenericAttention`.
        interpolation: as in `GenericAttention`.
        strict: as in `GenericAttention`.

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

    _own = ("zero", "keep", "row_min")

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        row_normalize: bool = False,
        start_layer: int = 0,
        rules: Rules = "chefer2021",
        layers: Layers = None,
        rows: RowsOption = None,
        own: OwnEntry = "zero",
        output: OutputChoice = None,
        interpolation: str = "bilinear",
        strict: bool = True,
    ) -> None:
        options = AttentionOptions(layers, start_layer, rows, own, output, interpolation, strict)
        super().__init__(forward_func, options)
        attention_rules(rules)
        self.row_normalize = row_normalize
        self.rules = rules

    @property
    def _method(self) -> Method:
        return LrpWeighted(attention_rules(self.rules), self.row_normalize, own=self.own)


class PartialLrp(AttentionAttribution):
    """Partial LRP: the relevance of the last call's probabilities, averaged over heads.

    Args:
        forward_func: as in `GenericAttention`.
        clamp: whether negative relevance counts as none.
        scale: `"minmax"`: each example's whole matrix is scaled to reach from 0 to 1; `None`: not.
        rules: the LRP rules, `"chefer2021_full"`, another name of `lrp.RULE_SETS`, or a `RuleSet`.
        layers: as in `GenericAttention`; the last call is the last of these.
        rows: as in `GenericAttention`.
        own: as in `GenericAttention`.
        output: as in `GenericAttention`.
        interpolation: as in `GenericAttention`.
        strict: as in `GenericAttention`.

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
        scale: Literal["minmax"] | None = None,
        rules: Rules = "chefer2021_full",
        layers: Layers = None,
        rows: RowsOption = None,
        own: Own = "zero",
        output: OutputChoice = None,
        interpolation: str = "bilinear",
        strict: bool = True,
    ) -> None:
        options = AttentionOptions(layers, 0, rows, own, output, interpolation, strict)
        super().__init__(forward_func, options)
        check_choice("scale", scale, ("minmax", None))
        attention_rules(rules)
        self.clamp = clamp
        self.scale = scale
        self.rules = rules

    @property
    def _method(self) -> Method:
        return LrpAlone(attention_rules(self.rules), self.clamp, self.scale, own=self.own)


class LrpRollout(AttentionAttribution):
    """LRP rollout: products of `I + E relu(C)`, `C` the relevance of attention.

    Args:
        forward_func: as in `GenericAttention`.
        start_layer: leave out the first `start_layer` calls of each pair of streams.
        rules: the LRP rules, `"chefer2021"`, another name of `lrp.RULE_SETS`, or a `RuleSet`.
        layers: as in `GenericAttention`.
        rows: as in `GenericAttention`.
        own: as in `GenericAttention`.
        output: as in `GenericAttention`.
        interpolation: as in `GenericAttention`.
        strict: as in `GenericAttention`.

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
        layers: Layers = None,
        rows: RowsOption = None,
        own: Own = "zero",
        output: OutputChoice = None,
        interpolation: str = "bilinear",
        strict: bool = True,
    ) -> None:
        options = AttentionOptions(layers, start_layer, rows, own, output, interpolation, strict)
        super().__init__(forward_func, options)
        attention_rules(rules)
        self.rules = rules

    @property
    def _method(self) -> Method:
        return LrpRolled(attention_rules(self.rules), own=self.own)


class Lrp(ModelAttribution):
    """Layer-wise relevance propagation from a score to the elements of the inputs.

    The model is used as it is: a function mode gives every operation of its forward pass a
    relevance rule. With signed rules (`RuleSet.signed`) what speaks for the score is positive, what
    speaks against it negative, whatever sign the score has: the map of a negated score is the
    negated map. The authors' rules show what speaks for a logit.

    Args:
        forward_func: a module, a bound method, a `functools.partial`, or a closure round modules.
        rules: the rule set, by its name in `lrp.RULE_SETS` or as a `RuleSet`: `"chefer2021_full"`,
            `"chefer2021"`, `"chefer2021_detr"` (the authors' variants, from 1), or, signed and from
            the score, `"epsilon"`, `"gamma"`, and `"frozen"`, which conserves exactly without
            biases.
        output: as in `GenericAttention`.

    Raises:
        ValueError: if there is no such rule set.
        TypeError: if `forward_func` cannot be called.
        UnsupportedOperationError: by `attribute`, if an operation of the model has no relevance
            rule; or if rules are signed and the score is a probability, its logarithm or another
            value that need not have the sign of its logit: explain the logit. It is a `ValueError`.

    `attribute` returns relevance in the shape of the inputs: pixels, features, or for text one
    value per token, the sum over its vector. With `return_input_shape=False`, the features of a
    region are summed to `[B, R]` and the channels of a picture to `[B, H, W]`. Between operations
    relevance has the model's precision: in half precision little of it is left. With signed rules a
    score of exactly 0 gets zeros, and a warning.

    Source: Bach et al. 2015; rules as `captum_generic_attn.lrp.rules` says.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import Lrp
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> Lrp(model, rules="frozen").attribute(torch.rand(1, 3, 160, 160), target=1).shape
        torch.Size([1, 3, 160, 160])
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, -3.0]])
        >>> Lrp(layer, rules="frozen").attribute(torch.ones(1, 2))  # of a score of -2
        tensor([[ 1., -3.]])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        rules: Rules = "chefer2021_full",
        output: OutputChoice = None,
    ) -> None:
        super().__init__(forward_func, output)
        rule_set(rules)
        self.rules = rules

    def _check_output(self, output: Tensor, request: Request) -> None:
        if not output.requires_grad:
            raise ValueError(
                "the model's output depends on nothing differentiable, or relevance ends before "
                "it: at a softmax with rules that hold it constant, at logsumexp, at a vector's "
                "norm, at what is detached, made under inference_mode or computed outside torch. "
                "Is the score a probability, explain the logit, what goes into the softmax"
            )
        super()._check_output(output, request)

    def _attributed(self, request: Request, *, return_input_shape: bool) -> Iterator[Attributed]:
        return retried(
            lambda copies: self._relevances(request, copies=copies, whole=return_input_shape)
        )

    def _relevances(self, request: Request, *, copies: bool, whole: bool) -> Iterator[Attributed]:
        propagation = Propagation(
            self.forward_func, request.inputs, request.additional, self._choose,
            rule_set(self.rules), copies=copies,
        )  # fmt: skip
        output = propagation.capture.output
        self._check_output(output, request)
        for i, target in enumerate(request.targets):
            with torch.autocast(output.device.type, enabled=False):
                score = self._score(output, request, target)
                found = propagation.of(score, retain_graph=i + 1 < len(request.targets))
            if not all(bool(relevance.isfinite().all()) for relevance in found.inputs):
                raise ValueError(
                    "relevance is not finite: the score or an activation is not, or a divisor is "
                    "tiny; look at the model's output, or use rules with a larger ε"
                )
            told = len(found.zero) == len(score)  # of scores of zero
            if found.silent and not told and request.first and i == 0:
                warnings.warn(
                    f"{', '.join(found.silent)}: no relevance ends there (integers that no "
                    "embedding reads, or an input that the score does not depend on): zeros",
                    UserWarning,
                    stacklevel=2,
                )
            dtype = computing_dtype(output)
            maps = [relevance.detach().to(dtype) for relevance in found.inputs]
            maps = maps if whole else [_summed(relevance) for relevance in maps]
            yield Attributed(maps, [], found.zero)


def _summed(relevance: Tensor) -> Tensor:
    """Summed over what is no place: channels of a picture, features of a region."""
    if relevance.ndim == 4:
        return relevance.sum(1)
    return relevance.sum(-1) if relevance.ndim == 3 else relevance
