"""The figures of a report as tables of texts: what the terminal and Markdown show alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from captum_generic_attn.evaluation.plan import FAITHFULNESS
from captum_generic_attn.evaluation.scores import Column, column
from captum_generic_attn.metrics import Estimate

# A terminal has no room for sixteen columns; the JSON has them all.
_SHOWN_WORDS = (5, 10, 20, 40, 80)
_MISSING = "–"
_BECOME = {"black": "black", "mean": "the picture's mean colour", "blur": "blurred"}


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
    groups: dict[str, list[str]] = {
        "Does the model need what the explanation points at?": [],
        "Does it point at the right place?": [],
        "Does it put first the words that people marked?": [],
    }
    needs, places, words = groups.values()
    for key in keys:
        metric = column(key).metric
        if metric in FAITHFULNESS:
            needs.append(key)
        elif metric != "token_f1":
            places.append(key)
        elif int(key.partition("@")[2]) in _SHOWN_WORDS:
            words.append(key)
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
    """What tables are of, and how they are to be read.

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
    metrics = settings["metrics"]
    if {"positive", "negative"} & set(metrics):
        most = 100 if kind == "texts" else 90  # pixels are removed up to 0.9 of them
        named = "names the class" if about["multi_label"] else "puts the class first"
        lines.append(
            f"positive, negative: area × 100 under the share that still {named}, while the most "
            f"or the least relevant parts are removed; {most} is the most."
        )
    if {"deletion", "insertion"} & set(metrics):
        lines.append("deletion, insertion: area × 100 under the class's probability.")
    if "saco" in metrics:
        lines.append("SaCo: from -1 to 1; chance is 0.")
    if "pointing" in metrics:
        lines.append("pointing game: the share of maps whose highest value is in the right place.")
    if "segmentation" in metrics:
        lines.append("pixel accuracy, mean IoU: of what is above a map's mean, as foreground.")
    if "token_f1" in metrics:
        lines.append("F1 at k: of the k words that come first, against the marked ones.")
    if settings.get("removed"):
        patch = settings["patch"]
        parts = "pixels" if patch is None else f"patches of {patch} × {patch} pixels"
        by_colour: dict[str, list[str]] = {}
        for metric, colour in settings["removed"].items():
            by_colour.setdefault(colour, []).append(column(metric).title)
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
