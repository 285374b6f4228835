"""Streams: which tokens attend to each other, in what order they stand, what they are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_generic_attn.tokens.space import PADDING
from captum_generic_attn.tokens.spaces import TokenSpaces
from captum_generic_attn.tokens.streams import TokenStream, TokenStreams


class Sketch:
    """Some tokens and who attends to whom, as a capture would see it."""

    def __init__(self) -> None:
        self.spaces = TokenSpaces()
        self.streams = TokenStreams(self.spaces)
        self._read: list[tuple[str, Tensor]] = []

    def words(self, name: str, count: int) -> Tensor:
        return self.spaces.of_input(name, torch.Size([2, count]))

    def parameter(self, name: str, count: int) -> Tensor:
        ids = self.spaces.of_parameter(name, torch.Size([count, 1]))[:, 0]
        return ids.expand(2, -1)

    def attend(self, *tokens: Tensor, module: str = "attention") -> Tensor:
        ids = torch.cat(tokens, 1)
        self.streams.meet(ids, ids)
        self._read.append((module, ids))
        return ids

    def born(self, parents: Tensor) -> Tensor:
        """Tokens `[B, N]` of parents `[B, N, m]`."""
        ids = self.spaces.created_of_rows(parents)
        assert ids is not None
        return ids

    def close(self) -> dict[str, TokenStream]:
        self.streams.close(self._read)
        return {stream.name: stream for stream in self.streams}


def test_tokens_that_are_read_together_are_one_stream() -> None:
    sketch = Sketch()
    cls, x = sketch.parameter("cls", 1), sketch.words("x", 3)
    ids = sketch.attend(cls, x)
    streams = sketch.close()
    assert list(streams) == ["x"]
    assert streams["x"].size == 4
    assert streams["x"].parts == {"cls": slice(0, 1), "x": slice(1, 4)}
    assert sketch.streams.positions(ids).tolist() == [[0, 1, 2, 3]] * 2
    assert sketch.streams.of(x) is sketch.streams.of(cls) is streams["x"]


def test_towers_stay_apart() -> None:
    sketch = Sketch()
    a, b = sketch.words("pixels", 3), sketch.words("input_ids", 2)
    sketch.attend(a)
    sketch.attend(b)
    streams = sketch.close()
    assert {name: stream.size for name, stream in streams.items()} == {"pixels": 3, "input_ids": 2}
    assert sketch.streams.of(b).name == "input_ids"


def test_a_chain_of_joins_is_one_stream() -> None:
    sketch = Sketch()
    a, b, c, d = (sketch.words(name, 2) for name in "abcd")
    sketch.attend(a, b)
    sketch.attend(c, d)
    before = sketch.streams.meet(a, d)
    sketch.attend(b, c)
    after = sketch.streams.meet(a, d)
    assert (before.is_cross_attention, after.is_cross_attention) == (True, False)
    assert (before.queries, before.keys) == ({0, 1}, ({2, 3},))
    assert (after.queries, after.keys) == ({0, 1, 2, 3}, ({0, 1, 2, 3},))
    streams = sketch.close()
    assert list(streams) == ["a+b+c+d"]
    assert streams["a+b+c+d"].size == 8


def test_the_longest_sequence_gives_the_order() -> None:
    """A class token that comes half-way stands where it is put."""
    sketch = Sketch()
    x, cls = sketch.words("x", 3), sketch.parameter("cls", 1)
    sketch.attend(x)
    sketch.attend(x, cls)
    streams = sketch.close()
    assert streams["x"].parts == {"x": slice(0, 3), "cls": slice(3, 4)}
    assert sketch.streams.positions(x).tolist() == [[0, 1, 2]] * 2
    assert sketch.streams.positions(cls).tolist() == [[3]] * 2


def test_an_order_of_its_own_is_kept() -> None:
    sketch = Sketch()
    x = sketch.words("x", 4)
    sketch.attend(x[:, [2, 0, 3, 1]])
    sketch.close()
    assert sketch.streams.positions(x).tolist() == [[1, 3, 0, 2]] * 2


def test_windows_stand_in_the_order_of_their_birth() -> None:
    sketch = Sketch()
    x = sketch.words("x", 6)
    sketch.attend(x[:, 4:])
    sketch.attend(x[:, :4])
    streams = sketch.close()
    assert streams["x"].size == 6
    assert sketch.streams.positions(x).tolist() == [list(range(6))] * 2


def test_padding_has_no_place() -> None:
    sketch = Sketch()
    x = sketch.words("x", 3)
    padding = torch.full((2, 2), PADDING)
    ids = sketch.attend(x, padding)
    streams = sketch.close()
    assert streams["x"].size == 3
    assert sketch.streams.positions(ids).tolist() == [[0, 1, 2, -1, -1]] * 2


def test_a_stream_of_joined_inputs_names_them_in_order() -> None:
    sketch = Sketch()
    text, prompt, regions = (
        sketch.words("input_ids", 2), sketch.parameter("prompt", 2), sketch.words("boxes", 2)
    )  # fmt: skip
    sketch.attend(regions, prompt, text)
    (stream,) = sketch.close().values()
    assert stream.name == "boxes+input_ids", "parameters belong to what they are joined to"
    assert list(stream.parts) == ["boxes", "prompt", "input_ids"]


def test_a_stream_of_parameters_has_their_name() -> None:
    sketch = Sketch()
    sketch.attend(sketch.parameter("queries", 3))
    assert list(sketch.close()) == ["queries"]


def test_parts_that_stand_apart_are_numbered() -> None:
    sketch = Sketch()
    x, cls = sketch.words("x", 3), sketch.parameter("cls", 1)
    sketch.attend(x[:, :2], cls, x[:, 2:])
    (stream,) = sketch.close().values()
    assert stream.parts == {"x": slice(0, 2), "cls": slice(2, 3), "x#2": slice(3, 4)}


def test_a_second_stream_of_an_input_says_where_it_runs() -> None:
    sketch = Sketch()
    source = sketch.words("ids", 3)
    shifted = sketch.spaces.created_of_rows(source[..., None])
    assert shifted is not None
    for layer in range(2):
        sketch.attend(source, module=f"model.encoder.layers.{layer}.self_attn")
        sketch.attend(shifted, module=f"model.decoder.layers.{layer}.self_attn")
    assert list(sketch.close()) == ["ids", "ids@model.decoder"]


def test_streams_without_another_name_are_numbered() -> None:
    sketch = Sketch()
    for _ in range(3):
        sketch.attend(sketch.words("ids", 2), module="")
    assert list(sketch.close()) == ["ids", "ids#2", "ids#3"]


def test_numbers_in_places_are_passed_over() -> None:
    """Calls of `blocks.0` and `blocks.1` run in `blocks`; of unlike modules, in what they share."""
    sketch = Sketch()
    first, second = sketch.words("ids", 2), sketch.words("ids", 2)
    sketch.attend(first, module="a.0")
    sketch.attend(second, module="net.left.blocks.0.attn")
    sketch.attend(second, module="net.right.attn")
    assert list(sketch.close()) == ["ids", "ids@net"]


def test_tokens_that_nothing_read_make_no_stream() -> None:
    sketch = Sketch()
    sketch.words("mask", 4)
    x = sketch.words("x", 2)
    sketch.attend(x)
    assert list(sketch.close()) == ["x"]


def test_columns_are_the_roots_that_a_stream_had() -> None:
    """`None` for all of them, whatever was merged from them."""
    sketch = Sketch()
    latents, cls = sketch.parameter("latents", 2), sketch.parameter("cls", 1)
    x = sketch.born(sketch.words("x", 4).unsqueeze(-1))
    pairs = sketch.born(x.unflatten(1, (2, 2)))
    sketch.streams.trace([latents, x, cls, pairs])
    early = sketch.streams.meet(latents, x)
    late = sketch.streams.meet(latents, sketch.attend(cls, x))
    sketch.attend(latents)
    sketch.attend(pairs)
    streams = sketch.close()
    assert streams["x"].parts == {
        "cls": slice(0, 1), "x": slice(1, 5), "x@attention": slice(5, 7)
    }  # fmt: skip
    (merge,) = streams["x"].merges
    assert merge.tokens.tolist() == [5, 6]
    assert merge.parents.sort().values.tolist() == [[[1, 2], [3, 4]]]
    assert sketch.streams.columns(early.queries) is None
    assert sketch.streams.columns(late.keys[0]) is None
    before = sketch.streams.columns(early.keys[0])
    assert before is not None
    assert before.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("reads", ["all", "first and last", "last"])
def test_tokens_that_are_merged_twice(reads: str) -> None:
    """What lies between two that attention reads is in the stream as well; what lies before all
    that it reads is not.
    """
    sketch = Sketch()
    x = sketch.born(sketch.words("x", 8).unsqueeze(-1))
    pairs = sketch.born(x.unflatten(1, (4, 2)))
    fours = sketch.born(pairs.unflatten(1, (2, 2)))
    read = {"all": [x, pairs, fours], "first and last": [x, fours], "last": [fours]}[reads]
    sketch.streams.trace(read)
    for ids in read:
        sketch.attend(ids)
    (stream,) = sketch.close().values()
    like = torch.empty(0, dtype=torch.float64)
    if reads == "last":
        assert (stream.size, stream.num_base_tokens, stream.merges) == (2, 2, ())
        return
    assert (stream.size, stream.num_base_tokens) == (8 + 4 + 2, 8)
    eye = torch.eye(8, dtype=torch.float64)
    halves = eye.unflatten(0, (4, 2)).mean(1)
    quarters = eye.unflatten(0, (2, 4)).mean(1)
    assert torch.equal(stream.initial_relevance(like)[0], torch.cat([eye, halves, quarters]))


@pytest.mark.parametrize("first", [True, False])
def test_keys_that_hold_some_of_the_queries_stream_join_it(first: bool) -> None:
    """Wherever these stand among them: a resampler's latents attend to a picture and themselves."""
    sketch = Sketch()
    latents, x = sketch.parameter("latents", 2), sketch.words("x", 3)
    keys = torch.cat([latents, x] if first else [x, latents], 1)
    meeting = sketch.streams.meet(latents, keys)
    assert not meeting.is_cross_attention
    assert meeting.queries == {0, 1}
    sketch.attend(keys)
    assert [stream.size for stream in sketch.close().values()] == [5]


def test_examples_that_merge_other_tokens() -> None:
    sketch = Sketch()
    x = sketch.born(sketch.words("x", 4).unsqueeze(-1))
    pairs = sketch.born(torch.stack([x[0, [0, 1, 2, 3]], x[1, [2, 0, 3, 1]]]).unflatten(1, (2, 2)))
    sketch.streams.trace([x, pairs])
    sketch.attend(x)
    sketch.attend(pairs)
    (stream,) = sketch.close().values()
    (merge,) = stream.merges
    assert merge.parents.sort().values.tolist() == [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    start = stream.initial_relevance(torch.empty(0))[:, 4:]
    assert start.tolist() == [
        [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], [[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]
    ]  # fmt: skip


def test_merged_tokens_do_not_change_the_order_of_the_others() -> None:
    sketch = Sketch()
    x = sketch.born(sketch.words("x", 4).unsqueeze(-1))
    order = x[:, [2, 0, 3, 1]]
    mean = sketch.born(x.unsqueeze(1))
    sketch.streams.trace([x, mean])
    sketch.attend(order)
    sketch.attend(mean, order)
    (stream,) = sketch.close().values()
    assert (stream.size, stream.num_base_tokens) == (5, 4)
    assert sketch.streams.positions(order).tolist() == [[0, 1, 2, 3]] * 2
    assert sketch.streams.positions(mean).tolist() == [[4]] * 2
