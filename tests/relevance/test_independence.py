"""Scores that read other examples are refused; those that do not are left alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from relevance.test_explained_rows import Layers, class_attention_alone, exits, inputs
from torch import Tensor, nn

from captum_generic_attn import GenericAttention, RawAttention
from captum_generic_attn.relevance.independence import halves

MATCH = r"must depend on that example alone.*examples \[.*\] read tokens of examples \[.*diagonal"


def encoded(how: str = "fused") -> Layers:
    return Layers(lambda m, x: m.heads[0](m.states(x)[-1][:, 0]), how)


def vectors(model: Layers, x: Tensor) -> Tensor:
    return model.states(x)[-1][:, 0]


MODEL = encoded()


def similarity(queries: Tensor, documents: Tensor) -> Tensor:
    """CLIP's logits, `[B, B]`."""
    return vectors(MODEL, queries) @ vectors(MODEL, documents).T


def less_the_mean(x: Tensor) -> Tensor:
    scores = MODEL(x)
    return scores - scores.mean(0)


def softmax_over_the_batch(x: Tensor) -> Tensor:
    return MODEL(x).log_softmax(0)


def flipped(x: Tensor) -> Tensor:
    return MODEL(x).flip(0)


def early_exit_flipped(x: Tensor) -> Tensor:
    """What is mixed is read before the last layer."""
    states = MODEL.states(x)
    return MODEL.heads[0](states[0][:, 0].flip(0) + states[-1][:, 0])


def zeroed_and_flipped(x: Tensor) -> Tensor:
    """What is mixed is read before a last layer that adds nothing."""
    x = MODEL.step(1, MODEL.step(0, MODEL.embed(x)))
    return MODEL.heads[0]((x + 0.0 * MODEL.blocks[2](x, x))[:, 0].flip(0))


@pytest.mark.parametrize("target", [0, 1, [1, 2, 0]])
@pytest.mark.parametrize("kind", [GenericAttention, RawAttention])
def test_in_batch_similarities_are_refused(kind, target) -> None:
    given = inputs(3), inputs(3).flip(1)
    for options in ({}, {"strict": False}, {"rows": 0}):
        with pytest.raises(ValueError, match=MATCH):
            kind(similarity, **options).attribute(given, target)
    for b in range(3):  # alone, each has one score: with itself
        kind(similarity).attribute(tuple(t[b : b + 1] for t in given), 0)


def test_the_diagonal_is_explained_as_the_pairs_are() -> None:
    given = inputs(3), inputs(3).flip(1)

    def paired(queries: Tensor, documents: Tensor) -> Tensor:
        return (vectors(MODEL, queries) * vectors(MODEL, documents)).sum(-1)

    ours = GenericAttention(lambda q, d: similarity(q, d).diagonal()).attribute(given)
    expected = GenericAttention(paired).attribute(given)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "model",
    [less_the_mean, softmax_over_the_batch, flipped, early_exit_flipped, zeroed_and_flipped],
)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_other_ways_to_read_other_examples(model, count: int) -> None:
    with pytest.raises(ValueError, match=MATCH):
        GenericAttention(model).attribute(inputs(count), 1)
    with pytest.raises(ValueError, match=MATCH):
        GenericAttention(model).attribute_targets(inputs(count), [0, 1])
    with pytest.raises(ValueError, match=MATCH):
        GenericAttention(model).relevance(inputs(count), 1)


@pytest.mark.filterwarnings("ignore:the score .* has no gradient")  # less itself, it is zero
@pytest.mark.parametrize("model", [less_the_mean, softmax_over_the_batch, flipped])
def test_one_example_at_a_time_is_never_asked(model) -> None:
    method = GenericAttention(model)
    method.attribute(inputs(3), 1, internal_batch_size=1)


def test_the_message_names_the_examples() -> None:
    with pytest.raises(ValueError, match=r"\[0\] read tokens of examples \[1\]|\[1\] .* \[0\]"):
        GenericAttention(flipped).attribute(inputs(2), 1)


def test_batch_norm_in_training_mode_is_warned_of() -> None:
    norm = nn.BatchNorm1d(3).double().train()
    with pytest.warns(UserWarning, match="training mode"):
        GenericAttention(lambda x: norm(MODEL(x))).attribute(inputs(4), 1)
    norm.eval()
    GenericAttention(lambda x: norm(MODEL(x))).attribute(inputs(4), 1)


@pytest.mark.parametrize("kind", ["a parameter", "a buffer", "each example"])
def test_batch_norm_of_what_no_other_example_feeds_leaves_the_check_on(kind: str) -> None:
    """Standardised weights are no training mode: scores may still not read other examples."""
    weight = torch.randn(4, 4).double()
    weight = nn.Parameter(weight) if kind == "a parameter" else weight

    def treated(x: Tensor) -> Tensor:
        if kind == "each example":
            flat = F.batch_norm(x.mT.reshape(1, -1, x.shape[1]), None, None, training=True)
            return flat.view(*x.mT.shape).mT
        return x @ F.batch_norm(weight, None, None, training=True)

    assert GenericAttention(lambda x: MODEL(treated(x))).attribute(inputs(4), 1).max() > 0
    for mixed in (flipped, less_the_mean):
        with pytest.raises(ValueError, match=MATCH):
            GenericAttention(lambda x, mixed=mixed: mixed(treated(x))).attribute(inputs(4), 1)


def test_masks_written_by_hand_are_no_dependence() -> None:
    """0 times -inf is NaN, and no evidence."""

    def masked(x: Tensor) -> Tensor:
        scores = MODEL.heads[0](MODEL.states(x)[-1])  # [B, N, K]
        hidden = torch.zeros(x.shape[1]).double()
        hidden[-1] = -math.inf
        return (scores + hidden[:, None]).max(1).values

    values = GenericAttention(masked).attribute(inputs(4), 1)
    assert values.isfinite().all()

    def spoiled(x: Tensor) -> Tensor:  # its backward pass makes NaN of zeros
        scores = vectors(MODEL, x)[:, :3]
        return scores * torch.where(scores > -math.inf, scores / scores, scores) ** 0.5

    found = GenericAttention(spoiled).attribute(inputs(1).abs(), 1)
    assert found.shape == (1, 5, 4)


def test_nothing_is_disturbed() -> None:
    """The user's random state, hooks of the model, gradients."""
    model, x = Layers(class_attention_alone), inputs(4)
    seen = []

    def read(x: Tensor) -> Tensor:
        out = model(x)
        out.register_hook(lambda g: seen.append(g.shape) and None)
        return out

    torch.manual_seed(0)
    before = torch.get_rng_state()
    GenericAttention(read).attribute(x, 1)
    assert torch.equal(before, torch.get_rng_state())
    assert set(seen) == {torch.Size([4, 3])}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_targets_of_exits_are_their_own() -> None:
    GenericAttention(Layers(exits)).attribute(inputs(4), [(0, 1), (2, 0), (1, 1), (0, 2)])


def test_halves_split_neighbours_and_mirrored_pairs() -> None:
    for count in range(2, 65):
        own = set(halves(count).tolist())
        assert 0 < len(own) < count
        assert len(own) % 2
        apart = [
            [(i in own) != (j in own) for i, j in pairs]
            for pairs in (
                [(i, (i + 1) % count) for i in range(count)],
                [(i, count - 1 - i) for i in range(count * (1 - count % 2))],
                [(i, i ^ 1) for i in range(count * (1 - count % 2))],
                [(i, i + count // 2) for i in range(count // 2 * (1 - count % 2))],
            )
        ]
        assert all(any(split) for split in apart if split), count


@pytest.mark.parametrize("reading", ["first", "second"])
@pytest.mark.parametrize("count", [2, 5])
def test_either_half_may_read_the_other(reading: str, count: int) -> None:
    """Only scores of one half read the others: the passes see one direction each."""
    half = torch.zeros(count, dtype=torch.bool)
    half[halves(count)] = True
    readers = half if reading == "first" else ~half
    weight = 1e-3 * readers[:, None].double() * (~readers).double()

    def scores(x: Tensor) -> Tensor:
        own = MODEL(x)
        return own + weight @ own

    asked, others = readers.nonzero().flatten().tolist(), (~readers).nonzero().flatten().tolist()
    with pytest.raises(ValueError, match="alone") as raised:
        GenericAttention(scores).attribute(inputs(count), 1)
    assert f"examples {asked} read tokens of examples {others}" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_dependence(dtype: torch.dtype) -> None:
    """Gradients of one half and of all scores differ by rounding at most, in every precision."""
    model = encoded().to(dtype)
    x = inputs(6).to(dtype)
    together = GenericAttention(model).attribute(x, 1)
    alone = torch.cat([GenericAttention(model).attribute(x[b : b + 1], 1) for b in range(6)])
    close = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert (together - alone).abs().max() <= close * alone.abs().max()
