"""`verify`: right models pass, and each planted fault is found by the check that is for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import pictures, tiny_text, tiny_vit
from relevance.test_explained_rows import Layers, exits, inputs
from torch import Tensor, nn

from captum_generic_attn import GenericAttention, Lrp, RawAttention, Verification
from captum_generic_attn.capture import blocks
from captum_generic_attn.capture.tracking import head_calls, join, opaque
from captum_generic_attn.capture.tracking.abstract_value import AbstractValue
from captum_generic_attn.relevance.output_rows import OutputStream, output_streams
from captum_generic_attn.verification import Check, verify

D = 8
FLIP = torch.eye(5, dtype=torch.float64).flip(0) + 0.1


def report(model: Callable[..., Any], given: Any, target: Any = 1, **options: Any) -> Verification:
    return verify(GenericAttention(model, **options), given, target)


def failed(found: Verification) -> set[str]:
    return {check.name for check in found.checks if check.status == "failed"}


class Between(nn.Module):
    """Two layers with a step between them."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.step = Layers(lambda m, x: x), step
        torch.manual_seed(1)
        self.lstm = nn.LSTM(D, D, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        m = self.layers
        x = m.step(1, self.step(m.step(0, m.embed(x))))
        return m.heads[0](x[:, 0])


# --- right models


@pytest.mark.parametrize("how", ["fused", "matmul", "einsum"])
def test_a_right_model_passes(how: str) -> None:
    found = report(Layers(lambda m, x: m.heads[0](m.states(x)[-1][:, 0]), how), inputs(3))
    assert found.passed
    assert [c.name for c in found.checks] == [
        "attention", "tokens", "rows", "elements", "examples", "heads", "conservation", "traces",
    ]  # fmt: skip
    assert {c.status for c in found.checks if c.name != "conservation"} == {"passed"}
    assert found["tokens"].samples >= 18
    assert "1 of x" in found["rows"].found


def test_the_report_can_be_read() -> None:
    found = report(tiny_vit(), pictures(1))
    lines = repr(found).splitlines()
    assert lines[0] == "Verification of Generic Attention: nothing is wrong"
    assert len(lines) == 9
    assert lines[1].startswith("ok     attention: probabilities times values are the output of all")
    assert "-      examples: one example; pass two or more" in lines
    with pytest.raises(KeyError, match=r"no check is named 'rowz'.*attention, tokens, rows"):
        found["rowz"]
    wrong = Verification("x", (Check("rows", "failed", "others", 1),))
    assert not wrong.passed
    assert repr(wrong) == "Verification of x: 1 of 1 checks failed\nWRONG  rows: others"


def test_words_pass() -> None:
    ids = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    found = report(tiny_text(), ids)
    assert found.passed
    assert found["elements"].status == "passed"


def test_other_methods_and_options() -> None:
    assert verify(RawAttention(tiny_vit()), pictures(), 1).passed
    given = verify(GenericAttention(tiny_vit(), rows=0), pictures(), 1)
    assert given["rows"].status == "skipped"
    found = verify(Lrp(tiny_vit(), rules="epsilon"), pictures(), 1)
    assert found.passed
    assert "misses what it started from by" in found["conservation"].found
    assert found["rows"].status == "skipped"
    with pytest.raises(TypeError, match="takes a method of this package, not str"):
        verify("GenericAttention", pictures(), 1)  # type: ignore[arg-type]


def test_the_same_seed_says_the_same() -> None:
    model = tiny_vit()
    before = torch.get_rng_state()
    one = report(model, pictures())
    assert torch.equal(before, torch.get_rng_state())
    assert one.checks == report(model, pictures()).checks


def test_approximations_are_listed() -> None:
    """A gate by the mean of all tokens, and a convolution that keeps their grid."""
    gated = report(Between(lambda x: x * torch.sigmoid(x.mean(1, keepdim=True))), inputs(2))
    assert gated.passed
    assert gated["tokens"].status == "noted"
    assert "statistics (mul)" in gated["tokens"].found
    weight = torch.randn(D, D, 3, dtype=torch.float64)
    near = report(Between(lambda x: F.conv1d(x.mT, weight, padding=1).mT), inputs(2))
    assert near.passed
    assert "neighbourhood (conv1d)" in near["tokens"].found


# --- planted faults


def test_attention_that_is_not_the_models() -> None:
    of = blocks.FusedBlocks.probabilities
    with mock.patch.object(blocks.FusedBlocks, "probabilities", lambda self: of(self) * 1.01):
        found = report(tiny_vit(), pictures())
    assert failed(found) == {"attention"}
    assert "miss the output of blocks." in found["attention"].found


def test_a_join_that_forgets_what_was_lost() -> None:
    def forgetful(state, name, main, other, shape):
        return main.abstract

    with mock.patch.object(join, "join", forgetful):
        found = report(Between(lambda x: x + FLIP @ x), inputs(2))
    assert "tokens" in failed(found)
    assert "positions change with tokens that they do not list" in found["tokens"].found


@pytest.mark.parametrize("step", ["lstm", "solve", "cumsum"])
def test_an_unknown_operation_that_is_taken_for_element_wise(step: str) -> None:
    def element_wise(transfer, name, given, out, *, in_place):
        results = opaque.tensors_in(out)
        abstract = next(g.operand.abstract for g in given if g.operand.abstract.data)
        for result in results:
            transfer.abstract_values[result] = abstract
        return results

    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "lstm": lambda x: model.lstm(x.flip(1))[0],
        "solve": lambda x: torch.linalg.solve(FLIP, x),
        "cumsum": lambda x: torch.special.logit(torch.sigmoid(x)).cumsum(1),
    }
    model = Between(steps[step])
    patches = [mock.patch.object(opaque, "results_of", element_wise)]
    if step == "cumsum":
        patches = [mock.patch.object(AbstractValue, "without_tokens", lambda self, operation: self)]
    with patches[0]:
        found = report(model, inputs(2))
    assert "tokens" in failed(found)


def test_heads_that_are_added_are_told() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.out, self.head = nn.Linear(4, 3 * D), nn.Linear(D, D), nn.Linear(D, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, -1)) for t in self.qkv(x).chunk(3, -1))
            heads = [
                F.scaled_dot_product_attention(q[:, :, h], k[:, :, h], v[:, :, h]) for h in (0, 1)
            ]
            return self.head(self.out(torch.cat(heads, -1))[:, 0])

    right = report(Looped(), inputs(2))["heads"]
    assert right.status == "noted"
    assert right.found.startswith("averaged as heads of one layer: the forward function (call 0)")
    apart = lambda self, alike: {call: (call,) for group in alike for call in group}
    with mock.patch.object(head_calls.Heads, "layers", apart):
        wrong = report(Looped(), inputs(2))["heads"]
    assert wrong.found.startswith("added up as branches: the forward function (call 0)")


def test_rows_of_the_last_call_alone() -> None:
    """An early exit, with the rule that looks at the last call of each stream."""

    def naive(capture, reached):
        found = output_streams(capture, reached)
        return {
            name: OutputStream(output.stream, output.last, output.last, last_suffice=True)
            for name, output in found.items()
        }

    planning = importlib.import_module("captum_generic_attn.relevance.plan")
    model, given = Layers(exits), inputs(2)
    assert report(model, given, (0, 2)).passed
    with mock.patch.object(planning, "output_streams", naive):
        found = report(model, given, (0, 2))
    assert failed(found) == {"rows"}
    assert "others have a gradient than those explained" in found["rows"].found


@pytest.mark.parametrize("way", ["bands", "crop", "remainder"])
def test_relevance_on_elements_that_are_not_read(way: str) -> None:
    model = tiny_vit()
    forward, given = {
        "bands": (lambda x: model(x[:, [4, 0, 2]]), torch.rand(2, 6, 32, 32).double()),
        "crop": (lambda x: model(x[..., 4:36]), torch.rand(2, 3, 32, 40).double()),
        "remainder": (
            tiny_vit(img_size=(36, 37)), torch.rand(2, 3, 36, 37).double()),
    }[way]  # fmt: skip
    assert report(forward, given).passed
    maps = importlib.import_module("captum_generic_attn.relevance.input_maps")
    everywhere = lambda extent, shape: torch.ones(shape[1:], dtype=torch.bool)
    with mock.patch.object(maps, "elements_of", everywhere):
        found = report(forward, given)
    assert failed(found) == {"elements"}
    assert "no gradient reaches" in found["elements"].found


def test_scores_that_read_other_examples() -> None:
    model = tiny_vit()

    def similarity(x: Tensor) -> Tensor:
        return model(x) @ model(x).flip(0).mT

    found = report(similarity, pictures(3))
    assert failed(found) == {"examples"}
    independence = importlib.import_module("captum_generic_attn.relevance.independence")
    with mock.patch.object(independence, "checkable", return_value=False):
        found = report(similarity, pictures(3))
    assert "examples" in failed(found)


@pytest.mark.parametrize("left", ["a hook", "a gradient", "a flag", "numbers", "random state"])
def test_traces_of_a_method(left: str) -> None:
    class Careless(RawAttention):
        def attribute(self, *args: Any, **kwargs: Any) -> Any:
            model = self.forward_func
            if left == "a hook":
                model.head.register_forward_hook(lambda *_: None)
            elif left == "a gradient":
                model.head.weight.grad = torch.zeros_like(model.head.weight)
            elif left == "a flag":
                model.head.train()
            elif left == "numbers":
                with torch.no_grad():
                    model.head.bias.add_(0)
            else:
                torch.rand(1)
            return super().attribute(*args, **kwargs)

    found = verify(Careless(tiny_vit()), pictures(), 1)
    assert failed(found) == {"traces"}


def test_the_operation_where_relevance_leaks_is_named() -> None:
    """Score 4, of which the bias is 2: half of the relevance stays with it."""
    layer = nn.Linear(2, 1)
    layer.weight.data.fill_(1)
    layer.bias.data.fill_(2)
    found = verify(Lrp(layer, rules="epsilon"), torch.ones(1, 2))["conservation"]
    assert found.status == "noted"
    assert found.found == (
        "the sum of relevance misses what it started from by 50.0%, most of it at linear (+50.0%)"
    )
    layer.bias.data.zero_()
    kept = verify(Lrp(layer, rules="epsilon"), torch.ones(1, 2))["conservation"]
    assert kept.status == "passed"
