"""What Captum builds on an attribution method: noise tunnel, metrics, visualisation."""

import copy

import matplotlib as mpl
import numpy as np
import pytest
import torch
from captum.attr import NoiseTunnel
from captum.attr import visualization as viz
from captum.metrics import infidelity, sensitivity_max
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit, two_towers

from captum_generic_attn import GenericAttention

mpl.use("Agg")


@pytest.fixture(scope="module")
def method():
    return GenericAttention(tiny_vit())


NOISE_TYPES = ["smoothgrad", "smoothgrad_sq", "vargrad"]


@pytest.mark.parametrize("nt_type", NOISE_TYPES)
def test_noise_tunnel_without_noise(method, nt_type):
    plain = method.attribute(pictures(), target=[1, 3])
    ours = NoiseTunnel(method).attribute(
        pictures(), nt_type=nt_type, nt_samples=3, stdevs=0.0, target=torch.tensor([1, 3])
    )
    expected = {
        "smoothgrad": plain,
        "smoothgrad_sq": plain**2,
        "vargrad": torch.zeros_like(plain),
    }[nt_type]
    assert ours.shape == plain.shape
    assert (ours - expected).abs().max() <= 1e-12 * plain.abs().max()


@pytest.mark.parametrize("nt_type", NOISE_TYPES)
def test_noise_tunnel_gathers_noisy_attributions(method, nt_type):
    """The tunnel's own formula over the attributions of the very images that it drew."""
    seen = []

    class Recording(GenericAttention):
        def attribute(self, inputs, target=None):
            result = method.attribute(inputs, target)
            assert type(result) is type(inputs)
            alone = isinstance(inputs, torch.Tensor)
            seen.append((inputs, result) if alone else (inputs[0], result[0]))
            return result

        attribute.__wrapped__ = attribute

    torch.manual_seed(3)
    ours = NoiseTunnel(Recording(method.forward_func)).attribute(
        pictures(1), nt_type=nt_type, nt_samples=4, stdevs=0.3, target=1
    )
    drawn = torch.cat([inputs for inputs, _ in seen])
    maps = torch.cat([result for _, result in seen])
    assert len(drawn) == 4
    assert not torch.equal(drawn[0], drawn[1])
    again = torch.cat([method.attribute(one[None], target=1) for one in drawn])
    assert (maps - again).abs().max() <= 1e-12 * again.abs().max()
    expected = {
        "smoothgrad": again.mean(0),
        "smoothgrad_sq": (again**2).mean(0),
        "vargrad": again.var(0, correction=0),
    }[nt_type]
    assert expected.abs().max() > 0
    assert (ours[0] - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_noise_tunnel_with_a_tuple():
    towers = GenericAttention(two_towers())
    fixed = sentences(2)

    def of_pictures(pixels):
        return towers.forward_func(pixels, fixed.repeat_interleave(len(pixels) // 2, 0))

    ours = NoiseTunnel(GenericAttention(of_pictures)).attribute(
        (pictures(2),), nt_samples=2, stdevs=0.0
    )
    assert isinstance(ours, tuple)
    expected, _ = towers.attribute((pictures(2), fixed))
    assert (ours[0] - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("as_tuple", [False, True])
def test_infidelity(method, as_tuple):
    """Against its definition, for perturbations that are known beforehand."""
    model = method.forward_func
    inputs = pictures()
    target = [1, 3]
    attributions = method.attribute((inputs,) if as_tuple else inputs, target=target)
    steps = torch.linspace(0.1, 0.4, 3 * 32 * 32, dtype=torch.float64).reshape(3, 32, 32)

    def perturb(x):
        return steps.expand_as(x), x - steps

    ours = infidelity(
        model,
        perturb,
        (inputs,) if as_tuple else inputs,
        attributions,
        target=target,
        n_perturb_samples=3,
    )
    maps = attributions[0] if as_tuple else attributions
    rows = torch.arange(2)
    change = (model(inputs) - model(inputs - steps))[rows, target]
    expected = ((maps * steps).flatten(1).sum(1) - change) ** 2
    assert expected.min() > 0
    assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_sensitivity_max_is_zero_where_nothing_is_perturbed(method):
    ours = sensitivity_max(
        method.attribute,
        pictures(),
        perturb_func=lambda x, radius=0: x,
        target=torch.tensor([1, 3]),
        n_perturb_samples=2,
    )
    assert ours.shape == (2,)
    assert (ours <= 1e-12).all()


def test_sensitivity_max(method):
    """Against its definition, for a perturbation that is known beforehand."""
    inputs = pictures()

    def brighter(x, radius=0):
        return tuple(part + 0.1 for part in x) if isinstance(x, tuple) else x + 0.1

    ours = sensitivity_max(
        method.attribute, inputs, perturb_func=brighter, target=1, n_perturb_samples=2
    )
    plain = method.attribute(inputs, target=1)
    changed = method.attribute(inputs + 0.1, target=1)
    expected = (changed - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    assert expected.min() > 0
    assert (ours - expected).abs().max() <= 1e-9 * expected.max()


def test_sensitivity_max_with_its_own_perturbations(method):
    small, large = (
        sensitivity_max(method.attribute, pictures(), perturb_radius=radius, target=1)
        for radius in (1e-6, 0.3)
    )
    assert (small < large).all()
    assert (small >= 0).all()


def test_sensitivity_max_takes_the_options_of_attribute(method):
    """It deep-copies every keyword that it hands on."""
    ours = sensitivity_max(
        method.attribute,
        pictures(1),
        perturb_func=lambda x, radius=0: x,
        target=[(1,)],
        additional_forward_args=None,
        return_input_shape=True,
    )
    assert ours.shape == (1,)
    assert (ours <= 1e-12).all()


def channel_last(picture: torch.Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).float().numpy()


@pytest.mark.parametrize("how", ["heat_map", "blended_heat_map", "masked_image", "alpha_scaling"])
def test_visualize_image_attr(method, how):
    picture = torch.sigmoid(pictures(1))
    ours = method.attribute(picture, target=2)[0]
    figure, axis = viz.visualize_image_attr(
        channel_last(ours),
        channel_last(picture[0]),
        method=how,
        sign="positive",
        show_colorbar=how.endswith("heat_map"),
        use_pyplot=False,
    )
    assert axis in figure.axes
    drawn = axis.images[-1].get_array()
    peak = np.unravel_index(ours.sum(0).argmax().item(), (32, 32))
    assert drawn.shape[:2] == (32, 32)
    if how.endswith("heat_map"):
        assert drawn[peak] == drawn.max() == 1
    elif how == "alpha_scaling":
        assert drawn[..., 3][peak] == drawn[..., 3].max() == 255
    else:
        kept = channel_last(picture[0])[peak] * 255
        assert np.abs(drawn[peak] - kept).max() <= 1


def test_visualize_image_attr_multiple(method):
    picture = torch.sigmoid(pictures(1))
    ours = method.attribute(picture, target=2)[0]
    _, axes = viz.visualize_image_attr_multiple(
        channel_last(ours),
        channel_last(picture[0]),
        methods=["original_image", "heat_map"],
        signs=["all", "positive"],
        use_pyplot=False,
    )
    assert len(axes) == 2
    assert [len(axis.images) for axis in axes] == [1, 1]


def test_word_importances_of_a_text():
    """Captum's table of coloured words, fed with one row of ours."""
    ids = sentences(1)
    ours = GenericAttention(tiny_text()).attribute(ids, target=1)[0]
    words = [f"w{index}" for index in range(ids.shape[1])]
    table = viz.format_word_importances(words, (ours / ours.max()).tolist())
    assert table.count("<mark") == len(words)
    strongest = viz._get_color(1.0)
    (best,) = (part for part in table.split("<mark") if strongest in part)
    assert f" w{int(ours.argmax())} " in best
    record = viz.VisualizationDataRecord(ours, 0.9, 1, 1, "1", ours.sum(), words, 0.0)
    assert torch.equal(record.word_attributions, ours)


def test_metrics_leave_the_method_as_it_was(method):
    before = copy.copy(vars(method))
    NoiseTunnel(method).attribute(pictures(), nt_samples=2, target=1)
    sensitivity_max(method.attribute, pictures(), target=1, n_perturb_samples=1)
    assert vars(method) == before
