"""What operations do to tokens: the values of the tests are the ids, so results tell their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.operations import Family, canonical, family_of
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.tokens.space import PADDING
from captum_generic_attn.tokens.spaces import TokenSpaces

B, N, D = 2, 4, 6


class Following(TorchFunctionMode):
    """Applies transfers to whatever runs, as the capture does, and nothing else."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        self.spaces = TokenSpaces()
        self.tracker = TokenTracker(self.spaces, {id(p): name for name, p in parameters.items()})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, in_place = canonical(func)
        self.tracker.apply(family_of(name), name, func, args, kwargs or {}, out, in_place=in_place)
        return out

    def ids(self, *shape: int, role: Role = Role.TOKENS, name: str = "x") -> Tensor:
        """A tensor whose elements are tokens of their own and hold their ids plus one."""
        token_ids = self.spaces.of_input(name, torch.Size(shape))
        tensor = token_ids.double() + 1
        self.tracker.abstract_values[tensor] = AbstractValue(
            role, (token_ids,), frozenset([7]), data=True
        )
        return tensor

    def tokens(self, *shape: int, name: str = "x", call: int | None = 7) -> Tensor:
        """`[*shape, D]` features of tokens, all of them the token's id plus one."""
        token_ids = self.spaces.of_input(name, torch.Size(shape)).unsqueeze(-1).expand(*shape, D)
        tensor = (token_ids.double() + 1).contiguous()
        self.tracker.abstract_values[tensor] = AbstractValue(
            Role.TOKENS, (token_ids,), frozenset({call} - {None}), data=True
        )
        return tensor

    def born(self, *shape: int, name: str = "x", call: int | None = 7) -> Tensor:
        """Like `tokens`, of a space of tokens instead of an input's elements."""
        elements = self.spaces.of_input(name, torch.Size(shape))
        token_ids = self.spaces.created(elements.unsqueeze(-1), None)
        assert token_ids is not None
        token_ids = token_ids.unsqueeze(-1).expand(*shape, D)
        tensor = (token_ids.double() + 1).contiguous()
        self.tracker.abstract_values[tensor] = AbstractValue(
            Role.TOKENS, (token_ids,), frozenset({call} - {None}), data=True
        )
        return tensor

    def check(self, tensor: Tensor) -> None:
        """The token_ids of a tensor says what its values say: 0 is no token."""
        abstract = self.tracker.of(tensor)
        assert abstract.lost_at == ""
        (token_ids,) = abstract.token_ids
        assert token_ids.shape == tensor.shape
        assert torch.equal(token_ids.double() + 1, tensor.real.double())
        assert abstract.data
        assert 7 in abstract.ancestors

    def is_lost(self, tensor: Tensor, at: str) -> None:
        """No tokens, but still what it depends on."""
        abstract = self.tracker.of(tensor)
        assert abstract.token_ids == ()
        assert abstract.lost_at == at
        assert abstract.ancestors == {7}
        assert abstract.data


def ids_of(following: Following, tensor: Tensor) -> Tensor:
    (token_ids,) = following.tracker.of(tensor).token_ids
    return token_ids


@pytest.fixture
def following() -> Following:
    return Following()


INDEX = torch.tensor([3, 0, 2, 1])
MOVES: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(B, 2, 2, D),
    "view as": lambda x: x.view_as(torch.empty(B, N * D)),
    "view of another type": lambda x: x.view(torch.float64),
    "reshape": lambda x: x.mT.reshape(B, -1),
    "reshape as": lambda x: x.reshape_as(torch.empty(N, B, D)),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: torch.transpose(x, 0, 1),
    "mT": lambda x: x.mT,
    "T": lambda x: x[0].T,
    "swapaxes": lambda x: x.swapaxes(0, 2),
    "movedim": lambda x: x.movedim(0, -1),
    "flatten": lambda x: x.flatten(1),
    "ravel": lambda x: x.mT.ravel(),
    "unflatten": lambda x: x.unflatten(-1, (2, -1)),
    "squeeze": lambda x: x[:1].squeeze(0),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "expand": lambda x: x[:, None].expand(-1, 3, -1, -1),
    "expand as": lambda x: x[:1].expand_as(torch.empty(5, N, D)),
    "broadcast to": lambda x: torch.broadcast_to(x, (3, B, N, D)),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "tile": lambda x: x.tile(2),
    "repeat interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat interleave by counts": lambda x: torch.repeat_interleave(x, INDEX, dim=1),
    "chunk": lambda x: x.chunk(3, -1),
    "split": lambda x: x.split([1, 3], 1),
    "split by size": lambda x: torch.split(x, 3, dim=1),
    "tensor split": lambda x: x.tensor_split(3, dim=1),
    "unbind": lambda x: x.unbind(1),
    "slice": lambda x: x[:, 1:, ::2],
    "item": lambda x: x[:, 0],
    "ellipsis": lambda x: x[..., None, 2],
    "index": lambda x: x[:, INDEX],
    "list": lambda x: x[:, [3, 1]],
    "mask": lambda x: x[:, torch.tensor([True, False, True, True])],
    "mask per example": lambda x: x[torch.arange(B * N).view(B, N) % 3 > 0],
    "pairs of indices": lambda x: x[torch.tensor([0, 1]), torch.tensor([2, 0])],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "select": lambda x: x.select(1, -1),
    "index select": lambda x: x.index_select(1, INDEX),
    "gather": lambda x: x.gather(1, INDEX[None, :, None].expand(B, N, D)),
    "take along": lambda x: x.take_along_dim(INDEX[None, :, None], 1),
    "take": lambda x: x.take(torch.arange(B * N * D).flip(0).view(B, N, D)),
    "roll": lambda x: x.roll((1, 2), (1, 2)),
    "flip": lambda x: x.flip(1, 2),
    "rot90": lambda x: x.rot90(1, (1, 2)),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "patches": lambda x: F.unfold(x[:, None], 2, stride=2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(x.reshape(B, N, 2, 3), 2),
    "contiguous": lambda x: x.mT.contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "to": lambda x: x.to(torch.float32),
    "float": lambda x: x.float(),
    "int": lambda x: x.int(),
    "complex and back": lambda x: torch.view_as_real(torch.complex(x, x)).select(-1, 0),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "pad": lambda x: F.pad(x, (0, 0, 2, 1)),
    "pad inwards": lambda x: F.pad(x, (0, 0, -1, 1)),
    "cat": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
    "cat with zeros": lambda x: torch.cat([x, x.new_zeros(B, 2, D)], dim=1),
    "stack": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x, x[:1]]),
    "relu": F.relu,
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "sum over one": lambda x: x[:, :1].sum(1),
    "mean of copies": lambda x: x[:, None].expand(-1, 3, -1, -1).mean(1),
}  # fmt: skip


@pytest.mark.parametrize("role", [Role.RAW, Role.TOKENS], ids=["raw", "tokens"])
@pytest.mark.parametrize("name", MOVES)
def test_tokens_move_with_their_values(following: Following, name: str, role: Role) -> None:
    x = following.ids(B, N, D, role=role)
    with following:
        out = MOVES[name](x)
    for result in out if isinstance(out, (tuple, list)) else [out]:
        following.check(result)


CHAIN = [
    "mT", "flip", "roll", "index", "slice", "split", "unbind", "flatten", "unsqueeze", "cat",
    "stack", "pad",
]  # fmt: skip


@given(names=st.lists(st.sampled_from(CHAIN), min_size=1, max_size=5))
@settings(deadline=None, max_examples=25)
def test_chains_of_moves(names: list[str]) -> None:
    following = Following()
    out: Any = following.ids(B, N, D)
    with following:
        for name in names:
            if out.ndim != 3 or min(out.shape) < 4:
                break
            out = MOVES[name](out)
            out = out[-1] if isinstance(out, (tuple, list)) else out
    following.check(out)


# --- writing


def write_item(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:3] = y
    return x


def write_rows(x: Tensor, y: Tensor) -> Tensor:
    x[torch.tensor([0, 1]), torch.tensor([3, 0])] = y[:, 0]
    return x


def write_mask(x: Tensor, y: Tensor) -> Tensor:
    x[torch.tensor([[False, True, True, False]] * 2)] = y.reshape(-1, D)
    return x


def write_view(x: Tensor, y: Tensor) -> Tensor:
    x.view(-1, D)[[1, 2, 5, 6]] = y.reshape(-1, D)
    return x


def copy_into_view(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:3].copy_(y)
    return x


def copy_into_transposed(x: Tensor, y: Tensor) -> Tensor:
    for i in range(2):
        x.transpose(0, 1)[2 + i].copy_(y[:, i])
    return x


def zero_view(x: Tensor, y: Tensor) -> Tensor:
    x[:, 0] = y[:, 0]
    return x


def view_taken_before(x: Tensor, y: Tensor) -> Tensor:
    flat = x.view(-1, D)
    x[:, 1:3] = y
    return flat


def views_side_by_side(x: Tensor, y: Tensor) -> Tensor:
    first, second = x.view(-1, D), x.view(B * N, D)
    first[[1, 2, 5, 6]] = y.reshape(-1, D)
    return second


WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "item": write_item,
    "rows": write_rows,
    "mask": write_mask,
    "one row": zero_view,
    "view": write_view,
    "copy into a view": copy_into_view,
    "copy into a transposed view": copy_into_transposed,
    "a view taken before": view_taken_before,
    "views side by side": views_side_by_side,
    "masked scatter": lambda x, y: x.masked_scatter(
        torch.tensor([[False, True, True, False]] * 2)[..., None].expand_as(x), y
    ),
    "index copy": lambda x, y: x.index_copy(1, torch.tensor([3, 1]), y),
    "index put": lambda x, y: x.index_put((torch.tensor([0, 1]), torch.tensor([2, 2])), y[:, 1]),
    "scatter": lambda x, y: x.scatter(1, torch.tensor([3, 1])[None, :, None].expand(B, 2, D), y),
    "select scatter": lambda x, y: x.select_scatter(y[:, 0], 1, 2),
    "slice scatter": lambda x, y: x.slice_scatter(y, 1, 1, 3),
    "where": lambda x, y: torch.where(
        torch.tensor([False, True, True, False])[None, :, None], F.pad(y, (0, 0, 1, 1)), x
    ),
    "where, two alike": lambda x, y: torch.where(
        torch.tensor([False, True, True, False])[None, :, None], torch.cat([y, y], 1), x
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_written_values_bring_their_tokens(following: Following, name: str) -> None:
    """The right ids, or none: those that stood there before would be wrong."""
    x, y = following.tokens(B, N), following.tokens(B, 2, name="y", call=8)
    with following:
        out = WRITES[name](x.clone(), y)
    abstract = following.tracker.of(out)
    assert abstract.ancestors == {7, 8}
    if abstract.token_ids or not abstract.lost_at:
        following.check(out)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_written_constants_leave_tokens_where_they_are(following: Following, value: float) -> None:
    """A masked token is still a token at its place."""
    x = following.tokens(B, N)
    with following:
        out = x.clone()
        out[:, 1] = value
        filled = x.masked_fill(x > 3, value)
    for result in (out, filled):
        assert torch.equal(ids_of(following, result), ids_of(following, x))


# --- element by element


def test_tokens_keep_their_ids_beside_constants_and_parameters() -> None:
    bias = nn.Parameter(torch.ones(N, D, dtype=torch.float64))
    following = Following(bias=bias)
    x = following.tokens(B, N)
    with following:
        results = [
            x + 1, 1 - x, x * bias, bias + x, torch.lerp(x, torch.zeros_like(x), 0.5), F.gelu(x),
            x.add_(bias), torch.maximum(x, bias), F.layer_norm(x, (D,)),
        ]  # fmt: skip
    for result in results:
        assert torch.equal(ids_of(following, result), ids_of(following, x))
        assert following.tracker.of(result).ancestors == {7}


def test_streams_that_attended_apart_are_merged(following: Following) -> None:
    """Their sum depends on both, and its tokens are neither's: each has one parent in either."""
    x, y = following.born(B, N), following.born(B, N, name="y", call=9)
    for tensor in (x, y):
        following.spaces.mark_queried(ids_of(following, tensor))
    with following:
        out = x + y
    assert following.tracker.of(out).ancestors == {7, 9}
    (merged,) = following.spaces.indices(ids_of(following, out))
    parents = following.spaces[merged].parents
    assert parents is not None
    ours = torch.stack([ids_of(following, t)[..., 0] for t in (y, x)], -1)
    assert torch.equal(parents.sort(-1).values, ours.sort(-1).values)


def test_inputs_that_are_summed_are_one_token(following: Following) -> None:
    x, y = following.tokens(B, N, call=None), following.tokens(B, N, name="y", call=None)
    with following:
        out = x + y
    (kept,) = following.spaces.indices(ids_of(following, out))
    (absorbed,) = following.spaces.absorbed_into(following.spaces[kept])
    assert {following.spaces[kept].name, absorbed[0].name} == {"x", "y"}
    assert absorbed[1].unique(dim=0).tolist() == [[0, 1, 2, 3]]


def test_one_hot_rows_are_of_their_integers(following: Following) -> None:
    x = following.tokens(B, N)
    with following:
        out = F.one_hot(x.long(), 30).double()
    token_ids = ids_of(following, out)
    assert torch.equal(token_ids, ids_of(following, x).unsqueeze(-1).expand(out.shape))


def test_a_shape_that_does_not_fit_loses_tokens(following: Following) -> None:
    x = following.tokens(B, N)
    with following:
        out = x.view(torch.float32)
    following.is_lost(out, "view")


# --- what mixes tokens

SIGNS = torch.tensor([1.0, -1.0]).repeat(D // 2).double()
MIXING: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "sum of all": ("sum", lambda x: x.sum()),
    "sort, feature by feature": ("sort", lambda x: (x * SIGNS).sort(1)[0]),
    "top, feature by feature": ("topk", lambda x: (x * SIGNS).topk(2, 1).values),
    "known and lost": ("cumsum", lambda x: x + x.cumsum(1)),
    "lost and known": ("cumsum", lambda x: x.cumsum(1) - x),
    "lost in a product": ("cumsum", lambda x: x * x.cumsum(1)),
    "running sum": ("cumsum", lambda x: x.cumsum(1)),
    "running product": ("cumprod", lambda x: x.cumprod(1)),
    "Fourier": ("fft_fft", lambda x: torch.fft.fft(x, dim=1).real),
    "linear over tokens": ("linear", lambda x: F.linear(x.mT, torch.ones(N, N).double()).mT),
}


@pytest.mark.parametrize(
    "pool",
    [lambda x: x.mean(1), lambda x: x.sum(1), lambda x: x.amax(1, keepdim=True),
     lambda x: x.max(1).values, lambda x: x.mT.mean(-1), lambda x: x.mT.amax(-1, keepdim=True),
     lambda x: x.norm(dim=1), lambda x: x.std(1), lambda x: x.logsumexp(1), lambda x: x.var((1,))],
)  # fmt: skip
def test_tokens_pooled_into_one_are_its_parents(following: Following, pool) -> None:
    x = following.born(B, N)
    with following:
        out = pool(x)
    assert following.tracker.of(out).ancestors == {7}
    token_ids = ids_of(following, out)
    assert token_ids.shape == out.shape
    (pooled,) = following.spaces.indices(token_ids)
    parents = following.spaces[pooled].parents
    assert parents is not None
    assert torch.equal(parents[:, 0].flip(-1), ids_of(following, x)[..., 0])
    assert token_ids.reshape(B, -1)[:, 0].tolist() == [
        following.spaces[pooled].base + i for i in range(B)
    ]


@pytest.mark.parametrize("name", MIXING)
def test_mixed_tokens_are_lost_by_name_but_not_their_calls(following: Following, name: str) -> None:
    at, mix = MIXING[name]
    x = following.tokens(B, N)
    with following:
        out = mix(x)
    abstract = following.tracker.of(out)
    assert 7 in abstract.ancestors
    at = abstract.lost_at if abstract.lost_at.startswith("fft") else at
    following.is_lost(out, at)


@pytest.mark.parametrize(
    "choose", [lambda x: x.sort(1)[0], lambda x: x.topk(2, 1).values,
               lambda x: x.kthvalue(2, 1, keepdim=True).values],
)  # fmt: skip
def test_values_that_are_chosen_take_their_tokens_along(following: Following, choose) -> None:
    """Where all features choose alike; the values of these tensors are their tokens."""
    x = following.tokens(B, N)
    with following:
        out = choose(x)
    following.check(out)


@pytest.mark.parametrize(
    "reduce",
    [lambda x: x.mean(-1), lambda x: x.sum(-1), lambda x: x.var(-1), lambda x: x.norm(dim=-1),
     lambda x: x.amax(2), lambda x: torch.logsumexp(x, dim=-1), lambda x: x.max(-1).values],
)  # fmt: skip
def test_features_summed_away_leave_their_token(following: Following, reduce) -> None:
    x = following.tokens(B, N)
    with following:
        out = reduce(x)
    assert torch.equal(ids_of(following, out), ids_of(following, x)[..., 0])


def test_integers_of_a_reduction_say_nothing(following: Following) -> None:
    x = following.tokens(B, N)
    with following:
        places = x.max(-1).indices
    assert following.tracker.of(places).token_ids == ()


# --- weights and births


def test_a_weight_mixes_features_and_keeps_tokens(following: Following) -> None:
    x = following.tokens(B, N)
    with following:
        out = F.linear(x, torch.ones(3, D).double())
    assert ids_of(following, out).shape == (B, N, 3)
    assert torch.equal(ids_of(following, out)[..., 0], ids_of(following, x)[..., 0])


def test_a_weight_makes_tokens_of_raw_rows(following: Following) -> None:
    x = following.ids(B, N, D, role=Role.RAW)
    with following:
        out = F.linear(x, torch.ones(3, D).double())
        again = F.linear(x, torch.ones(5, D).double())
    token_ids = ids_of(following, out)
    space = following.spaces[following.spaces.indices(token_ids)[0]]
    assert (space.name, space.kind, space.size, space.examples) == ("x", "token", N, B)
    assert following.spaces.coordinates(token_ids[0, :, 0]).tolist() == [
        [i, (D - 1) / 2] for i in range(N)
    ]
    assert torch.equal(ids_of(following, again)[..., 0], token_ids[..., 0]), "the same tokens"


def test_integers_become_tokens_where_they_stand(following: Following) -> None:
    ids = torch.arange(B * N).view(B, N)
    token_ids = following.spaces.of_input("ids", ids.shape)
    following.tracker.abstract_values[ids] = AbstractValue(Role.RAW, (token_ids,), data=True)
    with following:
        out = F.embedding(ids.flip(1), torch.ones(9, D).double())
    assert following.spaces.coordinates(ids_of(following, out)[1, :, 0]).tolist() == [
        [3], [2], [1], [0],
    ]  # fmt: skip


def test_positions_are_rows_of_a_parameter() -> None:
    table = nn.Parameter(torch.ones(9, D))
    following = Following(positions=table)
    with following:
        out = F.embedding(torch.arange(N), table)
    token_ids = ids_of(following, out)
    (index,) = following.spaces.indices(token_ids)
    assert (following.spaces[index].name, following.spaces[index].kind) == (
        "positions",
        "parameter",
    )
    assert not following.tracker.of(out).data


def test_a_parameter_gets_its_tokens_once() -> None:
    cls = nn.Parameter(torch.ones(1, 1, D, dtype=torch.float64))
    following = Following(cls=cls)
    x = following.tokens(B, N)
    with following:
        out = torch.cat([cls.expand(B, -1, -1), x], 1)
        again = torch.cat([cls.expand(B, -1, -1), x], 1)
    token_ids = ids_of(following, out)[..., 0]
    assert token_ids[0, 0] == token_ids[1, 0]
    assert following.spaces[following.spaces.indices(token_ids)[0]].name == "cls"
    assert torch.equal(token_ids, ids_of(following, again)[..., 0])
    assert torch.equal(token_ids[:, 1:], ids_of(following, x)[..., 0])


def test_constants_that_are_joined_are_padding(following: Following) -> None:
    x = following.tokens(B, N)
    with following:
        out = torch.cat([x, torch.zeros(B, 1, D).double()], 1)
    assert ids_of(following, out)[:, -1].unique().tolist() == [PADDING]


# --- windows


WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv2d": lambda x: F.conv2d(x, ones(2, 3, 3, 2), stride=(2, 1), padding=(1, 0)),
    "dilated": lambda x: F.conv2d(x, ones(2, 3, 2, 3), dilation=(3, 2)),
    "same": lambda x: F.conv2d(x, ones(2, 3, 3, 3), padding="same"),
    "average": lambda x: F.avg_pool2d(x, 2),
    "largest": lambda x: F.max_pool2d(x, 3, 2, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "a stem of two": lambda x: F.conv2d(
        F.conv2d(x, ones(2, 3, 3, 3), stride=2, padding=1), ones(2, 2, 2, 2), stride=2
    ),
    "padded before": lambda x: F.conv2d(F.pad(x, (1, 0, 2, 1)), ones(2, 3, 2, 2), stride=2),
}


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def receptive_field_centre(run: Callable[[Tensor], Tensor], shape: torch.Size) -> Tensor:
    """Of the inner results: the middle of the elements that each depends on."""
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    out = run(x)[0, 0]
    centres = torch.full((*out.shape, 2), -1.0, dtype=torch.float64)
    for place in torch.ones_like(out)[2:, 2:].nonzero() + 1:
        (gradient,) = torch.autograd.grad(out[tuple(place)], x, retain_graph=True)
        touched = gradient[0, 0].nonzero().double()
        centres[tuple(place)] = (touched.amin(0) + touched.amax(0)) / 2
    return centres


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_centred_on_what_they_read(following: Following, name: str) -> None:
    """Inside the input, where padding cuts nothing off, against the gradient's own extent."""
    run = WINDOWS[name]
    x = following.ids(B, 3, 12, 12, role=Role.RAW)
    with following:
        out = run(x)
    token_ids = ids_of(following, out)
    ours = following.spaces.coordinates(token_ids[1, 0].reshape(-1)).view(*out.shape[2:], 3)
    assert torch.equal(token_ids[:, 0], token_ids[:, -1])
    inner = (slice(1, -1),) * 2
    expected = receptive_field_centre(run, torch.Size([1, 3, 12, 12]))
    if name != "largest":  # a maximum has a gradient at one element alone
        torch.testing.assert_close(ours[..., 1:][inner], expected[inner])
    else:
        assert ours[..., 1].unique().tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    examples = following.spaces.locate(token_ids[:, 0])[1]
    assert examples[0].unique().tolist() == [0]
    assert examples[1].unique().tolist() == [1]


def test_windows_along_one_axis(following: Following) -> None:
    x = following.ids(B, 3, 12, role=Role.RAW)
    with following:
        out = F.conv1d(x, torch.ones(2, 3, 4).double(), stride=3)
    assert following.spaces.coordinates(ids_of(following, out)[0, 0])[:, 1].tolist() == [
        1.5, 4.5, 7.5,
    ]  # fmt: skip


def test_a_convolution_that_keeps_the_grid_keeps_the_tokens(following: Following) -> None:
    """Positions by convolution: neighbours are looked at, and every token stays where it is."""
    x = following.tokens(B, N)
    with following:
        out = F.conv1d(x.mT, torch.ones(D, 1, 3).double(), padding=1, groups=D).mT
    assert torch.equal(ids_of(following, out), ids_of(following, x))


def test_nothing_is_followed_that_does_not_come_from_tokens(following: Following) -> None:
    with following:
        out = torch.ones(2, 3) + 1
    assert out not in following.tracker.abstract_values
    assert family_of("zeros_like") is Family.NOTHING
