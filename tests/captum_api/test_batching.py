"""Large batches in parts: the same results, whatever the size of the parts."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_generic_attn import GenericAttention
from captum_generic_attn.captum_api.batching import Part, parts_of

SIZES = [1, 2, 3, 5, 9]


@given(st.integers(1, 40), st.integers(1, 50))
def test_parts_follow_each_other_and_are_the_batch(examples: int, size: int) -> None:
    parts = list(parts_of(examples, size))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(examples))
    assert all(part.stop - part.start == size for part in parts[:-1])
    assert 0 < parts[-1].stop - parts[-1].start <= size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("full", [True, False])
def test_attribute(size: int, full: bool) -> None:
    method, inputs = GenericAttention(tiny_vit()), pictures(5)
    target = [1, 0, 4, 2, 2]
    expected = method.attribute(inputs, target, return_input_shape=full)
    for given_target in (target, torch.tensor(target)):
        ours = method.attribute(
            inputs, given_target, return_input_shape=full, internal_batch_size=size
        )
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_attribute_targets(size: int) -> None:
    method, inputs = GenericAttention(tiny_vit()), pictures(5)
    targets = [1, [0, 1, 2, 3, 4], torch.tensor([3, 3, 0, 0, 1])]
    expected = method.attribute_targets(inputs, targets)
    ours = method.attribute_targets(inputs, targets, internal_batch_size=size)
    assert ours.shape == (3, *inputs.shape)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


def test_no_more_examples_go_through_the_model_at_once() -> None:
    model = tiny_vit()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    GenericAttention(model).attribute(pictures(5), 1, internal_batch_size=2)
    assert seen == [2, 2, 1]


class Gated(nn.Module):
    """A text model whose score takes a number of each example, and one of all."""

    def __init__(self) -> None:
        super().__init__()
        self.text = tiny_text()

    def forward(self, ids: Tensor, gates: dict[str, Tensor], both: list[Tensor]) -> Tensor:
        return self.text(ids) * gates["each"][:, None] * both[0] * both[1][:, None]


@pytest.mark.parametrize("size", SIZES)
def test_further_arguments_are_cut_with_the_batch(size: int) -> None:
    ids = sentences(5)
    each = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    more = {"each": each}, [torch.full((3,), 0.7).double(), each]
    model = Gated()
    classes = model.text(ids).shape[1]
    more[1][0] = torch.linspace(1, 2, classes, dtype=torch.float64)
    assert classes != len(ids)
    method = GenericAttention(model)
    expected = method.attribute(ids, 1, more)
    ours = method.attribute(ids, 1, more, internal_batch_size=size)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mapping", [True, False])
def test_rows_of_each_example(size: int, mapping: bool) -> None:
    rows = torch.tensor([1, 0, 5, 16, 2])
    method = GenericAttention(tiny_vit(), rows={"x": rows} if mapping else rows)
    expected = method.attribute(pictures(5), 1)
    ours = method.attribute(pictures(5), 1, internal_batch_size=size)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


def test_a_list_of_rows_is_for_all_examples() -> None:
    method = GenericAttention(tiny_vit(), rows=[0, 3])
    expected = method.attribute(pictures(2), 1)
    ours = method.attribute(pictures(2), 1, internal_batch_size=1)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


class Dark(nn.Module):
    """A vision transformer whose score is a constant for some examples."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit()

    def forward(self, x: Tensor, lit: Tensor) -> Tensor:
        return self.vit(x) * lit[:, None]


def test_a_warning_names_examples_by_their_place_in_the_batch() -> None:
    lit = torch.tensor([1.0, 0, 1, 1, 0]).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GenericAttention(Dark()).attribute(pictures(5), 1, lit, internal_batch_size=2)
    (message,) = [str(w.message) for w in caught]
    assert message.startswith("the score of example [1, 4] has no gradient")


def test_one_warning_for_a_batch_that_is_all_dark() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GenericAttention(Dark()).attribute(
            pictures(3), 1, torch.zeros(3).double(), internal_batch_size=1
        )
    (message,) = [str(w.message) for w in caught]
    assert message.startswith("the score has no gradient at any attention call")


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2"])
def test_sizes_that_are_none(size) -> None:
    with pytest.raises(ValueError, match=r"internal_batch_size=.* must be an int of at least 1"):
        GenericAttention(tiny_vit()).attribute(pictures(2), 1, internal_batch_size=size)


@pytest.mark.parametrize("target", [[1, 0], torch.tensor([1, 0]), [1, 0, 2, 3, 4, 0]])
def test_a_target_for_each_of_another_number_of_examples(target) -> None:
    """Two choices for parts of two examples must not pass for one choice each."""
    with pytest.raises(ValueError, match=r"target lists \d choices for 5 examples"):
        GenericAttention(tiny_vit()).attribute(pictures(5), target, internal_batch_size=2)


def test_a_part_leaves_what_is_no_batch_alone() -> None:
    part = Part(1, 2, 3)
    scalar, shared = torch.tensor(3.0), torch.arange(4)
    assert part.of(scalar) is scalar
    assert part.of(shared) is shared
    assert part.of(("x", None, 3)) == ("x", None, 3)
    whole = Part(0, 3, 3)
    batch = torch.arange(3)
    assert whole.of(batch) is batch
    assert whole.of_target([1, 2]) == [1, 2]  # the whole batch's target is checked elsewhere


def test_a_bar_on_request(capsys) -> None:
    method, inputs = GenericAttention(tiny_vit()), pictures(3)
    quiet = method.attribute_targets(inputs, [0, 1], internal_batch_size=2)
    assert capsys.readouterr() == ("", "")
    shown = method.attribute_targets(inputs, [0, 1], internal_batch_size=2, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Generic Attention attribution" in err
    assert "4/4" in err
    assert torch.equal(quiet, shown)
