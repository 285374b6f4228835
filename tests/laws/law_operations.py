"""Operations that programs are drawn from: each maps tokens `x` and `y` of one shape to tokens.

Where a statistic or a gate is part of an operation, `world.hold` marks it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laws.law import World
from laws.law_functions import (
    BothFlipped,
    Flipped,
    InNumpy,
    OtherExample,
    RolledInNumpy,
    Scaled,
    SwapsTwo,
    WrittenInPlace,
    python_function,
    scripted,
    scripted_flip,
)

Op = Callable[[World, Tensor, Tensor], Tensor]

torch.manual_seed(0)
LEARNED = nn.ModuleDict(
    {
        **{
            kind.__name__ + size: kind(int(size), int(size), batch_first=True)
            for kind in (nn.LSTM, nn.GRU, nn.RNN)
            for size in "248"
        },
        "bi": nn.LSTM(4, 2, batch_first=True, bidirectional=True),
    }
).double()


def _recurrent(kind: str) -> Op:
    def run(w: World, x: Tensor, y: Tensor) -> Tensor:
        name = f"{kind}{x.shape[-1]}"
        return LEARNED[name](x)[0] if name in LEARNED else x.cumsum(1)

    return run


# --- places and writes


def _order(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1]).roll(1)


def _each(x: Tensor) -> Tensor:
    return _order(x)[None, :, None].expand(x.shape)


def _rows(x: Tensor) -> Tensor:
    return torch.arange(len(x))[:, None]


def _into(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    buffer = torch.zeros_like(x)
    write(buffer)
    return buffer


def _over(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    buffer = x.clone()
    write(buffer)
    return buffer


def _set(where: Any, value: Tensor) -> Callable[[Tensor], None]:
    return lambda buffer: buffer.__setitem__(where, value)


def _through_view(x: Tensor, y: Tensor) -> Tensor:
    buffer = x.clone()
    flat = buffer.view(-1, x.shape[-1])
    flat[1:] = y.reshape(-1, x.shape[-1])[:-1]
    return buffer


def _view_from_before(x: Tensor, y: Tensor) -> Tensor:
    buffer = x.clone()
    seen = buffer.mT
    buffer[:, 0] += y[:, -1]
    return seen.mT


def _loop(x: Tensor, y: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    for i in range(x.shape[1]):
        buffer[:, i] = x[:, i] + y[:, i - 1]
    return buffer


def _scan(x: Tensor) -> Tensor:
    state, found = x[:, 0], []
    for i in range(x.shape[1]):
        state = 0.5 * state + x[:, i]
        found.append(state)
    return torch.stack(found, 1)


def _gathered_list(x: Tensor) -> Tensor:
    parts = list(x.unbind(1))
    return torch.stack(parts[1:] + parts[:1], 1)


def _scattered(x: Tensor, name: str, **how: Any) -> Tensor:
    return getattr(torch.zeros_like(x), name)(1, _each(x), x, **how)


def _accumulated(x: Tensor, y: Tensor) -> Tensor:
    buffer = x.clone()
    buffer.index_put_((_rows(x), _order(x)[None]), y, accumulate=True)
    return buffer


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.chunk(2, -1) if x.shape[-1] % 2 == 0 else (x, x)


def _experts(w: World, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out = torch.zeros_like(flat)
    for i in range(2):
        rows = torch.arange(i, len(flat), 2)
        out.index_add_(0, rows, flat[rows] @ w.features(x))
    return out.view_as(x)


def _square(w: World, x: Tensor) -> Tensor:
    n = x.shape[1]
    return w.weight(n, n) + n * torch.eye(n, dtype=torch.float64)


def _pool(w: World, x: Tensor, pooled: Tensor) -> Tensor:
    return pooled.expand_as(x)


def _normal(w: World, x: Tensor, axis: int) -> Tensor:
    if w.captured:
        return F.normalize(x, dim=axis)
    return x / w.hold(x.norm(dim=axis, keepdim=True))


def _softmax(w: World, x: Tensor, axis: int) -> Tensor:
    if w.captured:
        return x.softmax(axis)
    return x.exp() / w.hold(x.exp().sum(axis, keepdim=True))


def _whitened(w: World, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    deviation = (x.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (x - w.hold(mean)) / w.hold(deviation)


MOVES: dict[str, Op] = {
    "roll": lambda w, x, y: x.roll(1, 1),
    "flip": lambda w, x, y: x.flip(1),
    "index": lambda w, x, y: x[:, _order(x)],
    "index of pairs": lambda w, x, y: x[_rows(x), _order(x)[None]],
    "index select": lambda w, x, y: x.index_select(1, _order(x)),
    "gather": lambda w, x, y: x.gather(1, _each(x)),
    "gather by feature": lambda w, x, y: x.gather(
        1, torch.arange(x.numel()).view_as(x) % x.shape[1]
    ),
    "take along": lambda w, x, y: x.take_along_dim(_each(x), 1),
    "take": lambda w, x, y: x.take(torch.arange(x.numel()).flip(0).view_as(x)),
    "repeat": lambda w, x, y: x.repeat_interleave(2, 1)[:, : x.shape[1]],
    "shift": lambda w, x, y: F.pad(x, (0, 0, 1, -1)),
    "reflect": lambda w, x, y: (
        F.pad(x.mT, (1, 0), mode="reflect").mT[:, :-1] if x.shape[1] > 1 else x
    ),
    "circular": lambda w, x, y: F.pad(x.mT, (1, 0), mode="circular").mT[:, :-1],
    "replicate": lambda w, x, y: F.pad(x.mT, (1, 0), mode="replicate").mT[:, :-1],
    "halves": lambda w, x, y: torch.cat([x[:, 1:], x[:, :1]], 1),
    "list": lambda w, x, y: _gathered_list(x),
    "two joined": lambda w, x, y: torch.cat([x, y], 1)[:, 1 : x.shape[1] + 1],
    "features of both": lambda w, x, y: torch.cat([_halves(x)[0], _halves(y)[1]], -1),
    "batches": lambda w, x, y: torch.cat([x, y], 0)[1 : len(x) + 1],
    "examples": lambda w, x, y: x.flip(0),
    "example": lambda w, x, y: x[:1].expand_as(x),
    "one token": lambda w, x, y: x[:, :1].expand_as(x),
    "one feature": lambda w, x, y: x[..., :1].expand_as(x),
    "turned": lambda w, x, y: x.mT.reshape(x.shape),
    "flat roll": lambda w, x, y: x.flatten(1).roll(1, -1).view(x.shape),
    "roll of all": lambda w, x, y: x.roll(1),
    "features": lambda w, x, y: x.roll(1, -1),
    "choice": lambda w, x, y: torch.where(torch.arange(x.shape[1])[:, None] > 0, x, y.roll(1, 1)),
    "choice by value": lambda w, x, y: torch.where(x > y, x, y.flip(1)),
    "sort": lambda w, x, y: x.sort(1).values,
    "sort rows": lambda w, x, y: x.gather(1, x.sum(-1, True).argsort(1).expand_as(x)),
    "top": lambda w, x, y: x.topk(x.shape[1], 1).values,
    "top of rows": lambda w, x, y: x[_rows(x), x.sum(-1).topk(x.shape[1], 1).indices],
    "msort": lambda w, x, y: torch.msort(x.transpose(0, 1)).transpose(0, 1),
    "kth": lambda w, x, y: x.kthvalue(1, 1, True).values.expand_as(x),
    "median": lambda w, x, y: x.median(1, True).values.expand_as(x),
    "as strided": lambda w, x, y: x.contiguous().as_strided(x.shape, x.stride(), 0),
    "strided away": lambda w, x, y: torch.as_strided(
        x.repeat(1, 2, 1), x.shape, (2 * x[0].numel(), x.shape[-1], 1), x.shape[-1]
    ),
    "diagonal": lambda w, x, y: (
        torch.diagonal(x[:, :, None].expand(-1, -1, x.shape[1], -1).flip(1), 0, 1, 2).mT
    ),
    "rot": lambda w, x, y: x.rot90(2, (0, 1)),
    "meshed": lambda w, x, y: torch.stack([x, y], 2).flatten(1, 2)[:, : x.shape[1]],
    "masked": lambda w, x, y: x[torch.ones(x.shape[:2], dtype=torch.bool)].view_as(x).roll(1, 0),
    "detour": lambda w, x, y: (
        x.view(-1, x.shape[-1]).roll(1, 0).view_as(x) if x.is_contiguous() else x
    ),
    "complex": lambda w, x, y: torch.view_as_real(
        torch.view_as_complex(torch.stack([x, y.flip(1)], -1))
    )[..., 1],
    "imaginary": lambda w, x, y: torch.complex(x, y.flip(1)).imag,
    "diff": lambda w, x, y: torch.diff(x, dim=1, prepend=x[:, :1]),
    "embedding in tokens": lambda w, x, y: (
        F.embedding(_order(x), x.transpose(0, 1).flatten(1))
        .view(x.shape[1], len(x), -1)
        .transpose(0, 1)
    ),
    "block": lambda w, x, y: torch.block_diag(*x.flip(1))[: x.shape[1], : x.shape[2]].expand_as(x),
    "column": lambda w, x, y: (
        torch.hstack([x, y])[:, ::2][:, : x.shape[1]] if x.shape[1] > 1 else x
    ),
    "window": lambda w, x, y: F.pad(x, (0, 0, 1, 0)).unfold(1, 2, 1)[..., 0],
    "im2col": lambda w, x, y: F.unfold(F.pad(x[:, None], (0, 0, 1, 0)), (2, 1))[:, :1].view_as(x),
    "swap channels": lambda w, x, y: (
        torch.channel_shuffle(x[..., None, None].flatten(0, 1), 2).view_as(x)
        if x.shape[-1] % 2 == 0
        else x
    ),
    "narrow": lambda w, x, y: torch.cat([x.narrow(1, 1, x.shape[1] - 1), y.narrow(1, 0, 1)], 1),
    "cross": lambda w, x, y: torch.linalg.cross(x, y, dim=1) if x.shape[1] == 3 else x,
    "movedim": lambda w, x, y: x.movedim(1, 0).flip(0).movedim(0, 1),
    "pixels": lambda w, x, y: F.pixel_shuffle(x[..., None].repeat(1, 4, 1, 1), 2).flatten(2)[
        :, : x.shape[1], : x.shape[2]
    ],
}

WRITES: dict[str, Op] = {
    "set": lambda w, x, y: _into(x, _set((slice(None), slice(1, None)), x[:, :-1])),
    "set over": lambda w, x, y: _over(x, _set((slice(None), slice(1, None)), y[:, :-1])),
    "set rows": lambda w, x, y: _over(x, _set((_rows(x), _order(x)[None]), y)),
    "set masked": lambda w, x, y: _over(x, _set(y > x, 0.0)),
    "set masked values": lambda w, x, y: _over(x, _set(y > x, y.flip(1)[y > x])),
    "set one": lambda w, x, y: _over(x, _set((slice(None), 0), y[:, -1])),
    "set one feature": lambda w, x, y: _over(x, _set((..., 0), y.flip(1)[..., 0])),
    "set example": lambda w, x, y: _over(x, _set(0, y[-1])),
    "set broadcast": lambda w, x, y: _over(x, _set((slice(None), slice(0, 2)), y[:, -1:])),
    "add to part": lambda w, x, y: _over(x, lambda b: b[:, 1:].add_(y[:, :-1])),
    "add to item": lambda w, x, y: _over(
        x, lambda b: b.__setitem__((slice(None), 0), b[:, 0] + y[:, -1])
    ),
    "view": lambda w, x, y: _through_view(x, y),
    "view from before": lambda w, x, y: _view_from_before(x, y),
    "transposed": lambda w, x, y: _over(x, lambda b: b.mT.copy_(y.flip(1).mT)),
    "copy": lambda w, x, y: _over(x, lambda b: b.copy_(y.roll(1, 1))),
    "copy part": lambda w, x, y: _over(x, lambda b: b[:, :1].copy_(y[:, -1:])),
    "copy one": lambda w, x, y: _over(x, lambda b: b.copy_(y[:, :1])),
    "loop": lambda w, x, y: _loop(x, y),
    "scan": lambda w, x, y: _scan(x),
    "index copy": lambda w, x, y: x.index_copy(1, _order(x), y),
    "index put": lambda w, x, y: x.index_put((_rows(x), _order(x)[None]), y),
    "index fill": lambda w, x, y: x.index_fill(1, torch.tensor([0]), 2.0),
    "index fill by a token": lambda w, x, y: x.index_fill(1, torch.tensor([0]), y[0, -1, 0]),
    "masked scatter": lambda w, x, y: x.masked_scatter(
        torch.ones_like(x, dtype=torch.bool), y.flip(1)
    ),
    "scatter": lambda w, x, y: _scattered(x, "scatter"),
    "scatter add": lambda w, x, y: _scattered(x, "scatter_add"),
    "scatter add to tokens": lambda w, x, y: x.scatter_add(1, _each(x), y),
    "scatter reduce": lambda w, x, y: x.scatter_reduce(1, _each(x), y, "prod"),
    "scatter to one": lambda w, x, y: x.scatter_add(1, torch.zeros_like(_each(x)), y),
    "scatter by feature": lambda w, x, y: x.scatter_add(
        1, torch.arange(x.numel()).view_as(x) % x.shape[1], y
    ),
    "scatter along features": lambda w, x, y: x.scatter_add(
        2, torch.zeros_like(_each(x)), y.flip(1)
    ),
    "index add": lambda w, x, y: x.index_add(1, _order(x), y),
    "index add of parts": lambda w, x, y: (
        torch.zeros_like(x).index_add(1, _order(x)[:2], y[:, :2]) if x.shape[1] > 1 else x
    ),
    "index add to examples": lambda w, x, y: x.index_add(
        0, torch.zeros(len(x), dtype=torch.long), y
    ),
    "index reduce": lambda w, x, y: x.index_reduce(1, _order(x), y, "mean"),
    "accumulate": lambda w, x, y: _accumulated(x, y),
    "experts": lambda w, x, y: _experts(w, x),
    "slice scatter": lambda w, x, y: x.slice_scatter(y[:, :-1], 1, 1),
    "select scatter": lambda w, x, y: x.select_scatter(y[:, -1], 1, 0),
    "diagonal scatter": lambda w, x, y: torch.diagonal_scatter(
        x, y.flip(1).diagonal(0, 1, 2), 0, 1, 2
    ),
    "put": lambda w, x, y: x.contiguous().put(torch.arange(x.numel()), y.flip(1)),
    "masked fill": lambda w, x, y: (
        x.masked_fill(torch.tensor([True, False])[:, None, None], 0.5) if len(x) == 2 else x
    ),
    "fill by a token": lambda w, x, y: x.masked_fill(y > x, y[0, 0, 0]),
    "resize": lambda w, x, y: _over(x, lambda b: b.fill_(y[0, 0, 0])),
    "lerp in place": lambda w, x, y: _over(x, lambda b: b.lerp_(y.flip(1), 0.5)),
    "addcmul": lambda w, x, y: _over(x, lambda b: b.addcmul_(x, y.roll(1, 1))),
    "index add in place": lambda w, x, y: _over(x, lambda b: b.index_add_(1, _order(x), y)),
    "relu in place": lambda w, x, y: _over(x, F.relu_),
    "put in place": lambda w, x, y: _over(
        x, lambda b: b.index_put_((_rows(x), _order(x)[None]), y)
    ),
    "scatter in place": lambda w, x, y: _over(x, lambda b: b.scatter_(1, _each(x), y)),
    "data": lambda w, x, y: _over(x, lambda b: b[:, 0].mul_(y[:, -1])),
    "unbound parts": lambda w, x, y: _over(x, lambda b: b.unbind(1)[0].clone().add_(y[:, -1])),
    "square in place": lambda w, x, y: _over(x, lambda b: b.mul_(b.flip(1))),
    "out": lambda w, x, y: torch.cat([x, y], 1).narrow(1, x.shape[1] // 2, x.shape[1]),
}

MIXES: dict[str, Op] = {
    "matrix": lambda w, x, y: w.tokens(x) @ x,
    "einsum": lambda w, x, y: torch.einsum("mn,bnd->bmd", w.tokens(x), x),
    "einsum over examples": lambda w, x, y: torch.einsum(
        "bnd,bc->cnd", x, w.weight(len(x), len(x))
    ),
    "linear over tokens": lambda w, x, y: F.linear(x.mT, w.tokens(x)).mT,
    "linear over all": lambda w, x, y: F.linear(
        x.flatten(1), w.weight(x[0].numel(), x[0].numel())
    ).view_as(x),
    "tensordot": lambda w, x, y: torch.tensordot(x, w.tokens(x), dims=([1], [0])).mT,
    "baddbmm": lambda w, x, y: torch.baddbmm(
        x, w.weight(1, x.shape[1], x.shape[1]).expand(len(x), -1, -1), y
    ),
    "addmm": lambda w, x, y: torch.stack(
        [torch.addmm(a, w.tokens(x), b) for a, b in zip(x, y, strict=True)]
    ),
    "addbmm": lambda w, x, y: torch.addbmm(
        x[0], w.weight(1, x.shape[1], x.shape[1]).expand(len(x), -1, -1), y
    ).expand_as(x),
    "running sum": lambda w, x, y: x.cumsum(1),
    "running sum of features": lambda w, x, y: x.cumsum(-1),
    "running product": lambda w, x, y: x.cumprod(1),
    "running maximum": lambda w, x, y: x.cummax(1).values,
    "running logarithm": lambda w, x, y: x.logcumsumexp(1),
    "Fourier": lambda w, x, y: torch.fft.fft(x, dim=1).real,
    "Fourier and back": lambda w, x, y: torch.fft.irfft(
        torch.fft.rfft(x, dim=1) * 2, n=x.shape[1], dim=1
    ),
    "Fourier of features": lambda w, x, y: torch.fft.fft(x, dim=-1).real,
    "Fourier of both": lambda w, x, y: torch.fft.fft2(x).real,
    "LSTM": _recurrent("LSTM"),
    "GRU": _recurrent("GRU"),
    "RNN": _recurrent("RNN"),
    "both ways": lambda w, x, y: LEARNED["bi"](x)[0] if x.shape[-1] == 4 else x.cumsum(1),
    "last state": lambda w, x, y: (
        # Alike at all positions it would be a statistic, which may be added to tokens.
        LEARNED["LSTM4"](x)[1][0][0][:, None] * w.weight(x.shape[1], 1)
        if x.shape[-1] == 4
        else x.cumsum(1)
    ),
    "solve": lambda w, x, y: torch.linalg.solve(_square(w, x), x),
    "solve triangular": lambda w, x, y: torch.linalg.solve_triangular(
        _square(w, x).tril(), x, upper=False
    ),
    "solve by data": lambda w, x, y: torch.linalg.solve(
        torch.diag_embed(x[..., 0]) + w.tokens(x), y
    ),
    "inverse": lambda w, x, y: torch.linalg.pinv(x).mT,
    "orthogonal": lambda w, x, y: (
        torch.linalg.qr(x.mT @ w.tokens(x))[0].mT[:, : x.shape[1]]
        if x.shape[1] <= x.shape[2]
        else x.cumsum(1)
    ),
    "chain": lambda w, x, y: torch.linalg.multi_dot([w.tokens(x), x[0], w.features(x)]).expand_as(
        x
    ),
    "expm": lambda w, x, y: (
        torch.linalg.matrix_exp(torch.diag_embed(x[..., 0])) @ w.weight(x.shape[1], x.shape[2])
    ),
    "data-made weights": lambda w, x, y: torch.bmm(torch.tanh(x @ x.mT), y),
    "data-made from one": lambda w, x, y: torch.tanh(x[..., :1] @ w.weight(1, x.shape[1])) @ y,
    "distance": lambda w, x, y: torch.cdist(x, y).sum(-1, keepdim=True).expand_as(x),
    "distance to weights": lambda w, x, y: torch.cdist(x, w.features(x)),
    "distances flipped": lambda w, x, y: torch.cdist(x.flip(1), y)[..., :1].expand_as(x),
    "similarity": lambda w, x, y: (
        F.cosine_similarity(x[:, :, None], y[:, None], dim=-1).mean(-1, keepdim=True).expand_as(x)
    ),
    "outer": lambda w, x, y: (x[:, :, None] + y[:, None]).sum(2),
    "outer mean": lambda w, x, y: (x[:, :, None] * y[:, None]).mean(1),
    "outer read": lambda w, x, y: (x[:, :, None] + y[:, None])[:, :, 0],
    "outer diagonal": lambda w, x, y: (x[:, :, None] + y[:, None].flip(2)).diagonal(0, 1, 2).mT,
    "outer through a weight": lambda w, x, y: ((x[:, :, None] + y[:, None]) @ w.features(x)).amax(
        2
    ),
    "inner": lambda w, x, y: torch.einsum("bnd,bmd->bn", x, y)[..., None].expand_as(x),
    "trace": lambda w, x, y: torch.einsum("bnd,bnd->b", x, y)[:, None, None].expand_as(x),
    "windows": lambda w, x, y: F.pad(x[:, :-1] + x[:, 1:], (0, 0, 0, 1)),
    "windows of features": lambda w, x, y: F.pad(x[..., :-1] + x[..., 1:], (0, 1)),
    "merge": lambda w, x, y: (
        x.reshape(len(x), 1, -1) @ w.weight(x[0].numel(), x.shape[2])
    ).expand_as(x),
    "merge pairs": lambda w, x, y: (
        torch.cat([x[:, :-1], x[:, 1:]], -1) @ w.weight(2 * x.shape[2], x.shape[2])
    ),
    "mean": lambda w, x, y: x.mean(1, keepdim=True).expand_as(x),
    "sum": lambda w, x, y: x.sum(1, keepdim=True).expand_as(x),
    "largest": lambda w, x, y: x.amax(1, keepdim=True).expand_as(x),
    "product": lambda w, x, y: x.prod(1, keepdim=True).expand_as(x),
    "mean of all": lambda w, x, y: x.mean().expand_as(x),
    "mean of examples": lambda w, x, y: x.mean(0, keepdim=True).expand_as(x),
    "mean of features": lambda w, x, y: x.mean(-1, keepdim=True).expand_as(x),
    "mean by a sum": lambda w, x, y: torch.einsum("bnd->bd", x)[:, None].expand_as(x),
    "mean by a product": lambda w, x, y: (
        torch.ones(1, x.shape[1], dtype=torch.float64) @ x
    ).expand_as(x),
    "deviation": lambda w, x, y: x.std(1, keepdim=True).expand_as(x) if x.shape[1] > 1 else x,
    "quantile": lambda w, x, y: torch.quantile(x, 0.5, dim=1, keepdim=True).expand_as(x),
    "covariance": lambda w, x, y: (
        torch.stack([torch.cov(a.mT) @ w.features(x) for a in x])[:, : x.shape[1]]
        if x.shape[1] > 1
        else x
    ),
    "trapezoid": lambda w, x, y: F.pad(torch.cumulative_trapezoid(x, dim=1), (0, 0, 1, 0)),
    "slope": lambda w, x, y: torch.gradient(x, dim=1)[0] if x.shape[1] > 1 else x,
    "vmapped": lambda w, x, y: torch.vmap(lambda a: a.flip(0))(x),
    "renorm": lambda w, x, y: x.renorm(2, 0, 0.5),
    "Kronecker": lambda w, x, y: torch.kron(
        x.flip(1)[..., :1].contiguous(), w.weight(1, 1, x.shape[2])
    ),
    "grid sample": lambda w, x, y: (
        F.grid_sample(x.mT[..., None], w.weight(len(x), x.shape[1], 1, 2) - 1, align_corners=True)[
            ..., 0
        ].mT
    ),
    "fold": lambda w, x, y: (
        F.fold(x.mT.repeat_interleave(2, 1), (x.shape[1] + 1, 1), (2, 1))[:, :, :-1, 0].mT
    ),
    "triangle": lambda w, x, y: (x[:, None].expand(-1, x.shape[1], -1, -1).mT.tril().mT).sum(2),
    "corner": lambda w, x, y: x.tril(),
    "bag": lambda w, x, y: F.embedding_bag(
        torch.arange(len(x[0]))[None].expand(len(x[0]), -1), x[0].contiguous(), mode="sum"
    ).expand_as(x),
    "segments": lambda w, x, y: (
        torch.segment_reduce(
            x.contiguous(), "sum", lengths=torch.tensor([[1, x.shape[1] - 1]] * len(x)), axis=1
        )[:, :1].expand_as(x)
        if x.shape[1] > 1
        else x
    ),
    "one-hot product": lambda w, x, y: F.one_hot(_order(x), x.shape[1]).double() @ x,
    "bilinear": lambda w, x, y: F.bilinear(
        x, y.flip(1).contiguous(), w.weight(x.shape[2], x.shape[2], x.shape[2])
    ),
    "einsum of three": lambda w, x, y: torch.einsum(
        "mn,bnd,de->bme", w.tokens(x), x, w.features(x)
    ),
    "einsum of three, by row": lambda w, x, y: torch.einsum(
        "bnd,d,de->bne", x, w.weight(x.shape[2]), w.features(x)
    ),
    "einsum of both and a weight": lambda w, x, y: torch.einsum(
        "bnd,bmd,nm->bnd", x, y, w.tokens(x)
    ),
    "einsum of one": lambda w, x, y: torch.einsum("bnd->ndb", x).permute(2, 0, 1).flip(1),
    "one swaps two": lambda w, x, y: SwapsTwo.apply(x),
    "linear attention": lambda w, x, y: x @ (x.mT @ y),
}

ROWS: dict[str, Op] = {
    "linear": lambda w, x, y: F.linear(x, w.features(x), w.weight(x.shape[2])),
    "weight": lambda w, x, y: x @ w.features(x),
    "weight by einsum": lambda w, x, y: torch.einsum("bnd,de->bne", x, w.features(x)),
    "sum of both": lambda w, x, y: x + y,
    "difference": lambda w, x, y: x - y,
    "product of both": lambda w, x, y: x * y,
    "quotient": lambda w, x, y: torch.addcdiv(x, x, 2 + y * y),
    "between": lambda w, x, y: torch.lerp(x, y, 0.3),
    "angle": lambda w, x, y: torch.atan2(x, y),
    "larger": lambda w, x, y: torch.maximum(x, y),
    "hypot": lambda w, x, y: torch.hypot(x, y),
    "gelu": lambda w, x, y: F.gelu(x),
    "power": lambda w, x, y: (x.abs() + 1) ** 1.5,
    "entropy": lambda w, x, y: torch.special.entr(x),
    "gamma": lambda w, x, y: torch.special.gammaln(x.abs() + 0.3),
    "Bessel": lambda w, x, y: torch.special.i0e(x),
    "erfcx": lambda w, x, y: torch.special.erfcx(x),
    "ndtr": lambda w, x, y: torch.special.log_ndtr(x),
    "multigamma": lambda w, x, y: torch.special.multigammaln(x.abs() + 3, 2),
    "layer norm": lambda w, x, y: (
        F.layer_norm(x, x.shape[-1:]) if w.captured else _whitened(w, x, (-1,))
    ),
    "softmax of features": lambda w, x, y: _softmax(w, x, -1),
    "normalize": lambda w, x, y: _normal(w, x, -1),
    "glu": lambda w, x, y: F.glu(torch.cat([x, y], -1)),
    "gate": lambda w, x, y: x * torch.sigmoid(x @ w.weight(x.shape[2], 1)),
    "position": lambda w, x, y: x + w.weight(x.shape[1], x.shape[2]),
    "mask": lambda w, x, y: x * (x > 1),
    "masked fill": lambda w, x, y: x.masked_fill(x > 1, 0.0),
    "rounding": lambda w, x, y: x + (x.round() - x).detach(),
    "detached": lambda w, x, y: x * x.detach().sigmoid(),
    "of users": lambda w, x, y: Scaled.apply(x),
    "of users, flipping": lambda w, x, y: Flipped.apply(x),
    "in numpy": lambda w, x, y: InNumpy.apply(x),
    "in numpy, rolling": lambda w, x, y: RolledInNumpy.apply(x),
    "of users, of two": lambda w, x, y: BothFlipped.apply(x, y),
    "of users, other example": lambda w, x, y: OtherExample.apply(x),
    "of users, in place": lambda w, x, y: WrittenInPlace.apply(x.clone()),
    "scripted": lambda w, x, y: scripted(x),
    "scripted, flipping": lambda w, x, y: scripted_flip(x),
    "of Python": lambda w, x, y: python_function(x),
    "heads": lambda w, x, y: (
        torch.cat([h @ w.weight(h.shape[-1], h.shape[-1]) for h in _halves(x)], -1)
        if x.shape[-1] % 2 == 0
        else x
    ),
    "flattened rows": lambda w, x, y: (x.reshape(-1, x.shape[2]) @ w.features(x)).view_as(x),
    "one by one": lambda w, x, y: torch.stack([F.gelu(t) for t in x.unbind(1)], 1),
    "repeated": lambda w, x, y: x.repeat(2, 1, 1)[: len(x)],
    "vmapped rows": lambda w, x, y: torch.vmap(F.gelu)(x),
    "einsum of both": lambda w, x, y: torch.einsum("bnd,bne->bnde", x, y).sum(-1),
    "cosine": lambda w, x, y: x * F.cosine_similarity(x, y, dim=-1)[..., None],
    "distance of rows": lambda w, x, y: x + F.pairwise_distance(x, y)[..., None],
}

STATISTICS: dict[str, Op] = {
    "mean added": lambda w, x, y: x + w.hold(y.mean(1, keepdim=True)) if x.shape[1] > 1 else x,
    "mean taken": lambda w, x, y: x - w.hold(x.mean(1, keepdim=True)) if x.shape[1] > 1 else x,
    "mean of other example": lambda w, x, y: (
        x + w.hold(y.flip(0).mean(1, keepdim=True)) if x.shape[1] > 1 else x
    ),
    "one token added": lambda w, x, y: x + w.hold(y[:, :1]) if x.shape[1] > 1 else x,
    "two tokens added": lambda w, x, y: (
        x + y[:, :2].repeat_interleave(2, 1)[:, :3] if x.shape[1] == 3 else x
    ),
    "gated": lambda w, x, y: (
        x * w.hold((y.mean(1, keepdim=True) @ w.features(x)).sigmoid()) if x.shape[1] > 1 else x
    ),
    "normalize tokens": lambda w, x, y: _normal(w, x, 1),
    "softmax of tokens": lambda w, x, y: _softmax(w, x, 1) * x,
    "instance norm": lambda w, x, y: (
        F.instance_norm(x.mT).mT if w.captured else _whitened(w, x, (1,))
    ),
    "group norm": lambda w, x, y: (
        F.group_norm(x.mT, 1).mT if w.captured else _whitened(w, x, (1, 2))
    ),
    "layer norm of all": lambda w, x, y: (
        F.layer_norm(x, x.shape[1:]) if w.captured else _whitened(w, x, (1, 2))
    ),
    "scaled": lambda w, x, y: x / w.hold(1 + x.abs().amax((1, 2), keepdim=True)),
    "scaled by all": lambda w, x, y: x / (1 + x.abs().amax()),
    "whitened by hand": lambda w, x, y: _whitened(w, x, (1,)) if x.shape[1] > 1 else x,
}

CALLS: dict[str, Op] = {
    "attention": lambda w, x, y: w.attend("fused", x, x, x),
    "attention by hand": lambda w, x, y: w.attend("by hand", x, x, x),
    "attention to another": lambda w, x, y: w.attend("fused", x, y, y),
    "residual": lambda w, x, y: x + w.attend("fused", x, x, x),
    "attention of turned": lambda w, x, y: w.attend("fused", x.flip(1), x, x),
    "attention, projected": lambda w, x, y: x + w.attend("by hand", x, x, x) @ w.features(x),
}

TABLES = {
    "moves": MOVES,
    "writes": WRITES,
    "mixes": MIXES,
    "rows": ROWS,
    "statistics": STATISTICS,
    "calls": CALLS,
}
OPERATIONS: dict[str, Op] = {
    f"{kind}: {name}": op for kind, table in TABLES.items() for name, op in table.items()
}
