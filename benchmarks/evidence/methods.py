"""Which methods the tables compare, with the options that the authors use for each model, and the
broken variants of ours that a benchmark must be able to tell from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from captum.attr import (
    Attribution,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    Saliency,
)
from tables import BROKEN, RANDOM
from torch import Tensor
from torch.nn.functional import interpolate

from captum_generic_attn import GenericAttention
from captum_generic_attn.baselines import METHODS
from captum_generic_attn.metrics import RandomAttribution
from captum_generic_attn.relevance.result import Relevance

OURS = "Generic attention"
Methods = dict[str, Attribution]
Options = Mapping[str, Mapping[str, Any]] | None


def some(every: Methods, names: Collection[str] | None) -> Methods:
    """Those of these names, in their order; without names all."""
    return {name: every[name] for name in names or every}


def ablations(model: Callable[..., Any], *, across: bool) -> Methods:
    """The paper's ablations of our method; `across`: those of attention between streams too."""
    between: Methods = {
        "– without normalisation (eq. 8, 9)": GenericAttention(model, normalize=False),
        "– without R̄ in eq. 10": GenericAttention(model, self_in_cross=False),
    }
    return {
        **(between if across else {}),
        "– without aggregation": GenericAttention(model, aggregate=False),
        "– with LRP": GenericAttention(model, lrp=True),
    }


def of_attention(
    model: Callable[..., Any], *, across: bool = False, options: Options = None
) -> Methods:
    """All methods of the package, and the paper's ablations of ours.

    Args:
        model: the model.
        across: whether streams attend to each other.
        options: the authors' options for this model, by the name of the method.
    """
    known = {
        name: method(model, **(options or {}).get(name, {})) for name, method in METHODS.items()
    }
    return {OURS: known[OURS], **ablations(model, across=across), **known}


def of_vit(model: Callable[..., Any], grid: tuple[int, int]) -> Methods:
    """For a vision transformer; Captum's methods and controls as well."""
    return {
        **of_attention(model, options={"Attention rollout": {"start_layer": 1}}),
        "Saliency": Saliency(model),
        "Input × gradient": InputXGradient(model),
        "Integrated gradients": IntegratedGradients(model),
        "Gradient SHAP": GradientShap(model),
        "Kernel SHAP": KernelShap(model),
        RANDOM: RandomAttribution(model, grid=grid),
        f"{RANDOM}, pixels": RandomAttribution(model),
    }


_CROSSING: Options = {
    "Attention Grad-CAM": {"weights_from": "all", "scale": None},
    "Partial LRP": {"rules": "chefer2021", "clamp": False, "scale": "minmax"},
}
"""Where streams attend to each other."""


def of_lxmert(model: Callable[..., Any]) -> Methods:
    """For LXMERT, and the control.

    Captum's gradient methods need inputs to differentiate by, which word ids are not.
    """
    return of_attention(model, across=True, options=_CROSSING) | {RANDOM: RandomAttribution(model)}


def of_visualbert(model: Callable[..., Any]) -> Methods:
    """For VisualBERT, likewise."""
    every = of_attention(
        model,
        options={
            "Attention rollout": {"row_normalize": False},
            "Attention Grad-CAM": {"weights_from": "all"},
            "Partial LRP": {"clamp": False, "scale": "minmax"},
        },
    )
    return every | {RANDOM: RandomAttribution(model)}


def of_clip(model: Callable[..., Any], grid: tuple[int, int]) -> Methods:
    """For a CLIP, likewise; of ours also the last layer of each tower alone, as in the authors'
    notebook.
    """
    return {
        OURS: GenericAttention(model),
        "– last layer alone (start_layer = −1)": GenericAttention(model, start_layer=-1),
        **of_attention(model),
        RANDOM: RandomAttribution(model, grid=grid),
    }


def of_detr(model: Callable[..., Any], grid: tuple[int, int]) -> Methods:
    """For a DETR, likewise; and those of Captum's methods that need one gradient."""
    return {
        **of_attention(model, across=True, options=_CROSSING),
        "Saliency": Saliency(model),
        "Input × gradient": InputXGradient(model),
        RANDOM: RandomAttribution(model, grid=grid),
    }


def heads_first(probabilities: Tensor, gradient: Tensor) -> Tensor:
    """Eq. 5 the wrong way round: heads are averaged before what speaks against is cut off."""
    return (probabilities * gradient).mean(1).clamp(min=0)


class Misread(Attribution):
    """Relevance that is read in another way than it should be, such as the explained token's column
    of R instead of its row: what it gives, not what it gets.

    `read` makes the attribution of each input from a `Relevance`.
    """

    def __init__(self, model: Callable[..., Any], read: Callable[[Relevance], tuple[Tensor, ...]]):
        super().__init__(model)
        self.read = read

    def attribute(
        self, inputs: Any, target: Any = None, additional_forward_args: Any = None
    ) -> Any:
        """As in `GenericAttention`, where `read` gives it another shape."""
        found = GenericAttention(self.forward_func).relevance(
            inputs, target, additional_forward_args
        )
        maps = self.read(found)
        return maps if isinstance(inputs, tuple) else maps[0]


def broken_vit(model: Callable[..., Any], grid: tuple[int, int], size: int) -> Methods:
    """Our method with one mistake each, for a vision transformer whose input is called x."""

    def column(found: Relevance) -> tuple[Tensor, ...]:
        maps = found.matrix("x", "x")[:, 1:, 0].unflatten(1, grid)[:, None]
        return (interpolate(maps, (size, size), mode="bilinear"),)

    return {
        f"{BROKEN}R transposed": Misread(model, column),
        f"{BROKEN}wrong row": GenericAttention(model, rows=-1),
        f"{BROKEN}heads averaged first": GenericAttention(model, rule=heads_first),
    }


def broken_clip(model: Callable[..., Any], grid: tuple[int, int]) -> Methods:
    """Our method with one mistake each, for a CLIP."""

    def column(found: Relevance) -> tuple[Tensor, ...]:
        parts = [
            transposed(found, name)[:, stream.parts[part]]
            for part in ("pixel_values", "input_ids")
            for name, stream in found.streams.items()
            if part in stream.parts
        ]
        return parts[0].unflatten(1, grid), parts[1]

    return {
        f"{BROKEN}R transposed": Misread(model, column),
        f"{BROKEN}wrong row": GenericAttention(model, rows=1),
        f"{BROKEN}heads averaged first": GenericAttention(model, rule=heads_first),
    }


def transposed(found: Relevance, stream: str) -> Tensor:
    """The explained tokens' column of a stream, `[B, N]`, their own entries left out."""
    rows = found.rows[stream]
    values = torch.einsum("bji,bi->bj", found.matrix(stream, stream), rows)
    return values.masked_fill(rows > 0, 0)


def broken_lxmert(model: Callable[..., Any]) -> Methods:
    """Our method with one mistake each, for LXMERT: ids and region features are explained."""

    def column(found: Relevance) -> tuple[Tensor, ...]:
        regions = found.matrix("visual_feats", "input_ids")[:, :, 0]
        return transposed(found, "input_ids"), regions

    return {
        f"{BROKEN}R transposed": Misread(model, column),
        f"{BROKEN}wrong row": GenericAttention(model, rows={"input_ids": 1}),
        f"{BROKEN}heads averaged first": GenericAttention(model, rule=heads_first),
    }


def broken_visualbert(model: Callable[..., Any]) -> Methods:
    """Our method with one mistake each, for VisualBERT: ids and regions are one stream."""

    def column(found: Relevance) -> tuple[Tensor, ...]:
        ((name, stream),) = found.streams.items()
        values = transposed(found, name)
        return tuple(values[:, part] for part in stream.parts.values())

    return {
        f"{BROKEN}R transposed": Misread(model, column),
        f"{BROKEN}wrong row": GenericAttention(model, rows=0),
        f"{BROKEN}heads averaged first": GenericAttention(model, rule=heads_first),
    }


def broken_detr(model: Callable[..., Any], grid: tuple[int, int]) -> Methods:
    """Our method with one mistake each, for a DETR."""

    def of_query(found: Relevance, shift: int) -> Tensor:
        """The map of the explained query, or of one behind it."""
        ((queries, rows),) = found.rows.items()
        (picture,) = (name for name in found.streams if name != queries)
        maps = torch.einsum("bi,bij->bj", rows.roll(shift, 1), found.matrix(queries, picture))
        return maps.unflatten(1, grid)

    def wrong_query(found: Relevance) -> tuple[Tensor, ...]:
        return (of_query(found, 1),)

    def turned(found: Relevance) -> tuple[Tensor, ...]:
        return (of_query(found, 0).mT,)

    return {
        f"{BROKEN}map transposed": Misread(model, turned),
        f"{BROKEN}wrong query": Misread(model, wrong_query),
        f"{BROKEN}heads averaged first": GenericAttention(model, rule=heads_first),
    }
