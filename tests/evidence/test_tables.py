"""The tables of the evidence, and the page that is made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from captum_generic_attn.metrics import Curve, Estimate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def table(evidence):
    columns = (
        evidence.tables.Column("good", "goodness", "more"),
        evidence.tables.Column("bad", "badness", "less", 2),
    )
    rows = {
        "Generic attention": {"good": Estimate(50, 46, 52, 9), "bad": Estimate(0.5, 0.4, 0.6, 9)},
        "Other": {"good": Estimate(51, 45, 53, 9), "bad": Estimate(0.1, 0.05, 0.2, 9)},
        "Random": {"good": Estimate(99, 98, 100, 9), "bad": Estimate(0.01, 0, 0.02, 9)},
        "ours, broken: x": {"good": Estimate(98, 97, 99, 9)},
    }
    return evidence.tables.Table(
        "t", "A title", "About it.", columns, rows, 9, {"seed": 3}, 12.34, {"python": "3"},
        {"Other": {"good": [[0.0, 1.0], [1.0, 0.25]]}},
    )  # fmt: skip


def test_a_stored_table_comes_back(evidence, table, tmp_path) -> None:
    table.store(tmp_path)
    again = evidence.tables.load("t", tmp_path)
    assert again == dataclasses.replace(table, columns=list(table.columns), seconds=12.3)


def test_markdown_marks_what_cannot_be_told_from_the_best(evidence, table) -> None:
    lines = evidence.tables.markdown(table).splitlines()
    assert lines[0] == "### A title"
    assert lines[4] == "| method | goodness ↑ | badness ↓ |"
    assert lines[6:10] == [
        "| Generic attention | **50.0** ± 3.0 | 0.50 ± 0.10 |",
        "| Other | **51.0** ± 4.0 | **0.10** ± 0.08 |",
        "| Random | 99.0 ± 1.0 | 0.01 ± 0.01 |",
        "| ours, broken: x | 98.0 ± 1.0 | – |",
    ]
    assert lines[11] == "*9 samples; seed 3; 12 s. python 3.*"


def test_the_verdict_says_where_others_are_better(evidence, table) -> None:
    assert evidence.document.verdict(table) == (
        "- **A title**\n"
        "  - Generic attention is among the best in: goodness.\n"
        "  - Another method or variant is better in: badness (Other 0.10, ours 0.50)."
    )


def test_points_are_a_curves_means(evidence) -> None:
    curve = Curve((0.0, 0.5), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert evidence.tables.points(curve) == [[0.0, 0.5], [1.0, 0.5]]


STORED = sorted(path.stem for path in (ROOT / "benchmarks" / "evidence" / "tables").glob("*.json"))


@pytest.mark.parametrize("name", STORED)
def test_stored_tables_say_what_they_rest_on(evidence, name) -> None:
    table = evidence.tables.load(name)
    assert table.name == name
    # Of the pictures, those whose explained class is there; of words, as many as are understood.
    assert table.samples >= {"vit_pointing": 900, "speech": 73}.get(name, 1000)
    assert "seed" in table.settings
    assert {"python", "torch", "captum-generic-attn"} <= set(table.versions)
    assert table.seconds > 0
    assert {"Generic attention", evidence.tables.RANDOM} <= set(table.rows)
    for figures in table.rows.values():
        assert set(figures) <= {column.key for column in table.columns}
        for figure in figures.values():
            assert figure.low <= figure.value <= figure.high
            assert 0 < figure.count <= table.samples


def test_the_page_is_that_of_the_stored_tables(evidence) -> None:
    page = (ROOT / "docs" / "evidence.md").read_text("utf-8")
    tables = {name: evidence.tables.load(name) for name in evidence.document.ORDER}
    assert page == evidence.document.document(tables)
    for file, _ in evidence.document.FIGURES.values():
        assert (ROOT / "docs" / file).is_file()


def test_the_readme_says_what_the_tables_say(evidence):
    document = evidence.document
    tables = {name: evidence.tables.load(name) for name in document.ORDER}
    page = (ROOT / "README.md").read_text("utf-8")
    assert f"{document.BEGIN}\n{document.in_short(tables)}\n{document.END}" in page
    # Chance loses wherever a figure is shown.
    for name, key, _ in document.IN_README:
        table = tables[name]
        (column,) = (column for column in table.columns if column.key == key)
        ours, chance = (table.rows[row][key] for row in ("Generic attention", "Random"))
        assert ours.low > chance.high if column.better == "more" else ours.high < chance.low
