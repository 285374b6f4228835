"""The package's maps beside the reference: equal, refused, wrong or an error."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_generic_attn import GenericAttention, UnsupportedAttentionError
from laws.random_programs import reference
from laws.random_programs.generate import Case, draw
from laws.random_programs.reference import NO_MISTAKES, Mistakes
from laws.random_programs.tape import LostTokensError, Tape

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What became of one program.

    `kind` is "equal", "refused", "wrong" or "error"; `distance` is relative to the greatest value
    of all maps. `due`: a refusal was right. `empty`: the reference is zero everywhere.
    """

    case: Case
    kind: str
    reason: str = ""
    distance: float = 0.0
    empty: bool = False

    @property
    def due(self) -> bool:
        return self.case.hazard


def expected(case: Case, mistakes: Mistakes = NO_MISTAKES) -> list[Tensor] | None:
    """The reference's maps, or `None` where there are none to give."""
    sizes = [int(torch.tensor(shape).prod()) for shape in case.program.shapes]
    try:
        values = reference.relevance(case.follow, case.target, sizes, mistakes)
    except LostTokensError:
        return None
    return [
        value.reshape(len(value), *shape)
        for value, shape in zip(values, case.program.shapes, strict=True)
    ]


def plain_form_differs(case: Case) -> float:
    """By how much the program's output differs from that of its plain form."""
    with torch.no_grad():
        plain, output = case.follow(Tape(len(case.target))), case.program(*case.inputs)
    return distance([output], [plain])


def distance(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The greatest difference, relative to the greatest value of `theirs`."""
    ours, theirs = [t.detach() for t in ours], [t.detach() for t in theirs]
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    scale = max(float(t.abs().max()) for t in theirs)
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return 0.0 if apart < 1e-13 else apart / max(scale, 1e-30)


def outcome(seed: int, mistakes: Mistakes = NO_MISTAKES) -> Outcome:
    """Draw a program, explain it, and compare with the reference, perhaps a mistaken one."""
    case = draw(seed)
    theirs = expected(case, mistakes)
    empty = theirs is not None and not any(bool(t.any()) for t in theirs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = GenericAttention(case.program).attribute(
                case.inputs, case.captum_target, return_input_shape=False
            )
    except (UnsupportedAttentionError, ValueError) as error:
        return Outcome(case, "refused", _first_line(error), empty=empty)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
        return Outcome(case, "error", f"{type(error).__name__}: {_first_line(error)}", empty=empty)
    if theirs is None:
        return Outcome(case, "wrong", "a map where there is none")
    # An input that reaches no attention gets zeros of its own shape.
    silent = [
        len(o.shape) != len(t.shape) and not bool(o.any() | t.any())
        for o, t in zip(ours, theirs, strict=True)
    ]
    apart = distance(
        [o for o, s in zip(ours, silent, strict=True) if not s],
        [t for t, s in zip(theirs, silent, strict=True) if not s],
    )
    kind = "equal" if apart < TOLERANCE else "wrong"
    return Outcome(case, kind, "" if kind == "equal" else "another map", apart, empty)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])


def reason(found: Outcome) -> str:
    """The reason of an outcome without the names of modules and numbers, to count by."""
    text = re.sub(r"program\.|[\w.]*\d[\w.]*", "…", found.reason)
    return re.sub(r"\s+", " ", text)[:150]


def table(outcomes: Iterable[Outcome]) -> str:
    """Counts of outcomes, of refusals by reason, and the seeds of what is wrong."""
    outcomes = list(outcomes)
    counts = Counter(
        (o.kind, o.kind == "refused" and ("due" if o.due else "not due")) for o in outcomes
    )
    lines = [f"{len(outcomes)} programs"]
    for (kind, due), count in sorted(counts.items(), key=str):
        lines.append(f"{count:5d} {kind}" + (f" ({due})" if due else ""))
    lines.append(f"{sum(o.empty for o in outcomes):5d} with a reference of zeros")
    lines.append(f"{len(features(outcomes)):5d} features in what is equal")
    for kind in ("refused", "wrong", "error"):
        reasons = Counter(reason(o) for o in outcomes if o.kind == kind)
        for text, count in reasons.most_common():
            seeds = [o.case.seed for o in outcomes if o.kind == kind and reason(o) == text]
            lines.append(f"{kind} {count} x {text} [{', '.join(map(str, seeds[:8]))}]")
    return "\n".join(lines)


def features(outcomes: Iterable[Outcome]) -> set[str]:
    """What the programs that are explained rightly have in them."""
    return {name for o in outcomes if o.kind == "equal" for name in o.case.features}
