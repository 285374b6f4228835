"""Writes `docs/models.md` from what the census found, and its totals into the README.

Run by `make zoo`: `python docs/models_table.py FOLDER`, the folder of the findings.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("timm", "torchvision", "torch", "open_clip", "transformers")
BEGIN, END = "<!-- totals of the census -->", "<!-- end of the totals -->"


def status(found: dict[str, Any]) -> str:
    """What became of a model, in a few words."""
    if not found["message"]:
        return "maps"
    seen = re.search(r"\): ([^;]+);", found["message"])
    return f"refused: {found['why'] or (seen.group(1) if seen else found['message'])}"


def kinds(found: dict[str, Any]) -> str:
    """Self, cross, merged tokens."""
    if found["message"]:
        return ""
    parts = ["self"] if not found["crosses"] else ["self, cross"]
    return ", ".join(parts + (["merged tokens"] if found["merges"] else []))


def totals(findings: list[dict[str, Any]]) -> str:
    """The sentence of the README."""
    ours = [f for f in findings if not f["why"]]
    maps = sum(not f["message"] for f in ours)
    libraries = Counter(f["library"] for f in findings)
    of_each = ", ".join(f"{libraries[name]} {name}" for name in ORDER)
    other = len(findings) - len(ours)
    share = f"{100 * maps / len(ours):.1f} %"
    return (
        f"The census runs {len(findings)} models ({of_each}). Of the {len(ours)} whose attention "
        f"is softmax attention between tokens throughout, {maps} give maps ({share}); {other} have "
        "attention of another kind, or none, and are refused by name."
    )


def by_library(findings: list[dict[str, Any]]) -> str:
    """The README's table."""
    lines = ["| library | models | give maps | refused by name |", "| --- | --: | --: | --: |"]
    for name in ORDER:
        refused = [bool(f["message"]) for f in findings if f["library"] == name]
        lines.append(
            f"| {name} | {len(refused)} | {len(refused) - sum(refused)} | {sum(refused)} |"
        )
    return "\n".join(lines)


HEAD = """# Models

Written by `make zoo` from the census in `tests/zoo/`; do not edit. Every model is small and has
random weights. Its attention calls are counted twice, by the package and below PyTorch's Python
functions, and the counts must agree; fused and written-out attention must give the same maps; the
output must not change, and nothing may be left behind.

{totals}

Refused means that the package raises `UnsupportedAttentionError`, which names the layer. The reason
is decided by what the model does, and stands in the lists of `tests/zoo/models/`.
"""
COLUMNS = ["", "| model | calls | kinds | streams | |", "|---|---|---|---|---|"]


def table(findings: list[dict[str, Any]]) -> str:
    """All models, by library."""
    lines = [HEAD.format(totals=totals(findings)).rstrip()]
    for library in ORDER:
        lines += ["", f"## {library}", *COLUMNS]
        for found in findings:
            if found["library"] == library:
                streams = ", ".join(f"`{name}` {size}" for name, size in found["streams"].items())
                lines.append(
                    f"| {found['name']} | {found['aten']} | {kinds(found)} | {streams} | "
                    f"{status(found)} |"
                )
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    """Write the table, and the totals between their marks in the README."""
    from zoo.models import entries

    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    by_label = {f["label"]: f for f in found}
    missing = [entry.label for entry in entries() if entry.label not in by_label]
    if missing:
        raise SystemExit(f"no findings of {missing}")
    findings = [by_label[entry.label] for entry in entries()]
    (ROOT / "docs" / "models.md").write_text(table(findings), "utf-8")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(
        f"{before}{BEGIN}\n{totals(findings)}\n\n{by_library(findings)}\n{END}{after}", "utf-8"
    )
    print(totals(findings))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main(Path(sys.argv[1]))
