"""Which calls a score depends on, and which lie deepest, compared with autograd.

A tensor of the graph stands for each call; autograd gives a gradient there if the score depends on
it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from captum_generic_attn.capture.graph import reached_by


def record(index: int, tensor: Tensor) -> SimpleNamespace:
    return SimpleNamespace(index=index, edge=get_gradient_edge(tensor))


def records_of(tensors: list[Tensor]) -> list[SimpleNamespace]:
    """Indices of records are not their places in the list, and not in order."""
    return [record(100 - 3 * i, tensor) for i, tensor in enumerate(tensors)]


def depends(score: Tensor, tensor: Tensor) -> bool:
    (gradient,) = torch.autograd.grad(
        score.sum(), tensor, retain_graph=True, allow_unused=True, materialize_grads=False
    )
    return gradient is not None


def check(score: Tensor, tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """Places of the tensors that are reached, and of the deepest, both by autograd."""
    records = records_of(tensors)
    reached = reached_by(score, records)
    expected = [i for i, tensor in enumerate(tensors) if depends(score, tensor)]
    assert {*reached} == {records[i].index for i in expected}
    for i, one in enumerate(records):
        assert (one.index in reached) == (i in expected)

    deepest = [
        i for i in expected
        if not any(depends(tensors[i], tensors[j]) for j in expected
                   if records[j].edge != records[i].edge)
    ]  # fmt: skip
    found = reached.deepest([records[i] for i in expected])
    assert [one.index for one in found] == [records[i].index for i in deepest]
    return expected, deepest


def leaf(*shape: int) -> Tensor:
    return torch.ones(shape or (2,), requires_grad=True)


def test_a_chain() -> None:
    x = leaf()
    a = x * 2
    b = a.sin()
    c = b + x
    assert check(c.exp().sum(), [a, b, c]) == ([0, 1, 2], [0])


def test_branches() -> None:
    """Two towers that meet, one of them two calls deep, and one that the score does not read."""
    x, y = leaf(), leaf()
    a, b = x * 2, y * 3
    c = a.sin()
    aside = (a + b).cos()
    assert check((c * b).sum(), [a, b, c, aside]) == ([0, 1, 2], [0, 1])
    assert check(aside.sum(), [a, b, c, aside]) == ([0, 1, 3], [0, 1])


def test_a_call_that_is_passed_by_is_still_led_to() -> None:
    """The graph leads from the later call to the earlier, by whatever path."""
    x = leaf()
    a = x * 2
    b = a * 3
    assert check((a + b).sum(), [b, a]) == ([0, 1], [1])


def test_a_diamond() -> None:
    a = leaf() * 2
    left, right = a.sin(), a.cos()
    assert check((left * right).sum(), [a, left, right]) == ([0, 1, 2], [0])
    assert check((left * right).sum(), [left, right]) == ([0, 1], [0, 1])


def test_what_was_detached_is_not_reached() -> None:
    x = leaf()
    a = x * 2
    b = a.detach() * x
    with torch.no_grad():
        c = a * 3
    assert check((b + c).sum(), [a, b]) == ([1], [1])


def test_a_call_that_is_the_score_itself() -> None:
    a = leaf() * 2
    b = a.sin()
    assert check(b, [a, b]) == ([0, 1], [0])
    assert check(b, [b]) == ([0], [0])
    assert check(a, [a, b]) == ([0], [0])


def test_where_the_graph_begins() -> None:
    """In a frozen model, the result of a call is a leaf."""
    x, y = leaf(), leaf()
    a = x * 2
    assert check((a * y.detach()).sum(), [x, y, a]) == ([0, 2], [0])


def test_one_of_several_results() -> None:
    """Unbound heads share one node; the score depends on one of them."""
    x = leaf(3, 2)
    first, second, third = (x * 2).unbind()
    assert first.grad_fn is second.grad_fn
    assert check(second.sum(), [first, second, third]) == ([1], [1])
    assert check((second + third).sum(), [first, second, third]) == ([1, 2], [1, 2])
    assert check(second, [first, second]) == ([1], [1])
    later = second.sin()  # leads to that node, but not to its first result
    assert check((first + later).sum(), [first, later]) == ([0, 1], [0, 1])
    assert check((first + later).sum(), [second, later, first]) == ([0, 1, 2], [0, 2])


def test_a_score_without_a_graph_reaches_nothing() -> None:
    a = leaf() * 2
    reached = reached_by(torch.ones(2), records_of([a]))
    assert not [*reached]
    assert reached.deepest([]) == []


def test_calls_that_are_checkpointed() -> None:
    x = leaf()
    a = x * 2
    b = checkpoint(torch.sin, a, use_reentrant=False)
    assert check(checkpoint(torch.exp, b, use_reentrant=False).sum(), [a, b]) == ([0, 1], [0])


def test_indices_that_are_no_record_are_not_reached() -> None:
    a = leaf() * 2
    assert 5 not in reached_by(a.sum(), records_of([a]))
    assert "x" not in reached_by(a.sum(), records_of([a]))


def test_a_graph_deeper_than_the_stack() -> None:
    first = leaf() * 2
    last = first
    for _ in range(3000):
        last = last + 1
    records = records_of([last, first])
    reached = reached_by(last.sum(), records)
    assert {*reached} == {100, 97}
    assert reached.deepest(records) == [records[1]]


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "multiply": torch.mul,
    "first alone": lambda a, _: a.sin(),
    "second detached": lambda a, b: a * b.detach(),
    "both detached": lambda a, b: (a * b).detach() + torch.ones(2, requires_grad=True),
    "halves": lambda a, b: torch.cat([a[:1], b[1:]]),
    "one of two results": lambda a, b: torch.stack([a, b]).unbind()[1],
}


@given(
    st.lists(st.tuples(st.sampled_from([*OPERATIONS]), st.integers(0, 99), st.integers(0, 99)),
             min_size=1, max_size=14),
    st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_drawn_graphs(steps: list[tuple[str, int, int]], data: st.DataObject) -> None:
    made = [leaf(), leaf()]
    for name, one, other in steps:
        made.append(OPERATIONS[name](made[one % len(made)], made[other % len(made)]))
    some = data.draw(st.lists(st.sampled_from(range(len(made))), unique=True))
    score = made[data.draw(st.integers(2, len(made) - 1))]
    check(score, [made[i] for i in some])


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_the_order_of_the_records_does_not_matter(order: list[int]) -> None:
    a = leaf() * 2
    b = a.sin()
    made = [a, b, b * a]
    expected, deepest = check(made[2].sum(), [made[i] for i in order])
    assert expected == [0, 1, 2]
    assert [order[i] for i in deepest] == [0]
