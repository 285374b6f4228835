"""Bootstrap intervals: against what theory says, and what is refused."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from captum_generic_attn.extras import needed
from captum_generic_attn.metrics import Estimate, estimate, ratio


def test_a_means_interval_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate(values)
    error = values.std() / 400**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert found.count == 400
    narrow = estimate(values, confidence=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * error, rel=0.15)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    dice = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        found = estimate(dice.exponential(1, 100), confidence=0.8, resamples=300, seed=seed)
        held += found.low <= 1 <= found.high
    assert 0.7 < held / 200 < 0.88


def test_groups_are_drawn_whole() -> None:
    """Ten copies of each value tell no more than one of each."""
    values = np.random.default_rng(2).normal(0, 1, 50)
    alone = estimate(values)
    copies = estimate(np.repeat(values, 10), groups=np.repeat(np.arange(50), 10))
    assert copies.count == 50
    assert copies.value == pytest.approx(alone.value)
    assert (copies.low, copies.high) == pytest.approx((alone.low, alone.high))
    blind = estimate(np.repeat(values, 10))
    assert blind.high - blind.low < 0.5 * (alone.high - alone.low)


def test_groups_weigh_by_their_size() -> None:
    found = estimate([1, 0, 0, 0], groups=["a", "b", "b", "b"])
    assert (found.value, found.count) == (0.25, 2)
    assert (found.low, found.high) == (0, 1)


def test_ratios_draw_both_arrays_together() -> None:
    found = estimate([1, 2, 3], [2, 4, 6], statistic=ratio)
    assert found == Estimate(0.5, 0.5, 0.5, 3)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = torch.rand(60)
    assert estimate(values, seed=3) == estimate(values, seed=3)
    assert estimate(values, seed=3) != estimate(values, seed=4)
    assert estimate(values, seed=3).value == estimate(values, seed=4).value


def test_a_single_example_has_no_spread() -> None:
    assert estimate([0.3]) == Estimate(0.3, 0.3, 0.3, 1)


def test_what_cannot_be_estimated_is_told() -> None:
    with pytest.raises(ValueError, match="no value to estimate from"):
        estimate([])
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        estimate([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"shapes \[\(2,\), \(3,\)\]"):
        estimate([1, 2], [1, 2, 3], statistic=ratio)
    with pytest.raises(ValueError, match="mean of a single array"):
        estimate([1, 2], [1, 2], statistic=ratio, groups=[0, 1])
    with pytest.raises(ValueError, match="2 values need as many groups"):
        estimate([1, 2], groups=[1])


def test_options_out_of_range_are_told() -> None:
    for confidence in (95, 0, 1, -0.5):
        with pytest.raises(ValueError, match=f"confidence={confidence}: .* such as 0.95"):
            estimate([1, 2, 3], confidence=confidence)
    with pytest.raises(ValueError, match="resamples=0"):
        estimate([1, 2], resamples=0)


def test_an_undefined_statistic_has_no_interval() -> None:
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match="undefined for some bootstrap"),
    ):
        estimate([1, 2], [0, 1], statistic=ratio)


def test_the_margin_is_half_of_the_interval() -> None:
    assert Estimate(0.5, 0.2, 0.6, 9).margin == pytest.approx(0.2)


def test_a_missing_library_is_named_with_its_extra(monkeypatch) -> None:
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"skimage is needed .*captum-generic-attn\[metrics\]"):
        needed("skimage.filters")
