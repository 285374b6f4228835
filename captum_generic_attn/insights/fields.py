"""The fields of the page of Captum Insights for the constructor options of a method.

Fields follow from the constructor's signature: numbers, choices, and lines of text. `entries`
registers them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from captum_generic_attn.captum_api.base import ModelAttribution
from captum_generic_attn.lrp import RULE_SETS

NOT_ON_THE_PAGE = frozenset({"rule"})
"""Options that no field can express: functions."""


@dataclass(frozen=True)
class Field:
    """A field of the page.

    Attributes:
        value: what it shows at first.
        parse: from what the page sends to the option. Insights applies it again to its own result,
            so that comes back as it is.
        choices: what there is to choose from; `None` for a number or a line of text.
    """

    value: str | int
    parse: Callable[[Any], Any]
    choices: tuple[str, ...] | None = None


def fields_of(method: type[ModelAttribution]) -> dict[str, Field]:
    """A field for each constructor option that the page can express.

    `layers` takes names, `rows` whole numbers, with spaces between, `output` a name or an index; an
    empty line is `None`.

    Args:
        method: a class of this package.

    Returns:
        Fields by the names of the options, in the constructor's order.

    Raises:
        TypeError: if no field is known for an option.

    Example:
        >>> from captum_generic_attn import AttentionGradCam
        >>> fields = fields_of(AttentionGradCam)
        >>> fields["scale"].choices, fields["scale"].parse("None")
        (('minmax', 'None'), None)
        >>> fields["rows"].parse("0 2")
        [0, 2]
    """
    hints = get_type_hints(method.__init__)
    return {
        option.name: _field(method, option, hints[option.name])
        for option in inspect.signature(method).parameters.values()
        if option.kind is option.KEYWORD_ONLY and option.name not in NOT_ON_THE_PAGE
    }


def _field(method: type[ModelAttribution], option: inspect.Parameter, hint: Any) -> Field:
    name, default = option.name, option.default
    if hint is int:
        return Field(default, _whole_number)
    if name in _LINES:
        return Field("" if default is None else str(default), _LINES[name])
    # The constructor itself knows which of them it takes.
    choices = [c for c in _choices(name, hint) if _accepts(method, name, c)]
    if not choices:
        raise TypeError(f"no field is known for {method.__name__}({name}: {hint})")
    values = {str(choice): choice for choice in choices}
    return Field(str(default), lambda sent: _chosen(name, values, sent), tuple(values))


def _choices(name: str, hint: Any) -> tuple[Any, ...]:
    if name in _NAMED:
        return _NAMED[name]
    if hint is bool:
        return True, False
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = get_args(hint)
    if {get_origin(part) for part in parts if part is not NoneType} == {Literal}:
        return *(v for part in parts for v in get_args(part)), *([None] * (NoneType in parts))
    return ()


def _accepts(method: Callable[..., ModelAttribution], name: str, value: object) -> bool:
    try:
        method(_no_model, **{name: value})
    except ValueError:
        return False
    return True


def _no_model() -> None:
    """Stands where a constructor needs a model that it does not look at."""


def _chosen(name: str, values: dict[str, Any], sent: object) -> object:
    if str(sent) not in values:
        raise ValueError(f"{name}={sent!r} is none of {', '.join(values)}")
    return values[str(sent)]


def _whole_number(sent: object) -> int:
    try:
        return int(str(sent))
    except ValueError:
        # The page sends null for an empty field.
        seen = "an empty field" if sent is None else repr(sent)
        raise ValueError(f"a whole number is needed, not {seen}") from None


def _words(sent: Any) -> Any:
    return sent.split() or None if isinstance(sent, str) else sent


def _whole_numbers(sent: Any) -> Any:
    words = _words(sent)
    return None if words is None else [_whole_number(word) for word in words]


def _name_or_index(sent: Any) -> Any:
    if not isinstance(sent, str):
        return sent
    text = sent.strip()
    return int(text) if text.isdecimal() else text or None


_LINES: dict[str, Callable[[Any], Any]] = {
    "layers": _words,
    "rows": _whole_numbers,
    "output": _name_or_index,
}
"""Options that are a line of text on the page."""

_NAMED: dict[str, tuple[Any, ...]] = {
    "interpolation": ("bilinear", "nearest"),
    "rules": tuple(RULE_SETS),
    "lrp": (False, *RULE_SETS),
}
"""Options whose names the signature does not tell."""
