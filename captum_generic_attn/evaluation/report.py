"""What an evaluation found, and how it is kept: as JSON with every number, or as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from captum_generic_attn.evaluation.scores import column
from captum_generic_attn.evaluation.sheets import Sheet, legend, sheets
from captum_generic_attn.metrics import Curve, Estimate

FORMATS = (".json", ".md")
"""The endings of the files that a report can be saved in."""


@dataclass(frozen=True, eq=False)
class Report:
    """The figures of an evaluation and all that is needed to judge them.

    Attributes:
        about: the model, the data, and how many examples of how many were evaluated.
        settings: what was asked for; what was left out of the plan is filled in.
        versions: of the libraries.
        figures: by method, then by figure (`positive`, `mean_iou`, `token_f1@5`, ...).
        curves: by method, then by metric: the mean over the examples at each fraction.
        controls: which of the methods are random controls.
        refused: methods that cannot explain this model or these data, and why.
        left_out: methods that "all" did not stand for, and why.
        notes: what a reader of the figures must know.
    """

    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    figures: Mapping[str, Mapping[str, Estimate]]
    curves: Mapping[str, Mapping[str, Curve]]
    controls: tuple[str, ...]
    refused: Mapping[str, str]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]

    def sheets(self) -> list[Sheet]:
        """The figures as tables of texts, for people."""
        return sheets(self.figures, self.controls)

    def legend(self) -> list[str]:
        """What the tables are of, and how they are to be read."""
        return legend(self.about, self.settings)

    def as_json(self) -> str:
        """Everything, with a line for each figure's meaning."""
        keys = dict.fromkeys(key for found in self.figures.values() for key in found)
        return json.dumps(
            {
                "about": dict(self.about),
                "settings": dict(self.settings),
                "versions": dict(self.versions),
                "meaning": {
                    key: {
                        "title": column(key).title,
                        "better": "higher" if column(key).higher_is_better else "lower",
                        "interval": "95 % (bootstrap)",
                    }
                    for key in keys
                },
                "figures": {
                    name: {key: asdict(figure) for key, figure in found.items()}
                    for name, found in self.figures.items()
                },
                "curves": {
                    name: {
                        metric: {
                            "fractions": list(curve.fractions),
                            "means": curve.means.tolist(),
                        }
                        for metric, curve in found.items()
                    }
                    for name, found in self.curves.items()
                },
                "controls": list(self.controls),
                "refused": dict(self.refused),
                "left_out": dict(self.left_out),
                "notes": list(self.notes),
            },
            indent=2,
            ensure_ascii=False,
        )

    def as_markdown(self) -> str:
        """The tables, what they are of, and the notes."""
        lines = [f"# {self.about['model']}: {self.about['evaluated']} {self.about['kind']}", ""]
        for sheet in self.sheets():
            lines += [f"## {sheet.title}", ""]
            lines.append(f"| {' | '.join(['method', *sheet.heads])} |")
            lines.append(f"|{'---|' + '--:|' * len(sheet.heads)}")
            lines += [f"| {' | '.join([name, *row])} |" for name, row in sheet.rows.items()]
            lines += [f"| examples | {' | '.join(map(str, sheet.counts))} |", ""]
        lines += [f"{line}  " for line in self.legend()]
        remarks = [f"{name} was refused: {why}" for name, why in self.refused.items()]
        remarks += [f"{name} was left out: {why}" for name, why in self.left_out.items()]
        remarks += self.notes
        lines += ["", *(f"- {remark}" for remark in remarks)] if remarks else []
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return "\n".join([*lines, "", f"Computed with {versions}.", ""])

    def save(self, path: Path) -> None:
        """Write to a file; its ending says the format.

        Args:
            path: ends with one of `FORMATS`; an existing file is replaced.

        Raises:
            ValueError: if it ends otherwise.
            OSError: if it cannot be written.
        """
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"{path.name!r} must end with one of {', '.join(FORMATS)}")
        markdown = path.suffix.lower() == ".md"
        path.write_text(self.as_markdown() if markdown else self.as_json() + "\n", "utf-8")
