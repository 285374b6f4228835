"""Hugging Face models of many families, fused and eager, against Captum's own products A ⊙ ∇A."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the families need transformers")

from captum_generic_attn import GenericAttention  # noqa: E402
from zoo import laws, oracles  # noqa: E402

TARGETS = (2, 1)
WIDE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
)
TEXT = WIDE | dict(vocab_size=100, max_position_embeddings=64)
LLAMA = TEXT | dict(num_key_value_heads=2, pad_token_id=0)
PICTURE = WIDE | dict(image_size=(32, 48), patch_size=8)
GRID = (4, 6)
LENGTHS = (8, 6)


@dataclass(frozen=True)
class Family:
    """One architecture, made small.

    `reads`: which rows the head reads: "first", "last" (of the tokens that are no padding), "all".
    `layers`: the modules that hold the attention calls, `{}` standing for the layer.
    """

    name: str
    model: str
    config: str
    layers: str
    options: dict[str, Any] = field(default_factory=dict)
    reads: str = "first"
    prefix: int | None = None  # tokens before the patches; None: text
    fused: bool = True
    shared: bool = False
    exposed: str = ""  # the modules whose outputs show the probabilities, where Captum sees none

    def make(self, implementation: str) -> nn.Module:
        config = getattr(transformers, self.config)(**self.options, num_labels=3)
        model = getattr(transformers, self.model)._from_config(
            config, attn_implementation=implementation
        )
        return oracles.randomise(model.eval().double())

    def module_names(self) -> list[str]:
        return [self.layers.format(0 if self.shared else i) for i in range(2)]


def text(name: str, model: str, layers: str, **rest: Any) -> Family:
    rest["options"] = TEXT | rest.pop("options", {})
    return Family(name, f"{model}ForSequenceClassification", f"{model}Config", layers, **rest)


def causal(name: str, model: str, layers: str, **rest: Any) -> Family:
    rest = dict(options=LLAMA, reads="last") | rest
    return Family(name, f"{model}ForSequenceClassification", f"{model}Config", layers, **rest)


def vision(name: str, model: str, layers: str, **rest: Any) -> Family:
    rest["options"] = PICTURE | rest.pop("options", {})
    rest = dict(prefix=1) | rest
    return Family(name, f"{model}ForImageClassification", f"{model}Config", layers, **rest)


DISTILBERT = dict(
    vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
)
DISENTANGLED = dict(relative_attention=True, pos_att_type=["c2p", "p2c"])
FAMILIES = [
    text("bert", "Bert", "bert.encoder.layer.{}.attention.self"),
    text("roberta", "Roberta", "roberta.encoder.layer.{}.attention.self"),
    text("electra", "Electra", "electra.encoder.layer.{}.attention.self",
         options=dict(embedding_size=16)),
    text("albert", "Albert", "albert.encoder.albert_layer_groups.0.albert_layers.{}.attention",
         options=dict(embedding_size=16), shared=True,
         exposed="albert.encoder.albert_layer_groups.0.albert_layers.0.attention"),
    Family("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig",
           "distilbert.transformer.layer.{}.attention", DISTILBERT),
    text("deberta-v2", "DebertaV2", "deberta.encoder.layer.{}.attention.self", fused=False,
         options=DISENTANGLED | dict(position_buckets=8, norm_rel_ebd="layer_norm",
                                     share_att_key=True),
         exposed="deberta.encoder.layer.{}.attention.self.dropout"),
    text("deberta", "Deberta", "deberta.encoder.layer.{}.attention.self", fused=False,
         options=DISENTANGLED, exposed="deberta.encoder.layer.{}.attention.self.dropout"),
    text("modernbert", "ModernBert", "model.layers.{}.attn",
         options=dict(pad_token_id=0, global_attn_every_n_layers=2, local_attention=4)),
    causal("gpt2", "GPT2", "transformer.h.{}.attn",
           options=dict(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                        pad_token_id=0)),
    causal("llama", "Llama", "model.layers.{}.self_attn"),
    causal("mistral", "Mistral", "model.layers.{}.self_attn",
           options=LLAMA | dict(sliding_window=3)),
    # Logits capped by tanh between the product of queries and keys and its softmax.
    causal("gemma2", "Gemma2", "model.layers.{}.self_attn", fused=False,
           options=LLAMA | dict(head_dim=8, attn_logit_softcapping=5.0)),
    causal("qwen3", "Qwen3", "model.layers.{}.self_attn", options=LLAMA | dict(head_dim=8)),
    causal("gpt-neox", "GPTNeoX", "gpt_neox.layers.{}.attention",
           options=TEXT | dict(pad_token_id=0)),
    vision("vit", "ViT", "vit.layers.{}.attention"),
    vision("deit", "DeiT", "deit.layers.{}.attention", prefix=2),
    # Positions born for 5 × 5 patches, interpolated to the 4 × 6 of the picture.
    vision("dinov2", "Dinov2", "dinov2.encoder.layer.{}.attention", reads="all",
           options=dict(image_size=40)),
    vision("dinov2-registers", "Dinov2WithRegisters",
           "dinov2_with_registers.encoder.layer.{}.attention", reads="all", prefix=3,
           options=dict(image_size=40, num_register_tokens=2)),
    vision("beit", "Beit", "beit.layers.{}.attention", reads="patches",
           options=dict(use_relative_position_bias=True)),
]  # fmt: skip


@dataclass(frozen=True)
class Explained:
    """A family's inputs, a callable of them, and the values that must come out."""

    family: Family
    models: dict[str, nn.Module]
    inputs: Tensor
    extra: tuple[Tensor, ...]
    expected: dict[str, Tensor]

    def forward(self, implementation: str) -> Callable[..., Any]:
        model = self.models[implementation]
        if self.family.prefix is not None:
            return model
        # GPT-2's second positional argument is no mask: name it.
        return lambda input_ids, mask: model(input_ids=input_ids, attention_mask=mask)


def example_inputs(family: Family) -> tuple[Tensor, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(4)
    if family.prefix is not None:
        return torch.randn(2, 3, 32, 48, generator=generator, dtype=torch.float64), ()
    ids = torch.randint(5, 90, (2, max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return ids * mask, (mask.long(),)


def row_weights(family: Family, tokens: int) -> Tensor:
    weights = torch.zeros(2, tokens, dtype=torch.float64)
    if family.reads == "first":
        weights[:, 0] = 1
    elif family.reads == "last":
        weights[torch.arange(2), torch.tensor(LENGTHS) - 1] = 1
    elif family.reads == "patches":
        weights[:, family.prefix :] = 1 / (tokens - family.prefix)
    elif family.prefix is not None and family.prefix > 1:  # class token and patches, no registers
        weights[:, [0, *range(family.prefix, tokens)]] = 1 / (1 + tokens - family.prefix)
    else:
        weights[:] = 1 / tokens
    return weights


def values(family: Family, maps: list[Tensor]) -> Tensor:
    relevance = oracles.propagate(maps)
    row = oracles.read_row(relevance, row_weights(family, relevance.shape[-1]))
    return row if family.prefix is None else row[:, family.prefix :].reshape(-1, *GRID)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def explained(request: pytest.FixtureRequest) -> Explained:
    family = request.param
    models = {"eager": family.make("eager")}
    if family.fused:
        models["sdpa"] = family.make("sdpa")
    inputs, extra = example_inputs(family)
    eager = models["eager"]

    def forward(inputs: Tensor) -> Tensor:
        return eager(inputs, **({"attention_mask": extra[0]} if extra else {})).logits

    if family.exposed:
        names = dict.fromkeys(family.exposed.format(i) for i in range(2))
        with oracles.exposed_outputs([eager.get_submodule(name) for name in names]) as kept:
            maps = oracles.maps_from(lambda: forward(inputs), kept, TARGETS)
    else:
        layers = [eager.get_submodule(name) for name in family.module_names()]
        maps = oracles.captum_maps(forward, layers, inputs, torch.tensor(TARGETS))
    assert len(maps) == 2
    expected = {"eager": values(family, maps)}
    if family.fused:
        fused = models["sdpa"]
        mask = {"attention_mask": extra[0]} if extra else {}
        with oracles.exposed_fused_attention() as kept:
            maps = oracles.maps_from(lambda: fused(inputs, **mask).logits, kept, TARGETS)
        assert len(maps) == 2
        expected["sdpa"] = values(family, maps)
    return Explained(family, models, inputs, extra, expected)


@pytest.fixture(params=["sdpa", "eager"])
def implementation(request: pytest.FixtureRequest, explained: Explained) -> str:
    if request.param not in explained.models:
        pytest.skip("this family has no fused attention")
    return request.param


def test_explanation_equals_the_reference(explained, implementation):
    method = GenericAttention(explained.forward(implementation))
    actual = method.attribute(
        explained.inputs, torch.tensor(TARGETS), explained.extra or None, return_input_shape=False
    )
    laws.assert_same(actual, explained.expected[implementation])


def test_captum_and_the_fused_call_written_out_agree(explained):
    if "sdpa" not in explained.models:
        pytest.skip("this family has no fused attention")
    # Most eager families compute their softmax in float32, whatever the model's dtype is.
    laws.assert_same(explained.expected["sdpa"], explained.expected["eager"], 1e-6)


def test_calls_rows_and_output(explained, implementation):
    model = explained.models[implementation]
    forward = explained.forward(implementation)
    method = GenericAttention(forward)
    seen, relevance = laws.output_under_capture(
        model,
        lambda: method.relevance(explained.inputs, torch.tensor(TARGETS), explained.extra or None),
        "logits",
    )
    with torch.no_grad():
        laws.assert_same(seen, forward(explained.inputs, *explained.extra).logits, 1e-12)
    used = [call for call in relevance.calls if call.used]
    assert len(used) == 2
    for call, name in zip(used, explained.family.module_names(), strict=True):
        assert call.module == name or call.module.endswith(f".{name}")
    assert {call.heads for call in used} == {4}
    name = "input_ids" if explained.extra else "pixel_values"
    assert {call.query_stream for call in relevance.calls} == {name}
    rows = relevance.rows[name].double()
    weights = row_weights(explained.family, relevance.streams[name].tokens)
    torch.testing.assert_close(rows, weights, rtol=0, atol=1e-7)


def test_batch_is_its_examples(explained):
    fused = "sdpa" if "sdpa" in explained.models else "eager"
    method = GenericAttention(explained.forward(fused))
    laws.assert_batch_is_its_examples(method, explained.inputs, TARGETS, explained.extra)


def test_values_in_the_shape_of_the_input(explained, implementation):
    method = GenericAttention(explained.forward(implementation), interpolation="nearest")
    actual = method.attribute(explained.inputs, torch.tensor(TARGETS), explained.extra or None)
    expected = explained.expected[implementation]
    if explained.family.prefix is not None:
        expected = expected.repeat_interleave(8, 1).repeat_interleave(8, 2)
        expected = expected[:, None].expand(-1, 3, -1, -1)
    laws.assert_same(actual, expected)
    if explained.extra:  # padding gets nothing
        assert not actual[1, LENGTHS[1] :].any()
        assert actual[1, : LENGTHS[1]].any()


# --- the last token of a language model -------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
@pytest.mark.parametrize("cache", [False, True], ids=["no cache", "an empty cache"])
@pytest.mark.parametrize("position", [5, 3])
def test_next_token_of_a_language_model(name: str, cache: bool, position: int) -> None:
    options = {
        "GPT2": dict(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "Llama": LLAMA,
    }[name]
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    model = oracles.randomise(model(config).eval().double())
    ids = torch.randint(5, 90, (1, 6), generator=torch.Generator().manual_seed(4))
    forward: Callable[[Tensor], Tensor] = lambda input_ids: model(input_ids, use_cache=cache).logits
    with oracles.exposed_fused_attention() as kept:
        maps = oracles.maps_from(lambda: forward(ids)[:, position], kept, (17,))
    relevance = oracles.propagate(maps)
    expected = oracles.read_row(relevance, position)
    assert not expected[:, position:].any()
    actual = GenericAttention(forward).attribute(ids, (position, 17))
    laws.assert_same(actual, expected)
    matrix = (
        GenericAttention(forward).relevance(ids, (position, 17)).matrix("input_ids", "input_ids")
    )
    laws.assert_same(matrix, relevance)
    assert torch.equal(matrix, matrix.tril())
