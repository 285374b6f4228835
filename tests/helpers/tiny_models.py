"""Small models with random weights for the tests, and the method written slowly for them.

Called by the tests of the contract, of the result object, of errors and of what is left behind.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def randomise_zeros(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every all-zero parameter anew: a zero head or gate makes every gradient zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.2 * draw)
    return model


def tiny_vit(*, seed: int = 0, dtype: torch.dtype = torch.float64, **arguments) -> nn.Module:
    """A vision transformer of timm: 16 patches of 8 x 8 and CLS, two blocks, 5 classes."""
    torch.manual_seed(seed)
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "num_classes": 5,
    }
    model = VisionTransformer(**{**settings, **arguments}).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Default weights are so small that attention is uniform and every map looks alike.
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.mul_(8)
    return randomise_zeros(model, seed)


def pictures(count: int = 2, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)


class Block(nn.Module):
    """One transformer block, fused or eager; an eager one can keep its probabilities."""

    def __init__(self, width: int, heads: int, eager: bool = False):
        super().__init__()
        self.heads = heads
        self.eager = eager
        self.kept: list[Tensor] | None = None
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.eager:
            probabilities = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
            if self.kept is not None:
                self.kept.append(probabilities)
            mixed = probabilities @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class TextModel(nn.Module):
    """A text encoder whose output is `[B, N, K]`, `[B, K]`, `[B, 1]` or `[B]`.

    `form`: `"tokens"` (one row of class scores for each token), `"classes"`, `"column"`, `"score"`
    (the last three read the first token).
    """

    def __init__(self, form: str = "classes", *, eager: bool = False, depth: int = 2):
        super().__init__()
        self.form = form
        self.words = nn.Embedding(20, 16)
        self.positions = nn.Parameter(torch.randn(10, 16))
        self.blocks = nn.ModuleList(Block(16, 2, eager) for _ in range(depth))
        self.head = nn.Linear(16, 1 if form in {"column", "score"} else 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.positions[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        scores = self.head(x)
        if self.form == "tokens":
            return scores
        return scores[:, 0, 0] if self.form == "score" else scores[:, 0]


def tiny_text(form: str = "classes", *, seed: int = 0, **arguments) -> TextModel:
    torch.manual_seed(seed)
    model = TextModel(form, **arguments).double().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.qkv.weight.mul_(4)
            block.proj.weight.mul_(2)
    return model


def sentences(count: int = 3, length: int = 6, *, seed: int = 1) -> Tensor:
    return torch.randint(20, (count, length), generator=torch.Generator().manual_seed(seed))


class TwoTowers(nn.Module):
    """An image tower and a text tower of unequal depth; one score for each pair."""

    def __init__(self, form: str = "score"):
        super().__init__()
        self.form = form
        self.vision = tiny_vit(num_classes=16)
        self.text = tiny_text("classes", depth=3)
        self.text.head = nn.Linear(16, 16).double()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
        product = self.vision(pixels) * self.text(input_ids)
        if self.form == "score":
            return product.sum(-1)
        return product.unflatten(-1, (4, 4)).sum(-1) * self.scale


def two_towers(form: str = "score", *, seed: int = 0) -> TwoTowers:
    torch.manual_seed(seed)
    return TwoTowers(form).double().eval()


def slow_relevance(
    model: TextModel, input_ids: Tensor, score: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """R `[B, N, N]` and the maps Ā of an eager model, by loops straight from equations 5 and 6.

    `score` makes the scores `[B]` of the model's output.
    """
    kept: list[Tensor] = []
    for block in model.blocks:
        block.kept = kept
    try:
        scores = score(model(input_ids))
    finally:
        for block in model.blocks:
            block.kept = None
    gradients = torch.autograd.grad(scores.sum(), kept)
    batch, heads, tokens, _ = kept[0].shape
    relevance = torch.eye(tokens, dtype=scores.dtype).repeat(batch, 1, 1)
    maps = []
    for attention, gradient in zip(kept, gradients, strict=True):
        averaged = torch.zeros(batch, tokens, tokens, dtype=scores.dtype)
        for example, head, query, key in itertools.product(*map(range, attention.shape)):
            index = (example, head, query, key)
            product = attention[index].item() * gradient[index].item()
            averaged[example, query, key] += max(product, 0.0) / heads
        for example in range(batch):
            relevance[example] += averaged[example] @ relevance[example]
        maps.append(averaged)
    return relevance, maps
