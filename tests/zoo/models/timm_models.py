"""timm: the smallest architecture of every module of `timm.models` whose models have attention.

Where the smallest has none (MobileNet, FastViT) or a module has several kinds, the smallest of each
kind. What has no softmax at all, or one over classes or gates alone, is in `WITHOUT`, by module.
`test_census.py` sees that no module is missing. Depth and pictures are cut down where they may be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from torch import nn

from zoo.models import Built, Entry, pictures

CHANNELS = "attention between channels"
NO_PRODUCT = "the softmax is not applied to query-key products"
GATE = "the softmax is a gate over branches"


def _unfused(model: nn.Module) -> Callable[[], None] | None:
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False) is True]
    if not fused:
        return None

    def switch() -> None:
        for module in fused:
            module.fused_attn = False

    return switch


def _build(name: str, size: int, **options: Any) -> Built:
    model = timm.create_model(name, num_classes=5, **options).eval()
    return Built(model, (pictures(size, 1 if size > 200 else 2),), fused_off=_unfused(model))


def _entry(
    module: str, name: str, size: int, refusal: str = "", why: str = "", *,
    blends: bool = False, crosses: bool = False, **options: Any,
) -> Entry:  # fmt: skip
    build = partial(_build, name, size, **options)
    label = f"{module}: {name}"
    return Entry("timm", label, build, refusal, why, (), crosses, blends, heavy=size > 130)


ENTRIES = [
    _entry("beit", "beit_base_patch16_224", 64, img_size=64, depth=2),
    _entry("byoanet", "halonet_h1", 256),
    _entry("byoanet", "botnet26t_256", 256),
    _entry("byoanet", "lambda_resnet26t", 128, "without a softmax", NO_PRODUCT),
    _entry("byobnet", "resnet50_clip", 224),
    _entry(
        "byobnet", "gcresnext26ts", 128, "(global context)",
        "global context: tokens are pooled into one, which is added to all of them",
    ),
    _entry(
        "byobnet", "bat_resnext26ts", 256, "without a softmax",
        "bilinear attention without a softmax",
    ),
    _entry("cait", "cait_xxs24_224", 64, img_size=64, depth=2),
    _entry("coat", "coat_tiny", 64, "without a softmax", NO_PRODUCT, img_size=64),
    _entry("convit", "convit_tiny", 64, blends=True, img_size=64),
    _entry("cpubone", "cpubone_nano", 128),
    _entry("crossvit", "crossvit_tiny_240", 240),
    _entry(
        "csatv2", "csatv2", 256, "could not be followed through add",
        "spatial attention sums over positions, so scores depend on the other examples",
    ),
    _entry(
        "davit", "davit_tiny", 224, "between channels", CHANNELS, depths=(1, 1, 1, 1)
    ),
    _entry("deepseek_vit", "deepseek_vit_412m", 126, depth=1, img_size=126),
    _entry("deit", "deit_tiny_distilled_patch16_224", 64, img_size=64, depth=2),
    _entry("edgenext", "edgenext_xx_small", 128, "between channels", CHANNELS),
    _entry("efficientformer", "efficientformer_l1", 224),
    _entry("efficientformer_v2", "efficientformerv2_s0", 224),
    _entry("efficientvim", "efficientvim_m1", 128, "without a softmax", NO_PRODUCT),
    _entry(
        "efficientvit_mit", "efficientvit_b0", 128, "without a softmax",
        "linear attention without a softmax",
    ),
    _entry("efficientvit_msra", "efficientvit_m0", 224),
    _entry("eva", "vit_tiny_patch16_dinov3_qkvb", 64, img_size=64, depth=2),
    _entry("fastvit", "fastvit_sa12", 128),
    _entry("gcvit", "gcvit_xxtiny", 224, "is a query in several sequences"),
    _entry("gemma4_vit", "gemma4_vit_167m", 96, depth=2, img_size=96),
    _entry("hiera", "hiera_tiny_224", 224),
    _entry("hieradet_sam2", "sam2_hiera_tiny", 256),
    _entry("iformer", "iformer_t", 224),
    _entry("levit", "levit_128s", 224),
    _entry("lowformer", "lowformer_b0", 128),
    _entry("maxxvit", "test_coatnet", 160),
    _entry("maxxvit", "test_maxvit", 160),
    _entry("metaformer", "caformer_s18", 128),
    _entry("mobilenetv3", "mobilenetv4_hybrid_medium", 224),
    _entry("mobilenetv5", "mobilenetv5_base", 256),
    _entry("mobilevit", "mobilevit_xxs", 128),
    _entry(
        "mobilevit", "mobilevitv2_050", 128, "LinearSelfAttention",
        "separable attention: the pooled softmax output gates all tokens",
    ),
    _entry("mvitv2", "mvitv2_tiny", 224),
    _entry("naflexvit", "naflexvit_base_patch16_gap", 96, depth=2),
    _entry("nest", "nest_tiny", 224),
    _entry("nextvit", "nextvit_small", 224),
    _entry("pit", "pit_ti_224", 224),
    _entry("pvt_v2", "pvt_v2_b0", 128),
    _entry("qwen3_vit", "qwen3_vit_88m", 96, depth=2, img_size=96),
    _entry("resnest", "resnest14d", 64, "no attention was found", GATE),
    _entry("shvit", "shvit_s1", 128),
    _entry("sknet", "skresnet18", 64, "no attention was found", GATE),
    _entry(
        "swiftformer", "swiftformer_xs", 128, "no attention was found",
        "additive attention without a softmax",
    ),
    _entry("swin_transformer", "swin_tiny_patch4_window7_224", 112, img_size=112),
    _entry("swin_transformer_v2", "swinv2_tiny_window8_256", 128, img_size=128, window_size=4),
    _entry("swin_transformer_v2_cr", "swinv2_cr_tiny_224", 224),
    _entry("tiny_vit", "tiny_vit_5m_224", 224),
    _entry("tnt", "tnt_s_legacy_patch16_224", 224),
    _entry("twins", "twins_svt_small", 224),
    _entry("twins", "twins_pcpvt_small", 224),
    _entry("visformer", "visformer_tiny", 224),
    _entry("vision_transformer", "test_vit", 160),
    _entry(
        "vision_transformer", "vit_so150m_patch16_reg4_map_256", 64, crosses=True, img_size=64,
        depth=2,
    ),
    _entry("vision_transformer_hybrid", "vit_tiny_r_s16_p8_224", 64, img_size=64, depth=2),
    _entry("vision_transformer_relpos", "vit_relpos_small_patch16_224", 64, img_size=64, depth=2),
    _entry("vision_transformer_sam", "samvit_base_patch16_224", 64, img_size=64, depth=3),
    _entry("vitamin", "vitamin_small_224", 224),
    _entry("volo", "volo_d1_224", 224, "no product of queries and keys", NO_PRODUCT),
    _entry(
        "xcit", "xcit_nano_12_p16_224", 64, "between channels", CHANNELS, img_size=64, depth=2
    ),
]  # fmt: skip

_WITHOUT = """
    convmixer convnext cspnet cspnext densenet dla dpn efficientnet fasternet focalnet ghostnet
    hardcorenas hgnet hrnet inception_next inception_resnet_v2 inception_v3 inception_v4 lcnetv2
    mambaout mlp_mixer nasnet nfnet pnasnet rdnet regnet repghost repvit res2net resnet resnetv2
    rexnet selecsls senet sequencer starnet tresnet vgg vovnet xception xception_aligned
"""
WITHOUT = frozenset(_WITHOUT.split())
"""Modules whose models have convolutions, perceptrons, gates or recurrence, and no attention."""
