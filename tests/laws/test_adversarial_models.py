"""Models that are hard to follow: each once gave numbers of another method, or a wrong warning.

What the model state and the geometry of the input are concerned with is in
`test_adversarial_inputs.py`.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.adversarial import FORMS, Walker, everywhere, maps, mean_of_heads, row
from torch import Tensor, nn
from zoo import oracles
from zoo.encoder import BATCH, TOKENS, WIDTH, SelfAttention, features, ids, plain
from zoo.laws import assert_same

from captum_generic_attn import GenericAttention, UnsupportedAttentionError

both_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
EYE = torch.eye(TOKENS, dtype=torch.float64)


def explain(model, inputs, additional=None, **settings):
    """One value per token; a warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return GenericAttention(model, **settings).attribute(
            inputs, 1, additional, return_input_shape=False
        )


def assert_refused(model, inputs, *words, additional=None):
    with pytest.raises(UnsupportedAttentionError) as refusal:
        GenericAttention(model).attribute(inputs, 1, additional)
    for word in words:
        assert word in str(refusal.value)


# Operands and tensors that the model writes to


def test_probabilities_overwritten_after_the_product():
    def form(query, key, value):
        attention = plain(query, key)
        mixed = attention @ value
        attention.zero_()
        return mixed

    model = Walker(lambda m, x: m.finish(m.encode(m.start(x))), form)
    assert_same(explain(model, features()), row(maps(model, [features()])))


@both_forms
def test_queries_keys_and_values_overwritten_after_the_call(form):
    class Bare(SelfAttention):
        def forward(self, x):
            heads = x.unflatten(-1, (-1, 4)).transpose(1, 2)
            return self.form(heads, heads, heads).transpose(1, 2).flatten(2)

    def in_place(model, x):
        x = model.start(x)
        for attention in model.bare:
            x += attention(x)
        return model.finish(x)

    def out_of_place(model, x):
        x = model.start(x)
        for attention in model.bare:
            x = x + attention(x)
        return model.finish(x)

    model = Walker(in_place, bare=nn.ModuleList([Bare(form), Bare(form)]))
    model.blocks = nn.ModuleList()
    expected = row(maps(model, [features()], walk=out_of_place))
    for weights_have_gradients in (True, False):
        model.requires_grad_(weights_have_gradients)
        assert_same(explain(model, features()), expected)


def added_through_views(model, x):
    x = model.start(x)
    for block in model.blocks:
        y = block.attention(block.norm(x.clone()))
        x[:, :3].add_(y[:, :3])
        x[:, 3:].add_(y[:, 3:])
    return model.finish(x)


def view_taken_before_the_writes(model, x):
    x = model.start(x)
    first = x[:, 0]
    for block in model.blocks:
        x += block.attention(block.norm(x.clone()))
    return model.head(first)


@both_forms
@pytest.mark.parametrize("walk", [added_through_views, view_taken_before_the_writes])
def test_writes_through_views(walk, form):
    model = Walker(walk, form)
    assert_same(explain(model, features()), row(maps(model, [features()])))


@both_forms
def test_view_taken_before_tokens_are_moved_in_place(form):
    def moved(model, x):
        x = model.start(x)
        flat = x.view(-1, WIDTH)
        x[:, 1:3] = x[:, 1:3].flip(1)
        return model.finish(model.encode(flat.view(x.shape)))

    def joined(model, x):
        x = model.start(x)
        x = torch.cat([x[:, :1], x[:, 1:3].flip(1), x[:, 3:]], dim=1)
        return model.finish(model.encode(x))

    model = Walker(moved, form)
    found = row(maps(model, [features()], walk=joined))
    expected = torch.cat([found[:, :1], found[:, 1:3].flip(1), found[:, 3:]], dim=1)
    assert_same(explain(model, features()), expected)


def copied_into_a_view(model, x):
    x = model.start(x)
    buffer = x.new_zeros(len(x), TOKENS + 1, WIDTH)
    buffer[:, 1:].copy_(x)
    buffer[:, 0] = model.cls[0]
    return model.finish(model.encode(buffer))


def assigned_to_a_view(model, x):
    x = model.start(x)
    buffer = torch.empty(len(x), TOKENS + 1, WIDTH, dtype=x.dtype)
    buffer[:, :1] = model.cls
    patches = buffer[:, 1:]
    patches[:] = x
    return model.finish(model.encode(buffer))


@both_forms
@pytest.mark.parametrize("walk", [copied_into_a_view, assigned_to_a_view])
def test_sequence_put_together_in_a_buffer(walk, form):
    model = Walker(walk, form)
    assert_same(explain(model, features()), row(maps(model, [features()]), start=1))


# Steps that tokens cannot be followed through


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * 0.5 + torch.tanh(x)


def between(step):
    def walk(model, x):
        first, second = model.blocks
        return model.finish(second(step(first(model.start(x)))))

    return walk


@both_forms
def test_running_sum_after_attention_reads_all_rows_up_to_there(form):
    model = Walker(lambda m, x: m.head(m.encode(m.start(x)).cumsum(dim=1)[:, -1]), form)
    assert_same(explain(model, features()), row(maps(model, [features()]), everywhere()))


@torch.jit.script
def scripted_and_mixed(x: Tensor) -> Tensor:
    return x * 0.5 + torch.flip(x, [1])


@both_forms
def test_a_script_is_followed_by_its_gradient(form):
    model = Walker(between(scripted), form)
    plain = Walker(between(lambda x: x * 0.5 + torch.tanh(x)), form)
    plain.load_state_dict(model.state_dict())
    assert_same(explain(model, features()), explain(plain, features()))


@both_forms
@pytest.mark.parametrize(
    "step", [scripted_and_mixed, lambda x: x.cumsum(dim=1)], ids=["script", "cumsum"]
)
def test_tokens_lost_between_attention_calls_are_refused(step, form):
    assert_refused(Walker(between(step), form), features(), "blocks.1.attention")


def scattered_mean(x):
    index = torch.zeros(len(x), 2, 1, dtype=torch.long).expand(-1, -1, WIDTH)
    return x[:, 2:].clone().scatter_reduce(1, index, x[:, :2], "mean")


def permuted_by_a_product(x):
    return EYE.flip(0) @ x


def scattered_by_feature(x):
    index = torch.arange(2 * WIDTH).view(1, 2, WIDTH).expand(len(x), -1, -1) % (x.shape[1] - 2)
    return x[:, 2:].clone().scatter_add(1, index, x[:, :2])


def added_to_by_index(x):
    return x[:, 2:].clone().index_add_(1, torch.tensor([0, 0]), x[:, :2])


@both_forms
@pytest.mark.parametrize("step", [permuted_by_a_product, scattered_by_feature])
def test_tokens_mixed_by_what_cannot_be_followed_are_refused(step, form):
    assert_refused(Walker(between(step), form), features(), "blocks.1.attention", "followed")


def register_repeated(model, x):
    return torch.cat([model.cls.expand(len(x), 3, -1), x], dim=1)


def token_repeated(model, x):
    return torch.cat([x, x[:, 2:3]], dim=1)


def lasting_padding(model, x):
    return F.pad(x, (0, 0, 2, 1))


@both_forms
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (register_repeated, "one token stands in several places of the sequence"),
        (token_repeated, "one token stands in several places of the sequence"),
        (lasting_padding, "padding stays among the tokens"),
    ],
)
def test_repeated_tokens_and_lasting_padding_are_refused(step, message, form):
    def walk(model, x):
        return model.head(model.encode(step(model, model.start(x)))[:, 4])

    assert_refused(Walker(walk, form), features(), message, "blocks.0.attention")


def experts(model, x):
    """A mixture of two experts: each token goes to one, the results are added at their places."""
    flat = x.reshape(-1, WIDTH)
    shares = model.gate(flat).softmax(dim=-1)
    out = torch.zeros_like(flat)
    for i, expert in enumerate(model.experts):
        chosen = torch.where(shares.argmax(dim=-1) == i)[0]
        out.index_add_(0, chosen, expert(flat[chosen]) * shares[chosen, i, None])
    return out.view(x.shape)


@both_forms
@pytest.mark.parametrize("examples", [1, 2])
@pytest.mark.parametrize("first", ["residual", "experts"])
def test_mixture_of_experts(first, examples, form):
    def walk(model, x):
        x = model.start(x)
        for block in model.blocks:
            x = x + block.attention(block.norm(x))
            y = experts(model, x)
            x = x + y if first == "residual" else y + x
        return model.finish(x)

    model = Walker(
        walk,
        form,
        gate=nn.Linear(WIDTH, 2),
        experts=nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)]),
    )
    x = features()[:examples]
    assert_same(explain(model, x), row(maps(model, [x])))


# Which example, and which parameter, a token is of


@both_forms
@pytest.mark.parametrize("order", ["expanded first", "first", "last"])
def test_positions_given_as_an_argument_of_batch_one(order, form):
    def walk(model, words, positions):
        x, place = model.table(words), model.places(positions)
        if order == "expanded first":
            x = place.expand(len(words), -1, -1) + x
        else:
            x = place + x if order == "first" else x + place
        return model.finish(model.encode(x))

    model = Walker(walk, form, places=nn.Embedding(TOKENS, WIDTH))
    positions = torch.arange(TOKENS)[None]
    expected = row(maps(model, [ids(), positions]))
    assert_same(explain(model, ids(), positions), expected)
    assert_same(explain(model, ids()[1:], positions), expected[1:])


@both_forms
@pytest.mark.parametrize("examples", [1, 2])
def test_prompts_drawn_by_an_index_of_every_example(examples, form):
    def walk(model, x):
        index = torch.arange(3)[None].expand(len(x), -1)
        x = torch.cat([model.start(x), model.table(index)], dim=1)
        return model.head(model.encode(x)[:, -1])

    model, x = Walker(walk, form), features()[:examples]
    expected = row(maps(model, [x]), -1, stop=TOKENS)
    assert_same(explain(model, x), expected)
    assert_same(explain(model, x, rows=-1), expected)
    matrix = GenericAttention(model).relevance(x, 1).matrix("input0", "input0")
    assert_same(matrix, oracles.propagate(maps(model, [x])))


@both_forms
def test_inputs_summed_before_they_are_tokens(form):
    def walk(model, one, other):
        return model.finish(model.encode(model.start(one + other)))

    model, inputs = Walker(walk, form), (features(3), features(4))
    expected = row(maps(model, inputs))
    for values in explain(model, inputs):
        assert_same(values, expected)


class Towers(nn.Module):
    """Two vision transformers on one picture: one reads its CLS token, one the mean of patches."""

    def __init__(self, embed_first, form):
        super().__init__()
        self.embed_first = embed_first
        self.one = Walker(lambda m, x: m.finish(m.encode(m.with_cls(x))), form)
        self.other = Walker(lambda m, x: m.head(m.encode(x).mean(dim=1)), form, depth=3)
        oracles.randomise(self.other, seed=2)

    def forward(self, x):
        if not self.embed_first:
            return self.one(self.embedded(self.one, x)) + self.other(self.embedded(self.other, x))
        one, other = self.embedded(self.one, x), self.embedded(self.other, x)
        return self.one(one) + self.other(other)

    @staticmethod
    def embedded(tower, x):
        return tower.patch(x).flatten(2).mT


def pictures(height=8, width=8):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BATCH, 3, height, width, generator=generator, dtype=torch.float64)


@both_forms
@pytest.mark.parametrize("start", [0, -1])
@pytest.mark.parametrize("embed_first", [True, False])
def test_towers_on_one_picture_are_two_streams(embed_first, start, form):
    model, x = Towers(embed_first, form), pictures()
    every = maps(model, [x])
    one, other = every[:2][start:], every[2:][start:]
    expected = row(one, start=1) + row(other, everywhere(4))
    assert_same(explain(model, x, start_layer=start).flatten(1), expected)


@both_forms
def test_one_parameter_token_in_two_sequences_of_an_example_is_refused(form):
    def walk(model, x):
        x = model.patch(torch.cat([x, x.flip(-1)])).flatten(2).mT
        one, other = model.finish(model.encode(model.with_cls(x))).chunk(2)
        return one + other

    message = "one token is a query in several sequences of the same example"
    assert_refused(Walker(walk, form), pictures(), message, "blocks.0.attention")


def test_rows_are_no_masks():
    model = Walker(lambda m, x: m.finish(m.encode(m.start(x))))
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    mask[:, 3] = True
    with pytest.raises(TypeError, match=r"rows= holds torch\.bool.*floating weights"):
        explain(model, features(), rows=mask)
    assert_same(explain(model, features(), rows=mask.double()), row(maps(model, [features()]), 3))


# Heads


class LoopedHeads(SelfAttention):
    """The heads one after the other, each a call of `form` of its own."""

    join = "cat"

    def forward(self, x):
        q, k, v = (
            projection(x).unflatten(-1, (-1, 4)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        heads = [self.form(*(t[:, i : i + 1] for t in (q, k, v)))[:, 0] for i in range(2)]
        if self.join == "cat":
            return self.out(torch.cat(heads, dim=-1))
        axis = {"stack before": 1, "stack behind": 2}[self.join]
        mixed = torch.stack(heads, dim=axis)
        return self.out((mixed.transpose(1, 2) if axis == 1 else mixed).flatten(2))


@both_forms
@pytest.mark.parametrize("join", ["cat", "stack before", "stack behind"])
def test_heads_in_a_loop_are_averaged(join, form):
    packed = Walker(lambda m, x: m.finish(m.encode(m.start(x))), form)
    looped = Walker(packed.walk, form)
    for block in looped.blocks:
        block.attention.__class__ = LoopedHeads
        block.attention.join = join
    one_by_one = maps(looped, [features()])
    assert len(one_by_one) == 4
    found = explain(looped, features())
    assert_same(found, row(mean_of_heads(one_by_one)))
    assert_same(found, explain(packed, features()))


@both_forms
def test_parallel_branches_are_added(form):
    def walk(model, x):
        x = model.start(x)
        one, other = (block.attention(block.norm(x)) for block in model.blocks)
        return model.finish(x + one + other)

    model = Walker(walk, form)
    expected = oracles.read_row(oracles.propagate([maps(model, [features()])]), 0)
    assert_same(explain(model, features()), expected)


# Prompts as an argument


@both_forms
@pytest.mark.parametrize("shape", [(BATCH, 3, WIDTH), (1, 3, WIDTH), (3, WIDTH)], ids=str)
def test_raw_prompts_joined_to_embedded_tokens(shape, form):
    def walk(model, x, prompts):
        x = torch.cat([prompts.expand(len(x), -1, -1), model.start(x)], dim=1)
        return model.finish(model.encode(x))

    model = Walker(walk, form)
    prompts = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = row(maps(model, [features(), prompts]), start=3)
    assert_same(explain(model, features(), prompts), expected)


def test_weighted_pooling_after_the_last_call():
    """It is a call of its own, with one query, however it is written."""

    def summed(model, x):
        x = model.encode(model.start(x))
        return model.head((model.gate(x).softmax(dim=1) * x).sum(dim=1))

    def multiplied(model, x):
        x = model.encode(model.start(x))
        return model.head((model.gate(x).softmax(dim=1).mT @ x).squeeze(1))

    model, twin = (Walker(walk, gate=nn.Linear(WIDTH, 1)) for walk in (summed, multiplied))
    twin.load_state_dict(model.state_dict())
    relevance = GenericAttention(model).relevance(features(), 1)
    assert [len(call.query_tokens[0]) for call in relevance.calls][-1] == 1
    assert_same(explain(model, features()), explain(twin, features()))
    plain = row(maps(model, [features()]), everywhere())
    assert not torch.allclose(explain(model, features()), plain, rtol=0.1)


def test_logits_of_an_einsum_that_are_added_to_in_place():
    """What `einsum` returns is a view of a tensor that nobody else sees."""

    def attend(query, key, value, *, in_place):
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
        bias = torch.linspace(0, 1, logits.shape[-1]).to(logits)
        if in_place:
            logits += bias
        else:
            logits = logits + bias
        return torch.einsum("bhqk,bhkd->bhqd", logits.softmax(-1), value)

    def walk(model, x):
        return model.finish(model.encode(model.start(x)))

    found = [
        explain(Walker(walk, lambda *qkv, now=now: attend(*qkv, in_place=now)), features())
        for now in (True, False)
    ]
    assert_same(*found)


def test_differences_of_the_corners_of_a_box_are_of_the_box():
    """As in LayoutLM: integers of one row make one token, which is the word's."""
    torch.manual_seed(0)
    words, heights = nn.Embedding(20, WIDTH).double(), nn.Embedding(20, WIDTH).double()

    def walk(model, ids, boxes):
        x = words(ids) + heights(boxes[..., 3] - boxes[..., 1])
        return model.finish(model.encode(x))

    model = Walker(walk)
    boxes = torch.tensor([0, 1, 0, 5]) + torch.arange(TOKENS)[None, :, None] * torch.tensor(
        [0, 0, 0, 1]
    )
    given = ids() % 20, boxes.expand(len(ids()), -1, -1).clone()
    of_words, of_boxes = explain(model, given)
    assert_same(of_boxes.reshape(len(of_boxes), TOKENS, -1)[..., 0], of_words)

    def mixed(model, ids, boxes):
        x = words(ids) + heights(boxes[..., 3] - boxes[..., 3].roll(1, 1) + 10)
        return model.finish(model.encode(x))

    with pytest.raises(UnsupportedAttentionError, match="followed through sub"):
        explain(Walker(mixed), given)


def test_batch_norm_of_one_picture_has_its_gradient_in_any_layout():
    """Of tokens on a map, the CPU kernel of PyTorch 2.14 takes the gradient for another layout."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(WIDTH).double().eval()
    norm.weight.data.uniform_(0.5, 2)
    project, head = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, 3).double()

    def forward(x: Tensor) -> Tensor:
        x = project(x)
        x = x + plain(x, x) @ x
        y = norm(x.mT.unflatten(2, (2, -1)).contiguous())
        return head(torch.tanh(y.flatten(2).mT)[:, 1])

    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    assert_same(explain(forward, x), explain(forward, torch.cat([x, x]))[:1])
