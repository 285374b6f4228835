"""Generic attention explainability for any unmodified PyTorch transformer, inside Captum.

`GenericAttention` is the method of Chefer, Gur and Wolf (ICCV 2021) as a Captum `Attribution`; the
baselines have the same calls. `verify` checks maps on a model of one's own, `compare` runs several
methods side by side. Namespaces: `baselines`, `hf` (Hugging Face models), `metrics`,
`visualization`, `models` (models by name), `demo` (shipped models and images), `insights` (Captum
Insights), `lrp` (rules).

Names and namespaces are imported when they are first used, so that `import captum_generic_attn`
costs nothing and `GenericAttention` loads no more than Captum does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; `_HOMES` is the same at run time
    from captum_generic_attn import (
        baselines,
        demo,
        hf,
        insights,
        lrp,
        metrics,
        models,
        visualization,
    )
    from captum_generic_attn.attribution import GenericAttention
    from captum_generic_attn.baselines import (
        AttentionGradCam,
        AttentionRollout,
        GradientAttention,
        Lrp,
        LrpRollout,
        PartialLrp,
        RawAttention,
        TransformerAttribution,
    )
    from captum_generic_attn.captum_api.targets import choose_output
    from captum_generic_attn.comparison import Comparison, all_methods, compare, patch_mask
    from captum_generic_attn.errors import (
        CaptumGenericAttnError,
        DataError,
        PlanError,
        UnavailableWeightsError,
        UnknownModelError,
        UnreadableImageError,
        UnsupportedAttentionError,
        UnsupportedOperationError,
    )
    from captum_generic_attn.lrp import RuleSet
    from captum_generic_attn.relevance.result import Call, Relevance, Stream
    from captum_generic_attn.verification import Check, Verification, verify

__version__ = "0.1.0"

__all__ = [
    "AttentionGradCam",
    "AttentionRollout",
    "Call",
    "CaptumGenericAttnError",
    "Check",
    "Comparison",
    "DataError",
    "GenericAttention",
    "GradientAttention",
    "Lrp",
    "LrpRollout",
    "PartialLrp",
    "PlanError",
    "RawAttention",
    "Relevance",
    "RuleSet",
    "Stream",
    "TransformerAttribution",
    "UnavailableWeightsError",
    "UnknownModelError",
    "UnreadableImageError",
    "UnsupportedAttentionError",
    "UnsupportedOperationError",
    "Verification",
    "all_methods",
    "baselines",
    "choose_output",
    "compare",
    "demo",
    "hf",
    "insights",
    "lrp",
    "metrics",
    "models",
    "patch_mask",
    "verify",
    "visualization",
]

_NAMESPACES = ("baselines", "demo", "hf", "insights", "lrp", "metrics", "models", "visualization")

_HOMES = {
    "attribution": ("GenericAttention",),
    "baselines": (
        "AttentionGradCam",
        "AttentionRollout",
        "GradientAttention",
        "Lrp",
        "LrpRollout",
        "PartialLrp",
        "RawAttention",
        "TransformerAttribution",
    ),
    "captum_api.targets": ("choose_output",),
    "comparison": ("Comparison", "all_methods", "compare", "patch_mask"),
    "errors": (
        "CaptumGenericAttnError",
        "DataError",
        "PlanError",
        "UnavailableWeightsError",
        "UnknownModelError",
        "UnreadableImageError",
        "UnsupportedAttentionError",
        "UnsupportedOperationError",
    ),
    "lrp": ("RuleSet",),
    "relevance.result": ("Call", "Relevance", "Stream"),
    "verification": ("Check", "Verification", "verify"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # a type checker that saw this would take every name for one of the package

    def __getattr__(name: str) -> object:
        """A public name or namespace, imported when it is first asked for."""
        if name in _NAMESPACES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = found  # asked for once
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
