"""What an attribution does not compute, keep or make: backward passes, activations, matrices."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import captum_generic_attn.attribution as attribution_module
from captum_generic_attn import GenericAttention
from captum_generic_attn.capture import blocks


def counting(out: Tensor, counts: dict[str, int], name: str) -> Tensor:
    """The tensor itself; backward passes that come by are counted."""
    out.register_hook(lambda _: counts.update({name: counts.get(name, 0) + 1}))
    return out


def counted(model: nn.Module, counts: dict[str, int]) -> nn.Module:
    """The model with a counter behind its patches and behind the first norm of each block."""
    model.patch_embed.register_forward_hook(lambda _m, _a, out: counting(out, counts, "in"))
    for i, block in enumerate(model.blocks):
        for name in ("norm1", "norm2"):
            getattr(block, name).register_forward_hook(
                lambda _m, _a, out, key=f"{i}.{name}": counting(out, counts, key)
            )
    return model


DEPTH = 4
ALL = {f"{i}.norm2": 1 for i in range(DEPTH)} | {f"{i}.norm1": 1 for i in range(1, DEPTH)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),  # not the norm before the first call, nor the patches
        ({"start_layer": -1}, {"3.norm2": 1}),
        ({"start_layer": 2}, {"3.norm2": 1, "3.norm1": 1, "2.norm2": 1}),
        ({"layers": ["blocks.1", "blocks.3"]}, {k: 1 for k in ALL if k[0] > "1" or k == "1.norm2"}),
        # The explained rows are those of the last call, whatever is selected.
        ({"layers": "blocks.0"}, ALL),
    ],
)
def test_the_backward_pass_stops_at_the_first_call_that_counts(options, expected) -> None:
    counts: dict[str, int] = {}
    model = counted(tiny_vit(depth=DEPTH), counts)
    GenericAttention(model, **options).attribute(pictures(1), target=1)
    assert counts == expected


def test_of_a_batch_the_head_alone_is_asked_once_more() -> None:
    """Whether the score of each example is its own: down to the last call, for half of them."""
    counts: dict[str, int] = {}
    GenericAttention(counted(tiny_vit(depth=DEPTH), counts)).attribute(pictures(), target=1)
    assert counts == ALL | {"3.norm2": 2}


def test_several_targets_take_one_forward_pass() -> None:
    counts: dict[str, int] = {}
    forwards = []
    model = counted(tiny_vit(depth=DEPTH), counts)
    model.register_forward_hook(lambda *_: forwards.append(1))
    GenericAttention(model).attribute_targets(pictures(1), targets=[0, 3, 4])
    assert len(forwards) == 1
    assert counts == dict.fromkeys(ALL, 3)


class Largest(TorchDispatchMode):
    """The most elements that the result of an operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_matrix_of_tokens_by_tokens_is_made(monkeypatch) -> None:
    for name, size in (("_ROWS", 16), ("_COLUMNS", 32), ("_WHOLE", 32)):
        monkeypatch.setattr(blocks, name, size)
    model = tiny_vit(img_size=128, patch_size=4, embed_dim=8)  # 1025 tokens
    inputs = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    with Largest() as largest:
        GenericAttention(model).attribute(inputs, target=1)
    assert largest.elements < 1025 * 1025 / 4
    with Largest() as largest:
        GenericAttention(model).relevance(inputs, target=1)
    assert largest.elements >= 1025 * 1025  # so that the first figure says something


class Checkpointed(nn.Module):
    """A vision transformer that recomputes its blocks, or some of them, in the backward pass."""

    def __init__(self, model: nn.Module, blocks: range) -> None:
        super().__init__()
        self.model = model
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for i, block in enumerate(model.blocks):
            x = checkpoint(block, x, use_reentrant=False) if i in self.blocks else block(x)
        return model.forward_head(model.norm(x))


def saved_elements(call) -> int:
    """Elements that a graph keeps for its backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


@pytest.mark.parametrize("blocks", [range(4), range(1, 3), range(0)])
def test_checkpointing_keeps_its_saving(blocks: range) -> None:
    model = Checkpointed(tiny_vit(depth=DEPTH), blocks)
    inputs = pictures()
    method = GenericAttention(model)
    expected = GenericAttention(tiny_vit(depth=DEPTH)).attribute(inputs, target=1)
    torch.testing.assert_close(method.attribute(inputs, target=1), expected)

    ours = saved_elements(lambda: method.attribute(inputs, target=1))
    frozen = Checkpointed(tiny_vit(depth=DEPTH).requires_grad_(False), blocks)
    theirs = saved_elements(lambda: frozen(inputs.clone().requires_grad_()))
    assert ours <= theirs * 1.02


def test_checkpointing_saves_most_of_what_is_kept() -> None:
    figures = {}
    for count in (0, 8):
        method = GenericAttention(Checkpointed(tiny_vit(depth=8), range(count)))
        figures[count] = saved_elements(lambda call=method: call.attribute(pictures(), target=1))
    assert figures[8] < 0.25 * figures[0]


@pytest.mark.parametrize("targets", [[1], [1, 3]])
def test_checkpointed_blocks_and_several_targets(targets: list[int]) -> None:
    model = Checkpointed(tiny_vit(depth=DEPTH), range(DEPTH))
    ours = GenericAttention(model).attribute_targets(pictures(), targets)
    expected = GenericAttention(tiny_vit(depth=DEPTH)).attribute_targets(pictures(), targets)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("call", ["attribute", "relevance"])
@pytest.mark.parametrize("fused", [True, False])
def test_nothing_waits_for_the_garbage_collector(call: str, fused: bool, monkeypatch) -> None:
    """A graph that is kept by a cycle costs memory until a collection comes."""
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    method, inputs = GenericAttention(model), pictures()
    found: list[weakref.ref] = []
    capture_forward = attribution_module.capture_forward

    def watched(*args, **kwargs):
        capture = capture_forward(*args, **kwargs)
        parts = capture, capture.output, capture.spaces, capture.streams, *capture.records
        found.extend(map(weakref.ref, parts))
        found.extend(weakref.ref(record.tap) for record in capture.records)
        return capture

    monkeypatch.setattr(attribution_module, "capture_forward", watched)
    gc.collect()
    gc.disable()
    try:
        result = getattr(method, call)(inputs, target=1)
        assert [reference() for reference in found] == [None] * len(found)
    finally:
        gc.enable()
    assert len(found) == 4 + 2 * len(model.blocks)
    del result


def test_a_failed_call_leaves_no_graph_behind(monkeypatch) -> None:
    model = tiny_vit()
    output: list[weakref.ref] = []
    model.register_forward_hook(lambda _m, _a, out: output.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="target 7 is out of range"):
            GenericAttention(model).attribute(pictures(), target=7)
        assert output[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_maps(dtype: torch.dtype) -> None:
    model = tiny_vit(dtype=torch.float32)
    inputs = pictures(dtype=torch.float32)
    whole = GenericAttention(model).attribute(inputs, target=1, return_input_shape=False)
    half = GenericAttention(model.to(dtype))
    ours = half.attribute(inputs.to(dtype), target=1, return_input_shape=False)
    assert ours.dtype == torch.float32
    # Of the model's own precision: 8 and 11 bits of mantissa, through two blocks.
    difference = (ours - whole).abs().max() / whole.max()
    assert 0 < difference < {torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]


def test_autocast_gives_float32_maps() -> None:
    model = tiny_vit(dtype=torch.float32)
    inputs = pictures(dtype=torch.float32)
    whole = GenericAttention(model).attribute(inputs, target=1, return_input_shape=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = GenericAttention(model).attribute(inputs, target=1, return_input_shape=False)
    assert ours.dtype == torch.float32
    assert 0 < (ours - whole).abs().max() / whole.max() < 0.2


def test_parameters_are_neither_written_to_nor_given_gradients() -> None:
    model = tiny_text()
    ids = sentences()
    first = next(model.parameters())
    first.grad = torch.full_like(first, 3.0)
    before = {name: (p._version, p.requires_grad) for name, p in model.named_parameters()}
    GenericAttention(model).attribute(ids, target=1)
    assert {name: (p._version, p.requires_grad) for name, p in model.named_parameters()} == before
    assert [p.grad is None for p in model.parameters()][1:] == [True] * (len(before) - 1)
    assert bool((first.grad == 3.0).all())


class Withheld(torch.autograd.Function):
    """The identity, which keeps its gradient to itself."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None


class Branches(nn.Module):
    """Two blocks side by side on the same patches; nothing comes back through the second."""

    def __init__(self, *, withheld: bool) -> None:
        super().__init__()
        self.vit = tiny_vit()
        self.withheld = withheld

    def forward(self, x: Tensor) -> Tensor:
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(x))
        one, other = (block(x) for block in vit.blocks)
        detached = other.detach()
        other = detached + (Withheld.apply(other) if self.withheld else detached)
        return vit.forward_head(vit.norm(one + other))


@pytest.mark.parametrize("withheld", [True, False])
def test_a_call_whose_gradient_does_not_come_counts_for_nothing(withheld: bool) -> None:
    """With a gradient that an operation keeps back, as without one: the first call alone."""
    inputs = pictures()
    expected = GenericAttention(Branches(withheld=False)).attribute(inputs, target=1)
    method = GenericAttention(Branches(withheld=withheld))
    torch.testing.assert_close(method.attribute(inputs, target=1), expected)
    assert bool(expected.any())
    first, second = method.relevance(inputs, target=1).calls
    assert (first.used, second.used) == (True, False)
    assert second.reason == "does not reach the score"


class SharedQuery(nn.Module):
    """An attention pool: one query, a parameter, that the kernel broadcasts over the batch."""

    def __init__(self, *, expanded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Parameter(torch.randn(1, 2, 1, 4, dtype=torch.float64))
        self.keys = nn.Linear(8, 8, dtype=torch.float64)
        self.head = nn.Linear(8, 3, dtype=torch.float64)
        self.expanded = expanded

    def forward(self, tokens: Tensor) -> Tensor:
        keys = self.keys(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
        query = self.query.expand(len(tokens), -1, -1, -1) if self.expanded else self.query
        pooled = nn.functional.scaled_dot_product_attention(query, keys, keys.sin())
        return self.head(pooled.flatten(1))


def test_a_query_that_the_kernel_broadcasts() -> None:
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    ours, expected = (
        GenericAttention(SharedQuery(expanded=expanded)).attribute(tokens, target=1)
        for expanded in (False, True)
    )
    assert bool((expected > 0).any())
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
