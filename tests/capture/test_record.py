"""Records: the operands of a call, its whole probabilities and gradient, its maps by heads.

`test_blocks.py` tests how a call is cut into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from captum_generic_attn import GenericAttention
from captum_generic_attn.capture.blocks import Blocks
from captum_generic_attn.capture.fused_kernels import logsumexp_of
from captum_generic_attn.capture.operands import Operands, OverwrittenError, Saved, save
from captum_generic_attn.capture.record import AttentionRecord, Explicit, Fused, Tap
from captum_generic_attn.capture.torch_function import bypass_torch_function
from captum_generic_attn.relevance.equations import positive_contribution

B, H, NQ, NK, D = 2, 4, 3, 5, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def operands(queries: int = NQ, keys: int = NK, groups: int = H) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(B, H, queries, D, seed=1).requires_grad_(),
        draw(B, groups, keys, D, seed=2).requires_grad_(),
        draw(B, groups, keys, D + 1, seed=3).requires_grad_(),
    )


def fused(
    *tensors: Tensor | None, causal: bool = False, scale: float | None = None, grouped: bool = False
) -> Fused:
    """A call of the kernel with query, key, value and perhaps a mask."""
    given = [t for t in tensors if t is not None]
    return Fused(Operands.of(*given), causal, scale, grouped)


def explicit(tensor: Tensor, *order: int, single_query: bool = False) -> Explicit:
    return Explicit(Operands.of(tensor), order, single_query)


def blocks_of(
    source: Fused | Explicit, gradient: Tensor, head_index: Tensor | None = None
) -> Blocks:
    return source.blocks(source.operands.read(), gradient, head_index)


def evidence_of(blocks: Blocks) -> Tensor:
    """The blocks put together: `[maps, Nq, Nk]`, NaN where none was."""
    whole = blocks.like.new_full((blocks.count, blocks.queries, blocks.keys), math.nan)
    for block in blocks:
        whole[block.maps, block.rows, block.columns] = positive_contribution(
            block.attention, block.gradient, out=block.out
        )
    return whole


def softmax_in_loops(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """P one number at a time; `mask` is additive, of the shape of P."""
    result = torch.zeros(B, H, query.shape[-2], key.shape[-2], dtype=torch.float64)
    for b, h in [(b, h) for b in range(B) for h in range(H)]:
        group = h // (H // key.shape[1])
        for i in range(query.shape[-2]):
            logits = []
            for j in range(key.shape[-2]):
                products = [float(query[b, h, i, d]) * float(key[b, group, j, d]) for d in range(D)]
                logits.append(scale * sum(products) + float(mask[b, h, i, j]))
            powers = [math.exp(x) for x in logits]
            for j, power in enumerate(powers):
                result[b, h, i, j] = power / sum(powers) if sum(powers) else 0.0
    return result


def full(mask: Tensor | None, queries: int, keys: int) -> Tensor:
    """Any mask as numbers to add, `[B, H, Nq, Nk]`."""
    if mask is None:
        mask = torch.zeros(())
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf)
    return mask.double().expand(B, H, queries, keys)


BOOLEAN = torch.rand(B, 1, NQ, NK, generator=torch.Generator().manual_seed(4)) > 0.4
NOTHING_LEFT = BOOLEAN.clone()
NOTHING_LEFT[1, 0, 2] = False
MASKS = {
    "no mask": None,
    "boolean": BOOLEAN,
    "boolean of two axes": BOOLEAN[0, 0],
    "boolean, of keys": torch.tensor([True, False, True, True, False]).expand(B, 1, 1, NK),
    "added": draw(B, H, NQ, NK, seed=5),
    "added, of two axes": draw(NQ, NK, seed=6),
    "added, with infinity": torch.where(BOOLEAN, 0.5, -math.inf).double(),
    "a row with nothing left": NOTHING_LEFT,
    "a row with nothing left, added": torch.where(NOTHING_LEFT, 0.0, -math.inf).double(),
}  # fmt: skip


def check(source: Fused, mask: Tensor, kernel: Tensor) -> None:
    """P by loops, P V the kernel's output, ∂y/∂P by autograd through P V, and eq. 5 of the two."""
    query, key, value = source.operands.read()[:3]
    scale = 1 / math.sqrt(D) if source.scale is None else source.scale
    weights = draw(*kernel.shape, seed=7)
    weights[0, 1, 2:] = 0  # the score does not read all queries of this head
    (at_output,) = torch.autograd.grad((kernel * weights).sum().sin(), kernel)
    blocks = blocks_of(source, at_output)
    assert (blocks.count, blocks.queries, blocks.keys) == (B * H, *query.shape[2:3], key.shape[2])

    probabilities = blocks.probabilities().unflatten(0, (B, H))
    torch.testing.assert_close(probabilities, softmax_in_loops(query, key, mask, scale))
    heads = value.repeat_interleave(H // value.shape[1], 1)
    torch.testing.assert_close(probabilities @ heads, kernel)

    leaf = probabilities.clone().requires_grad_()
    (expected,) = torch.autograd.grad(((leaf @ heads) * weights).sum().sin(), leaf)
    torch.testing.assert_close(blocks.gradient().unflatten(0, (B, H)), expected)
    live = blocks.live_rows().unflatten(0, (B, H))
    assert torch.equal(live, (expected != 0).any(-1))
    assert live.all(-1).tolist() == [[True, query.shape[2] <= 2, True, True], [True] * 4]
    torch.testing.assert_close(
        evidence_of(blocks).unflatten(0, (B, H)), (probabilities * expected).clamp(min=0)
    )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_fused_with_a_mask(name: str, scale: float | None) -> None:
    query, key, value = operands()
    mask = MASKS[name]
    kernel = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    source = fused(query, key, value, mask, scale=scale)
    check(source, full(mask, NQ, NK), kernel)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (3, 5), (5, 3), (1, 4)])
def test_fused_and_causal(queries: int, keys: int) -> None:
    query, key, value = operands(queries, keys)
    kernel = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    source = fused(query, key, value, causal=True)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril()
    check(source, full(mask, queries, keys), kernel)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fused_with_grouped_queries(groups: int) -> None:
    query, key, value = operands(groups=groups)
    kernel = F.scaled_dot_product_attention(query, key, value, BOOLEAN, enable_gqa=True)
    check(fused(query, key, value, BOOLEAN, grouped=True), full(BOOLEAN, NQ, NK), kernel)


def test_rows_that_may_look_nowhere_are_zero() -> None:
    query, key, value = operands()
    blocks = blocks_of(fused(query, key, value, NOTHING_LEFT), draw(B, H, NQ, D + 1))
    sums = blocks.probabilities().unflatten(0, (B, H)).sum(-1)
    expected = torch.ones(B, H, NQ, dtype=torch.float64)
    expected[1, :, 2] = 0
    torch.testing.assert_close(sums, expected)
    evidence = evidence_of(blocks).unflatten(0, (B, H))
    assert not evidence.isnan().any()
    assert evidence[1, :, 2].eq(0).all()
    assert evidence[1, :, :2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    query, key, value = (t.detach().to(dtype) for t in operands())
    gradient = draw(B, H, NQ, D + 1).to(dtype)
    ours = blocks_of(fused(query, key, value), gradient)
    whole = blocks_of(fused(query.float(), key.float(), value.float()), gradient.float())
    for mine, its in (
        (ours.probabilities(), whole.probabilities()),
        (ours.gradient(), whole.gradient()),
        (evidence_of(ours), evidence_of(whole)),
    ):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, its)


def test_explicit_probabilities_in_any_order_of_axes() -> None:
    maps = draw(B, H, NQ, NK).softmax(-1)
    stored = maps.permute(2, 0, 3, 1).requires_grad_()  # [Nq, B, Nk, H]
    gradient = draw(*stored.shape, seed=8)
    gradient[1, 0, :, 2] = 0  # one query of one head
    blocks = blocks_of(explicit(stored, 1, 3, 0, 2), gradient)
    in_order = gradient.permute(1, 3, 0, 2)
    assert torch.equal(blocks.probabilities(), maps.flatten(0, 1))
    assert not blocks.probabilities().requires_grad
    assert torch.equal(blocks.gradient(), in_order.flatten(0, 1))
    assert torch.equal(evidence_of(blocks), (maps * in_order).clamp(min=0).flatten(0, 1))
    assert blocks.live_rows().logical_not().nonzero().tolist() == [[2, 1]]


def test_explicit_probabilities_of_a_single_query() -> None:
    maps, gradient = draw(B, H, NK).softmax(-1), draw(B, H, NK, seed=8)
    blocks = blocks_of(explicit(maps, 0, 1, 2, single_query=True), gradient)
    assert (blocks.count, blocks.queries, blocks.keys) == (B * H, 1, NK)
    assert torch.equal(blocks.probabilities(), maps.view(B * H, 1, NK))
    assert torch.equal(blocks.gradient(), gradient.view(B * H, 1, NK))
    assert torch.equal(evidence_of(blocks), (maps * gradient).clamp(min=0).view(B * H, 1, NK))


def test_explicit_half_precision_is_given_in_single() -> None:
    maps, gradient = draw(B, H, NQ, NK).softmax(-1).half(), draw(B, H, NQ, NK, seed=8).half()
    blocks = blocks_of(explicit(maps, 0, 1, 2, 3), gradient)
    assert torch.equal(blocks.probabilities(), maps.float().flatten(0, 1))
    assert torch.equal(blocks.gradient(), gradient.float().flatten(0, 1))
    evidence = (maps.float() * gradient.float()).clamp(min=0)  # not the product in half
    assert torch.equal(evidence_of(blocks), evidence.flatten(0, 1))


# --- the logsumexp of each query


@pytest.mark.parametrize("causal", [False, True])
def test_the_logsumexp_that_the_kernel_saved(causal: bool) -> None:
    query, key, _ = operands(4, 4)
    kernel = F.scaled_dot_product_attention(query, key, key, is_causal=causal)
    sums = logsumexp_of(kernel)
    assert sums is not None, kernel.grad_fn
    assert not sums.requires_grad
    logits = (query @ key.mT / math.sqrt(D)).detach()
    if causal:
        logits.masked_fill_(torch.ones(4, 4, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(sums, logits.logsumexp(-1))


def test_where_no_logsumexp_is_saved() -> None:
    query, key, value = operands()
    other_kernel = F.scaled_dot_product_attention(query, key, value)  # values are wider
    assert logsumexp_of(other_kernel) is None
    query, key = query.detach(), key.detach()
    assert logsumexp_of(F.scaled_dot_product_attention(query, key, key)) is None


def test_no_logsumexp_is_read_under_hooks_of_saved_tensors() -> None:
    """Where a model checkpoints its activations, reading it would run the model again."""
    query, key, _ = operands()
    unpacked: list[Tensor] = []

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, unpack):
        kernel = F.scaled_dot_product_attention(query, key, key)
        assert kernel.grad_fn._saved_logsumexp is not None
        unpacked.clear()
        assert logsumexp_of(kernel) is None
    assert not unpacked


# --- operands that the model overwrites


def test_operands_are_detached_and_not_copied() -> None:
    query, key, value = operands()
    kept = Operands.of(query, key, value).read()
    for mine, tensor in zip(kept, (query, key, value), strict=True):
        assert not mine.requires_grad
        assert mine.data_ptr() == tensor.data_ptr()
        assert torch.equal(mine, tensor)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_operand_that_was_overwritten_is_not_read(place: int) -> None:
    tensors = [t.detach() for t in operands()]
    source = fused(*tensors)
    source.operands.read()
    tensors[place].view(-1)[:1] = 0  # through a view
    with pytest.raises(OverwrittenError, match="modified by an inplace operation"):
        source.operands.read()


def test_copies_keep_what_the_model_overwrites() -> None:
    query, key, value = (t.detach() for t in operands())
    gradient = draw(B, H, NQ, D + 1)
    expected = blocks_of(fused(query, key, value), gradient)
    probabilities, change = expected.probabilities(), expected.gradient()
    source = Fused(Operands.of(query, key, value, copies=True), False, None, False)
    key.zero_()
    value.zero_()
    query.view(-1)[:7] = 1.0
    assert torch.equal(blocks_of(source, gradient).probabilities(), probabilities)
    assert torch.equal(blocks_of(source, gradient).gradient(), change)


# --- operands that autograd keeps


def test_saved_tensors_are_the_very_tensors() -> None:
    leaf, frozen = draw(2, 3).requires_grad_(), draw(3)
    made = leaf * 2
    saved = save(made, leaf, frozen)
    for _ in range(2):  # two backward passes
        read = saved.read()
        for mine, tensor in zip(read, (made, leaf, frozen), strict=True):
            assert mine.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            assert torch.equal(mine, tensor)
            assert not mine.requires_grad


@pytest.mark.parametrize("which", [0, 1])
def test_a_saved_tensor_that_was_overwritten_is_not_read(which: int) -> None:
    made, mask = draw(2, 3).requires_grad_() * 2, draw(3)
    saved = save(made, mask)
    saved.read()
    with torch.no_grad():
        (made, mask)[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.read()


def test_saved_tensors_without_a_gradient_are_read() -> None:
    tensors = draw(2, 3), draw(3)
    read = save(*tensors).read()
    assert [t.data_ptr() for t in read] == [t.data_ptr() for t in tensors]


def test_tensors_without_a_gradient_that_were_overwritten_are_not_read() -> None:
    """Queries are constants: autograd has no graph there, but the call is recorded."""
    tensors = draw(2, 3), draw(3)
    saved = save(*tensors)
    tensors[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.read()


class Overwriting(nn.Module):
    """Words attend to features, which attend to each other where nothing needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)
        self.double()
        self.overwrites = False

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        query, key, value = self.qkv(features)[:, None].chunk(3, -1)
        query = 4 * query
        features = features + F.scaled_dot_product_attention(query, key, value)[:, 0]
        if self.overwrites:
            query.zero_()
        x = self.words(input_ids)
        _, key, value = self.qkv(features)[:, None].chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(x[:, None], key, value)[:, 0])[:, 0]


def test_a_model_that_overwrites_tensors_without_a_gradient() -> None:
    """The model is run again with copies of what it overwrites."""
    model, words = Overwriting(), torch.tensor([[3, 1, 4], [1, 5, 9]])
    pairs = [("features", "features"), ("input_ids", "features")]

    def matrices() -> list[Tensor]:
        found = GenericAttention(model).relevance(
            words, 1, additional_forward_args=(draw(2, 5, 8),)
        )
        return [found.matrix(*pair) for pair in pairs]

    expected = matrices()
    assert all(matrix.any() for matrix in expected)
    model.overwrites = True
    torch.testing.assert_close(matrices(), expected, rtol=1e-12, atol=1e-12)


def test_saved_tensors_are_recomputed_with_their_graph() -> None:
    """Under checkpointing nothing is saved: a part of the model runs again to read them."""
    runs: list[Operands | Saved] = []

    def piece(x: Tensor) -> Tensor:
        doubled = x * 2
        runs.append(save(doubled))
        return doubled.sin()

    x = draw(4).requires_grad_()
    out = checkpoint(piece, x, use_reentrant=False)
    assert len(runs) == 1
    (read,) = runs[0].read()
    assert len(runs) == 2
    assert torch.equal(read, x.detach() * 2)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, 2 * (2 * x.detach()).cos())


# --- taps


def test_a_tap_hands_out_operands_and_gradient() -> None:
    x, other = draw(3).requires_grad_(), draw(2)
    middle = x * 2
    heard: list[tuple[Sequence[Tensor], Tensor]] = []

    def listen(operands: Sequence[Tensor], gradient: Tensor) -> None:
        assert not torch.is_grad_enabled()
        heard.append((operands, gradient))

    tap = Tap(middle, Operands.of(middle, other))
    tap.listener = listen
    assert not heard
    (gradient,) = torch.autograd.grad((middle**3).sum(), x, create_graph=True)
    ((operands, at_middle),) = heard
    assert [t.data_ptr() for t in operands] == [middle.data_ptr(), other.data_ptr()]
    torch.testing.assert_close(at_middle, 3 * middle.detach() ** 2)
    assert not at_middle.requires_grad
    torch.testing.assert_close(gradient, 6 * middle**2)  # the listener changed nothing


def test_a_tap_that_nobody_listens_to_reads_nothing() -> None:
    x, other = draw(3).requires_grad_(), draw(2)
    middle = x * 2
    tap = Tap(middle, Operands.of(other))
    heard: list[Tensor] = []
    other.zero_()  # reading it would be an error
    score = middle.sum()
    torch.autograd.grad(score, x, retain_graph=True)
    tap.listener = lambda _, gradient: heard.append(gradient)
    with pytest.raises(OverwrittenError):
        torch.autograd.grad(score, x, retain_graph=True)
    tap.listener = None
    torch.autograd.grad(score, x)
    assert not heard


def test_what_a_listener_computes_is_not_the_models() -> None:
    """The modes of the backward pass do not see what the listener computes."""
    seen: list[object] = []

    class Seeing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    middle = draw(3).requires_grad_() * 2
    middle.register_hook(torch.neg)
    tap = Tap(middle, Operands.of(middle))
    tap.listener = lambda operands, gradient: torch.add(operands[0], gradient)
    gradients = bypass_torch_function(torch.autograd.grad)
    with Seeing():
        gradients(middle.sum(), [get_gradient_edge(middle)])
    assert torch.neg in seen
    assert torch.add not in seen


# --- records


def record_of(
    maps: Tensor, head_index: list[list[int]], *, in_order: bool = False
) -> AttentionRecord:
    groups = len(head_index)
    tensor = maps.requires_grad_()
    source = explicit(tensor, *range(maps.ndim))
    return AttentionRecord(
        3, "blocks.0.attn", "Attention", source, *[get_gradient_edge(tensor)] * 2,
        Tap(tensor, source.operands), torch.zeros(groups, NQ).long(),
        torch.zeros(groups, NK).long(), torch.arange(groups), torch.tensor(head_index),
        in_order, False, frozenset(), frozenset([2]),
    )  # fmt: skip


# name -> (leading axes, the places of the heads of each group, whether these are all, in order)
PICKS = {
    "[B, H]": ((B, H), [[0, 1, 2, 3], [4, 5, 6, 7]], True),
    "[H, B]": ((H, B), [[0, 2, 4, 6], [1, 3, 5, 7]], False),
    "[B * H]": ((B * H,), [[0, 1, 2, 3], [4, 5, 6, 7]], True),
    "[B * windows, H]": ((B * 2, 2), [[0, 1], [2, 3], [4, 5], [6, 7]], True),
    "[B * windows, H], out of order": ((B * 2, 2), [[4, 5], [0, 1], [6, 7], [2, 3]], False),
    "some of the maps": ((B, H), [[6, 1], [0, 5]], False),
}


def check_grouping(blocks: Blocks, expected: Sequence[Tensor], head_index: list[list[int]]) -> None:
    """P, its gradient and eq. 5 of each group's heads, from maps in the order of the call."""
    probabilities, gradient = (t.reshape(-1, NQ, NK) for t in expected)
    flat = [place for places in head_index for place in places]
    assert blocks.count == len(flat)
    evidence, live = evidence_of(blocks), blocks.live_rows()
    for i, place in enumerate(flat):
        torch.testing.assert_close(blocks.probabilities()[i], probabilities[place])
        torch.testing.assert_close(blocks.gradient()[i], gradient[place])
        positive = (probabilities[place] * gradient[place]).clamp(min=0)
        torch.testing.assert_close(evidence[i], positive)
        assert torch.equal(live[i], (gradient[place] != 0).any(-1))


@pytest.mark.parametrize("layout", PICKS)
def test_maps_are_grouped_by_example_and_head(layout: str) -> None:
    lead, head_index, in_order = PICKS[layout]
    maps = draw(*lead, NQ, NK).softmax(-1)
    gradient = draw(*maps.shape, seed=9)
    gradient.view(-1, NQ, NK)[5, 1] = 0
    for known in {in_order, False}:
        record = record_of(maps.detach(), head_index, in_order=known)
        assert record.heads == len(head_index[0])
        blocks = record.blocks(record.source.operands.read(), gradient)
        check_grouping(blocks, (maps, gradient), head_index)


@pytest.mark.parametrize(
    ("layout", "grouped"),
    [
        *((layout, False) for layout in PICKS),
        *((layout, True) for layout in PICKS if ", " in layout),
    ],
)
def test_maps_of_a_fused_call_are_grouped(layout: str, grouped: bool) -> None:
    """The mask has other leading axes, keys and values have fewer heads: each map gets its own."""
    lead, head_index, _ = PICKS[layout]
    fewer = (*lead[:-1], lead[-1] // 2) if grouped else lead
    query, key = draw(*lead, NQ, D, seed=1), draw(*fewer, NK, D, seed=2)
    value = draw(*fewer, NK, D, seed=3)
    mask = draw(lead[-1], 1, NK, seed=4)
    gradient = draw(*lead, NQ, D, seed=5)
    gradient.view(-1, NQ, D)[5, 1] = 0
    keys, values = (t.repeat_interleave(2, -3) if grouped else t for t in (key, value))
    logits = query @ keys.mT / math.sqrt(D) + mask
    for sums in (logits.logsumexp(-1), None):
        source = Fused(Operands.of(query, key, value, mask), False, None, grouped, sums)
        blocks = blocks_of(source, gradient, torch.tensor(head_index).flatten())
        check_grouping(blocks, (logits.softmax(-1), gradient @ values.mT), head_index)


def test_a_record_is_frozen() -> None:
    record = record_of(draw(B, H, NQ, NK), PICKS["[B, H]"][1])
    with pytest.raises(AttributeError, match="index"):
        record.index = 4
