"""The README's Python runs as it stands there, and its commands exist."""

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
    assert demo.CLASSES[5] == "bag"
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
