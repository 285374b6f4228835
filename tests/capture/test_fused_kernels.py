"""The table of fused attention functions: an entry is all that a further function needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from captum_generic_attn import (
    GenericAttention,
    Lrp,
    UnsupportedAttentionError,
    verify,
)
from captum_generic_attn.capture import fused_kernels
from captum_generic_attn.capture.fused_kernels import (
    FusedCall,
    Kernel,
    eager_attention,
    is_foreign,
    kernel_named,
    scaled_dot_product_call,
)

B, N, D, H = 2, 5, 8, 2


class _MyAttention(torch.autograd.Function):
    """Attention in one node of the graph, as a kernel of another library computes it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.is_causal = scale, is_causal
        return F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=is_causal)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            out = F.scaled_dot_product_attention(*leaves, scale=ctx.scale, is_causal=ctx.is_causal)
        return *torch.autograd.grad(out, leaves, gradient), None, None


def my_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, is_causal: bool = False
) -> Tensor:
    """A fused function of a library of one's own, which follows PyTorch's protocol."""
    if has_torch_function((q, k, v)):
        return handle_torch_function(
            my_attention, (q, k, v), q, k, v, scale=scale, is_causal=is_causal
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _MyAttention.apply(q, k, v, scale, is_causal)


def read_mine(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, is_causal: bool = False
) -> FusedCall:
    return FusedCall(q, k, v, causal=is_causal, scale=scale)


@torch.library.custom_op("captum_generic_attn_tests::my_operator", mutates_args=())
def my_operator(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_MyAttention.backward(ctx, gradient)[:3], None


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.scale, ctx.is_causal = None, inputs[3]


my_operator.register_autograd(_backward, setup_context=_set_up)


def read_operator(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> FusedCall:
    return FusedCall(q, k, v, causal=is_causal)


class Model(nn.Module):
    """Two layers of attention by any function, and a head."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.embed = nn.Embedding(20, D)
        self.qkv = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(2))
        self.head = nn.Linear(D, 3)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for qkv in self.qkv:
            q, k, v = qkv(x).view(*ids.shape, 3, H, D // H).permute(2, 0, 3, 1, 4)
            x = x + self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x[:, -1])


FUNCTIONS: dict[str, tuple[Kernel, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "a function": (
        Kernel("my_attention", read_mine),
        lambda q, k, v: my_attention(q, k, v, 0.7, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7),
    ),
    "an operator": (
        Kernel("my_operator", read_operator),
        lambda q, k, v: my_operator(q, k, v, True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    ),
}


@pytest.fixture(params=FUNCTIONS)
def functions(
    request: pytest.FixtureRequest,
) -> tuple[Kernel, Callable[..., Tensor], Callable[..., Tensor]]:
    return FUNCTIONS[request.param]


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(1, 1 + B * N).view(B, N)


def test_an_entry_is_all_that_a_function_needs(
    functions: tuple[Kernel, Callable[..., Tensor], Callable[..., Tensor]], ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kernel, mine, torchs = functions
    model, reference = Model(mine), Model(torchs)
    torch.testing.assert_close(model(ids), reference(ids))
    monkeypatch.setattr(fused_kernels, "KERNELS", (*fused_kernels.KERNELS, kernel))
    found = GenericAttention(model).relevance(ids, 1, keep_calls=True)
    expected = GenericAttention(reference).relevance(ids, 1, keep_calls=True)
    assert len(found.calls) == 2
    torch.testing.assert_close(found.matrix("ids", "ids"), expected.matrix("ids", "ids"))
    for call, other in zip(found.calls, expected.calls, strict=True):
        assert call.heads == H
        assert call.map is not None
        torch.testing.assert_close(call.map, other.map)
        assert float(call.map.abs().max()) > 1e-3


def test_relevance_rules_see_the_steps_of_an_entry(
    functions: tuple[Kernel, Callable[..., Tensor], Callable[..., Tensor]], ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """LRP gives each step of attention a rule, so it runs `eager` in place of the function."""
    kernel, mine, torchs = functions
    monkeypatch.setattr(fused_kernels, "KERNELS", (*fused_kernels.KERNELS, kernel))
    found = Lrp(Model(mine)).attribute(ids, 1)
    torch.testing.assert_close(found, Lrp(Model(torchs)).attribute(ids, 1))
    assert float(found.abs().max()) > 1e-3


def test_the_maps_of_an_entry_can_be_verified(
    functions: tuple[Kernel, Callable[..., Tensor], Callable[..., Tensor]], ids: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kernel, mine, _ = functions
    monkeypatch.setattr(fused_kernels, "KERNELS", (*fused_kernels.KERNELS, kernel))
    report = verify(GenericAttention(Model(mine)), ids, 1)
    assert report.passed, report
    assert report["attention"].found == "probabilities times values are the output of all 2 calls"


def test_an_operator_without_an_entry_is_no_attention(ids: Tensor) -> None:
    """Its tokens are lost, so nothing is explained by mistake."""
    _, mine, _ = FUNCTIONS["an operator"]
    with pytest.raises(UnsupportedAttentionError, match="no attention was found"):
        GenericAttention(Model(mine)).attribute(ids, 1)


def test_the_table_is_as_it_was() -> None:
    assert [kernel.name for kernel in fused_kernels.KERNELS] == ["scaled_dot_product_attention"]
    assert kernel_named("my_attention") is None


@pytest.mark.parametrize(
    "name",
    [
        "flash_attn_func", "flash_attn_varlen_func", "flex_attention", "memory_efficient_attention",
        "_scaled_dot_product_flash_attention", "_native_multi_head_attention", "sageattn",
    ],
)  # fmt: skip
def test_kernels_that_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_foreign(name)
    entry = Kernel(name, scaled_dot_product_call)
    monkeypatch.setattr(fused_kernels, "KERNELS", (*fused_kernels.KERNELS, entry))
    assert not is_foreign(name)
    assert kernel_named(name) is entry


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def masks() -> dict[str, dict[str, Any]]:
    allowed = torch.ones(N, N, dtype=torch.bool).tril()
    allowed[2] = False
    return {
        "none": {},
        "causal": {"is_causal": True},
        "a scale": {"scale": 0.3},
        "booleans": {"attn_mask": allowed},
        "numbers": {"attn_mask": draw(N, N)},
        "grouped": {"enable_gqa": True},
    }


@pytest.mark.parametrize("case", masks())
def test_single_operations_give_what_the_function_gives(case: str) -> None:
    options = masks()[case]
    query, key, value = draw(B, 4, N, D), draw(B, 2, N, D).flip(-1), draw(B, 2, N, D) / 2
    if case != "grouped":
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    call = scaled_dot_product_call(query, key, value, **options)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(eager_attention(call), expected)
