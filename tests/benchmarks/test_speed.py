"""The benchmark of time and memory: its bookkeeping, its own recipe, its table.

No test looks at how long something takes: time is a clock that the calls themselves move.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit

from captum_generic_attn import GenericAttention

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("speed", "contenders", "workloads", "speed_report", "stages")
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's modules, which are scripts beside the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import contenders
        import speed
        import speed_report
        import stages
        import workloads

        yield SimpleNamespace(
            speed=speed, contenders=contenders, workloads=workloads, report=speed_report,
            stages=stages,
        )  # fmt: skip
        for name in MODULES:
            sys.modules.pop(name)


class Stage:
    """A clock, and calls that move it: `a` takes 1 second, `b` 2, `c` 3, ..."""

    def __init__(self, names: str):
        self.now = 100.0
        self.log: list[str] = []
        self.slowness = lambda: 1
        self.calls = {
            name: lambda name=name, seconds=i + 1: self.call(name, seconds)
            for i, name in enumerate(names)
        }

    def call(self, name: str, seconds: float) -> None:
        self.log.append(name)
        self.now += seconds * self.slowness()

    def clock(self) -> float:
        return self.now


# -- turns ----------------------------------------------------------------------------------------


def test_contenders_are_warmed_up_and_take_turns(benchmark):
    stage = Stage("abc")
    rounds = benchmark.speed.take_turns(stage.calls, 1e9, most=4, clock=stage.clock)
    assert "".join(stage.log) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert rounds == [{"a": 1, "b": 2, "c": 3}] * 4


@pytest.mark.parametrize(
    ("budget", "most", "count"),
    # The warm-up takes 3 seconds, and so does each round.
    [(0, 15, 3), (-5, 15, 3), (12.1, 15, 4), (11.9, 15, 3), (1e9, 15, 15), (1e9, 2, 2)],
)
def test_rounds_end_with_the_budget(benchmark, budget, most, count):
    stage = Stage("ab")
    rounds = benchmark.speed.take_turns(stage.calls, budget, most=most, clock=stage.clock)
    assert len(rounds) == count


def test_expensive_contenders_take_few_turns(benchmark):
    stage = Stage("abc")
    few = {"b": 2, "other": 1}
    rounds = benchmark.speed.take_turns(stage.calls, 0, rounds=few, clock=stage.clock)
    assert "".join(stage.log) == "ac" + "abc" + "bca" + "ac"
    assert [sorted(of) for of in rounds] == [["a", "b", "c"], ["a", "b", "c"], ["a", "c"]]


def test_rounds_end_with_the_last_turn(benchmark):
    stage = Stage("ab")
    rounds = benchmark.speed.take_turns(stage.calls, 1e9, rounds={"a": 1, "b": 1})
    assert "".join(stage.log) == "ab"
    assert len(rounds) == 1


def test_short_calls_are_timed_together(benchmark):
    stage = Stage("ab")
    rounds = benchmark.speed.take_turns(stage.calls, 0, repeat=4, clock=stage.clock)
    assert "".join(stage.log[2:10]) == "aaaabbbb"
    assert rounds == [{"a": 1, "b": 2}] * 3


def test_ratios_are_taken_within_a_round(benchmark):
    """A machine that is ten times slower in some rounds changes no ratio."""
    stage = Stage("ab")
    stage.calls = {"limit": stage.calls["a"], "ours": stage.calls["b"]}
    stage.slowness = lambda: 10 if len(stage.log) in {5, 6} else 1
    rounds = benchmark.speed.take_turns(stage.calls, 0, clock=stage.clock)
    assert [of["ours"] for of in rounds] == [2, 20, 2]
    assert benchmark.speed.ratios(rounds) == {
        "ours / limit": {"median": 2.0, "least": 2.0, "most": 2.0, "rounds": 3}
    }


def test_ratios_have_median_least_and_most_of_the_rounds_of_both(benchmark):
    rounds = [
        {"ours": 2.0, "limit": 1.0, "recipe": 5.0},
        {"ours": 3.0, "limit": 4.0},
        {"ours": 8.0, "limit": 8.0},
        {"ours": 6.0, "limit": 5.0, "recipe": 9.0},
    ]
    assert benchmark.speed.ratios(rounds) == {
        "ours / limit": {"median": 1.1, "least": 0.75, "most": 2.0, "rounds": 4},
        "recipe / ours": {"median": 2.0, "least": 1.5, "most": 2.5, "rounds": 2},
    }
    assert benchmark.speed.medians(rounds) == {"ours": 4.5, "limit": 4.5, "recipe": 7.0}


# -- stages ---------------------------------------------------------------------------------------


def test_stages_make_up_the_whole(benchmark):
    task = benchmark.workloads.Task(tiny_vit(), pictures(1), 3)
    found = benchmark.stages.stages_of(task, rounds=1)
    ours = (
        *("forward, captured", "backward without the method", "attention recomputed, rows"),
        "the rest",
    )
    limits = ("forward, plain", "backward of the limit")
    assert sum(found[stage] for stage in ours) == pytest.approx(found["ours"])
    assert sum(found[stage] for stage in limits) == pytest.approx(found["limit"])
    assert all(found[stage] > 0 for stage in (*ours, *limits))


def test_stopwatch_counts_every_call_and_lets_go(benchmark):
    owner = SimpleNamespace(work=lambda x: 2 * x)
    work, watch = owner.work, benchmark.stages.Stopwatch()
    with watch.watching(owner, "work", "stage"):
        assert [owner.work(1), owner.work(2)] == [2, 4]
        once = watch.seconds["stage"]
        owner.work(3)
    assert watch.seconds["stage"] > once > 0
    assert owner.work is work


# -- memory ---------------------------------------------------------------------------------------


HOLDING = """
import torch
import speed

def call():
    for _ in range(3):
        torch.ones(16, 1 << 20)  # 64 MiB, and given back
    return torch.ones(1 << 20)

call()
torch.ones(64, 1 << 20)  # an older, higher peak does not count
print(speed.peak_increase(call))
"""


@linux
def test_peak_is_what_a_call_holds_at_once():
    """In a process of its own, as it is measured: others give memory back meanwhile."""
    said = subprocess.run(
        [sys.executable, "-c", HOLDING], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    assert int(said.stdout) == pytest.approx(64 * 2**20, rel=0.05)


def test_memory_guard_says_what_is_missing(benchmark):
    measured = next(of for of in benchmark.workloads.WORKLOADS if of.tokens == 4097)
    meminfo = "MemTotal:       24000000 kB\nMemAvailable:   18000000 kB\n"
    assert benchmark.speed.refusal(measured, "recipe", meminfo) == (
        "recipe of vit_s_4097 needs 19 GB of free memory, and 18.4 GB are available"
    )
    assert benchmark.speed.refusal(measured, "ours", meminfo) is None
    enough = meminfo.replace("18000000", "18600000")
    assert benchmark.speed.refusal(measured, "recipe", enough) is None
    with pytest.raises(SystemExit, match="does not tell MemAvailable; memory is measured on Linux"):
        benchmark.speed.refusal(measured, "recipe", "")


# -- contenders -----------------------------------------------------------------------------------


def test_recipe_gives_what_the_package_gives(benchmark):
    model = tiny_vit()
    task = benchmark.workloads.Task(model, pictures(2), 3)
    method = GenericAttention(model)
    expected = method.attribute(task.inputs, target=3, return_input_shape=False).flatten(1)
    call = benchmark.contenders.recipe(task)
    for _ in range(2):  # the second call finds nothing of the first
        found = call()
        assert found.shape == expected.shape == (2, 16)
        assert expected.std() > 0.1 * expected.mean()
        assert (found - expected).abs().max() < 1e-9 * expected.max()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.blocks[0].attn.fused_attn


def test_limit_is_the_gradient_of_the_input(benchmark):
    model = tiny_vit()
    model.cls_token.requires_grad_(requires_grad=False)
    task = benchmark.workloads.Task(model, pictures(2), 3)
    gradient = benchmark.contenders.limit(task)()
    torch.testing.assert_close(gradient.abs(), benchmark.contenders.saliency(task)())
    untrained = [name for name, of in model.named_parameters() if not of.requires_grad]
    assert untrained == ["cls_token"]
    assert not task.inputs.requires_grad


def test_limit_of_integers_is_the_gradient_of_their_embedding(benchmark):
    model = tiny_text()
    task = benchmark.workloads.Task(model, sentences(2), 1, embedding=model.words)
    gradient = benchmark.contenders.limit(task)()
    kept = []
    handle = model.words.register_forward_hook(lambda _m, _i, output: kept.append(output))
    model(task.inputs)[:, 1].sum().backward(inputs=[model.words.weight])
    handle.remove()
    ours = torch.zeros_like(model.words.weight).index_add(
        0, task.inputs.flatten(), gradient.flatten(0, 1)
    )
    torch.testing.assert_close(ours, model.words.weight.grad)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.words._forward_hooks


def test_eight_targets_are_eight_calls(benchmark):
    task = benchmark.workloads.Task(tiny_vit(num_classes=9), pictures(1), 0)
    together = benchmark.contenders.eight_targets(task)()
    one_by_one = torch.stack(benchmark.contenders.eight_calls(task)())
    assert together.shape == (8, 1, 3, 32, 32)
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit_s_577", (1, 3, 64, 64)),
        ("test_vit_101", (1, 3, 64, 64)),
        ("bert_512", (1, 32)),
        ("language_model_2048", (1, 32)),
        ("detector_850", (1, 256, 4, 4)),
    ],
)
def test_small_workloads_are_explained(benchmark, name, shape):
    if name in {"bert_512", "language_model_2048"}:
        pytest.importorskip("transformers")
    measured = next(of for of in benchmark.workloads.WORKLOADS if of.name == name)
    task = measured.build(small=True)
    relevance = benchmark.contenders.ours(task)()
    assert relevance.shape == shape
    # Sharpened attention: the relevance of tokens differs.
    assert relevance.std() > 0.5 * relevance.mean() > 0
    gradient = benchmark.contenders.limit(task)()
    assert gradient.shape[:2] == shape[:2]
    assert gradient.abs().max() > 0
    if name == "bert_512":
        assert relevance[:, -8:].abs().max() == 0, "padding has no relevance"


def test_workloads_are_those_of_their_names(benchmark):
    names = [of.name for of in benchmark.workloads.WORKLOADS]
    assert len(set(names)) == len(names)
    vits = ["vit_s_197", "vit_b_197", "vit_s_577", "vit_b_577", "vit_s_1370", "vit_b_1370"]
    others = ["vit_s_4097", "vit_s_197_batch8", "vit_b_197_batch8", "vit_ti_197", "eight_targets"]
    depths = ["vit_s_577_layers3", "vit_s_577_layers6", "vit_s_577_layers24"]
    assert set(vits + others + depths) < set(names)
    for of in benchmark.workloads.WORKLOADS:
        assert set(of.contenders) <= set(benchmark.contenders.CONTENDERS)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def command(benchmark, monkeypatch, tmp_path):
    """The command on two workloads whose contenders do nothing; returns what it wrote."""
    speed = benchmark.speed
    workloads = tuple(
        benchmark.workloads.Workload(
            name, f"model {name}", 5, lambda small=False: None, ("ours", "limit"), seconds,
            quick=name == "slow",
        )
        for name, seconds in (("slow", 2), ("fast", 1))
    )  # fmt: skip
    monkeypatch.setattr(speed, "WORKLOADS", workloads)
    monkeypatch.setattr(speed, "RESULT", tmp_path / "speed.json")
    monkeypatch.setattr(speed, "in_proc", lambda text, key: 10**12)
    monkeypatch.setattr(speed, "machine", lambda threads: {
        "cpu": "abacus", "cores": 1, "threads": threads, "versions": {"torch": "2"},
    })  # fmt: skip
    bytes_of = {"ours": 300, "limit": 200}
    monkeypatch.setattr(speed, "memory_in_own_process", lambda _of, name, _threads: bytes_of[name])
    monkeypatch.setattr(speed, "CONTENDERS", {name: lambda _task: sum for name in bytes_of})
    monkeypatch.setattr(speed, "take_turns", lambda *_, **__: [{"ours": 3.0, "limit": 2.0}])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["speed.py", "--threads", "1", *arguments])
        speed.main()
        return json.loads(speed.RESULT.read_text("utf-8")) if speed.RESULT.exists() else None

    return call


@linux
def test_command_writes_what_it_measures(command, capsys):
    report = command()
    assert list(report["workloads"]) == ["slow", "fast"], "in the order of the table"
    assert report["machine"]["threads"] == 1
    assert report["workloads"]["slow"] == {
        "title": "model slow",
        "layers": 12,
        "tokens": 5,
        "batch": 1,
        "in_table": True,
        "time": {"ours / limit": {"median": 1.5, "least": 1.5, "most": 1.5, "rounds": 1}},
        "median_seconds": {"ours": 3.0, "limit": 2.0},
        "memory": {"ours": 300, "limit": 200},
        "left_out": [],
    }
    progress = capsys.readouterr().out.splitlines()
    expected = "1 rounds; ours / limit 1.50 (once); memory ours / limit 1.50"
    assert progress[0] == f"fast (0 s): {expected}", "the quick one first"
    assert progress[1] == f"slow (0 s): {expected}"
    assert "| model slow | 5 | 1 | – | 1.50 (once) | – | – | 1.50 | – | 0 |" in progress


@linux
def test_an_interrupted_run_keeps_what_it_has(benchmark, command, monkeypatch):
    measure = benchmark.speed.measure

    def interrupted(measured, *arguments, **options):
        if measured.name == "slow":
            raise KeyboardInterrupt
        return measure(measured, *arguments, **options)

    monkeypatch.setattr(benchmark.speed, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command()
    report = json.loads(benchmark.speed.RESULT.read_text("utf-8"))
    assert list(report["workloads"]) == ["fast"]


@linux
def test_only_adds_to_the_report_and_a_full_run_starts_anew(benchmark, command, monkeypatch):
    command()
    monkeypatch.setattr(benchmark.speed, "take_turns", lambda *_, **__: [{"ours": 8, "limit": 2}])
    report = command("--only", "slow")
    medians = {
        name: of["time"]["ours / limit"]["median"] for name, of in report["workloads"].items()
    }
    assert medians == {"slow": 4.0, "fast": 1.5}
    message = "speed.json was measured on .*'threads': 1, .* and this is .*'threads': 3, .*"
    with pytest.raises(SystemExit, match=message):
        command("--threads", "3", "--only", "slow")
    report = command("--threads", "3")
    assert [of["time"]["ours / limit"]["median"] for of in report["workloads"].values()] == [4, 4]


@linux
def test_quick_measures_the_quick_ones_and_writes_nothing(benchmark, command, capsys):
    assert command("--quick") is None
    assert not benchmark.speed.RESULT.exists()
    printed = capsys.readouterr().out
    assert "slow (0 s)" in printed
    assert "fast (0 s)" not in printed


@linux
def test_budget_is_shared_and_what_is_left_passed_on(benchmark, command, monkeypatch):
    given = {}
    clock = SimpleNamespace(now=0.0)

    def measure(measured, budget, threads, *, quick):
        given[measured.name] = budget
        clock.now += 7
        time = {"ours / limit": {"median": 1.0, "least": 1.0, "most": 1.0, "rounds": 3}}
        return {"title": "", "tokens": 1, "batch": 1, "in_table": True, "time": time,
                "memory": {}, "left_out": []}  # fmt: skip

    monkeypatch.setattr(benchmark.speed, "measure", measure)
    monkeypatch.setattr(benchmark.speed, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    command("--budget", "1")
    assert given == {"fast": 30, "slow": 53}


@linux
def test_what_needs_more_memory_than_there_is_is_left_out(benchmark, command, monkeypatch):
    workloads = benchmark.workloads
    measured = workloads.Workload(
        "big", "big", 5, lambda small=False: None, ("ours", "limit", "recipe"), 1,
        gigabytes={"recipe": 2000},
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(
        benchmark.speed,
        "take_turns",
        lambda calls, *_, **__: seen.extend(calls) or [{"ours": 3.0, "limit": 2.0}],
    )
    found = benchmark.speed.measure(measured, 10, 1, quick=False)
    assert seen == list(found["memory"]) == ["ours", "limit"]
    reason = "recipe of big needs 2000 GB of free memory, and 1000.0 GB are available"
    assert found["left_out"] == [reason]
    assert benchmark.report.summary_line(found).endswith(f"; left out: {reason}")


# -- the table ------------------------------------------------------------------------------------


def of_rounds(median, least, most, rounds=5):
    return {"median": median, "least": least, "most": most, "rounds": rounds}


MADE_UP = {
    "machine": {"cpu": "abacus", "cores": 4, "threads": 2, "versions": {"torch": "9"}},
    "workloads": {
        "vit_s_197": {
            "title": "ViT-S", "layers": 12, "tokens": 197, "batch": 1, "in_table": True,
            "time": {
                "ours / saliency": of_rounds(1.0151, 0.9877, 1.0512),
                "ours / limit": of_rounds(1.02, 1.0, 1.04),
                "recipe / ours": of_rounds(1.5449, 1.5, 1.6),
                "integrated_gradients / ours": of_rounds(38.123, 37.94, 38.42, 2),
            },
            "median_seconds": {"ours": 0.15, "recipe": 0.24},
            "memory": {"ours": 50_000_000, "limit": 51_000_000, "recipe": 130_000_000},
            "left_out": [],
        },
        "vit_s_4097": {
            "title": "ViT-S", "layers": 12, "tokens": 4097, "batch": 1, "in_table": True,
            "time": {"ours / limit": of_rounds(1.21, 1.2, 1.22, 3),
                     "recipe / ours": of_rounds(4.314, 4.314, 4.314, 1)},
            "median_seconds": {"ours": 15.0, "recipe": 64.0},
            "memory": {"ours": 1_100_000_000, "recipe": 16_720_000_000},
            "left_out": [],
        },
        "vit_s_577_layers3": {
            "title": "ViT-S", "layers": 3, "tokens": 577, "batch": 1, "in_table": False,
            "time": {}, "median_seconds": {"ours": 0.2}, "memory": {"ours": 40_000_000},
            "left_out": [],
        },
        "eight_targets": {
            "title": "ViT-S, eight targets", "layers": 12, "tokens": 197, "batch": 1,
            "in_table": True,
            "time": {"eight_targets / eight_calls": of_rounds(0.6, 0.55, 0.65)},
            "median_seconds": {"eight_targets": 0.7}, "memory": {}, "left_out": [],
        },
        "vit_ti_197": {
            "title": "ViT-Ti", "layers": 12, "tokens": 197, "batch": 1, "in_table": True,
            "time": {"ours / limit": of_rounds(1.3, 1.2, 1.4)},
            "median_seconds": {"ours": 0.05}, "memory": {}, "left_out": [],
            "calls_per_second": {"ours": 20.0, "limit": 26.3},
        },
    },
}  # fmt: skip

TABLE = """\
| workload | N | batch | ours / Saliency | ours / limit | recipe / ours | IG(50) / ours \
| memory: ours / limit | memory: recipe / ours | memory: ours, MB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| ViT-S | 197 | 1 | 1.02 (0.99–1.05) | 1.02 (1.00–1.04) | 1.54 (1.50–1.60) | 38.1 (37.9–38.4) \
| 0.98 | 2.60 | 50 |
| ViT-S | 4097 | 1 | – | 1.21 (1.20–1.22) | 4.31 (once) | – | – | 15.2 | 1100 |
| ViT-S, eight targets: 0.60 (0.55–0.65) of eight calls | 197 | 1 | – | – | – | – | – | – | – |
| ViT-Ti | 197 | 1 | – | 1.30 (1.20–1.40) | – | – | – | – | – |

Median (least–most) of the ratios within rounds; 2 threads, 4 cores of abacus, float32, PyTorch 9.\
"""


def test_table(benchmark):
    assert benchmark.report.table(MADE_UP) == TABLE


def test_memory_ratio(benchmark):
    found = MADE_UP["workloads"]["vit_s_197"]
    assert benchmark.report.memory_ratio(found, "recipe", "ours") == 2.6
    assert benchmark.report.memory_ratio(found, "saliency", "ours") is None
    assert benchmark.report.memory_ratio(found, "ours", "saliency") is None


def test_rates_of_small_models_are_told(benchmark):
    assert benchmark.report.summary_line(MADE_UP["workloads"]["vit_ti_197"]) == (
        "5 rounds; ours / limit 1.30 (1.20–1.40); "
        "ours 20 calls per second; limit 26.3 calls per second"
    )


def test_table_goes_between_its_marks(benchmark):
    text = "before\n<!-- speed -->\nold\n<!-- end of speed -->\nafter\n"
    assert benchmark.report.into_page(text, "new") == text.replace("old", "new")
    for without in ("no marks\n", "<!-- speed -->\nno end\n", "no begin <!-- end of speed -->\n"):
        assert benchmark.report.into_page(without, "new") == without


def test_figure_is_of_one_picture_of_the_small_vit(benchmark):
    workloads = MADE_UP["workloads"]
    batch = workloads["vit_s_197"] | {"batch": 8, "median_seconds": {"ours": 1.0}}
    report = MADE_UP | {"workloads": workloads | {"vit_s_197_batch8": batch}}
    figure = benchmark.report.figure_of(report)
    drawn = [
        {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        for axis in figure.axes
    ]
    seconds, seconds_of_layers, megabytes, megabytes_of_layers = drawn
    assert seconds["ours"] == [[197, 0.15], [4097, 15]]
    assert seconds["published recipe"] == [[197, 0.24], [4097, 64]]
    assert seconds["Captum Saliency"] == []
    assert megabytes["published recipe"] == [[197, 130], [4097, 16720]]
    assert megabytes["limit: forward and input gradient"] == [[197, 51]]
    assert seconds_of_layers["ours"] == [[3, 0.2]]
    assert megabytes_of_layers["ours"] == [[3, 40]]
    assert {(axis.get_xscale(), axis.get_yscale()) for axis in figure.axes} == {("log", "log")}
    assert figure.axes[0].get_ylabel() == "seconds of a call (median)"
    assert [axis.get_xlabel() for axis in figure.axes[2:]] == ["tokens", "layers"]
    figure.draw_without_rendering()
    ticks = [label.get_text() for label in figure.axes[2].get_xticklabels()]
    assert ticks == ["197", "4097"]
