"""Reads the tables of a TOML file, with errors that name file, table, key, value and choices."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from captum_generic_attn.errors import PlanError
from captum_generic_attn.extras import needed


class Table:
    """One table of a TOML file.

    Args:
        file: where it stands, for messages and for relative paths.
        name: of the table.
        values: what it holds.
        keys: what it may hold.

    Raises:
        PlanError: if it holds any other key.

    Example:
        >>> table = Table(Path("plan.toml"), "data", {"limit": 0}, ["limit"])
        >>> table.whole("limit", least=1)
        Traceback (most recent call last):
            ...
        captum_generic_attn.errors.PlanError: plan.toml, [data] limit = 0: a whole number
        of at least 1 is needed
    """

    def __init__(
        self, file: Path, name: str, values: Mapping[str, Any], keys: Sequence[str]
    ) -> None:
        self.file = file
        self.name = name
        self.values = values
        for key in values:
            if key not in keys:
                raise PlanError(
                    f"{file}, [{name}]: there is no key {key!r}{nearest(key, keys)}; "
                    f"the keys are {', '.join(keys)}"
                )

    def __contains__(self, key: object) -> bool:
        return key in self.values

    def wrong(self, key: str, reason: str) -> NoReturn:
        """Raise a `PlanError` about a key.

        Args:
            key: which; one that is left out is told of as such.
            reason: what is wrong with its value, or what would be right.
        """
        seen = f"{key} = {_shown(self.values[key])}" if key in self else f"{key} is left out"
        raise PlanError(f"{self.file}, [{self.name}] {seen}: {reason}")

    def text(self, key: str) -> str | None:
        """A text that is not empty; `None` if the key is left out."""
        value = self.values.get(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            self.wrong(key, "a text in quotation marks is needed")
        return value

    def whole(self, key: str, *, least: int, most: int | None = None) -> int | None:
        """A whole number from `least` to `most`; `None` if the key is left out."""
        value = self.values.get(key)
        if value is None:
            return None
        # TOML's true is Python's True, an int.
        if type(value) is not int or value < least or (most is not None and value > most):
            limits = f"of at least {least}" if most is None else f"from {least} to {most}"
            self.wrong(key, f"a whole number {limits} is needed")
        return int(value)

    def one_of(self, key: str, choices: Sequence[str]) -> str | None:
        """One of some words; `None` if the key is left out."""
        value = self.text(key)
        if value is not None and value not in choices:
            self.wrong(key, f"there is {listed(choices)}{nearest(value, choices)}")
        return value

    def some_of(self, key: str, choices: Sequence[str]) -> tuple[str, ...] | None:
        """A list of some words, each once; `None` if the key is left out."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            self.wrong(key, f"a list of some of these is needed: {', '.join(choices)}")
        for name in value:
            if name not in choices:
                self.wrong(
                    key,
                    f"there is no {name!r}{nearest(name, choices)}; there is {listed(choices)}",
                )
        if len(set(value)) < len(value):
            self.wrong(key, "a name stands there twice")
        return tuple(value)

    def path(self, key: str) -> Path | None:
        """A path, from the folder of the TOML file; `None` if the key is left out."""
        value = self.text(key)
        return None if value is None else self.file.parent / Path(value).expanduser()

    def folder(self, key: str) -> Path | None:
        """A folder that exists; `None` if the key is left out."""
        path = self.path(key)
        if path is not None and not path.is_dir():
            self.wrong(key, f"{str(path)!r} is no folder (paths start from that of the TOML file)")
        return path

    def existing_file(self, key: str) -> Path | None:
        """A file that exists; `None` if the key is left out."""
        path = self.path(key)
        if path is not None and not path.is_file():
            self.wrong(key, f"{str(path)!r} is no file (paths start from the TOML file's folder)")
        return path


def read_tables(file: Path, keys: Mapping[str, Sequence[str]]) -> dict[str, Table]:
    """The tables of a TOML file; those that it leaves out are empty.

    Args:
        file: the TOML file.
        keys: what each table may hold.

    Raises:
        PlanError: if it is no TOML file, or holds other tables or keys.
        ImportError: if on Python 3.10 the reader of TOML files is not installed.
    """
    reader = needed("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        found = reader.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # nested too deeply
        raise PlanError(f"{file} is no TOML file that can be read: {error}") from error
    for name, values in found.items():
        if name not in keys:
            raise PlanError(
                f"{file}: there is no table [{name}]{nearest(name, keys)}; the tables are "
                f"{', '.join(f'[{known}]' for known in keys)}"
            )
        if not isinstance(values, dict):
            raise PlanError(
                f"{file}: {name} = {_shown(values)}: [{name}] is a table, with keys of its own"
            )
    return {name: Table(file, name, found.get(name, {}), known) for name, known in keys.items()}


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at known names that are similar to an unknown one; empty if there are none.

    Example:
        >>> nearest("delete", ["deletion", "saco"])
        ' (nearest: deletion)'
    """
    folded = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
    return f" (nearest: {', '.join(folded[one] for one in near)})" if near else ""


def listed(names: Sequence[str]) -> str:
    """Names in quotation marks, the last after an "or".

    Example:
        >>> listed(["black", "mean", "blur"])
        "'black', 'mean' or 'blur'"
    """
    *others, last = (repr(name) for name in names)
    return f"{', '.join(others)} or {last}" if others else last


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:58] + " …"
