"""torchvision, torch.nn and open_clip: all transformers for pictures and videos, all of torch.nn's
attention, and a model of each family of open_clip, built small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import MaxVit, SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.video import MViT, SwinTransformer3d
from torchvision.models.video.mvit import MSBlockConfig

from zoo.models import Built, Entry, ids, pictures


def _video(frames: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, frames, size, size, generator=generator)


def _vit() -> Built:
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    return Built(model.eval(), (pictures(32),))


def _swin(**options: Any) -> Built:
    model = SwinTransformer(
        [4, 4], 12, [2, 2], [1, 2], [4, 4], num_classes=5, stochastic_depth_prob=0.0, **options
    )
    return Built(model.eval(), (pictures(48),))


def _maxvit() -> Built:
    model = MaxVit(
        input_size=(64, 64), stem_channels=8, partition_size=4, block_channels=[8, 16],
        block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=5,
    )  # fmt: skip
    return Built(model.eval(), (pictures(64),))


def _swin3d() -> Built:
    model = SwinTransformer3d(
        [2, 4, 4], 12, [2, 2], [1, 2], [2, 4, 4], num_classes=5, stochastic_depth_prob=0.0
    )
    return Built(model.eval(), (_video(8, 48),))


def _mvit(version: int) -> Built:
    block = partial(MSBlockConfig, kernel_q=[3, 3, 3], kernel_kv=[3, 3, 3])
    blocks = [
        block(
            num_heads=1, input_channels=16, output_channels=32, stride_q=[1, 1, 1],
            stride_kv=[1, 2, 2],
        ),
        block(
            num_heads=2, input_channels=32, output_channels=32, stride_q=[1, 2, 2],
            stride_kv=[1, 1, 1],
        ),
        block(
            num_heads=2, input_channels=32, output_channels=32, stride_q=[1, 1, 1],
            stride_kv=[1, 1, 1],
        ),
    ]  # fmt: skip
    options = dict(num_classes=5, stochastic_depth_prob=0.0, proj_after_attn=version == 2)
    kind = version == 2
    model = MViT(
        (32, 32), 4, blocks, residual_pool=kind, residual_with_cls_embed=not kind,
        rel_pos_embed=kind, **options,
    )  # fmt: skip
    return Built(model.eval(), (_video(),))


# --- torch.nn


class Around(nn.Module):
    """Embeddings before attention, and a head on the first token after it."""

    def __init__(self, module: nn.Module, run: Callable[..., Tensor], streams: int = 1) -> None:
        super().__init__()
        self.module, self.run = module, run
        self.embed = nn.ModuleList(nn.Linear(6, 16) for _ in range(streams))
        self.head = nn.Linear(16, 3)

    def forward(self, source: Tensor, target: Tensor | None = None) -> Tensor:
        given = [source] if target is None else [source, target]
        tokens = [embed(x) for embed, x in zip(self.embed, given, strict=True)]
        return self.head(self.run(self.module, *tokens)[:, 0])


def _torch(
    make: Callable[[], nn.Module], run: Callable[..., Tensor], streams: int = 1
) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(3)
        inputs = (torch.randn(2, 5, 6), torch.randn(2, 7, 6))[:streams]
        return Built(Around(make(), run, streams).eval(), inputs)

    return build


_CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)
_PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
_LAYER = dict(d_model=16, nhead=2, dim_feedforward=16, dropout=0.0, batch_first=True)


def _mha(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(16, 2, **{"batch_first": True} | options)


def _sequence_first(m: nn.Module, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return m(x, x, x)[0].transpose(0, 1)


_BOTH = ("source", "target")
_TORCH: list[tuple[str, Callable[[], Built], tuple[str, ...]]] = [
    ("MultiheadAttention", _torch(_mha, lambda m, x: m(x, x, x)[0]), ("source",)),
    (
        "MultiheadAttention, need_weights=False",
        _torch(_mha, lambda m, x: m(x, x, x, need_weights=False)[0]), ("source",),
    ),
    (
        "MultiheadAttention, key_padding_mask",
        _torch(_mha, lambda m, x: m(x, x, x, key_padding_mask=_PADDED)[0]), ("source",),
    ),
    (
        "MultiheadAttention, attn_mask",
        _torch(_mha, lambda m, x: m(x, x, x, attn_mask=_CAUSAL[:5, :5].T)[0]), ("source",),
    ),
    (
        "MultiheadAttention, sequence first",
        _torch(partial(_mha, batch_first=False), _sequence_first), ("source",),
    ),
    (
        "MultiheadAttention, add_bias_kv and add_zero_attn",
        _torch(
            partial(_mha, add_bias_kv=True, add_zero_attn=True), lambda m, x: m(x, x, x)[0]
        ), ("source",),
    ),
    (
        "MultiheadAttention, across",
        _torch(_mha, lambda m, x, y: m(y, x, x, need_weights=False)[0], 2), _BOTH,
    ),
    (
        "TransformerEncoder",
        _torch(
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER), 2),
            lambda m, x: m(x),
        ), ("source",),
    ),
    (
        "TransformerEncoder, padding",
        _torch(
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER, norm_first=True), 2),
            lambda m, x: m(x, src_key_padding_mask=_PADDED),
        ), ("source",),
    ),
    (
        "TransformerDecoder",
        _torch(
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**_LAYER), 2),
            lambda m, x, y: m(y, x), 2,
        ), _BOTH,
    ),
    (
        "Transformer, causal target",
        _torch(
            lambda: nn.Transformer(
                16, 2, 2, 2, dim_feedforward=16, dropout=0.0, batch_first=True
            ),
            lambda m, x, y: m(x, y, tgt_mask=_CAUSAL).flip(1), 2,
        ), _BOTH,
    ),
]  # fmt: skip


# --- open_clip

_TEXT = dict(context_length=8, vocab_size=60, width=16, heads=2, layers=2)
_VISION = dict(image_size=32, patch_size=8, width=16, head_width=8, layers=2)


class Pairs(nn.Module):
    """Each picture's score with its own text."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        images, texts = self.model.encode_image(image), self.model.encode_text(text)
        return (images * texts).sum(-1)


def _open_clip(kind: str) -> Built:
    import open_clip

    vision, text = dict(_VISION), dict(_TEXT)
    if kind == "attention pooling":
        vision |= dict(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)
    if kind == "text without causal mask":
        text |= dict(no_causal_mask=True, pool_type="last")
    if kind == "ResNet tower":
        vision |= dict(layers=[1, 1, 1, 1], width=8, patch_size=None, head_width=8, image_size=64)
    if kind == "timm tower":
        vision = dict(timm_model_name="test_vit", timm_pool="token", timm_proj="linear",
                      image_size=64)  # fmt: skip
    make = open_clip.model.CustomTextCLIP if kind in ("timm tower", "custom text") else (
        open_clip.model.CLIP
    )  # fmt: skip
    if kind == "CoCa":
        model: nn.Module = open_clip.coca_model.CoCa(
            16, open_clip.coca_model.MultimodalCfg(
                context_length=8, width=16, heads=2, layers=2, vocab_size=60
            ), text | dict(embed_cls=True, output_tokens=True), vision | dict(
                attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2,
                output_tokens=True,
            ),
        )  # fmt: skip
        for parameter in model.parameters():  # some are not initialised at all
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)
    else:
        model = make(16, vision, text)
    texts = ids(8)
    texts[:, -1] = 59
    return Built(Pairs(model).eval(), (pictures(vision["image_size"]), texts), target=None)


class Captions(nn.Module):
    """CoCa's text decoder, which attends to the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _open_clip("CoCa").forward.model

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.model(image, text)["logits"]


def _coca_captions() -> Built:
    return Built(Captions().eval(), (pictures(32), ids(7)), target=(5, 9))


_BETWEEN = ("image", "text")
ENTRIES = [
    Entry("torchvision", "VisionTransformer", _vit),
    Entry("torchvision", "SwinTransformer", _swin),
    Entry(
        "torchvision", "SwinTransformer V2",
        partial(_swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    ),
    Entry("torchvision", "MaxVit", _maxvit),
    Entry("torchvision", "SwinTransformer3d", _swin3d),
    Entry("torchvision", "MViT v1", partial(_mvit, 1)),
    Entry("torchvision", "MViT v2", partial(_mvit, 2)),
    *(
        Entry("torch", name, build, streams=streams, crosses=len(streams) > 1)
        for name, build, streams in _TORCH
    ),
    *(
        Entry("open_clip", kind, partial(_open_clip, kind), streams=_BETWEEN)
        for kind in (
            "CLIP", "custom text", "text without causal mask", "ResNet tower",
            "timm tower",
        )
    ),
    Entry("open_clip", "attention pooling", partial(_open_clip, "attention pooling"), crosses=True),
    Entry("open_clip", "CoCa, contrastive", partial(_open_clip, "CoCa"), crosses=True),
    Entry("open_clip", "CoCa, captions", _coca_captions, crosses=True),
]  # fmt: skip
