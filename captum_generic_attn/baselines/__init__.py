"""The methods to compare with, one file for each; `METHODS` is the only list of all methods.

`raw_attention`, `attention_grad_cam` and `partial_lrp` use the last attention call,
`attention_rollout`, `lrp_rollout` and `transformer_attribution` multiply the calls up
(`composition`), `gradient_attention` adds them up, and `lrp` propagates to the inputs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from captum_generic_attn.attribution import GenericAttention
from captum_generic_attn.baselines.attention_grad_cam import AttentionGradCam
from captum_generic_attn.baselines.attention_rollout import AttentionRollout
from captum_generic_attn.baselines.gradient_attention import GradientAttention
from captum_generic_attn.baselines.lrp import Lrp
from captum_generic_attn.baselines.lrp_rollout import LrpRollout
from captum_generic_attn.baselines.partial_lrp import PartialLrp
from captum_generic_attn.baselines.raw_attention import RawAttention
from captum_generic_attn.baselines.transformer_attribution import TransformerAttribution
from captum_generic_attn.captum_api.base import ModelAttribution

METHODS: Mapping[str, Callable[..., ModelAttribution]] = MappingProxyType({
    "Generic attention": GenericAttention,
    "Raw attention": RawAttention,
    "Attention rollout": AttentionRollout,
    "Attention Grad-CAM": AttentionGradCam,
    "Gradient attention": GradientAttention,
    "Transformer attribution": TransformerAttribution,
    "Partial LRP": PartialLrp,
    "LRP rollout": LrpRollout,
    "LRP": Lrp,
    "LRP, frozen": partial(Lrp, rules="frozen"),
})  # fmt: skip
"""All methods of the package by name: a class, or a class with options.

`compare`, the command line, evaluations, Captum Insights, the tables of docs/ and the tests take
their methods from here.
"""

__all__ = [
    "METHODS",
    "AttentionGradCam",
    "AttentionRollout",
    "GradientAttention",
    "Lrp",
    "LrpRollout",
    "PartialLrp",
    "RawAttention",
    "TransformerAttribution",
    "method_classes",
]


def method_classes() -> tuple[type[ModelAttribution], ...]:
    """The classes of `METHODS`, in their order.

    Example:
        >>> [cls.__name__ for cls in method_classes()][:2]
        ['GenericAttention', 'RawAttention']
    """
    made: list[Any] = [getattr(method, "func", method) for method in METHODS.values()]
    return tuple(dict.fromkeys(made))
