"""What `speed.py` measures: models with random weights, their inputs, and the score explained.

Vision transformers at four lengths and four depths, a padded BERT, a causal language model with
grouped queries, an encoder-decoder like DETR, and two small models. All are float32, in evaluation
mode, and the same in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SHARPNESS = 3.0
PADDED = 100


@dataclass(frozen=True)
class Task:
    """One attribution: of the score `target` of `model(inputs, *rest)`.

    `embedding`: the module whose output the gradient is taken at where inputs are integers.
    """

    model: nn.Module
    inputs: Tensor
    target: int | tuple[int, ...]
    rest: tuple[Tensor, ...] = ()
    embedding: nn.Module | None = None


@dataclass(frozen=True)
class Workload:
    """A task and what is measured of it.

    `build(small=True)` is a small task of the same kind, to warm up with. `seconds`: of a round of
    all contenders on two cores, a guess, which puts the workloads in order. `calls`: how many
    make one timing. `rounds`: the most for an expensive contender. `gigabytes`: of free memory that
    a contender needs, where it is much. `quick`: measured by `--quick`.
    """

    name: str
    title: str
    tokens: int
    build: Callable[..., Task]
    contenders: tuple[str, ...]
    seconds: float
    batch: int = 1
    layers: int = 12
    calls: int = 1
    rounds: Mapping[str, int] = field(default_factory=dict)
    gigabytes: Mapping[str, float] = field(default_factory=dict)
    memory: bool = True
    quick: bool = False
    in_table: bool = True


@torch.no_grad()
def sharpen(*weights: Tensor) -> None:
    """Draw the weights of queries and keys so that the logits' standard deviation is `SHARPNESS`.

    Attention by plain random weights is nearly uniform. A trained model's is not: most of its
    probabilities are nearly 0, and R is far from the identity. Arithmetic on such numbers, and what
    a method might save where they are small, belong into the measurement.
    """
    for weight in weights:
        weight.normal_(std=(SHARPNESS / weight.shape[1]) ** 0.5)


def vit(
    width: int, heads: int, layers: int, side: int, patch: int, batch: int, *, small: bool = False
) -> Task:
    """A vision transformer of timm, on pictures of `side` pixels; class 3."""
    from timm.models.vision_transformer import VisionTransformer

    if small:
        layers, side, batch = 3, 4 * patch, 1
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=side, patch_size=patch, embed_dim=width, num_heads=heads, depth=layers
    ).eval()
    sharpen(*(block.attn.qkv.weight[: 2 * width] for block in model.blocks))
    return Task(model, torch.randn(batch, 3, side, side), 3)


def smallest_vit(*, small: bool = False) -> Task:
    """The smallest vision transformer of timm, as timm makes it but for the queries and keys."""
    import timm

    torch.manual_seed(0)
    side = 64 if small else 160
    model = timm.create_model("test_vit", img_size=side).eval()
    sharpen(*(block.attn.qkv.weight[: 2 * model.embed_dim] for block in model.blocks))
    return Task(model, torch.randn(1, 3, side, side), 3)


class Logits(nn.Module):
    """A Hugging Face model's logits: all, or those of the last place."""

    def __init__(self, model: nn.Module, *, last: bool = False) -> None:
        super().__init__()
        self.model = model
        self.last = last

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, classes]."""
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits[:, -1] if self.last else logits


def bert(*, small: bool = False) -> Task:
    """BERT base on 512 tokens, the last 100 of them padding; class 1."""
    from transformers import BertConfig, BertForSequenceClassification

    layers, tokens, padded = (3, 32, 8) if small else (12, 512, PADDED)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers)).eval()
    for layer in model.bert.encoder.layer:
        sharpen(layer.attention.self.query.weight, layer.attention.self.key.weight)
    ids = torch.randint(1000, 30000, (1, tokens))
    mask = torch.ones(1, tokens, dtype=torch.long)
    mask[:, tokens - padded :] = 0
    return Task(Logits(model), ids, 1, (mask,), model.get_input_embeddings())


def language_model(tokens: int, *, small: bool = False) -> Task:
    """A causal language model, twelve heads of queries on four of keys; the next token's logit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, tokens = (3, 32) if small else (12, tokens)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        sharpen(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
    ids = torch.randint(1000, (1, tokens))
    return Task(Logits(model, last=True), ids, 7, embedding=model.get_input_embeddings())


class Detector(nn.Module):
    """Encoder and decoder of DETR's size: features of a picture in, classes of the queries out."""

    def __init__(self, tokens: int, queries: int, layers: int, width: int = 256) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(tokens, width))
        self.queries = nn.Parameter(torch.randn(queries, width))
        sizes = {"d_model": width, "nhead": 8, "dim_feedforward": 2048, "batch_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**sizes), layers, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), layers)
        self.classes = nn.Linear(width, 92)
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                sharpen(module.in_proj_weight[: 2 * width])

    def forward(self, features: Tensor) -> Tensor:
        """[B, width, h, w] to [B, queries, classes]."""
        memory = self.encoder(features.flatten(2).mT + self.positions)
        queries = self.queries.expand(len(features), -1, -1)
        scores: Tensor = self.classes(self.decoder(queries, memory))
        return scores


def detector(*, small: bool = False) -> Task:
    """100 object queries on 25 × 34 places; class 17 of query 5."""
    layers, height, width, queries = (2, 4, 4, 10) if small else (6, 25, 34, 100)
    torch.manual_seed(0)
    model = Detector(height * width, queries, layers).eval()
    return Task(model, torch.randn(1, 256, height, width), (5, 17))


WIDTH_AND_HEADS = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}
USUAL = ("ours", "saliency", "limit", "recipe")
INTEGRATED = "integrated_gradients"


def of_vit(
    size: str,
    side: int,
    patch: int,
    seconds: float,
    *,
    batch: int = 1,
    layers: int = 12,
    contenders: tuple[str, ...] = USUAL,
    **more: Any,
) -> Workload:
    """A vision transformer's workload, named after its size, tokens, and what is unusual."""
    tokens = (side // patch) ** 2 + 1
    name = f"vit_{size.lower()}_{tokens}"
    name += (f"_batch{batch}" if batch > 1 else "") + (f"_layers{layers}" if layers != 12 else "")
    return Workload(
        **{"name": name, "title": f"ViT-{size}"} | more,
        tokens=tokens,
        build=partial(vit, *WIDTH_AND_HEADS[size], layers, side, patch, batch),
        contenders=contenders,
        seconds=seconds,
        batch=batch,
        layers=layers,
    )


# One call is fifty passes: more rounds would take the time of all other workloads together.
FIFTY_STEPS = {"contenders": (*USUAL, INTEGRATED), "rounds": {INTEGRATED: 2}}
WORKLOADS = (
    of_vit("S", 224, 16, 0.7, quick=True, **FIFTY_STEPS),
    of_vit("B", 224, 16, 2.4, quick=True, **FIFTY_STEPS),
    of_vit("S", 224, 16, 6, batch=8),
    of_vit("B", 224, 16, 21, batch=8),
    of_vit("S", 384, 16, 2.8, quick=True, **FIFTY_STEPS),
    of_vit("B", 384, 16, 22, **FIFTY_STEPS),
    of_vit("S", 518, 14, 9),
    of_vit("B", 518, 14, 35),
    of_vit("S", 1024, 16, 50, rounds={"recipe": 1}, gigabytes={"recipe": 19}),
    Workload(
        name="bert_512",
        title="BERT base, 100 padded",
        tokens=512,
        build=bert,
        contenders=("ours", "limit"),
        seconds=3.2,
        quick=True,
    ),
    Workload(
        name="language_model_2048",
        title="causal, grouped queries",
        tokens=2048,
        build=partial(language_model, 2048),
        contenders=("ours", "limit"),
        seconds=16,
    ),
    Workload(
        name="language_model_8192",
        title="causal, grouped queries",
        tokens=8192,
        build=partial(language_model, 8192),
        contenders=("ours", "limit"),
        seconds=120,
        rounds={"ours": 1, "limit": 1},
        gigabytes={"ours": 7, "limit": 7},
    ),
    Workload(
        name="detector_850",
        title="DETR-like, 100 queries",
        tokens=850,
        build=detector,
        contenders=("ours", "saliency", "limit"),
        seconds=1.6,
        layers=6,
        quick=True,
    ),
    of_vit(
        "S",
        224,
        16,
        2,
        name="eight_targets",
        title="ViT-S, eight targets",
        contenders=("eight_targets", "eight_calls"),
        memory=False,
        quick=True,
    ),
    of_vit("Ti", 224, 16, 0.8, contenders=USUAL[:3], calls=5, memory=False, quick=True),
    Workload(
        name="test_vit_101",
        title="test_vit of timm",
        tokens=101,
        build=smallest_vit,
        contenders=USUAL[:3],
        seconds=0.3,
        layers=6,
        calls=50,
        memory=False,
        quick=True,
    ),
    of_vit("S", 384, 16, 0.7, layers=3, in_table=False),
    of_vit("S", 384, 16, 1.4, layers=6, in_table=False),
    of_vit("S", 384, 16, 5.6, layers=24, in_table=False),
)
