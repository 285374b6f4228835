"""Random transformer programs: the package gives the reference's maps, or refuses.

What a program may have in it, and how its reference is made, is in `random_programs`. The reference
is tested here too, against the authors' rules on programs that are simple enough for them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from zoo import oracles

from laws.random_programs import reference
from laws.random_programs.compare import (
    Outcome,
    distance,
    expected,
    features,
    outcome,
    plain_form_differs,
    table,
)
from laws.random_programs.generate import Case, Encoder, Program, Queries, draw
from laws.random_programs.reference import Mistakes
from laws.random_programs.steps import Block, Mixing
from laws.random_programs.tape import LostTokensError, Tape

SAMPLE, ALL = range(60), range(600)


def assert_sound(outcomes: Sequence[Outcome], least_features: int) -> None:
    """Equal or refused, and enough of it equal to mean something."""
    report = table(outcomes)
    sys.stdout.write(report)
    bad = [o for o in outcomes if o.kind in {"wrong", "error"}]
    assert not bad, report
    assert len(features(outcomes)) >= least_features, report
    due = sum(o.due for o in outcomes)
    assert sum(o.kind == "equal" for o in outcomes) > 0.6 * (len(outcomes) - due), report


def test_a_sample_of_programs() -> None:
    assert_sound([outcome(seed) for seed in SAMPLE], 100)


@pytest.mark.slow
@pytest.mark.ci_sample
def test_all_programs() -> None:
    assert_sound([outcome(seed) for seed in ALL], 160)


# -- the generator ----------------------------------------------------------------------------


def test_a_seed_is_one_program() -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        one = draw(seed)
        torch.manual_seed(99)
        other = draw(seed)
        assert one.features == other.features
        assert one.target == other.target
        for a, b in zip(one.inputs, other.inputs, strict=True):
            assert torch.equal(a, b)
        assert distance(one.program.parameters(), other.program.parameters()) == 0.0


def test_drawing_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    draw(3)
    assert torch.equal(torch.rand(3), first)


def test_a_program_is_the_function_that_its_plain_form_is() -> None:
    for seed in range(200):
        case = draw(seed)
        try:
            apart = plain_form_differs(case)
        except LostTokensError:
            continue
        assert apart < 1e-9, (seed, sorted(case.features))


def test_few_references_are_empty() -> None:
    found = [expected(draw(seed)) for seed in range(100)]
    known = [maps for maps in found if maps is not None]
    assert len(known) > 80
    assert sum(not any(bool(m.any()) for m in maps) for maps in known) < 8


# -- the reference ----------------------------------------------------------------------------


def maps_of(case: Case) -> tuple[Tape, list[Tensor]]:
    """The calls of a program and the map of each, by the oracle of the other tests."""
    tape = Tape(len(case.target))
    total = reference.score(case.follow(tape), case.target)
    gradients = torch.autograd.grad(total, [call.P for call in tape.calls], allow_unused=True)
    return tape, [
        oracles.attention_map(call.P.detach(), gradient)
        for call, gradient in zip(tape.calls, gradients, strict=True)
    ]


def cases(kind: type[Program], fits: Callable[[Case], bool], count: int) -> Iterator[Case]:
    """The first programs of a kind that fit."""
    found = (case for seed in range(3000) if fits(case := draw(seed, kind)))
    return itertools.islice(found, count)


def is_chain(case: Case) -> bool:
    """Whether it is what the authors' ViT is: blocks with one attention, read at one token."""
    program = case.program
    return (
        program.read.kind in {"first", "last", "mean"}
        and len(program.shapes) == 1
        and all(type(s) is Block and is_plain(s) for s in program.stack.steps)
    )


def is_plain(block: Block) -> bool:
    return (
        len(block.branches) == 1
        and block.order != "no residual"
        and "layout: branches" not in block.names
    )


def test_reference_of_a_chain_is_the_authors_rule() -> None:
    for case in cases(Encoder, is_chain, 8):
        program = case.program
        _, maps = maps_of(case)
        rows = {"first": 0, "last": -1, "mean": range(program.embed.size)}[program.read.kind]
        if rows == -1:
            rows = program.embed.size - 1
        theirs = oracles.read_row(oracles.propagate(maps), rows)
        ours = expected(case)
        assert ours is not None
        assert distance([ours[0].flatten(1)], [theirs]) < 1e-12


def is_detr(case: Case) -> bool:
    """Whether it is a small DETR: an encoder layer, queries among themselves, then across."""
    program = case.program
    return (
        program.with_own
        and len(program.own) == 1
        and program.read.kind in {"first", "last", "mean"}
        and len(program.shapes) == 1
        and all(type(s) is Block and is_plain(s) for s in program.stack.steps)
        and all(is_plain(block) for block in [*program.own, *program.cross])
    )


def test_reference_of_a_small_detr_is_equations_6_to_10() -> None:
    for case in cases(Queries, is_detr, 2):
        _, (of_x, of_z, across) = maps_of(case)
        for example, ours in enumerate(expected(case)[0].flatten(1)):
            x, z = (normalized(m[example]) for m in (of_x, of_z))
            rows = z.T @ across[example] @ x
            theirs = {"first": rows[0], "last": rows[-1], "mean": rows.mean(0)}[
                case.program.read.kind
            ]
            assert distance([ours], [theirs]) < 1e-12


def normalized(learnt: Tensor) -> Tensor:
    """Eq. 8 and 9 of a stream that one call has added to."""
    sums = learnt.sum(1, keepdim=True)
    return torch.eye(len(learnt), dtype=learnt.dtype) + learnt / sums.where(sums > 0, 1.0)


def test_there_is_no_reference_behind_what_mixes_positions() -> None:
    seen = set()
    for case in cases(Encoder, lambda case: case.program.stack.hazard, 30):
        steps = list(case.program.stack.steps)
        mixing = [n for n, step in enumerate(steps) if isinstance(step, Mixing)]
        if not mixing:
            continue
        last = "pooling" not in case.program.read.kind and mixing[0] == len(steps) - 1
        assert (expected(case) is not None) == last, sorted(case.features)
        seen.add(last)
    assert seen == {True, False}


MISTAKES = {
    "transposed maps": (Mistakes(transposed=True), 0.75),
    "heads added": (Mistakes(heads_added=True), 0.6),
    "only the last call": (Mistakes(last_call_only=True), 0.4),
    "no equations 8 and 9": (Mistakes(unnormalized=True), 0.15),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistaken_reference_is_told_apart(name: str) -> None:
    mistakes, least = MISTAKES[name]
    told, known = 0, 0
    for seed in range(80):
        case = draw(seed)
        right, wrong = expected(case), expected(case, mistakes)
        if right is None or not any(bool(m.any()) for m in right):
            continue
        known += 1
        told += distance(wrong, right) > 1e-6
    assert told >= least * known


def test_a_mistake_makes_the_comparison_fail() -> None:
    equal = [seed for seed in SAMPLE if outcome(seed).kind == "equal"]
    found = [outcome(seed, Mistakes(transposed=True, heads_added=True)).kind for seed in equal]
    assert set(found) <= {"equal", "wrong"}
    assert found.count("wrong") > 0.7 * len(equal)
