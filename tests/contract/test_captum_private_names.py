"""The private names of Captum that the package uses: they exist and behave as it needs.

Captum moves its private names between releases. Only `captum_generic_attn/captum_api/` imports
them, so that is the place to change if one of these tests fails.
"""

import inspect

import pytest
import torch
from captum._utils.common import (
    _format_output,
    _format_tensor_into_tuples,
    _is_tuple,
    _run_forward,
)
from captum._utils.typing import TargetType, TensorOrTupleOfTensorsGeneric


def test_is_tuple():
    one = torch.zeros(1)
    assert _is_tuple((one,)) is True
    assert _is_tuple(one) is False
    assert _is_tuple([one]) is False


def test_format_tensor_into_tuples():
    one, two = torch.zeros(1), torch.ones(1)
    (alone,) = _format_tensor_into_tuples(one)
    assert alone is one
    both = _format_tensor_into_tuples((one, two))
    assert isinstance(both, tuple)
    assert both[0] is one
    assert both[1] is two


def test_format_output():
    one, two = torch.zeros(1), torch.ones(1)
    assert _format_output(False, (one,)) is one
    assert _format_output(True, (one,)) == (one,)
    assert _format_output(True, (one, two)) == (one, two)


def test_run_forward_hands_over_inputs_then_the_rest():
    seen = []

    def forward(first, second, third, fourth):
        seen.append((first, second, third, fourth))
        return torch.arange(6.0).reshape(2, 3)

    one, two = torch.zeros(2), torch.ones(2)
    result = _run_forward(forward, (one, two), None, (None, "rest"))
    assert result.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    ((first, second, third, fourth),) = seen
    assert first is one
    assert second is two
    assert third is None
    assert fourth == "rest"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (1, [1.0, 4.0]),
        (torch.tensor(1), [1.0, 4.0]),
        (torch.tensor([1]), [1.0, 4.0]),
        (torch.tensor([0, 2]), [0.0, 5.0]),
        ([0, 2], [0.0, 5.0]),
        ((2,), [2.0, 5.0]),
        ([(0,), (2,)], [0.0, 5.0]),
    ],
)
def test_run_forward_selects_targets(target, expected):
    table = torch.arange(6.0).reshape(2, 3)
    assert _run_forward(lambda x: table, torch.zeros(2), target).tolist() == expected


def test_run_forward_takes_a_future():
    def forward(x):
        future = torch.futures.Future()
        future.set_result(2 * x)
        return future

    assert _run_forward(forward, torch.ones(2, 3), 1).value().tolist() == [2.0, 2.0]


def test_type_names_serve_in_annotations():
    def attribute(
        inputs: TensorOrTupleOfTensorsGeneric, target: TargetType = None
    ) -> TensorOrTupleOfTensorsGeneric:
        return inputs

    annotations = inspect.get_annotations(attribute)
    assert annotations["inputs"] is TensorOrTupleOfTensorsGeneric
    assert type(None) in TargetType.__args__
    assert int in TargetType.__args__
