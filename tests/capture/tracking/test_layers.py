"""The files of tracking and of tokens stand in layers: no two import each other, by any way."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import captum_generic_attn

ROOT = Path(captum_generic_attn.__file__).parent


def imported_by(path: Path) -> set[str]:
    """Modules of this package that a file imports, also for type checking alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("folder", ["capture/tracking", "tokens"])
def test_no_circle(folder: str) -> None:
    files = {
        ".".join(("captum_generic_attn", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(files) > 5
    arrows = {name: imported_by(path) & files.keys() - {name} for name, path in files.items()}
    assert sum(map(len, arrows.values())) > len(files) / 2
    tuple(TopologicalSorter(arrows).static_order())  # a circle is a CycleError


def test_tokens_know_nothing_of_the_capture() -> None:
    for path in (ROOT / "tokens").rglob("*.py"):
        assert not any("capture" in name for name in imported_by(path)), path.name
