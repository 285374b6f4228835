"""Writes `docs/methods.md`: which method runs on which model, and why the others are refused.

Run by `make methods`: `python docs/methods_table.py FOLDER`, the folder of what was found.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

HEAD = """# Methods on models

Written by `make methods` from `tests/zoo/methods.py`; do not edit. Each model is small, has random
weights, and is explained unmodified. `✓`: maps of the inputs' shapes, finite, not all zero. `0`:
all are zero, since Grad-CAM's `relu` leaves nothing where no head has positive evidence. Else the
operation that has no relevance rule: `UnsupportedOperationError` names it.

{runs} of {total} pairs run. What the methods are: [baselines.md](baselines.md).
"""


def cell(refusal: str) -> str:
    """What became of one method on one model."""
    if refusal in ("", "all zero"):
        return "0" if refusal else "✓"
    named = re.match(r"(\w+) has no relevance rule", refusal)
    return f"`{named.group(1)}`" if named else refusal.split("\n", 1)[0]


def table(findings: list[dict[str, Any]]) -> str:
    """Models down, methods across."""
    methods = list(findings[0]["outcomes"])
    runs = sum(len(cell(r)) == 1 for f in findings for r in f["outcomes"].values())
    lines = [HEAD.format(runs=runs, total=len(findings) * len(methods))]
    lines += [f"| model | {' | '.join(f'`{name}`' for name in methods)} |"]
    lines += ["| --- " * (len(methods) + 1) + "|"]
    for found in findings:
        cells = [cell(found["outcomes"][name]) for name in methods]
        lines.append(f"| {found['label']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    """Write the table."""
    from zoo.methods import slice_of_the_zoo

    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    by_label = {f["label"]: f for f in found}
    labels = [entry.label for entry in slice_of_the_zoo()]
    if missing := [label for label in labels if label not in by_label]:
        raise SystemExit(f"nothing was found of {missing}")
    text = table([by_label[label] for label in labels])
    (ROOT / "docs" / "methods.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    main(Path(sys.argv[1]))
