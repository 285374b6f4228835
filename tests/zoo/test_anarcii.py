"""A trained encoder-decoder of `nn.MultiheadAttention`: ANARCII, which numbers antibodies.

Needs `pip install --no-deps anarcii` (BSD-3); only its model is imported, as the package itself
brings in much more.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from captum_generic_attn import GenericAttention
from zoo.laws import assert_same

FOUND = importlib.util.find_spec("anarcii")
pytestmark = [
    pytest.mark.skipif(FOUND is None, reason="needs anarcii: pip install --no-deps anarcii"),
    pytest.mark.slow,
    pytest.mark.ci_sample,
]
TARGET = (5, 40)


@pytest.fixture(scope="module")
def anarcii():
    """The antibody model, float64: sequences and numbers so far to logits `[B, n, 136]`."""
    assert FOUND is not None
    assert FOUND.submodule_search_locations is not None
    root = Path(FOUND.submodule_search_locations[0])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("anarcii", "anarcii.inference"):
            module = ModuleType(name)
            module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            patch.setitem(sys.modules, name, module)
        library = importlib.import_module("anarcii.inference.model")
    sizes = json.loads((root / "models/antibody/antibody_4_2_128_512.json").read_text())
    layers = sizes["HID_DIM"], sizes["LAYERS"], sizes["HEADS"], 512, 0.0, torch.device("cpu")
    encoder = library.Encoder(sizes["INPUT_DIM"], *layers)
    decoder = library.Decoder(sizes["OUTPUT_DIM"], *layers)
    model = library.S2S(encoder, decoder, 0, 0, torch.device("cpu"))
    weights = root / "models/antibody/antibody_4_2_128_512.pt"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model = model.double().eval()
    for part in (model.encoder, model.decoder):
        part.scale = part.scale.double()

    def forward(src: Tensor, trg: Tensor) -> Tensor:
        return model(src, trg)[0]

    return model, forward


def residues() -> tuple[Tensor, Tensor]:
    """Two sequences, the second one padded, and numbers so far."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(4, 24, (2, 30), generator=generator)
    source[1, 25:] = 0
    return source, torch.randint(4, 130, (2, 8), generator=generator)


def test_both_inputs_and_both_streams(anarcii) -> None:
    model, forward = anarcii
    assert isinstance(model, nn.Module)
    source, numbers = residues()
    of_source, of_numbers = GenericAttention(forward).attribute((source, numbers), TARGET)
    assert of_source.shape == source.shape
    assert of_numbers.shape == numbers.shape
    assert (of_source[0] > 0).all()
    assert not of_source[1, 25:].any(), "padding is attended to by none"
    assert not of_numbers[:, TARGET[0] :].any(), "numbers to come are masked; its own entry is 0"
    assert (of_numbers[:, : TARGET[0]] > 0).any(1).all()
    relevance = GenericAttention(forward).relevance((source, numbers), TARGET)
    assert {name: s.tokens for name, s in relevance.streams.items()} == {"src": 30, "trg": 8}
    pairs = [(call.query_stream, call.key_stream) for call in relevance.calls]
    layer = [("trg", "trg"), ("trg", "src")]
    assert pairs == [("src", "src")] * 2 + layer * 2
    assert relevance.rows["trg"].argmax(1).tolist() == [TARGET[0]] * 2
    assert relevance.matrix("src", "trg").abs().max() == 0


def test_a_batch_equals_its_examples(anarcii) -> None:
    _, forward = anarcii
    source, numbers = residues()
    method = GenericAttention(forward)
    together = method.attribute((source, numbers), TARGET)
    for i in range(2):
        alone = method.attribute((source[i : i + 1], numbers[i : i + 1]), TARGET)
        for ours, theirs in zip(together, alone, strict=True):
            assert_same(ours[i : i + 1], theirs)
