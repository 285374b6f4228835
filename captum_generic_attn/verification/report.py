"""What `verify` returns: one `Check` for each question, together a `Verification`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "noted", "skipped"]
_MARKS = {"passed": "ok", "failed": "WRONG", "noted": "look", "skipped": "-"}


@dataclass(frozen=True)
class Check:
    """One check of `verify`.

    Attributes:
        name: of the check.
        status: `"passed"`; `"failed"`; `"noted"`: a person must judge what was found; `"skipped"`:
            the check does not apply.
        found: what was found, in words.
        samples: how many probes were made.
    """

    name: str
    status: Status
    found: str
    samples: int

    def __str__(self) -> str:
        return f"{_MARKS[self.status]:5}  {self.name}: {self.found}"


@dataclass(frozen=True)
class Verification:
    """The report of `verify`.

    Attributes:
        method: the name of the method.
        checks: one `Check` for each question, in order. `verification["tokens"]` finds one by its
            name.
    """

    method: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        known = ", ".join(check.name for check in self.checks)
        raise KeyError(f"no check is named {name!r}; there are: {known}")

    def __repr__(self) -> str:
        failed = sum(check.status == "failed" for check in self.checks)
        verdict = f"{failed} of {len(self.checks)} checks failed" if failed else "nothing is wrong"
        return "\n".join([f"Verification of {self.method}: {verdict}", *map(str, self.checks)])


def listed(places: Collection[str]) -> str:
    """The first three of some places, and how many more there are.

    Example:
        >>> listed(["a", "b", "c", "d"])
        'a, b, c and 1 more'
    """
    shown = list(places)[:3]
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(shown) + more
