"""Heads that a model calls one by one are averaged, however their results are concatenated.

Results on different elements of one tensor are heads of one layer. Results that are added are
branches, whose maps add up. The reference is the fused spelling of the same function, or eq. 5 and
6 by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import oracles
from zoo.encoder import WIDTH, Encoder, features
from zoo.laws import assert_same

from captum_generic_attn import GenericAttention

TARGET = 1
TOLERANCE = 1e-9
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Heads = Sequence[Tensor]


def by_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


WAYS: dict[str, Attend] = {"softmax": by_softmax, "fused": F.scaled_dot_product_attention}
both_ways = pytest.mark.parametrize("attend", WAYS.values(), ids=WAYS)


def keeps() -> tuple[Attend, list[Tensor]]:
    """Attention of one head, and the list that its probabilities go to."""
    kept: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))
        kept[-1].retain_grad()
        return kept[-1] @ v

    return attend, kept


def eq5(probabilities: Tensor) -> Tensor:
    return (probabilities * probabilities.grad).clamp(min=0).detach()


def explain(model: Callable[..., Tensor], inputs: Tensor | None = None) -> Tensor:
    inputs = features() if inputs is None else inputs
    return GenericAttention(model).attribute(inputs, TARGET, return_input_shape=False)


def in_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, H, N, d]` as another number of heads."""
    return x.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)


def one_by_one(attend: Attend, join: Callable[[Heads], Tensor], heads: int) -> Attend:
    """Attention whose heads are called in a loop; `join` makes `[B, N, H * d]` of `[B, N, d]`."""

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (in_heads(t, heads) for t in (q, k, v))
        found = join([attend(q[:, h], k[:, h], v[:, h]) for h in range(heads)])
        return found.unflatten(-1, (heads, -1)).transpose(1, 2)

    return form


def together(attend: Attend, heads: int) -> Attend:
    return lambda q, k, v: attend(*(in_heads(t, heads) for t in (q, k, v)))


def flat(x: Tensor) -> Tensor:
    """`[B, H, N, d]` to `[B, N, H * d]`."""
    return x.transpose(1, 2).flatten(2)


def blank(heads: Heads, *, last: bool = True, fill: float | None = 0.0) -> Tensor:
    """A buffer for all heads, `[B, N, H * d]` or `[B, H, N, d]`."""
    batch, tokens, width = heads[0].shape
    shape = (batch, tokens, width * len(heads)) if last else (batch, len(heads), tokens, width)
    return heads[0].new_empty(shape) if fill is None else heads[0].new_full(shape, fill)


def span(heads: Heads, h: int) -> slice:
    width = heads[0].shape[-1]
    return slice(h * width, (h + 1) * width)


def writing(write: Callable[[Tensor, int, Tensor], Tensor | None], fill: float | None = 0.0):
    """A join that writes each head into `[B, H, N, d]`."""

    def join(heads: Heads) -> Tensor:
        buffer = blank(heads, last=False, fill=fill)
        for h, head in enumerate(heads):
            written = write(buffer, h, head)
            buffer = buffer if written is None else written
        return flat(buffer)

    return join


def into_features(write: Callable[[Tensor, slice, Tensor], Tensor | None], order: int = 1):
    """A join that writes each head into its part of `[B, N, H * d]`."""

    def join(heads: Heads) -> Tensor:
        buffer = blank(heads)
        for h, head in list(enumerate(heads))[::order]:
            written = write(buffer, span(heads, h), head)
            buffer = buffer if written is None else written
        return buffer

    return join


def padded(heads: Heads) -> list[Tensor]:
    width = heads[0].shape[-1]
    before = [h * width for h in range(len(heads))]
    return [
        F.pad(head, (left, (len(heads) - 1) * width - left))
        for head, left in zip(heads, before, strict=True)
    ]


def one_after_the_other(heads: Heads) -> Tensor:
    found = heads[0]
    for head in heads[1:]:
        found = torch.cat([found, head], -1)
    return found


def scattered(heads: Heads) -> Tensor:
    buffer = blank(heads)
    for h, head in enumerate(heads):
        places = torch.arange(buffer.shape[-1])[span(heads, h)].expand(head.shape)
        buffer = buffer.scatter(-1, places, head)
    return buffer


def written_where(heads: Heads) -> Tensor:
    """Each head is repeated over all features, and `where` chooses its own."""
    found = heads[0].repeat(1, 1, len(heads))
    owner = torch.arange(found.shape[-1]) // heads[0].shape[-1]
    for h, head in enumerate(heads):
        found = torch.where(owner == h, head.repeat(1, 1, len(heads)), found)
    return found


def setitem(buffer: Tensor, place: object, head: Tensor) -> None:
    buffer[place] = head


JOINS: dict[str, Callable[[Heads], Tensor]] = {
    "cat": lambda o: torch.cat(list(o), -1),
    "cat, dim=2": lambda o: torch.cat(tensors=tuple(o), dim=2),
    "concat": lambda o: torch.concat(tuple(o), 2),
    "dstack": lambda o: torch.dstack(tuple(o)),
    "stack, flatten": lambda o: torch.stack(list(o), -2).flatten(2),
    "stack, permute, reshape": lambda o: (
        torch.stack(list(o)).permute(1, 2, 0, 3).reshape(*o[0].shape[:2], -1)
    ),
    "stack last, transpose": lambda o: torch.stack(list(o), -1).transpose(2, 3).flatten(2),
    "cat of unsqueezed": lambda o: flat(torch.cat([x.unsqueeze(1) for x in o], 1)),
    "in two steps": lambda o: torch.cat(
        [torch.cat(list(o[: len(o) // 2]), -1), torch.cat(list(o[len(o) // 2 :]), -1)], -1
    ),
    "in unequal steps": lambda o: torch.cat([torch.cat(list(o[:-1]), -1), o[-1]], -1),
    "one after the other": one_after_the_other,
    "cat and stack": lambda o: torch.cat([torch.stack(list(o[:-1]), 1), o[-1][:, None]], 1)
    .transpose(1, 2)
    .flatten(2),
    "buffer[:, h] =": writing(lambda r, h, x: setitem(r, (slice(None), h), x)),
    "empty[:, h] =": writing(lambda r, h, x: setitem(r, (slice(None), h), x), fill=None),
    "buffer[..., a:b] =": into_features(lambda r, at, x: setitem(r, (..., at), x)),
    "the last one first": into_features(lambda r, at, x: setitem(r, (..., at), x), -1),
    "buffer[..., index] =": into_features(
        lambda r, at, x: setitem(r, (..., torch.arange(at.start, at.stop)), x)
    ),
    "copy_ into a view": writing(lambda r, h, x: (r[:, h].copy_(x), None)[1]),
    "copy_ into a slice": into_features(lambda r, at, x: (r[..., at].copy_(x), None)[1]),
    "copy_ into narrow": into_features(
        lambda r, at, x: (r.narrow(-1, at.start, at.stop - at.start).copy_(x), None)[1]
    ),
    "copy_ into select": writing(lambda r, h, x: (r.select(1, h).copy_(x), None)[1]),
    "index_copy_": writing(
        lambda r, h, x: (r.index_copy_(1, torch.tensor([h]), x.unsqueeze(1)), None)[1]
    ),
    "index_copy": writing(lambda r, h, x: r.index_copy(1, torch.tensor([h]), x.unsqueeze(1))),
    "index_copy of features": into_features(
        lambda r, at, x: r.index_copy(-1, torch.arange(at.start, at.stop), x)
    ),
    "index_put": writing(
        lambda r, h, x: r.transpose(0, 1).index_put((torch.tensor([h]),), x).transpose(0, 1)
    ),
    "select_scatter": writing(lambda r, h, x: torch.select_scatter(r, x, 1, h)),
    "select_scatter, by name": writing(lambda r, h, x: r.select_scatter(x, dim=1, index=h)),
    "slice_scatter": into_features(
        lambda r, at, x: torch.slice_scatter(r, x, -1, at.start, at.stop)
    ),
    "slice_scatter, by name": into_features(
        lambda r, at, x: r.slice_scatter(src=x, dim=2, start=at.start, end=at.stop)
    ),
    "scatter": scattered,
    "pad and sum": lambda o: sum(padded(o)[1:], padded(o)[0]),
    "pad, stack and sum": lambda o: torch.stack(padded(o)).sum(0),
    "zeros[..., a:b] +=": into_features(lambda r, at, x: (r[..., at].add_(x), None)[1]),
    "zeros[:, h] +=": writing(
        lambda r, h, x: setitem(r, (slice(None), h), r[:, h] + x)
    ),
    "where": written_where,
    "index_add": writing(lambda r, h, x: r.index_add(1, torch.tensor([h]), x.unsqueeze(1))),
    "index_put, accumulate": writing(
        lambda r, h, x: r.transpose(0, 1)
        .index_put((torch.tensor([h]),), x, accumulate=True)
        .transpose(0, 1)
    ),
    "scatter_add": writing(
        lambda r, h, x: r.scatter_add(1, torch.full_like(x.unsqueeze(1), h).long(), x.unsqueeze(1))
    ),
    "sorted by a key": lambda o: torch.cat(list(o), -1).flip(-1).flip(-1),
    "mean of the padded, times their number": lambda o: torch.stack(padded(o)).mean(0) * len(o),
    "difference of the padded": lambda o: padded(o)[0] - sum(-x for x in padded(o)[1:]),
}  # fmt: skip


@cache
def fused_layers(heads: int) -> Tensor:
    return explain(Encoder(together(F.scaled_dot_product_attention, heads)))


@pytest.mark.parametrize(
    ("heads", "way"), [(2, "softmax"), (4, "fused")], ids=["2 heads, softmax", "4 heads, fused"]
)
@pytest.mark.parametrize("name", JOINS)
def test_heads_of_one_layer(name: str, heads: int, way: str) -> None:
    model = Encoder(one_by_one(WAYS[way], JOINS[name], heads))
    assert_same(explain(model), fused_layers(heads), TOLERANCE)


# -- heads that differ in their modules, keys or queries ---------------------------------------


class Head(nn.Module):
    """One head as most tutorials write it, with its part of the projections of a fused layer."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH // 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.query(x), self.key(x), self.value(x))


class Apart(nn.Module):
    """An attention layer whose heads are modules; with `left` and `right`, of two owners."""

    def __init__(self, attend: Attend, *, owners: bool) -> None:
        super().__init__()
        if owners:
            self.left, self.right = nn.Sequential(Head(attend)), nn.Sequential(Head(attend))
        else:
            self.heads = nn.ModuleList(Head(attend) for _ in range(2))
        self.owners = owners
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.left, self.right) if self.owners else self.heads
        return self.out(torch.cat([head(x) for head in heads], -1))


@both_ways
@pytest.mark.parametrize("owners", [False, True], ids=["ModuleList", "two modules"])
def test_heads_that_are_modules(owners: bool, attend: Attend) -> None:
    model, reference = Encoder(attend), Encoder(attend)
    for block in model.blocks:
        whole, block.attention = block.attention, Apart(attend, owners=owners).double()
        parts = [m for m in block.attention.modules() if isinstance(m, Head)]
        block.attention.out = whole.out
        for h, part in enumerate(parts):
            rows = slice(h * WIDTH // 2, (h + 1) * WIDTH // 2)
            for name in ("query", "key", "value"):
                linear, fused = getattr(part, name), getattr(whole, name)
                linear.weight.data, linear.bias.data = (
                    fused.weight.data[rows],
                    fused.bias.data[rows],
                )
    assert_same(explain(model), explain(reference), TOLERANCE)


def striped(attend: Attend) -> Attend:
    """One head in each row, the other in each column of a map of 2 x 3, as CSWin's stripes."""

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = ([t[:, h].unflatten(1, (2, 3)) for t in (q, k, v)] for h in (0, 1))
        across = attend(*rows).flatten(1, 2)
        down = attend(*(t.transpose(1, 2) for t in columns)).transpose(1, 2).flatten(1, 2)
        return torch.stack([across, down], 1)

    return form


def masked_to_stripes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, column = torch.arange(6) // 3, torch.arange(6) % 3
    seen = torch.stack([row[:, None] == row, column[:, None] == column])
    return F.scaled_dot_product_attention(q, k, v, seen)


@both_ways
def test_stripes_of_both_directions_are_heads(attend: Attend) -> None:
    expected = explain(Encoder(masked_to_stripes))
    assert_same(explain(Encoder(striped(attend))), expected, TOLERANCE)


POOLING = torch.eye(6, dtype=torch.float64).unflatten(0, (3, 2)).mean(1)
"""Pairs of neighbours, averaged: `[3, 6]`."""


def shunted(attend: Attend) -> Attend:
    """The second head's keys and values are averages of two tokens, as in Shunted attention."""

    def form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fine = attend(q[:, 0], k[:, 0], v[:, 0])
        small = (t[:, 1].unflatten(1, (3, 2)).mean(2) for t in (k, v))
        return torch.stack([fine, attend(q[:, 1], *small)], 1)

    return form


@both_ways
def test_reduced_keys_of_half_of_the_heads(attend: Attend) -> None:
    """By hand: the mean of the heads; a pooled key is the mean of two tokens."""
    keeping, kept = keeps()
    Encoder(shunted(keeping))(features())[:, TARGET].sum().backward()
    relevance = torch.eye(6, dtype=torch.float64)
    for fine, coarse in zip(kept[::2], kept[1::2], strict=True):
        maps = [eq5(p) for p in (fine, coarse)]
        relevance = relevance + (maps[0] @ relevance + maps[1] @ (POOLING @ relevance)) / 2
    expected = oracles.read_row(relevance, 0)
    assert_same(explain(Encoder(shunted(attend))), expected, TOLERANCE)


# -- branches ----------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two attentions of one head each over the same tokens, and a function of their results."""

    def __init__(self, attend: Attend, meet: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend, self.meet = attend, meet
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.parts = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.mix = nn.Parameter(torch.randn(2))
        oracles.randomise(self.double())

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        found = [self.attend(*part(x).chunk(3, -1)) for part in self.parts]
        return self.head(self.meet(self, x, *found)[:, 0])


BRANCHES: dict[str, Callable[..., Tensor]] = {
    "sum": lambda m, x, a, b: x + a + b,
    "sum of the two first": lambda m, x, a, b: x + (a + b),
    "difference": lambda m, x, a, b: x + (a - b),
    "in place": lambda m, x, a, b: x.clone().add_(a).add_(b),
    "weights of their own": lambda m, x, a, b: x + m.out[0](a) + m.out[1](b),
    "stack and sum": lambda m, x, a, b: x + torch.stack([a, b]).sum(0),
    "stack last and sum": lambda m, x, a, b: x + torch.stack([a, b], -1).sum(-1),
    "stack with the stream and sum": lambda m, x, a, b: torch.stack([x, a, b]).sum(0),
    "mean of the stack": lambda m, x, a, b: x + torch.stack([a, b]).mean(0),
    "cat and sum": lambda m, x, a, b: x + torch.cat([a, b], -1).unflatten(-1, (2, -1)).sum(-2),
    "maximum of the stack": lambda m, x, a, b: x + torch.stack([a, b]).amax(0),
    "stack weighed by a product": lambda m, x, a, b: x + torch.stack([a, b], -1) @ m.mix,
    "stack weighed by einsum": lambda m, x, a, b: (
        x + torch.einsum("h,hbnd->bnd", m.mix, torch.stack([a, b]))
    ),
    "stack weighed by tensordot": lambda m, x, a, b: (
        x + torch.tensordot(m.mix, torch.stack([a, b]), 1)
    ),
    "lerp": lambda m, x, a, b: x + torch.lerp(a, b, 0.3),
    "gate": lambda m, x, a, b: x + a * b.sigmoid(),
    "overlapping pads": lambda m, x, a, b: (
        x + F.pad(a, (0, 2))[..., :WIDTH] + F.pad(b, (2, 0))[..., :WIDTH]
    ),
    "written to one buffer": lambda m, x, a, b: (
        x + torch.zeros_like(x).index_add(1, torch.arange(6).repeat(2), torch.cat([a, b], 1))
    ),
    "stacked and taken apart": lambda m, x, a, b: x + sum(torch.stack([a, b]).unbind(0)),
}


@both_ways
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_add_up(name: str, attend: Attend) -> None:
    """R = I + A1 + A2, whatever the two results are multiplied with."""
    keeping, kept = keeps()
    model = Branches(keeping, BRANCHES[name])
    model(features())[:, TARGET].sum().backward()
    relevance = torch.eye(6) + sum(map(eq5, kept))
    model.attend = attend
    assert_same(explain(model), oracles.read_row(relevance, 0), TOLERANCE)


SIDE_BY_SIDE: dict[str, Callable[..., Tensor]] = {
    "cat and a weight": lambda m, x, a, b: x + torch.cat([a, b], -1) @ m.wide,
    "stack and a weight, by einsum": lambda m, x, a, b: (
        x + torch.einsum("hbnd,hde->bne", torch.stack([a, b]), m.wide.unflatten(0, (2, -1)))
    ),
    "stack last and a weight, by tensordot": lambda m, x, a, b: (
        x + torch.tensordot(torch.stack([a, b], -2), m.wide.unflatten(0, (2, -1)), 2)
    ),
}


@both_ways
@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_features_side_by_side_that_one_weight_mixes_are_heads(name: str, attend: Attend) -> None:
    """Two attentions whose concatenated results one weight reads: R = I + (A1 + A2) / 2."""
    keeping, kept = keeps()
    model = Branches(keeping, SIDE_BY_SIDE[name])
    model.wide = nn.Parameter(torch.randn(2 * WIDTH, WIDTH, dtype=torch.float64))
    model(features())[:, TARGET].sum().backward()
    relevance = torch.eye(6) + sum(map(eq5, kept)) / 2
    model.attend = attend
    assert_same(explain(model), oracles.read_row(relevance, 0), TOLERANCE)
