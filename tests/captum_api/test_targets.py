"""Which output is explained and which targets fit it, where the outer tests do not reach."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from captum_generic_attn.captum_api.targets import OUTPUT_FIELDS, check_target, choose_output

ONE, TWO = torch.ones(2, 3), torch.zeros(2, 4)


def test_fields_are_tried_in_their_order() -> None:
    fields = OrderedDict((name, torch.full((2,), float(i))) for i, name in enumerate(OUTPUT_FIELDS))
    for i, name in enumerate(OUTPUT_FIELDS):
        assert choose_output(OrderedDict(reversed(fields.items()))) is fields[name]
        assert int(fields.pop(name)[0]) == i


def test_fields_that_hold_no_tensor_are_passed_over() -> None:
    assert choose_output({"logits": None, "pred_logits": ONE}) is ONE


@pytest.mark.parametrize(
    ("returned", "output", "message"),
    [
        (ONE, 0, r"output=0, but the model returns a tensor"),
        ({"a": ONE, "b": (TWO,)}, None, r"which output .* a \(2, 3\), b \(tuple\); pass output="),
        ({"a": ONE}, "b", r"output='b' is not among the model's outputs: a \(2, 3\)"),
        ({"a": ONE}, 0, r"output=0 is no name; the model returns a \(2, 3\)"),
        ((ONE, TWO), None, r"which output .* 0 \(2, 3\), 1 \(2, 4\); pass output=<index>"),
        ((ONE, TWO), 2, r"output=2 is out of range; the model returns 0 \(2, 3\), 1 \(2, 4\)"),
        ((ONE, TWO), -3, r"output=-3 is out of range"),
        ([ONE], "logits", r"output='logits', but the model returns a tuple, without names"),
    ],
)
def test_what_cannot_be_chosen(returned, output, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_output(returned, output)


@pytest.mark.parametrize(
    ("returned", "output", "message"),
    [
        (None, None, "returned NoneType, not a tensor"),
        (torch.zeros(2).long(), None, r"floating tensor, not torch\.int64"),
        ({"a": "text"}, "a", "floating tensor, not str"),
        ((ONE,), lambda out: [out], "floating tensor, not list"),
    ],
)
def test_what_is_no_floating_tensor(returned, output, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        choose_output(returned, output)


FITTING = [
    ((2,), None),
    ((2, 1), None),
    ((2, 3), -3),
    ((2, 3), torch.tensor(2)),
    ((2, 3), torch.tensor([2])),
    ((2, 3), torch.tensor([0, 2], dtype=torch.int32)),
    ((2, 3), [(0,), (2,)]),
    ((2, 3, 4), (2, -1)),
    ((2, 3, 4), [(0, 1), (2, 3)]),
]


@pytest.mark.parametrize(("shape", "target"), FITTING)
def test_targets_that_fit(shape: tuple[int, ...], target) -> None:
    """Whatever fits picks one score of each example, as Captum does."""
    select = pytest.importorskip("captum._utils.common")._select_targets
    output = torch.arange(float(torch.Size(shape).numel())).view(shape)
    assert check_target(output, target, 2) is None
    if target is not None:
        assert select(output, target).numel() == 2


@pytest.mark.parametrize(
    ("shape", "target", "error", "message"),
    [
        ((), None, ValueError, r"shape \(\), but there are 2 examples"),
        ((3, 2), 0, ValueError, r"shape \(3, 2\), but there are 2 examples"),
        ((2, 3), None, ValueError, r"target=None, but the output has shape \(2, 3\): pass an int"),
        ((2, 3, 4), None, ValueError, r"pass a tuple of 2 ints, or a list of one such tuple"),
        ((2,), 0, ValueError, "one score per example: leave target out"),
        ((2, 3), torch.tensor([0.5, 1]), TypeError, r"integers, not torch\.float32"),
        ((2, 3), torch.tensor([True, False]), TypeError, r"integers, not torch\.bool"),
        ((2, 3), torch.tensor([0, 1, 2]), ValueError, r"target has shape \(3,\): pass an int"),
        ((2, 3), [0], ValueError, "target lists 1 choices for 2 examples"),
        ((2, 3), [0, (1,)], TypeError, "target mixes ints and tuples"),
        ((2, 3), [0, -1], ValueError, "target -1 in a list counts from the end"),
        ((2, 3), True, TypeError, "target True is not made of integers"),
        ((2, 3), "1", TypeError, "target '1' is not made of integers"),
        ((2, 3), (0, 1), ValueError, r"target \(0, 1\) does not pick one value of each example"),
        ((2, 3, 4), 1, ValueError, "target 1 does not pick one value of each example"),
        ((2, 3, 4), (1, 4), ValueError, r"target 4 is out of range for an axis of 4 .*\(2, 3, 4\)"),
        ((2, 3), -4, ValueError, "target -4 is out of range for an axis of 3"),
    ],
)
def test_targets_that_do_not_fit(shape, target, error, message: str) -> None:
    with pytest.raises(error, match=message):
        check_target(torch.zeros(shape), target, 2)
