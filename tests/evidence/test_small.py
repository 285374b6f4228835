"""That the benchmark can tell a right method from a wrong one.

The tables themselves take `make evidence`; here they are made of few examples, from the part of
Fashion-MNIST's test split that lies in the repository. Run by `make evidence-small`, a class for
each model so that they can be made side by side.
"""

from __future__ import annotations

import dataclasses

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.evidence_small]


@pytest.fixture(scope="class")
def tables(request, evidence, sample):
    """The tables of a class' model, with ours, the control and the broken variants."""
    of = request.cls
    names = [f"ours, broken: {mistake}" for mistake in of.mistakes]
    names += [evidence.methods.OURS, evidence.tables.RANDOM]
    return experiment(evidence, of.model, sample, of.samples, names)


def experiment(evidence, model, sample, samples, names):
    found = getattr(evidence, model).experiment(sample, samples, names)
    return found if isinstance(found, tuple) else (found,)


def margins(evidence, tables, mistake):
    """By how much our method is better than a broken variant, in each column of each table."""
    found = {}
    for table in tables:
        ours, other = table.rows[evidence.methods.OURS], table.rows[f"ours, broken: {mistake}"]
        for column in table.columns:
            more = ours[column.key].value - other[column.key].value
            found[column.key] = more if column.better == "more" else -more
    return found


class Small:
    """What holds for every model."""

    model: str
    samples: int
    mistakes = ("R transposed", "wrong row", "heads averaged first")
    few: int
    """So many examples are enough to compare two runs of ours, of another method, of the control.
    """
    another: str

    def test_chance_is_beaten_where_regions_and_pixels_are_asked_for(self, evidence, tables):
        for table in tables:
            ours, chance = (
                table.rows[name] for name in (evidence.methods.OURS, evidence.tables.RANDOM)
            )
            for column in table.columns:
                if column.key.startswith(("text", "word")) or column.key.endswith("word"):
                    continue  # what a sentence needs is less clear: see docs/evidence.md
                better, worse = (ours, chance) if column.better == "more" else (chance, ours)
                assert better[column.key].low > worse[column.key].high, column.title

    def test_the_same_table_twice(self, evidence, sample, tmp_path):
        names = [evidence.methods.OURS, self.another, evidence.tables.RANDOM]
        contents = []
        for run in ("first", "second"):
            found = experiment(evidence, self.model, sample, self.few, names)
            contents.append(
                [
                    dataclasses.replace(table, seconds=0.0).store(tmp_path / run).read_text("utf-8")
                    for table in found
                ]
            )
        assert contents[0] == contents[1]


class TestVit(Small):
    model, samples = "vit", 100
    few, another = 16, "Gradient SHAP"

    @pytest.mark.parametrize("mistake", ["R transposed", "wrong row"])
    def test_broken_variants_are_told(self, evidence, tables, mistake):
        found = margins(evidence, tables, mistake)
        assert min(found[key] for key in ("positive_ground", "negative_ground", "deletion")) > 8
        assert found["positive_black"] > 5
        assert found["saco"] > 0.2
        assert min(found[key] for key in ("accuracy", "iou", "precision")) > 8
        assert min(found["pixel"], found["token"]) > 15


class TestLxmert(Small):
    model, samples = "lxmert", 300
    few, another = 40, "Raw attention"

    def test_questions_are_answered(self, tables):
        assert float(tables[0].settings["accuracy"].removesuffix(" %")) > 93

    def test_broken_variants_are_told(self, evidence, tables):
        found = {mistake: margins(evidence, tables, mistake) for mistake in self.mistakes}
        for mistake in ("R transposed", "heads averaged first"):
            assert found[mistake]["image_positive"] > 2, mistake
            assert found[mistake]["image_negative"] > 4, mistake
            assert found[mistake]["region_place"] > 10, mistake
        assert found["R transposed"]["region_relation"] > 15
        assert found["heads averaged first"]["region_existence"] > 10
        assert found["wrong row"]["region_existence"] > 15


class TestVisualBert(Small):
    model, samples = "visualbert", 200
    few, another = 40, "Raw attention"

    def test_questions_are_answered(self, tables):
        assert float(tables[0].settings["accuracy"].removesuffix(" %")) > 93

    @pytest.mark.parametrize("mistake", Small.mistakes)
    def test_broken_variants_are_told(self, evidence, tables, mistake):
        found = margins(evidence, tables, mistake)
        assert found["image_positive"] > 0.5
        assert found["image_negative"] > 1.5
        assert found["region_relation"] > 5
        assert min(found["region_place"], found["answer_relation"]) > 10


class TestClip(Small):
    model, samples = "clip", 200
    few, another = 12, "LRP"

    def test_the_right_caption_is_found(self, tables):
        (table,) = tables
        assert float(table.settings["right caption of 10"].partition(" %")[0]) > 80

    @pytest.mark.parametrize("mistake", ["R transposed", "wrong row"])
    def test_broken_variants_are_told(self, evidence, tables, mistake):
        found = margins(evidence, tables, mistake)
        assert min(found[f"{kind}_picture"] for kind in ("alone", "several", "garment")) > 10
        assert min(found[f"{kind}_word"] for kind in ("several", "erased")) > 30


class TestDetr(Small):
    model, samples = "detr", 60
    mistakes = ("map transposed", "wrong query", "heads averaged first")
    few, another = 8, "Attention Grad-CAM"

    def test_boxes_are_found(self, tables):
        (table,) = tables
        assert float(table.settings["AP50 of the boxes"]) > 80

    @pytest.mark.parametrize(
        ("mistake", "precision", "hits"), [("map transposed", 15, 40), ("wrong query", 5, 10)]
    )
    def test_broken_variants_are_told(self, evidence, tables, mistake, precision, hits):
        found = margins(evidence, tables, mistake)
        assert min(found["AP"], found["AR"]) > precision
        assert found["pointing"] > hits
