"""PyTorch's own attention modules, whose fast paths no hook can see into, and torchvision's ViT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_generic_attn import GenericAttention
from zoo import laws, oracles

BATCH, TOKENS, WIDTH, HEADS = 2, 6, 8, 2
TARGETS = (2, 1)
PADDING = torch.tensor([[False] * TOKENS, [False] * (TOKENS - 2) + [True] * 2])
BLOCKED = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
BLOCKED[0] = torch.tensor([False, False, True, True, False, False])
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
ADDED = torch.linspace(0, 20, TOKENS * TOKENS, dtype=torch.float64).sin().reshape(TOKENS, TOKENS)
PER_HEAD = torch.stack([ADDED, -ADDED] * BATCH)


def features() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


# --- the modules, written out -----------------------------------------------------------------


def as_bias(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """A mask of `nn.MultiheadAttention` (True: blocked; or added values) as values to add."""
    if mask is None:
        return torch.zeros(shape, dtype=torch.float64)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)
    return mask.expand(shape)


def attend(
    module: nn.MultiheadAttention,
    x: Tensor,
    kept: list[Tensor],
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """`module(x, x, x)` for batch-first `x`; its probabilities go to `kept`."""
    batch, tokens, width = x.shape
    if module.in_proj_weight is None:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    else:
        weights = list(module.in_proj_weight.chunk(3))
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    bias = as_bias(key_padding_mask, (batch, tokens))[:, None, None]
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, (batch, -1))
    bias = bias + as_bias(attn_mask, (batch, module.num_heads, tokens, tokens))
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.expand(batch, 1, width)], dim=1)
        v = torch.cat([v, module.bias_v.expand(batch, 1, width)], dim=1)
    if module.add_zero_attn:
        k, v = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (k, v))
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    logits = q @ k.mT * module.head_dim**-0.5 + F.pad(bias, (0, k.shape[2] - tokens))
    attention = logits.softmax(dim=-1)
    kept.append(attention)
    return module.out_proj((attention @ v).transpose(1, 2).flatten(2))


def encode(
    layer: nn.TransformerEncoderLayer, x: Tensor, kept: list[Tensor], **masks: Any
) -> Tensor:
    """One encoder layer, written out."""

    def feed_forward(state: Tensor) -> Tensor:
        return layer.linear2(layer.activation(layer.linear1(state)))

    if layer.norm_first:
        x = x + attend(layer.self_attn, layer.norm1(x), kept, **masks)
        return x + feed_forward(layer.norm2(x))
    x = layer.norm1(x + attend(layer.self_attn, x, kept, **masks))
    return layer.norm2(x + feed_forward(x))


# --- nn.MultiheadAttention --------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How `nn.MultiheadAttention` is built and called."""

    name: str
    build: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


class Classifier(nn.Module):
    """Two pre-norm blocks round `nn.MultiheadAttention`; the head reads the first token."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        build = dict(batch_first=True) | variant.build
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, HEADS, **build) for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        oracles.randomise(self.double().eval())

    def forward(self, x: Tensor) -> Tensor:
        first = self.variant.build.get("batch_first", True)
        for attention in self.attention:
            state = self.norm(x)
            state = state if first else state.transpose(0, 1)
            output = attention(state, state, state, **self.variant.call)[0]
            x = x + (output if first else output.transpose(0, 1))
        return self.head(self.norm(x)[:, 1])

    def written_out(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        masks = {
            name: mask
            for name, mask in self.variant.call.items()
            if name in ("key_padding_mask", "attn_mask")
        }
        for attention in self.attention:
            x = x + attend(attention, self.norm(x), kept, **masks)
        return self.head(self.norm(x)[:, 1])


WEIGHTS = dict(need_weights=True)
OUTPUT = dict(need_weights=False)
VARIANTS = [
    Variant("weights", {}, WEIGHTS),
    Variant("weights of every head", {}, WEIGHTS | dict(average_attn_weights=False)),
    Variant("output only", {}, OUTPUT),
    Variant("tokens first", dict(batch_first=False), WEIGHTS),
    Variant("tokens first, output only", dict(batch_first=False), OUTPUT),
    Variant("no bias", dict(bias=False), OUTPUT),
    Variant("dropout in evaluation", dict(dropout=0.3), WEIGHTS),
    Variant("dropout in evaluation, output only", dict(dropout=0.3), OUTPUT),
    Variant("bias_kv", dict(add_bias_kv=True), WEIGHTS),
    Variant("bias_kv, output only", dict(add_bias_kv=True), OUTPUT),
    Variant("zero_attn", dict(add_zero_attn=True), WEIGHTS),
    Variant("zero_attn, output only", dict(add_zero_attn=True), OUTPUT),
    Variant("bias_kv, zero_attn, padding", dict(add_bias_kv=True, add_zero_attn=True),
            OUTPUT | dict(key_padding_mask=PADDING)),
    Variant("own weights of k and v", dict(kdim=WIDTH, vdim=WIDTH), WEIGHTS),
    Variant("padding", {}, WEIGHTS | dict(key_padding_mask=PADDING)),
    Variant("padding, output only", {}, OUTPUT | dict(key_padding_mask=PADDING)),
    Variant("added padding", {}, OUTPUT | dict(key_padding_mask=PADDING.double() * -1.5)),
    Variant("blocked", {}, WEIGHTS | dict(attn_mask=BLOCKED)),
    Variant("blocked, output only", {}, OUTPUT | dict(attn_mask=BLOCKED)),
    Variant("added", {}, OUTPUT | dict(attn_mask=ADDED)),
    Variant("added per head", {}, WEIGHTS | dict(attn_mask=PER_HEAD)),
    Variant("added per head, output only", {}, OUTPUT | dict(attn_mask=PER_HEAD)),
    Variant("blocked and padding", {}, OUTPUT | dict(attn_mask=BLOCKED, key_padding_mask=PADDING)),
]  # fmt: skip


def separate_weights(model: Classifier) -> None:
    """Keys as wide as the queries would share one weight; make it three, as `kdim` means."""
    for module in model.attention:
        q, k, v = (nn.Parameter(part.detach().clone()) for part in module.in_proj_weight.chunk(3))
        module.in_proj_weight = None
        module.q_proj_weight, module.k_proj_weight, module.v_proj_weight = q, k, v
        module._qkv_same_embed_dim = False


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_multihead_attention(variant: Variant, frozen: bool) -> None:
    model = Classifier(variant)
    if "kdim" in variant.build:
        separate_weights(model)
    with torch.no_grad():
        torch.testing.assert_close(model(features()), model.written_out(features(), []))
    kept: list[Tensor] = []
    maps = oracles.maps_from(lambda: model.written_out(features(), kept), kept, TARGETS)
    # The keys that the module itself adds are no tokens: nothing is read from them.
    expected = oracles.read_row(oracles.propagate([one[..., :TOKENS] for one in maps]), 1)
    model.requires_grad_(not frozen)
    method = GenericAttention(model)
    values = method.attribute(features(), torch.tensor(TARGETS), return_input_shape=False)
    laws.assert_same(values, expected)
    relevance = method.relevance(features(), torch.tensor(TARGETS))
    assert laws.used_modules(relevance) == ["attention.0", "attention.1"]
    assert [call.heads for call in relevance.calls] == [HEADS, HEADS]


def test_weights_that_the_module_returns_do_not_mislead() -> None:
    """They are off the path to the score, averaged over heads, and used for something else."""

    class Reporting(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            self.reported = []
            for attention in self.attention:
                output, weights = attention(self.norm(x), self.norm(x), self.norm(x))
                self.reported.append(-(weights * weights.clamp(min=1e-9).log()).sum(-1).mean())
                x = x + output
            return self.head(self.norm(x)[:, 1])

    model = Reporting(Variant("weights", {}, WEIGHTS))
    kept: list[Tensor] = []
    maps = oracles.maps_from(lambda: model.written_out(features(), kept), kept, TARGETS)
    expected = oracles.read_row(oracles.propagate(maps), 1)
    # Queries, keys and values are three tensors here, all of one state: self-attention.
    actual = GenericAttention(model).attribute(
        features(), torch.tensor(TARGETS), return_input_shape=False
    )
    laws.assert_same(actual, expected)


# --- nn.TransformerEncoder --------------------------------------------------------------------

ENCODERS = {
    "plain": ({}, {}),
    "norm first": (dict(norm_first=True), {}),
    "gelu": (dict(activation="gelu"), {}),
    "padding": ({}, dict(src_key_padding_mask=PADDING)),
    "padding, norm first": (dict(norm_first=True), dict(src_key_padding_mask=PADDING)),
    "causal": ({}, dict(mask=CAUSAL, is_causal=True)),
    "causal, padding": (
        {},
        dict(mask=CAUSAL, src_key_padding_mask=PADDING),
    ),
}


class TextClassifier(nn.Module):
    """Ids through `nn.TransformerEncoder`, read at the last token that is no padding."""

    def __init__(self, nested: bool = True, **layer: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(30, WIDTH)
        self.position = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        one = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=True, **layer)
        self.encoder = nn.TransformerEncoder(one, 3, enable_nested_tensor=nested)
        self.head = nn.Linear(WIDTH, 4)
        oracles.randomise(self.double().eval())

    def forward(self, input_ids: Tensor, **masks: Tensor | bool) -> Tensor:
        return self.head(self.encoder(self.words(input_ids) + self.position, **masks)[:, 3])

    def written_out(self, input_ids: Tensor, kept: list[Tensor], **masks: Tensor | bool) -> Tensor:
        x = self.words(input_ids) + self.position
        for layer in self.encoder.layers:
            x = encode(
                layer,
                x,
                kept,
                key_padding_mask=masks.get("src_key_padding_mask"),
                attn_mask=masks.get("mask"),
            )
        return self.head(x[:, 3])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("nested", [False, True], ids=["dense", "nested"])
@pytest.mark.parametrize("name", ENCODERS)
def test_transformer_encoder(name: str, nested: bool, frozen: bool) -> None:
    layer, masks = ENCODERS[name]
    model = TextClassifier(nested, **layer)
    ids = torch.randint(30, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the fused fast path of PyTorch, where it has one
        torch.testing.assert_close(model(ids, **masks), model.written_out(ids, [], **masks))
    kept: list[Tensor] = []
    maps = oracles.maps_from(lambda: model.written_out(ids, kept, **masks), kept, TARGETS)
    expected = oracles.read_row(oracles.propagate(maps), 3)
    model.requires_grad_(not frozen)
    forward: Callable[..., Tensor] = lambda input_ids: model(input_ids, **masks)
    method = GenericAttention(forward)
    laws.assert_same(method.attribute(ids, torch.tensor(TARGETS)), expected)
    seen, relevance = laws.output_under_capture(
        model, lambda: method.relevance(ids, torch.tensor(TARGETS))
    )
    with torch.no_grad():
        laws.assert_same(seen, model(ids, **masks), 1e-9)
    modules = laws.used_modules(relevance)
    assert len(modules) == 3
    assert all(f"encoder.layers.{i}.self_attn" in name for i, name in enumerate(modules))
    assert {call.heads for call in relevance.calls} == {HEADS}
    assert list(relevance.streams) == ["input_ids"]


def test_transformer_encoder_batch_is_its_examples() -> None:
    model = TextClassifier().requires_grad_(False)
    ids = torch.randint(30, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    laws.assert_batch_is_its_examples(GenericAttention(model), ids, TARGETS)


# --- torchvision ------------------------------------------------------------------------------


def torchvision_vit() -> nn.Module:
    vit = pytest.importorskip("torchvision.models.vision_transformer", reason="needs torchvision")
    model = vit.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=3, hidden_dim=24, mlp_dim=32,
        num_classes=5,
    )  # fmt: skip
    return oracles.randomise(model.eval().double())


def test_torchvision_vit() -> None:
    model = torchvision_vit()
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)).double()
    with oracles.exposed_fused_attention() as kept:
        maps = oracles.maps_from(lambda: model(pictures), kept, TARGETS)
    assert len(maps) == 3
    expected = oracles.read_row(oracles.propagate(maps), 0)[:, 1:].reshape(2, 4, 4)
    method = GenericAttention(model, interpolation="nearest")
    targets = torch.tensor(TARGETS)
    laws.assert_same(method.attribute(pictures, targets, return_input_shape=False), expected)
    cells = expected.repeat_interleave(16, 1).repeat_interleave(16, 2)
    laws.assert_same(method.attribute(pictures, targets), cells[:, None].expand(-1, 3, -1, -1))
    assert laws.used_modules(method.relevance(pictures, targets)) == [
        f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(3)
    ]
    laws.assert_batch_is_its_examples(method, pictures, TARGETS)
    laws.assert_grid_order(lambda leaf: model.conv_proj(leaf).flatten(2).mT, pictures[:1], (4, 4))
    seen, _ = laws.output_under_capture(model, lambda: method.attribute(pictures, 1))
    with torch.no_grad():
        laws.assert_same(seen, model(pictures), 1e-12)


def test_torchvision_vit_as_it_is_born_explains_nothing() -> None:
    """Its head is zero: no gradient reaches any attention, which is said and not hidden."""
    model = torchvision_vit()
    nn.init.zeros_(model.heads.head.weight)
    pictures = torch.randn(1, 3, 64, 64).double()
    with pytest.warns(UserWarning, match=r"(?i)zero|gradient"):
        heatmap = GenericAttention(model).attribute(pictures, 0)
    assert heatmap.shape == pictures.shape
    assert not heatmap.any()
