"""The law of tokens: what can change a position stands among its tokens, or they are lost.

`law` runs a program and compares tracked tokens with Jacobians; `law_operations` holds what
programs are drawn from. Here: every operation in every context once, and programs of several.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.capture.tracking.probe import halves
from laws.law import CONTEXTS, B, D, N, Verdict, World, check, inputs, run_steps, tokens_of
from laws.law_operations import CALLS, LEARNED, MIXES, MOVES, OPERATIONS, ROWS, STATISTICS, WRITES

_STEP = st.tuples(
    st.sampled_from(sorted(CONTEXTS)),
    st.sampled_from([*OPERATIONS, *[f"calls: {name}" for name in CALLS for _ in range(3)]]),
    st.integers(0, 5),
    st.integers(0, 5),
)
_PROGRAMS = st.lists(_STEP, min_size=1, max_size=5)


def obeys(steps: list[tuple[str, str, int, int]], *, raw: bool = False) -> Verdict:
    verdict = check(run_steps(steps, OPERATIONS, raw=raw), module=LEARNED)
    assert not verdict.breaches, (steps, verdict.breaches)
    return verdict


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(steps=_PROGRAMS, raw=st.booleans())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_programs_obey_the_law(steps: list[tuple[str, str, int, int]], raw: bool) -> None:
    obeys(steps, raw=raw)


FOUND: dict[str, list[tuple[str, str, int, int]]] = {
    "outer sum with a lost operand": [
        ("alone", "writes: experts", 0, 3), ("alone", "mixes: outer read", 2, 1)],
    "outer sum of tokens and a lost mixture": [
        ("alone", "moves: complex", 0, 1), ("alone", "mixes: both ways", 0, 0),
        ("alone", "mixes: outer", 0, 3)],
    "outer sum of raw tokens and what was lost": [
        ("alone", "writes: set broadcast", 1, 1), ("alone", "writes: experts", 0, 3),
        ("joined", "rows: ndtr", 0, 4), ("alone", "mixes: outer read", 4, 3)],
    "outer sum through a weight": [
        ("alone", "rows: product of both", 1, 3), ("half", "writes: add to part", 4, 1),
        ("alone", "mixes: outer through a weight", 2, 3)],
    "outer sum, one lost over examples": [
        ("stacked", "writes: index add to examples", 0, 1),
        ("alone", "mixes: outer diagonal", 2, 1)],
    "a lost feature beside tokens, added": [
        ("alone", "writes: out", 4, 3), ("alone", "writes: put", 2, 0),
        ("added", "moves: features of both", 1, 3)],
    "a lost statistic behind a stack": [
        ("stacked", "writes: resize", 1, 4), ("projected", "writes: copy one", 4, 2)],
    "tokens written into pairs": [
        ("alone", "rows: einsum of both", 2, 4), ("joined", "writes: view", 2, 0)],
    "the other lives on as this one": [
        ("added", "statistics: two tokens added", 0, 1), ("added", "rows: gelu", 2, 0)],
    "lost numbers, equal by chance": [
        ("less", "rows: repeated", 0, 0), ("added", "mixes: distance", 2, 1)],
}  # fmt: skip
"""Programs that once broke the law."""


@pytest.mark.parametrize("raw", [False, True], ids=["tokens", "raw"])
@pytest.mark.parametrize("name", FOUND)
def test_programs_that_once_broke_the_law(name: str, raw: bool) -> None:
    obeys(FOUND[name], raw=raw)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 31, 64])
def test_of_two_positions_each_is_probed_without_the_other(count: int) -> None:
    sets = torch.stack(halves(count))
    apart = (sets[:, :, None] & ~sets[:, None, :]).any(0)
    assert torch.equal(apart, ~torch.eye(count, dtype=torch.bool))
    assert bool(sets.any(0).all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@given(steps=_PROGRAMS, raw=st.booleans())
@settings(deadline=None, max_examples=2500)
def test_many_programs_obey_the_law(steps: list[tuple[str, str, int, int]], raw: bool) -> None:
    obeys(steps, raw=raw)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_obeys_the_law(name: str) -> None:
    """Alone, in a residual connection, and in one of the other contexts."""
    contexts = sorted(CONTEXTS)
    obeys([("alone", name, 0, 1)])
    obeys([("added", name, 0, 1)])
    obeys([(contexts[list(OPERATIONS).index(name) % len(contexts)], name, 0, 0)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("raw", [False, True], ids=["tokens", "raw"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_in_every_context(name: str, raw: bool) -> None:
    for context in CONTEXTS:
        for other in (0, 1):
            obeys([(context, name, 0, other)], raw=raw)


# --- the check itself sees what it is for, and the capture does not lose what it need not

FOLLOWED = [
    *(f"rows: {name}" for name in ROWS if name not in (
        "of users, flipping", "in numpy, rolling", "of users, of two", "of users, other example",
        "of users, in place", "scripted, flipping", "cosine", "einsum of both",
        "distance of rows",
    )),
    *(f"statistics: {name}" for name in STATISTICS if name not in (
        "mean of other example", "scaled by all",
    )),
    *(f"moves: {name}" for name in (
        "roll", "flip", "index", "index select", "gather", "take along", "shift", "reflect",
        "halves", "list", "features", "turned", "choice", "window", "im2col",
        "embedding in tokens", "one token",
    )),
    *(f"writes: {name}" for name in (
        "set", "set over", "set rows", "add to part", "view from before", "loop",
        "scan", "index copy", "index put", "masked scatter", "scatter", "scatter add", "index add",
        "accumulate", "experts", "slice scatter", "relu in place", "masked fill", "index fill",
    )),
    *(f"mixes: {name}" for name in (
        "merge", "merge pairs", "mean", "largest", "windows", "linear over all",
        "einsum of three, by row",
    )),
]  # fmt: skip
"""Operations that must not lose tokens, in a residual connection."""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_keeps_or_merges_tokens_is_followed(name: str) -> None:
    verdict = obeys([("added", name, 0, 0), ("projected", "rows: gelu", 2, 2)])
    assert verdict.tracked, verdict.lost


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [f"mixes: {name}" for name in MIXES])
def test_what_is_lost_is_lost_by_name(name: str) -> None:
    verdict = check(run_steps([("alone", name, 0, 0), ("added", "rows: gelu", 2, 0)], OPERATIONS))
    assert verdict.tracked or verdict.refused or verdict.lost


def other_run(seen: object, done: object):
    """A program that does one thing under the capture, and another in truth."""
    return lambda w, x, y: (seen if w.captured else done)(w, tokens_of(w, x), tokens_of(w, y))


BREACHES = {
    "a token of another position": other_run(lambda w, x, y: x, lambda w, x, y: x.flip(1)),
    "one feature of another token": other_run(
        lambda w, x, y: x,
        lambda w, x, y: torch.cat([x[..., :-1], x.roll(1, 1)[..., -1:]], -1),
    ),
    "another input": other_run(lambda w, x, y: x, lambda w, x, y: x + y),
    "another example, as a statistic": other_run(
        lambda w, x, y: x, lambda w, x, y: x + w.hold(x.flip(0).mean(1, keepdim=True))
    ),
    "data taken for a constant": other_run(
        lambda w, x, y: torch.ones(B, N, D), lambda w, x, y: x
    ),
    "a call that is forgotten": other_run(
        lambda w, x, y: (w.attend("fused", x, x, x), x)[1],
        lambda w, x, y: w.attend("fused", x, x, x),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_of_the_law_is_seen(name: str) -> None:
    assert check(BREACHES[name]).breaches


def test_what_the_approximations_allow_is_no_breach() -> None:
    """A statistic of the same example and a token that was merged of both."""
    assert not check(
        other_run(lambda w, x, y: x, lambda w, x, y: x + w.hold(x.mean(1, keepdim=True)))
    ).breaches
    assert not check(
        other_run(lambda w, x, y: x + x.flip(1), lambda w, x, y: x + x.flip(1))
    ).breaches


def test_programs_of_every_kind_are_drawn() -> None:
    """The operations are many, and the names of the tables are distinct."""
    assert len(OPERATIONS) == sum(map(len, (MOVES, WRITES, MIXES, ROWS, STATISTICS, CALLS))) > 200


def test_numbers_that_are_equal_by_chance_are_no_statistic() -> None:
    """A matrix over tokens makes equal rows of equal rows; they are lost all the same."""
    same = [torch.ones(2, 3, 4, dtype=torch.float64), *inputs()[1:]]

    def program(w: World, x: Tensor, y: Tensor) -> Tensor:
        mean = torch.full((3, 3), 1 / 3, dtype=torch.float64)
        return tokens_of(w, y) + mean @ tokens_of(w, x)

    assert check(program, same).lost == "matmul"
