"""A field of the page for every option: none forgotten, and each comes back as the option."""

import inspect

import pytest

import captum_generic_attn
from captum_generic_attn import (
    AttentionGradCam,
    AttentionRollout,
    GenericAttention,
    Lrp,
    PartialLrp,
    TransformerAttribution,
)
from captum_generic_attn.baselines import method_classes
from captum_generic_attn.captum_api.base import ModelAttribution
from captum_generic_attn.insights.fields import NOT_ON_THE_PAGE, fields_of


def nothing():
    """In place of a model."""


def options_of(method):
    parameters = list(inspect.signature(method).parameters.values())
    assert parameters.pop(0).name == "forward_func"
    return {parameter.name: parameter.default for parameter in parameters}


def test_no_method_is_forgotten():
    """The page has every method that the package or its baselines export."""
    exported = [
        getattr(home, name)
        for home in (captum_generic_attn, captum_generic_attn.baselines)
        for name in home.__all__
    ]
    methods = {m for m in exported if inspect.isclass(m) and issubclass(m, ModelAttribution)}
    assert set(method_classes()) == methods
    assert len(method_classes()) == len(methods) == 9


@pytest.mark.parametrize("method", method_classes())
def test_no_option_is_forgotten(method):
    assert set(fields_of(method)) == set(options_of(method)) - NOT_ON_THE_PAGE


def test_only_functions_are_not_on_the_page():
    assert {"rule"} == NOT_ON_THE_PAGE
    assert [m for m in method_classes() if NOT_ON_THE_PAGE & set(options_of(m))] == [
        GenericAttention
    ]


@pytest.mark.parametrize("method", method_classes())
def test_fields_show_the_defaults(method):
    defaults = options_of(method)
    for name, field in fields_of(method).items():
        assert field.parse(field.value) == defaults[name], name
        assert type(field.parse(field.value)) is type(defaults[name]), name


@pytest.mark.parametrize("method", method_classes())
def test_every_choice_is_taken_by_the_constructor_and_kept(method):
    for name, field in fields_of(method).items():
        for choice in field.choices or ():
            option = field.parse(choice)
            assert str(option) == choice
            assert getattr(method(nothing, **{name: option}), name) == option


@pytest.mark.parametrize("method", method_classes())
def test_what_came_back_once_comes_back_again(method):
    # Insights applies `post_process` for every example, to its own results.
    sent = {"layers": "a b", "rows": "0 2", "output": "logits", "start_layer": "-1"}
    for name, field in fields_of(method).items():
        for value in field.choices or (field.value, sent[name]):
            once = field.parse(value)
            assert field.parse(once) == once
            assert type(field.parse(once)) is type(once)


@pytest.mark.parametrize(
    ("method", "option", "choices"),
    [
        (GenericAttention, "normalize", ("True", "False")),
        (GenericAttention, "own", ("zero", "keep")),
        (GenericAttention, "interpolation", ("bilinear", "nearest")),
        (
            GenericAttention,
            "lrp",
            ("False", "chefer2021_full", "chefer2021", "chefer2021_detr", "epsilon", "gamma"),
        ),
        (AttentionRollout, "row_normalize", ("True", "False")),
        (AttentionGradCam, "weights_from", ("explained_rows", "all")),
        (AttentionGradCam, "scale", ("minmax", "None")),
        (TransformerAttribution, "own", ("zero", "keep", "row_min")),
        # These rules hold attention constant, so that it has no relevance.
        (
            PartialLrp,
            "rules",
            ("chefer2021_full", "chefer2021", "chefer2021_detr", "epsilon", "gamma"),
        ),
        (
            Lrp,
            "rules",
            ("chefer2021_full", "chefer2021", "chefer2021_detr", "epsilon", "gamma", "frozen"),
        ),
    ],
)
def test_choices(method, option, choices):
    assert fields_of(method)[option].choices == choices


def test_a_choice_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="scale='max' is none of minmax, None"):
        fields_of(AttentionGradCam)["scale"].parse("max")


def test_whole_numbers_as_the_page_sends_them():
    parse = fields_of(GenericAttention)["start_layer"].parse
    assert [parse(2), parse("2"), parse("-1")] == [2, 2, -1]
    with pytest.raises(ValueError, match="a whole number is needed, not an empty field"):
        parse(None)
    with pytest.raises(ValueError, match=r"a whole number is needed, not 1\.5"):
        parse(1.5)


@pytest.mark.parametrize(
    ("option", "sent", "parsed"),
    [
        ("layers", "", None),
        ("layers", " blocks.0  blocks.1 ", ["blocks.0", "blocks.1"]),
        ("rows", " ", None),
        ("rows", "0", [0]),
        ("rows", "-1 3", [-1, 3]),
        ("output", "", None),
        ("output", " logits ", "logits"),
        ("output", "1", 1),
    ],
)
def test_lines_of_text(option, sent, parsed):
    assert fields_of(GenericAttention)[option].parse(sent) == parsed


def test_rows_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="a whole number is needed, not 'first'"):
        fields_of(GenericAttention)["rows"].parse("0 first")


def test_an_option_of_an_unknown_kind_is_told_of():
    class Warm(ModelAttribution):
        def __init__(self, forward_func, *, temperature: float = 1.0):
            super().__init__(forward_func, None)

        def _attributed(self, request, *, return_input_shape):
            yield

    with pytest.raises(TypeError, match=r"no field is known for Warm\(temperature: .*float"):
        fields_of(Warm)
