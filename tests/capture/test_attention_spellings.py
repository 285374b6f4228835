"""Attention is recognised in any spelling: weights over tokens times these tokens.

Every spelling of one function has one map: in a self-attention of two layers, from one input to
another, and where parameters pool tokens. What weighs no tokens by themselves is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import oracles
from zoo.encoder import WIDTH, Block, Encoder, features
from zoo.laws import assert_same

from captum_generic_attn import GenericAttention, UnsupportedAttentionError

TARGET = 1
TOLERANCE = 1e-9
HEADS = 2
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
aten = torch.ops.aten


def explain(model: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
    """One value per token; the inputs are concatenated."""
    found = GenericAttention(model, **options).attribute(
        inputs or features(), TARGET, return_input_shape=False
    )
    return torch.cat(found, 1) if isinstance(found, tuple) else found


def softmax(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def flat(product: Callable[[Tensor, Tensor], Tensor], p: Tensor, v: Tensor) -> Tensor:
    """A product of `[n, M, N]` and `[n, N, d]`."""
    return product(p.flatten(0, 1), v.flatten(0, 1)).unflatten(0, p.shape[:2])


VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda p, v: p @ v,
    "matmul": torch.matmul,
    "Tensor.matmul": lambda p, v: p.matmul(v),
    "linalg.matmul": torch.linalg.matmul,
    "rmatmul": lambda p, v: v.__rmatmul__(p),
    "bmm": lambda p, v: flat(torch.bmm, p, v),
    "baddbmm": lambda p, v: flat(
        lambda a, b: torch.baddbmm(a.new_zeros(len(a), a.shape[1], b.shape[2]), a, b), p, v
    ),
    "einsum": lambda p, v: torch.einsum("bhmn,bhnd->bhmd", p, v),
    "einsum, values first": lambda p, v: torch.einsum("bhnd,bhmn->bhmd", v, p),
    "einsum, queries last": lambda p, v: torch.einsum("bhmn,bhnd->bhdm", p, v).mT,
    "einsum, heads last": lambda p, v: torch.einsum("bhmn,bhnd->bmhd", p, v).transpose(1, 2),
    "einsum with dots": lambda p, v: torch.einsum("...mn,...nd->...md", p, v),
    "values transposed": lambda p, v: (v.mT @ p.mT).mT,
    "times and sum": lambda p, v: (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2),
    "values times weights": lambda p, v: (v.unsqueeze(-3) * p[..., None]).sum(-2),
    ".mul and torch.sum": lambda p, v: torch.sum(p[..., None].mul(v[:, :, None]), dim=-2),
    "torch.mul and .sum(dim=)": lambda p, v: torch.mul(p[..., None], v[:, :, None]).sum(dim=3),
    "multiply and sum(axis=)": lambda p, v: torch.multiply(p[..., None], v[:, :, None]).sum(axis=3),
    "sum over a list of axes": lambda p, v: (p[..., None] * v[:, :, None]).sum([3]),
    "sum with keepdim": lambda p, v: (
        (p[..., None] * v[:, :, None]).sum(-2, keepdim=True).squeeze(3)
    ),
    "mean times n": lambda p, v: (p[..., None] * v[:, :, None]).mean(-2) * p.shape[-1],
    "keys before queries": lambda p, v: (p.mT.unsqueeze(-1) * v.unsqueeze(-2)).sum(2),
    "features before keys": lambda p, v: (p.unsqueeze(-2) * v.mT.unsqueeze(-3)).sum(-1),
    "linalg.vecdot": lambda p, v: torch.linalg.vecdot(p.unsqueeze(-2), v.mT.unsqueeze(-3)),
    "linalg.vecdot, dim": lambda p, v: torch.linalg.vecdot(v[:, :, None], p[..., None], dim=3),
    "aten.matmul": aten.matmul.default,
    "aten.bmm": lambda p, v: flat(aten.bmm.default, p, v),
    "aten.mul and aten.sum": lambda p, v: aten.sum.dim_IntList(
        aten.mul.Tensor(p.unsqueeze(-1), v.unsqueeze(-3)), [-2]
    ),
}  # fmt: skip


class Cross(nn.Module):
    """Cross-attention between two inputs; the head reads the first query."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.ask, self.tell = nn.Linear(3, WIDTH), nn.Linear(3, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, 4)
        oracles.randomise(self.double())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.ask(x)
        q, k, v = (heads(t) for t in (q, *self.tell(y).chunk(2, -1)))
        found = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.head((self.ask(x) + found)[:, 0])


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Pool(nn.Module):
    """Parameters are queries over the tokens of an encoder layer; the head reads all results."""

    def __init__(self, attend: Attend, queries: int, count: int) -> None:
        super().__init__()
        self.attend, self.count = attend, count
        self.embed, self.block = nn.Linear(3, WIDTH), Block(fused)
        self.query = nn.Parameter(torch.zeros(1, queries, WIDTH))
        self.key, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(queries * WIDTH, 4)
        oracles.randomise(self.double())

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.embed(x))
        q = 3 * self.query.expand(len(x), -1, -1)
        found = self.attend(*(heads(t, self.count) for t in (q, self.key(x), x)))
        return self.head(found.transpose(1, 2).flatten(1))


SETTINGS: dict[str, Callable[[Attend], Tensor]] = {
    "self-attention": lambda attend: explain(Encoder(attend), features()[:1]),
    "cross-attention": lambda attend: explain(Cross(attend), features()[:1], features(5)[:1]),
    "pooling by a query": lambda attend: explain(Pool(attend, 1, 1), features()[:1]),
    "pooling by three queries": lambda attend: explain(Pool(attend, 3, 1), features()[:1]),
    "pooling by a query, two heads": lambda attend: explain(Pool(attend, 1, 2), features()[:1]),
    "pooling by three queries, two heads": lambda attend: explain(
        Pool(attend, 3, 2), features()[:1]
    ),
}


@cache
def by_the_fused_kernel(setting: str) -> Tensor:
    return SETTINGS[setting](fused)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", VALUES)
def test_weights_times_values(name: str, setting: str) -> None:
    found = SETTINGS[setting](lambda q, k, v: VALUES[name](softmax(q, k), v))
    assert_same(found, by_the_fused_kernel(setting), TOLERANCE)


PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum without an arrow": lambda p, v: torch.einsum("mn,nd", p, v).T,
    "tensordot": lambda p, v: torch.tensordot(p, v, 1),
    "tensordot, axes": lambda p, v: torch.tensordot(v, p, dims=([0], [1])).T,
    "inner": lambda p, v: torch.inner(p, v.mT),
    "inner, values first": lambda p, v: torch.inner(v.mT, p).T,
    "linear": lambda p, v: F.linear(p, v.mT),
    "linear, values first": lambda p, v: F.linear(v.mT, p).T,
    "mm": torch.mm,
    "addmm": lambda p, v: torch.addmm(p.new_zeros(v.shape[1]), p, v),
    "aten.mm": aten.mm.default,
    "T": lambda p, v: (v.T @ p.T).T,
}


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "pooling by three" not in s])
@pytest.mark.parametrize("name", PAIRS)
def test_weights_times_values_as_matrices(name: str, setting: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        each = zip(q[0], k[0], v[0], strict=True)
        return torch.stack([PAIRS[name](softmax(q, k), v) for q, k, v in each])[None]

    assert_same(SETTINGS[setting](attend), by_the_fused_kernel(setting), TOLERANCE)


def exponentials(x: Tensor) -> Tensor:
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def stable(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / torch.sum(e, dim=-1, keepdim=True)


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "Tensor.softmax": lambda x: x.softmax(dim=-1),
    "torch.softmax": lambda x: torch.softmax(x, 3),
    "F.softmax": lambda x: F.softmax(x, -1),
    "nn.Softmax": nn.Softmax(-1),
    "special.softmax": lambda x: torch.special.softmax(x, -1),
    "aten._softmax": lambda x: aten._softmax.default(x, -1, False),
    "aten.softmax": lambda x: aten.softmax.int(x, -1),
    "_safe_softmax": lambda x: torch._safe_softmax(x, -1),
    "softmin": lambda x: F.softmin(-x, -1),
    "nn.Softmin": lambda x: nn.Softmin(-1)(x.neg()),
    "exp and sum": exponentials,
    "exp and sum, less the greatest": stable,
    "log_softmax, exp": lambda x: x.log_softmax(-1).exp(),
    "less logsumexp, exp": lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
    "normalize": lambda x: F.normalize(x.exp(), p=1, dim=-1),
    "over the axis of queries": lambda x: x.mT.softmax(-2).mT,
    "two-fold powers": lambda x: exponentials(x / math.log(2) * math.log(2)),
}


@pytest.mark.parametrize("setting", [s for s in SETTINGS if "two" not in s])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmaxes(name: str, setting: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SOFTMAXES[name](q @ k.mT / math.sqrt(q.shape[-1])) @ v

    assert_same(SETTINGS[setting](attend), by_the_fused_kernel(setting), TOLERANCE)


def near(q: Tensor, k: Tensor) -> Tensor:
    """Negative squared distances as logits."""
    return -(q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)


def lengths(q: Tensor, k: Tensor) -> Tensor:
    products = q @ k.mT
    return 2 * products - q.square().sum(-1, keepdim=True) - k.square().sum(-1)[..., None, :]


def top_scattered(x: Tensor) -> Tensor:
    kept, index = x.topk(3, -1)
    return torch.full_like(x, -math.inf).scatter(-1, index, kept)


def top_masked(x: Tensor) -> Tensor:
    return x.masked_fill(x < x.topk(3, -1).values[..., -1:], -math.inf)


def top_gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The values of the three best keys of each query, gathered: `[B, h, M, 3, d]`."""
    kept, index = (q @ k.mT).topk(3, -1)
    index = index.unsqueeze(-1).expand(*index.shape, v.shape[-1])
    best = v.unsqueeze(-3).expand(*q.shape[:-1], *v.shape[-2:]).gather(-2, index)
    return (kept.softmax(-1).unsqueeze(-2) @ best).squeeze(-2)


GROUPS: dict[str, dict[str, Attend]] = {
    "distances": {
        "broadcast": lambda q, k, v: near(q, k).softmax(-1) @ v,
        "cdist": lambda q, k, v: (-torch.cdist(q, k).square()).softmax(-1) @ v,
        "cdist, softmin": lambda q, k, v: F.softmin(torch.cdist(q, k) ** 2, -1) @ v,
        "lengths and products": lambda q, k, v: lengths(q, k).softmax(-1) @ v,
        "times and sum": lambda q, k, v: (near(q, k).softmax(-1)[..., None] * v[:, :, None]).sum(3),
        "norm": lambda q, k, v: (
            -(q.unsqueeze(-2) - k.unsqueeze(-3)).norm(dim=-1).square()
        ).softmax(-1) @ v,
    },
    "additive": {
        "sum": lambda q, k, v: (q.unsqueeze(-2) + k.unsqueeze(-3)).tanh().sum(-1).softmax(-1) @ v,
        "product with ones": lambda q, k, v: (
            (q.unsqueeze(-2) + k.unsqueeze(-3)).tanh() @ q.new_ones(q.shape[-1])
        ).softmax(-1) @ v,
        "linear": lambda q, k, v: F.linear(
            torch.tanh(q[:, :, :, None] + k[:, :, None]), q.new_ones(1, q.shape[-1])
        ).squeeze(-1).softmax(-1) @ v,
        "keys first": lambda q, k, v: torch.einsum(
            "bhnm,bhnd->bhmd", (k[..., None, :] + q[:, :, None]).tanh().sum(-1).softmax(2), v
        ),
    },
    "the best three": {
        "scattered": lambda q, k, v: top_scattered(q @ k.mT).softmax(-1) @ v,
        "masked": lambda q, k, v: top_masked(q @ k.mT).softmax(-1) @ v,
        "gathered": top_gathered,
    },
}  # fmt: skip
OF_GROUPS = [(group, name) for group, names in GROUPS.items() for name in list(names)[1:]]


@cache
def first_of(group: str, setting: str) -> Tensor:
    return SETTINGS[setting](next(iter(GROUPS[group].values())))


@pytest.mark.parametrize("setting", ["self-attention", "cross-attention", "pooling by a query"])
@pytest.mark.parametrize(("group", "name"), OF_GROUPS)
def test_logits(group: str, name: str, setting: str) -> None:
    if name == "gathered" and setting != "pooling by a query":
        with pytest.raises(UnsupportedAttentionError, match="is a query in several sequences"):
            SETTINGS[setting](GROUPS[group][name])
        return
    assert_same(SETTINGS[setting](GROUPS[group][name]), first_of(group, setting), TOLERANCE)


# -- pooling by weights that no query asks for -------------------------------------------------


class Bag(nn.Module):
    """One layer, then pooling by `pool(model, x)`, which may use further modules."""

    def __init__(self, pool: Callable[[Any, Tensor], Tensor], read: int = WIDTH) -> None:
        super().__init__()
        self.pool = pool
        self.embed, self.block, self.head = nn.Linear(3, WIDTH), Block(fused), nn.Linear(read, 4)
        self.v, self.u, self.w = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5), nn.Linear(5, 1)
        self.two, self.one = nn.Linear(5, 2), nn.Linear(WIDTH, 1)
        oracles.randomise(self.double())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self, self.block(self.embed(x))))


def gated(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.v(x)) * torch.sigmoid(m.u(x))


WEIGHTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "gated (ABMIL)": (lambda m, x: m.w(gated(m, x)), 1),
    "tanh (ABMIL)": (lambda m, x: m.w(torch.tanh(m.v(x))), 1),
    "two branches (CLAM)": (lambda m, x: m.two(gated(m, x)), 2),
    "a linear layer (CCT)": (lambda m, x: m.one(x), 1),
    "minus the length": (lambda m, x: -x.square().sum(-1, keepdim=True), 1),
}
"""Logits `[B, N, k]` of k pools."""
POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda a, x: a.softmax(1).mT @ x,
    "bmm": lambda a, x: torch.bmm(a.transpose(1, 2).softmax(-1), x),
    "einsum": lambda a, x: torch.einsum("bnk,bnd->bkd", a.softmax(1), x),
    "values transposed": lambda a, x: (x.mT @ a.softmax(1)).mT,
    "times and sum": lambda a, x: (a.softmax(1)[..., None] * x[:, :, None]).sum(1),
    "times and sum, by keyword": lambda a, x: torch.sum(
        x[:, :, None].mul(F.softmax(a, dim=1)[..., None]), dim=1
    ),
    "mean times n": lambda a, x: (a.softmax(1)[..., None] * x[:, :, None]).mean(1) * x.shape[1],
    "exp and sum": lambda a, x: (a.exp() / a.exp().sum(1, keepdim=True)).mT @ x,
    "fused kernel": lambda a, x: F.scaled_dot_product_attention(  # the logits as a bias
        x.new_zeros(len(x), a.shape[-1], x.shape[-1]), x, x, a.mT
    ),
}  # fmt: skip


def by_hand(model: Bag, logits: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
    """Eq. 5, 8 and 10: the rows of R̄ for tokens of another stream sum to one."""
    kept: list[Tensor] = []

    def keeping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append(softmax(q, k))
        return kept[-1] @ v

    def pool(m: Any, x: Tensor) -> Tensor:
        kept.append(logits(m, x).mT.softmax(-1).unsqueeze(1))
        return (kept[-1].squeeze(1) @ x).flatten(1)

    twin = Bag(pool, model.head.in_features)
    twin.load_state_dict(model.state_dict())
    twin.block.attention.form = keeping
    first, last = oracles.maps_from(lambda: twin(x), kept, TARGET)
    rows = first / first.sum(-1, keepdim=True).clamp(min=1e-300)
    return (last @ (torch.eye(x.shape[1]) + rows)).mean(1)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", [n for n in POOLS if n not in ("fused kernel", "exp and sum")])
def test_pooling(name: str, weights: str) -> None:
    logits, pools = WEIGHTS[weights]
    model = Bag(lambda m, x: POOLS[name](logits(m, x), x).flatten(1), pools * WIDTH)
    assert_same(explain(model), by_hand(model, logits, features()), TOLERANCE)


def test_pooling_by_one_axis_less() -> None:
    """Weights `[B, N]`, as CCT squeezes them, and the weighted sum."""
    logits = WEIGHTS["a linear layer (CCT)"][0]
    spellings = [
        lambda a, x: (a.softmax(1).unsqueeze(1) @ x).squeeze(1),
        lambda a, x: torch.einsum("bn,bnd->bd", a.softmax(-1), x),
        lambda a, x: (a.softmax(-1)[..., None] * x).sum(1),
        lambda a, x: torch.matmul(x.transpose(1, 2), F.softmax(a, 1)[..., None])[..., 0],
        lambda a, x: torch.sum(x * a.softmax(1).unsqueeze(2), 1),
    ]
    for spelling in spellings:
        model = Bag(lambda m, x, s=spelling: s(logits(m, x).squeeze(-1), x))
        assert_same(explain(model), by_hand(model, logits, features()), TOLERANCE)


# -- programs that were exported ---------------------------------------------------------------


@pytest.mark.slow
def test_an_exported_program() -> None:
    for form in (fused, lambda q, k, v: softmax(q, k) @ v):
        model = Encoder(form).requires_grad_(False)
        program = torch.export.export(model, (features(),)).module()
        assert_same(explain(program), explain(model), TOLERANCE)


# -- what weighs no tokens by themselves -------------------------------------------------------


def twice(m: Any, x: Tensor) -> Tensor:
    """Weights that differ by feature, `[B, N, d]`."""
    return x @ m.block.attention.out.weight


def lambdas(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhmk,bhkd->bhmd", q, torch.einsum("bhnk,bhnd->bhkd", k.softmax(2), v))


def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmax(q, k)
    return torch.cat([weights @ part for part in v.chunk(2, -1)], -1)


POSITIONS = nn.Parameter(torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6).sin())
SPELLED_WRONG: dict[str, tuple[Attend, str]] = {
    "factorised (CoaT)": (lambda q, k, v: q @ (k.softmax(2).mT @ v), "softmax"),
    "factorised, times and sum": (
        lambda q, k, v: q @ (k.softmax(2).unsqueeze(-1) * v.unsqueeze(-2)).sum(2), "softmax"
    ),
    "lambda": (lambdas, "softmax"),
    "efficient": (lambda q, k, v: q.softmax(-1) @ (k.softmax(2).mT @ v), "softmax"),
    "linear": (lambda q, k, v: q.relu() @ (k.relu().mT @ v), "softmax"),
    "linear, queries first": (lambda q, k, v: (q.exp() @ k.exp().mT) @ v, "without a softmax"),
    "linear, times and sum": (
        lambda q, k, v: ((q @ k.mT).relu().unsqueeze(-1) * v.unsqueeze(2)).sum(3),
        "without a softmax",
    ),
    "channels (XCiT)": (lambda q, k, v: ((q.mT @ k).softmax(-1) @ v.mT).mT, "channels"),
    "learned positions (Synthesizer)": (
        lambda q, k, v: POSITIONS.softmax(-1) @ v, "learned weights over positions"
    ),
    "a gate of softmax weights": (
        lambda q, k, v: v * (q * k).sum(-1, keepdim=True).softmax(2), "softmax over tokens"
    ),
    "two products": (halves, "more than one product"),
    "flipped values": (
        lambda q, k, v: softmax(q, k) @ v.flip(2), "different inputs or positions"
    ),
    "flipped values, fused": (lambda q, k, v: fused(q, k, v.flip(2)), "different inputs or pos"),
    "rolled values": (lambda q, k, v: softmax(q, k) @ v.roll(1, 2), "different inputs or pos"),
    "rolled values, fused": (lambda q, k, v: fused(q, k, v.roll(1, 2)), "different inputs or pos"),
    "rolled values, times and sum": (
        lambda q, k, v: (softmax(q, k)[..., None] * v.roll(1, 2)[:, :, None]).sum(3),
        "different inputs or positions",
    ),
    "running sums of values": (lambda q, k, v: softmax(q, k) @ v.cumsum(2), "cumsum"),
    "running sums of values, fused": (lambda q, k, v: fused(q, k, v.cumsum(2)), "cumsum"),
    "sorted values": (lambda q, k, v: fused(q, k, v.sort(2).values), "sort|different inputs"),
    "values by fft": (lambda q, k, v: fused(q, k, torch.fft.fft(v, dim=2).real), "fft"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLED_WRONG)
def test_refused_by_name(name: str) -> None:
    form, seen = SPELLED_WRONG[name]
    with pytest.raises(UnsupportedAttentionError, match=seen) as caught:
        explain(Encoder(form))
    assert "blocks.0.attention" in str(caught.value)


WEIGHED_WRONG: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "per feature, times and sum": (lambda m, x: (twice(m, x).softmax(1) * x).sum(1), "softmax"),
    "per feature, product": (
        lambda m, x: torch.einsum("bnd,bnd->bd", twice(m, x).softmax(1), x), "softmax|channels"
    ),
    "per feature, mean": (lambda m, x: (x * twice(m, x).softmax(1)).mean(1), "softmax"),
    "global context (GCNet)": (
        lambda m, x: (x + (m.one(x).softmax(1).mT @ x))[:, 0], "global context"
    ),
    "global context, times and sum": (
        lambda m, x: (x + (m.one(x).softmax(1) * x).sum(1, keepdim=True)).mean(1),
        "global context",
    ),
    "global context as a gate": (
        lambda m, x: (x * torch.sigmoid(m.one(x).softmax(1).mT @ x)).mean(1), "global context"
    ),
    "a gate over tokens": (lambda m, x: (x * m.one(x).softmax(1))[:, 0], "weighs them"),
    "a gate over tokens, then the greatest": (
        lambda m, x: (x * m.one(x).softmax(1)).amax(1), "weighs them"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHED_WRONG)
def test_pooling_that_is_refused_by_name(name: str) -> None:
    pool, seen = WEIGHED_WRONG[name]
    with pytest.raises(UnsupportedAttentionError, match=seen):
        explain(Bag(pool))


BOTH: dict[str, Attend] = {
    "softmax": lambda q, k, v: softmax(q, k) @ v,
    "fused": fused,
    "times and sum": lambda q, k, v: (softmax(q, k)[..., None] * v[..., None, :, :]).sum(-2),
}
every_form = pytest.mark.parametrize("attend", BOTH.values(), ids=BOTH)


@every_form
def test_values_of_another_input(attend: Attend) -> None:
    def scores(a: Tensor, b: Tensor) -> Tensor:
        return attend(one(a), one(a), two(b))[:, 0]

    torch.manual_seed(0)
    one, two = nn.Linear(3, 8).double(), nn.Linear(3, 8).double()
    with pytest.raises(UnsupportedAttentionError, match="of different inputs or positions"):
        explain(scores, features(), features(5))


def test_values_of_another_input_in_a_module() -> None:
    layer = nn.MultiheadAttention(3, 1, batch_first=True).double()
    with pytest.raises(UnsupportedAttentionError, match="of different inputs or positions"):
        explain(lambda a, b: layer(a, a, b)[0][:, 0], features(), features(5))
    assert explain(lambda a, b: layer(a, b, b)[0][:, 0], features(), features(5)).any()


# -- values and keys that belong together ------------------------------------------------------


class Reading(nn.Module):
    """`read(model, q, x)` attends from the tokens of q to those of x; the head reads the first."""

    def __init__(self, read: Callable[..., Tensor]) -> None:
        super().__init__()
        self.read = read
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ck, self.cv = (nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))
        self.sk, self.sv = (nn.Conv1d(WIDTH, WIDTH, 2, stride=2) for _ in range(2))
        self.places = nn.Parameter(torch.zeros(1, 6, WIDTH))
        self.memory = nn.Parameter(torch.zeros(1, 2, WIDTH))
        self.recall = nn.Parameter(torch.zeros(1, 2, WIDTH))
        oracles.randomise(self.double())

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.read(self, x))[:, 0])


def with_memory(one: Tensor, x: Tensor) -> Tensor:
    return torch.cat([one.expand(len(x), -1, -1), x], 1)


def along(conv: nn.Module, x: Tensor) -> Tensor:
    return conv(x.mT).mT


CONSTANTS = torch.arange(48, dtype=torch.float64).view(6, 8).sin()
TOGETHER: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "projections": lambda m, x: (m.k(x), m.v(x)),
    "positions in the keys": lambda m, x: (x + m.places, x),
    "positions in the keys, then projections": lambda m, x: (m.k(x + m.places), m.v(x)),
    "convolutions": lambda m, x: (along(m.ck, x), along(m.cv, x)),
    "convolution and projection": lambda m, x: (along(m.ck, x), m.v(x)),
    "strided convolutions": lambda m, x: (along(m.sk, x), along(m.sv, x)),
    "pooled": lambda m, x: (
        F.avg_pool1d(m.k(x).mT, 2).mT, F.max_pool1d(m.v(x).mT, 2).mT
    ),
    "pooled and convolved": lambda m, x: (F.avg_pool1d(x.mT, 2).mT, along(m.sv, x)),
    "memory": lambda m, x: (with_memory(m.memory, x), with_memory(m.recall, x)),
    "memory of zeros as values": lambda m, x: (
        with_memory(m.memory, x), with_memory(torch.zeros_like(m.memory), x)
    ),
    "zeros as values": lambda m, x: (x, torch.zeros_like(x)),
    "parameters as values": lambda m, x: (x, m.places.expand_as(x)),
    "constants as values": lambda m, x: (x, CONSTANTS.expand_as(x)),
    "both flipped": lambda m, x: (m.k(x.flip(1)), m.v(x.flip(1))),
    "both flipped, apart": lambda m, x: (m.k(x).flip(1), m.v(x).flip(1)),
    "some of them": lambda m, x: (m.k(x)[:, ::2], m.v(x)[:, [0, 2, 4]]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the score has no gradient")
@every_form
@pytest.mark.parametrize("name", TOGETHER)
def test_keys_and_values_that_belong_together(name: str, attend: Attend) -> None:
    """Eq. 5 by hand; columns are spread over the tokens that a key was merged from."""
    model = Reading(lambda m, x: attend(x, *TOGETHER[name](m, x)))
    kept: list[Tensor] = []

    def keeping(m: Any, x: Tensor) -> Tensor:
        keys, values = TOGETHER[name](m, x)
        kept.append(softmax(x, keys)[:, None])
        return kept[-1][:, 0] @ values

    twin = Reading(keeping)
    (expected,) = oracles.maps_from(lambda: twin(features()), kept, TARGET)
    expected = expected[:, 0]
    if expected.shape[1] == 8:
        expected = expected[:, 2:]
    elif name == "some of them":
        expected = torch.stack([expected, 0 * expected], -1).flatten(1)
    elif expected.shape[1] == 3:
        expected = expected.repeat_interleave(2, 1) / 2
    elif "flipped" in name:
        expected = expected.flip(1)
    expected[:, 0] = 0
    if name == "zeros as values":
        assert not explain(model).any()
    else:
        assert_same(explain(model), expected, TOLERANCE)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_rows_that_a_module_adds_to_keys_and_values(options: dict[str, bool]) -> None:
    layer = nn.MultiheadAttention(8, 1, batch_first=True, **options)
    oracles.randomise(layer.double())
    kept: list[Tensor] = []

    def by_hand(m: Any, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
        none = x.new_zeros(len(x), 1, 8)
        bias = [none if b is None else b.expand(len(x), 1, 8) for b in (layer.bias_k, layer.bias_v)]
        k, v = torch.cat([k, bias[0]], 1), torch.cat([v, bias[1]], 1)
        kept.append(softmax(q, k)[:, None])
        return layer.out_proj(kept[-1][:, 0] @ v)

    twin = Reading(by_hand)
    (expected,) = oracles.maps_from(lambda: twin(features()), kept, TARGET)
    expected = expected[:, 0, :6]
    expected[:, 0] = 0
    model = Reading(lambda m, x: layer(x, x, x)[0])
    assert_same(explain(model), expected, TOLERANCE)
