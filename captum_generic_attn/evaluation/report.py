"""The report of an evaluation, and its files: JSON with all numbers, or Markdown."""

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
"""The suffixes of the files that a report can be saved to."""


@dataclass(frozen=True, eq=False)
class Report:
    """The results of an evaluation, with all that is needed to interpret them.

    Attributes:
        about: the model, the data, and the number of evaluated examples.
        settings: the settings of the plan, including defaults.
        versions: the versions of the libraries.
        figures: the results by method, then by name (`positive`, `mean_iou`, `token_f1@5`, …).
        curves: by method, then by metric: the mean over examples at each fraction.
        controls: the methods that are random controls.
        refused: methods that cannot explain this model or these data, with the reasons.
        left_out: methods that "all" did not include, with the reasons.
        notes: remarks for the reader of the results.
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
        """The results as tables of texts."""
        return sheets(self.figures, self.controls)

    def legend(self) -> list[str]:
        """What the tables show, and how to read them."""
        return legend(self.about, self.settings)

    def as_json(self) -> str:
        """The whole report as JSON, with the meaning of each result."""
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
        """The tables, their legend and the notes as Markdown."""
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
        """Write the report to a file, in the format of its suffix.

        Args:
            path: a file with a suffix in `FORMATS`; an existing file is replaced.

        Raises:
            ValueError: if it has another suffix.
            OSError: if it cannot be written.
        """
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"{path.name!r} must end with one of {', '.join(FORMATS)}")
        markdown = path.suffix.lower() == ".md"
        path.write_text(self.as_markdown() if markdown else self.as_json() + "\n", "utf-8")
