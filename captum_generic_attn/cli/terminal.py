"""Output and exit codes of the command line: tables, warnings, errors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


def wrong(option: str, message: str) -> NoReturn:
    """Leave with code 2, since an argument is wrong."""
    raise typer.BadParameter(message, param_hint=option)


def fail(message: str) -> NoReturn:
    """Leave with code 1."""
    typer.secho(f"Error: {message}", err=True, fg="red")
    raise typer.Exit(1)


def warn(message: str) -> None:
    """A line on standard error."""
    typer.secho(f"Warning: {message}", err=True, fg="yellow")


def loaded(load: Callable[[], T]) -> T:
    """What `load` returns; if there is no such model, or it cannot be had, that is said."""
    from captum_generic_attn.errors import UnavailableWeightsError, UnknownModelError

    try:
        return load()
    except UnknownModelError as error:
        wrong("--model", str(error))
    except (UnavailableWeightsError, ImportError) as error:
        fail(str(error))


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """What is wrong with the model of that name is said; warnings are passed on, a line each."""
    with passed_on():
        try:
            yield
        except ValueError as error:
            fail(f"{name}: {error}")


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """Warnings are passed on, a line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        warn(message)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> None:
    """A table, whose columns are numbers but for those in `left`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        # Names and texts are no markup.
        table.add_row(*map(Text, row))
    Console().print(table)


def save(figure: Figure, output: Path) -> None:
    """Write the figure; if that cannot be done, it is said."""
    try:
        figure.savefig(output, dpi=150)
    except OSError as error:
        fail(f"{str(output)!r} cannot be written: {error.strerror or error}")
    except RuntimeError as error:  # a format that needs a program, such as LaTeX, which is missing
        fail(f"{str(output)!r} cannot be written: {error}")


def short(name: str, length: int = 22) -> str:
    """A name that fits over a panel."""
    return name if len(name) <= length else name[: length - 1] + "…"
