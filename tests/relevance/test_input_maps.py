"""From values per token to maps of the inputs: which tokens feed which input, and how often."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from captum_generic_attn.relevance.input_maps import maps_of_inputs
from captum_generic_attn.tokens.spaces import TokenSpaces
from captum_generic_attn.tokens.streams import TokenStreams


class Sketch:
    """A forward pass as far as maps need it: inputs, their tokens, one stream of them all."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        self.spaces = TokenSpaces()
        self.streams = TokenStreams(self.spaces)
        self.inputs = tuple(torch.zeros(shape) for shape in shapes)
        self.names = tuple("abc"[: len(shapes)])
        self.elements = [
            self.spaces.of_input(name, tensor.shape)
            for name, tensor in zip(self.names, self.inputs, strict=True)
        ]

    def words(self, index: int) -> Tensor:
        """Tokens of the rows of an input."""
        token_ids = self.elements[index]
        ids = self.spaces.created_of_rows(
            token_ids if token_ids.ndim == 3 else token_ids[..., None]
        )
        assert ids is not None
        return ids

    def maps(self, read: Tensor, interpolation: str | None, *, warn: bool = True) -> list[Tensor]:
        """Maps where the token at place i of the stream has the value i + 1."""
        self.streams.meet(read, read)
        self.streams.close([("attention", read)])
        (stream,) = self.streams
        values = torch.arange(1.0, stream.size + 1).expand(len(self.inputs[0]), -1)
        capture = SimpleNamespace(
            spaces=self.spaces, streams=self.streams, input_names=self.names,
            records=[SimpleNamespace(query_tokens=read, key_tokens=read)],
        )  # fmt: skip
        return maps_of_inputs(capture, {stream.name: values}, self.inputs, interpolation, warn=warn)


def test_words_get_their_values() -> None:
    sketch = Sketch((2, 3))
    (ours,) = sketch.maps(sketch.words(0), "nearest")
    assert ours.tolist() == [[1, 2, 3]] * 2


def test_values_follow_the_order_of_the_stream() -> None:
    sketch = Sketch((2, 3))
    (ours,) = sketch.maps(sketch.words(0)[:, [2, 0, 1]], "bilinear")
    assert ours.tolist() == [[2, 3, 1]] * 2


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", None])
def test_regions_fill_their_features_or_stand_alone(interpolation: str | None) -> None:
    sketch = Sketch((2, 3), (2, 2, 4))
    ids, boxes = sketch.maps(torch.cat([sketch.words(0), sketch.words(1)], 1), interpolation)
    assert ids.tolist() == [[1, 2, 3]] * 2
    expected = torch.tensor([[4.0, 5.0]] * 2)
    assert torch.equal(
        boxes, expected if interpolation is None else expected[..., None].expand(2, 2, 4)
    )


def test_inputs_that_are_summed_share_the_value() -> None:
    sketch = Sketch((2, 3), (2, 3))
    words, types = sketch.words(0), sketch.words(1)
    sketch.spaces.identify(words, types.flip(1))
    first, second = sketch.maps(words, "nearest")
    assert first.tolist() == [[1, 2, 3]] * 2
    assert second.tolist() == [[3, 2, 1]] * 2


def test_an_input_that_feeds_a_token_twice_gets_its_value_once() -> None:
    sketch = Sketch((2, 3))
    words, again = sketch.words(0), sketch.words(0)
    assert not torch.equal(words, again)
    sketch.spaces.identify(words, again)
    (ours,) = sketch.maps(words, "nearest")
    assert ours.tolist() == [[1, 2, 3]] * 2


def test_an_input_that_feeds_two_tokens_gets_both_values() -> None:
    sketch = Sketch((2, 3))
    read = torch.cat([sketch.words(0), sketch.words(0)], 1)
    (ours,) = sketch.maps(read, "nearest")
    assert ours.tolist() == [[1 + 4, 2 + 5, 3 + 6]] * 2


def test_tokens_that_attention_does_not_read_get_nothing() -> None:
    sketch = Sketch((2, 4))
    words = sketch.words(0)
    kept = sketch.spaces.of_parameter("kept", torch.Size([4, 1]))[:, 0].expand(2, -1).clone()
    absorbed = words.clone()
    absorbed[:, 1] = -1
    sketch.spaces.identify(kept, absorbed)
    (ours,) = sketch.maps(kept, "nearest")
    assert ours.tolist() == [[1, 0, 3, 4]] * 2


@pytest.mark.parametrize("interpolation", ["nearest", None])
def test_inputs_that_reach_no_attention_are_zero_and_named_once(interpolation: str | None) -> None:
    sketch = Sketch((2, 3), (2, 5), (2, 2, 2))
    with pytest.warns(UserWarning, match=r"^b, c reaches no attention") as caught:
        ids, mask, other = sketch.maps(sketch.words(0), interpolation)
    assert len(caught) == 1
    assert ids.any()
    assert torch.equal(mask, torch.zeros(2, 5))
    assert torch.equal(other, torch.zeros(2, 2, 2))


def test_the_warning_can_be_left_out() -> None:
    sketch = Sketch((2, 3), (2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sketch.maps(sketch.words(0), "nearest", warn=False)[1].any()


def test_tokens_without_a_grid_are_refused_as_a_map_and_given_as_values() -> None:
    sketch = Sketch((2, 8))
    pairs = [[0, 1], [2, 3], [6, 7]]
    words = sketch.spaces.created_of_rows(sketch.elements[0][:, pairs])
    assert words is not None
    with pytest.raises(ValueError, match=r"3 tokens of a .* \(2, 8\) could not be told") as caught:
        sketch.maps(words, "nearest")
    assert "return_input_shape=False" in str(caught.value)
    assert sketch.maps(words, None)[0].tolist() == [[1, 2, 3]] * 2


def test_several_grids_add_up_as_maps_and_are_refused_as_values() -> None:
    """Patches of two sizes: their pictures can be added, their tokens cannot."""
    sketch = Sketch((1, 8, 1))
    fine, coarse = (
        sketch.spaces.created_of_rows(sketch.elements[0].view(1, 8 // size, size))
        for size in (2, 4)
    )
    assert fine is not None
    assert coarse is not None
    read = torch.cat([fine, coarse], 1)
    (ours,) = sketch.maps(read, "nearest")
    assert ours.flatten().tolist() == [1 + 5, 1 + 5, 2 + 5, 2 + 5, 3 + 6, 3 + 6, 4 + 6, 4 + 6]
    with pytest.raises(ValueError, match="a feeds tokens on several grids") as caught:
        sketch.maps(read, None)
    assert "return_input_shape=True" in str(caught.value)
