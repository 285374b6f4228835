"""Baselines that read gradients of attention: Grad-CAM on attention, and the gradient alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from captum_generic_attn.attribution import AttentionAttribution, AttentionOptions, check_choice
from captum_generic_attn.baselines.methods import GradCam, PositiveGradient
from captum_generic_attn.captum_api.targets import OutputChoice
from captum_generic_attn.relevance.calls import Own
from captum_generic_attn.relevance.explained_rows import RowsOption
from captum_generic_attn.relevance.method import Method
from captum_generic_attn.relevance.selection import Layers


class AttentionGradCam(AttentionAttribution):
    """Grad-CAM on attention: the last call's heads, weighted by the means of their gradients.

    `relu(mean_h(w_h A_h))`, with `w_h` the mean of the gradient of head `h`'s probabilities.

    Args:
        forward_func: as in `GenericAttention`.
        weights_from: `"explained_rows"`: `w_h` is the mean over the explained rows, without the
            own entry of an only one unless `own="keep"`, and scaling looks there; `"all"`: over the
            whole matrix.
        scale: `"minmax"`: each example's values are scaled to reach from 0 to 1; `None`: not.
        layers: as in `GenericAttention`; the last call is the last of these.
        rows: as in `GenericAttention`.
        own: as in `GenericAttention`.
        output: as in `GenericAttention`.
        interpolation: as in `GenericAttention`.
        strict: as in `GenericAttention`.

    Raises:
        ValueError: if an option is none of those named, and as `GenericAttention`.
        TypeError: as `GenericAttention`.

    Source: Selvaraju et al. 2017, arXiv 1610.02391, as arXiv 2012.09838 applies it to attention.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import AttentionGradCam
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> method = AttentionGradCam(model)
        >>> tokens = method.attribute(
        ...     torch.rand(1, 3, 160, 160), target=1, return_input_shape=False
        ... )
        >>> tokens.shape, bool((tokens >= 0).all() and (tokens <= 1).all())
        (torch.Size([1, 10, 10]), True)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        weights_from: Literal["explained_rows", "all"] = "explained_rows",
        scale: Literal["minmax"] | None = "minmax",
        layers: Layers = None,
        rows: RowsOption = None,
        own: Own = "zero",
        output: OutputChoice = None,
        interpolation: str = "bilinear",
        strict: bool = True,
    ) -> None:
        options = AttentionOptions(layers, 0, rows, own, output, interpolation, strict)
        super().__init__(forward_func, options)
        check_choice("weights_from", weights_from, ("explained_rows", "all"))
        check_choice("scale", scale, ("minmax", None))
        self.weights_from = weights_from
        self.scale = scale

    @property
    def _method(self) -> Method:
        return GradCam(self.weights_from, self.scale, own=self.own)


class GradientAttention(AttentionAttribution):
    """The positive gradient of attention: `relu(∇A)`, averaged over heads and queries, summed.

    Each token gets what it would give as a key, whoever asks, so there are no explained rows. This
    is LeGrad (arXiv 2404.03214) for the score of the last layer alone; LeGrad itself also reads
    scores of the layers before.

    Args:
        forward_func: as in `GenericAttention`.
        layers: as in `GenericAttention`.
        start_layer: as in `GenericAttention`.
        own: has no effect, since no row is explained more than another: no token is ever set to 0.
        output: as in `GenericAttention`.
        interpolation: as in `GenericAttention`.
        strict: as in `GenericAttention`.

    Raises:
        ValueError: as `GenericAttention`.
        TypeError: as `GenericAttention`.

    Source: Bousselham et al. 2024, arXiv 2404.03214.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import GradientAttention
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> GradientAttention(model).attribute(torch.rand(1, 3, 160, 160), target=1).min() >= 0
        tensor(True)
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        layers: Layers = None,
        start_layer: int = 0,
        own: Own = "zero",
        output: OutputChoice = None,
        interpolation: str = "bilinear",
        strict: bool = True,
    ) -> None:
        options = AttentionOptions(layers, start_layer, None, own, output, interpolation, strict)
        super().__init__(forward_func, options)

    @property
    def _method(self) -> Method:
        return PositiveGradient()
