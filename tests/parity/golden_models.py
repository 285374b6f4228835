"""The golden models and arrays of `tests/parity/golden/`, as public classes and tensors.

Called by the parity tests and by the tests of the result object.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


@lru_cache
def manifest(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "manifest.json").read_text())


@lru_cache
def _arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "golden.npz") as archive:
        return {key: archive[key] for key in archive.files}


def golden(name: str, key: str) -> Tensor:
    """Return one golden array; floating arrays as float64."""
    array = torch.from_numpy(_arrays(name)[key].copy())
    return array.double() if array.is_floating_point() else array


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max|ours - theirs| / max|theirs|, the distance in which the tolerances are stated."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    assert theirs.abs().max() > 0, "a golden array without any value proves nothing"
    return ((ours.double() - theirs.double()).abs().max() / theirs.abs().max()).item()


def _weights(name: str) -> dict[str, Tensor]:
    state = load_file(GOLDEN / name / "weights.safetensors")
    return {key: value.double() for key, value in state.items()}


def vit(fused: bool = True) -> nn.Module:
    """A vision transformer of timm with fused (its default) or eager attention, float64."""
    import timm.layers
    from timm.models.vision_transformer import VisionTransformer

    before = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(fused)
    try:
        model = VisionTransformer(**manifest("vit")["public_model"]["constructor"])
    finally:
        timm.layers.set_fused_attn(bool(before))
    assert all(block.attn.fused_attn == fused for block in model.blocks)
    model.double().load_state_dict(_weights("vit"), strict=True)
    return model.eval()


def bert(implementation: str) -> nn.Module:
    """Hugging Face's BERT classifier with `"sdpa"` or `"eager"` attention, float64."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        **manifest("bert")["public_model"]["config"], attn_implementation=implementation
    )
    model = transformers.BertForSequenceClassification(config).double()
    missing, unexpected = model.load_state_dict(_weights("bert"), strict=False)
    assert not unexpected
    assert not missing
    return model.eval()


def open_clip() -> nn.Module:
    """open_clip's CLIP, float64."""
    library = pytest.importorskip("open_clip.model")
    (entry,) = (m for m in manifest("clip")["public_model"] if m["cls"] == "open_clip.model.CLIP")
    arguments = dict(entry["constructor"])
    model = library.CLIP(
        arguments.pop("embed_dim"),
        library.CLIPVisionCfg(**arguments.pop("vision_cfg")),
        library.CLIPTextCfg(**arguments.pop("text_cfg")),
        **arguments,
    ).double()
    missing, unexpected = model.load_state_dict(_weights("clip"), strict=False)
    assert not missing
    assert not unexpected
    return model.eval()


def hf_clip(implementation: str) -> nn.Module:
    """Hugging Face's CLIP with `"sdpa"` or `"eager"` attention, float64."""
    transformers = pytest.importorskip("transformers")
    (entry,) = (m for m in manifest("clip")["public_model"] if m["cls"].startswith("transformers"))
    config = transformers.CLIPConfig(**entry["config"], attn_implementation=implementation)
    model = transformers.CLIPModel(config).double()
    state = _hugging_face_names(_weights("clip"))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    return model.eval()


_RENAMED = {
    "resblocks.": "layers.",
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    "visual.transformer.": "vision_model.encoder.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "transformer.": "text_model.encoder.",
}


def _hugging_face_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the first release's keys and split its joint q/k/v projections."""
    renamed = {}
    for key, value in state.items():
        if key == "visual.proj":
            renamed["visual_projection.weight"] = value.T.contiguous()
            continue
        if key == "text_projection":
            renamed["text_projection.weight"] = value.T.contiguous()
            continue
        for old, new in _RENAMED.items():
            # Prefixes of the text tower are parts of the visual tower's own names.
            if old in key if old.startswith((".", "resblocks")) else key.startswith(old):
                key = key.replace(old, new, 1)
        if ".in_proj_" in key:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace("in_proj_", f"{part}_proj.")] = chunk
        else:
            renamed[key] = value
    return renamed
