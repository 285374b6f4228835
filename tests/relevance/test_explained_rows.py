"""Which tokens a score reads, and in which state: exits, crossing streams, layers of some tokens.

The twin records the probabilities of each call and two gradients: the ordinary one, and that of the
call's result with all results of later calls held constant. It chooses rows, and sums up equation
6 (equation 10 is in `test_relevance_additions`), one example and one token at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_generic_attn import (
    AttentionGradCam,
    AttentionRollout,
    GenericAttention,
    RawAttention,
    TransformerAttribution,
)

N, D, HEADS, CLASSES = 5, 8, 2, 3
B = 3


@dataclass
class Seen:
    """One call of the twin: `[B, H, Nq, Nk]`, its result, and whose tokens are asked and asking."""

    probabilities: Tensor
    result: Tensor
    queries: Tensor  # [B, Nq] places of the queries in the stream
    keys: Tensor


class Attend(nn.Module):
    """Attention without a residual path: `fused`, explicit by matmul, or by einsum."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.kept: list[Seen] | None = None
        self.held = False

    def forward(
        self, x: Tensor, y: Tensor, queries: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.q(x) * 2, self.k(y) * 2, self.v(y)
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))  # [B, N, H, d]
        if self.kept is None and self.how == "fused":
            o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
            return self.out(o.transpose(1, 2).flatten(2))
        p = (torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D // HEADS)).softmax(-1)
        if self.how == "einsum":
            o = torch.einsum("bhij,bjhd->bihd", p, v)
        else:
            o = (p @ v.transpose(1, 2)).transpose(1, 2)
        if self.kept is not None:
            if self.held:
                o = o.detach().requires_grad_()
            queries, keys = (
                torch.arange(t.shape[1]).expand(len(t), -1) if given is None else given
                for t, given in ((x, queries), (y, keys))
            )
            self.kept.append(Seen(p, o, queries, keys))
        return self.out(o.flatten(2))


class Layers(nn.Module):
    """Features `[B, N, 4]`, embedded, and some blocks that a test puts together."""

    def __init__(self, read: Callable[..., Tensor], how: str = "fused", depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(4, D)
        self.blocks = nn.ModuleList(Attend(how) for _ in range(depth))
        self.mlps = nn.ModuleList(nn.Linear(D, D) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Linear(D, CLASSES) for _ in range(depth))
        self.read = read
        self.double()

    def step(
        self, i: int, x: Tensor, y: Tensor | None = None, queries: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        x = x + self.blocks[i](x, x if y is None else y, queries, keys)
        return x + torch.tanh(self.mlps[i](x))

    def states(self, x: Tensor) -> list[Tensor]:
        """The hidden states after each layer."""
        found, x = [], self.embed(x)
        for i in range(len(self.blocks)):
            x = self.step(i, x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


def inputs(count: int = B, tokens: int = N) -> Tensor:
    return torch.randn(
        count, tokens, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )


# --- the twin


def recorded(model: Layers, x: Tensor, pick: Callable[[Tensor], Tensor], *, held: bool):
    kept: list[Seen] = []
    for block in model.blocks:
        block.kept, block.held = kept, held
    try:
        score = pick(model(x)).sum()
    finally:
        for block in model.blocks:
            block.kept, block.held = None, False
    of = [s.result if held else s.probabilities for s in kept]
    return kept, torch.autograd.grad(score, of, allow_unused=True)


def by_hand(model: Layers, x: Tensor, pick: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The explained rows `[B, N]` and the values `[B, N]` of a score, eq. 5 and 6 in loops."""
    x = x.clone().requires_grad_()
    kept, gradients = recorded(model, x, pick, held=False)
    _, blocked = recorded(model, x, pick, held=True)
    count, tokens = x.shape[:2]
    rows = torch.zeros(count, tokens, dtype=torch.float64)
    values = torch.zeros(count, tokens, dtype=torch.float64)
    for b in range(count):
        last: dict[int, int] = {}
        for c, (seen, gradient) in enumerate(zip(kept, blocked, strict=True)):
            for place, token in enumerate(seen.queries[b].tolist()):
                if gradient is not None and bool((gradient[b, place] != 0).any()):
                    last[token] = c
        for token in last:
            rows[b, token] = 1 / len(last)
        learnt = torch.zeros(tokens, tokens, dtype=torch.float64)
        for c, (seen, gradient) in enumerate(zip(kept, gradients, strict=True)):
            if gradient is None:
                continue
            relevance, update = learnt + torch.eye(tokens), torch.zeros_like(learnt)
            for h in range(HEADS):
                for i, query in enumerate(seen.queries[b].tolist()):
                    for j, key in enumerate(seen.keys[b].tolist()):
                        product = seen.probabilities[b, h, i, j] * gradient[b, h, i, j]
                        update[query] += max(product.item(), 0.0) / HEADS * relevance[key]
            learnt = learnt + update
            for token, call in last.items():
                if call == c:
                    values[b] += learnt[token] * rows[b, token]
        if len(last) == 1:
            values[b, next(iter(last))] = 0
    return rows, values


def check(model: Layers, x: Tensor, target: object = 1) -> None:
    """Rows and values as by hand, in all ways of summing up, and of each example alone."""
    places = target if isinstance(target, list) else [target] * len(x)
    places = [place if isinstance(place, tuple) else (place,) for place in places]

    def pick(output: Tensor) -> Tensor:
        return torch.stack([output[(b, *place)] for b, place in enumerate(places)])

    rows, values = by_hand(model, x, pick)
    assert bool((rows.sum(-1) > 0).all())
    method = GenericAttention(model)
    close = {"rtol": 1e-9, "atol": 1e-12}
    relevance = method.relevance(x, target)
    torch.testing.assert_close(relevance.rows["x"], rows, **close)
    ours = method.attribute(x, target, return_input_shape=False)
    torch.testing.assert_close(ours, values, **close)
    for b in range(len(x)):
        alone = target[b] if isinstance(target, list) else target
        one = method.attribute(x[b : b + 1], alone, return_input_shape=False)
        torch.testing.assert_close(one, values[b : b + 1], **close)
    for other in (GenericAttention(model, aggregate=False), RawAttention(model)):
        whole = other.attribute(x, target, return_input_shape=False)
        assert bool(whole.any(-1).all())
        for b in range(len(x)):
            alone = target[b] if isinstance(target, list) else target
            one = other.attribute(x[b : b + 1], alone, return_input_shape=False)
            torch.testing.assert_close(one, whole[b : b + 1], **close)


# --- a token read at several layers, or at an early one


def exits(model: Layers, x: Tensor) -> Tensor:
    states = model.states(x)
    return torch.stack([h(s[:, 0]) for h, s in zip(model.heads, states, strict=True)], 1)


def class_tokens_of_several_layers(model: Layers, x: Tensor) -> Tensor:
    return model.heads[0](sum(s[:, 0] for s in model.states(x)))


def joined_class_tokens(model: Layers, x: Tensor) -> Tensor:
    a, b, c = model.states(x)
    return torch.cat([a[:, 0, :4], b[:, 0, :4], c[:, 0, :4]], -1) @ torch.ones(12, 3).double()


def sum_of_hidden_states(model: Layers, x: Tensor) -> Tensor:
    return model.heads[0](sum(model.states(x)).mean(1))


def different_tokens_of_different_layers(model: Layers, x: Tensor) -> Tensor:
    a, b, c = model.states(x)
    return model.heads[0](torch.cat([a[:, 3:4], b[:, 1:2], c[:, :1]], 1).mean(1))


def added_tokens_of_different_layers(model: Layers, x: Tensor) -> Tensor:
    a, _, c = model.states(x)
    return model.heads[0](a[:, 3] + c[:, 0])


def mean_of_an_early_layer_beside_the_class_token(model: Layers, x: Tensor) -> Tensor:
    _, b, c = model.states(x)
    return model.heads[0](c[:, 0]) + model.heads[1](b[:, 1:].mean(1))


def masked_exit(model: Layers, x: Tensor) -> Tensor:
    """The last exit counts for some examples only."""
    _, b, c = model.states(x)
    on = torch.where(x[:, 0, 0] > 0, 1.0, 0.0).to(x)
    found = [model.heads[1](b[:, 2]), on[:, None] * model.heads[2](c[:, 0])]
    return torch.stack(found).sum(0)


def zeroed_last_layer(model: Layers, x: Tensor) -> Tensor:
    """A gate that is still zero: the last layer adds nothing."""
    x = model.step(1, model.step(0, model.embed(x)))
    return model.heads[0]((x + 0.0 * model.blocks[2](x, x))[:, 0])


def gated_last_layer(model: Layers, x: Tensor) -> Tensor:
    """A gate that is zero for some examples."""
    gate = (x[:, 0, 0] > 0).to(x)[:, None, None]
    x = model.step(1, model.step(0, model.embed(x)))
    return model.heads[0]((x + gate * model.blocks[2](x, x))[:, 0])


HOW = pytest.mark.parametrize("how", ["fused", "matmul", "einsum"])


@HOW
@pytest.mark.parametrize(
    "read",
    [
        class_tokens_of_several_layers, joined_class_tokens, sum_of_hidden_states,
        different_tokens_of_different_layers, added_tokens_of_different_layers,
        mean_of_an_early_layer_beside_the_class_token, masked_exit, zeroed_last_layer,
        gated_last_layer,
    ],
)  # fmt: skip
def test_tokens_of_several_layers(read, how: str) -> None:
    check(Layers(read, how), inputs())


@HOW
@pytest.mark.parametrize(
    "target", [(0, 2), (1, 1), (2, 0), [(0, 2), (1, 1), (2, 0)], [(2, 2), (0, 1), (0, 0)]]
)
def test_exits(how: str, target) -> None:
    check(Layers(exits, how), inputs(), target)


def test_a_score_without_gradient_is_dark_after_all_layers_were_asked() -> None:
    model = Layers(lambda m, x: 0.0 * m.heads[0](m.states(x)[-1][:, 0]))
    for count in (1, 2):
        with pytest.warns(UserWarning, match="the score has no gradient"):
            values = GenericAttention(model).attribute(inputs(count), 1)
        assert not values.any()


# --- layers that see some of the tokens


def chosen(x: Tensor) -> Tensor:
    """`[B, 2]`, other tokens for each example, in order."""
    return x[:, :, 0].topk(2, 1).indices.sort(1).values


def gathered(model: Layers, x: Tensor, index: Tensor, i: int) -> tuple[Tensor, Tensor]:
    wide = index[..., None].expand(-1, -1, D)
    part = x.gather(1, wide)
    return model.step(i, part, None, index, index), wide


def mixture_of_depths(model: Layers, x: Tensor) -> Tensor:
    """The last layer treats two tokens of each example, the layer before all of them."""
    index, x = chosen(x), model.step(0, model.embed(x))
    part, wide = gathered(model, x, index, 1)
    return model.heads[0](x.scatter(1, wide, part).mean(1))


def mixture_of_depths_twice(model: Layers, x: Tensor) -> Tensor:
    index, x = chosen(x), model.step(0, model.embed(x))
    other = chosen(-x)
    part, wide = gathered(model, x, index, 1)
    x = x.scatter(1, wide, part)
    part, wide = gathered(model, x, other, 2)
    return model.heads[0](x.scatter(1, wide, part)[:, :3].mean(1))


def last_layer_on_a_slice(model: Layers, x: Tensor) -> Tensor:
    x = model.step(1, model.step(0, model.embed(x)))
    index = torch.arange(2).expand(len(x), -1)
    return model.heads[0](
        torch.cat([model.step(2, x[:, :2], None, index, index), x[:, 2:]], 1).mean(1)
    )


def class_attention(model: Layers, x: Tensor, *, patches: bool) -> Tensor:
    """The last layer updates the class token alone, from all tokens."""
    x = model.step(1, model.step(0, model.embed(x)))
    index = torch.zeros(len(x), 1, dtype=torch.long)
    first = model.step(2, x[:, :1], x, index)
    x = torch.cat([first, x[:, 1:]], 1)
    return model.heads[0](x[:, 0] + (x[:, 1:].mean(1) if patches else 0))


def class_attention_and_patches(model: Layers, x: Tensor) -> Tensor:
    return class_attention(model, x, patches=True)


def class_attention_alone(model: Layers, x: Tensor) -> Tensor:
    return class_attention(model, x, patches=False)


@HOW
@pytest.mark.parametrize(
    "read",
    [
        mixture_of_depths, mixture_of_depths_twice, last_layer_on_a_slice,
        class_attention_and_patches, class_attention_alone,
    ],
)  # fmt: skip
def test_layers_of_some_tokens(read, how: str) -> None:
    check(Layers(read, how), inputs())


# --- streams that others attend to


class Crossing(nn.Module):
    """A text of 3 tokens and an image of 5; `form` says who attends to whom and what is read."""

    def __init__(self, form: str, how: str) -> None:
        super().__init__()
        self.image, self.text = (Layers(lambda m, x: x, how) for _ in range(2))
        self.cross, self.form = nn.ModuleList(Attend(how) for _ in range(3)).double(), form

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        x, y = self.text.embed(text), self.image.embed(image)
        y = self.image.step(0, y)
        x = self.text.step(0, x)
        if self.form != "two towers":
            x = x + self.cross[0](x, y)
        if self.form == "image goes on":
            y = self.image.step(1, y)
        if self.form == "both ways":
            y = y + self.cross[1](y, x)
        if self.form == "an early image":  # a later image layer is there for the text alone
            x = x + self.cross[1](x, self.image.step(1, y))
        x = self.text.step(1, x)
        rows = y.mean(1) if self.form == "all of the encoder" else y[:, 2]
        return self.text.heads[0](x[:, 0]) + self.image.heads[0](rows)


@HOW
@pytest.mark.parametrize(
    ("form", "image"),
    [
        ("two towers", [2]), ("one way", [2]), ("all of the encoder", [0, 1, 2, 3, 4]),
        ("image goes on", [2]), ("both ways", [2]), ("an early image", [2]),
    ],
)  # fmt: skip
def test_the_head_reads_a_stream_that_another_attends_to(form: str, image, how: str) -> None:
    model, given = Crossing(form, how), (inputs(B, 3), inputs(B, 5))
    found = GenericAttention(model).relevance(given, 1)
    expected = torch.zeros(B, 5).double()
    expected[:, image] = 1 / len(image)
    torch.testing.assert_close(found.rows["image"], expected)
    text = torch.tensor([1.0, 0, 0]).double().expand(B, -1)
    torch.testing.assert_close(found.rows["text"], text)
    # Of the values: the sum of what either stream has alone, rows chosen by hand.
    for method in (GenericAttention(model), GenericAttention(model, self_in_cross=False)):
        whole = method.attribute(given, 1, return_input_shape=False)
        for name in ("self_in_cross", "normalize", "aggregate"):
            assert hasattr(method, name)
        for b in range(B):
            alone = method.attribute(
                tuple(t[b : b + 1] for t in given), 1, return_input_shape=False
            )
            for one, every in zip(alone, whole, strict=True):
                torch.testing.assert_close(one, every[b : b + 1], rtol=1e-9, atol=1e-12)


@HOW
@pytest.mark.parametrize("form", ["one way", "all of the encoder", "image goes on"])
def test_values_of_a_stream_that_another_attends_to(form: str, how: str) -> None:
    """Rows by hand, matrices of the paper: the image is not what the text made of it."""
    model, given = Crossing(form, how), (inputs(B, 3), inputs(B, 5))
    found = GenericAttention(model).relevance(given, 1)
    text, image = GenericAttention(model).attribute(given, 1, return_input_shape=False)
    read = (
        torch.full((5,), 0.2, dtype=torch.float64)
        if form == "all of the encoder"
        else torch.eye(5)[2]
    )
    own = found.matrix("image", "image") - torch.eye(5)
    expected = (read.double() @ own) + found.matrix("text", "image")[:, 0]
    if form != "all of the encoder":
        expected[:, 2] = found.matrix("text", "image")[:, 0, 2]
    torch.testing.assert_close(image, expected, rtol=1e-9, atol=1e-12)
    learnt = (found.matrix("text", "text") - torch.eye(3))[:, 0]
    learnt[:, 0] = 0
    torch.testing.assert_close(text, learnt, rtol=1e-9, atol=1e-12)


# --- baselines


@HOW
def test_baselines_read_the_state_of_an_exit(how: str) -> None:
    """The last call alone is the last before the exit, for each example its own."""
    model, x = Layers(exits, how), inputs()
    target = [(0, 2), (1, 1), (2, 0)]
    for kind in (RawAttention, AttentionRollout, AttentionGradCam, TransformerAttribution):
        ours = kind(model).attribute(x, target, return_input_shape=False)
        for b, (layer, column) in enumerate(target):

            def alone(x: Tensor, layer: int = layer) -> Tensor:
                h = model.embed(x)
                for i in range(layer + 1):
                    h = model.step(i, h)
                return model.heads[layer](h[:, 0])

            one = kind(alone).attribute(x[b : b + 1], column, return_input_shape=False)
            torch.testing.assert_close(ours[b : b + 1], one, rtol=1e-8, atol=1e-10)


# --- merged tokens


def pooled_last(model: Layers, x: Tensor) -> Tensor:
    x = model.step(0, model.embed(x))
    x = torch.cat([x[:, :1], x[:, 1:].unflatten(1, (2, 2)).mean(2)], 1)
    return model.heads[0](model.step(1, x).mean(1))


def test_parents_of_merged_tokens_are_no_rows_when_their_child_is_one() -> None:
    found = GenericAttention(Layers(pooled_last)).relevance(inputs(), 1)
    rows = found.rows["x"]
    assert rows[0].tolist() == pytest.approx([1 / 3, 0, 0, 0, 0, 1 / 3, 1 / 3])
