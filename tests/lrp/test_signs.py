"""Signs in LRP: what speaks against a score is negative, whatever sign the score itself has.

The law: the map of a negated score is the negated map, example by example, in every signed rule
set. And a score that has not the sign of what it was made of (a probability) is refused there.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_generic_attn import (
    GenericAttention,
    Lrp,
    LrpRollout,
    PartialLrp,
    TransformerAttribution,
)
from captum_generic_attn.errors import UnsupportedOperationError
from captum_generic_attn.lrp import RULE_SETS
from captum_generic_attn.lrp.rules import AlphaBeta, Conserved, Epsilon, Gamma

SIGNED = [name for name, rules in RULE_SETS.items() if rules.signed]
UNSIGNED = [name for name, rules in RULE_SETS.items() if not rules.signed]
TARGET = 1
CLOSE = 1e-8


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert (theirs.flatten(1) != 0).any(1).all(), "a map of nothing proves nothing"
    scale = theirs.flatten(1).abs().amax(1).view(-1, *[1] * (theirs.ndim - 1))
    return float(((ours - theirs) / scale).abs().max())


def of_mixed_signs(model: nn.Module, head: nn.Linear, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The model with scores of both signs in one batch."""
    with torch.no_grad():
        scores = model(x)
        head.bias -= scores.amin(0).lerp(scores.amax(0), 0.6)
        scores = model(x)[:, TARGET]
    assert scores.min() < -1e-3
    assert scores.max() > 1e-3
    return model, x


def linear_model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(6, 4).double()
    return of_mixed_signs(nn.Sequential(head), head, torch.randn(4, 6, dtype=torch.float64))


def mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 4)).double()
    return of_mixed_signs(model, model[-1], torch.randn(4, 6, dtype=torch.float64))


def vit() -> tuple[nn.Module, Tensor]:
    model = tiny_vit()
    return of_mixed_signs(model, model.head, pictures(3))


def text() -> tuple[nn.Module, Tensor]:
    model = tiny_text("classes")
    return of_mixed_signs(model, model.head, sentences(4))


MODELS = {"linear": linear_model, "MLP": mlp, "ViT": vit, "text": text}


def head_of(model: nn.Module) -> nn.Linear:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def negated_weights(model: nn.Module):
    turned = copy.deepcopy(model)
    head = turned.head if hasattr(turned, "head") else head_of(turned)
    with torch.no_grad():
        head.weight.neg_()
        head.bias.neg_()
    return turned


NEGATED = {
    "neg": lambda model: lambda x: -model(x),
    "times -1": lambda model: lambda x: -1 * model(x),
    "times a tensor": lambda model: lambda x: model(x) * torch.tensor(-1.0, dtype=torch.float64),
    "over -1": lambda model: lambda x: model(x) / -1,
    "from 0": lambda model: lambda x: 0 - model(x),
    "of its last layer": negated_weights,
}


@pytest.fixture(params=MODELS)
def case(request) -> tuple[nn.Module, Tensor]:
    return MODELS[request.param]()


# -- the law ---------------------------------------------------------------------------------------


def test_which_rule_sets_are_signed() -> None:
    assert SIGNED == ["epsilon", "gamma", "frozen"]
    assert UNSIGNED == ["chefer2021_full", "chefer2021", "chefer2021_detr"]


@pytest.mark.parametrize("rules", SIGNED)
@pytest.mark.parametrize("how", NEGATED)
def test_the_map_of_a_negated_score_is_the_negated_map(case, rules, how) -> None:
    model, x = case
    ours = Lrp(NEGATED[how](model), rules=rules).attribute(x, TARGET)
    assert apart(ours, -Lrp(model, rules=rules).attribute(x, TARGET)) <= CLOSE


@pytest.mark.parametrize("rules", SIGNED)
def test_the_other_input_speaks_against_whatever_sign_the_score_has(rules) -> None:
    """Weights 1 and -3 and a bias that makes the score negative, positive, or leaves it."""
    layer = nn.Linear(2, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3.0]]))
    for bias in (-5.0, 0.0, 1.5, 5.0):
        nn.init.constant_(layer.bias, bias)
        found = Lrp(layer, rules=rules).attribute(torch.ones(2, 2).double(), 0)
        assert (found[:, 0] > 0).all(), bias
        assert (found[:, 1] < 0).all(), bias
        if rules != "gamma":
            torch.testing.assert_close(found, layer.weight.detach().expand(2, 2), rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-10, 10), st.sampled_from(SIGNED))
def test_an_element_of_a_linear_score_has_the_sign_of_its_part(seed, bias, rules) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    shift = torch.full((3,), bias, dtype=torch.float64)
    found = Lrp(lambda x: F.linear(x, weight, shift), rules=rules).attribute(x, TARGET)
    assert torch.equal(found.sign(), (x * weight[TARGET]).sign())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SIGNED), st.floats(0.01, 100))
def test_the_law_on_drawn_networks(seed, rules, factor) -> None:
    """Also: a score times a positive number has the map times that number."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    model, x = model.double(), torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        model[-1].bias -= model(x).mean(0)
    plain = Lrp(model, rules=rules).attribute(x, TARGET)
    scale = plain.abs().max()
    turned = Lrp(lambda x: -factor * model(x), rules=rules).attribute(x, TARGET)
    torch.testing.assert_close(turned / factor, -plain, rtol=1e-6, atol=1e-8 * float(scale))


@pytest.mark.parametrize("rules", SIGNED)
def test_frozen_and_others_have_the_signs_of_gradient_times_input(rules) -> None:
    """Where a ReLU network has no biases, ε and frozen rules are gradient times input."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 3, bias=False)
    ).double()
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    scores = model(x)[:, TARGET]
    assert (scores > 0).any()
    assert (scores < 0).any()
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    expected = (gradient * x).detach()
    ours = Lrp(model, rules=rules).attribute(x.detach(), TARGET)
    if rules == "gamma":  # bends the map, but to no other side
        assert torch.cosine_similarity(ours, expected, -1).min() > 0.5
    else:
        assert apart(ours, expected) <= 1e-3


def test_a_sum_of_scores_has_the_sum_of_maps(case) -> None:
    model, x = case
    one, two = (Lrp(model, rules="frozen").attribute(x, target) for target in (1, 2))
    margin = Lrp(lambda x: model(x)[:, 1] - model(x)[:, 2], rules="frozen").attribute(x)
    assert apart(margin, one - two) <= CLOSE


@pytest.mark.parametrize("rules", SIGNED)
def test_batches_of_mixed_signs_are_their_examples(case, rules) -> None:
    model, x = case
    method = Lrp(model, rules=rules)
    together = method.attribute(x, TARGET)
    alone = torch.cat([method.attribute(x[i : i + 1], TARGET) for i in range(len(x))])
    assert apart(together, alone) <= CLOSE
    assert apart(method.attribute(x, TARGET, internal_batch_size=2), together) <= CLOSE
    both = method.attribute_targets(x, [0, [i % 3 for i in range(len(x))]])
    assert apart(both[0], method.attribute(x, 0)) <= CLOSE
    assert apart(both[1], method.attribute(x, [i % 3 for i in range(len(x))])) <= CLOSE


@pytest.mark.parametrize("rules", UNSIGNED)
def test_rules_that_start_from_one_show_what_speaks_for_a_logit(case, rules) -> None:
    """Nothing is turned: neither by a minus, nor by what makes a probability of a logit."""
    model, x = case
    expected = Lrp(model, rules=rules).attribute(x, TARGET)
    ends = (torch.neg, torch.sigmoid, F.logsigmoid, partial(torch.softmax, dim=-1),
            partial(torch.log_softmax, dim=-1))  # fmt: skip
    for end in ends:
        ours = Lrp(lambda x, end=end: end(model(x)), rules=rules).attribute(x, TARGET)
        assert apart(ours, expected) <= 1e-6


# -- where relevance starts ------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [Epsilon(), Gamma(), Conserved(Gamma(0.1))])
def test_rules_that_share_out_do_not_start_from_one(linear) -> None:
    with pytest.raises(ValueError, match=r"start='one' with linear=.*; use start='score'"):
        replace(RULE_SETS["chefer2021_full"], linear=linear)
    assert replace(RULE_SETS["chefer2021_full"], linear=linear, start="score").signed
    assert not replace(RULE_SETS["chefer2021_full"], linear=Conserved(AlphaBeta())).signed


def test_a_wrong_start_is_named() -> None:
    with pytest.raises(ValueError, match="start='logit' is none of 'score', 'one'"):
        replace(RULE_SETS["frozen"], start="logit")


@pytest.mark.parametrize("rules", SIGNED)
def test_a_score_of_zero_has_no_map_and_is_told_of(rules) -> None:
    layer = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    x = torch.tensor([[2.0, 1.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    for size in (None, 1):
        with pytest.warns(UserWarning, match=r"the score of example \[1\] is exactly 0") as seen:
            found = Lrp(layer, rules=rules).attribute(x, 0, internal_batch_size=size)
        assert len([w for w in seen if "exactly 0" in str(w.message)]) == 1
        assert (found[1] == 0).all()
        assert torch.equal(found[[0, 2]].sign(), torch.tensor([[1.0, -1.0]] * 2).double())
    with pytest.warns(UserWarning, match="^the score is exactly 0, and LRP with these") as seen:
        Lrp(layer, rules=rules).attribute(x[1:2], 0)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lrp(layer, rules=rules).attribute(x, 1)


@pytest.mark.parametrize("rules", UNSIGNED)
def test_a_score_of_zero_is_nothing_special_where_relevance_starts_from_one(rules) -> None:
    layer = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Lrp(layer, rules=rules).attribute(torch.ones(1, 2).double(), 0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0]]).double())


# -- scores without the sign of what they were made of ---------------------------------------------


def chosen(values: Tensor) -> Tensor:
    """One value of each example, picked as the loss functions of language models do."""
    return values.gather(1, torch.full((len(values), 1), TARGET)).expand(-1, 2)


REFUSED = {
    "log_softmax": lambda z: z.log_softmax(-1),
    "log_softmax and gather": lambda z: chosen(z.log_softmax(-1)),
    "minus log_softmax": lambda z: -z.log_softmax(-1),
    "sum of log_softmax": lambda z: z.log_softmax(-1)[:, :3].sum(1, keepdim=True).expand(-1, 2),
    "difference of log_softmax": lambda z: z.log_softmax(-1)[:, :2] - z.log_softmax(-1)[:, 2:],
    "softmax": lambda z: z.softmax(-1),
    "log of softmax": lambda z: z.softmax(-1).log(),
    "log of softmax and a little": lambda z: (z.softmax(-1) + 1e-9).log(),
    "softmax by hand": lambda z: z.exp() / z.exp().sum(-1, keepdim=True),
    "sigmoid": torch.sigmoid,
    "scaled sigmoid": lambda z: 2 * z.sigmoid(),
    "other half of a sigmoid": lambda z: 1 - z.sigmoid(),
    "product of sigmoids": lambda z: z.sigmoid() * z[:, :1].sigmoid(),
    "mean of sigmoid": lambda z: torch.stack([z, -z]).sigmoid().mean(0),
    "logsigmoid": F.logsigmoid,
    "softplus": F.softplus,
    "power of 2": lambda z: 2.0**z,
    "inverse": lambda z: 1 / z,
    "inverse of a tensor": lambda z: torch.ones_like(z) / z,
}


@pytest.mark.parametrize("rules", SIGNED)
@pytest.mark.parametrize("end", REFUSED)
def test_probabilities_are_refused(rules, end) -> None:
    for build in (mlp, text):
        model, x = build()
        with pytest.raises(ValueError, match="explain the logit, what goes into") as refused:
            Lrp(lambda x, model=model: REFUSED[end](model(x)), rules=rules).attribute(x, TARGET)
        if rules != "frozen":
            assert isinstance(refused.value, UnsupportedOperationError)
    assert torch._C._len_torch_function_stack() == 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rules", SIGNED)
def test_the_refusal_names_the_operation_that_ran_first(rules) -> None:
    model, x = mlp()
    with pytest.raises(UnsupportedOperationError, match=r"out of log_softmax .* into log_softmax$"):
        Lrp(lambda x: model(x).log_softmax(-1), rules=rules).attribute(x, 1)
    with pytest.raises(UnsupportedOperationError, match=r"out of sigmoid .* into sigmoid$"):
        Lrp(lambda x: (1 - model(x).sigmoid()).log(), rules=rules).attribute(x, 1)
    with pytest.raises(
        UnsupportedOperationError, match=r"out of sub .* a constant is added: leave"
    ):
        Lrp(lambda x: model(x) - 10, rules=rules).attribute(x, 1)
    with pytest.raises(
        UnsupportedOperationError, match=r"out of add .* a constant is added: leave"
    ):
        Lrp(lambda x: torch.add(model(x), other=0.5), rules=rules).attribute(x, 1)


@pytest.mark.parametrize("method", [PartialLrp, TransformerAttribution, LrpRollout,
                                    GenericAttention])  # fmt: skip
@pytest.mark.parametrize("rules", ["epsilon", "gamma"])
def test_methods_over_attention_refuse_them_too(method, rules) -> None:
    chosen_rules = {"lrp" if method is GenericAttention else "rules": rules}
    model, x = text()
    with pytest.raises(
        UnsupportedOperationError, match="explain the logit, what goes into softmax"
    ):
        method(lambda x: model(x).softmax(-1), **chosen_rules).attribute(x, 1)
    default = method(model).attribute(x, 1)  # the authors' rules see the logit
    assert (default != 0).any()


KEPT = {
    "minus 0": lambda z: z - 0,
    "a constant tensor": lambda z: z - torch.full((), 10.0, dtype=z.dtype),
    "times a constant": lambda z: 3 * z,
    "without its normaliser": lambda z: z - z.logsumexp(-1, keepdim=True),
    "softcap": lambda z: 30 * torch.tanh(z / 30),
    "its own gate": lambda z: z * z.sigmoid(),
    "quick GELU": lambda z: z * torch.sigmoid(1.702 * z),
    "GELU by hand": lambda z: 0.5 * z * (1 + torch.tanh(z)),
    "moved": lambda z: torch.cat([z, z], -1).view(len(z), 2, -1).transpose(1, 2)[..., 0],
}


@pytest.mark.parametrize("rules", SIGNED)
@pytest.mark.parametrize("end", KEPT)
def test_other_scores_have_the_map_of_their_logit(rules, end) -> None:
    """Up to a positive factor: their sign is that of the logit, or constants take their share."""
    model, x = mlp()
    ours = Lrp(lambda x: KEPT[end](model(x)), rules=rules).attribute(x, TARGET)
    theirs = Lrp(model, rules=rules).attribute(x, TARGET)
    assert torch.cosine_similarity(ours, theirs, -1).min() > 1 - 1e-6


def test_a_gate_in_the_model_is_no_score() -> None:
    """Sigmoid, softmax and constants before the last layer are nobody's score."""
    torch.manual_seed(0)
    one, gate, two = (nn.Linear(6, n).double() for n in (6, 6, 3))
    x = torch.randn(3, 6, dtype=torch.float64)

    def forward(x):
        hidden = one(x) * gate(x).sigmoid() + 1
        return two(hidden + (x.softmax(-1) * x).sum(-1, keepdim=True))

    def pooled(x):
        return (one(x) * gate(x).sigmoid()).sum(-1)

    for rules in SIGNED:
        assert (Lrp(forward, rules=rules).attribute(x, 1) != 0).any()
        assert (Lrp(pooled, rules=rules).attribute(x) != 0).any()


# -- relevance of attention ------------------------------------------------------------------------


@pytest.mark.parametrize("build", [vit, text])
@pytest.mark.parametrize("rules", ["epsilon", "gamma"])
def test_relevance_of_attention_is_negated_too(build, rules) -> None:
    model, x = build()
    whole = partial(PartialLrp, rules=rules, clamp=False)
    options = {"return_input_shape": False}
    plain = whole(model).attribute(x, TARGET, **options)
    negated = whole(lambda x: -model(x)).attribute(x, TARGET, **options)
    assert apart(negated, -plain) <= CLOSE
    # Clamped, the one shows what speaks for the score, the other what speaks against it.
    against = PartialLrp(lambda x: -model(x), rules=rules).relevance(x, TARGET, keep_calls=True)
    both = whole(model).relevance(x, TARGET, keep_calls=True)
    last = both.calls[-1].per_head
    torch.testing.assert_close(against.calls[-1].per_head, (-last).clamp(min=0))


@pytest.mark.parametrize("build", [vit, text])
@pytest.mark.parametrize("rules", ["epsilon", "gamma"])
@pytest.mark.parametrize("make", [
    lambda m, r: GenericAttention(m, lrp=r), lambda m, r: TransformerAttribution(m, rules=r),
])  # fmt: skip
def test_gradients_times_signed_relevance_have_no_sign(build, rules, make) -> None:
    """`∇A ⊙ C` is positive where both speak for the score, and where both speak against it."""
    model, x = build()
    plain = make(model, rules).attribute(x, TARGET)
    negated = make(lambda x: -model(x), rules).attribute(x, TARGET)
    assert apart(negated, plain) <= CLOSE


@pytest.mark.parametrize("make", [
    lambda m: PartialLrp(m, rules="epsilon"), lambda m: LrpRollout(m, rules="gamma"),
    lambda m: GenericAttention(m, lrp="epsilon"),
    lambda m: TransformerAttribution(m, rules="gamma"),
])  # fmt: skip
def test_methods_over_attention_tell_of_scores_of_zero(make) -> None:
    model, x = tiny_text("classes", eager=True), sentences(4)
    with torch.no_grad():
        scores = model(x)
    shift = torch.zeros_like(scores)
    shift[1] = scores[1]

    def forward(x):
        return model(x) - shift

    with pytest.warns(UserWarning, match=r"the score of example \[1\] is exactly 0") as seen:
        found = make(forward).attribute(x, TARGET)
    assert len(seen) == 1
    assert (found[1] == 0).all()
    assert (found[[0, 2, 3]] != 0).any(1).all()
    with pytest.warns(UserWarning, match=r"the score of example \[1\] is exactly 0"):
        make(forward).relevance(x, TARGET)


@pytest.mark.parametrize("rules", SIGNED)
def test_a_gated_half_has_all_relevance_and_its_sign(rules) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    found = Lrp(lambda x: F.glu(x, 1) @ weight, rules=rules).attribute(x)
    signal, gate = x.chunk(2, 1)
    assert (found[:, 4:] == 0).all()
    parts = signal * gate.sigmoid() * weight
    assert torch.equal(found[:, :4].sign(), parts.sign())
    torch.testing.assert_close(found.sum(1), parts.sum(1), rtol=1e-3, atol=0)
