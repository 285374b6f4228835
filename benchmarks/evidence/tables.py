"""A table of evidence: methods by metrics, each value with its interval and how it was computed.

The experiments in this folder compute tables and store them as JSON; `document.py` writes
`docs/evidence.md` from the stored tables.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from captum.attr import Attribution

from captum_generic_attn.metrics import Curve, Estimate

HERE = Path(__file__).resolve().parent
STORED = HERE / "tables"
LIBRARIES = ("captum-generic-attn", "torch", "captum", "timm", "transformers", "scipy")
RANDOM = "Random"
"""Prefix of the names of controls."""
BROKEN = "ours, broken: "
"""Prefix of the names of variants with a mistake. Neither they nor controls can win a column."""


Points = list[list[float]]


def points(curve: Curve) -> Points:
    """The fractions and means of a curve, to four digits."""
    ys = [round(y, 4) for y in curve.means.tolist()]
    return [[round(x, 4) for x in curve.fractions], ys]


def percent(share: Estimate) -> Estimate:
    """A share between 0 and 1, as percent."""
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high, share.count)


@dataclass(frozen=True)
class Column:
    """A metric: `key` in the rows, `title` of the column, which direction is better, and the number
    of decimals.
    """

    key: str
    title: str
    better: Literal["more", "less"]
    digits: int = 1


@dataclass(frozen=True)
class Table:
    """Methods by metrics.

    `rows` maps each method to its values by column key; missing values are left out. `about`
    describes the experiment in Markdown. `samples` is the number of independent examples.
    `settings` holds everything else that the values depend on. `seconds` is the wall time.
    `versions` are those of Python and the libraries. `curves` holds the points `[x, y]` of the
    curves behind some values, by method and column.
    """

    name: str
    title: str
    about: str
    columns: Sequence[Column]
    rows: Mapping[str, Mapping[str, Estimate]]
    samples: int
    settings: Mapping[str, object]
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Points]] = field(default_factory=dict)

    def store(self, folder: Path = STORED) -> Path:
        """Write the table to `<folder>/<name>.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        content = vars(self) | {
            "columns": [vars(column) for column in self.columns],
            "rows": {
                method: {key: _rounded(found) for key, found in figures.items()}
                for method, figures in self.rows.items()
            },
            "seconds": round(self.seconds, 1),
        }
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return path


def load(name: str, folder: Path = STORED) -> Table:
    """The stored table of that name."""
    content = json.loads((folder / f"{name}.json").read_text("utf-8"))
    content["columns"] = [Column(**column) for column in content["columns"]]
    content["rows"] = {
        method: {key: Estimate(*figures) for key, figures in found.items()}
        for method, found in content["rows"].items()
    }
    return Table(**content)


def _rounded(found: Estimate) -> list[float]:
    """Round to six digits, to which two runs must agree."""
    figures = [float(f"{value:.6g}") for value in (found.value, found.low, found.high)]
    return [*figures, found.count]


def versions(*others: str) -> dict[str, str]:
    """Versions of Python and of the libraries that the values depend on."""
    known = {name: version(name) for name in (*LIBRARIES, *others)}
    return {"python": platform.python_version(), **known}


@contextmanager
def timed(what: str) -> Iterator[list[float]]:
    """Print what is measured, and store its duration in seconds in the yielded list."""
    print(f"{what} ...", flush=True)
    start, taken = time.perf_counter(), [0.0]
    yield taken
    taken[0] = time.perf_counter() - start
    print(f"{what}: {taken[0]:.0f} s on {os.cpu_count()} cores", flush=True)


Found = tuple[dict[str, Estimate], dict[str, Points], dict[str, Estimate]]
"""Results of one method: values of the first table, their curves, values of the second table."""


def through(
    what: str, methods: Mapping[str, Attribution], figures: Callable[[Attribution], Found]
) -> tuple[
    dict[str, dict[str, Estimate]], dict[str, dict[str, Points]], dict[str, dict[str, Estimate]],
    float,
]:  # fmt: skip
    """The results of each method, by name, and the total duration in seconds."""
    first, curves, second = {}, {}, {}
    with timed(what) as taken:
        for name, method in methods.items():
            with timed(f"  {name}"):
                first[name], curves[name], second[name] = figures(method)
    return first, curves, second, taken[0]


def markdown(table: Table) -> str:
    """The table as Markdown: each value with its interval. Bold: the best value of a column and all
    values whose interval contains it.
    """
    head = ["method", *(f"{c.title} {'↑' if c.better == 'more' else '↓'}" for c in table.columns)]
    lines = [_line(head), _line(["---", *["--:"] * len(table.columns)])]
    best = {column.key: best_of(table, column)[1] for column in table.columns}
    for method, figures in table.rows.items():
        cells = [method]
        for column in table.columns:
            found = figures.get(column.key)
            if found is None:
                cells.append("–")
                continue
            text = f"{found.value:.{column.digits}f}"
            if found.low <= best[column.key] <= found.high and competes(method):
                text = f"**{text}**"
            cells.append(f"{text} ± {found.margin:.{column.digits}f}")
        lines.append(_line(cells))
    settings = ", ".join(f"{name} {value}" for name, value in table.settings.items())
    of = ", ".join(f"{name} {value}" for name, value in table.versions.items())
    note = f"{table.samples} samples; {settings}; {table.seconds:.0f} s. {of}."
    return "\n".join([f"### {table.title}", "", table.about, "", *lines, "", f"*{note}*", ""])


def competes(method: str) -> bool:
    """Whether a row is a method, rather than a control or a broken variant."""
    return not method.startswith((RANDOM, BROKEN))


def best_of(table: Table, column: Column) -> tuple[str, float]:
    """The best of the competing methods, and its value."""
    values = [
        (figures[column.key].value, method)
        for method, figures in table.rows.items()
        if column.key in figures and competes(method)
    ]
    value, method = max(values) if column.better == "more" else min(values)
    return method, value


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
