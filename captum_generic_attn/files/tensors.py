"""Results in files: tensors under structured names, and beside them what is no tensor, as JSON.

`relevance` and `compare` write their objects with it, in safetensors' format: nothing in a file is
ever run. What they read may come from anyone: the library checks that names, shapes and offsets fit
the file; here its header is bounded, and whoever reads says of every value and every tensor what it
has to be (`Value`, `SavedFile.tensor`), or a `ValueError` tells file, place, what was seen and what
was expected.
"""

from __future__ import annotations

import contextlib
import json
import reprlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

VERSION = 1
"""Of the format, in each file: a greater one tells older releases that they cannot read it."""

HEADER_LIMIT = 16 * 2**20
"""Most bytes of a file's header, some 20 000 attention calls: safetensors reads any up to 100 MB
into ten times the memory before anything can be asked."""

FLOATS = ("F32", "F64")
"""Safetensors' names of the types of relevance."""

INTEGERS = ("I64",)
"""The same of positions."""

NUMBERS = ("BOOL", "U8", "I8", "I16", "I32", *INTEGERS, "F16", "BF16", *FLOATS)
"""The same of what methods may return: those with which PyTorch computes."""

Key = tuple[str | int, ...]


def write(
    path: str | PathLike[str], entry: str, plain: object, tensors: Mapping[Key, Tensor]
) -> None:
    """Write tensors, and the rest as one entry of metadata: equal objects make equal files.

    Args:
        path: where to; an existing file is replaced.
        entry: what kind of object it is.
        plain: what is no tensor.
        tensors: by tuples of names and numbers.

    Raises:
        ValueError: if there are more of them than `opened` would read; no file is left.
    """
    from safetensors.torch import save_file

    contiguous = {
        json.dumps(key): tensor.clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    save_file(contiguous, path, {entry: json.dumps({"version": VERSION, "content": plain})})
    if (header := _header(path)) > HEADER_LIMIT:
        Path(path).unlink()
        raise ValueError(
            f"{path} is not written: names and shapes of {len(tensors)} tensors take {header} "
            f"bytes, and at most {HEADER_LIMIT} are read again"
        )


@contextlib.contextmanager
def opened(path: str | PathLike[str], entry: str) -> Iterator[SavedFile]:
    """A file that `write` wrote; at the end all its tensors have to be read.

    Args:
        path: the file.
        entry: what kind of object it must hold.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no such file, or its format is newer than `VERSION`.
    """
    from safetensors import SafetensorError, safe_open

    where = Path(path)
    subject = f"{path} is no saved {entry.capitalize()}"
    if where.exists() and not where.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{subject}: it is no file but a folder or a device")
    if (header := _header(where)) > HEADER_LIMIT:
        raise ValueError(
            f"{subject}: its first 8 bytes announce a header of {header} bytes; a safetensors file "
            f"with at most {HEADER_LIMIT} is expected"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if entry not in metadata:
                kinds = reprlib.repr([*metadata])
                raise ValueError(f"{subject}: its metadata has {kinds}; expected {entry!r}")
            whole = Value(_parsed(metadata[entry], entry, subject), entry, subject)
            saved = SavedFile(_content(whole), file, where.stat().st_size)
            yield saved
            saved.check_all_read()
    except SafetensorError as error:
        raise ValueError(f"{subject}: {str(error)[:300]}") from error


def _header(path: str | PathLike[str]) -> int:
    """The length of a safetensors file's header, from its first 8 bytes."""
    with Path(path).open("rb") as start:
        return int.from_bytes(start.read(8), "little")


def _content(whole: Value) -> Value:
    """What stands beside the version, which has to be one that is known."""
    version = whole.items().get("version")
    if version is None:
        raise whole.wrong(f"an object with the version of the format, {VERSION}")
    if version.whole(1) > VERSION:
        raise ValueError(
            f"{whole.subject} that can be read here: it has version {reprlib.repr(version.value)} "
            f"of the format, and this captum_generic_attn reads up to {VERSION}; use the release "
            "that wrote it, or a newer one"
        )
    _, content = whole.fields("version", "content")
    return content


def _parsed(text: str, entry: str, subject: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        error = "it is nested too deeply"
    except ValueError as fault:
        error = str(fault)[:300]
    raise ValueError(f"{subject}: its metadata {entry!r} is no JSON that can be read: {error}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has two entries of one name")
    return found


@dataclass(frozen=True)
class Value:
    """A value of a file's JSON, not trusted: each method returns it as what it is asked for.

    `place` says where it stands, `subject` which file it makes unreadable if it is something else.

    Example:
        >>> tokens = Value({"tokens": -3}, "relevance", "a.st is no saved Relevance").items()
        >>> tokens["tokens"].whole(1)
        Traceback (most recent call last):
        ...
        ValueError: a.st is no saved Relevance: relevance.tokens is -3; expected a whole number
        of at least 1
    """

    value: object
    place: str
    subject: str

    def wrong(self, expected: str) -> ValueError:
        """The error that says what was seen here, and what was expected."""
        return ValueError(
            f"{self.subject}: {self.place} is {reprlib.repr(self.value)}; expected {expected}"
        )

    def items(self) -> dict[str, Value]:
        """An object's entries."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return {self._of(name).text(): self._of(name, value) for name, value in self.value.items()}

    def fields(self, *names: str) -> list[Value]:
        """The entries of an object that has these and no others, in their order."""
        found = self.items()
        if found.keys() != set(names):
            raise self.wrong(f"an object of {', '.join(names)}")
        return [found[name] for name in names]

    def entries(self) -> list[Value]:
        """A list's entries."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [self._of(str(i), value) for i, value in enumerate(self.value)]

    def _of(self, name: str, *value: object) -> Value:
        return Value(value[0] if value else name, f"{self.place}.{name[:80]}", self.subject)

    def text(self, among: Collection[str] | None = None) -> str:
        """Text that can be printed; one of `among`, if given."""
        if not isinstance(self.value, str):
            raise self.wrong("text")
        try:
            self.value.encode()
        except UnicodeEncodeError:
            raise self.wrong("text without halves of surrogate pairs") from None
        if among is not None and self.value not in among:
            raise self.wrong(f"one of {reprlib.repr([*among])}")
        return self.value

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def whole(self, least: int, most: int | None = None) -> int:
        """A whole number in these bounds."""
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        if type(self.value) is not int:  # True is an int too
            raise self.wrong(f"a whole number {bounds}")
        if self.value < least or (most is not None and self.value > most):
            raise self.wrong(f"a whole number {bounds}")
        return self.value

    def seconds(self) -> float:
        """A finite number, not negative."""
        if type(self.value) in (int, float):  # True is an int too
            number = cast(float, self.value)
            if 0 <= number <= sys.float_info.max:
                return float(number)
        raise self.wrong("a number of seconds")


class SavedFile:
    """A file that is being read: `plain` is what is no tensor."""

    def __init__(self, plain: Value, file: Any, size: int) -> None:
        self.plain = plain
        self._file = file
        self._size = size
        self._names = set(file.keys())
        self._unread = set(self._names)

    def tensor(
        self, key: Key, dtypes: Collection[str], shape: Sequence[int] | None = None
    ) -> Tensor:
        """A tensor, on the CPU: of one of these types, and of this shape if it is given.

        Raises:
            ValueError: if there is none, it is another, or one of its axes is longer than the file,
                which safetensors allows of those without elements.
        """
        found = tuple(self._slice(key).get_shape())
        if max(found, default=0) > self._size:
            raise self._wrong(key, f"has shape {list(found)}", "no axis longer than the file")
        if shape is not None and found != tuple(shape):
            raise self._wrong(key, f"has shape {list(found)}", f"{list(shape)}")
        dtype = self._slice(key).get_dtype()
        if dtype not in dtypes:
            raise self._wrong(key, f"has type {dtype}", f"one of {', '.join(dtypes)}")
        self._unread.discard(json.dumps(key))
        return cast(Tensor, self._file.get_tensor(json.dumps(key)))

    def positions(self, key: Key, shape: Sequence[int], tokens: int) -> Tensor:
        """A tensor of positions among so many tokens, -1 for none.

        Raises:
            ValueError: if there is none, or it is another.
        """
        found = self.tensor(key, INTEGERS, shape)
        if found.numel() and not -1 <= int(found.min()) <= int(found.max()) < tokens:
            seen = f"has positions from {int(found.min())} to {int(found.max())}"
            raise self._wrong(key, seen, f"those of {tokens} tokens, or -1")
        return found

    def check_all_read(self) -> None:
        """Check that all tensors of the file were read.

        Raises:
            ValueError: if it has.
        """
        if self._unread:
            names = reprlib.repr(sorted(self._unread))
            raise ValueError(f"{self.plain.subject}: it has tensors of unknown names: {names}")

    def _slice(self, key: Key) -> Any:
        name = json.dumps(key)
        if name not in self._names:
            raise ValueError(f"{self.plain.subject}: it has no tensor {name[:300]}")
        return self._file.get_slice(name)

    def _wrong(self, key: Key, seen: str, expected: str) -> ValueError:
        return ValueError(
            f"{self.plain.subject}: its tensor {json.dumps(key)[:300]} {seen}; expected {expected}"
        )
