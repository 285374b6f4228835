"""Token F1 against rationales: by hand, beside scikit-learn, and its laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.metrics.rationales import (
    WORD_COUNTS,
    token_f1,
    token_f1_curve,
    words_of,
)
from captum_generic_attn.metrics.statistics import estimate

SEEDS = st.integers(min_value=0, max_value=2**31)
WORDS = st.integers(min_value=1, max_value=30)
LAWS = settings(deadline=None, max_examples=30)


def text(words: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores without ties, and a rationale."""
    generator = torch.Generator().manual_seed(seed)
    rationale = torch.rand(words, generator=generator) < 0.4
    rationale[0] = True
    return torch.randperm(words, generator=generator).double() - 3, rationale


# --- words ------------------------------------------------------------------------------------


def test_words_take_their_highest_token() -> None:
    scores = torch.tensor([9.0, -3, -1, 5, 2, 4, 9])
    words = [None, 0, 0, 1, 2, 2, None]
    assert words_of(scores, words).tolist() == [-1, 5, 4]


@given(words=WORDS, seed=SEEDS)
@LAWS
def test_words_agree_with_a_loop(words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 4, (words,), generator=generator).tolist()
    owners = [None, *(word for word in range(words) for _ in range(tokens[word])), None]
    scores = torch.randn(len(owners), generator=generator)
    expected = [
        max(score for score, owner in zip(scores.tolist(), owners, strict=True) if owner == word)
        for word in range(words)
    ]
    assert words_of(scores, owners).tolist() == expected


def test_special_tokens_may_hold_anything() -> None:
    assert words_of(torch.tensor([math.nan, 1.0, math.inf]), [None, 0, None]).tolist() == [1]


# --- token F1 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, 2 * 1 / (1 + 2)), (2, 2 * 1 / (2 + 2)), (3, 2 * 2 / (3 + 2)), (4, 2 * 2 / (4 + 2))],
)
def test_f1_by_hand(k: int, expected: float) -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8])
    rationale = torch.tensor([False, True, True, False])
    assert token_f1(scores, rationale, k) == pytest.approx(expected)


def test_of_equal_scores_the_first_goes_first() -> None:
    rationale = torch.tensor([True, True, False, False])
    assert token_f1(torch.zeros(4), rationale, 2) == 1
    assert token_f1(torch.zeros(4), rationale.flip(0), 2) == 0


def test_fewer_words_than_k_are_all_taken() -> None:
    scores, rationale = text(6, seed=1)
    every = 2 * int(rationale.sum()) / (6 + int(rationale.sum()))
    assert token_f1(scores, rationale, 6) == pytest.approx(every)
    assert token_f1(scores, rationale, 80) == token_f1(scores, rationale, 6)


@given(words=WORDS, k=st.integers(1, 40), seed=SEEDS)
@LAWS
def test_f1_agrees_with_scikit_learn(words: int, k: int, seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, rationale = text(words, seed)
    taken = torch.zeros(words, dtype=torch.bool)
    taken[scores.topk(min(k, words)).indices] = True
    assert token_f1(scores, rationale, k) == pytest.approx(
        metrics.f1_score(rationale.numpy(), taken.numpy(), zero_division=0)
    )


@given(words=WORDS, seed=SEEDS)
@LAWS
def test_f1_ranges_from_inverted_to_perfect(words: int, seed: int) -> None:
    scores, rationale = text(words, seed)
    marked = int(rationale.sum())
    assert token_f1(rationale.double(), rationale, marked) == 1
    for k in range(1, words + 1):
        least = token_f1(-rationale.double(), rationale, k)
        most = token_f1(rationale.double(), rationale, k)
        assert least <= token_f1(scores, rationale, k) <= most
    if 2 * marked <= words:
        assert token_f1(-rationale.double(), rationale, marked) == 0


def test_random_scores_hit_the_share_that_is_marked() -> None:
    generator = torch.Generator().manual_seed(11)
    rationale = torch.arange(50) < 10
    values = [token_f1(torch.rand(50, generator=generator), rationale, 10) for _ in range(2000)]
    # Ten of fifty drawn: two hits expected, F1 = 2 · 2 / 20; the mean of 2000 scatters by 0.0026.
    assert sum(values) / 2000 == pytest.approx(0.2, abs=0.01)


def test_curve_holds_each_text_and_each_k() -> None:
    texts = [text(words, seed=words) for words in (4, 30, 100)]
    curve = token_f1_curve([scores for scores, _ in texts], [marked for _, marked in texts])
    assert WORD_COUNTS == (5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80)
    assert curve.shape == (16, 3)
    assert curve.dtype == torch.float64
    for row, k in zip(curve, WORD_COUNTS, strict=True):
        assert row.tolist() == [token_f1(scores, marked, k) for scores, marked in texts]


def test_interval_depends_on_the_seed_and_the_figure_does_not() -> None:
    texts = [text(20, seed=seed) for seed in range(15)]
    row = token_f1_curve([scores for scores, _ in texts], [marked for _, marked in texts], [5])[0]
    one, same, other = (estimate(row, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.value == other.value == pytest.approx(row.mean().item())
    assert (one.low, one.high) != (other.low, other.high)


# --- errors -----------------------------------------------------------------------------------

SCORES = torch.tensor([1.0, 2.0])
MARKED = torch.tensor([True, False])
NONE = torch.tensor([False, False])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: words_of(SCORES, [0]), ValueError, r"scores \(2,\) must be \[1\]"),
        (lambda: words_of(SCORES, [None, None]), ValueError, "words has no word"),
        (lambda: words_of(SCORES, [0, -1]), ValueError, "words has -1: word indices begin at 0"),
        (lambda: words_of(SCORES, [3, 1]), ValueError, r"the words \[0, 2\] of 4 have no token"),
        (lambda: words_of(SCORES / 0, [0, 1]), ValueError, "scores: 2 of 2 are NaN or infinite"),
        (lambda: token_f1(SCORES, MARKED, 0), ValueError, r"k=\[0\]: it must be at least 1"),
        (lambda: token_f1(SCORES, MARKED[:1], 1), ValueError, r"rationale \(1,\) and its scores"),
        (lambda: token_f1(SCORES, MARKED.long(), 1), TypeError, "must be bool, not torch.int64"),
        (lambda: token_f1(SCORES, NONE, 1), ValueError, "rationale marks no word"),
        (lambda: token_f1(SCORES * math.nan, MARKED, 1), ValueError, "the scores of rationale: 2"),
        (lambda: token_f1_curve([SCORES], []), ValueError, "scores of 1 texts and 0 rationales"),
        (lambda: token_f1_curve([], []), ValueError, "scores of 0 texts and 0 rationales"),
        (
            lambda: token_f1_curve([SCORES], [MARKED], []),
            ValueError,
            r"k=\[\]: it must be at least 1",
        ),
        (
            lambda: token_f1_curve([SCORES, SCORES], [MARKED, NONE]),
            ValueError,
            "rationale 1 marks no word",
        ),
    ],
)
def test_errors_say_what_was_seen(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
