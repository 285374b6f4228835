"""Layer-wise relevance propagation from the score to the inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.captum_api.base import (
    Attributed,
    ModelAttribution,
    Request,
    retry_with_copies,
)
from captum_generic_attn.captum_api.targets import OutputChoice
from captum_generic_attn.capture.blocks import computing_dtype
from captum_generic_attn.lrp.propagation import Propagation
from captum_generic_attn.lrp.rule_sets import Rules, rule_set


class Lrp(ModelAttribution):
    """Layer-wise relevance propagation from a score to the elements of the inputs.

    The model is used as it is: a function mode gives every operation of its forward pass a
    relevance rule. With signed rules (`RuleSet.signed`) what speaks for the score is positive, what
    speaks against it negative, whatever sign the score has: the map of a negated score is the
    negated map. The authors' rules show what speaks for a logit.

    Args:
        forward_func: a module, a bound method, a `functools.partial`, or a closure round modules.
        rules: the rule set, by its name in `lrp.RULE_SETS` or as a `RuleSet`: `"chefer2021_full"`,
            `"chefer2021"`, `"chefer2021_detr"` (the authors' variants, which start from 1), or,
            signed and from the score, `"epsilon"`, `"gamma"`, and `"frozen"`, which conserves
            exactly without biases.
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
        return retry_with_copies(
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
