"""Methods side by side: what each is given, what comes back, what is saved and drawn."""

from __future__ import annotations

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from captum.attr import (
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    NoiseTunnel,
    Saliency,
    ShapleyValueSampling,
)
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit

import captum_generic_attn
from captum_generic_attn import (
    Comparison,
    GenericAttention,
    Lrp,
    RawAttention,
    all_methods,
    compare,
)
from captum_generic_attn.comparison import patch_mask
from captum_generic_attn.visualization import comparison_figure


@pytest.fixture(scope="module")
def model():
    return tiny_vit()


@pytest.fixture(scope="module")
def everything(model):
    return compare(all_methods(model), pictures(1), target=2, n_samples=40, n_steps=8)


def test_all_methods_run_on_a_vision_transformer(everything) -> None:
    assert list(everything.attributions) == list(all_methods(tiny_vit()))
    assert {"Generic attention", "Raw attention", "Attention rollout", "Attention Grad-CAM",
            "Transformer attribution", "LRP", "Saliency", "Input × gradient",
            "Integrated gradients", "Gradient SHAP", "Kernel SHAP"} <= set(everything.attributions)  # fmt: skip  # noqa: E501
    assert not everything.refused
    for name, found in everything.attributions.items():
        assert found.shape == (1, 3, 32, 32), name
        assert found.isfinite().all(), name
        assert found.abs().max() > 0, name
        assert everything.seconds[name] > 0
        assert not found.requires_grad


def test_each_method_gives_what_it_gives_alone(model, everything) -> None:
    images = pictures(1)
    alone = {
        "Generic attention": GenericAttention(model).attribute(images, 2),
        "LRP": Lrp(model).attribute(images, 2),
        "Saliency": Saliency(model).attribute(images.clone().requires_grad_(), 2),
        "Input × gradient": InputXGradient(model).attribute(images.clone().requires_grad_(), 2),
        "Integrated gradients": IntegratedGradients(model).attribute(
            images, torch.zeros_like(images), 2, n_steps=8
        ),
    }
    for name, theirs in alone.items():
        assert torch.equal(everything[name], theirs.detach()), name


def test_kernel_shap_gets_patches(everything) -> None:
    found = everything["Kernel SHAP"][0]
    mask = patch_mask((3, 32, 32))[0, 0]
    for patch in mask.unique():
        values = found[:, mask == patch]
        assert (values == values.flatten()[0]).all()
    assert len(found.unique()) > 50


def test_random_numbers_are_the_same_and_stay_the_users(model) -> None:
    methods = {"SHAP": GradientShap(model)}
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    first = compare(methods, pictures(1), 2, n_samples=40)["SHAP"]
    drawn = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(8)
    again = compare(methods, pictures(1), 2, n_samples=40)["SHAP"]
    other = compare(methods, pictures(1), 2, n_samples=40, seed=1)["SHAP"]
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (torch.rand(1), np.random.rand()) == drawn  # noqa: NPY002


def test_given_baselines_and_masks_are_used(model) -> None:
    images = pictures(1)
    baseline = torch.full_like(images, 0.5)
    mask = (torch.arange(32) // 16).expand(1, 1, 32, 32)
    found = compare(
        {"ig": IntegratedGradients(model), "shap": KernelShap(model)},
        images, 2, baselines=baseline, feature_mask=mask, n_steps=8, n_samples=30,
    )  # fmt: skip
    theirs = IntegratedGradients(model).attribute(images, baseline, 2, n_steps=8)
    assert torch.equal(found["ig"], theirs.detach())
    assert len(found["shap"].unique()) <= 2
    assert found.settings["baselines"] == found.settings["feature_mask"] == "given"


def test_what_cannot_run_raises_or_is_told() -> None:
    model, ids = tiny_text("classes"), sentences()
    methods = {"ours": GenericAttention(model), "Saliency": Saliency(model)}
    with pytest.raises(RuntimeError, match="does not require grad"):
        compare(methods, ids, 1)
    with pytest.warns(UserWarning, match="Saliency is left out: "):
        found = compare(methods, ids, 1, strict=False)
    assert list(found.attributions) == ["ours"]
    assert "does not require grad" in found.refused["Saliency"]
    assert "Saliency  refused: " in repr(found)
    with pytest.raises(KeyError, match="Saliency was refused: "):
        found["Saliency"]
    with pytest.raises(KeyError, match="no method is named 'theirs'; there are: ours"):
        found["theirs"]


def test_methods_of_one_name_or_none_are_told(model) -> None:
    with pytest.raises(ValueError, match="two methods are named 'Raw Attention'"):
        compare([RawAttention(model), RawAttention(model)], pictures(1), 2)
    with pytest.raises(ValueError, match="there is no method to run"):
        compare({}, pictures(1), 2)
    with pytest.raises(TypeError, match="ours is no Captum attribution but"):
        compare({"ours": model}, pictures(1), 2)


def test_tuples_stay_tuples(model) -> None:
    found = compare([GenericAttention(model), Saliency(model)], (pictures(1),), 2)
    for attribution in found.attributions.values():
        assert isinstance(attribution, tuple)
        assert [a.shape for a in attribution] == [(1, 3, 32, 32)]


def test_text_features_are_tokens() -> None:
    """Integers have no gradient, but they can be left out one by one."""
    model, ids = tiny_text("classes"), sentences(1)
    found = compare({"Shapley": ShapleyValueSampling(model)}, ids, 1, n_samples=3)
    assert found["Shapley"].shape == ids.shape


def test_features_of_different_inputs_are_different_features() -> None:
    def forward(one, two):
        return torch.stack([one.sum(1), 10 * two.sum(1)], 1)

    found = compare({"shap": KernelShap(forward)}, (torch.ones(1, 3), torch.ones(1, 3)), 0)
    one, two = found["shap"]
    assert one.min() > 0.5
    assert two.abs().max() < 1e-3


def test_further_arguments_reach_methods_inside_methods() -> None:
    def forward(x, switch):
        return (x * switch).sum(1)

    x = torch.ones(2, 3)
    found = compare({"noisy": NoiseTunnel(Saliency(forward))}, x, None, torch.zeros(2, 1))
    assert found["noisy"].abs().max() == 0


def test_saved_and_loaded(everything, tmp_path) -> None:
    path = tmp_path / "comparison.safetensors"
    everything.save(path)
    for twin in (Comparison.load(path), copy.deepcopy(everything),
                 pickle.loads(pickle.dumps(everything))):  # fmt: skip  # noqa: S301
        assert list(twin.attributions) == list(everything.attributions)
        for name, found in everything.attributions.items():
            assert torch.equal(twin[name], found)
        assert twin.seconds == everything.seconds
        assert twin.settings == everything.settings
        assert repr(twin) == repr(everything)
    (tmp_path / "other").write_bytes(b"no file of ours")
    with pytest.raises(ValueError, match="is no saved Comparison"):
        Comparison.load(tmp_path / "other")


def test_tuples_are_saved_as_tuples(tmp_path) -> None:
    one, two = torch.rand(1, 2), torch.rand(1, 3)
    found = Comparison({"b": (one, two), "a": one}, {"b": 1.0, "a": 2.0}, {"c": "why"}, {})
    found.save(tmp_path / "file")
    again = Comparison.load(tmp_path / "file")
    assert list(again.attributions) == ["b", "a"]
    assert isinstance(again["b"], tuple)
    assert torch.equal(again["b"][1], two)
    assert torch.equal(again["a"], one)
    assert again.refused == {"c": "why"}


def test_progress_goes_to_stderr(model, capsys) -> None:
    compare([GenericAttention(model)], pictures(1), 2, show_progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "comparing" in captured.err


def test_figure_has_a_map_for_each_method(everything) -> None:
    figure = comparison_figure(np.full((32, 32, 3), 0.5), everything, title="class 2")
    titles = [axes.get_title() for axes in figure.axes]
    names = list(everything.attributions)
    assert titles[0] == "class 2"
    assert [title.split("\n")[0] for title in titles[1 : len(names) + 1]] == names
    assert all(title.endswith(" s") for title in titles[1 : len(names) + 1])
    drawn = figure.axes[1].images[0].get_array()
    heat = everything["Generic attention"][0, 0].numpy()
    place = np.unravel_index(heat.argmax(), heat.shape)
    assert drawn[place][0] > drawn[place][2] + 0.2, "red where the map is highest"


def test_figure_shows_what_speaks_against_in_blue() -> None:
    heat = torch.zeros(1, 1, 8, 8)
    heat[0, 0, 1, 2], heat[0, 0, 6, 5] = 1.0, -1.0
    found = Comparison({"signed": heat.expand(1, 3, 8, 8)}, {"signed": 1.0}, {}, {})
    drawn = comparison_figure(np.ones((8, 8)), found).axes[1].images[0].get_array()
    red, blue, nothing = drawn[1, 2], drawn[6, 5], drawn[4, 4]
    assert red[0] > red[2] + 0.1
    assert blue[2] > blue[0] + 0.1
    assert np.allclose(nothing, nothing[0])


def test_figure_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="there is nothing to draw"):
        comparison_figure(np.ones((8, 8)), Comparison({}, {}, {"a": "why"}, {}))
    found = Comparison({"text": torch.rand(1, 8)}, {"text": 1.0}, {}, {})
    with pytest.raises(ValueError, match=r"text has attributions \(1, 8\); images are"):
        comparison_figure(np.ones((8, 8)), found)


def test_public_names() -> None:
    assert captum_generic_attn.compare is compare
    assert set(captum_generic_attn.__all__) >= {"compare", "Comparison", "all_methods"}


def test_a_scale_that_is_cut_says_so():
    outlier = torch.ones(1, 1, 40, 40)
    outlier[0, 0, 0, 0] = 60.0
    against = outlier.clone()
    against[0, 0, 1] = -1.0
    for heat, ends in (
        (outlier, ["0", "≥ 1"]),
        (against, ["≤ -1", "≥ 1"]),
        (outlier.clamp(max=1), ["0", "1"]),
    ):
        found = Comparison({"a": heat}, {"a": 1.0}, {}, {})
        figure = comparison_figure(np.ones((40, 40)), found)
        assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ends


def test_kernel_shap_without_scikit_learn_says_so_before_it_samples(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    calls = []

    def model(x):
        calls.append(len(x))
        return x.sum((1, 2, 3))[:, None]

    with pytest.raises(ImportError, match=r"sklearn is needed here: pip install .*\[metrics\]"):
        compare({"a": Saliency(model), "SHAP": KernelShap(model)}, torch.rand(1, 1, 4, 4), 0)
    assert calls == []
    with pytest.warns(UserWarning, match="SHAP is left out: sklearn is needed"):
        found = compare(
            {"SHAP": KernelShap(model), "a": Saliency(model)}, torch.rand(1, 1, 4, 4), 0,
            strict=False,
        )  # fmt: skip
    assert list(found.refused) == ["SHAP"]


def test_methods_that_were_not_timed_are_drawn_without_seconds() -> None:
    found = Comparison(
        {"a": torch.rand(1, 3, 8, 8), "b": torch.rand(1, 3, 8, 8)}, {"b": 2.0}, {}, {}
    )
    figure = comparison_figure(np.ones((8, 8)), found)
    assert [axes.get_title() for axes in figure.axes[1:3]] == ["a", "b\n2 s"]
