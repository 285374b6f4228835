"""What the page calls gives what the library gives; per token, sums count each token once."""

import sys

import captum
import pytest
import torch
from helpers.tiny_models import pictures, tiny_vit, two_towers
from typer.testing import CliRunner

from captum_generic_attn import GenericAttention, insights
from captum_generic_attn.baselines import method_classes
from captum_generic_attn.insights.__main__ import app
from captum_generic_attn.insights.entries import _entries
from captum_generic_attn.insights.fields import fields_of

ENTRIES = {entry.get_name(): entry for entry in _entries()}
WAYS_OUT = (
    r"pip install 'captum-generic-attn\[insights\]'(.|\n)*captum<0\.9(.|\n)*flask-compress"
    r"(.|\n)*pip install --no-deps --target DIR captum==0\.8\.0\n  PYTHONPATH=DIR python"
)


@pytest.fixture(scope="module")
def model():
    return tiny_vit()


def called(entry, model, inputs, target, **options):
    """As Insights calls an entry: one example, a tuple, a target without axes."""
    method = entry(model)
    return type(method).attribute.__wrapped__(
        method,
        inputs,
        additional_forward_args=None,
        target=None if target is None else torch.tensor(target),
        **options,
    )


@pytest.mark.parametrize("method", method_classes())
def test_an_entry_gives_what_its_method_gives(model, method):
    options = {name: field.parse(field.value) for name, field in fields_of(method).items()}
    (found,) = called(ENTRIES[method.get_name()], model, (pictures(1),), 3, **options)
    assert torch.equal(found, method(model).attribute(pictures(1), 3))
    assert found.any()


def test_options_reach_the_constructor(model):
    entry = ENTRIES["Generic Attention"]
    (last,) = called(entry, model, (pictures(1),), 3, start_layer=-1, interpolation="nearest")
    method = GenericAttention(model, start_layer=-1, interpolation="nearest")
    assert torch.equal(last, method.attribute(pictures(1), 3))
    (whole,) = called(entry, model, (pictures(1),), 3)
    assert not torch.allclose(last, whole)


def test_every_method_over_attention_comes_per_token_as_well():
    assert list(ENTRIES) == [
        "Generic Attention",
        "Generic Attention (per token)",
        "Raw Attention",
        "Raw Attention (per token)",
        "Attention Rollout",
        "Attention Rollout (per token)",
        "Attention Grad Cam",
        "Attention Grad Cam (per token)",
        "Gradient Attention",
        "Gradient Attention (per token)",
        "Transformer Attribution",
        "Transformer Attribution (per token)",
        "Partial Lrp",
        "Partial Lrp (per token)",
        "Lrp Rollout",
        "Lrp Rollout (per token)",
        "Lrp",
    ]


def test_per_token_each_element_has_its_share_of_a_token(model):
    entry = ENTRIES["Generic Attention (per token)"]
    (found,) = called(entry, model, (pictures(1),), 3, interpolation="nearest")
    values = GenericAttention(model).attribute(pictures(1), 3, return_input_shape=False)
    patches = found.reshape(1, 3, 4, 8, 4, 8).sum((1, 3, 5))
    assert torch.allclose(patches, values, rtol=1e-12)


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_per_token_an_input_sums_to_its_tokens(interpolation, size):
    model = tiny_vit(img_size=size)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    method = GenericAttention(model, interpolation=interpolation)
    values = method.attribute(images, 2, return_input_shape=False)
    shared = insights.per_token(method.attribute(images, 2), values)
    assert shared.shape == images.shape
    assert torch.allclose(shared.flatten(1).sum(1), values.flatten(1).sum(1), rtol=1e-12)


def test_per_token_signed_values_that_cancel_are_not_blown_up():
    values = torch.tensor([[[1.0, -2.0], [3.0, -2.0]]])
    pixels = values.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].repeat(1, 3, 1, 1)
    assert torch.allclose(insights.per_token(pixels, values), pixels / (3 * 64))


def test_per_token_nothing_stays_nothing():
    nothing = insights.per_token(torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 2))
    assert torch.equal(nothing, torch.zeros(2, 3, 4, 4))


def test_per_token_text_is_as_it_was_beside_a_picture():
    model = two_towers()
    ids = torch.tensor([[1, 4, 2, 3]])
    inputs = pictures(1), ids
    names = "Generic Attention", "Generic Attention (per token)"
    plain, shared = (called(ENTRIES[name], model, inputs, None) for name in names)
    assert torch.equal(plain[1], shared[1])
    values = GenericAttention(model).attribute(inputs, return_input_shape=False)
    assert torch.allclose(shared[0].sum(), values[0].sum(), rtol=1e-12)
    assert plain[0].sum() > 100 * shared[0].sum() > 0


def without_insights(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.insights.attr_vis.server", None)


@pytest.mark.parametrize(
    "call",
    [
        insights.register,
        insights.unregister,
        lambda: insights.select(None),
        lambda: insights.serve(None),
        insights.image_visualizer,
        insights.caption_visualizer,
    ],
)
def test_without_insights_both_ways_out_are_named(call, monkeypatch):
    without_insights(monkeypatch)
    with pytest.raises(ImportError, match=WAYS_OUT):
        call()


def test_without_insights_the_version_is_named():
    if captum.__version__.startswith("0.8"):
        pytest.skip("Captum 0.8 has Insights")
    seen = rf"No module named 'captum\.insights'.*this is Captum {captum.__version__}"
    with pytest.raises(ImportError, match=seen):
        insights.register()


def test_without_flask_it_is_named(insights_config, monkeypatch):
    modules = sys.modules
    for name in [name for name in modules if name.startswith("captum.insights")]:
        monkeypatch.delitem(modules, name)
    monkeypatch.setitem(modules, "flask", None)
    with pytest.raises(ImportError, match="flask"):
        insights.register()


@pytest.mark.parametrize("arguments", [[], ["--multimodal"]])
def test_without_insights_the_command_fails_and_says_why(arguments, monkeypatch):
    without_insights(monkeypatch)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "pip install 'captum-generic-attn[insights]'" in result.output
    assert "pip install --no-deps --target DIR captum==0.8.0" in result.output
