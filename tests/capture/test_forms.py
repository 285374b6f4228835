"""Every way of writing softmax attention gives the map of the eager reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as early_bound
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_variadic,
)
from torch.utils.checkpoint import checkpoint
from zoo import encoder, laws
from zoo.encoder import BATCH, HEAD_WIDTH, HEADS, SCALE, TOKENS, Encoder, plain

from captum_generic_attn import GenericAttention

TARGET = 2
KEEP = torch.tensor(
    [[(i * 5 + j * 3) % 4 != 0 or i == j for j in range(TOKENS)] for i in range(TOKENS)]
)
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
PADDED = torch.tensor([[True] * TOKENS, [True] * (TOKENS - 2) + [False] * 2])[:, None, None]
BIAS = torch.linspace(-1, 1, HEADS * TOKENS * TOKENS, dtype=torch.float64).sin().mul(3)
BIAS = BIAS.reshape(1, HEADS, TOKENS, TOKENS)
LOW = torch.tensor(-1e9, dtype=torch.float64)
MIXING = torch.tensor([[0.8, -0.3], [0.4, 0.9]], dtype=torch.float64)
HEAD_GATE = torch.tensor([0.6, 1.4], dtype=torch.float64)[:, None, None]


def logits(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.transpose(-2, -1) * SCALE


def masked(keep: Tensor) -> encoder.Probabilities:
    return lambda q, k: logits(q, k).masked_fill(~keep, -math.inf).softmax(-1)


def scaled(scale: float) -> encoder.Probabilities:
    return lambda q, k: (q @ k.mT * scale).softmax(-1)


@dataclass(frozen=True)
class Case:
    """A way of writing attention, and its probabilities."""

    name: str
    form: Callable[..., Tensor]
    probabilities: encoder.Probabilities = plain
    key_heads: int = HEADS


def fused(name: str, probabilities: encoder.Probabilities = plain, **options: object) -> Case:
    key_heads = 1 if "enable_gqa" in options else HEADS
    return Case(
        name,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options),
        probabilities,
        key_heads,
    )


# --- scaled_dot_product_attention -------------------------------------------------------------


def three_dimensional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads folded into the batch, as in code before four-dimensional kernels."""
    output = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return output.unflatten(0, (-1, HEADS))


def positional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, KEEP, 0.0, False)


def all_keywords(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None)


def half_masked_rows(q: Tensor, k: Tensor) -> Tensor:
    """For a row without any key, fused kernels return zero."""
    keep = EMPTY_ROW.expand(q.shape[0], q.shape[1], -1, -1)
    weights = logits(q, k).masked_fill(~keep, -1e30).softmax(-1)
    return torch.where(keep.any(-1, keepdim=True), weights.masked_fill(~keep, 0), 0.0)


EMPTY_ROW = KEEP.clone()
EMPTY_ROW[3] = False

FUSED = [
    fused("plain"),
    fused("bool mask", masked(KEEP), attn_mask=KEEP),
    fused("bool mask with an empty row", half_masked_rows, attn_mask=EMPTY_ROW),
    fused("padding mask", masked(PADDED), attn_mask=PADDED),
    fused("float mask", lambda q, k: (logits(q, k) + BIAS).softmax(-1), attn_mask=BIAS),
    fused(
        "float mask of minus infinity",
        masked(KEEP),
        attn_mask=torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(~KEEP, -math.inf),
    ),
    fused("causal", masked(CAUSAL), is_causal=True),
    fused("scale", scaled(0.9), scale=0.9),
    fused("scale 1", scaled(1.0), scale=1),
    fused("no dropout", dropout_p=0.0),
    fused("grouped queries", enable_gqa=True),
    fused("grouped queries, causal", masked(CAUSAL), enable_gqa=True, is_causal=True),
    Case("three-dimensional", three_dimensional),
    Case("arguments by position", positional, masked(KEEP)),
    Case("arguments by keyword", all_keywords),
    Case("early-bound name", early_bound),
    Case("C function", torch._C._nn.scaled_dot_product_attention),
    Case("aten operator", torch.ops.aten.scaled_dot_product_attention.default),
]

# --- eager: how softmax is called -------------------------------------------------------------


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exponentials = (logits(q, k) - logits(q, k).amax(-1, keepdim=True)).exp()
    return (exponentials / exponentials.sum(-1, keepdim=True)) @ v


def in_float32(q: Tensor, k: Tensor) -> Tensor:
    return logits(q, k).float().softmax(-1).to(q.dtype)


def over_axis_minus_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT * SCALE).softmax(dim=-2).transpose(-1, -2) @ v


SOFTMAX = [
    Case("torch.softmax", lambda q, k, v: torch.softmax(logits(q, k), dim=-1) @ v),
    Case("F.softmax", lambda q, k, v: F.softmax(logits(q, k), dim=3) @ v),
    Case("Tensor.softmax", lambda q, k, v: logits(q, k).softmax(-1) @ v),
    Case("nn.Softmax", lambda q, k, v: nn.Softmax(dim=-1)(logits(q, k)) @ v),
    Case("torch.special.softmax", lambda q, k, v: torch.special.softmax(logits(q, k), -1) @ v),
    Case("torch.ops.aten", lambda q, k, v: torch.ops.aten.softmax.int(logits(q, k), -1) @ v),
    Case("exponentials by hand", by_hand),
    Case("over axis -2, transposed", over_axis_minus_two),
    Case("in float32 and back", lambda q, k, v: in_float32(q, k) @ v, in_float32),
    Case(
        "dtype argument",
        lambda q, k, v: F.softmax(logits(q, k), dim=-1, dtype=torch.float32).type_as(v) @ v,
        in_float32,
    ),
]

# --- eager: how q meets k ---------------------------------------------------------------------


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    empty = torch.empty(len(q), TOKENS, TOKENS, dtype=q.dtype)
    weights = torch.baddbmm(empty, q, k.mT, beta=0, alpha=SCALE).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


def relative_position(q: Tensor, k: Tensor) -> Tensor:
    """Logits are a sum of two products with the queries, for content and position."""
    position = torch.einsum("bhid,ijd->bhij", q, POSITIONS)
    return (logits(q, k) + position).softmax(-1)


def turned(tensor: Tensor) -> Tensor:
    """Rotary positions by complex numbers, as in the first code of Llama."""
    pairs = torch.view_as_complex(tensor.reshape(*tensor.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * ROTATION).flatten(-2)


def rotary(q: Tensor, k: Tensor) -> Tensor:
    return plain(turned(q), turned(k))


def rotary_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(turned(q), turned(k), v)


ANGLES = torch.outer(torch.arange(TOKENS).double(), torch.tensor([1.0, 0.1]).double())
ROTATION = torch.polar(torch.ones_like(ANGLES), ANGLES)


def cosine(q: Tensor, k: Tensor) -> Tensor:
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 4).softmax(-1)


POSITIONS = torch.linspace(0, 9, TOKENS * TOKENS * HEAD_WIDTH, dtype=torch.float64).cos()
POSITIONS = POSITIONS.reshape(TOKENS, TOKENS, HEAD_WIDTH)

PRODUCTS = [
    Case(
        "einsum logits",
        lambda q, k, v: torch.einsum("bhid,bhjd->bhij", q * SCALE, k).softmax(-1) @ v,
    ),
    Case("matmul logits", lambda q, k, v: torch.matmul(q, k.mT).mul(SCALE).softmax(-1) @ v),
    Case("baddbmm logits", baddbmm),
    Case("rotary positions by complex numbers", lambda q, k, v: rotary(q, k) @ v, rotary),
    Case("rotary positions by complex numbers, fused", rotary_fused, rotary),
    Case("cosine logits", lambda q, k, v: cosine(q, k) @ v, cosine),
    Case("queries for keys", lambda q, k, v: plain(q, q) @ v, lambda q, k: plain(q, q)),
    Case("query and key scaled", lambda q, k, v: ((q * 0.5) @ k.mT).softmax(-1) @ v, scaled(0.5)),
    Case("relative positions", lambda q, k, v: relative_position(q, k) @ v, relative_position),
    Case("logits divided", lambda q, k, v: (q @ k.mT / math.sqrt(HEAD_WIDTH)).softmax(-1) @ v),
]

# --- eager: how the probabilities meet V ------------------------------------------------------


def merged_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = plain(q, k).reshape(-1, TOKENS, TOKENS)
    return torch.bmm(weights, v.reshape(-1, TOKENS, HEAD_WIDTH)).view(q.shape)


def tokens_before_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).transpose(1, 2)


def heads_before_examples(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads folded into the batch before the examples: group h·B + b."""
    q, k, v = (torch.cat(tensor.unbind(1), dim=0) for tensor in (q, k, v))
    output = torch.bmm((q @ k.mT * SCALE).softmax(-1), v)
    return torch.stack(output.chunk(HEADS, dim=0), dim=1)


def one_key_head_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-query attention: all query heads against one head of keys and values."""
    return (q @ k.mT * SCALE).softmax(-1) @ v


def one_key_head_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bjd->bhij", q, k[:, 0]).mul(SCALE).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v[:, 0])


def grouped_heads_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Five axes: groups of query heads, each group with its head of keys."""
    q = q.unflatten(1, (k.shape[1], -1))
    weights = torch.einsum("bghid,bgjd->bghij", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bghij,bgjd->bghid", weights, v).flatten(1, 2)


def without_the_first_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k)[..., 1:] @ v[..., 1:, :]


def first_key_dropped(q: Tensor, k: Tensor) -> Tensor:
    return plain(q, k) * (torch.arange(TOKENS) > 0)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Probabilities are `[keys, queries]` from the start, and V is the left factor."""
    weights = torch.einsum("bhjd,bhid->bhji", k, q).mul(SCALE).softmax(2)
    return torch.einsum("bhjd,bhji->bhid", v, weights)


def tensordot_over_one_example(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = plain(q, k)
    return torch.stack(
        [torch.stack([weights[b, h] @ v[b, h] for h in range(HEADS)]) for b in range(len(q))]
    )


MEETING = [
    Case("@", lambda q, k, v: plain(q, k) @ v),
    Case("torch.matmul", lambda q, k, v: torch.matmul(plain(q, k), v)),
    Case("Tensor.matmul", lambda q, k, v: plain(q, k).matmul(v)),
    Case("bmm", merged_bmm),
    Case("einsum", lambda q, k, v: torch.einsum("bhij,bhjd->bhid", plain(q, k), v)),
    Case("einsum, V first", lambda q, k, v: torch.einsum("bhjd,bhij->bhid", v, plain(q, k))),
    Case("einsum with dots", lambda q, k, v: torch.einsum("...ij,...jd->...id", plain(q, k), v)),
    Case(
        "einsum with its operands in a list",
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", [plain(q, k), v]),
    ),
    Case("einsum, tokens before heads", tokens_before_heads),
    Case("einsum, keys first", keys_first),
    Case("heads before examples", heads_before_examples),
    Case("one head of keys, broadcast", one_key_head_broadcast, key_heads=1),
    Case("one head of keys, einsum", one_key_head_einsum, key_heads=1),
    Case("groups of heads, einsum", grouped_heads_einsum, key_heads=1),
    Case("without the first key", without_the_first_key, first_key_dropped),
    Case("transposed product", lambda q, k, v: (v.mT @ plain(q, k).mT).mT),
    Case(
        "contiguous and viewed",
        lambda q, k, v: plain(q, k).contiguous().view(BATCH, HEADS, TOKENS, -1) @ v,
    ),
]

# --- between softmax and V --------------------------------------------------------------------


def renormalised(q: Tensor, k: Tensor) -> Tensor:
    weights = plain(q, k).masked_fill(~KEEP, 0)
    return weights / weights.sum(-1, keepdim=True)


def kept_after(q: Tensor, k: Tensor) -> Tensor:
    return plain(q, k) * KEEP


def weighed(q: Tensor, k: Tensor) -> Tensor:
    return plain(q, k) * HEAD_GATE


def clamped(q: Tensor, k: Tensor) -> Tensor:
    return plain(q, k).clamp(min=1e-2)


def with_sink(q: Tensor, k: Tensor) -> Tensor:
    """A column of no token is dropped after the softmax: rows sum to less than 1."""
    sink = torch.full((*q.shape[:3], 1), 0.7, dtype=q.dtype)
    return torch.cat([logits(q, k), sink], dim=-1).softmax(-1)[..., :-1]


def talking(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("gh,bhij->bgij", MIXING, plain(q, k))


def talking_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = F.linear(plain(q, k).permute(0, 2, 3, 1), MIXING).permute(0, 3, 1, 2)
    return mixed @ v


def talking_convolution(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.conv2d(plain(q, k), MIXING[:, :, None, None]) @ v


def talking_before(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("gh,bhij->bgij", MIXING, logits(q, k)).softmax(-1)


def gated(q: Tensor, k: Tensor) -> Tensor:
    """A gate mixes two distributions, as in gated positional attention."""
    position = BIAS.softmax(-1)
    return 0.7 * plain(q, k) + 0.3 * position


BETWEEN = [
    Case("dropout", lambda q, k, v: F.dropout(plain(q, k), 0.3, training=False) @ v),
    Case("nn.Dropout", lambda q, k, v: nn.Dropout(0.3).eval()(plain(q, k)) @ v),
    Case("masked before", lambda q, k, v: masked(KEEP)(q, k) @ v, masked(KEEP)),
    Case(
        "masked by addition",
        lambda q, k, v: (logits(q, k) + (~PADDED).double() * -1e9).softmax(-1) @ v,
        masked(PADDED),
    ),
    Case(
        "masked by where",
        lambda q, k, v: torch.where(KEEP, logits(q, k), LOW).softmax(-1) @ v,
        masked(KEEP),
    ),
    Case(
        "masked after",
        lambda q, k, v: plain(q, k).masked_fill(~KEEP, 0) @ v,
        kept_after,
    ),
    Case("masked after by product", lambda q, k, v: kept_after(q, k) @ v, kept_after),
    Case("masked after, renormalised", lambda q, k, v: renormalised(q, k) @ v, renormalised),
    Case("scaled", lambda q, k, v: (plain(q, k) * 0.5) @ v, lambda q, k: plain(q, k) * 0.5),
    Case("scaled per head", lambda q, k, v: weighed(q, k) @ v, weighed),
    Case("clamped", lambda q, k, v: clamped(q, k) @ v, clamped),
    Case("attention sink", lambda q, k, v: with_sink(q, k) @ v, with_sink),
    Case("talking heads, einsum", lambda q, k, v: talking(q, k) @ v, talking),
    Case("talking heads, linear", talking_linear, talking),
    Case("talking heads, convolution", talking_convolution, talking),
    Case("talking heads before softmax", lambda q, k, v: talking_before(q, k) @ v, talking_before),
    Case("gate between two distributions", lambda q, k, v: gated(q, k) @ v, gated),
]

# --- in place ---------------------------------------------------------------------------------


def in_place(change: Callable[[Tensor], object]) -> Callable[..., Tensor]:
    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = plain(q, k)
        change(weights)
        return weights @ v

    return form


def logits_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = q @ k.mT
    weights *= SCALE
    weights += BIAS
    return weights.masked_fill_(~KEEP, -math.inf).softmax(-1) @ v


def set_item(weights: Tensor) -> None:
    weights[..., 0] = 0.0


def dropout_in_place(weights: Tensor) -> None:
    F.dropout(weights, 0.2, training=False, inplace=True)


IN_PLACE = [
    Case(
        "logits",
        logits_in_place,
        lambda q, k: (logits(q, k) + BIAS).masked_fill(~KEEP, -math.inf).softmax(-1),
    ),
    Case("mul_", in_place(lambda weights: weights.mul_(KEEP)), kept_after),
    Case("masked_fill_", in_place(lambda weights: weights.masked_fill_(~KEEP, 0)), kept_after),
    Case("div_", in_place(lambda weights: weights.div_(2)), lambda q, k: plain(q, k) / 2),
    Case("setitem", in_place(set_item), first_key_dropped),
    Case("dropout_", in_place(dropout_in_place)),
]

# --- functions that dispatch themselves -------------------------------------------------------


def copy_with_overrides_import(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if has_torch_function((query, key, value)):
        return handle_torch_function(
            copy_with_overrides_import, (query, key, value), query, key, value
        )
    return F.softmax(torch.bmm(query, key.mT) * SCALE, dim=-1).bmm(value)


def copy_with_functional(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    operands = (query, key, value)
    if any(type(t) is not Tensor for t in operands) or F.has_torch_function(operands):
        return F.handle_torch_function(copy_with_functional, operands, query, key, value)
    return torch.bmm(F.softmax(torch.bmm(query, key.mT) * SCALE, dim=-1), value)


def copy_with_module_path(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if torch.overrides.has_torch_function((query, key, value)):
        return torch.overrides.handle_torch_function(
            copy_with_module_path, (query, key, value), query, key=key, value=value
        )
    return torch.bmm(F.softmax(torch.bmm(query, key.mT) * SCALE, dim=-1), value)


def copy_with_variadic(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if has_torch_function_variadic(query, key, value):
        return handle_torch_function(copy_with_variadic, (query, key, value), query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def inner_of_two(weights: Tensor, value: Tensor) -> Tensor:
    if has_torch_function((weights, value)):
        return handle_torch_function(inner_of_two, (weights, value), weights, value)
    return weights.softmax(-1).bmm(value)


def outer_of_two(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if has_torch_function((query, key, value)):
        return handle_torch_function(outer_of_two, (query, key, value), query, key, value)
    return inner_of_two(torch.bmm(query, key.mT) * SCALE, value)


def folded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: function(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(
        0, (-1, HEADS)
    )


SELF_DISPATCHING = [
    Case("from torch.overrides", folded(copy_with_overrides_import)),
    Case("F.has_torch_function", folded(copy_with_functional)),
    Case("torch.overrides.has_torch_function", folded(copy_with_module_path)),
    Case("has_torch_function_variadic", folded(copy_with_variadic)),
    Case("one within another", folded(outer_of_two)),
]

# --- how the forward is run -------------------------------------------------------------------


def without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return plain(q, k) @ v


def without_gradients_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.no_grad()(F.scaled_dot_product_attention)(q, k, v)


def probabilities_without_gradients(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        weights = plain(q, k)
    return weights @ v


def checkpointed(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: checkpoint(form, q, k, v, use_reentrant=False)


def queries_in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([plain(part, k) @ v for part in q.split(4, dim=2)], dim=2)


EXECUTION = [
    Case("no_grad inside", without_gradients),
    Case("no_grad round the fused call", without_gradients_fused),
    Case("set_grad_enabled(False) round softmax", probabilities_without_gradients),
    Case("checkpoint, eager", checkpointed(lambda q, k, v: plain(q, k) @ v)),
    Case("checkpoint, fused", checkpointed(F.scaled_dot_product_attention)),
    Case("queries in chunks", queries_in_chunks),
]

GROUPS = {
    "fused": FUSED,
    "softmax": SOFTMAX,
    "logits": PRODUCTS,
    "product with V": MEETING,
    "between": BETWEEN,
    "in place": IN_PLACE,
    "dispatch": SELF_DISPATCHING,
    "execution": EXECUTION,
}
CASES = [
    pytest.param(case, id=f"{group}: {case.name}")
    for group, cases in GROUPS.items()
    for case in cases
]


@pytest.mark.parametrize("read", [-1, "mean"])
@pytest.mark.parametrize("case", CASES)
def test_form_equals_its_eager_twin(case: Case, read: int | str) -> None:
    model = Encoder(case.form, key_heads=case.key_heads, read=read)
    inputs = encoder.features()
    expected = encoder.expected_tokens(model, inputs, TARGET, case.probabilities)
    actual = GenericAttention(model).attribute(inputs, TARGET)
    laws.assert_same(actual, expected[..., None].expand(inputs.shape))


@pytest.mark.parametrize("case", CASES)
def test_form_of_a_frozen_model_on_ids(case: Case) -> None:
    model = Encoder(case.form, key_heads=case.key_heads, vocabulary=20, read=1)
    model.requires_grad_(False)
    expected = encoder.expected_tokens(model, encoder.ids(), [1, 3], case.probabilities)
    heatmap = GenericAttention(model).attribute(encoder.ids(), torch.tensor([1, 3]))
    laws.assert_same(heatmap, expected)


@pytest.mark.parametrize("case", CASES)
def test_form_leaves_one_used_call_per_layer_and_the_output_as_it_is(case: Case) -> None:
    model = Encoder(case.form, key_heads=case.key_heads, read=-1)
    inputs = encoder.features()
    method = GenericAttention(model)
    seen, relevance = laws.output_under_capture(
        model, lambda: method.relevance(inputs, TARGET, keep_calls=True)
    )
    laws.assert_same(seen, model(inputs).detach(), 1e-12)
    parts = 2 if case.name == "queries in chunks" else 1
    assert (
        laws.used_modules(relevance)
        == ["blocks.0.attention"] * parts + ["blocks.1.attention"] * parts
    )
    if parts == 1 and case.name != "without the first key":
        expected = encoder.expected_maps(model, inputs, TARGET, case.probabilities)
        for call, one in zip(relevance.calls, expected, strict=True):
            assert call.heads == HEADS
            assert call.per_head.shape == (BATCH, HEADS, TOKENS, TOKENS)
            laws.assert_same(call.map, one)
            laws.assert_same(call.per_head.clamp(min=0).mean(dim=1), one)


@pytest.mark.parametrize("form", ["fused", "written out"])
def test_attention_without_a_batch_axis(form: str) -> None:
    """A model that removes the batch axis of one example: queries and keys are matrices."""
    torch.manual_seed(0)
    project, head = nn.Linear(8, 24), nn.Linear(8, 3)

    def score(x: Tensor, *, flat: bool = True) -> Tensor:
        q, k, v = project(x[0] if flat else x).chunk(3, -1)
        if form == "fused" or not flat:
            read = F.scaled_dot_product_attention(q, k, v)
        else:
            read = (q @ k.T * 8**-0.5).softmax(-1) @ v
        return head(x[0] + (read if flat else read[0]))[:1]

    x = torch.randn(1, 5, 8)
    found = GenericAttention(score).attribute(x, 1)
    wanted = GenericAttention(lambda x: score(x, flat=False)).attribute(x, 1)
    assert found.abs().sum() > 0
    assert torch.allclose(found, wanted, atol=1e-6)
