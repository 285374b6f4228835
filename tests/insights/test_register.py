"""Our methods in the page's list, and what Insights itself makes of them. Needs Captum 0.8."""

import doctest
import json
import re
import socket

import pytest
import torch
from helpers.tiny_models import pictures, tiny_vit
from typer.testing import CliRunner

from captum_generic_attn import GenericAttention, insights
from captum_generic_attn.insights import entries, visualizers
from captum_generic_attn.insights.__main__ import app
from captum_generic_attn.insights.entries import Entry, _entries
from captum_generic_attn.insights.visualizers import CaptionChoice, captions_of

NAMES = [entry.get_name() for entry in _entries()]


def as_the_page_sends(config, name, **changed):
    """The arguments of a method as they arrive: through JSON, with some changed by the user."""
    params = config.ATTRIBUTION_METHOD_CONFIG[name].params
    values = {option: param.value for option, param in params.items()}
    return json.loads(json.dumps({**values, **changed}))


def test_ours_come_after_captums_and_leave_without_a_trace(insights_config):
    methods = insights_config.ATTRIBUTION_NAMES_TO_METHODS
    configs = insights_config.ATTRIBUTION_METHOD_CONFIG
    before = dict(methods), dict(configs)
    insights.register()
    assert list(methods) == [*before[0], *NAMES]
    assert list(configs) == [*before[1], *NAMES]
    assert all(methods[name] is cls for name, cls in before[0].items())
    insights.unregister()
    assert (methods, configs) == before
    insights.unregister()
    assert (methods, configs) == before


def test_registering_twice_changes_nothing(registered):
    methods = dict(registered.ATTRIBUTION_NAMES_TO_METHODS)
    configs = registered.ATTRIBUTION_METHOD_CONFIG
    configs["Lrp"].params["rules"] = registered.StrEnumConfig(value="frozen", limit=["frozen"])
    insights.register()
    assert methods == registered.ATTRIBUTION_NAMES_TO_METHODS
    assert configs["Lrp"].params["rules"].value == "frozen"


@pytest.mark.parametrize("listed", ["ATTRIBUTION_NAMES_TO_METHODS", "ATTRIBUTION_METHOD_CONFIG"])
def test_what_others_registered_is_left_alone(registered, listed):
    insights.unregister()
    theirs = object()
    entries_of = getattr(registered, listed)
    entries_of["Lrp"] = theirs
    with pytest.raises(ValueError, match="another method named Lrp: take it out"):
        insights.register()
    assert not set(NAMES[:-1]) & set(registered.ATTRIBUTION_NAMES_TO_METHODS)
    insights.unregister()
    assert entries_of["Lrp"] is theirs


def test_the_page_gets_each_argument_in_its_form(registered):
    params = registered.ATTRIBUTION_METHOD_CONFIG["Generic Attention"].params
    assert params["start_layer"] == registered.NumberConfig(value=0)
    assert params["normalize"] == registered.StrEnumConfig(value="True", limit=["True", "False"])
    assert params["layers"] == registered.StrConfig(value="")
    assert {name: param.type for name, param in params.items()} == {
        "layers": "string",
        "start_layer": "number",
        "rows": "string",
        "own": "enum",
        "normalize": "enum",
        "self_in_cross": "enum",
        "aggregate": "enum",
        "lrp": "enum",
        "output": "string",
        "interpolation": "enum",
        "strict": "enum",
    }
    shared = registered.ATTRIBUTION_METHOD_CONFIG["Generic Attention (per token)"].params
    assert shared == params


@pytest.mark.parametrize("name", NAMES)
def test_insights_calculates_what_the_library_does(registered, name):
    from captum.insights.attr_vis.attribution_calculation import AttributionCalculation

    model = tiny_vit()
    calculation = AttributionCalculation([model], list("abcde"), [])
    entry = registered.ATTRIBUTION_NAMES_TO_METHODS[name]
    arguments = as_the_page_sends(registered, name)
    for _ in range(2):  # Insights writes the parsed arguments over those that were sent
        found = calculation.calculate_attribution(
            None, (pictures(1),), None, torch.tensor(3), name, arguments, model
        )
    wanted = entry.method(model).attribute(pictures(1), 3)
    if entry.per_token:
        wanted = wanted * (found[0].sum() / wanted.sum())
    assert torch.allclose(found[0], wanted, rtol=1e-12)


def test_arguments_of_the_page_change_what_is_calculated(registered):
    from captum.insights.attr_vis.attribution_calculation import AttributionCalculation

    model = tiny_vit()
    name = "Generic Attention"
    sent = as_the_page_sends(
        registered, name, layers="blocks.1", rows="0 2", normalize="False", lrp="chefer2021",
        interpolation="nearest",
    )  # fmt: skip
    (found,) = AttributionCalculation([model], list("abcde"), []).calculate_attribution(
        None, (pictures(1),), None, torch.tensor(3), name, sent, model
    )
    method = GenericAttention(
        model, layers=["blocks.1"], rows=[0, 2], normalize=False, lrp="chefer2021",
        interpolation="nearest",
    )  # fmt: skip
    assert torch.equal(found, method.attribute(pictures(1), 3))


def test_select(registered):
    visualizer = insights.image_visualizer()
    page = visualizer.get_insights_config()
    assert page["selected_method"] == "Generic Attention"
    assert set(NAMES) < set(page["methods"])
    insights.select(visualizer, "Saliency")
    assert visualizer.get_insights_config()["selected_method"] == "Saliency"
    with pytest.raises(ValueError, match=r"'Salience'; there are: .*Saliency.*Lrp"):
        insights.select(visualizer, "Salience")


def test_the_first_page_of_pictures(registered):
    from captum_generic_attn import demo

    visualizer = insights.image_visualizer()
    shown = [output for (output,) in visualizer.visualize()]
    assert len(shown) == 4
    for output, canvas in zip(shown, demo.canvases(), strict=False):
        assert output.actual.label in {garment.name for garment in canvas.garments}
        best = output.predicted[0]
        with torch.no_grad():
            logits = demo.load_model()(demo.preprocess(canvas.image())[None])
        assert best.score == logits.sigmoid().max()
        assert output.feature_outputs[0].contribution == 1


def test_pages_of_pictures_come_again_in_the_same_order(registered):
    visualizer = insights.image_visualizer()
    batches = [next(visualizer._dataset_iter) for _ in range(25)]
    assert torch.equal(batches[0].inputs[0], batches[24].inputs[0])
    assert len({float(batch.inputs[0].sum()) for batch in batches}) == 24


def contributions(visualizer):
    """Of the next example."""
    (((output,), _),) = visualizer._get_outputs()
    return {feature.name: feature.contribution for feature in output.feature_outputs}


def test_per_token_words_count_beside_pictures_and_otherwise_drown(registered):
    pytest.importorskip("transformers")
    found = contributions(insights.caption_visualizer())
    assert min(found["canvas"], found["captions"]) > 0.2
    assert sum(found.values()) == pytest.approx(1)
    plain = contributions(insights.caption_visualizer("Generic Attention"))
    # A patch has 192 elements, a word one.
    ratio = found["captions"] / found["canvas"]
    assert plain["captions"] / plain["canvas"] == pytest.approx(ratio / 192, rel=1e-5)
    assert plain["captions"] < 0.005


def test_a_caption_is_explained_by_its_own_words(registered):
    pytest.importorskip("transformers")
    visualizer = insights.caption_visualizer()
    visualizer._outputs = visualizer._get_outputs()
    ((first,), _) = visualizer._outputs[0]
    assert first.feature_outputs[1].base == [
        *("both are there:", "a", "sandal", "and", "a", "trouser", "·"),
        *("one is there:", "a", "sandal", "and", "a", "top", "·"),
        *("none is there:", "a", "top", "and", "a", "bag", "·"),
    ]
    for target in range(3):
        output = visualizer._calculate_attribution_from_cache(0, 0, target)
        words = torch.tensor(output.feature_outputs[1].modified).view(3, 7)
        others = [caption for caption in range(3) if caption != target]
        assert words[target].max() == 100
        assert not words[others].any()


def test_captions_name_what_is_there_and_what_is_not():
    from captum_generic_attn import demo

    for canvas in demo.canvases():
        there = {garment.name.split()[-1] for garment in canvas.garments}
        captions = captions_of(canvas)
        named = [[word for word in c.split() if word not in {"a", "and"}] for c in captions]
        if len(there) == 1:
            assert captions == ()
        else:
            assert [sum(word in there for word in words) for words in named] == [2, 1, 0]
            assert all(len(set(words)) == 2 for words in named)


def test_the_choice_of_captions_is_clips_own_logits():
    pytest.importorskip("transformers")
    from captum_generic_attn import demo, hf

    clip = demo.load_clip()
    canvases = demo.canvases()[:2]
    pixels = torch.stack([demo.preprocess(canvas.image()) for canvas in canvases])
    captions = [captions_of(canvas) for canvas in canvases]
    ids = torch.stack([demo.tokenize(of).flatten() for of in captions])
    with torch.no_grad():
        logits = CaptionChoice(clip, 3)(pixels, ids)
        for row, picture, of in zip(logits, pixels, captions, strict=True):
            wanted = clip(pixel_values=picture[None], input_ids=demo.tokenize(of)).logits_per_image
            assert torch.allclose(row, wanted[0], rtol=1e-5)
    maps = GenericAttention(CaptionChoice(clip, 3)).attribute((pixels, ids), [1, 2])
    for i, target in enumerate([1, 2]):
        alone = pixels[i : i + 1], demo.tokenize(captions[i][target : target + 1])
        pictured, worded = GenericAttention(hf.pairs(clip)).attribute(alone)
        assert torch.allclose(maps[0][i], pictured[0], atol=1e-6)
        assert torch.allclose(maps[1][i].view(3, -1)[target], worded[0], atol=1e-6)


@pytest.mark.parametrize("module", [entries, visualizers])
def test_examples_that_need_insights(registered, module):
    """Doctests skip them, since they cannot run with Captum 0.9; here they do run."""
    insights.unregister()
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags)
    ran = 0
    for found in doctest.DocTestFinder().find(module, extraglobs={**vars(insights)}):
        if any(example.options.pop(doctest.SKIP, False) for example in found.examples):
            for example in found.examples:
                example.options.pop(doctest.SKIP, None)
            ran += len(found.examples)
            assert runner.run(found).failed == 0, found.name
    assert ran >= 2


def test_a_port_that_is_taken_is_told_of(registered):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["--port", str(port)])
    assert result.exit_code == 2
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())
    assert f"Invalid value for --port: {port} cannot be used: Address already in use" in said


def test_entries_are_captum_attributions(registered):
    for name in NAMES:
        entry = registered.ATTRIBUTION_NAMES_TO_METHODS[name]
        assert issubclass(entry, Entry)
        assert entry.get_name() == name
        assert entry(tiny_vit()).get_name() == name
