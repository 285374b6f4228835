"""Hugging Face: model types that join modalities, and those for speech, video and time series.

The rule is that of `huggingface_by_hand.py`. Batches of two of different content, padded where the
model takes a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as T
from torch import Tensor

from captum_generic_attn import hf
from zoo.models import Built, Entry, ids, mask, pictures
from zoo.models.huggingface import unfused
from zoo.models.huggingface_by_hand import TEXT, VISION, entry

CAUSAL = TEXT | dict(num_key_value_heads=2)
BART = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
)  # fmt: skip
Q_FORMER = TEXT | dict(encoder_hidden_size=32)
OPT = dict(
    model_type="opt", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32,
)  # fmt: skip
LAST = (5, 7)
"""The score of a token at a place that no example pads."""


def _words(length: int = 8, **more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids(length), "attention_mask": mask(length), **more}


def _pictured(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    return lambda: _words(pixel_values=pictures(size))


def _noise(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def _behind(places: int, placeholder: int) -> Tensor:
    """Words behind as many placeholders as a picture has tokens."""
    return torch.cat([torch.full((2, places), placeholder), ids(6)], 1)


def _frames() -> Tensor:
    return pictures(32, 8).unflatten(0, (2, 4))


def _pairs(cls: str, config: Callable[[], Any]) -> Built:
    model = getattr(T, cls)(config()).eval()
    words = ids(8)
    words[:, -1] = 63
    given = {"input_ids": words, "pixel_values": pictures(32)}
    forward, inputs, rest = hf.unpack(hf.pairs(model), given)
    assert isinstance(inputs, tuple)
    return Built(forward, inputs, rest, None, fused_off=unfused(model))


def _dual(name: str, cls: str, config: Callable[[], Any], **expected: Any) -> Entry:
    return Entry("transformers", name, partial(_pairs, cls, config), **expected)


_TOWERS = dict(text_config=TEXT | dict(eos_token_id=63), vision_config=VISION, projection_dim=16)
_TWO = dict(streams=("input_ids", "pixel_values"))
DUAL = [
    _dual("clip", "CLIPModel", lambda: T.CLIPConfig(**_TOWERS), **_TWO),
    _dual("siglip", "SiglipModel",
          lambda: T.SiglipConfig(text_config=TEXT, vision_config=VISION), crosses=True),
    _dual("chinese_clip", "ChineseCLIPModel", lambda: T.ChineseCLIPConfig(**_TOWERS), **_TWO),
    _dual("altclip", "AltCLIPModel",
          lambda: T.AltCLIPConfig(text_config=TEXT | dict(project_dim=16), vision_config=VISION,
                                  projection_dim=16), **_TWO),
    _dual("clipseg", "CLIPSegModel", lambda: T.CLIPSegConfig(**_TOWERS), **_TWO),
    _dual("blip, contrastive", "BlipModel",
          lambda: T.BlipConfig(text_config=TEXT | dict(encoder_hidden_size=32),
                               vision_config=VISION, projection_dim=16), **_TWO),
    _dual("groupvit", "GroupViTModel",
          lambda: T.GroupViTConfig(
              text_config=TEXT | dict(eos_token_id=63), projection_dim=16,
              vision_config=dict(hidden_size=32, depths=[2, 1, 1], num_attention_heads=4,
                                 intermediate_size=64, image_size=32, patch_size=8,
                                 num_output_groups=[4, 2, 0], num_group_tokens=[4, 2, 0]),
              projection_intermediate_dim=32),
          refusal="cannot be explained", why="groups are assigned by a hard softmax"),
]  # fmt: skip
ANSWERS = [
    entry("lxmert", "LxmertForQuestionAnswering",
          lambda: T.LxmertConfig(vocab_size=64, hidden_size=32, num_attention_heads=4,
                                 intermediate_size=64, l_layers=2, x_layers=2, r_layers=2,
                                 visual_feat_dim=12, num_qa_labels=5),
          lambda: _words(visual_feats=_noise(6, 12), visual_pos=_noise(6, 4)),
          streams=("input_ids", "visual_feats"), crosses=True),
    entry("visual_bert", "VisualBertForQuestionAnswering",
          lambda: T.VisualBertConfig(**TEXT, visual_embedding_dim=12, num_labels=5),
          lambda: _words(visual_embeds=_noise(6, 12), visual_attention_mask=torch.ones(2, 6)),
          streams=("input_ids+visual_embeds",)),
    entry("vilt", "ViltForQuestionAnswering",
          lambda: T.ViltConfig(**TEXT, image_size=32, patch_size=8, num_labels=5),
          lambda: _words(pixel_values=pictures(32), pixel_mask=torch.ones(2, 32, 32).long()),
          streams=("input_ids+pixel_values",)),
    entry("blip, answers", "BlipForQuestionAnswering",
          lambda: T.BlipConfig(
              text_config=TEXT | dict(encoder_hidden_size=32, bos_token_id=1, pad_token_id=0,
                                      eos_token_id=2, sep_token_id=2),
              vision_config=VISION, projection_dim=16),
          lambda: _words(pixel_values=pictures(32), decoder_input_ids=ids(4)), (3, 7),
          output="last_hidden_state", crosses=True),
    entry("blip, captions", "BlipForConditionalGeneration",
          lambda: T.BlipConfig(
              text_config=TEXT | dict(encoder_hidden_size=32, bos_token_id=1, pad_token_id=0,
                                      eos_token_id=2, sep_token_id=2),
              vision_config=VISION, projection_dim=16),
          _pictured(), LAST, crosses=True),
    entry("blip-2", "Blip2ForConditionalGeneration",
          lambda: T.Blip2Config(vision_config=VISION, qformer_config=Q_FORMER, text_config=OPT,
                                num_query_tokens=4, image_token_index=3),
          lambda: {"input_ids": _behind(4, 3), "pixel_values": pictures(32)}, (9, 7),
          crosses=True),
    entry("instructblip", "InstructBlipForConditionalGeneration",
          lambda: T.InstructBlipConfig(vision_config=VISION, qformer_config=Q_FORMER,
                                       text_config=OPT, num_query_tokens=4, image_token_index=3),
          lambda: {"input_ids": _behind(4, 3), "qformer_input_ids": ids(5),
                   "pixel_values": pictures(32)}, (9, 7), crosses=True),
    entry("bridgetower", "BridgeTowerForImageAndTextRetrieval",
          lambda: T.BridgeTowerConfig(
              hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
              text_config=TEXT,
              vision_config=VISION | dict(hidden_size=64, num_hidden_layers=4)),
          _pictured(), crosses=True),
    entry("flava", "FlavaModel",
          lambda: T.FlavaConfig(
              text_config=TEXT, image_config=VISION,
              multimodal_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=64), hidden_size=32, projection_dim=16),
          _pictured(), (0, 5), output=lambda o: o.multimodal_embeddings),
    entry("layoutlmv3", "LayoutLMv3ForSequenceClassification",
          lambda: T.LayoutLMv3Config(**TEXT, input_size=32, patch_size=8, coordinate_size=5,
                                     shape_size=6),
          lambda: _words(bbox=torch.zeros(2, 8, 4).long(), pixel_values=pictures(32)),
          streams=("input_ids+pixel_values",)),
    entry("git", "GitForCausalLM",
          lambda: T.GitConfig(**TEXT, vision_config=VISION), _pictured(), (20, 7)),
    entry("llava", "LlavaForConditionalGeneration",
          lambda: T.LlavaConfig(text_config=CAUSAL | dict(model_type="llama"),
                                vision_config=VISION | dict(model_type="clip_vision_model"),
                                image_token_index=3, vision_feature_layer=-1),
          lambda: {"input_ids": _behind(16, 3), "pixel_values": pictures(32)}, (21, 7),
          streams=("pixel_values+input_ids",)),
    entry("paligemma", "PaliGemmaForConditionalGeneration",
          lambda: T.PaliGemmaConfig(
              text_config=CAUSAL | dict(model_type="gemma", head_dim=8),
              vision_config=VISION | dict(model_type="siglip_vision_model", projection_dim=32),
              image_token_index=3, projection_dim=32),
          lambda: {"input_ids": _behind(16, 3), "pixel_values": pictures(32),
                   "token_type_ids": torch.zeros(2, 22).long()}, (21, 7), crosses=True),
    entry("vision-encoder-decoder", "VisionEncoderDecoderModel",
          lambda: T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
              T.ViTConfig(**VISION), T.TrOCRConfig(vocab_size=64, d_model=32, decoder_layers=2,
                                                   decoder_attention_heads=4, decoder_ffn_dim=64,
                                                   max_position_embeddings=64)),
          lambda: {"pixel_values": pictures(32), "decoder_input_ids": ids(4)}, (3, 7),
          streams=("pixel_values", "decoder_input_ids"), crosses=True),
    entry("pix2struct", "Pix2StructForConditionalGeneration",
          lambda: T.Pix2StructConfig(
              text_config=dict(vocab_size=64, hidden_size=32, d_kv=8, d_ff=64, num_layers=2,
                               num_heads=4, decoder_start_token_id=0),
              vision_config=dict(hidden_size=32, patch_embed_hidden_size=18, d_ff=64, d_kv=8,
                                 num_hidden_layers=2, num_attention_heads=4)),
          lambda: {"flattened_patches": _patches(), "decoder_input_ids": ids(4)}, (3, 7),
          crosses=True),
]  # fmt: skip


def _patches() -> Tensor:
    """Row, column (from 1) and pixels of each patch, as Pix2Struct takes them."""
    place = torch.cartesian_prod(torch.arange(1.0, 4), torch.arange(1.0, 4)).expand(2, -1, -1)
    return torch.cat([place, _noise(9, 18)], -1)


SEQUENCES = [
    entry("t5", "T5ForConditionalGeneration",
          lambda: T.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                             decoder_start_token_id=0),
          lambda: _words(decoder_input_ids=ids(4)), (3, 7),
          streams=("input_ids", "decoder_input_ids"), crosses=True),
    entry("mt5", "MT5ForConditionalGeneration",
          lambda: T.MT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                              decoder_start_token_id=0),
          lambda: _words(decoder_input_ids=ids(4)), (3, 7), crosses=True),
    entry("longt5", "LongT5ForConditionalGeneration",
          lambda: T.LongT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2,
                                 num_heads=4, decoder_start_token_id=0, local_radius=3),
          lambda: _words(decoder_input_ids=ids(4)), (3, 7), crosses=True),
    entry("prophetnet", "ProphetNetForConditionalGeneration",
          lambda: T.ProphetNetConfig(vocab_size=64, hidden_size=32, encoder_ffn_dim=64,
                                     num_encoder_layers=2, num_encoder_attention_heads=4,
                                     decoder_ffn_dim=64, num_decoder_layers=2,
                                     num_decoder_attention_heads=4, max_position_embeddings=64,
                                     ngram=1),
          lambda: _words(decoder_input_ids=ids(4)), (3, 7), crosses=True),
    entry("bart, classifier", "BartForSequenceClassification",
          lambda: T.BartConfig(**BART),
          lambda: {"input_ids": torch.cat([ids(7), torch.full((2, 1), 2)], 1)}, crosses=True,
          streams=("input_ids", "input_ids@model.decoder")),
    entry("gptj", "GPTJForCausalLM",
          lambda: T.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                               rotary_dim=4), _words, LAST),
    entry("gpt_neo", "GPTNeoForCausalLM",
          lambda: T.GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4,
                                 attention_types=[[["global", "local"], 1]],
                                 max_position_embeddings=64, window_size=4), _words, LAST),
    entry("falcon", "FalconForCausalLM",
          lambda: T.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2,
                                 num_attention_heads=4), _words, LAST),
    entry("deepseek_v3", "DeepseekV3ForCausalLM",
          lambda: T.DeepseekV3Config(
              **(CAUSAL | dict(num_key_value_heads=4)), q_lora_rank=16, kv_lora_rank=16,
              qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=4, n_routed_experts=2, n_group=1,
              topk_group=1, num_experts_per_tok=1, moe_intermediate_size=16,
              first_k_dense_replace=2), _words, LAST),
    entry("nystromformer, more tokens than landmarks", "NystromformerForSequenceClassification",
          lambda: T.NystromformerConfig(**TEXT, num_landmarks=4, segment_means_seq_len=16,
                                        conv_kernel_size=3),
          lambda: {"input_ids": ids(16)}, 1, "are multiplied with each other",
          "attention is a product of three softmaxes"),
    entry("reformer", "ReformerModelWithLMHead",
          lambda: T.ReformerConfig(
              vocab_size=64, hidden_size=32, attention_head_size=8, num_attention_heads=4,
              feed_forward_size=64, attn_layers=["local", "lsh"], axial_pos_shape=[4, 2],
              axial_pos_embds_dim=[16, 16], max_position_embeddings=8, is_decoder=True,
              num_buckets=2, local_attn_chunk_length=4, lsh_attn_chunk_length=4),
          lambda: {"input_ids": ids()}, LAST, "gradients are switched off",
          "hashed attention inside a custom autograd function"),
    entry("whisper", "WhisperForConditionalGeneration",
          lambda: T.WhisperConfig(
              **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
              max_source_positions=20, max_target_positions=20, num_mel_bins=8, pad_token_id=0,
              bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
          lambda: {"input_features": _noise(8, 40), "decoder_input_ids": ids(4)}, (3, 7),
          streams=("input_features", "decoder_input_ids"), crosses=True),
    entry("speech_to_text", "Speech2TextForConditionalGeneration",
          lambda: T.Speech2TextConfig(
              **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
              max_source_positions=40, max_target_positions=20, input_feat_per_channel=8,
              input_channels=1, conv_channels=16, num_conv_layers=2),
          lambda: {"input_features": _noise(40, 8), "decoder_input_ids": ids(4)}, (3, 7),
          crosses=True),
    entry("audio-spectrogram-transformer", "ASTForAudioClassification",
          lambda: T.ASTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                              intermediate_size=64, patch_size=8, max_length=32, num_mel_bins=16,
                              frequency_stride=8, time_stride=8, num_labels=3),
          lambda: {"input_values": _noise(32, 16)}),
    entry("wav2vec2-bert", "Wav2Vec2BertForSequenceClassification",
          lambda: T.Wav2Vec2BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                       intermediate_size=64, feature_projection_input_dim=16,
                                       num_labels=3),
          lambda: {"input_features": _noise(20, 16)}),
    entry("videomae", "VideoMAEForVideoClassification",
          lambda: T.VideoMAEConfig(**VISION, num_frames=4, tubelet_size=2),
          lambda: {"pixel_values": _frames()}),
    entry("vivit", "VivitForVideoClassification",
          lambda: T.VivitConfig(**VISION, num_frames=4, tubelet_size=[2, 8, 8]),
          lambda: {"pixel_values": _frames()}),
    entry("timesformer", "TimesformerForVideoClassification",
          lambda: T.TimesformerConfig(**VISION, num_frames=4),
          lambda: {"pixel_values": _frames()}, 1, "is a query in several sequences"),
    entry("patchtst", "PatchTSTForClassification",
          lambda: T.PatchTSTConfig(num_input_channels=2, context_length=32, patch_length=8,
                                   patch_stride=8, d_model=16, num_attention_heads=4,
                                   num_hidden_layers=2, ffn_dim=32, num_targets=3),
          lambda: {"past_values": _noise(32, 2)}, output="prediction_logits"),
]  # fmt: skip
ENTRIES = [*DUAL, *ANSWERS, *SEQUENCES]
