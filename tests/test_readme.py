"""The README's Python runs as it stands there, and its commands exist."""

import json
import re
from pathlib import Path

from captum_generic_attn import demo

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")


def test_python_runs_and_gives_the_shapes_that_it_says():
    first, second = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names = {}
    exec(compile(first, "README.md", "exec"), names)  # noqa: S102
    exec(compile(second, "README.md", "exec"), names)  # noqa: S102
    assert names["image"].shape == names["heatmap"].shape == (1, 3, 64, 64)
    assert demo.CLASSES[3] == "sandal"
    assert names["tokens"].shape == (1, 8, 8)
    assert names["maps"].shape == (2, 1, 3, 64, 64)
    assert names["relevance"].matrix("x", "x").shape == (1, 65, 65)


def test_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    wanted = set(re.findall(r"`make ([a-z0-9.-]+)`|^make ([a-z0-9.-]+)", TEXT, flags=re.MULTILINE))
    targets = {first or second for first, second in wanted}
    assert {"demo", "test", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([^):]+)\)", TEXT):
        assert (ROOT / link).is_file(), link


def test_figures_are_those_of_the_report():
    report = json.loads((ROOT / "benchmarks" / "garments" / "report.json").read_text("utf-8"))
    text = " ".join(TEXT.split())
    precision, places = report["average_precision"], report["maximum_at_the_right_garment"]
    assert f"{report['model']['parameters']:,} parameters".replace(",", " ") in text
    assert f"On {precision['canvases']} canvases" in text
    assert f"classes is {precision['mean']:.3f}." in text
    assert f"On {places['canvases']} of them, all {places['explanations']} pairs" in text
    for name, key in [
        ("generic attention", "generic_attention"),
        ("the same, last layer alone (`start_layer=-1`)", "generic_attention_last_layer_only"),
        ("raw attention of the last layer", "raw_attention_last_layer"),
        ("chance", "chance"),
    ]:
        cells = []
        for unit in ("token", "pixel"):
            share, (low, high) = places[key][unit]["share"], places[key][unit]["interval"]
            cells.append(f"{share:.3f} [{low:.3f}, {high:.3f}]")
        assert f"| {name} | {cells[0]} | {cells[1]} |" in text
