"""Measures time and memory of an attribution beside those of other methods.

`python benchmarks/speed.py [--quick] [--budget MINUTES] [--only NAME ...]`; workloads and their
names are in `workloads.py`, the methods in `contenders.py`. Writes `speed.json` after each
workload, from which `speed_report.py` makes the README's table and a figure. `--only` measures
these workloads and keeps the rest of the file; `--quick` takes a few minutes and writes nothing.

Time: all methods of a workload take turns in one process, A B C, B C A, ... Whatever else the
machine does slows all of a round alike, so ratios are taken within a round, and of these the
median, the least and the most are reported. Memory: one call in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import CONTENDERS, Call
from speed_report import RATIOS, summary_line, table
from workloads import INTEGRATED, WORKLOADS, Workload

RESULT = Path(__file__).resolve().with_name("speed.json")
LEAST, MOST, MOST_QUICK = 3, 15, 5
BUDGET, BUDGET_QUICK = 40.0, 4.0
# Of the C library's `mallopt`.
M_MMAP_THRESHOLD = -3
MEASURED = ("ours", "limit", "saliency", "recipe")

Round = dict[str, float]
"""Seconds of one call of each method that took part in the round."""
Report = dict[str, Any]


def take_turns(
    calls: Mapping[str, Call],
    budget: float,
    *,
    most: int = MOST,
    rounds: Mapping[str, int] | None = None,
    repeat: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Round]:
    """Time calls in rounds until `budget` seconds are used; at least 3 rounds, at most `most`.

    `rounds`: how many rounds an expensive call takes part in. It is not warmed up, as the others
    are with one call. `repeat`: how many calls are timed together, where one is too short.
    """
    few = rounds or {}
    start = clock()
    timed: list[Round] = []
    gc.freeze()  # collections pass over what is there already: modules, models
    try:
        for name, call in calls.items():
            if name not in few:
                call()
        while len(timed) < min(LEAST, most) or (len(timed) < most and clock() - start < budget):
            at = len(timed)
            part = [name for name in calls if at < few.get(name, most)]
            if not part:
                break
            turn = at % len(part)
            seconds: Round = {}
            for name in part[turn:] + part[:turn]:
                gc.collect()  # what one leaves behind is not cleaned up in another's time
                before = clock()
                for _ in range(repeat):
                    calls[name]()
                seconds[name] = (clock() - before) / repeat
            timed.append(seconds)
    finally:
        gc.unfreeze()
    return timed


def ratios(rounds: Sequence[Round]) -> dict[str, dict[str, float]]:
    """Of each pair, the ratios within the rounds that both took part in."""
    found = {}
    for over, under in RATIOS:
        values = [of[over] / of[under] for of in rounds if over in of and under in of]
        if values:
            found[f"{over} / {under}"] = {
                "median": round(median(values), 4),
                "least": round(min(values), 4),
                "most": round(max(values), 4),
                "rounds": len(values),
            }
    return found


def medians(rounds: Sequence[Round]) -> dict[str, float]:
    """Seconds of a call of each method; of this machine, with whatever else it did."""
    names = dict.fromkeys(name for of in rounds for name in of)
    return {name: float(f"{median(of[name] for of in rounds if name in of):.4g}") for name in names}


def in_proc(text: str, key: str) -> int:
    """A figure, in bytes, of a file of /proc, which has it in kB."""
    found = re.search(rf"^{key}:\s+(\d+) kB", text, flags=re.MULTILINE)
    if found is None:
        raise SystemExit(f"/proc does not tell {key}; memory is measured on Linux")
    return int(found.group(1)) * 1024


def refusal(measured: Workload, contender: str, meminfo: str) -> str | None:
    """Why the contender cannot run in the memory that is available, if it cannot."""
    needed = measured.gigabytes.get(contender, 0)
    available = in_proc(meminfo, "MemAvailable") / 1e9
    if available >= needed:
        return None
    return (
        f"{contender} of {measured.name} needs {needed:g} GB of free memory, and "
        f"{available:.1f} GB are available"
    )


def of_this_process(key: str) -> int:
    return in_proc(Path("/proc/self/status").read_text("ascii"), key)


def peak_of(measured: Workload, contender: str) -> int:
    """By how many bytes one call raises the peak of this process's resident memory."""
    # By default, freed blocks of up to 32 MiB are kept or given back depending on what was freed
    # before, and the peak depends on that. With a fixed threshold, each tensor of any size is a
    # mapping of its own and goes back when it is freed: the peak is that of what is in use.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16) == 1
    # A first call loads libraries and makes buffers, whatever the method: not those of the call.
    CONTENDERS[contender](measured.build(small=True))()
    return peak_increase(CONTENDERS[contender](measured.build()))


def peak_increase(call: Call) -> int:
    gc.collect()
    # Freed memory that the C library keeps would be used by the call, and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    before = of_this_process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # VmHWM, the peak, starts anew
    call()
    return of_this_process("VmHWM") - before


def memory_in_own_process(measured: Workload, contender: str, threads: int) -> int:
    """`peak_of` in a fresh process, which nothing else has used."""
    done = subprocess.run(  # noqa: S603 - this very script
        [sys.executable, __file__, "--threads", str(threads), "--memory", measured.name, contender],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def measure(measured: Workload, budget: float, threads: int, *, quick: bool) -> Report:
    """What `speed.json` has of a workload; memory first, and rounds in what is left of `budget`."""
    start = time.perf_counter()
    contenders = [name for name in measured.contenders if not (quick and name == INTEGRATED)]
    meminfo = Path("/proc/meminfo").read_text("ascii")
    reasons = {name: refusal(measured, name, meminfo) for name in contenders}
    contenders = [name for name in contenders if reasons[name] is None]
    memory = {
        name: memory_in_own_process(measured, name, threads)
        for name in MEASURED
        if measured.memory and name in contenders and not (quick and name == "saliency")
    }
    task = measured.build()
    rounds = take_turns(
        {name: CONTENDERS[name](task) for name in contenders},
        budget - (time.perf_counter() - start),
        most=MOST_QUICK if quick else MOST,
        rounds=measured.rounds,
        repeat=measured.calls,
    )
    seconds = medians(rounds)
    found: Report = {
        "title": measured.title,
        "layers": measured.layers,
        "tokens": measured.tokens,
        "batch": measured.batch,
        "in_table": measured.in_table,
        "time": ratios(rounds),
        "median_seconds": seconds,
        "memory": memory,
        "left_out": [reason for reason in reasons.values() if reason is not None],
    }
    if measured.calls > 1:
        found["calls_per_second"] = {name: round(1 / of, 1) for name, of in seconds.items()}
    return found


def machine(threads: int) -> dict[str, object]:
    """Where and with what the figures were made."""
    cpuinfo = Path("/proc/cpuinfo").read_text("utf-8")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, flags=re.MULTILINE)
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "captum", "timm", "transformers")},
    }


def merged(report: Report, name: str, found: Report) -> Report:
    """The report with the workload's new figures, in the order of `WORKLOADS`."""
    workloads = report["workloads"] | {name: found}
    order = [of.name for of in WORKLOADS]
    return report | {"workloads": {name: workloads[name] for name in order if name in workloads}}


def kept(path: Path, here: dict[str, object]) -> Report:
    """The report that `--only` adds to."""
    if not path.exists():
        return {"machine": here, "workloads": {}}
    report: Report = json.loads(path.read_text("utf-8"))
    if report["machine"] != here:
        raise SystemExit(
            f"{path.name} was measured on {report['machine']}, and this is {here}: figures of both "
            "do not belong into one file. Measure all workloads, without --only"
        )
    return report


def run(arguments: argparse.Namespace) -> None:
    here = machine(arguments.threads)
    only = arguments.only or [of.name for of in WORKLOADS if of.quick or not arguments.quick]
    # The quick ones first: what they leave of their equal shares of time is for the others.
    chosen = sorted((of for of in WORKLOADS if of.name in only), key=lambda of: of.seconds)
    report: Report = {"machine": here, "workloads": {}}
    if arguments.only and not arguments.quick:
        report = kept(RESULT, here)
    minutes = arguments.budget or (BUDGET_QUICK if arguments.quick else BUDGET)
    end = time.perf_counter() + 60 * minutes
    for i, measured in enumerate(chosen):
        start = time.perf_counter()
        budget = (end - start) / (len(chosen) - i)
        found = measure(measured, budget, arguments.threads, quick=arguments.quick)
        report = merged(report, measured.name, found)
        took = time.perf_counter() - start
        print(f"{measured.name} ({took:.0f} s): {summary_line(found)}", flush=True)
        if not arguments.quick:
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            RESULT.write_text(text, "utf-8")
    print(table(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [of.name for of in WORKLOADS]
    parser.add_argument("--quick", action="store_true", help="short workloads, few rounds")
    parser.add_argument("--budget", type=float, help="minutes that it may take, about")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="some workloads")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "METHOD"), help="bytes of one call")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        name, contender = arguments.memory
        print(peak_of(WORKLOADS[names.index(name)], contender))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
