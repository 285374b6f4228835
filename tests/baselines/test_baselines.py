"""The baselines against slow twins, their options, and what all methods promise alike."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit, two_towers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_generic_attn import (
    AttentionGradCam,
    AttentionRollout,
    GenericAttention,
    GradientAttention,
    Lrp,
    LrpRollout,
    PartialLrp,
    RawAttention,
    TransformerAttribution,
    UnsupportedAttentionError,
    UnsupportedOperationError,
)
from captum_generic_attn.baselines.scaling import min_max

SAME = 1e-12
OVER_ATTENTION = [
    GenericAttention,
    RawAttention,
    AttentionRollout,
    AttentionGradCam,
    GradientAttention,
    TransformerAttribution,
    PartialLrp,
    LrpRollout,
]
ALL = [*OVER_ATTENTION, Lrp]


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0
    return float((ours - theirs).abs().max() / theirs.abs().max())


def kept_attention(model: nn.Module, ids: Tensor, target: int) -> tuple[list[Tensor], list[Tensor]]:
    """Probabilities of an eager text model and their gradients, `[B, H, N, N]` each."""
    kept: list[Tensor] = []
    for block in model.blocks:
        block.kept = kept
    try:
        score = model(ids)[:, target].sum()
    finally:
        for block in model.blocks:
            block.kept = None
    return [a.detach() for a in kept], list(torch.autograd.grad(score, kept))


@pytest.fixture
def text():
    model = tiny_text("classes", depth=3)
    for block in model.blocks:
        block.eager = True
    ids = sentences()
    return model, ids, *kept_attention(model, ids, 1)


def explained_row(model, ids) -> int:
    (weights,) = GenericAttention(model).relevance(ids, 1).rows.values()
    assert (weights == weights[:1]).all()
    assert (weights[0] > 0).sum() == 1, "the twins below are written for one explained row"
    return int(weights[0].argmax())


def without_own(row: Tensor, own: int) -> Tensor:
    row = row.clone()
    row[:, own] = 0
    return row


# -- twins -----------------------------------------------------------------------------------------


def test_raw_attention(text) -> None:
    model, ids, attention, _ = text
    row = explained_row(model, ids)
    expected = without_own(attention[-1].mean(1)[:, row], row)
    assert apart(RawAttention(model).attribute(ids, 1), expected) <= SAME
    matrix = RawAttention(model).relevance(ids, 1).matrix("input_ids", "input_ids")
    assert apart(matrix, attention[-1].mean(1)) <= SAME
    chosen = RawAttention(model, layers="blocks.0").attribute(ids, 1)
    assert apart(chosen, without_own(attention[0].mean(1)[:, row], row)) <= SAME


@pytest.mark.parametrize("start", [0, 1, -1])
@pytest.mark.parametrize("normalized", [True, False])
def test_rollout(text, normalized, start) -> None:
    model, ids, attention, _ = text
    row = explained_row(model, ids)
    expected = torch.eye(ids.shape[1], dtype=torch.float64).repeat(len(ids), 1, 1)
    for call in attention[start:]:
        factor = torch.eye(ids.shape[1], dtype=torch.float64) + call.mean(1)
        if normalized:
            factor = factor / factor.sum(-1, keepdim=True)
        expected = factor @ expected
    method = AttentionRollout(model, row_normalize=normalized, start_layer=start)
    matrix = method.relevance(ids, 1).matrix("input_ids", "input_ids")
    assert apart(matrix, expected) <= SAME
    assert apart(method.attribute(ids, 1), without_own(expected[:, row], row)) <= SAME


@pytest.mark.parametrize("weights_from", ["explained_rows", "all"])
@pytest.mark.parametrize("scale", ["minmax", None])
@pytest.mark.parametrize("own", ["zero", "keep"])
def test_grad_cam(text, weights_from, scale, own) -> None:
    model, ids, attention, gradients = text
    row = explained_row(model, ids)
    others = [i for i in range(ids.shape[1]) if i != row or own == "keep"]
    expected = torch.zeros_like(attention[-1][:, 0])
    for example in range(len(ids)):
        for head in range(attention[-1].shape[1]):
            gradient = gradients[-1][example, head]
            looked_at = gradient[row, others] if weights_from == "explained_rows" else gradient
            expected[example] += looked_at.mean() * attention[-1][example, head]
        expected[example] = (expected[example] / attention[-1].shape[1]).clamp(min=0)
        if scale is not None:
            looked_at = expected[example]
            looked_at = looked_at[row, others] if weights_from == "explained_rows" else looked_at
            least, most = looked_at.min(), looked_at.max()
            if most > least:
                expected[example] = (expected[example] - least) / (most - least)
    method = AttentionGradCam(model, weights_from=weights_from, scale=scale, own=own)
    values = expected[:, row] if own == "keep" else without_own(expected[:, row], row)
    assert apart(method.attribute(ids, 1), values) <= SAME
    matrix = method.relevance(ids, 1).matrix("input_ids", "input_ids")
    assert apart(matrix, expected) <= SAME


def test_gradient_attention(text) -> None:
    model, ids, _, gradients = text
    expected = torch.zeros(ids.shape, dtype=torch.float64)
    for gradient in gradients:
        heads, queries = gradient.shape[1:3]
        for head in range(heads):
            for query in range(queries):
                expected += gradient[:, head, query].clamp(min=0) / (heads * queries)
    assert apart(GradientAttention(model).attribute(ids, 1), expected) <= SAME
    relevance = GradientAttention(model).relevance(ids, 1)
    matrix = relevance.matrix("input_ids", "input_ids")
    rows = relevance.rows["input_ids"]
    assert rows.sum(1).tolist() == pytest.approx([1.0] * len(ids))
    assert apart((rows.unsqueeze(1) @ matrix).squeeze(1), expected) <= SAME


@pytest.mark.parametrize("own", ["zero", "keep", "row_min"])
@pytest.mark.parametrize("normalized", [True, False])
def test_transformer_attribution_of_its_own_maps(text, normalized, own) -> None:
    """The product of what `keep_calls` tells of each call."""
    model, ids, _, gradients = text
    row = explained_row(model, ids)
    method = TransformerAttribution(model, row_normalize=normalized, own=own)
    relevance = method.relevance(ids, 1, keep_calls=True)
    expected = torch.eye(ids.shape[1], dtype=torch.float64).repeat(len(ids), 1, 1)
    for call, gradient in zip(relevance.calls, gradients, strict=True):
        assert (call.per_head >= 0).all()
        assert (call.per_head[gradient == 0] == 0).all()
        assert apart(call.map, call.per_head.mean(1)) <= SAME
        factor = torch.eye(ids.shape[1], dtype=torch.float64) + call.map
        if normalized:
            factor = factor / factor.sum(-1, keepdim=True)
        expected = factor @ expected
    values = without_own(expected[:, row], row)
    if own == "keep":
        values[:, row] = expected[:, row, row] - (0 if normalized else 1)
    if own == "row_min":
        values[:, row] = expected[:, row].amin(-1)
    assert apart(method.attribute(ids, 1), values) <= SAME


def test_lrp_is_the_same_fused_and_written_out() -> None:
    for method in (Lrp, PartialLrp, TransformerAttribution, LrpRollout):
        found = []
        for eager in (False, True):
            model = tiny_text("classes", depth=3)
            for block in model.blocks:
                block.eager = eager
            found.append(method(model).attribute(sentences(), 1))
        assert apart(found[0], found[1]) <= 1e-6  # where they scale the logits differs


def test_rule_in_place_of_equation_5(text) -> None:
    model, ids, _, _ = text

    def equation_5(attention, gradient):
        return (attention * gradient).clamp(min=0).mean(1)

    ours = GenericAttention(model).attribute(ids, 1)
    assert apart(GenericAttention(model, rule=equation_5).attribute(ids, 1), ours) <= SAME
    raw = GenericAttention(model, rule=lambda attention, _: attention.mean(1))
    rollout = AttentionRollout(model, row_normalize=False).attribute(ids, 1)
    assert apart(raw.attribute(ids, 1), rollout) <= SAME


def test_rules_that_do_not_fit_are_told(text) -> None:
    model, ids, _, _ = text
    with pytest.raises(ValueError, match=r"rule= must make of \(3, 2, 6, 6\) .* map \(3, 6, 6\)"):
        GenericAttention(model, rule=lambda attention, _: attention).attribute(ids, 1)
    with pytest.raises(ValueError, match="rule= made numbers that are not finite at blocks.2"):  # noqa: RUF043
        GenericAttention(model, rule=lambda a, _: a.mean(1) / 0).attribute(ids, 1)
    with pytest.raises(TypeError, match="rule must be a function of two tensors, not 'mean'"):
        GenericAttention(model, rule="mean")


def test_min_max_is_per_example() -> None:
    maps = torch.tensor([[[0.0, 2.0]], [[5.0, 6.0]], [[1.0, 3.0]]])
    ours = min_max(maps, torch.tensor([0, 1, 0]))
    assert ours.tolist() == [[[0.0, pytest.approx(2 / 3)]], [[0, 1]], [[pytest.approx(1 / 3), 1]]]


# -- what all promise ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_a_batch_is_its_examples(method) -> None:
    model, images = tiny_vit(), pictures(3)
    together = method(model).attribute(images, [0, 1, 2])
    for i, target in enumerate([0, 1, 2]):
        alone = method(model).attribute(images[i : i + 1], target)
        apart_by = (together[i : i + 1] - alone).abs().max()
        assert apart_by <= 1e-9 * together.abs().max() > 0


@pytest.mark.parametrize("method", ALL)
def test_targets_and_parts(method) -> None:
    model, images = tiny_vit(), pictures(3)
    targets = [0, [1, 2, 3]]
    together = method(model).attribute_targets(images, targets, internal_batch_size=2)
    for found, target in zip(together, targets, strict=True):
        assert apart(found, method(model).attribute(images, target)) <= 1e-9


@pytest.mark.parametrize("method", ALL)
def test_two_towers(method) -> None:
    inputs = pictures(3), sentences()
    maps = method(two_towers()).attribute(inputs)
    assert [m.shape for m in maps] == [x.shape for x in inputs]
    assert all((m != 0).any() and m.isfinite().all() for m in maps)


@pytest.mark.parametrize("method", ALL)
def test_copies_and_nothing_left_behind(method) -> None:
    model, images = tiny_vit(), pictures()
    method = method(model)
    state = {name: p.clone() for name, p in model.named_parameters()}
    ours = method.attribute(images, 1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._C._len_torch_function_stack() == 0
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):  # noqa: S301 - our own
        assert torch.equal(twin.attribute(images, 1), ours)


WITH_IDENTITY = [GenericAttention, TransformerAttribution, LrpRollout]
"""Methods whose matrices have the identity, which is no value of a token."""


@pytest.mark.parametrize("rows", [None, [2], [0, 4]])
@pytest.mark.parametrize("own", ["zero", "keep"])
@pytest.mark.parametrize("method", OVER_ATTENTION)
def test_values_are_the_explained_rows_of_the_matrix(method, own, rows) -> None:
    """In loops over examples, rows and tokens; `own` decides on one entry of one row alone."""
    model, ids = tiny_text("classes", depth=3), sentences()
    if method in (AttentionGradCam, PartialLrp):  # know nothing of a row that the score ignores
        rows = rows and [0, *rows]
    options = {} if rows is None or method is GradientAttention else {"rows": rows}
    method = partial(method, own=own, **options)
    relevance = method(model).relevance(ids, 1)
    weights, matrix = relevance.rows["input_ids"], relevance.matrix("input_ids", "input_ids")
    expected = torch.zeros_like(matrix[:, 0])
    for example in range(len(ids)):
        explained = [row for row, weight in enumerate(weights[example]) if weight != 0]
        for row in explained:
            for token in range(ids.shape[1]):
                value = matrix[example, row, token]
                if row == token and method.func in WITH_IDENTITY:
                    value = value - 1
                if row == token and own == "zero" and len(explained) == 1:
                    value = 0
                expected[example, token] += weights[example, row] * value
    ours = method(model).attribute(ids, 1)
    assert apart(ours, expected) <= SAME
    if own == "keep" and len(options.get("rows", [0])) == 1:
        row = options.get("rows", [0])[0]
        assert (ours[:, row] > 0).any(), "nothing to be seen of the own entry"


@pytest.mark.parametrize("method", [m for m in OVER_ATTENTION if m is not GradientAttention])
def test_own_in_two_towers(method) -> None:
    """Each stream has one explained row and so an own entry; nothing else changes."""
    inputs = pictures(3), sentences()
    # Of rows that the score does not read, the last call alone knows nothing by its gradient.
    read = method in (AttentionGradCam, PartialLrp)
    places = (None, 0) if read else (4, 2)
    options = {} if read else {"rows": {"pixels": 5, "input_ids": 2}}
    options |= {"scale": None, "weights_from": "all"} if method is AttentionGradCam else {}
    zero, keep = (
        method(two_towers(), own=own, **options).attribute(inputs, return_input_shape=False)
        for own in ("zero", "keep")
    )
    for less, more, place in zip(zero, keep, places, strict=True):
        less, more = less.flatten(1), more.flatten(1)
        if place is None:  # the class token is no patch
            assert torch.equal(less, more)
            continue
        assert not less[:, place].any()
        assert (more[:, place] > 0).any()
        others = [i for i in range(less.shape[1]) if i != place]
        assert torch.equal(less[:, others], more[:, others])


@pytest.mark.parametrize("method", OVER_ATTENTION)
def test_own_is_kept_by_copies_and_parts(method) -> None:
    ids = sentences()
    keeping = method(tiny_text(), own="keep")
    assert keeping.own == "keep"
    ours = keeping.attribute(ids, 1)
    for twin in (copy.deepcopy(keeping), pickle.loads(pickle.dumps(keeping))):  # noqa: S301 - our own
        assert twin.own == "keep"
        assert torch.equal(twin.attribute(ids, 1), ours)
    assert apart(keeping.attribute(ids, 1, internal_batch_size=2), ours) <= 1e-9
    assert apart(keeping.attribute_targets(ids, [0, 1])[1], ours) <= 1e-9


def test_wrong_options_are_named() -> None:
    model = tiny_vit()
    with pytest.raises(ValueError, match=r"weights_from='rows' is none of \('explained_rows'"):
        AttentionGradCam(model, weights_from="rows")
    with pytest.raises(ValueError, match=r"scale='max' is none of \('minmax', None\)"):
        PartialLrp(model, scale="max")
    for method in OVER_ATTENTION:
        choices = r"\('zero', 'keep', 'row_min'\)" if method is TransformerAttribution else (
            r"\('zero', 'keep'\)"
        )  # fmt: skip
        for wrong in ("one", None, True):
            with pytest.raises(ValueError, match=rf"own={wrong!r} is none of {choices}$"):
                method(model, own=wrong)
        if method is not TransformerAttribution:
            with pytest.raises(ValueError, match=rf"own='row_min' is none of {choices}$"):
                method(model, own="row_min")
    with pytest.raises(TypeError, match="own"):
        Lrp(model, own="keep")
    for method in (Lrp, PartialLrp, TransformerAttribution, LrpRollout):
        with pytest.raises(ValueError, match="rules='theirs' is none of chefer2021_full"):
            method(model, rules="theirs")
    with pytest.raises(ValueError, match="rules='theirs' is none of chefer2021_full"):
        GenericAttention(model, lrp="theirs")


def test_attention_without_relevance_is_refused() -> None:
    for method in (PartialLrp, TransformerAttribution, LrpRollout):
        with pytest.raises(ValueError, match="rules='frozen' holds attention constant, so that it"):
            method(tiny_vit(), rules="frozen")
    with pytest.raises(ValueError, match="rules='frozen' holds attention constant"):
        GenericAttention(tiny_vit(), lrp="frozen")


# -- LRP through any model ---------------------------------------------------------------------------  # noqa: E501


def test_an_operation_without_a_rule_is_named() -> None:
    model = tiny_text("classes")

    def forward(input_ids):
        logits = model(input_ids)
        return torch.linalg.matrix_exp(logits.unsqueeze(-1) * logits.unsqueeze(-2))[:, 0]

    message = "^linalg_matrix_exp has no relevance rule: write that step with other operations"
    for method in (Lrp, TransformerAttribution):
        with pytest.raises(UnsupportedOperationError, match=message):
            method(forward).attribute(sentences(), 1)
    assert torch._C._len_torch_function_stack() == 0
    assert not any(m._forward_hooks for m in model.modules())


class LoopedHeads(nn.Module):
    """One layer of attention whose heads are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).chunk(3, -1)
        parts = [
            torch.softmax(4 * a @ b.mT, -1) @ c
            for a, b, c in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1), strict=True)
        ]
        return self.head(tokens + self.out(torch.cat(parts, -1)))[:, 0]


@pytest.mark.parametrize(
    "method",
    [
        AttentionGradCam,
        AttentionRollout,
        partial(PartialLrp, scale="minmax"),
        partial(TransformerAttribution, row_normalize=True),
        partial(GenericAttention, rule=lambda a, g: (a * g).clamp(min=0).mean(1)),
    ],
)
def test_heads_called_one_by_one_are_refused_where_a_mean_is_not_enough(method) -> None:
    model, tokens = LoopedHeads().double(), torch.randn(2, 4, 8, dtype=torch.float64)
    with pytest.raises(UnsupportedAttentionError, match="heads are called one by one"):
        method(model).attribute(tokens, 1)
    for fine in (RawAttention, GenericAttention, PartialLrp, TransformerAttribution):
        assert (fine(model).attribute(tokens, 1) != 0).any()


def test_calls_without_relevance_are_named() -> None:
    model = tiny_vit()
    with pytest.raises(UnsupportedAttentionError, match=r"blocks\.\d\.attn .*no relevance to its"):
        TransformerAttribution(lambda x: model(x).logsumexp(1)).attribute(pictures())


def test_scaled_rows_of_several_tokens_are_not_negative() -> None:
    for method in (AttentionRollout, partial(TransformerAttribution, row_normalize=True)):
        found = method(tiny_text("classes", depth=3), rows=[1, 2]).attribute(sentences(), 1)
        assert found.min() >= 0
        assert found.max() > 0


@pytest.mark.parametrize("method", OVER_ATTENTION)
def test_a_zero_head_is_told_of(method) -> None:
    model = tiny_vit()
    nn.init.zeros_(model.head.weight)
    with pytest.warns(UserWarning, match="the score has no gradient at any attention call"):
        assert (method(model).attribute(pictures(), 1) == 0).all()


def test_what_a_mask_hides_gets_nothing() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def forward(x):
        return layer(x, src_key_padding_mask=hidden)[:, 0]

    for method in (GradientAttention, RawAttention, AttentionRollout, GenericAttention):
        assert method(forward).attribute(tokens, 3)[1, 3:].abs().max() == 0


def test_lrp_tells_what_it_cannot_reach() -> None:
    model, ids = tiny_text("classes"), sentences()
    table = model.words.weight
    rows = torch.arange(len(table))
    compared = Lrp(lambda ids: ((ids[..., None] == rows).double() @ table).mean(1) @ table[:3].T)
    with pytest.warns(UserWarning, match="ids: no relevance ends there"):
        found = compared.attribute(ids, 1)
    assert (found == 0).all()
    with pytest.raises(ValueError, match="relevance is not finite"):
        Lrp(lambda ids: model(ids) / 0, rules="frozen").attribute(ids, 1)


def test_a_tensor_with_itself() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
    x = torch.randn(3, 4, dtype=torch.float64)

    def squared(x):
        h = one(x)
        return two(h * h + h + h)

    def powered(x):
        h = one(x)
        return two(h.clone() * h.clone() + 2 * h)

    ours, theirs = (Lrp(f, rules="frozen").attribute(x, 1) for f in (squared, powered))
    assert apart(ours, theirs) <= 1e-9


@pytest.mark.parametrize("rules", ["chefer2021", "epsilon", "frozen"])
def test_products_with_a_factor_are_products(rules) -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(8, 8).double(), nn.Linear(8, 3).double()
    x = torch.randn(2, 4, 8, dtype=torch.float64)

    def scaled(x):
        logits = torch.baddbmm(x.new_zeros(1), one(x), x.mT, beta=0, alpha=0.25)
        return two(logits @ x).mean(1)

    def plain(x):
        return two(0.25 * torch.bmm(one(x), x.mT) @ x).mean(1)

    ours, theirs = (Lrp(f, rules=rules).attribute(x, 1) for f in (scaled, plain))
    assert apart(ours, theirs) <= 1e-6


def test_conserving_products_keep_each_example() -> None:
    """The batch of a product's result stands on another axis from its end than the operand's."""
    torch.manual_seed(0)
    weight, two = torch.randn(8, 2, 4, dtype=torch.float64), nn.Linear(8, 3).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def forward(x):
        heads = torch.einsum("bnd,dhk->bhnk", x, weight)
        return two(heads.transpose(1, 2).flatten(2).mean(1))

    together = Lrp(forward, rules="chefer2021_detr").attribute(x, 1)
    for i in range(2):
        assert (
            apart(
                together[i : i + 1],
                Lrp(forward, rules="chefer2021_detr").attribute(x[i : i + 1], 1),
            )
            <= 1e-9
        )


def test_examples_are_not_mixed_where_tokens_are_lost() -> None:
    """Behind a running sum nobody knows whose a token is; the batch stands second here."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16).double().eval()
    head, x = nn.Linear(8, 3).double(), torch.randn(2, 6, 8, dtype=torch.float64)

    def forward(x):
        return head(layer(torch.cumsum(x, 1).transpose(0, 1) + 1)[0])

    for rules in ("chefer2021", "chefer2021_detr"):
        together = Lrp(forward, rules=rules).attribute(x, 1)
        for i in range(2):
            alone = Lrp(forward, rules=rules).attribute(x[i : i + 1], 1)
            assert apart(together[i : i + 1], alone) <= 1e-6


@pytest.mark.parametrize("method", [Lrp, TransformerAttribution])
def test_under_autocast(method) -> None:
    model, images = tiny_vit(dtype=torch.float32), pictures(dtype=torch.float32)
    plain = method(model).attribute(images, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = method(model).attribute(images, 1)
    assert found.dtype == plain.dtype == torch.float32
    assert found.isfinite().all()
    assert (found != 0).any()


@pytest.mark.parametrize("rules", ["epsilon", "frozen"])
def test_in_place_operations_are_what_they_write(rules) -> None:
    """`x += y` and `x = x + y` hand on the same relevance."""
    torch.manual_seed(0)
    one, two = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def written(x):
        y = one(x)
        y += x
        y.relu_()
        y[:, 0] = 2 * y[:, 1]
        return two(y)

    def plain(x):
        y = (one(x) + x).relu()
        return two(torch.cat([2 * y[:, 1:2], y[:, 1:]], 1))

    x = torch.randn(3, 4, dtype=torch.float64)
    ours, theirs = (Lrp(f, rules=rules).attribute(x, 1) for f in (written, plain))
    assert apart(ours, theirs) <= 1e-9


@pytest.mark.parametrize("method", ALL)
def test_checkpointed_activations_give_the_same(method) -> None:
    model, images = tiny_vit(), pictures()

    def forward(x, checkpointed):
        x = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return model.head(model.norm(x)[:, 0])

    ours, theirs = (
        method(partial(forward, checkpointed=checkpointed)).attribute(images, 1)
        for checkpointed in (True, False)
    )
    assert apart(ours, theirs) <= SAME


def test_frozen_is_gradient_times_input_where_nothing_is_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    ours = Lrp(model, rules="frozen").attribute(x.detach(), 1)
    assert apart(ours, (x * gradient).detach()) <= 1e-9


@pytest.mark.parametrize("module", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6),
                                    nn.RMSNorm(6), nn.InstanceNorm1d(6)])  # fmt: skip
def test_frozen_norms_hold_their_statistics(module) -> None:
    """Gradient times input with mean and deviation computed once, and only the mean free."""
    torch.manual_seed(0)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 2)
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    x = x.mT.contiguous() if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else x
    weights = torch.randn(x[0].numel(), 2, dtype=torch.float64)
    ours = Lrp(lambda t: module(t).flatten(1) @ weights, rules="frozen").attribute(x, 1)

    free = x.clone().requires_grad_()
    axes = {
        nn.LayerNorm: (-1,), nn.RMSNorm: (-1,), nn.InstanceNorm1d: (-1,), nn.BatchNorm1d: None,
        nn.GroupNorm: "groups",
    }[type(module)]  # fmt: skip
    scale = module.weight if getattr(module, "weight", None) is not None else torch.ones(6).double()
    scale = scale if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else scale.view(1, 6, 1)
    if isinstance(module, nn.RMSNorm):
        y = free / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    elif isinstance(module, nn.BatchNorm1d):
        y = free / (module.running_var.view(1, 6, 1) + module.eps).sqrt()
    elif axes == "groups":
        parts, known = free.view(4, 2, -1), x.view(4, 2, -1)
        deviation = (known.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
        y = ((parts - parts.mean(-1, keepdim=True)) / deviation).view(x.shape)
    else:
        deviation = (x.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
        y = (free - free.mean(-1, keepdim=True)) / deviation
    (gradient,) = torch.autograd.grad(((y * scale).flatten(1) @ weights)[:, 1].sum(), free)
    score = (module(x).flatten(1) @ weights)[:, 1].detach()
    assert apart(ours, (x * gradient).detach()) <= 1e-9
    assert score.abs().min() > 0


def test_relevance_of_integers_is_that_of_their_vectors() -> None:
    model, ids = tiny_text("classes"), sentences()
    words = model.words

    def of_vectors(vectors):
        def forward_words(_ids):
            return vectors

        before, words.forward = words.forward, forward_words
        try:
            return model(ids)
        finally:
            words.forward = before

    vectors = words(ids).detach()
    ours = Lrp(model, rules="epsilon").attribute(ids, 1)
    theirs = Lrp(of_vectors, rules="epsilon").attribute(vectors, 1)
    assert apart(ours, theirs.sum(-1)) <= 1e-9
    summed = Lrp(of_vectors, rules="epsilon").attribute(vectors, 1, return_input_shape=False)
    assert apart(summed, theirs.sum(-1)) <= SAME
