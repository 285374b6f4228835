"""Every method on a slice of the zoo: it runs, or is refused by name.

`make methods` runs all of the slice and writes `docs/methods.md`; a fixed share runs with `make
test`.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("open_clip")

from zoo.methods import ALL_ZERO, METHODS, examine, slice_of_the_zoo, write_down
from zoo.models import Entry

SLICE = slice_of_the_zoo()
EVERY_TEST, EVERY_CI = 8, 2
WITHOUT_PROPAGATION = 5
"""The first methods need no LRP: they run wherever ours does."""


def _marks(place: int) -> tuple[object, ...]:
    if place % EVERY_TEST == 0:
        return ()
    return (
        (pytest.mark.slow, pytest.mark.ci_sample) if place % EVERY_CI == 0 else (pytest.mark.slow,)
    )


@pytest.mark.parametrize(
    "entry", [pytest.param(e, marks=_marks(i), id=e.label) for i, e in enumerate(SLICE)]
)
def test_every_method_runs_or_says_why_not(entry: Entry) -> None:
    found = examine(entry)
    write_down(found)
    assert not found.left_behind
    assert list(found.outcomes) == list(METHODS)
    if found.outcomes["AttentionGradCam"] == ALL_ZERO:
        del found.outcomes["AttentionGradCam"]
    for name in list(METHODS)[:WITHOUT_PROPAGATION]:
        assert not found.outcomes.get(name), name
    for name, refusal in found.outcomes.items():
        if refusal:
            assert re.match(r"\w+ has no relevance rule: ", refusal), f"{name}: {refusal}"


def test_the_slice_is_broad() -> None:
    assert len(SLICE) >= 25
    assert len({entry.label for entry in SLICE}) == len(SLICE)
    assert {entry.library for entry in SLICE} == {
        "timm", "torchvision", "torch", "open_clip", "transformers",
    }  # fmt: skip
