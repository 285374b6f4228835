"""Writes the measurements of `speed.py` to `docs/speed.md`, the README and `docs/speed.png`.

`python benchmarks/speed_report.py` prints the table and writes it between its markers in both
pages; the README gets fewer workloads. It plots time and memory against the number of tokens and of
layers. `speed.py` also prints the table, and imports its pairs of methods from here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed -->", "<!-- end of speed -->"
IN_README = (
    *("vit_s_197", "vit_b_197", "vit_b_197_batch8", "vit_s_1370", "vit_s_4097"),
    *("bert_512", "detector_850"),
)

RATIOS = (
    ("ours", "saliency"),
    ("ours", "limit"),
    ("recipe", "ours"),
    ("integrated_gradients", "ours"),
    ("eight_targets", "eight_calls"),
)
EIGHT = "eight_targets / eight_calls"
# Headings and keys of the columns, first for time, then for memory.
OF_TIME = {
    "ours / Saliency": "ours / saliency",
    "ours / limit": "ours / limit",
    "recipe / ours": "recipe / ours",
    "IG(50) / ours": "integrated_gradients / ours",
}
OF_MEMORY = {
    "memory: ours / limit": ("ours", "limit"),
    "memory: recipe / ours": ("recipe", "ours"),
}
# Name, colour and marker of each method's line. Markers differ because lines may overlap.
LINES = {
    "recipe": ("published recipe", "C1", "s"),
    "saliency": ("Captum Saliency", "C2", "^"),
    "limit": ("limit: forward and input gradient", "0.4", "o"),
    "ours": ("ours", "C3", "x"),
}

Found = dict[str, Any]
"""The results for one workload."""


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def spread(of: dict[str, float] | None) -> str:
    """Median (least–most) of the ratios of all rounds."""
    if of is None:
        return "–"
    if of["rounds"] == 1:
        return f"{number(of['median'])} (once)"
    return f"{number(of['median'])} ({number(of['least'])}–{number(of['most'])})"


def memory_ratio(found: Found, over: str, under: str) -> float | None:
    memory = found["memory"]
    return memory[over] / memory[under] if over in memory and under in memory else None


def summary_line(found: Found) -> str:
    """All results for a workload, for the terminal."""
    parts = [f"{pair} {spread(of)}" for pair, of in found["time"].items()]
    for over, under in OF_MEMORY.values():
        ratio = memory_ratio(found, over, under)
        parts += [] if ratio is None else [f"memory {over} / {under} {number(ratio)}"]
    for name, rate in found.get("calls_per_second", {}).items():
        parts.append(f"{name} {rate:g} calls per second")
    parts += [f"left out: {reason}" for reason in found["left_out"]]
    rounds = max(of["rounds"] for of in found["time"].values())
    return f"{rounds} rounds; " + "; ".join(parts)


def row(found: Found) -> str:
    title = found["title"]
    if EIGHT in found["time"]:  # its ratio fits no column
        title = f"{title}: {spread(found['time'][EIGHT])} of eight calls"
    cells = [title, str(found["tokens"]), str(found["batch"])]
    cells += [spread(found["time"].get(pair)) for pair in OF_TIME.values()]
    for over, under in OF_MEMORY.values():
        ratio = memory_ratio(found, over, under)
        cells.append("–" if ratio is None else number(ratio))
    cells.append(f"{found['memory']['ours'] / 1e6:.0f}" if found["memory"] else "–")
    return f"| {' | '.join(cells)} |"


def table(report: dict[str, Any], only: Sequence[str] | None = None) -> str:
    """The table and a description of the machine; with `only`, just the named workloads."""
    heads = ["workload", "N", "batch", *OF_TIME, *OF_MEMORY, "memory: ours, MB"]
    machine = report["machine"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    lines += [
        row(found)
        for name, found in report["workloads"].items()
        if (found["in_table"] if only is None else name in only)
    ]
    measured = (
        f"Median (least–most) of the ratios within rounds; {machine['threads']} threads, "
        f"{machine['cores']} cores of {machine['cpu']}, float32, "
        f"PyTorch {machine['versions']['torch']}."
    )
    return "\n".join([*lines, "", measured])


def into_page(text: str, lines: str) -> str:
    """The page with these lines between its markers; unchanged if it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{lines}\n{end}{after}" if begin and end else text


def series(found: list[Found], along: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Points (tokens or layers, value) of each method, for time and for memory."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for kind, key, unit in (("time", "median_seconds", 1.0), ("memory", "memory", 1e6)):
        lines[kind] = {
            name: sorted((of[along], of[key][name] / unit) for of in found if name in of[key])
            for name in LINES
        }
    return lines


def figure_of(report: dict[str, Any]) -> Figure:
    """Time and memory of the small ViT: against tokens on the left, against layers on the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    small = [of for name, of in report["workloads"].items() if name.startswith("vit_s_")]
    small = [of for of in small if of["batch"] == 1]
    figure = Figure(figsize=(8.6, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    columns = (
        ("tokens", "12 layers", [of for of in small if of["layers"] == 12]),
        ("layers", "577 tokens", [of for of in small if of["tokens"] == 577]),
    )
    for column, (along, fixed, found) in enumerate(columns):
        lines = series(found, along)
        for axis, kind in zip(axes[:, column], lines, strict=True):
            for name, (label, colour, mark) in LINES.items():
                points = lines[kind][name]
                axis.plot(
                    [at for at, _ in points],
                    [value for _, value in points],
                    color=colour,
                    marker=mark,
                    markerfacecolor="none",
                    label=label,
                )
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(visible=True, color="0.9")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bottom = axes[1, column]
        bottom.set_xticks(sorted({of[along] for of in found}))
        bottom.xaxis.set_minor_locator(NullLocator())
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bottom.set_xlabel(along)
        axes[0, column].set_title(f"ViT-S, {fixed}, one picture", fontsize="medium")
    axes[0, 0].set_ylabel("seconds of a call (median)")
    axes[1, 0].set_ylabel("memory of a call (MB)")
    axes[0, 0].legend(loc="upper left", fontsize="small")
    return figure


def main() -> None:
    report = json.loads(Path(__file__).with_name("speed.json").read_text("utf-8"))
    lines = table(report)
    print(lines)
    pages = {ROOT / "docs" / "speed.md": lines, ROOT / "README.md": table(report, IN_README)}
    for page, its_lines in pages.items():
        text = page.read_text("utf-8")
        if BEGIN in text and END in text:
            page.write_text(into_page(text, its_lines), "utf-8")
        else:
            print(f"{page.name} has no {BEGIN} and {END}: the table is not in it.")
    figure_of(report).savefig(ROOT / "docs" / "speed.png", dpi=100)


if __name__ == "__main__":
    main()
