"""That the benchmark can tell a right method from a wrong one.

The tables themselves take `make evidence`; here they are made of few examples, from the part of
Fashion-MNIST's test split that lies in the repository. Run by `make evidence-small`, the models
side by side.
"""

from __future__ import annotations

import dataclasses

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.evidence_small]
MODELS = [
    pytest.param(name, marks=pytest.mark.xdist_group(name))
    for name in ("vit", "lxmert", "visualbert", "clip", "detr")
]


def margins(evidence, table, name):
    """By how much our method is better than a row, in each column."""
    ours, other = table.rows[evidence.methods.OURS], table.rows[name]
    return {
        column.key: (1 if column.better == "more" else -1)
        * (ours[column.key].value - other[column.key].value)
        for column in table.columns
    }


@pytest.fixture(scope="module")
def made(evidence, sample):
    """The tables of a model, with ours, the control and the broken variants; each made once."""
    samples = {"vit": 100, "lxmert": 300, "visualbert": 200, "clip": 200, "detr": 60}
    mistakes = {"detr": ("map transposed", "wrong query", "heads averaged first")}
    kept = {}

    def tables(name):
        if name not in kept:
            broken = mistakes.get(name, ("R transposed", "wrong row", "heads averaged first"))
            names = [f"ours, broken: {mistake}" for mistake in broken]
            names += [evidence.methods.OURS, evidence.tables.RANDOM]
            found = getattr(evidence, name).experiment(sample, samples[name], names)
            kept[name] = found if isinstance(found, tuple) else (found,)
        return kept[name]

    return tables


@pytest.mark.xdist_group("vit")
@pytest.mark.parametrize("mistake", ["R transposed", "wrong row"])
def test_pictures_tell_broken_variants(evidence, made, mistake) -> None:
    needed, pointed = (
        margins(evidence, table, f"ours, broken: {mistake}") for table in made("vit")
    )
    assert min(needed[key] for key in ("positive_ground", "negative_ground", "deletion")) > 8
    assert needed["positive_black"] > 5
    assert needed["saco"] > 0.2
    assert min(pointed[key] for key in ("accuracy", "iou", "precision")) > 8
    assert min(pointed["pixel"], pointed["token"]) > 15


@pytest.mark.xdist_group("lxmert")
def test_questions_tell_broken_variants(evidence, made) -> None:
    needed, deciding = (
        {
            name: margins(evidence, table, f"ours, broken: {name}")
            for name in ("R transposed", "wrong row", "heads averaged first")
        }
        for table in made("lxmert")
    )
    for name in ("R transposed", "heads averaged first"):
        assert needed[name]["image_positive"] > 2, name
        assert needed[name]["image_negative"] > 4, name
        assert deciding[name]["region_place"] > 10, name
    assert deciding["R transposed"]["region_relation"] > 15
    assert deciding["heads averaged first"]["region_existence"] > 10
    assert deciding["wrong row"]["region_existence"] > 15


@pytest.mark.xdist_group("visualbert")
@pytest.mark.parametrize("mistake", ["R transposed", "wrong row", "heads averaged first"])
def test_questions_to_one_stream_tell_broken_variants(evidence, made, mistake) -> None:
    needed, deciding = (
        margins(evidence, table, f"ours, broken: {mistake}") for table in made("visualbert")
    )
    assert needed["image_positive"] > 0.5
    assert needed["image_negative"] > 1.5
    assert deciding["region_relation"] > 5
    assert min(deciding[key] for key in ("region_place", "answer_relation")) > 10


@pytest.mark.xdist_group("clip")
@pytest.mark.parametrize("mistake", ["R transposed", "wrong row"])
def test_captions_tell_broken_variants(evidence, made, mistake) -> None:
    (found,) = (margins(evidence, table, f"ours, broken: {mistake}") for table in made("clip"))
    assert min(found[f"{kind}_picture"] for kind in ("alone", "several", "garment")) > 10
    assert min(found[f"{kind}_word"] for kind in ("several", "erased")) > 30


@pytest.mark.xdist_group("detr")
@pytest.mark.parametrize(
    ("mistake", "precision", "hits"), [("map transposed", 15, 40), ("wrong query", 5, 10)]
)
def test_detections_tell_broken_variants(evidence, made, mistake, precision, hits) -> None:
    (found,) = (margins(evidence, table, f"ours, broken: {mistake}") for table in made("detr"))
    assert min(found["AP"], found["AR"]) > precision
    assert found["pointing"] > hits


@pytest.mark.parametrize("model", MODELS)
def test_chance_is_beaten_where_regions_and_pixels_are_asked_for(evidence, made, model) -> None:
    for table in made(model):
        ours, chance = (
            table.rows[name] for name in (evidence.methods.OURS, evidence.tables.RANDOM)
        )
        for column in table.columns:
            if column.key.startswith(("text", "word")) or column.key.endswith("word"):
                continue  # what a sentence needs is less clear: see docs/evidence.md
            better, worse = (ours, chance) if column.better == "more" else (chance, ours)
            assert better[column.key].low > worse[column.key].high, column.title


@pytest.mark.parametrize("model", [MODELS[1], MODELS[2]])
def test_questions_are_answered(made, model) -> None:
    assert float(made(model)[0].settings["accuracy"].removesuffix(" %")) > 93


@pytest.mark.parametrize(
    ("model", "samples", "others"),
    [
        pytest.param(*case, marks=pytest.mark.xdist_group("twice"))
        for case in (
            ("vit", 16, ["Gradient SHAP"]),
            ("lxmert", 40, ["Raw attention"]),
            ("visualbert", 40, ["Raw attention"]),
            ("clip", 12, ["LRP"]),
            ("detr", 8, ["Attention Grad-CAM"]),
        )
    ],
)
def test_the_same_table_twice(evidence, sample, tmp_path, model, samples, others) -> None:
    contents = []
    names = [evidence.methods.OURS, *others, evidence.tables.RANDOM]
    for run in ("first", "second"):
        tables = getattr(evidence, model).experiment(sample, samples, names)
        contents.append(
            [
                dataclasses.replace(table, seconds=0.0).store(tmp_path / run).read_text("utf-8")
                for table in (tables if isinstance(tables, tuple) else (tables,))
            ]
        )
    assert contents[0] == contents[1]
