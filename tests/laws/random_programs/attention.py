"""Attention in many spellings and layouts of heads, each with the plain form that it must equal.

A `Form` says how logits, softmax, mask and product are written, a layout how heads are cut and
joined. Both change nothing of the function: `follow` computes it plainly, on a tape.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laws.random_programs.tape import Book, Tape

WIDTH = 8

# -- the plain form ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How attention is written; `kind` is what its logits are."""

    kind: str
    logits: str
    masking: str
    softmax: str
    product: str

    @property
    def names(self) -> list[str]:
        if self.product in {"fused", "gathered"}:
            return [f"product: {self.product}"]
        return [
            f"logits: {self.kind}/{self.logits}", f"masking: {self.masking}",
            f"softmax: {self.softmax}", f"product: {self.product}",
        ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Mask:
    """`allowed` is boolean, `bias` is added; either broadcasts to `[B, H, nq, nk]`, or is None."""

    name: str = "none"
    allowed: Tensor | None = None
    bias: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Mask:
        return Mask(
            self.name,
            None if self.allowed is None else change(self.allowed),
            None if self.bias is None else change(self.bias),
        )


NO_MASK = Mask()


def plain_logits(kind: str, q: Tensor, k: Tensor, scale: float, weight: Tensor) -> Tensor:
    """The logits that a kind of attention is defined by, `[..., nq, nk]`."""
    if kind == "distance":
        return -(q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1) * scale
    if kind == "additive":
        return (torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)) * weight).sum(-1)
    if kind == "cosine":
        q = q / q.square().sum(-1, keepdim=True).sqrt()
        k = k / k.square().sum(-1, keepdim=True).sqrt()
        return 3 * (q @ k.mT)
    return q @ k.mT * scale


def plain_probabilities(
    form: Form, q: Tensor, k: Tensor, mask: Mask, scale: float, weight: Tensor
) -> Tensor:
    """Softmax over the keys, with what is not allowed left out."""
    logits = plain_logits(form.kind, q, k, scale, weight)
    if mask.bias is not None:
        logits = logits + mask.bias
    if mask.allowed is not None:
        logits = logits.masked_fill(~mask.allowed, -math.inf)
    if form.kind == "top-k":
        least = logits.topk(2, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits.softmax(-1)


# -- spellings --------------------------------------------------------------------------------


def _letters(equation: str, like: Tensor) -> str:
    """The equation with a letter in front for each leading axis."""
    lead = "bh"[: like.ndim - 2]
    inputs, result = equation.split("->")
    return ",".join(lead + part for part in inputs.split(",")) + "->" + lead + result


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.ndim == 2:
        return torch.mm(a, b)
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], b.shape[-1])


DOTS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "matmul": lambda q, k, s: q @ k.mT * s,
    "scaled queries": lambda q, k, s: torch.matmul(q * s, k.transpose(-2, -1)),
    "both scaled": lambda q, k, s: (q * s**0.5) @ (k * s**0.5).transpose(-1, -2),
    "einsum dots": lambda q, k, s: torch.einsum("...qd,...kd->...qk", q, k) * s,
    "einsum letters": lambda q, k, s: torch.einsum(_letters("ic,jc->ij", q), q, k) * s,
    "keys first": lambda q, k, s: (k @ q.mT).mT * s,
    "bmm": lambda q, k, s: _bmm(q, k.mT) / (1 / s),
    "times and sum": lambda q, k, s: (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * s,
}

SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda a: a.softmax(-1),
    "functional": lambda a: F.softmax(a, dim=-1),
    "torch": lambda a: torch.softmax(a, -1),
    "module": nn.Softmax(dim=-1),
    "bare exp and sum": lambda a: (e := a.exp()) / e.sum(-1, keepdim=True),
    "exp less logsumexp": lambda a: (a - a.logsumexp(-1, keepdim=True)).exp(),
    "stable exp and sum": lambda a: (
        (e := (a - a.amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True)
    ),
    "exp of log": lambda a: a.log_softmax(-1).exp(),
    "keys first": lambda a: a.mT.softmax(-2).mT,
}

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda p, v: p @ v,
    "torch.matmul": torch.matmul,
    "bmm": _bmm,
    "einsum dots": lambda p, v: torch.einsum("...qk,...kd->...qd", p, v),
    "einsum letters": lambda p, v: torch.einsum(_letters("ij,jc->ic", p), p, v),
    "einsum values first": lambda p, v: torch.einsum(_letters("jc,ij->ic", p), v, p),
    "einsum transposed": lambda p, v: torch.einsum(_letters("ji,jc->ic", p), p.mT, v),
    "values transposed": lambda p, v: (v.mT @ p.mT).mT,
    "times and sum": lambda p, v: (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2),
    "times and sum over columns": lambda p, v: (p.mT.unsqueeze(-1) * v.unsqueeze(-2)).sum(-3),
}

SINGLE_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda p, v: F.linear(p, v.mT),
    "inner": lambda p, v: torch.inner(p, v.mT),
    "tensordot": lambda p, v: torch.tensordot(p, v, dims=([1], [0])),
    "mm": torch.mm,
    "one dot for each": lambda p, v: torch.stack([(w[:, None] * v).sum(0) for w in p]),
}
"""Products of one matrix with another."""


def _spelt_logits(form: Form, q: Tensor, k: Tensor, scale: float, weight: Tensor) -> Tensor:
    if form.kind in {"dot", "top-k"}:
        return DOTS[form.logits](q, k, scale)
    if form.kind == "distance" and form.logits == "cdist":
        return -(torch.cdist(q, k) ** 2) * scale
    if form.kind == "additive":
        hidden = torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3))
        return (
            hidden @ weight if form.logits == "product" else F.linear(hidden, weight[None])[..., 0]
        )
    if form.kind == "cosine":
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 3
    return (q[..., :, None, :] - k[..., None, :, :]).pow(2).sum(-1) * -scale


def _masked(form: Form, logits: Tensor, mask: Mask) -> Tensor:
    if mask.bias is not None:
        logits = logits + mask.bias
    if mask.allowed is not None:
        if form.masking == "where":
            logits = torch.where(mask.allowed, logits, -math.inf)
        elif form.masking == "added":
            logits = logits + torch.zeros_like(mask.allowed, dtype=logits.dtype).masked_fill(
                ~mask.allowed, -math.inf
            )
        else:
            logits = logits.masked_fill(mask.allowed.logical_not(), -math.inf)
    if form.kind == "top-k":
        top = logits.topk(2, -1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, top.indices, top.values)
    return logits


def spelt(
    form: Form, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, weight: Tensor
) -> Tensor:
    """Attention as the form writes it."""
    if form.product == "fused":
        given = mask.bias if mask.allowed is None else mask.allowed
        groups = dict(enable_gqa=True) if q.ndim == 4 and q.shape[1] != k.shape[1] else {}
        if form.masking == "is_causal" and mask.name == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, **groups)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=given, scale=scale, **groups)
    logits = _masked(form, _spelt_logits(form, q, k, scale, weight), mask)
    if form.product == "gathered":
        top = logits.topk(2, -1)
        places = top.indices.unsqueeze(-1).expand(*top.indices.shape, v.shape[-1])
        every = v.unsqueeze(-3).expand(*v.shape[:-2], q.shape[-2], *v.shape[-2:])
        return (top.values.softmax(-1).unsqueeze(-1) * every.gather(-2, places)).sum(-2)
    P = SOFTMAXES[form.softmax](logits)
    products = SINGLE_PRODUCTS if form.product in SINGLE_PRODUCTS else PRODUCTS
    return products[form.product](P, v)


def draw_form(rng: random.Random, *, single: bool = False) -> Form:
    kind = rng.choices(
        ["dot", "distance", "additive", "cosine", "top-k"], [76, 6, 6, 6, 6]
    )[0]  # fmt: skip
    logits = {
        "distance": ["cdist", "broadcast"], "additive": ["product", "linear"], "cosine": ["product"]
    }.get(kind, list(DOTS))  # fmt: skip
    product = rng.choice(list(SINGLE_PRODUCTS if single else PRODUCTS))
    masking = rng.choice(["masked_fill", "where", "added", "is_causal"])
    if not single and kind == "dot" and rng.random() < 0.3:
        product = "fused"
    if not single and kind == "top-k" and rng.random() < 0.3:
        product = "gathered"
    softmaxes = list(SOFTMAXES)
    if kind not in {"cosine", "additive"}:  # their logits are small: exp stays a number
        softmaxes.remove("bare exp and sum")
    return Form(kind, rng.choice(logits), masking, rng.choice(softmaxes), product)


def draw_mask(rng: random.Random, batch: int, queries: int, keys: int) -> Mask:
    """A mask that leaves each query at least two keys where it can."""
    names = ["none"] * 4 + ["padding", "additive"] + ["causal"] * (queries == keys)
    name = rng.choice(names)
    if name == "causal":
        return Mask(name, torch.ones(1, 1, queries, keys, dtype=torch.bool).tril())
    if name == "padding":
        lengths = torch.tensor([rng.randint(min(2, keys), keys) for _ in range(batch)])
        return Mask(name, (torch.arange(keys) < lengths[:, None])[:, None, None, :])
    if name == "additive":
        rows = [[rng.gauss(0, 1) for _ in range(keys)] for _ in range(queries)]
        return Mask(name, None, torch.tensor(rows, dtype=torch.float64)[None, None])
    return NO_MASK


# -- layouts of heads -------------------------------------------------------------------------


def split(x: Tensor, heads: int) -> Tensor:
    """`[B, n, H d]` to `[B, H, n, d]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _buffer(heads: Sequence[Tensor]) -> Tensor:
    batch, tokens, width = heads[0].shape
    return heads[0].new_zeros(batch, len(heads), tokens, width)


def _side_by_side(buffer: Tensor) -> Tensor:
    return buffer.transpose(1, 2).flatten(2)


def _written(heads: Sequence[Tensor]) -> Tensor:
    buffer = _buffer(heads)
    for h, head in enumerate(heads):
        buffer[:, h] = head
    return _side_by_side(buffer)


def _written_into_slices(heads: Sequence[Tensor]) -> Tensor:
    width = heads[0].shape[-1]
    buffer = torch.empty(*heads[0].shape[:-1], width * len(heads), dtype=heads[0].dtype)
    for h, head in enumerate(heads):
        buffer[..., h * width : (h + 1) * width] = head
    return buffer


def _copied(heads: Sequence[Tensor]) -> Tensor:
    buffer = _buffer(heads)
    for h, head in enumerate(heads):
        buffer[:, h].copy_(head)
    return _side_by_side(buffer)


def _index_copied(heads: Sequence[Tensor]) -> Tensor:
    buffer = _buffer(heads)
    for h, head in enumerate(heads):
        buffer = buffer.index_copy(1, torch.tensor([h]), head.unsqueeze(1))
    return _side_by_side(buffer)


def _select_scattered(heads: Sequence[Tensor]) -> Tensor:
    buffer = _buffer(heads)
    for h, head in enumerate(heads):
        buffer = buffer.select_scatter(head, 1, h)
    return _side_by_side(buffer)


def _slice_scattered(heads: Sequence[Tensor]) -> Tensor:
    width = heads[0].shape[-1]
    buffer = heads[0].new_zeros(*heads[0].shape[:-1], width * len(heads))
    for h, head in enumerate(heads):
        buffer = buffer.slice_scatter(head, -1, h * width, (h + 1) * width)
    return buffer


def _padded(heads: Sequence[Tensor]) -> Tensor:
    width, total = heads[0].shape[-1], heads[0].shape[-1] * len(heads)
    parts = [F.pad(o, (h * width, total - (h + 1) * width)) for h, o in enumerate(heads)]
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def _one_by_one(heads: Sequence[Tensor]) -> Tensor:
    result = heads[0]
    for head in heads[1:]:
        result = torch.cat([result, head], -1)
    return result


def _in_two_steps(heads: Sequence[Tensor]) -> Tensor:
    half = max(1, len(heads) // 2)
    halves = [torch.cat(list(part), -1) for part in (heads[:half], heads[half:]) if part]
    return torch.cat(halves, -1)


JOINS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "cat": lambda heads: torch.cat(list(heads), -1),
    "stack": lambda heads: torch.stack(list(heads), -2).flatten(-2),
    "stack of heads": lambda heads: _side_by_side(torch.stack(list(heads), 1)),
    "written": _written,
    "written into slices": _written_into_slices,
    "copy_": _copied,
    "index_copy": _index_copied,
    "select_scatter": _select_scattered,
    "slice_scatter": _slice_scattered,
    "padded and summed": _padded,
    "one by one": _one_by_one,
    "in two steps": _in_two_steps,
}


class Attention(nn.Module):
    """Queries from x, keys and values from y, `[B, n, D]` both.

    `follow` is the same with who attended to whom on the tape, and returns the ancestors too.
    """

    names: list[str]

    def follow(
        self, x: Tensor, x_book: Book, y: Tensor, y_book: Book, tape: Tape
    ) -> tuple[Tensor, frozenset[int]]:
        raise NotImplementedError


class Projected(Attention):
    """One projection of all heads each, cut and joined in some layout."""

    def __init__(self, rng: random.Random, mask: Mask, *, cut_batch: bool = False) -> None:
        """`cut_batch`: rows of the batch are windows, so that no layout may count on examples."""
        super().__init__()
        self.heads = rng.choice([1, 2, 2, 4])
        self.layout = rng.choice(["heads", "heads", "flat", "loop", "loop", "bnhd", "matrices"])
        if self.heads == 1:
            self.layout = rng.choice(["no head", "heads"])
        if cut_batch and self.layout == "matrices":
            self.layout = "heads"
        grouped = self.layout == "heads" and self.heads > 1 and rng.random() < 0.25
        self.key_heads = (
            rng.choice([h for h in (1, 2) if h < self.heads]) if grouped else self.heads
        )
        self.form = draw_form(rng, single=self.layout == "matrices")
        self.join = rng.choice(list(JOINS))
        self.order = rng.choice(["heads before keys", "keys before heads"])
        self.mask = mask
        self.scale = rng.choice([(WIDTH // self.heads) ** -0.5, 1.0, 0.7])
        width = WIDTH // self.heads
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, self.key_heads * width)
        self.value = nn.Linear(WIDTH, self.key_heads * width)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.zeros(width))
        self.names = [f"layout: {self.layout}", f"mask: {mask.name}"]
        self.names += [f"join: {self.join}"] if self.layout == "loop" else []
        self.names += ["grouped queries"] if grouped else []
        if self.layout == "bnhd":
            self.form = Form("dot", "einsum", "masked_fill", "axis", f"einsum {self.order}")
        self.names += self.form.names

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        layout = getattr(self, "_" + self.layout.replace(" ", "_"))
        return self.out(layout(self.query(x), self.key(y), self.value(y)))

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return spelt(self.form, q, k, v, mask, self.scale, self.weight)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = split(q, self.heads), split(k, self.key_heads), split(v, self.key_heads)
        if self.form.product != "fused" and self.key_heads < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.key_heads, 1) for t in (k, v))
        return self._weigh(q, k, v, self.mask).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)

    def _no_head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._weigh(q, k, v, self.mask.each(lambda m: m[:, 0]))

    def _flat(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = len(q)
        q, k, v = (split(t, self.heads).flatten(0, 1) for t in (q, k, v))

        def flat(m: Tensor) -> Tensor:
            return m.expand(batch, self.heads, -1, -1).flatten(0, 1)

        out = self._weigh(q, k, v, self.mask.each(flat))
        return _side_by_side(out.unflatten(0, (batch, self.heads)))

    def _loop(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.mask.each(lambda m: m[:, 0])
        parts = zip(*(t.chunk(self.heads, -1) for t in (q, k, v)), strict=True)
        return JOINS[self.join]([self._weigh(*part, mask) for part in parts])

    def _matrices(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (split(t, self.heads) for t in (q, k, v))
        rows = []
        for b in range(len(q)):
            mask = self.mask.each(lambda m, b=b: m[min(b, len(m) - 1), 0])
            rows.append(
                torch.cat(
                    [self._weigh(q[b, h], k[b, h], v[b, h], mask) for h in range(self.heads)], -1
                )
            )
        return torch.stack(rows)

    def _bnhd(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        if self.order == "heads before keys":
            logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale
            P = _masked(self.form, logits, self.mask).softmax(-1)
            return torch.einsum("bhqk,bkhd->bqhd", P, v).flatten(2)
        logits = torch.einsum("bkhd,bqhd->bqkh", k, q) * self.scale
        P = _masked(self.form, logits, self.mask.each(lambda m: m.movedim(1, -1))).softmax(2)
        return torch.einsum("bkhd,bqkh->bqhd", v, P).flatten(2)

    def follow(
        self, x: Tensor, x_book: Book, y: Tensor, y_book: Book, tape: Tape
    ) -> tuple[Tensor, frozenset[int]]:
        q = split(self.query(x), self.heads)
        k, v = split(self.key(y), self.key_heads), split(self.value(y), self.key_heads)
        k, v = (t.repeat_interleave(self.heads // self.key_heads, 1) for t in (k, v))
        P = plain_probabilities(self.form, q, k, self.mask, self.scale, self.weight)
        out, ancestors = tape.attend(P, v, x_book, y_book)
        return self.out(_side_by_side(out)), ancestors


class Head(nn.Module):
    """One head with projections of its own."""

    def __init__(self, form: Form, mask: Mask, width: int) -> None:
        super().__init__()
        self.form, self.mask, self.scale = form, mask, width**-0.5
        self.query, self.key, self.value = (nn.Linear(WIDTH, width) for _ in range(3))
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = self.mask.each(lambda m: m[:, 0])
        q, k, v = self.query(x), self.key(y), self.value(y)
        return spelt(self.form, q, k, v, mask, self.scale, self.weight)

    def plain(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (t.unsqueeze(1) for t in (self.query(x), self.key(y), self.value(y)))
        return plain_probabilities(self.form, q, k, self.mask, self.scale, self.weight), v


class HeadList(Attention):
    """Heads that are modules, their results side by side."""

    def __init__(self, rng: random.Random, mask: Mask) -> None:
        super().__init__()
        count, form = rng.choice([2, 4]), draw_form(rng)
        self.heads = nn.ModuleList(Head(form, mask, WIDTH // count) for _ in range(count))
        self.join = rng.choice(list(JOINS))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.names = ["layout: modules", f"join: {self.join}", f"mask: {mask.name}", *form.names]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(JOINS[self.join]([head(x, y) for head in self.heads]))

    def follow(
        self, x: Tensor, x_book: Book, y: Tensor, y_book: Book, tape: Tape
    ) -> tuple[Tensor, frozenset[int]]:
        parts = [head.plain(x, y) for head in self.heads]
        P, v = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        out, ancestors = tape.attend(P, v, x_book, y_book)
        return self.out(_side_by_side(out)), ancestors


class Branches(Attention):
    """Heads with output weights of their own, added: branches, each of full weight."""

    def __init__(self, rng: random.Random, mask: Mask) -> None:
        super().__init__()
        form = draw_form(rng)
        self.heads = nn.ModuleList(Head(form, mask, 4) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(4, WIDTH) for _ in range(2))
        self.names = ["layout: branches", f"mask: {mask.name}", *form.names]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        parts = [out(head(x, y)) for head, out in zip(self.heads, self.outs, strict=True)]
        return parts[0] + parts[1]

    def follow(
        self, x: Tensor, x_book: Book, y: Tensor, y_book: Book, tape: Tape
    ) -> tuple[Tensor, frozenset[int]]:
        total, found = torch.zeros(()), frozenset[int]()
        for head, project in zip(self.heads, self.outs, strict=True):
            out, ancestors = tape.attend(*head.plain(x, y), x_book, y_book)
            total, found = total + project(out[:, 0]), found | ancestors
        return total, found


class Multihead(Attention):
    """`nn.MultiheadAttention` with its options."""

    def __init__(self, rng: random.Random, mask: Mask) -> None:
        super().__init__()
        self.heads = rng.choice([1, 2, 4])
        self.batch_first = rng.choice([True, False])
        self.need_weights = rng.choice([True, False])
        self.average = rng.choice([True, False])
        self.mask = mask
        self.inner = nn.MultiheadAttention(WIDTH, self.heads, batch_first=self.batch_first)
        self.names = [
            f"layout: MultiheadAttention need_weights={self.need_weights}", f"mask: {mask.name}",
            f"MultiheadAttention batch_first={self.batch_first}",
        ]  # fmt: skip

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        padding = attn_mask = None
        if self.mask.name == "padding":
            padding = ~self.mask.allowed[:, 0, 0]
        elif self.mask.allowed is not None:
            attn_mask = ~self.mask.allowed[0, 0]
        elif self.mask.bias is not None:
            attn_mask = self.mask.bias[0, 0]
        if not self.batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        out, _ = self.inner(
            x, y, y, key_padding_mask=padding, attn_mask=attn_mask,
            need_weights=self.need_weights, average_attn_weights=self.average,
        )  # fmt: skip
        return out if self.batch_first else out.transpose(0, 1)

    def follow(
        self, x: Tensor, x_book: Book, y: Tensor, y_book: Book, tape: Tape
    ) -> tuple[Tensor, frozenset[int]]:
        weights = self.inner.in_proj_weight.chunk(3)
        biases = self.inner.in_proj_bias.chunk(3)
        q, k, v = (
            split(F.linear(t, w, b), self.heads)
            for t, w, b in zip((x, y, y), weights, biases, strict=True)
        )
        form = Form("dot", "", "", "", "")
        scale = (WIDTH // self.heads) ** -0.5
        P = plain_probabilities(form, q, k, self.mask, scale, torch.zeros(()))
        out, ancestors = tape.attend(P, v, x_book, y_book)
        return self.inner.out_proj(_side_by_side(out)), ancestors


def draw_attention(rng: random.Random, mask: Mask, *, windows: bool = False) -> Attention:
    if windows:
        return Projected(rng, NO_MASK, cut_batch=True)
    kind = rng.choices([Projected, HeadList, Branches, Multihead], [60, 12, 10, 18])[0]
    return kind(rng, mask)
