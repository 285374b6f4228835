"""The result of `GenericAttention.relevance`: streams, parts, matrices, rows, calls, files."""

import copy
import dataclasses
import pickle
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import pictures, sentences, slow_relevance, tiny_text, tiny_vit, two_towers
from parity.golden_models import bert, golden, relative_error

from captum_generic_attn import GenericAttention, Relevance
from captum_generic_attn.relevance.equations import self_attention_update


@pytest.fixture(scope="module")
def of_pictures():
    return GenericAttention(tiny_vit()).relevance(pictures(), target=[1, 3], keep_calls=True)


@pytest.fixture(scope="module")
def of_pairs():
    return GenericAttention(two_towers()).relevance((pictures(3), sentences()), keep_calls=True)


def eye(batch: int, tokens: int):
    return torch.eye(tokens, dtype=torch.float64).expand(batch, -1, -1)


def test_streams(of_pictures, of_pairs):
    assert {name: stream.tokens for name, stream in of_pictures.streams.items()} == {"x": 17}
    assert {name: stream.tokens for name, stream in of_pairs.streams.items()} == {
        "pixels": 17,
        "input_ids": 6,
    }


def test_parts(of_pictures, of_pairs):
    """CLS belongs to the stream that it is joined to, as a part under its parameter's name."""
    assert of_pictures.streams["x"].parts["cls_token"] == slice(0, 1)
    assert of_pictures.streams["x"].parts["x"] == slice(1, 17)
    assert of_pairs.streams["pixels"].parts["vision.cls_token"] == slice(0, 1)
    assert of_pairs.streams["pixels"].parts["pixels"] == slice(1, 17)
    assert of_pairs.streams["input_ids"].parts["input_ids"] == slice(0, 6)


def test_registers_are_a_part():
    model = tiny_vit(reg_tokens=3)
    relevance = GenericAttention(model).relevance(pictures(), target=1)
    stream = relevance.streams["x"]
    assert stream.tokens == 20
    assert stream.parts["cls_token"] == slice(0, 1)
    assert stream.parts["reg_token"] == slice(1, 4)
    assert stream.parts["x"] == slice(4, 20)
    whole = relevance.matrix("x", "x")
    assert torch.equal(relevance.matrix("cls_token", "reg_token"), whole[:, :1, 1:4])
    assert torch.equal(relevance.matrix("reg_token", "x"), whole[:, 1:4])


def test_arguments_without_names_are_numbered():
    towers = two_towers()

    def forward(*args):
        return towers(*args)

    inputs = (pictures(3), sentences())
    relevance = GenericAttention(forward).relevance(inputs)
    assert set(relevance.streams) == {"input0", "input1"}
    expected = GenericAttention(towers).relevance(inputs)
    assert torch.equal(
        relevance.matrix("input1", "input1"), expected.matrix("input_ids", "input_ids")
    )


def test_summed_inputs_are_one_stream_named_after_the_first():
    model = bert("sdpa")
    ids = golden("bert", "input.s0.input_ids")
    mask = golden("bert", "input.s0.attention_mask")

    def forward(input_ids, token_type_ids):
        return model(input_ids, mask, token_type_ids).logits

    relevance = GenericAttention(forward).relevance((ids, torch.zeros_like(ids)), target=0)
    assert set(relevance.streams) == {"input_ids"}
    theirs = golden("bert", "s0.class0.ours.R")
    assert relative_error(relevance.matrix("input_ids", "input_ids")[0], theirs) <= 1e-7
    # Every input that is summed into the tokens gets the tokens' values.
    ids_map, types_map = GenericAttention(forward).attribute((ids, torch.zeros_like(ids)), 0)
    assert ids_map.any()
    assert torch.equal(ids_map, types_map)


def test_matrix_is_the_paper_s(of_pictures):
    matrix = of_pictures.matrix("x", "x")
    assert matrix.shape == (2, 17, 17)
    assert matrix.dtype == torch.float64
    assert (matrix >= 0).all()
    assert (matrix.diagonal(dim1=1, dim2=2) >= 1).all()  # the identity is in it
    expected = eye(2, 17).clone()
    for call in of_pictures.calls:
        expected += self_attention_update(call.map, expected)
    assert (matrix - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_matrix_against_slow_loops():
    expected, maps = slow_relevance(
        tiny_text("tokens", eager=True), sentences(), lambda output: output[:, 2, 1]
    )
    for eager in (True, False):
        relevance = GenericAttention(tiny_text("tokens", eager=eager)).relevance(
            sentences(), target=(2, 1), keep_calls=True
        )
        matrix = relevance.matrix("input_ids", "input_ids")
        assert (matrix - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert len(relevance.calls) == len(maps) == 2
        for call, averaged in zip(relevance.calls, maps, strict=True):
            assert averaged.abs().max() > 1e-4
            assert (call.map - averaged).abs().max() <= 1e-12 * averaged.abs().max()
            assert call.per_head.shape == (3, 2, 6, 6)
            assert (call.per_head.mean(1) - call.map).abs().max() <= 1e-12
            assert (call.per_head >= 0).all()


def test_relevance_agrees_with_attribute(of_pictures):
    matrix = of_pictures.matrix("x", "x")
    ours = GenericAttention(tiny_vit()).attribute(pictures(), [1, 3], return_input_shape=False)
    assert (ours.flatten(1) - matrix[:, 0, 1:]).abs().max() <= 1e-12 * ours.abs().max()


def test_streams_that_never_meet(of_pairs):
    for query, key, shape in (("pixels", "input_ids", (17, 6)), ("input_ids", "pixels", (6, 17))):
        matrix = of_pairs.matrix(query, key)
        assert matrix.shape == (3, *shape)
        assert not matrix.any()


@pytest.mark.parametrize("query", ["x", "cls_token"])
@pytest.mark.parametrize("key", ["x", "cls_token"])
def test_matrix_of_parts(of_pictures, query, key):
    """A stream's name is the whole stream, also where a part of it has the same name."""
    cut = {"x": slice(None), "cls_token": slice(0, 1)}
    whole = of_pictures.matrix("x", "x")
    assert torch.equal(of_pictures.matrix(query, key), whole[:, cut[query], cut[key]])


@pytest.mark.parametrize("names", [("y", "x"), ("x", "y"), ("X", "x")])
def test_unknown_names_list_the_known(of_pictures, names):
    with pytest.raises(KeyError) as caught:
        of_pictures.matrix(*names)
    message = str(caught.value)
    assert "cls_token" in message
    assert re.search(r"\bx\b", message.split(":", 1)[1])
    assert (names[0] if names[0] != "x" else names[1]) in message


def test_rows(of_pictures, of_pairs):
    assert of_pictures.rows["x"].tolist() == [[1.0] + [0.0] * 16] * 2
    assert set(of_pairs.rows) == {"pixels", "input_ids"}
    for name, rows in of_pairs.rows.items():
        assert rows.shape == (3, of_pairs.streams[name].tokens)
        assert rows.sum(1).tolist() == [1.0, 1.0, 1.0]
        assert rows[:, 0].tolist() == [1.0, 1.0, 1.0]


def test_rows_of_mean_pooling_are_equal_and_sum_to_one():
    model = tiny_vit(global_pool="avg", class_token=False)
    relevance = GenericAttention(model).relevance(pictures(), target=1)
    rows = relevance.rows["x"]
    assert relevance.streams["x"].tokens == 16
    assert (rows - 1 / 16).abs().max() <= 1e-12
    assert (rows.sum(1) - 1).abs().max() <= 1e-12
    # Several rows: their mean, without the identity.
    expected = (relevance.matrix("x", "x") - eye(2, 16)).mean(1)
    ours = GenericAttention(model).attribute(pictures(), 1, return_input_shape=False)
    assert (ours.flatten(1) - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_rows_per_example():
    target = [(0, 1), (4, 0), (5, 3)]
    relevance = GenericAttention(tiny_text("tokens")).relevance(sentences(), target=target)
    expected = torch.eye(6, dtype=torch.float64)[[0, 4, 5]]
    assert torch.equal(relevance.rows["input_ids"].double(), expected)


def test_calls(of_pictures, of_pairs):
    assert [call.index for call in of_pictures.calls] == [0, 1]
    for index, call in enumerate(of_pictures.calls):
        assert call.module == f"blocks.{index}.attn"
        assert (call.query_stream, call.key_stream) == ("x", "x")
        assert call.heads == 2
        assert call.used is True
        assert not call.reason
        assert torch.equal(torch.as_tensor(call.query_tokens).flatten()[-17:], torch.arange(17))
        assert torch.equal(torch.as_tensor(call.key_tokens).flatten()[-17:], torch.arange(17))
        assert call.map.shape == (2, 17, 17)
        assert call.per_head.shape == (2, 2, 17, 17)
    pairs = [(call.query_stream, call.key_stream) for call in of_pairs.calls]
    assert pairs == [("pixels", "pixels")] * 2 + [("input_ids", "input_ids")] * 3
    assert [call.index for call in of_pairs.calls] == [0, 1, 2, 3, 4]
    assert of_pairs.calls[0].module == "vision.blocks.0.attn"
    assert of_pairs.calls[-1].module == "text.blocks.2"


def test_calls_without_their_maps():
    relevance = GenericAttention(tiny_vit()).relevance(pictures(), target=1)
    assert len(relevance.calls) == 2
    for call in relevance.calls:
        assert getattr(call, "map", None) is None
        assert getattr(call, "per_head", None) is None


def test_calls_left_out_say_why():
    relevance = GenericAttention(tiny_vit(depth=3), start_layer=-1).relevance(pictures(), 1)
    assert [call.used for call in relevance.calls] == [False, False, True]
    assert all("start_layer" in call.reason for call in relevance.calls[:2])
    relevance = GenericAttention(tiny_vit(depth=3), layers=["blocks.1"]).relevance(pictures(), 1)
    assert [call.used for call in relevance.calls] == [False, True, False]
    assert "layers" in relevance.calls[0].reason
    assert "layers" in relevance.calls[2].reason


def test_calls_that_the_score_does_not_reach():
    vit, other = tiny_vit(), tiny_vit(seed=4)

    def forward(x):
        other(x)
        return vit(x)

    relevance = GenericAttention(forward).relevance(pictures(), target=1)
    used = [call.used for call in relevance.calls]
    assert used == [False, False, True, True]
    assert all(call.reason for call in relevance.calls[:2])
    # Two streams from one argument: the second is told apart by the module that it runs in.
    assert set(relevance.streams) == {"x", "x@vit"}
    expected = GenericAttention(vit).relevance(pictures(), target=1).matrix("x", "x")
    assert torch.equal(relevance.matrix("x@vit", "x@vit"), expected)
    assert torch.equal(relevance.matrix("x", "x"), eye(2, 17))
    assert set(relevance.rows) == {"x@vit"}
    ours = GenericAttention(forward).attribute(pictures(), 1)
    assert torch.equal(ours, GenericAttention(vit).attribute(pictures(), 1))


def test_it_is_frozen(of_pictures):
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        of_pictures.rows = {}
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        of_pictures.calls[0].used = False
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        of_pictures.streams["x"].tokens = 3
    with pytest.raises(TypeError):
        of_pictures.streams["y"] = of_pictures.streams["x"]
    with pytest.raises(TypeError):
        of_pictures.rows["y"] = of_pictures.rows["x"]
    with pytest.raises(TypeError):
        of_pictures.streams["x"].parts["y"] = slice(0, 1)
    assert isinstance(of_pictures.calls, tuple)


def test_it_holds_plain_tensors(of_pairs):
    tensors = [of_pairs.matrix(a, b) for a in of_pairs.streams for b in of_pairs.streams]
    tensors += list(of_pairs.rows.values())
    tensors += [call.map for call in of_pairs.calls] + [call.per_head for call in of_pairs.calls]
    assert all(not tensor.requires_grad and tensor.grad_fn is None for tensor in tensors)


def test_a_matrix_is_the_caller_s_own(of_pictures):
    before = of_pictures.matrix("x", "x").clone()
    of_pictures.matrix("x", "x").zero_()
    assert torch.equal(of_pictures.matrix("x", "x"), before)


def test_repr_says_what_there_is(of_pictures, of_pairs):
    for relevance in (of_pictures, of_pairs):
        text = repr(relevance)
        assert text.startswith("Relevance")
        for name, stream in relevance.streams.items():
            assert name in text
            assert str(stream.tokens) in text
        assert str(len(relevance.calls)) in text
        assert "tensor(" not in text
        assert len(text) < 1000


def same(ours: Relevance, theirs: Relevance) -> None:
    assert dict(ours.streams) == dict(theirs.streams)
    for query in theirs.streams:
        for key in theirs.streams:
            one, other = ours.matrix(query, key), theirs.matrix(query, key)
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert set(ours.rows) == set(theirs.rows)
    assert all(torch.equal(ours.rows[name], theirs.rows[name]) for name in theirs.rows)
    assert len(ours.calls) == len(theirs.calls)
    for one, other in zip(ours.calls, theirs.calls, strict=True):
        for field in dataclasses.fields(other):
            mine, its = getattr(one, field.name), getattr(other, field.name)
            if isinstance(its, torch.Tensor):
                assert torch.equal(mine, its)
                assert mine.dtype == its.dtype
            else:
                assert mine == its
                assert type(mine) is type(its)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("keep_calls", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_save_and_load(tmp_path, keep_calls, dtype):
    relevance = GenericAttention(tiny_vit(dtype=dtype, depth=3), start_layer=1).relevance(
        pictures(dtype=dtype), target=1, keep_calls=keep_calls
    )
    path = tmp_path / "one.safetensors"
    relevance.save(path)
    loaded = Relevance.load(path)
    assert isinstance(loaded, Relevance)
    same(loaded, relevance)
    assert loaded.matrix("cls_token", "x").shape == (2, 1, 17)
    assert (loaded.calls[1].map is not None) == keep_calls


def test_save_and_load_several_streams(tmp_path, of_pairs):
    path = str(tmp_path / "pairs.safetensors")
    of_pairs.save(path)
    same(Relevance.load(path), of_pairs)
    # There and back again: the file of the loaded one is the same, byte for byte.
    again = tmp_path / "again.safetensors"
    Relevance.load(path).save(again)
    assert Path(path).read_bytes() == again.read_bytes()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])  # noqa: S301
def test_copies_and_pickles(copied, of_pairs):
    ours = copied(of_pairs)
    same(ours, of_pairs)
    with pytest.raises(TypeError):
        ours.streams["new"] = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.rows = {}


def test_the_file_is_safetensors(tmp_path, of_pairs):
    from safetensors import safe_open

    of_pairs.save(tmp_path / "pairs.safetensors")
    with safe_open(str(tmp_path / "pairs.safetensors"), "pt") as file:
        shapes = [tuple(file.get_tensor(key).shape) for key in file.keys()]  # noqa: SIM118
    assert (3, 17, 17) in shapes
    assert (3, 6, 6) in shapes


def test_load_refuses_what_it_did_not_write(tmp_path):
    from safetensors.torch import save_file

    save_file({"something": torch.zeros(3)}, str(tmp_path / "else.safetensors"))
    with pytest.raises(ValueError, match=r"else\.safetensors"):
        Relevance.load(tmp_path / "else.safetensors")
    (tmp_path / "text.safetensors").write_text("not a tensor file at all")
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        Relevance.load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="missing"):
        Relevance.load(tmp_path / "missing.safetensors")
