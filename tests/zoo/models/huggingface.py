"""Hugging Face: every model type that builds from one tiny configuration, `TINY`.

The rule: the types that transformers' automatic classes list for picture and audio classification,
sequence to sequence, causal and masked language models and text classification (the first of these
that lists a type), if the configuration takes `TINY` as it is, the model has at most six million
parameters, runs and returns logits. `test_census.py` sees that none is missing. What wants a
configuration of its own is in `huggingface_by_hand.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from captum_generic_attn import hf
from zoo.models import Built, Entry, ids, mask, pictures

transformers.logging.set_verbosity_error()

TINY = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=64, type_vocab_size=2, num_key_value_heads=2,
    head_dim=8, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1, d_model=32, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    image_size=32, patch_size=8, num_channels=3, embedding_size=16,
)  # fmt: skip
MOST_PARAMETERS = 6_000_000
CLASSES = {
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
TYPES = {
    "image": """
        beit data2vec-vision deit dinov2 dinov2_with_registers ijepa mobilenet_v1 mobilenet_v2
        mobilevit swiftformer vit vit_msn""",
    "audio": """
        data2vec-audio hubert sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-conformer
        wavlm""",
    "seq2seq": """
        bart bigbird_pegasus blenderbot blenderbot-small fsmt led m2m_100 marian mbart mvp nllb-moe
        pegasus pegasus_x plbart seamless_m4t seamless_m4t_v2""",
    "causal": """
        apertus arcee aria_text beam bert bert-generation big_bird biogpt bitnet bloom camembert
        cohere cohere2 cohere2_moe cpmant ctrl cwm data2vec-text deepseek_v4 diffllama doge electra
        ernie ernie4_5 exaone4 falcon_h1 falcon_mamba flex_olmo flint fuyu gemma gemma2 gemma3_text
        gemma4_unified_text glm glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss
        granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text
        hunyuan_v1_dense hunyuan_v1_moe hyperclovax internlm3 iquestcoder jais2 jetmoe lfm2 llama
        llama4_text mamba megatron-bert minimax minimax_m2 minimax_m3_vl_text ministral ministral3
        mistral mixtral modernbert-decoder moshi mpt nanochat nemotron nemotron_h olmo olmo2 olmo3
        olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen3 rembert roberta
        roberta-prelayernorm roformer rwkv seed_oss smollm3 stablelm starcoder2 trocr vaultgemma
        xglm xlm xlm-roberta xlm-roberta-xl""",
    "text": """
        albert canine convbert deberta deberta-v2 distilbert esm eurobert flaubert fnet gte ibert
        jina_embeddings_v3 layoutlm longformer markuplm mobilebert modernbert mpnet mra nomic_bert
        nystromformer tapas ultrabert yoso""",
}
"""The types that the rule selects, by what they are built for."""

_CONVOLUTIONS = ("no attention was found", "convolutions, no attention")
_RECURRENT = ("without a softmax", "partly recurrent or linear attention without a softmax")
REFUSED = {
    "mobilenet_v1": _CONVOLUTIONS,
    "mobilenet_v2": _CONVOLUTIONS,
    "swiftformer": (
        "weighs values that are no product with it",
        "additive attention: the softmax is not applied to query-key products",
    ),
    "led": ("never meets values in a product", "banded attention in chunks that overlap"),
    "longformer": (
        "a softmax over tokens never meets values in a product",
        "banded attention in chunks that overlap",
    ),
    "pegasus_x": ("more than one product", "attention split over local blocks and global tokens"),
    "falcon_h1": _RECURRENT,
    "falcon_mamba": ("no attention was found", "a state space model"),
    "mamba": ("no attention was found", "a state space model"),
    "minimax": _RECURRENT,
    "nemotron_h": _RECURRENT,
    "olmo_hybrid": _RECURRENT,
    "convbert": (
        "no product of queries and keys",
        "partly convolution: the kernel is a softmax, but not of query-key products",
    ),
    "fnet": ("no attention was found", "Fourier transforms, no attention"),
    "rwkv": ("no attention was found", "recurrent, no attention"),
    "mra": ("no attention was found", "attention in a custom kernel"),
    "yoso": ("without a softmax", "sampled attention without a softmax"),
    "granite_swa": ("could not be followed through logsumexp", ""),
    "granitemoe_swa": ("could not be followed through logsumexp", ""),
}
"""What refuses a type, and why that is right; without a reason it counts against us."""


SINGLE = {"gemma4_unified_text"}
"""Types whose attention computes parts in float32 whatever the model's precision is."""


def class_of(task: str, kind: str) -> str:
    """The name of the class that a task's automatic class builds."""
    name = CLASSES[task][kind]
    return name if isinstance(name, str) else name[0]


def encoding(task: str) -> dict[str, Tensor]:
    """What a model of a task takes."""
    if task == "image":
        return {"pixel_values": pictures(32)}
    if task == "audio":
        generator = torch.Generator().manual_seed(0)
        return {"input_values": torch.randn(2, 6000, generator=generator)}
    words = {"input_ids": ids(), "attention_mask": mask()}
    return words | {"decoder_input_ids": ids(4)} if task == "seq2seq" else words


def unfused(model: nn.Module) -> Callable[[], None] | None:
    """Switches a model from fused to written out attention, if it knows both."""
    configurations = [m.config for m in model.modules() if hasattr(m, "config")]
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return None

    def switch() -> None:
        for configuration in configurations:
            configuration._attn_implementation = "eager"

    return switch


def unpacked(
    model: nn.Module, given: dict[str, Tensor], target: object, **options: object
) -> Built:
    """A model with what `hf.unpack` makes of its arguments."""
    forward, inputs, rest = hf.unpack(model, given)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return Built(forward, inputs, rest, target, fused_off=unfused(model), **options)  # type: ignore[arg-type]


def build(task: str, kind: str) -> Built:
    """A model of a type, small and drawn at random."""
    config = transformers.CONFIG_MAPPING[kind](**TINY)
    model = getattr(transformers, class_of(task, kind))(config).eval()
    token = (3, 7) if task == "seq2seq" else (5, 7)  # of a sentence whose end is padded
    target = token if task in ("seq2seq", "causal", "masked") else 1
    return unpacked(model, encoding(task), target)


ENTRIES = [
    Entry(
        "transformers", kind, partial(build, task, kind), *REFUSED.get(kind, ()),
        streams=("input_ids", "decoder_input_ids") if task == "seq2seq" else (),
        crosses=task == "seq2seq", tolerance=5e-6 if kind in SINGLE else 1e-6,
    )
    for task, kinds in TYPES.items()
    for kind in kinds.split()
]  # fmt: skip
