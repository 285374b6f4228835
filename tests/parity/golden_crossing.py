"""The golden models whose streams attend to each other: LXMERT, DETR, and VisualBERT beside them.

Called by `test_parity_crossing.py`. DETR comes twice: as Hugging Face has it, and as its authors
built it from `nn.MultiheadAttention`, written anew here with the names of their weights.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from parity.golden_models import GOLDEN, golden, manifest

Forward = Callable[..., Tensor]


def _weights(name: str, file: str = "weights.safetensors") -> dict[str, Tensor]:
    return {key: value.double() for key, value in load_file(GOLDEN / name / file).items()}


# --- LXMERT and VisualBERT


def lxmert(name: str) -> nn.Module:
    """Hugging Face's LXMERT for questions, which knows eager attention alone, float64."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LxmertConfig(**manifest(name)["public_model"]["config"])
    model = transformers.LxmertForQuestionAnswering(config).double()
    model.load_state_dict(_weights(name), strict=True)
    return model.eval()


def lxmert_forward(model: nn.Module) -> Forward:
    """The answers' scores of text, region features and boxes."""

    def forward(input_ids: Tensor, visual_feats: Tensor, visual_pos: Tensor) -> Tensor:
        output = model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            visual_feats=visual_feats,
            visual_pos=visual_pos,
            token_type_ids=torch.zeros_like(input_ids),
        )
        return output.question_answering_score

    return forward


def lxmert_inputs(name: str, example: str) -> tuple[Tensor, Tensor, Tensor]:
    keys = manifest(name)["inputs"][example]
    ids, features, boxes = (golden(name, key) for key in keys.values())
    return ids, features, boxes


def visualbert() -> nn.Module:
    """Hugging Face's VisualBERT with the head that the authors' framework gives it, float64."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("transformers.models.visual_bert.modeling_visual_bert")
    config = transformers.VisualBertConfig(**manifest("visualbert")["public_model"]["config"])
    model = transformers.VisualBertForQuestionAnswering(config)
    model.cls = nn.Sequential(
        library.VisualBertPredictionHeadTransform(config),
        nn.Linear(config.hidden_size, config.num_labels),
    )
    model = model.double()
    state = _weights("visualbert", "weights_hf.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [key for key in missing if "position_ids" not in key]
    return model.eval()


def visualbert_forward(model: nn.Module) -> Forward:
    """The answers' scores of text and region features; the mask is an additional argument."""

    def forward(input_ids: Tensor, visual_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            visual_embeds=visual_embeds,
            visual_attention_mask=torch.ones(visual_embeds.shape[:2]),
            visual_token_type_ids=torch.zeros(visual_embeds.shape[:2], dtype=torch.long),
            token_type_ids=torch.zeros_like(input_ids),
        ).logits

    return forward


# --- DETR


class _Features(nn.Module):
    """Stands where Hugging Face's DETR has its backbone: features come in, features go out."""

    def forward(self, features: Tensor, _mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(features, torch.ones(len(features), *features.shape[2:], dtype=torch.bool))]


def hf_detr(name: str, implementation: str = "eager") -> Forward:
    """Hugging Face's DETR behind its backbone, float64: features to logits `[B, Q, C]`."""
    transformers = pytest.importorskip("transformers")
    entry = next(m for m in manifest(name)["public_model"] if m["library"].startswith("trans"))
    channels = manifest(name)["config"]["backbone_channels"]
    backbone = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, channels], depths=[1, 1], layer_type="basic",
        out_features=["stage2"],
    )  # fmt: skip
    config = transformers.DetrConfig(
        **entry["config"], use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone,
    )  # fmt: skip
    model = transformers.DetrForObjectDetection(config).double()
    model.model.encoder.config._attn_implementation = implementation  # its backbone has no "sdpa"
    state = _weights(name, "weights_hf.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("model.backbone.") for key in missing)
    model.model.backbone = _Features()
    model.eval()

    def forward(features: Tensor) -> Tensor:
        return model(pixel_values=features).logits

    return forward


class _Layer(nn.Module):
    """An encoder's layer, or with `crosses` a decoder's."""

    def __init__(self, width: int, heads: int, hidden: int, *, crosses: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads)
        if crosses:
            self.multihead_attn = nn.MultiheadAttention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if crosses:
            self.norm3 = nn.LayerNorm(width)

    def encode(self, x: Tensor, place: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x + place, x + place, x)[0])
        return self.norm2(x + self._feed(x))

    def decode(self, x: Tensor, memory: Tensor, place: Tensor, query: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x + query, x + query, x)[0])
        x = self.norm2(x + self.multihead_attn(x + query, memory + place, memory)[0])
        return self.norm3(x + self._feed(x))

    def _feed(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))


class Detr(nn.Module):
    """DETR behind its backbone, of `nn.MultiheadAttention`, sequence first."""

    def __init__(self, config: dict[str, int], place: Tensor) -> None:
        super().__init__()
        width, heads, hidden = config["d_model"], config["nhead"], config["dim_feedforward"]
        self.register_buffer("place", place, persistent=False)
        self.input_proj = nn.Conv2d(config["backbone_channels"], width, 1)
        self.query_embed = nn.Embedding(config["num_queries"], width)
        self.class_embed = nn.Linear(width, config["num_classes"] + 1)
        self.encoder = nn.ModuleList(
            _Layer(width, heads, hidden, crosses=False) for _ in range(config["num_encoder_layers"])
        )
        self.decoder = nn.ModuleList(
            _Layer(width, heads, hidden, crosses=True) for _ in range(config["num_decoder_layers"])
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        x = self.input_proj(features).flatten(2).permute(2, 0, 1)
        place = self.place.flatten(2).permute(2, 0, 1)
        for layer in self.encoder:
            x = layer.encode(x, place)
        query = self.query_embed.weight.unsqueeze(1).repeat(1, len(features), 1)
        found = torch.zeros_like(query)
        for layer in self.decoder:
            found = layer.decode(found, x, place, query)
        return self.class_embed(self.norm(found)).transpose(0, 1)


def detr(name: str) -> Detr:
    """DETR of `nn.MultiheadAttention` with the golden weights, float64."""
    model = Detr(manifest(name)["config"], golden(name, "input.pos")).double()
    state = {
        key.replace("transformer.", "").replace("coder.layers.", "coder.").replace(
            "decoder.norm.", "norm."
        ): value
        for key, value in _weights(name).items()
        if not key.startswith("bbox_embed.")
    }  # fmt: skip
    model.load_state_dict(state, strict=True)
    return model.eval()
