"""What the method is not defined for is refused; messages name the module and what was seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import encoder, laws, oracles
from zoo.encoder import HEADS, SCALE, WIDTH, Block, Encoder, plain

from captum_generic_attn import GenericAttention, UnsupportedAttentionError

TARGET = 1


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def explain(model: Callable[..., Tensor], inputs: Any, **options: Any) -> Any:
    return GenericAttention(model, **options).attribute(inputs, TARGET, return_input_shape=False)


def refusal(model: Callable[..., Tensor], inputs: Any, **options: Any) -> str:
    with pytest.raises(UnsupportedAttentionError) as caught:
        explain(model, inputs, **options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# --- no attention at all ----------------------------------------------------------------------


def test_convolutions_have_no_attention() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    message = refusal(model.eval(), torch.randn(2, 3, 8, 8))
    assert "no attention" in message.lower()


def test_perceptrons_have_no_attention() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5))
    assert "no attention" in refusal(model.eval(), torch.randn(2, 8)).lower()


def test_class_probabilities_are_no_attention() -> None:
    """A softmax over classes, and one multiplied with a matrix of prototypes."""

    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 5)
            self.prototypes = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).softmax(-1) @ self.prototypes

    with pytest.raises(UnsupportedAttentionError):
        explain(Prototypes(), torch.randn(2, 8))


def test_layers_and_what_else_is_there() -> None:
    """A model with attention that `layers=` leaves out."""
    with pytest.raises((ValueError, KeyError), match=r"blocks\.0\.mlp"):
        explain(Encoder(fused), encoder.features(), layers=["blocks.0.mlp"])


# --- products that are no attention of tokens -------------------------------------------------


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = plain(q, k)
    return weights @ v + weights @ v.flip(-1)


def product_of_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A small Nyström attention: two probabilities are multiplied before V."""
    return (plain(q, k) @ plain(k, q)) @ v


def without_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Factorised attention: a softmax of the keys alone."""
    return q @ (k.softmax(dim=2).mT @ v)


def by_feature(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights that differ by feature of a token, without a query."""
    return ((q + k).softmax(-2) * v).sum(-2, keepdim=True).expand(v.shape)


def over_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cross-covariance attention: d × d probabilities."""
    return ((q.mT @ k * SCALE).softmax(-1) @ v.mT).mT


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.relu() @ (k.relu().mT @ v)


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).sigmoid() @ v


def never_meets_v(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A gate inside an attention module: a softmax of q·k times values, element by element."""
    return v * plain(q, k).diagonal(dim1=-2, dim2=-1)[..., None]


def by_custom_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return CustomAttention.apply(q, k, v)


class CustomAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = plain(q, k)
        ctx.save_for_backward(weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        (weights,) = ctx.saved_tensors
        return None, None, weights.mT @ gradient


def reentrant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(
        lambda *operands: plain(*operands[:2]) @ operands[2], q, k, v, use_reentrant=True
    )


def inference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode():
        return plain(q, k) @ v


REFUSED = {
    "probabilities in two products": (two_products, r"more than one|two|several|twice"),
    "product of probabilities": (product_of_probabilities, r"probabilit"),
    "softmax of keys alone": (without_queries, r"quer|product|q·k"),
    "softmax for each feature": (by_feature, r"quer|product|q·k"),
    "channels": (over_channels, r"channel|token"),
    "linear": (linear, r"softmax|attention|normali"),
    "sigmoid": (sigmoid, r"softmax|attention|normali"),
    "never meets V": (never_meets_v, r"product|never|softmax|V\b"),
    "custom autograd function": (by_custom_function, r"gradient|autograd"),
    "reentrant checkpoint": (reentrant, r"gradient|checkpoint"),
    "inference mode inside": (inference, r"gradient|inference"),
}


@pytest.mark.filterwarnings("ignore:.*requires_grad=True")
@pytest.mark.parametrize("vocabulary", [None, 20], ids=["features", "ids"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_name_of_the_module(name: str, vocabulary: int | None) -> None:
    form, seen = REFUSED[name]
    model = Encoder(form, vocabulary=vocabulary, read="mean")
    inputs = encoder.ids() if vocabulary else encoder.features()
    with pytest.raises(UnsupportedAttentionError, match=rf"(?i){seen}") as caught:
        explain(model, inputs)
    assert "blocks.0.attention" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*requires_grad=True")
@pytest.mark.parametrize("name", ["probabilities in two products", "channels", "linear"])
def test_one_bad_layer_refuses_the_whole_and_strict_false_keeps_the_rest(name: str) -> None:
    form, _ = REFUSED[name]
    model = Encoder(fused, blocks=[Block(fused), Block(form)], read="mean")
    inputs = encoder.features()
    assert "blocks.1.attention" in refusal(model, inputs)
    with pytest.warns(UserWarning, match=r"blocks\.1\.attention"):
        relevance = GenericAttention(model, strict=False).relevance(inputs, TARGET)
    used = [call.module for call in relevance.calls if call.used]
    assert used == ["blocks.0.attention"]
    # With the bad layer left out by the user there is nothing to refuse.
    left = explain(model, inputs, layers=["blocks.0"])
    assert left.any()


@pytest.mark.parametrize("where", ["before", "beside"])
def test_softmax_gates_that_never_meet_v_are_ignored(where: str) -> None:
    """A router of experts or a selective kernel is no attention over tokens."""

    class Gated(Block):
        def __init__(self) -> None:
            super().__init__(fused)
            self.router = nn.Linear(WIDTH, 3)
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            gates = self.router(x).softmax(dim=-1)
            mixed = sum(
                expert(x) * gate[..., None]
                for expert, gate in zip(self.experts, gates.unbind(-1), strict=True)
            )
            x = x + mixed if where == "before" else x
            out = super().forward(x)
            return out + mixed if where == "beside" else out

    model, inputs = Encoder(fused, blocks=[Gated(), Gated()]), encoder.features()
    expected = encoder.expected_tokens(model, inputs, TARGET)
    laws.assert_same(explain(model, inputs), expected)
    used = laws.used_modules(GenericAttention(model).relevance(inputs, TARGET))
    assert used == ["blocks.0.attention", "blocks.1.attention"]


# --- modules that cannot be seen into ---------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compile_", [torch.jit.script, "trace"], ids=["script", "trace"])
def test_scripted_and_traced_modules(compile_: Any) -> None:
    class Scriptable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.head = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = x + F.scaled_dot_product_attention(x, x, x)
            return self.head(x[:, 0])

    model = oracles.randomise(Scriptable().double().eval())
    inputs = encoder.features()
    compiled = torch.jit.trace(model, inputs) if compile_ == "trace" else compile_(model)
    message = refusal(compiled, inputs)
    assert "script" in message.lower() or "trace" in message.lower()

    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = compiled

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    assert "inner" in refusal(Holding(), inputs)


def test_data_parallel_without_devices_is_its_module() -> None:
    if torch.cuda.device_count():
        pytest.skip("with a GPU the replicas run in threads of their own")
    model = nn.DataParallel(Encoder(fused))
    expected = encoder.expected_tokens(model.module, encoder.features(), TARGET)
    laws.assert_same(explain(model, encoder.features()), expected)


def test_data_parallel_over_devices_asks_for_the_module_inside() -> None:
    model = nn.DataParallel(Encoder(fused))
    model.device_ids = [0, 1]  # what it would hold on a machine with two
    message = refusal(model, encoder.features())
    assert "DataParallel" in message
    assert ".module" in message


def test_work_in_another_thread_is_not_missed() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = Encoder(fused)

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self.inner, x).result()

    with pytest.raises(UnsupportedAttentionError):
        explain(Elsewhere(), encoder.features())


def test_flex_attention_says_what_to_use() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="an older torch")

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex.flex_attention(q, k, v)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex_attention itself warns that it is not compiled
        model = Encoder(form).float().requires_grad_(False)
        message = refusal(model, encoder.features().float())
    assert "flex" in message
    assert "blocks.0.attention" in message
    assert "sdpa" in message.lower() or "eager" in message.lower()


# --- whole models -----------------------------------------------------------------------------


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="a cache of keys needs a model")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    return oracles.randomise(transformers.LlamaForCausalLM(config).eval().double())


def test_filled_cache_is_refused() -> None:
    model = tiny_llama()
    with torch.no_grad():
        cache = model(torch.arange(4)[None], use_cache=True).past_key_values

    def forward(input_ids: Tensor) -> Tensor:
        return model(input_ids, past_key_values=cache).logits[:, -1]

    with pytest.raises(UnsupportedAttentionError, match=r"(?i)cache|keys") as caught:
        explain(forward, torch.arange(4, 7)[None])
    assert "layers.0.self_attn" in str(caught.value)


def drawn(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm", reason="the families of timm need timm")
    size = options["img_size"]
    model = timm.create_model(name, num_classes=5, **options)
    pictures = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return oracles.randomise(model.eval()), pictures


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_between_channels_is_refused_not_wrong() -> None:
    model, pictures = drawn("xcit_nano_12_p16_224", img_size=64, embed_dim=16, depth=2, num_heads=2)
    message = refusal(model, pictures)
    assert "blocks.0.attn (XCA): attention between channels, not between tokens" in message


def skipping(model: nn.Module, pictures: Tensor) -> tuple[Tensor, list[str], list[str]]:
    """With `strict=False`: the map, the one warning's lines, and the modules that counted."""
    method = GenericAttention(model, strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        heatmap = method.attribute(pictures, 1)
    ours = [str(one.message) for one in caught if one.category is UserWarning]
    assert len(ours) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = method.relevance(pictures, 1).calls
    return heatmap, ours[0].splitlines()[1:], [call.module for call in calls if call.used]


def test_a_real_model_s_class_attention_is_left_where_its_channels_are_skipped() -> None:
    model, pictures = drawn("xcit_nano_12_p16_224", img_size=64, embed_dim=16, depth=2, num_heads=2)
    heatmap, skipped, used = skipping(model, pictures)
    assert used == ["cls_attn_blocks.0.attn", "cls_attn_blocks.1.attn"]
    assert [line.split()[0] for line in skipped] == ["blocks.0.attn", "blocks.1.attn"]
    assert heatmap.shape == pictures.shape
    assert heatmap.isfinite().all()
    assert heatmap.max() > 0


def test_a_real_model_with_nothing_but_channels_has_nothing_left() -> None:
    timm = pytest.importorskip("timm", reason="EdgeNeXt is timm's")
    model = oracles.randomise(timm.create_model("edgenext_xx_small", num_classes=5).eval())
    pictures = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = refusal(model, pictures, strict=False)
    assert message.startswith("no attention was found")
    assert "(CrossCovarianceAttn): attention between channels, not between tokens" in message


def test_tokens_that_are_added_into_a_constant_are_lost_by_name() -> None:
    """As the experts of JetMoE: the first argument has no tokens, another one has."""

    class Scattered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            blank = torch.zeros(x.shape, dtype=x.dtype)
            x = blank.index_add(1, torch.arange(x.shape[1]), x)
            return nn.functional.scaled_dot_product_attention(x, x, x)[:, 0]

    with pytest.raises(UnsupportedAttentionError, match="could not be followed through index_add"):
        GenericAttention(Scattered()).attribute(torch.rand(2, 4, 8), target=1)


@pytest.mark.parametrize(
    ("fixed", "advice"),
    [
        ([[1, 2, 1]], "one token stands in several places .* pass their ids as an input or among"),
        ([[1, 2], [1, 3]], "is a query in several sequences .* leave them out with layers="),
    ],
)
def test_texts_that_a_function_holds_fixed(fixed: list[list[int]], advice: str) -> None:
    """As the captions that a dual encoder compares each image with; the advice works."""
    torch.manual_seed(0)
    embed = nn.Embedding(5, 8)
    pictures, texts = (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval() for _ in range(2)
    )
    model = nn.ModuleDict({"pictures": pictures, "texts": texts, "embed": embed})

    def scores(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        found = model["texts"](model["embed"](ids)).mean(1)
        return model["pictures"](x)[:, 0] @ found.T

    ids = torch.tensor(fixed)
    x = torch.randn(1, 4, 8)
    with pytest.raises(UnsupportedAttentionError, match=advice):
        GenericAttention(lambda x: scores(x, ids)).attribute(x, 0)
    kept = GenericAttention(lambda x: scores(x, ids), layers=[pictures]).attribute(x, 0)
    assert kept.abs().sum() > 0
    if len(fixed) == 1:
        passed = GenericAttention(scores).attribute(x, 0, ids)
        assert torch.allclose(passed, kept)


def test_tokens_along_the_batch_axis_say_what_is_likely() -> None:
    """`nn.MultiheadAttention` without `batch_first` that gets the batch first."""
    layer = nn.MultiheadAttention(8, 2).eval()
    with pytest.raises(UnsupportedAttentionError, match="batch_first=True"):
        GenericAttention(lambda x: layer(x, x, x)[0][:, 0]).attribute(torch.rand(2, 4, 8), 0)


def test_a_convolutional_network_is_sent_to_methods_that_fit_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    with pytest.raises(UnsupportedAttentionError, match=r"no transformer \(.* such as captum"):
        GenericAttention(model).attribute(torch.rand(1, 3, 8, 8), 0)
