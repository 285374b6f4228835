"""Windows scatter into the right tokens, and merged tokens have the right parents: Swin, V1 and V2,
of three libraries.

What attends to what is asked of the models themselves: of each block and each merging layer, which
of its tokens change with which (the pattern of its Jacobian). Nothing is assumed about how windows
are cut, shifted, padded or masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_generic_attn import GenericAttention, Relevance

CLASSES = 5
# Two stages of two layers, so that the windows of every second layer are shifted. 12 × 12 tokens
# are cut into windows without rest; 10 × 10 are padded, and so are the 5 × 5 after merging; of
# 9 × 9, the last row and column are merged with padding.
GEOMETRIES = {
    "windows of 3": (48, 3),
    "padded windows of 4": (40, 4),
    "padded merging": (36, 3),
}
DEPTHS, HEADS, WIDTH = [2, 2], [2, 4], 8


def timm_swin(size: int, window: int, kind: str = "SwinTransformer") -> nn.Module:
    timm = pytest.importorskip("timm.models")
    return getattr(timm, kind)(
        img_size=size, patch_size=4, embed_dim=WIDTH, depths=DEPTHS, num_heads=HEADS,
        window_size=window, num_classes=CLASSES,
    )  # fmt: skip


def torchvision_swin(size: int, window: int, **parts: Any) -> nn.Module:
    torchvision = pytest.importorskip("torchvision.models.swin_transformer")
    return torchvision.SwinTransformer(
        [4, 4], WIDTH, DEPTHS, HEADS, [window, window], num_classes=CLASSES, **parts
    )


def torchvision_swin_v2(size: int, window: int) -> nn.Module:
    torchvision = pytest.importorskip("torchvision.models.swin_transformer")
    return torchvision_swin(
        size, window,
        block=torchvision.SwinTransformerBlockV2, downsample_layer=torchvision.PatchMergingV2,
    )  # fmt: skip


def huggingface(config: str, model: str) -> Callable[[int, int], nn.Module]:
    def build(size: int, window: int) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, model)(
            getattr(transformers, config)(
                image_size=size, patch_size=4, embed_dim=WIDTH, depths=DEPTHS, num_heads=HEADS,
                window_size=window, num_labels=CLASSES,
            )
        )  # fmt: skip

    return build


# Builder, class of a block, class of a merging layer, the head.
MODELS = {
    "timm": (timm_swin, "SwinTransformerBlock", "PatchMerging", "head.fc"),
    "timm V2": (
        partial(timm_swin, kind="SwinTransformerV2"),
        "SwinTransformerV2Block",
        "PatchMerging",
        "head.fc",
    ),
    "torchvision": (torchvision_swin, "SwinTransformerBlock", "PatchMerging", "head"),
    "torchvision V2": (torchvision_swin_v2, "SwinTransformerBlockV2", "PatchMergingV2", "head"),
    "Hugging Face": (
        huggingface("SwinConfig", "SwinForImageClassification"),
        "SwinLayer",
        "SwinPatchMerging",
        "classifier",
    ),
    "Hugging Face V2": (
        huggingface("Swinv2Config", "Swinv2ForImageClassification"),
        "Swinv2Layer",
        "Swinv2PatchMerging",
        "classifier",
    ),
}


@dataclass(frozen=True)
class Swin:
    model: nn.Module
    pictures: Tensor
    head: nn.Linear
    blocks: dict[str, Tensor]
    """Of each block, bool [N, N]: which tokens change (rows) with which (columns)."""
    merging: Tensor
    """Of the only merging layer: bool [merged tokens, tokens]."""

    def relevance(self, *, sign: int = 1) -> Relevance:
        """Of the first class's score, or of its negative."""

        def signed(returned: Any) -> Tensor:
            return sign * (returned if isinstance(returned, Tensor) else returned.logits)

        method = GenericAttention(self.model, output=signed)
        return method.relevance(self.pictures, 0, keep_calls=True)


# One case of each geometry and of each library is quick enough for every run.
QUICK = {
    ("timm", "padded merging"),
    ("torchvision V2", "windows of 3"),
    ("Hugging Face", "padded windows of 4"),
}


def cases() -> list[Any]:
    return [
        pytest.param(
            (model, geometry),
            id=f"{model}, {geometry}",
            marks=() if (model, geometry) in QUICK else pytest.mark.slow,
        )
        for model in MODELS
        for geometry in GEOMETRIES
    ]


@pytest.fixture(scope="module", params=cases())
def swin(request) -> Swin:
    name, geometry = request.param
    build, block, merging, head = MODELS[name]
    size, window = GEOMETRIES[geometry]
    torch.manual_seed(7)
    model = build(size, window).eval().double()
    with torch.no_grad():
        # Some start at zero: norms behind the layers of V2, biases.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    pictures = torch.randn(1, 3, size, size, dtype=torch.float64)
    patterns = patterns_of(model, pictures, (block, merging))
    (merged,) = [patterns.pop(n) for n in list(patterns) if is_a(model, n, merging)]
    assert len(patterns) == sum(DEPTHS)
    return Swin(model, pictures, model.get_submodule(head), patterns, merged)


def is_a(model: nn.Module, name: str, kind: str) -> bool:
    return type(model.get_submodule(name)).__name__ == kind


def patterns_of(model: nn.Module, pictures: Tensor, kinds: tuple[str, str]) -> dict[str, Tensor]:
    """Where the Jacobian of each module of these classes is not zero, token by token."""
    names = [n for n, m in model.named_modules() if type(m).__name__ in kinds]
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, keywords, name=name: seen.update({name: (given, keywords)}),
            with_kwargs=True,
        )
        for name in names
    ]
    model(pictures)
    for handle in handles:
        handle.remove()
    return {name: jacobian_pattern(model.get_submodule(name), *seen[name]) for name in names}


def jacobian_pattern(module: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    tokens = given[0].detach().requires_grad_()
    output = module(tokens, *given[1:], **keywords)
    output = output[0] if isinstance(output, tuple) else output
    generator = torch.Generator().manual_seed(1)
    rows = []
    for token in output.flatten(0, -2):
        # Not all ones: what a norm returns has a sum that nothing changes.
        mixed = token @ torch.randn(len(token), generator=generator, dtype=token.dtype)
        (gradient,) = torch.autograd.grad(mixed, tokens, retain_graph=True)
        rows.append(gradient.flatten(0, -2).abs().amax(-1))
    jacobian = torch.stack(rows)
    # A mask subtracts 100 from logits: what it bars is not zero, but next to nothing.
    return jacobian > 1e-20 * jacobian.max()


def first_token(swin: Swin, layer: int) -> int:
    """Where the tokens of a layer's stage begin in the stream: merged ones stand behind the others,
    row by row.
    """
    return 0 if layer < DEPTHS[0] else swin.merging.shape[1]


def test_calls_attend_where_their_block_s_jacobian_is_not_zero(swin: Swin) -> None:
    # Negative gradients are cut off: a score and its negative show all that is attended to.
    relevances = swin.relevance(), swin.relevance(sign=-1)
    for layer, (name, expected) in enumerate(swin.blocks.items()):
        first, size = first_token(swin, layer), len(expected)
        weights = torch.zeros(size + 1, size + 1, dtype=torch.float64)  # last: padding
        windows = torch.zeros(size, size, dtype=torch.bool)
        for relevance in relevances:
            assert len(relevance.calls) == len(swin.blocks)
            call = relevance.calls[layer]
            assert call.module.startswith(f"{name}.")
            assert call.used
            # A batch of one: every group is a window of it.
            assert call.map.shape == (*call.query_tokens.shape, call.key_tokens.shape[-1])
            for queries, keys, values in zip(
                call.query_tokens, call.key_tokens, call.map, strict=True
            ):
                held, asked = queries[queries >= 0] - first, keys[keys >= 0] - first
                windows[held[:, None], asked] = True
                queries = torch.where(queries >= 0, queries - first, size)
                keys = torch.where(keys >= 0, keys - first, size)
                weights[queries[:, None], keys] += values
            tokens = call.query_tokens[call.query_tokens >= 0]
            assert tokens.sort().values.tolist() == list(range(first, first + size))
        attended = weights[:-1, :-1] > 1e-20 * weights.max()
        assert torch.equal(attended, expected), name
        assert not (expected & ~windows).any()
        assert expected.sum() < expected.numel() / 2, "windows hold a part of all tokens"


def test_shifted_windows_are_not_those_before(swin: Swin) -> None:
    """The premise of the tests here: layers differ in what attends to what."""
    for layer in (0, 2):
        plain, shifted = list(swin.blocks.values())[layer : layer + 2]
        assert (plain & ~shifted).any()
        assert (shifted & ~plain).any()


def test_parents_are_the_tokens_that_a_merged_token_changes_with(swin: Swin) -> None:
    """Each merged token starts from equal shares of its parents, which sum to 1."""
    roots = swin.merging.shape[1]
    parents = swin.merging.double()
    expected = parents / parents.sum(-1, keepdim=True)
    at_an_edge = {1, 2} if roots % 2 else set()
    assert set(parents.sum(-1).int().tolist()) == {4} | at_an_edge

    kept = swin.head.weight.detach().clone()
    with torch.no_grad():
        swin.head.weight.zero_()  # no call adds anything: rows are what tokens start from
    try:
        with pytest.warns(UserWarning, match="no gradient"):
            relevance = swin.relevance()
    finally:
        with torch.no_grad():
            swin.head.weight.copy_(kept)
    ((name, stream),) = relevance.streams.items()
    assert stream.tokens == roots + len(expected)
    assert list(stream.parts.values()) == [slice(0, roots), slice(roots, stream.tokens)]
    matrix = relevance.matrix(name, name)[0]
    assert torch.equal(matrix[:roots, :roots], torch.eye(roots, dtype=torch.float64))
    assert torch.equal(matrix[roots:, :roots], expected)
    assert not matrix[:, roots:].any()


def test_what_merged_tokens_got_is_all_with_the_tokens_of_the_picture(swin: Swin) -> None:
    """Sums over columns go through layers as if nothing had been merged, `s += Ā s`: shares
    neither lose nor make relevance.
    """
    relevance = swin.relevance()
    ((name, stream),) = relevance.streams.items()
    sums = torch.ones(stream.tokens, dtype=torch.float64)
    for layer, call in enumerate(relevance.calls):
        if layer == DEPTHS[0]:
            roots = swin.merging.shape[1]
            shares = swin.merging.double() / swin.merging.sum(-1, keepdim=True)
            sums[roots:] = shares @ sums[:roots]
        added = torch.zeros(stream.tokens + 1, dtype=torch.float64)
        for queries, keys, values in zip(call.query_tokens, call.key_tokens, call.map, strict=True):
            read = torch.where(keys >= 0, sums[keys], 0)
            added.index_add_(0, torch.where(queries >= 0, queries, stream.tokens), values @ read)
        assert added[:-1].max() > 1e-9
        sums += added[:-1]
    torch.testing.assert_close(relevance.matrix(name, name)[0].sum(-1), sums, rtol=1e-10, atol=0)
    assert sums.max() > 1 + 1e-6
