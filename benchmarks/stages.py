"""Time of an attribution by stage, compared with the limit.

`python benchmarks/stages.py` measures some workloads of `workloads.py` and writes the table of
`docs/speed.md`. Each stage is timed by wrapping the functions that it runs in. Ours and the limit
alternate, and each number is a median in milliseconds.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import CONTENDERS
from workloads import WORKLOADS, Task, Workload

from captum_generic_attn import attribution
from captum_generic_attn.capture import Capture
from captum_generic_attn.relevance import backward

PAGE = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
BEGIN, END = "<!-- stages -->", "<!-- end of stages -->"
NAMES = ("vit_s_197", "vit_b_197", "vit_s_577", "vit_s_1370", "bert_512", "detector_850")
COLUMNS = (
    "forward, plain",
    "forward, captured",
    "backward of the limit",
    "backward without the method",
    "attention recomputed, rows",
    "the rest",
)


class Stopwatch:
    """Accumulates the seconds spent in wrapped functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def watching(self, owner: Any, name: str, stage: str) -> Iterator[None]:
        """Add the time spent in `owner.name` to a stage while the context is active."""
        function: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] += time.perf_counter() - start

        setattr(owner, name, watched)
        try:
            yield
        finally:
            setattr(owner, name, function)


def stages_of(task: Task, rounds: int) -> dict[str, float]:
    """Median milliseconds of each stage."""
    ours, limit = CONTENDERS["ours"](task), CONTENDERS["limit"](task)
    found: dict[str, list[float]] = defaultdict(list)
    for at in range(rounds + 2):
        watch = Stopwatch()
        start = time.perf_counter()
        with (
            watch.watching(attribution, "capture_forward", "captured"),
            watch.watching(Capture, "backward", "backward"),
            watch.watching(backward._BackwardPass, "_receive", "receive"),  # noqa: SLF001
            watch.watching(attribution, "explain", "explain"),
        ):
            ours()
        whole = time.perf_counter() - start
        start = time.perf_counter()
        with watch.watching(torch.autograd, "grad", "limit's"):
            limit()
        limits = time.perf_counter() - start
        if at < 2:  # to warm up
            continue
        seconds = watch.seconds
        own = seconds["receive"] + seconds["explain"] - seconds["backward"]
        of_limit = limits - seconds["limit's"]
        figures = (
            of_limit,
            seconds["captured"],
            seconds["limit's"],
            seconds["backward"] - seconds["receive"],
            own,
            whole - seconds["captured"] - seconds["explain"],
        )
        for column, figure in zip(COLUMNS, figures, strict=True):
            found[column].append(figure)
        found["ours"].append(whole)
        found["limit"].append(limits)
    return {column: 1e3 * median(values) for column, values in found.items()}


def row(workload: Workload, stages: dict[str, float]) -> str:
    cells = [f"{stages[column]:.0f}" for column in ("limit", "ours", *COLUMNS)]
    return f"| {workload.title}, {workload.tokens} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    heads = ["milliseconds", "limit", "ours", *COLUMNS]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for workload in WORKLOADS:
        if workload.name in NAMES:
            lines.append(row(workload, stages_of(workload.build(), arguments.rounds)))
            print(lines[-1], flush=True)
    before, begin, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{begin}\n{table}\n{end}{after}", "utf-8")


if __name__ == "__main__":
    main()
