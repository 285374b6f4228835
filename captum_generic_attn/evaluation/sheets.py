"""The results of a report as tables of texts, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from captum_generic_attn.evaluation.scores import METRICS, Column, column, metric_of
from captum_generic_attn.metrics import Estimate

# A terminal has no room for sixteen columns; the JSON has all of them.
_SHOWN_WORDS = (5, 10, 20, 40, 80)
_MISSING = "–"
_BECOME = {"black": "black", "mean": "the image's mean colour", "blur": "blurred"}


@dataclass(frozen=True)
class Sheet:
    """One table: `rows` maps the names of methods to their cells, one for each of `heads`.

    `counts` says how many examples each column rests on; `controls` are the rows that are random.
    """

    title: str
    heads: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    counts: tuple[int, ...]
    controls: tuple[str, ...]


def sheets(figures: Mapping[str, Mapping[str, Estimate]], controls: Sequence[str]) -> list[Sheet]:
    """The figures in tables by what they ask; of tables without a column there is none.

    Args:
        figures: by method, then by figure.
        controls: which of the methods are random.

    Example:
        >>> found = {"ours": {"saco": Estimate(0.5, 0.4, 0.6, 9)}}
        >>> [sheet] = sheets(found, [])
        >>> sheet.heads, sheet.rows["ours"]
        (('SaCo ↑',), ('0.50 ± 0.10',))
    """
    keys = list(dict.fromkeys(key for found in figures.values() for key in found))
    groups: dict[str, list[str]] = {metric.question: [] for metric in METRICS.values()}
    for key in keys:
        number = key.partition("@")[2]
        if not number or int(number) in _SHOWN_WORDS:
            groups[metric_of(key).question].append(key)
    return [
        Sheet(
            title,
            tuple(_head(column(key)) for key in chosen),
            {
                name: tuple(_cell(found.get(key), column(key)) for key in chosen)
                for name, found in figures.items()
            },
            tuple(
                max(found[key].count for found in figures.values() if key in found)
                for key in chosen
            ),
            tuple(controls),
        )
        for title, chosen in groups.items()
        if chosen
    ]


def legend(about: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What the tables show, and how to read them.

    Args:
        about: of a `Report`.
        settings: of a `Report`.
    """
    kind, count, available = about["kind"], about["evaluated"], about["available"]
    chosen = "" if count == available else f" (drawn at random out of {available})"
    explained = (
        "the class that the model itself puts first"
        if about["explained"] == "prediction"
        else "the class that the data name"
    )
    lines = [
        f"{count} {kind if count > 1 else kind[:-1]}{chosen}, explained: {explained}.",
        f"↑ more is better, ↓ less is; ± half of the 95 % interval (bootstrap over {kind}).",
    ]
    named = "names the class" if about["multi_label"] else "puts the class first"
    most = 100 if kind == "texts" else 90  # pixels are removed up to 0.9 of them
    computed = [metric for name, metric in METRICS.items() if name in settings["metrics"]]
    lines += dict.fromkeys(metric.legend.format(named=named, most=most) for metric in computed)
    if settings.get("removed"):
        patch = settings["patch"]
        parts = "pixels" if patch is None else f"patches of {patch} × {patch} pixels"
        by_colour: dict[str, list[str]] = {}
        for metric, colour in settings["removed"].items():
            titles = [shown.title for shown in METRICS[metric].columns.values()]
            by_colour.setdefault(colour, []).extend(titles)
        told = ", ".join(f"{_BECOME[colour]} ({', '.join(of)})" for colour, of in by_colour.items())
        lines.append(f"Removed {parts} become {told}.")
    return lines


def _head(shown: Column) -> str:
    return f"{shown.title} {'↑' if shown.higher_is_better else '↓'}"


def _cell(figure: Estimate | None, shown: Column) -> str:
    if figure is None:
        return _MISSING
    value = f"{figure.value:.{shown.digits}f}"
    if figure.count == 1:  # one example has no interval
        return value
    return f"{value} ± {figure.margin:.{shown.digits}f}"
