"""Conservation: of the frozen recipe exactly, without biases; of the other rules as far as it goes.

`docs/conservation.py` writes the figures of `sums` for all rule sets into `docs/baselines.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
import conservation

from captum_generic_attn.lrp import RULE_SETS


@pytest.mark.parametrize("name", conservation.MODELS)
def test_the_frozen_recipe_conserves_without_biases(name) -> None:
    if name != "ViT":
        pytest.importorskip("transformers")
    score, total = conservation.sums(name, "frozen", biases=False)
    assert score.abs().min() > 1e-2, "a score of nothing proves nothing"
    assert (total - score).abs().max() <= 1e-9 * score.abs().max()


@pytest.mark.parametrize("name", conservation.MODELS)
@pytest.mark.parametrize("rules", ["epsilon", "gamma"])
def test_signed_rules_share_out_the_score_without_biases(name, rules) -> None:
    """Up to ε; of a negative score relevance is negative on the whole."""
    if name != "ViT":
        pytest.importorskip("transformers")
    score, total = conservation.sums(name, rules, biases=False)
    assert torch.equal(total.sign(), score.sign())
    assert ((total - score) / score).abs().max() <= 1e-3


@pytest.mark.parametrize("name", conservation.MODELS)
def test_with_biases_something_is_lost(name) -> None:
    if name != "ViT":
        pytest.importorskip("transformers")
    score, total = conservation.sums(name, "frozen", biases=True)
    assert (total - score).abs().min() > 1e-6


@pytest.mark.parametrize("rules", sorted(RULE_SETS))
def test_relevance_is_finite_and_not_nothing(rules) -> None:
    _, total = conservation.sums("ViT", rules, biases=True)
    assert torch.isfinite(total).all()
    assert (total != 0).all()


def test_captums_lrp_refuses_and_leaves_something_behind() -> None:
    """What `docs/baselines.md` says of it."""
    found = conservation.captums_lrp()
    assert "has no" in found.refusal or "not" in found.refusal
    assert found.left_behind > 0
