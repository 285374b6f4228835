"""Options that several classes share: written once, complete in signatures, `help()` and IDEs.

A class takes them as `**options: Unpack[SomeOptions]`, with `SomeOptions` a `TypedDict`, which type
checkers and IDEs understand. `complete` adds them to the signature and the docstring that `inspect`
and `help()` show.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, get_args

from typing_extensions import get_type_hints


def complete(cls: type, shared: Callable[..., Any], docstring: Callable[[], str]) -> None:
    """Add the shared options of a class's constructor to its signature and docstring.

    The constructor then takes these options and no others.

    Args:
        cls: the class; one whose constructor unpacks no options stays as it is.
        shared: a function that has the options as parameters, with their defaults and types.
        docstring: gives a docstring with a section `Args:` in which the options are described.
    """
    constructor: Any = vars(cls).get("__init__")
    names = [] if constructor is None else unpacked_options(constructor)
    if not names:
        return
    signature, defaults = inspect.signature(constructor), inspect.signature(shared).parameters
    hints = get_type_hints(shared)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [defaults[name].replace(annotation=hints[name]) for name in names]
    complete_signature = signature.replace(parameters=[*own, *added])

    @functools.wraps(constructor)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        complete_signature.bind(self, *args, **options)  # refuses what only other classes take
        constructor(self, *args, **options)

    checked.__signature__ = complete_signature  # type: ignore[attr-defined]
    checked.__annotations__ = constructor.__annotations__ | {
        option.name: option.annotation for option in added
    }
    setattr(cls, "__init__", checked)  # noqa: B010 - mypy forbids the plain assignment
    if cls.__doc__:
        known = documented_arguments(docstring())
        cls.__doc__ = _with_arguments(cls.__doc__, {name: known[name] for name in names})


def unpacked_options(function: Callable[..., Any]) -> list[str]:
    """The names of the options that a function takes as `**options: Unpack[SomeOptions]`."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            (options,) = get_args(get_type_hints(function)[parameter.name]) or (object,)
            return list(get_type_hints(options))
    return []


def documented_arguments(docstring: str) -> dict[str, str]:
    r"""The entries of a docstring's section `Args:`, each as one line.

    Example:
        >>> documented_arguments("Sum.\n\nArgs:\n    a: one\n        number.\n    b: two.")
        {'a': 'one number.', 'b': 'two.'}
    """
    section = inspect.cleandoc(docstring).partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^ {4}(\w+): ", section, flags=re.MULTILINE)[1:]
    return {n: " ".join(text.split()) for n, text in zip(entries[::2], entries[1::2], strict=True)}


def _with_arguments(docstring: str, arguments: Mapping[str, str]) -> str:
    """A docstring with more entries at the end of its section `Args:`."""
    lines = inspect.cleandoc(docstring).splitlines()
    start = lines.index("Args:")
    end = next((i for i, line in enumerate(lines) if i > start and not line), len(lines))
    entries = [
        line
        for name, text in arguments.items()
        for line in textwrap.wrap(
            f"{name}: {text}", 92, initial_indent=" " * 4, subsequent_indent=" " * 8
        )
    ]
    return "\n".join([*lines[:end], *entries, *lines[end:]])
