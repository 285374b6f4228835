"""What Captum and its users expect of an attribution class and of what `attribute` returns."""

import copy
import inspect
import pickle

import pytest
import torch
from captum.attr import GradientAttribution
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit, two_towers

from captum_generic_attn import GenericAttention


@pytest.fixture(scope="module")
def model():
    return tiny_vit()


@pytest.fixture(scope="module")
def towers():
    return two_towers()


def test_it_is_a_gradient_attribution(model):
    method = GenericAttention(model)
    assert isinstance(method, GradientAttribution)
    assert method.forward_func is model
    assert method.has_convergence_delta() is False
    assert method.multiplies_by_inputs is False
    assert GenericAttention.get_name() == "Generic Attention"


def test_signature_of_attribute():
    parameters = inspect.signature(GenericAttention.attribute.__wrapped__).parameters
    assert list(parameters) == [
        "self",
        "inputs",
        "target",
        "additional_forward_args",
        "return_input_shape",
        "internal_batch_size",
        "show_progress",
    ]
    own = ("return_input_shape", "internal_batch_size", "show_progress")
    for option in own:
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["inputs"].default is inspect.Parameter.empty
    assert parameters["target"].default is None
    assert parameters["additional_forward_args"].default is None
    assert parameters["return_input_shape"].default is True
    shared = [p for name, p in parameters.items() if name not in own]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in shared)


def test_signature_of_the_constructor():
    parameters = dict(inspect.signature(GenericAttention).parameters)
    forward_func = parameters.pop("forward_func")
    assert forward_func.default is inspect.Parameter.empty
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert {name: p.default for name, p in parameters.items()} == {
        "layers": None,
        "start_layer": 0,
        "rows": None,
        "own": "zero",
        "normalize": True,
        "self_in_cross": True,
        "aggregate": True,
        "rule": None,
        "lrp": False,
        "output": None,
        "interpolation": "bilinear",
        "strict": True,
    }


def test_wrapped_attribute_serves_without_the_decorator(model):
    method = GenericAttention(model)
    ours = GenericAttention.attribute.__wrapped__(method, pictures(), 1)
    assert torch.equal(ours, method.attribute(pictures(), target=1))


def test_target_is_the_second_positional(model):
    method = GenericAttention(model)
    assert torch.equal(method.attribute(pictures(), 3), method.attribute(pictures(), target=3))
    assert not torch.equal(method.attribute(pictures(), 3), method.attribute(pictures(), 2))


def test_tensor_in_tensor_out(model):
    inputs = pictures()
    ours = GenericAttention(model).attribute(inputs, target=0)
    assert isinstance(ours, torch.Tensor)
    assert ours.shape == inputs.shape
    assert ours.abs().max() > 0


def test_tuple_of_one_in_tuple_of_one_out(model):
    method = GenericAttention(model)
    ours = method.attribute((pictures(),), target=0)
    assert isinstance(ours, tuple)
    (only,) = ours
    assert torch.equal(only, method.attribute(pictures(), target=0))


@pytest.mark.parametrize("full", [True, False])
def test_tuple_in_tuple_out(towers, full):
    inputs = (pictures(3), sentences(3))
    ours = GenericAttention(towers).attribute(inputs, return_input_shape=full)
    assert isinstance(ours, tuple)
    shapes = [tuple(part.shape) for part in ours]
    assert shapes == ([(3, 3, 32, 32), (3, 6)] if full else [(3, 4, 4), (3, 6)])
    assert all(part.abs().max() > 0 for part in ours)


@pytest.mark.parametrize("full", [True, False])
def test_attribution_is_plain_data(model, full):
    """Detached, contiguous, of the model's precision and on the inputs' device."""
    channels_last = pictures().to(memory_format=torch.channels_last).requires_grad_()
    ours = GenericAttention(model).attribute(channels_last, target=1, return_input_shape=full)
    assert ours.is_contiguous()
    assert ours.stride(-1) == 1
    assert not ours.requires_grad
    assert ours.grad_fn is None
    assert ours.dtype == torch.float64
    assert ours.device == channels_last.device
    assert not ours.is_inference()
    expected = GenericAttention(model).attribute(pictures(), target=1, return_input_shape=full)
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()
    # Memory of its own: an expanded tensor would refuse, or change its neighbours as well.
    rest = ours[1:].clone()
    ours[0].fill_(7.0)
    assert torch.equal(ours[1:], rest)
    ours[1, ..., 0] = 9.0
    assert (ours == 9.0).sum() == ours[1, ..., 0].numel()


@pytest.mark.parametrize(
    ("model_dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_dtype_of_pictures(model_dtype, expected):
    model = tiny_vit(dtype=model_dtype)
    ours = GenericAttention(model).attribute(pictures(dtype=model_dtype), target=1)
    assert ours.dtype == expected
    exact = GenericAttention(tiny_vit()).attribute(pictures(), target=1)
    limit = {torch.float64: 1e-12, torch.float32: 1e-3, torch.bfloat16: 0.3}[model_dtype]
    assert (ours.double() - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dtype_of_token_ids(dtype):
    ours = GenericAttention(tiny_text().to(dtype)).attribute(sentences(), target=1)
    assert ours.dtype == dtype
    assert ours.shape == (3, 6)


def test_every_channel_and_cell_gets_the_undivided_value(model):
    tokens = GenericAttention(model).attribute(pictures(), target=1, return_input_shape=False)
    whole = GenericAttention(model, interpolation="nearest").attribute(pictures(), target=1)
    expected = tokens.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(whole, expected[:, None].expand_as(whole))


def test_one_example_does_not_depend_on_the_others(model):
    method = GenericAttention(model)
    inputs = pictures(4)
    together = method.attribute(inputs, target=[0, 1, 2, 3])
    for index in range(4):
        alone = method.attribute(inputs[index : index + 1], target=index)
        assert (together[index] - alone[0]).abs().max() <= 1e-12 * alone.abs().max()


def test_inputs_that_reach_no_attention_get_zeros_and_a_warning():
    text = tiny_text()

    def scaled(input_ids, gain):
        return text(input_ids) * gain

    gain = torch.full((3, 1), 2.0, dtype=torch.float64)
    for full in (True, False):
        with pytest.warns(UserWarning, match="gain") as caught:
            ids_map, gain_map = GenericAttention(scaled).attribute(
                (sentences(), gain), target=1, return_input_shape=full
            )
        assert len([w for w in caught if issubclass(w.category, UserWarning)]) == 1
        assert gain_map.tolist() == [[0.0], [0.0], [0.0]]
        assert gain_map.is_floating_point()
        alone = GenericAttention(text).attribute(sentences(), target=1)
        assert (ids_map - 2 * alone).abs().max() > 0  # R - I is not linear in the score
        assert ids_map.shape == (3, 6)


@pytest.mark.parametrize("rest", ["tensor", "tuple", "with None"])
def test_additional_forward_args(rest):
    text = tiny_text()

    def scaled(input_ids, gain, nothing=None):
        assert nothing is None
        return text(input_ids) * gain

    gain = torch.full((3, 1), 3.0, dtype=torch.float64)
    arguments = {"tensor": gain, "tuple": (gain,), "with None": (gain, None)}[rest]
    ours = GenericAttention(scaled).attribute(
        sentences(), target=2, additional_forward_args=arguments
    )
    expected = GenericAttention(lambda input_ids: 3 * text(input_ids)).attribute(
        sentences(), target=2
    )
    assert torch.equal(ours, expected)


def test_under_no_grad(model):
    method = GenericAttention(model)
    expected = method.attribute(pictures(), target=1)
    with torch.no_grad():
        ours = method.attribute(pictures(), target=1)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_copies_and_pickles(how):
    method = GenericAttention(
        tiny_vit(), layers=["blocks"], start_layer=-1, rows=0, interpolation="nearest"
    )
    expected = method.attribute(pictures(), target=1)
    assert torch.equal(how(method).attribute(pictures(), target=1), expected)
    # A used method is copied as well as a new one.
    assert torch.equal(how(how(method)).attribute(pictures(), target=1), expected)


def test_deepcopy_has_a_model_of_its_own(model):
    method = GenericAttention(model)
    twin = copy.deepcopy(method)
    assert twin.forward_func is not model
    with torch.no_grad():
        twin.forward_func.head.weight.neg_()
    assert not torch.equal(
        twin.attribute(pictures(), target=1), method.attribute(pictures(), target=1)
    )


def test_nothing_is_kept_between_calls(model):
    method = GenericAttention(model)
    before = dict(vars(method))
    method.attribute(pictures(), target=1)
    method.relevance(pictures(), target=1, keep_calls=True)
    with pytest.raises(TypeError, match="target"):
        method.attribute(pictures(), target="one")
    assert vars(method).keys() == before.keys()
    assert all(vars(method)[name] is value for name, value in before.items())


def test_forward_func_is_looked_up_at_call_time(model):
    """Captum's language-model wrappers swap `forward_func` on a shallow copy."""
    method = GenericAttention(model)
    expected = method.attribute(pictures(), target=1)
    other = tiny_vit(seed=5)
    twin = copy.copy(method)
    twin.forward_func = lambda x: other(x)[:, :2]
    assert torch.equal(
        twin.attribute(pictures(), target=1), GenericAttention(other).attribute(pictures(), 1)
    )
    assert torch.equal(method.attribute(pictures(), target=1), expected)


def test_repeated_calls_agree(model):
    method = GenericAttention(model)
    first = method.attribute(pictures(), target=1)
    method.attribute(pictures(seed=9), target=4)
    assert torch.equal(method.attribute(pictures(), target=1), first)
