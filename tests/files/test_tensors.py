"""Saved results that anyone may have written: a result, or a ValueError that says why not."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers.saved_mutations import joined, parts, with_metadata
from helpers.tiny_models import pictures, sentences, two_towers

from captum_generic_attn import Comparison, GenericAttention, Relevance
from captum_generic_attn.errors import UnavailableWeightsError
from captum_generic_attn.files import tensors as saved
from captum_generic_attn.models.checkpoints import read_state

KINDS = {"relevance": Relevance, "comparison": Comparison}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    relevance = GenericAttention(two_towers()).relevance(
        (pictures(2), sentences(2)), keep_calls=True
    )
    relevance.save(folder / "relevance")
    maps = torch.rand(2, 3, 4, 4), torch.rand(2, 5)
    found = {"pairs": maps, "alone": maps[0], "half": maps[1].half(), "none": ()}
    Comparison(found, {"pairs": 0.5}, {"LRP": "it has no rule"}, {"seed": "0"}).save(
        folder / "comparison"
    )
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_damaged_files_are_refused_or_read_in_bounded_memory(folder):
    """600 damaged files, and the largest headers that are read in the forms that grow most."""
    paths = os.pathsep.join([str(Path(saved.__file__).parents[2]), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", "from helpers import saved_mutations; saved_mutations.run(300)"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    read = json.loads(done.stdout)
    assert {name: sum(counts.values()) for name, counts in read.items()} == {
        "relevance": 300, "comparison": 300, "large": 5,
    }  # fmt: skip
    assert read["large"] == {"refused": 5}
    # Bits of the values alone, or the names of calls and methods, make other results.
    assert 20 < read["relevance"]["read"] < 100
    assert 20 < read["comparison"]["read"] < 100


def damaged(folder: Path, entry: str, *place: object, value: object) -> Path:
    """A saved file with another value at a place of its metadata."""
    data = (folder / entry).read_bytes()
    whole = json.loads(parts(data)[0]["__metadata__"][entry])
    holder = whole
    for key in place[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    path = folder / "damaged.safetensors"
    path.write_bytes(with_metadata(data, entry, json.dumps(whole)))
    return path


def refused(entry: str, path: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(str(path))) as found:
        KINDS[entry].load(path)
    assert type(found.value) is ValueError
    for word in words:
        assert word in str(found.value)


S, C = ("content", "streams"), ("content", "calls", 0)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("version",), ..., ["version of the format, 1"]),
        (("version",), "1", ["relevance.version is '1'", "a whole number of at least 1"]),
        (("version",), 0, ["relevance.version is 0"]),
        (("version",), 2, ["version 2 of the format", "reads up to 1", "or a newer one"]),
        (("version",), 10**400, ["of the format", "reads up to 1"]),
        (("content",), [], ["relevance.content is []", "expected an object"]),
        (("content", "rows"), ..., ["an object of examples, streams, matrices, rows, calls"]),
        (("content", "examples"), 3, ["has shape [2, ", "expected [3, "]),
        (("content", "examples"), True, ["relevance.content.examples is True", "whole number"]),
        (S, {}, ["relevance.content.streams is {}", "at least one stream"]),
        ((*S, "pixels", "tokens"), 16, ["streams.pixels.parts.pixels.1 is 17", "from 0 to 16"]),
        ((*S, "pixels", "tokens"), 18, ["streams.pixels.parts is", "parts of all 18 tokens"]),
        ((*S, "pixels", "tokens"), 10**12, ["parts of all 1000000000000 tokens"]),
        ((*S, "pixels", "columns"), 9, ["has shape [2, 17, 17]", "expected [2, 17, 9]"]),
        ((*S, "pixels", "columns"), 18, ["from 1 to 17"]),
        ((*S, "pixels", "parts", "pixels"), [-16, 17], ["is -16", "from 0 to 17"]),
        ((*S, "pixels", "parts", "pixels"), [2, 17], ["is [2, 17]", "1, and a greater one"]),
        ((*S, "pixels", "parts", "pixels"), [1, 17, 1], ["is [1, 17, 1]"]),
        ((*S, "\ud800"), {}, ["without halves of surrogate pairs"]),
        (("content", "matrices"), [["pixels", "pixels"]], ["each stream with itself"]),
        (("content", "matrices", 0), ["pixels"], ["pairs of streams"]),
        (("content", "matrices", 0, 0), "sound", ["is 'sound'", "'pixels'"]),
        (("content", "rows"), ["pixels"], ["tensors of unknown names", "input_ids"]),
        (("content", "rows", 0), {}, ["rows.0 is {}", "expected text"]),
        ((*C, "index"), 99, ['no tensor ["call", 99, "query_tokens"]']),
        ((*C, "index"), -1, ["calls.0.index is -1"]),
        ((*C, "used"), 1, ["calls.0.used is 1", "true or false"]),
        ((*C, "reason"), "why", ["calls.0.reason is 'why'", "no text where it is"]),
        ((*C, "query_stream"), "", ["calls.0.query_stream is ''"]),
        ((*C, "key_stream"), "pixels+sound", ["calls.0.key_stream is 'pixels+sound'"]),
        ((*C, "heads"), 10**9, ["has shape [2, ", "expected [2, 1000000000, "]),
        ((*C, "shape"), [2, 17], ["the numbers of groups, queries and keys"]),
        ((*C, "shape", 1), 0, ["expected [2, 0]"]),
        ((*C, "maps"), ["map", "other"], ["is 'other'", "per_head"]),
        ((*C, "maps"), ["map"], ["unknown names", "per_head"]),
        ((*C, "extra"), 1, ["an object of index, module"]),
    ],
)  # fmt: skip
def test_metadata_of_relevance(folder, place, value, words):
    refused("relevance", damaged(folder, "relevance", *place, value=value), *words)


def test_calls_come_in_their_order(folder):
    data = (folder / "relevance").read_bytes()
    calls = json.loads(parts(data)[0]["__metadata__"]["relevance"])["content"]["calls"]
    for other in (calls[::-1], [calls[0], *calls]):
        path = damaged(folder, "relevance", "content", "calls", value=other)
        refused("relevance", path, "calls is [", "in the order of their indices")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("version",), 7, ["version 7 of the format"]),
        (("content", "inputs", "pairs"), 1, ["unknown names", "pairs"]),
        (("content", "inputs", "pairs"), 10**18, ['no tensor ["attribution", "pairs", 2]']),
        (("content", "inputs", "pairs"), "2", ["inputs.pairs is '2'"]),
        (("content", "inputs", "pairs"), ..., ["seconds", "'alone'"]),
        (("content", "seconds", "pairs"), -1.0, ["seconds.pairs is -1.0", "number of seconds"]),
        (("content", "seconds", "pairs"), float("nan"), ["seconds.pairs is nan"]),
        (("content", "seconds", "pairs"), float("inf"), ["seconds.pairs is inf"]),
        (("content", "seconds", "pairs"), True, ["seconds.pairs is True"]),
        (("content", "seconds", "other"), 1.0, ["seconds of ['pairs', 'alone', 'half', 'none']"]),
        (("content", "refused", "LRP"), None, ["refused.LRP is None", "expected text"]),
        (("content", "settings"), [], ["settings is []", "expected an object"]),
    ],
)
def test_metadata_of_a_comparison(folder, place, value, words):
    refused("comparison", damaged(folder, "comparison", *place, value=value), *words)


@pytest.mark.parametrize("entry", KINDS)
def test_what_is_no_file_of_the_format(folder, tmp_path, entry):
    path = tmp_path / "one"
    for data, words in {
        b"": ["deserializing header"],
        b"abc": ["deserializing header"],
        b"a text that is no tensor file": ["announce a header of", str(saved.HEADER_LIMIT)],
        joined({}, b""): ["its metadata has []", repr(entry)],
        joined({"__metadata__": {entry: "[" * 200_000}}, b""): ["nested too deeply"],
        joined({"__metadata__": {entry: "9" * 5000}}, b""): ["no JSON that can be read"],
        joined({"__metadata__": {entry: '{"a": 1, "a": 2}'}}, b""): ["two entries of one name"],
        joined({"__metadata__": {entry: "{}"}}, b""): ["version of the format"],
    }.items():
        path.write_bytes(data)
        refused(entry, path, *words)
    refused(entry, tmp_path, "no file but a folder")
    refused(entry, folder / next(k for k in KINDS if k != entry), repr(entry))
    with pytest.raises(FileNotFoundError, match="missing"):
        KINDS[entry].load(tmp_path / "missing")


def changed_tensor(folder: Path, entry: str, name: str, **parts_of: object) -> Path:
    header, values = parts((folder / entry).read_bytes())
    header[name] |= parts_of
    path = folder / "damaged.safetensors"
    path.write_bytes(joined(header, values))
    return path


def test_tensors_of_other_shapes_and_types(folder):
    rows, tokens = '["rows", "pixels"]', '["call", 0, "query_tokens"]'
    shape = parts((folder / "relevance").read_bytes())[0][rows]["shape"]
    path = changed_tensor(folder, "relevance", rows, shape=shape[::-1])
    refused("relevance", path, '["rows", "pixels"] has shape [17, 2]; expected [2, 17]')
    path = changed_tensor(folder, "relevance", tokens, dtype="F64")
    refused("relevance", path, "query_tokens", "has type F64; expected one of I64")
    kind = parts((folder / "relevance").read_bytes())[0][rows]["dtype"]
    path = changed_tensor(folder, "relevance", rows, dtype={"F64": "I64", "F32": "I32"}[kind])
    refused("relevance", path, "expected one of F32, F64")
    path = changed_tensor(folder, "comparison", '["attribution", "half", 0]', dtype="I16")
    assert Comparison.load(path)["half"].dtype == torch.int16  # methods may return what they want
    path = changed_tensor(folder, "comparison", '["attribution", "half", 0]', dtype="U16")
    refused("comparison", path, "has type U16")


def test_axes_that_no_bytes_bound(folder, tmp_path):
    """Safetensors allows [0, 2 ** 63]: of it nothing is stored, and PyTorch overflows."""
    none = {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}
    plain = {"inputs": {"a": None}, "seconds": {}, "refused": {}, "settings": {}}
    text = json.dumps({"version": 1, "content": plain})
    path = tmp_path / "one"
    path.write_bytes(
        joined({"__metadata__": {"comparison": text}, '["attribution", "a", 0]': none}, b"")
    )
    refused("comparison", path, "[0, 9223372036854775808]", "no axis longer than the file")


def test_tokens_are_those_of_their_streams(folder, tmp_path):
    relevance = Relevance.load(folder / "relevance")
    call = relevance.calls[0]
    size = relevance.streams[call.query_stream].tokens
    for position in (size, -2):
        call.query_tokens[0, 0] = position
        relevance.save(tmp_path / "one")
        refused(
            "relevance",
            tmp_path / "one",
            '["call", 0, "query_tokens"] has positions',
            f"{size} tokens, or -1",
        )
    call.query_tokens[0, 0] = -1  # padding
    relevance.save(tmp_path / "one")
    assert torch.equal(Relevance.load(tmp_path / "one").calls[0].query_tokens, call.query_tokens)


def test_methods_that_were_not_timed(folder):
    found = Comparison.load(folder / "comparison")
    assert found["none"] == ()
    assert repr(found).splitlines()[1:] == [
        "  pairs  0.5 s", "  alone  not timed", "  half   not timed", "  none   not timed",
        "  LRP    refused: it has no rule",
    ]  # fmt: skip


def test_what_would_not_be_read_again_is_not_written(tmp_path):
    names = {("x", "n" * 2000, i): torch.zeros(0) for i in range(saved.HEADER_LIMIT // 2000)}
    with pytest.raises(
        ValueError, match=f"is not written: names and shapes of {len(names)} tensors"
    ):
        saved.write(tmp_path / "one", "comparison", {}, names)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("form", ["safetensors", "zip", "pickle"])
def test_damaged_weights_are_refused_or_read(tmp_path, form):
    """Files of weights that users name are read, or refused by name, as whatever they come."""
    state = torch.nn.Linear(4, 3).state_dict()
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    read = 0
    for seed in range(150):
        draw = random.Random(seed)
        changed = bytearray(data[: draw.randrange(len(data))] if seed % 4 == 0 else data)
        for _ in range(draw.choice([1, 2, 5, 20]) if seed % 4 else 0):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            found = read_state(path)
        except UnavailableWeightsError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert all(isinstance(value, torch.Tensor) for value in found.values())
            read += 1
    assert 0 < read < 75


def test_weights_without_names_are_refused(tmp_path):
    torch.save({0: torch.ones(1)}, tmp_path / "numbered.pth")
    with pytest.raises(UnavailableWeightsError, match=r"numbered\.pth' holds no state dict"):
        read_state(tmp_path / "numbered.pth")
