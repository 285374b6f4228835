"""Our methods as entries of the page's list: put in, taken out, selected.

Insights makes an entry of the model alone and hands its arguments to `attribute`, while our options
belong to constructors: an entry is a class that makes the method when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor

from captum_generic_attn.attribution import AttentionAttribution
from captum_generic_attn.baselines import method_classes
from captum_generic_attn.captum_api.base import ModelAttribution
from captum_generic_attn.insights.fields import Field, fields_of
from captum_generic_attn.insights.requirement import require_insights

if TYPE_CHECKING:
    from captum.insights import AttributionVisualizer


class Entry(Attribution):
    """A method whose options are arguments of `attribute`, as Insights hands them over.

    Attributes:
        method: the class that it makes.
        per_token: whether the elements of a token share its value.
    """

    method: ClassVar[type[ModelAttribution]]
    per_token: ClassVar[bool]

    @classmethod
    def get_name(cls) -> str:
        """The name on the page, which says whether tokens count once."""
        name: str = cls.method.get_name()
        return f"{name} (per token)" if cls.per_token else name

    @log_usage()
    def attribute(
        self,
        inputs: tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: object = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """As `attribute` of the method with these options of its constructor, in twice its time if
        tokens count once.
        """
        method = self.method(self.forward_func, **options)
        asked = inputs, target, additional_forward_args
        maps = cast(tuple[Tensor, ...], method.attribute(*asked))
        if not self.per_token:
            return maps
        values = method.attribute(*asked, return_input_shape=False)
        return tuple(per_token(*pair) for pair in zip(maps, values, strict=True))


def per_token(attributions: Tensor, values: Tensor) -> Tensor:
    """A map of an input in which each token counts once, however many elements it has.

    A token's value stands undivided in each of its elements, as in Captum's methods for grouped
    features. Sums over an input, such as the contributions that Insights shows, then count each
    value as often as its token has elements: 192 times for a patch of 8 × 8 pixels, once for a
    word. Here each example's map is scaled so that its absolute values sum to those of its tokens.

    Args:
        attributions: `[B, ...]`, what a method over attention returns for an input.
        values: `[B, N]` or `[B, h, w]`, what it returns with `return_input_shape=False`.

    Returns:
        In the shape of `attributions`, zeros where they are zero. Where each token has as many
        elements, each has its share; the sums are right for any interpolation.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import GenericAttention
        >>> method = GenericAttention(timm.create_model("test_vit", num_classes=5).eval())
        >>> asked = torch.rand(1, 3, 160, 160), 1
        >>> values = method.attribute(*asked, return_input_shape=False)
        >>> shared = per_token(method.attribute(*asked), values)
        >>> torch.allclose(shared.sum(), values.sum())
        True
    """
    wanted, found = (t.abs().flatten(1).sum(1) for t in (values, attributions))
    share = torch.where(found > 0, wanted / found.clamp(min=torch.finfo(found.dtype).tiny), 0)
    return attributions * share.view(-1, *[1] * (attributions.ndim - 1))


def register() -> None:
    """Add our methods, with their arguments, to the list of Captum Insights' page.

    Each method over attention comes a second time, `(per token)`, see `per_token`; `Lrp` has a
    value for each element. Entries of ours that are there already stay as they are.

    Raises:
        ImportError: if Captum Insights is not installed; the message says what to do.
        ValueError: if the list has a method of the same name that is not ours.

    Example:
        >>> register()  # doctest: +SKIP
        >>> from captum.insights.attr_vis import config  # doctest: +SKIP
        >>> config.ATTRIBUTION_METHOD_CONFIG["Lrp"].params  # doctest: +SKIP
        {'rules': StrEnumConfig(value='chefer2021_full', ...), 'output': StrConfig(value='', ...)}
        >>> unregister()  # doctest: +SKIP
    """
    methods, configs = _lists()
    entries = {entry.get_name(): entry for entry in _entries()}
    missing = [name for name in entries if not _is_ours(methods.get(name))]
    if taken := [name for name in missing if name in methods or name in configs]:
        raise ValueError(
            f"Captum Insights has another method named {', '.join(taken)}: take it out of "
            "captum.insights.attr_vis.config first, or give it another name"
        )
    for name in missing:
        methods[name] = entries[name]
        configs[name] = _config(entries[name].method)


def unregister() -> None:
    """Take out of the page's list what `register` added; what others added stays.

    Raises:
        ImportError: if Captum Insights is not installed.
    """
    methods, configs = _lists()
    for name in [name for name, entry in methods.items() if _is_ours(entry)]:
        del methods[name]
        configs.pop(name, None)


def select(visualizer: AttributionVisualizer, method: str = "Generic Attention") -> None:
    """Have a method selected when the page opens, in place of integrated gradients.

    Args:
        visualizer: whose page.
        method: its name on the page, ours or one of Captum's.

    Raises:
        ImportError: if Captum Insights is not installed.
        ValueError: if the page's list has no such method.

    Example:
        >>> visualizer = image_visualizer()  # doctest: +SKIP
        >>> select(visualizer, "Attention Rollout")  # doctest: +SKIP
        >>> visualizer.get_insights_config()["selected_method"]  # doctest: +SKIP
        'Attention Rollout'
    """
    methods, configs = _lists()
    if method not in methods:
        raise ValueError(
            f"no method is named {method!r}; there are: {', '.join(methods)}. "
            "insights.register() adds ours"
        )
    params = configs[method].params if method in configs else {}
    visualizer._update_config(  # noqa: SLF001 - what the page itself calls
        {
            "attribution_method": method,
            "arguments": {name: param.value for name, param in params.items()},
            "prediction": "all",
            "classes": [],
        }
    )


def _lists() -> tuple[dict[str, Any], dict[str, Any]]:
    """The classes and the arguments that Insights looks up by name."""
    require_insights()
    from captum.insights.attr_vis import config

    return (
        cast(dict[str, Any], config.ATTRIBUTION_NAMES_TO_METHODS),
        cast(dict[str, Any], config.ATTRIBUTION_METHOD_CONFIG),
    )


def _is_ours(entry: object) -> bool:
    return isinstance(entry, type) and issubclass(entry, Entry)


def _entries() -> list[type[Entry]]:
    return [
        type(method.__name__, (Entry,), {"method": method, "per_token": shared})
        for method in method_classes()
        for shared in ((False, True) if issubclass(method, AttentionAttribution) else (False,))
    ]


def _config(method: type[ModelAttribution]) -> Any:
    from captum.insights.attr_vis.config import ConfigParameters

    fields = fields_of(method)
    return ConfigParameters(
        params={name: _param(field) for name, field in fields.items()},
        post_process={name: field.parse for name, field in fields.items()},
    )


def _param(field: Field) -> Any:
    from captum.insights.attr_vis import config

    if field.choices is not None:
        return config.StrEnumConfig(value=field.value, limit=list(field.choices))
    if isinstance(field.value, int):
        return config.NumberConfig(value=field.value)
    return config.StrConfig(value=field.value)
