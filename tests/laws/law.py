"""The law of tokens, checked of programs: what may change a position stands among its tokens.

A program is run three times: under the capture; with *statistics and gates* held constant, which is
the approximation that the docs list; and as it is. The Jacobians of the last two (float64, element
by element) are compared with the tokens that the first one tracked. Results of attention calls are
sources of their own, whose tokens are those of their queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_generic_attn.capture.mode import CaptureMode
from captum_generic_attn.capture.recorder import Recorder
from captum_generic_attn.capture.scope import Scope
from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Role
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.tokens.spaces import TokenSpaces

B, N, D = 2, 3, 4
NOISE = 1e-10
"""Derivatives below this are rounding: those of a Fourier transform and back."""


class World:
    """What a program is run in: weights, attention, and terms that are perhaps held constant."""

    def __init__(self, run: Literal["captured", "held", "plain"]) -> None:
        self.run = run
        self.calls: list[Tensor] = []
        self.holds = False  # whether anything was
        self._generator = torch.Generator().manual_seed(5)

    @property
    def captured(self) -> bool:
        return self.run == "captured"

    def hold(self, term: Tensor) -> Tensor:
        """A statistic or a gate: no more than a number in the Jacobian."""
        self.holds |= self.run == "held" and term.requires_grad
        return term.detach() if self.run == "held" else term

    def terms(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Two terms; one that is constant along the tokens, axis 1, is a statistic of the other."""
        if self.run == "held" and one.shape == other.shape and one.shape[1] > 1:
            constant = [
                bool((t.detach() - t.detach()[:, :1]).abs().max() < NOISE) for t in (one, other)
            ]
            if constant == [True, False]:
                return self.hold(one), other
            if constant[1]:
                return one, self.hold(other)
        return one, other

    def weight(self, *shape: int) -> Tensor:
        """A constant, the same in all runs."""
        return torch.rand(shape, generator=self._generator, dtype=torch.float64) + 0.5

    def tokens(self, x: Tensor) -> Tensor:
        """A constant that mixes tokens."""
        return self.weight(x.shape[1], x.shape[1])

    def features(self, x: Tensor) -> Tensor:
        """A constant that mixes features."""
        return self.weight(x.shape[-1], x.shape[-1])

    def attend(self, kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """An attention call, where the graph is cut."""
        if kind == "fused":
            out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:
            out = (q @ k.mT).softmax(-1) @ v
        if not self.captured:
            out = out.detach().requires_grad_()
        self.calls.append(out)
        return out


class Noted(TokenSpaces):
    """Token spaces that remember all elements of inputs that each token was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[int, set[int]] = {}

    def created_of_rows(self, parents: Tensor) -> Tensor | None:
        token_ids = super().created_of_rows(parents)
        if token_ids is not None:
            rows = parents.reshape(token_ids.numel(), -1).tolist()
            for token, made_of in zip(token_ids.reshape(-1).tolist(), rows, strict=True):
                found = (i for i in made_of if i >= 0)
                self.elements.setdefault(token, set()).update(found)
        return token_ids

    def sources(self, token: int) -> frozenset[object]:
        """A token with all that it was made of, and what lives on as any of these."""
        found, waiting = set[int](), [token]
        while waiting:
            one = waiting.pop()
            if one < 0 or one in found:
                continue
            found.add(one)
            waiting += self.elements.get(one, ())
            index, example, local = (int(n) for n in self.locate(torch.tensor([one])))
            parents = self[index].parents
            if parents is not None:
                waiting += parents[min(max(example, 0), len(parents) - 1), local].tolist()
            for (absorbed, kept), table in self._identified.items():
                if kept != index:
                    continue
                home = self[absorbed]
                for owner, row in enumerate(table.tolist()):
                    if home.examples and example not in (owner, -1):
                        continue
                    places = [i for i, place in enumerate(row) if place == local]
                    waiting += [home.base + owner * home.size + i for i in places]
        return frozenset(self.element(one) for one in found)

    def element(self, token: int) -> object:
        """What is compared: elements of inputs that were summed lie at one place."""
        index, example, local = (int(n) for n in self.locate(torch.tensor([token])))
        space = self[index]
        if index >= 0 and space.kind == "element" and space.shape is not None:
            return self.origin(space.name), example, local
        return token

    def example(self, token: int) -> int:
        return int(self.locate(torch.tensor([token]))[1])


Program = Callable[..., Tensor]


@dataclass
class Verdict:
    """What a check found: breaches of the law in words, and whether anything was tracked."""

    breaches: list[str] = field(default_factory=list)
    refused: bool = False
    tracked: bool = False
    lost: str = ""


def inputs() -> list[Tensor]:
    """Two inputs of features, positive, all numbers different."""
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(B, N, D, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2)]


def check(
    program: Program, raw: Sequence[Tensor] | None = None, module: nn.Module | None = None
) -> Verdict:
    """Run a program `(world, *inputs)` and compare its tokens with its Jacobians."""
    raw = inputs() if raw is None else raw
    spaces = Noted()
    scope = Scope({"": module or nn.Module()})
    tracker = TokenTracker(spaces, scope.parameters)
    recorder = Recorder(tracker, scope, B)
    arguments = []
    for i, value in enumerate(raw):
        leaf = value.clone().requires_grad_().clone()
        token_ids = spaces.of_input(f"input{i}", leaf.shape)
        tracker.abstract_values[leaf] = AbstractValue(Role.RAW, (token_ids,), data=True)
        arguments.append(leaf)
    token_ids = [tracker.of(a).token_ids[0] for a in arguments]
    world = World("captured")
    with CaptureMode(tracker, recorder, scope):
        out = program(world, *arguments)
    abstract = tracker.of(out)
    verdict = Verdict(lost=abstract.lost_at or "pairs of tokens" * abstract.pairs)
    if recorder.refusals:  # an error names it
        verdict.refused = True
        return verdict
    calls: list[AbstractValue] = [tracker.of(call) for call in world.calls]
    told = [*token_ids, *(c.token_ids[0] if len(c.token_ids) == 1 else None for c in calls)]
    tokens = abstract.token_ids if abstract.role in (Role.RAW, Role.TOKENS) else ()
    verdict.tracked = bool(tokens)
    for run in ("held", "plain"):
        again = World(run)  # type: ignore[arg-type]
        leaves = [value.clone().requires_grad_() for value in raw]
        value = program(again, *(leaf.clone() for leaf in leaves))
        sources = [*leaves, *again.calls]
        reach = jacobians(value, sources)
        if run == "plain" or not again.holds:
            check_ancestors(verdict, abstract, calls, reach[len(raw) :], recorder)
        if not tokens or not value.requires_grad:
            if not abstract.data and any(bool(r.any()) for r in reach):
                verdict.breaches.append(f"depends on data, and {abstract} says that it does not")
        else:
            check_tokens(verdict, spaces, tokens[0], told, reach, whole=run == "held")
        if not again.holds:
            break
    return verdict


def jacobians(value: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    """`[elements of the value, elements of the source]`: whether the one changes with the other."""
    value = torch.view_as_real(value) if value.is_complex() else value.unsqueeze(-1)
    rows = [torch.zeros(value[..., 0].numel(), s.numel(), dtype=torch.bool) for s in sources]
    if not value.requires_grad:
        return rows
    for i, element in enumerate(value.reshape(-1)):
        found = torch.autograd.grad(element, sources, retain_graph=True, allow_unused=True)
        for row, gradient in zip(rows, found, strict=True):
            if gradient is not None:
                changed = (gradient.abs() > NOISE) & ~gradient.isnan()
                row[i // value.shape[-1]] |= changed.reshape(-1)
    return rows


def check_ancestors(
    verdict: Verdict, abstract: AbstractValue, calls: Sequence[AbstractValue],
    reach: Sequence[Tensor], recorder: Recorder,
) -> None:  # fmt: skip
    recorded = {record.index for record in recorder.records}
    for call, changed in zip(calls, reach, strict=True):
        missing = (call.ancestors & recorded) - abstract.ancestors
        if bool(changed.any()) and missing:
            verdict.breaches.append(f"depends on the calls {sorted(missing)}, which are forgotten")


def check_tokens(
    verdict: Verdict, spaces: Noted, token_ids: Tensor, told: Sequence[Tensor | None],
    reach: Sequence[Tensor], *, whole: bool,
) -> None:  # fmt: skip
    """See that what changes an element is among its tokens; else only that examples stay apart."""
    ids = token_ids.reshape(-1).tolist()
    known = {i: spaces.sources(i) for i in set(ids)}
    for number, (theirs, changed) in enumerate(zip(told, reach, strict=True)):
        names = None if theirs is None else theirs.reshape(-1).tolist()
        for e, s in changed.nonzero().tolist():
            mine = ids[e]
            space = spaces[int(spaces.locate(torch.tensor([mine]))[0])]
            if mine >= 0 and space.kind == "unknown":
                continue
            if names is not None:
                if names[s] < 0 or spaces.element(names[s]) in known[mine]:
                    continue
                if not whole and mine >= 0 and spaces.example(mine) == spaces.example(names[s]):
                    continue
            verdict.breaches.append(
                f"source {number} element {s} changes element {e} "
                f"({'held' if whole else 'plain'}), whose token {mine} ({space.name}, "
                f"{space.kind}) does not list {None if names is None else names[s]}"
            )
            return


def tokens_of(world: World, x: Tensor, seed: int = 0) -> Tensor:
    """Features become tokens."""
    return F.linear(x, world.features(x) + seed)


def run_steps(
    steps: Sequence[tuple[str, str, int, int]], ops: dict[str, Any], *, raw: bool = False
) -> Program:
    """A program of steps: context, operation, and which of the tensors so far it is of.

    With `raw`, the steps come before features become tokens.
    """

    def program(world: World, one: Tensor, two: Tensor) -> Tensor:
        found = [one, two] if raw else [tokens_of(world, one), tokens_of(world, two)]
        for context, name, i, j in steps:
            x = found[i % len(found)]
            alike = [t for t in found if t.shape == x.shape]
            y = alike[j % len(alike)]
            result = ops[name](world, x, y)
            if result.shape == x.shape and result.is_floating_point():
                result = CONTEXTS[context](world, x, result)
            if result.ndim != 3 or result.numel() > 120 or not result.is_floating_point():
                continue
            found.append(result)
        return tokens_of(world, found[-1]) if raw else found[-1]

    return program


def _joined(w: World, x: Tensor, f: Tensor) -> Tensor:
    return torch.cat([x, f], -1) @ w.weight(2 * x.shape[-1], x.shape[-1])


def _buffered(w: World, x: Tensor, f: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    buffer[:] = f
    return buffer + x


def _half_buffered(w: World, x: Tensor, f: Tensor) -> Tensor:
    buffer = x.clone()
    buffer[..., :1] = f[..., :1]
    return buffer @ w.features(x)


def _added_in_place(x: Tensor, f: Tensor) -> Tensor:
    x = x.clone()
    x += f
    return x


CONTEXTS: dict[str, Callable[[World, Tensor, Tensor], Tensor]] = {
    "alone": lambda w, x, f: f,
    "added": lambda w, x, f: sum(w.terms(x, f)),
    "less": lambda w, x, f: torch.sub(*reversed(w.terms(x, f))),
    "times": lambda w, x, f: torch.mul(*w.terms(x, f)),
    "joined": _joined,
    "buffered": lambda w, x, f: _buffered(w, *w.terms(x, f)),
    "half": _half_buffered,
    "stacked": lambda w, x, f: torch.stack(w.terms(x, f)).sum(0),
    "in place": lambda w, x, f: _added_in_place(*w.terms(x, f)),
    "projected": lambda w, x, f: sum(w.terms(x, f @ w.features(x))),
}  # fmt: skip
