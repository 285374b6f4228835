"""Hugging Face: model types that want a tiny configuration of their own, for pictures.

The rule: one entry for each type whose attention differs from the other entries': hierarchical
vision, detection and segmentation here; speech, dual encoders, captioning and question answering,
video, documents and time series in `huggingface_joint.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as T
from torch import Tensor

from zoo.models import Built, Entry, ids, pictures
from zoo.models.huggingface import unpacked

TEXT = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=64,
)  # fmt: skip
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    image_size=32, patch_size=8,
)  # fmt: skip
DETR = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5,
)  # fmt: skip


def _resnet(*stages: str, kind: str = "ResNetConfig") -> Any:
    return getattr(T, kind)(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=list(stages),
    )  # fmt: skip


def _swin(*stages: str) -> Any:
    return T.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2],
        window_size=2, out_features=list(stages),
    )  # fmt: skip


def _model(
    cls: str, config: Callable[[], Any], given: Callable[[], dict[str, Tensor]], target: Any,
    output: Any = None,
) -> Built:  # fmt: skip
    return unpacked(getattr(T, cls)(config()).eval(), given(), target, output=output)


def entry(
    name: str, cls: str, config: Callable[[], Any], given: Callable[[], dict[str, Tensor]],
    target: Any = 1, refusal: str = "", why: str = "", output: Any = None, **expected: Any,
) -> Entry:  # fmt: skip
    build = partial(_model, cls, config, given, target, output)
    return Entry("transformers", name, build, refusal, why, **expected)


def seen(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": pictures(size)}


def seen_in_order() -> dict[str, Tensor]:
    """With the numbers by which a masked autoencoder shuffles patches, or they would be drawn."""
    return {"pixel_values": pictures(32), "noise": torch.arange(16.0).expand(2, -1).clone()}


_DEFORMABLE = ("deformable", "partly deformable attention: values are sampled, not multiplied")
_BACKBONE = dict(use_timm_backbone=False)
HIERARCHICAL = [
    entry(
        "swin", "SwinForImageClassification",
        lambda: T.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
            window_size=4, num_labels=3,
        ), seen(), streams=("pixel_values",),
    ),
    entry(
        "swinv2", "Swinv2ForImageClassification",
        lambda: T.Swinv2Config(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
            window_size=4, num_labels=3,
        ), seen(), streams=("pixel_values",),
    ),
    entry(
        "pvt", "PvtForImageClassification",
        lambda: T.PvtConfig(
            image_size=64, hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4],
            depths=[1, 1, 1, 1],
        ), seen(64), 5, streams=("pixel_values",),
    ),
    entry(
        "pvt_v2", "PvtV2ForImageClassification",
        lambda: T.PvtV2Config(
            image_size=64, hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4],
            depths=[1, 1, 1, 1], mlp_ratios=[2, 2, 2, 2],
        ), seen(64), streams=("pixel_values",),
    ),
    entry(
        "segformer", "SegformerForImageClassification",
        lambda: T.SegformerConfig(
            hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4], depths=[1, 1, 1, 1]
        ), seen(64), streams=("pixel_values",),
    ),
    entry(
        "cvt", "CvtForImageClassification",
        lambda: T.CvtConfig(embed_dim=[12, 24, 48], num_heads=[1, 2, 4], depth=[1, 2, 3]),
        seen(64), streams=("pixel_values",),
    ),
    entry(
        "levit", "LevitForImageClassification",
        lambda: T.LevitConfig(
            image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2],
            depths=[1, 1, 1], key_dim=[8, 8, 8],
        ), seen(64),
    ),
    entry(
        "hiera", "HieraForImageClassification",
        lambda: T.HieraConfig(
            embed_dim=8, image_size=[64, 64], patch_kernel=[7, 7], patch_stride=[4, 4],
            depths=[1, 1, 1], num_heads=[1, 2, 4], query_stride=[2, 2], masked_unit_size=[4, 4],
            num_query_pool=2,
        ), seen(64), streams=("pixel_values",),
    ),
    entry(
        "donut-swin", "DonutSwinForImageClassification",
        lambda: T.DonutSwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
            window_size=4, num_labels=3,
        ), seen(), streams=("pixel_values",),
    ),
    entry(
        "mobilevitv2", "MobileViTV2ForImageClassification", lambda: T.MobileViTV2Config(
            image_size=64, width_multiplier=0.5
        ), seen(64), 1, "MobileViTV2LinearSelfAttention",
        "separable attention: the pooled softmax output gates all tokens",
    ),
]  # fmt: skip
PICTURES = [
    entry("dinov3_vit", "DINOv3ViTModel",
           lambda: T.DINOv3ViTConfig(**VISION, num_register_tokens=2), seen(), (0, 5),
           output="last_hidden_state"),
    entry("vit_mae", "ViTMAEModel", lambda: T.ViTMAEConfig(**VISION, mask_ratio=0.0), seen_in_order,
           (0, 5), output="last_hidden_state"),
    entry("yolos", "YolosForObjectDetection",
           lambda: T.YolosConfig(**(VISION | dict(image_size=[32, 32])), num_detection_tokens=4),
           seen(), (2, 1)),
    entry("dpt", "DPTForDepthEstimation",
           lambda: T.DPTConfig(**VISION, backbone_out_indices=[0, 1], neck_hidden_sizes=[8, 16],
                               reassemble_factors=[2, 1], fusion_hidden_size=16),
           seen(), (16, 16), output="predicted_depth"),
    entry("sam vision encoder", "SamVisionModel",
           lambda: T.SamVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     image_size=64, patch_size=8, window_size=4, output_channels=8,
                                     global_attn_indexes=[1], mlp_dim=64),
           seen(64), (3, 2, 2), output="last_hidden_state"),
    entry("siglip_vision", "SiglipVisionModel", lambda: T.SiglipVisionConfig(**VISION), seen(), 3,
           output="pooler_output", crosses=True),
    entry("vitdet", "VitDetModel",
           lambda: T.VitDetConfig(**VISION, window_size=2, window_block_indices=[0]), seen(),
           (3, 2, 2), output="last_hidden_state"),
]  # fmt: skip
DETECTION = [
    entry("detr", "DetrForObjectDetection",
           lambda: T.DetrConfig(backbone_config=_resnet("stage4"), **DETR, **_BACKBONE), seen(96),
           (2, 1), streams=("pixel_values", "model.query_position_embeddings.weight"),
           crosses=True),
    entry("table-transformer", "TableTransformerForObjectDetection",
           lambda: T.TableTransformerConfig(backbone_config=_resnet("stage4"), **DETR, **_BACKBONE),
           seen(96), (2, 1), crosses=True),
    entry("conditional_detr", "ConditionalDetrForObjectDetection",
           lambda: T.ConditionalDetrConfig(backbone_config=_resnet("stage4"), **DETR, **_BACKBONE),
           seen(96), (2, 1), crosses=True),
    entry("dab-detr", "DabDetrForObjectDetection",
           lambda: T.DabDetrConfig(backbone_config=_resnet("stage4"), **(
               {k: v for k, v in DETR.items() if k != "d_model"} | dict(hidden_size=32)),
               **_BACKBONE), seen(96), (2, 1), crosses=True),
    entry("deformable_detr", "DeformableDetrForObjectDetection",
           lambda: T.DeformableDetrConfig(backbone_config=_resnet("stage2", "stage3", "stage4"),
                                          **DETR, num_feature_levels=3, **_BACKBONE),
           seen(96), (2, 1), *_DEFORMABLE),
    entry("rt_detr", "RTDetrForObjectDetection",
           lambda: T.RTDetrConfig(
               backbone_config=_resnet("stage2", "stage3", "stage4", kind="RTDetrResNetConfig"),
               **(DETR | dict(encoder_layers=1)), encoder_hidden_dim=32,
               encoder_in_channels=[16, 16, 32], decoder_in_channels=[32, 32, 32]),
           seen(96), (2, 1), *_DEFORMABLE),
    entry("maskformer", "MaskFormerForInstanceSegmentation",
           lambda: T.MaskFormerConfig(
               fpn_feature_size=32, mask_feature_size=32,
               backbone_config=_swin("stage1", "stage2", "stage3", "stage4"),
               decoder_config=T.DetrConfig(backbone_config=_resnet("stage4"),
                                           **(DETR | dict(encoder_layers=1)), **_BACKBONE)),
           seen(64), (2, 1), output="class_queries_logits", crosses=True),
    entry("mask2former", "Mask2FormerForUniversalSegmentation",
           lambda: T.Mask2FormerConfig(
               backbone_config=_swin("stage1", "stage2", "stage3", "stage4"), feature_size=32,
               mask_feature_size=32, hidden_dim=32, encoder_layers=2, decoder_layers=3,
               num_attention_heads=4, dim_feedforward=64, encoder_feedforward_dim=64, num_queries=5,
               num_labels=4), seen(64), (2, 1), *_DEFORMABLE, output="class_queries_logits"),
    entry("grounding-dino", "GroundingDinoForObjectDetection",
           lambda: T.GroundingDinoConfig(
               backbone_config=_swin("stage2", "stage3", "stage4"),
               text_config=TEXT | dict(model_type="bert"), **DETR, num_feature_levels=3),
           lambda: {"input_ids": torch.tensor([[1, 7, 9, 12, 30, 2, 11, 50]] * 2),
                    "pixel_values": pictures(64)}, (2, 1), *_DEFORMABLE),
    entry("owlvit", "OwlViTForObjectDetection",
           lambda: T.OwlViTConfig(text_config=TEXT | dict(max_position_embeddings=8),
                                  vision_config=VISION, projection_dim=32),
           lambda: {"input_ids": ids(), "pixel_values": pictures(32)}, (3, 0)),
    entry("owlv2", "Owlv2ForObjectDetection",
           lambda: T.Owlv2Config(text_config=TEXT | dict(max_position_embeddings=8),
                                 vision_config=VISION, projection_dim=32),
           lambda: {"input_ids": ids(), "pixel_values": pictures(32)}, (3, 0)),
]  # fmt: skip
ENTRIES = [*HIERARCHICAL, *PICTURES, *DETECTION]
"""`huggingface_joint.py` goes on with what joins several modalities."""
