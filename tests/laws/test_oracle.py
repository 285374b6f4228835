"""Two independent references: Captum's layer products, and plain autograd on models of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn
from zoo import encoder, laws, oracles
from zoo.encoder import Encoder

from captum_generic_attn import GenericAttention

WIDE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Bert": (
        "SequenceClassification",
        WIDE | dict(vocab_size=100, max_position_embeddings=64),
        "bert.encoder.layer.{}.attention.self",
    ),
    "GPT2": (
        "SequenceClassification",
        dict(vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0),
        "transformer.h.{}.attn",
    ),
    "ViT": (
        "ImageClassification",
        WIDE | dict(image_size=(32, 24), patch_size=8),
        "vit.layers.{}.attention",
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor, list[nn.Module]]:
    transformers = pytest.importorskip("transformers", reason="the oracle needs eager HF models")
    task, options, layers = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**options, num_labels=3)
    model = getattr(transformers, f"{name}For{task}")._from_config(
        config, attn_implementation="eager"
    )
    oracles.randomise(model.eval().double())
    generator = torch.Generator().manual_seed(6)
    if name == "ViT":
        inputs = torch.randn(2, 3, 32, 24, generator=generator, dtype=torch.float64)
    else:
        inputs = torch.randint(5, 90, (2, 9), generator=generator)
    return model, inputs, [model.get_submodule(layers.format(i)) for i in range(3)]


@pytest.mark.parametrize("target", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_matrix_equals_four_lines_of_captum(name: str, target: int) -> None:
    model, inputs, layers = build(name)
    oracle = LayerGradientXActivation(lambda x: model(x).logits, layers)
    expected = torch.eye(9 if inputs.ndim == 2 else 13, dtype=torch.float64).repeat(2, 1, 1)
    for _output, product in oracle.attribute(inputs, target):
        expected = expected + product.detach().clamp(min=0).mean(1) @ expected
    relevance = GenericAttention(model).relevance(inputs, target)
    (stream,) = relevance.streams
    assert stream == ("pixel_values" if name == "ViT" else "input_ids")
    laws.assert_same(relevance.matrix(stream, stream), expected)


@pytest.mark.parametrize("name", MODELS)
def test_per_head_products_equal_those_of_captum(name: str) -> None:
    model, inputs, layers = build(name)
    oracle = LayerGradientXActivation(lambda x: model(x).logits, layers)
    products = [product.detach() for _output, product in oracle.attribute(inputs, 1)]
    calls = GenericAttention(model).relevance(inputs, 1, keep_calls=True).calls
    assert len(calls) == 3
    for call, product in zip(calls, products, strict=True):
        laws.assert_same(call.map, product.clamp(min=0).mean(1))
        laws.assert_same(call.per_head.clamp(min=0), product.clamp(min=0))


@pytest.mark.parametrize("form", ["fused", "eager"])
@pytest.mark.parametrize("seed", range(4))
def test_matrix_equals_plain_autograd(form: str, seed: int) -> None:
    forms = {
        "fused": F.scaled_dot_product_attention,
        "eager": lambda q, k, v: encoder.plain(q, k) @ v,
    }
    model = Encoder(forms[form], depth=4)
    oracles.randomise(model, seed)
    inputs = encoder.features(seed)
    targets = [seed % 4, (seed + 1) % 4]
    expected = oracles.propagate(encoder.expected_maps(model, inputs, targets))
    relevance = GenericAttention(model).relevance(inputs, torch.tensor(targets))
    laws.assert_same(relevance.matrix("x", "x"), expected)


@pytest.mark.parametrize("read", [0, -1, "mean"])
def test_gradient_of_the_score_with_respect_to_probabilities_by_differences(
    read: int | str,
) -> None:
    """The references rest on autograd: here on differences of the score itself."""
    model, inputs = Encoder(F.scaled_dot_product_attention, read=read), encoder.features()[:1]
    reference, kept = encoder.twin(model)
    reference(inputs)
    attentions = [attention.detach() for attention in kept]
    step = 1e-6

    def score_with(layer: int, attention: Tensor) -> float:
        forms = iter([attention if i == layer else None for i in range(len(attentions))])

        def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            given = next(forms)
            return (encoder.plain(query, key) if given is None else given) @ value

        for block in reference.blocks:
            block.attention.form = form
        with torch.no_grad():
            return reference(inputs)[0, 2].item()

    maps = []
    for layer, attention in enumerate(attentions):
        gradient = torch.zeros_like(attention)
        for index in range(attention.numel()):
            change = torch.zeros_like(attention).flatten()
            change[index] = step
            change = change.view_as(attention)
            gradient.view(-1)[index] = (
                score_with(layer, attention + change) - score_with(layer, attention - change)
            ) / (2 * step)
        maps.append((attention * gradient).clamp(min=0).mean(1))
    expected = oracles.propagate(maps)
    actual = GenericAttention(model).relevance(inputs, 2).matrix("x", "x")
    laws.assert_same(actual, expected, 1e-7)
