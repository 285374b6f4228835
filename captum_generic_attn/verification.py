"""Is an explanation right on this model? Eight checks that need no second implementation.

`verify` runs a method as its user does and compares what the capture says of the model (attention,
tokens, explained rows, elements that were read) with derivatives of the model itself.
`Verification` is the report.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_generic_attn.attribution import AttentionAttribution
from captum_generic_attn.captum_api.base import ModelAttribution, Request, undisturbed
from captum_generic_attn.captum_api.batching import parts_of
from captum_generic_attn.captum_api.inputs import TargetType
from captum_generic_attn.capture import AttentionRecord, Capture, Witness, capture_forward
from captum_generic_attn.capture.blocking import ending_at
from captum_generic_attn.capture.record import Explicit
from captum_generic_attn.capture.scope import modules_of
from captum_generic_attn.capture.witness import Read
from captum_generic_attn.lrp.propagation import Propagation
from captum_generic_attn.lrp.rule_sets import rule_set
from captum_generic_attn.tokens import TokenSpaces, elements_of
from captum_generic_attn.tokens.ids import compact

Status = Literal["passed", "failed", "noted", "skipped"]
_MARKS = {"passed": "ok", "failed": "WRONG", "noted": "look", "skipped": "-"}
_NOISE = 1e-4
"""Derivatives below this part of the largest one are rounding."""


@dataclass(frozen=True)
class Check:
    """One check: its status, what was found, and on how many samples.

    `"passed"` and `"failed"` speak for themselves; `"noted"` is for a person to judge, `"skipped"`
    does not apply here.
    """

    name: str
    status: Status
    found: str
    samples: int

    def __str__(self) -> str:
        return f"{_MARKS[self.status]:5}  {self.name}: {self.found}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found: one `Check` each."""

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


def verify(
    method: ModelAttribution, inputs: Tensor | tuple[Tensor, ...], target: TargetType = None,
    additional_forward_args: object = None, *, samples: int = 3, seed: int = 0,
) -> Verification:  # fmt: skip
    """Check on a model of one's own that a method's maps are what they should be.

    1. *attention*: probabilities times values are what each call returned.
    2. *tokens*: what a call reads at a position changes only with the tokens that stand there, by
       random vector-Jacobian products; approximations of the docs that the model uses are listed.
    3. *rows*: the explained rows are those that have a gradient with all other calls held constant.
    4. *elements*: input elements without a gradient in any random probe have no relevance.
    5. *examples*: scores depend on their own example alone (of batches).
    6. *heads*: which calls were taken for heads of one layer, for you to judge.
    7. *conservation*: by how much the relevance of LRP misses what it started from, and the
       operation where most of it leaks.
    8. *traces*: the model is left as it was.

    Args:
        method: any method of this package.
        inputs: as in `attribute`; two examples or more let the fifth check say something.
        target: as in `attribute`.
        additional_forward_args: as in `attribute`.
        samples: how many random probes each check takes.
        seed: of the random probes; the global random state is left alone.

    Returns:
        A report; `.passed` says whether no check failed, and its `repr` has a line for each.

    Raises:
        TypeError: if `method` is no method of this package.
        ValueError: if `attribute` refuses the model, the inputs or the target.

    Example:
        >>> import timm
        >>> from captum_generic_attn import GenericAttention, verify
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> report = verify(GenericAttention(model), torch.rand(2, 3, 160, 160), target=1)
        >>> report.passed
        True
        >>> report["attention"].status, report["attention"].samples
        ('passed', 3)
    """
    if not isinstance(method, ModelAttribution):
        raise TypeError(f"verify takes a method of this package, not {type(method).__name__}")
    before = _state(method.forward_func)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        verifying = _Verifying(method, inputs, target, additional_forward_args, samples, seed)
        checks = list(verifying.run())
    checks.append(_traces(before, _state(method.forward_func)))
    return Verification(method.get_name(), tuple(checks))


class _Verifying:
    """The checks of one method on one batch."""

    def __init__(
        self, method: ModelAttribution, inputs: Tensor | tuple[Tensor, ...], target: TargetType,
        additional: object, samples: int, seed: int,
    ) -> None:  # fmt: skip
        self._method, self._target, self._samples = method, target, samples
        self._given, self._more = inputs, additional
        self._generator = torch.Generator().manual_seed(seed)
        tensors = method._check_inputs(inputs)  # noqa: SLF001
        (part,) = parts_of(len(tensors[0]), None)
        self._request = method._request(tensors, [target], additional, part)  # noqa: SLF001
        self._witness = Witness()

    def run(self) -> Iterator[Check]:
        """All checks but that of traces, in order."""
        request, method = self._request, self._method
        try:
            found = method.attribute(self._given, self._target, self._more)
        except ValueError as error:
            if "must depend on that example alone" not in str(error):
                raise
            yield Check("examples", "failed", str(error), 1)
            return
        maps = found if isinstance(found, tuple) else (found,)
        with undisturbed():
            self._capture = self._captured(request, self._witness)
            yield self._attention()
            yield self._tokens()
            yield self._rows()
            yield self._elements(maps)
            yield self._examples()
            yield self._heads()
        yield self._conservation()

    def _captured(self, request: Request, witness: Witness) -> Capture:
        return capture_forward(
            self._method.forward_func, request.inputs, request.additional,
            self._method._choose, copies=True, witness=witness,  # noqa: SLF001
        )  # fmt: skip

    def _normal(self, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        drawn = torch.randn(shape or like.shape, generator=self._generator, dtype=torch.float64)
        return drawn.to(like.dtype).to(like.device)

    # -- 1 -------------------------------------------------------------------------------------

    def _attention(self) -> Check:
        """Euler's rule: what is linear in probabilities is their product with its derivative."""
        worst, place = 0.0, ""
        for record in self._capture.records:
            seen = self._witness.calls.get(record.index)
            for _ in range(self._samples if seen is not None else 0):
                assert seen is not None  # noqa: S101
                cotangent = self._normal(seen.result)
                ours = _weighed(record, cotangent, self._capture)
                if ours is None:
                    continue
                terms = (cotangent.double() * seen.result.double()).flatten()
                error = abs(float(ours - terms.sum())) / max(float(terms.abs().sum()), 1e-30)
                if error > worst:
                    worst, place = error, _name(record)
        calls = len(self._witness.calls)
        allowed = 1e3 * torch.finfo(self._capture.output.dtype).eps
        ok = worst <= allowed
        found = f"probabilities times values are the output of all {calls} calls"
        if not ok:
            found = f"probabilities times values miss the output of {place} by {worst:.1%}"
        return Check("attention", "passed" if ok else "failed", found, self._samples)

    # -- 2 -------------------------------------------------------------------------------------

    def _tokens(self) -> Check:
        wrong: dict[str, None] = {}
        probes = 0
        near: dict[str, None] = {}
        approximations = self._capture.spaces.approximations
        for record in self._capture.records:
            seen = self._witness.calls.get(record.index)
            for read in () if seen is None else seen.reads:
                for _ in range(self._samples):
                    probes += 1
                    foreign, within = self._probe(read, record)
                    where = f"{_name(record)} ({read.what})"
                    if foreign or (within and not approximations):
                        wrong[where] = None
                    elif within:
                        near[where] = None
        if wrong:
            found = f"positions change with tokens that they do not list: {_listed(wrong)}"
            return Check("tokens", "failed", found, probes)
        if approximations:
            kinds = "; ".join(f"{kind} ({operation})" for kind, operation in approximations)
            found = f"approximations: {kinds}; they show at {len(near)} of what calls read"
            return Check("tokens", "noted" if near else "passed", found, probes)
        return Check("tokens", "passed", f"{probes} probes, no approximation", probes)

    def _probe(self, read: Read, record: AttentionRecord) -> tuple[bool, bool]:
        """Whether a random half of what a call reads changes with tokens of others.

        Those of other examples or inputs, and those of the same.
        """
        spaces, capture = self._capture.spaces, self._capture
        every = torch.unique(torch.cat([p.reshape(-1) for p in map(compact, read.planes)]))
        every = every[every >= 0]
        order = torch.randperm(len(every), generator=self._generator)
        chosen = every[order[: max(len(every) // 2, 1)]]
        inside = torch.ones((), dtype=torch.bool)
        for plane in read.planes:
            inside = inside & torch.isin(compact(plane), chosen)
        cotangent = self._normal(read.like, read.planes[0].shape)
        cotangent = cotangent * inside.to(cotangent.device)
        if len(read.planes) == 2:
            cotangent = _without_shifts(cotangent, inside.to(cotangent.device), read.planes)
        sources = [r for r in capture.records if r.index < record.index]
        sources = [r for r in sources if r.index in self._witness.calls]
        edges = [*_inputs(capture), *(r.result for r in sources)]
        with ending_at(r.result for r in capture.records):
            found = capture.products([read.edge], edges, [cotangent])
        mine = _closure(spaces, chosen)
        foreign = within = False
        own = set(spaces.locate(chosen)[1].tolist()) - {-1}
        largest = max((_size(gradient) for gradient in found if gradient is not None), default=0.0)
        for gradient, allowed in self._allowed(mine, sources, found):
            if gradient is None:
                continue
            live = _live(gradient, largest)
            bad = live & ~allowed.to(live.device)
            if bool(bad.any()):
                within = True
                if own and bad.ndim and len(bad) == len(self._request.inputs[0]):
                    rows = bad.flatten(1).any(1).nonzero().flatten().tolist()
                    foreign |= not set(rows) <= own
        return foreign, within

    def _allowed(
        self, mine: Tensor, sources: Sequence[AttentionRecord], found: Sequence[Tensor | None]
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Each gradient, and where it may be: at what the tokens `mine` were made of."""
        capture, spaces = self._capture, self._capture.spaces
        left = iter(found)
        for i, (tensor, root) in enumerate(zip(self._request.inputs, capture.roots, strict=True)):
            if root is not None:
                name = capture.input_names[i]
                yield next(left), _elements_of_tokens(spaces, mine, name, tensor.shape)
        for plane, _ in capture.embedded:
            gradient = next(left)
            if gradient is not None:
                gradient = gradient.abs().sum(-1) if gradient.ndim > plane.ndim else gradient
                tokens = _tokens_of_elements(spaces, plane, mine)
                yield gradient, tokens
        for record in sources:
            plane = self._witness.calls[record.index].plane
            yield next(left), mine[plane.clamp(min=0).long()] | (plane < 0)

    # -- 3 -------------------------------------------------------------------------------------

    def _rows(self) -> Check:
        method = self._method
        if not isinstance(method, AttentionAttribution):
            return Check("rows", "skipped", "this method explains no rows", 0)
        if method.rows is not None or method._method.reads == "all":  # noqa: SLF001
            return Check("rows", "skipped", "the rows are given", 0)
        capture = self._captured(self._request, Witness())
        score = method._score(capture.output, self._request, self._target)  # noqa: SLF001
        relevance = method.relevance(self._given, self._target, self._more)
        gradients = capture.blocked(score.sum(), capture.records)
        problems = []
        for stream in capture.streams:
            if stream.name not in relevance.rows:
                continue
            ours = relevance.rows[stream.name].cpu()
            read = torch.zeros_like(ours, dtype=torch.bool)
            for record, gradient in zip(capture.records, gradients, strict=True):
                if record.query_stream != stream.name:
                    continue
                live = record.read_rows(gradient).cpu()
                places = capture.streams.positions(record.query_tokens)
                for group, example in enumerate(record.examples.tolist()):
                    known = live[group] & (places[group] >= 0)
                    owners = range(len(read)) if example < 0 else [example]
                    for owner in owners:
                        read[owner, places[group][known]] = True
            through = stream.hand_back((ours != 0).double().unsqueeze(1))[:, 0] != 0
            if bool(((ours != 0) & ~read).any()) or bool((read & ~through).any()):
                problems.append(stream.name)
        if problems:
            found = f"of {', '.join(problems)}, others have a gradient than those explained"
            if self._capture.spaces.approximations:
                return Check("rows", "noted", f"{found}, perhaps by an approximation", 1)
            return Check("rows", "failed", found, 1)
        counts = ", ".join(
            f"{int((rows != 0).sum(-1).max())} of {name}" for name, rows in relevance.rows.items()
        )
        return Check("rows", "passed", f"as the gradient says: {counts}", 1)

    # -- 4 -------------------------------------------------------------------------------------

    def _elements(self, maps: Sequence[Tensor]) -> Check:
        """Random cotangents of the whole output, at the inputs and near them."""
        live: list[Tensor | None] = [None] * len(maps)
        for sample in range(self._samples):
            request = self._request if sample == 0 else _near(self._request, self._generator)
            capture = self._captured(request, Witness())
            cotangent = self._normal(capture.output)
            left = iter(capture.products([capture.output], _inputs(capture), [cotangent]))
            for i, root in enumerate(capture.roots):
                gradient = next(left) if root is not None else None
                if gradient is not None:
                    _add(live, i, gradient.isnan() | (gradient != 0))
            for plane, _ in capture.embedded:
                gradient = next(left)
                if gradient is not None:
                    changed = (gradient != 0) | gradient.isnan()
                    _add_integers(capture, live, plane, changed, self._request.inputs)
        wrong = []
        for name, heat, read in zip(self._capture.input_names, maps, live, strict=True):
            unread = heat != 0 if read is None else (heat != 0) & ~read.to(heat.device)
            count = int(unread.sum())
            if count:
                wrong.append(f"{count} of {heat.numel()} elements of {name}")
        if not wrong:
            return Check(
                "elements", "passed", "none without a gradient has relevance", self._samples
            )
        found = f"no gradient reaches {', '.join(wrong)}, which have relevance"
        sampled = any(kind == "neighbourhood" for kind, _ in self._capture.spaces.approximations)
        return Check("elements", "noted" if sampled else "failed", found, self._samples)

    # -- 5 -------------------------------------------------------------------------------------

    def _examples(self) -> Check:
        count = len(self._request.inputs[0])
        if count < 2:
            return Check("examples", "skipped", "one example; pass two or more", 0)
        capture = self._captured(self._request, Witness())
        score = self._method._score(capture.output, self._request, self._target)  # noqa: SLF001
        for _ in range(self._samples):
            order = torch.randperm(count, generator=self._generator)
            own = torch.zeros(count, dtype=torch.bool).index_fill(0, order[: count // 2 or 1], True)
            for half in (own, ~own):
                edges = _inputs(capture)
                asked = score[half.to(score.device)].sum()
                for gradient in capture.products([asked], edges, [torch.ones_like(asked)]):
                    if gradient is None or not gradient.ndim or len(gradient) != count:
                        continue
                    foreign = _live(gradient, _size(gradient)).cpu()[~half]
                    if bool(foreign.any()):
                        return Check(
                            "examples", "failed", "the score of an example reads another", 1
                        )
        found = f"each of {count} scores reads its own example alone"
        return Check("examples", "passed", found, self._samples)

    # -- 6 -------------------------------------------------------------------------------------

    def _heads(self) -> Check:
        records = self._capture.records
        layers: dict[int, list[AttentionRecord]] = {}
        alike: dict[object, list[AttentionRecord]] = {}
        for record in records:
            layers.setdefault(record.layer, []).append(record)
            asking = tuple(torch.unique(record.query_tokens).tolist())
            alike.setdefault((asking, record.query_ancestors), []).append(record)
        joined = [calls for calls in layers.values() if len(calls) > 1]
        branches = [calls for calls in alike.values() if len({r.layer for r in calls}) > 1]
        told = {"averaged as heads of one layer": joined, "added up as branches": branches}
        lines = [
            f"{how}: {_listed([', '.join(_call(r) for r in calls) for calls in groups])}"
            for how, groups in told.items() if groups
        ]  # fmt: skip
        found = "; ".join(lines)
        if not found:
            found = f"each of {len(records)} calls has its heads in one tensor"
        return Check("heads", "noted" if joined or branches else "passed", found, len(records))

    # -- 7 -------------------------------------------------------------------------------------

    def _conservation(self) -> Check:
        from captum_generic_attn.baselines import Lrp

        method, request = self._method, self._request
        if not isinstance(method, Lrp):
            return Check("conservation", "skipped", "relevance is no share of a score here", 0)
        leaks: dict[str, float] = {}
        with undisturbed():
            propagation = Propagation(
                method.forward_func, request.inputs, request.additional,
                method._choose, rule_set(method.rules), copies=True, leaks=leaks,  # noqa: SLF001
            )  # fmt: skip
            output = propagation.capture.output
            score = method._score(output, request, self._target)  # noqa: SLF001
            found = propagation.of(score, retain_graph=False)
        scores = score.detach().double()
        begun = scores if propagation.starts_from_score else torch.ones_like(scores)
        total = torch.stack([r.double().flatten(1).sum(1) for r in found.inputs]).sum(0)
        missed = float(((total - begun) / begun).abs().max())
        told = f"the sum of relevance misses what it started from by {missed:.1%}"
        if leaks and missed > _NOISE:
            name = max(leaks, key=lambda operation: abs(leaks[operation]))
            told += f", most of it at {name} ({leaks[name] / float(begun.sum()):+.1%})"
        return Check("conservation", "noted" if missed > _NOISE else "passed", told, len(scores))


def _name(record: AttentionRecord) -> str:
    return record.module or "the forward function"


def _call(record: AttentionRecord) -> str:
    return f"{_name(record)} (call {record.index})"


def _listed(places: Collection[str]) -> str:
    shown = list(places)[:3]
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(shown) + more


def _without_shifts(cotangent: Tensor, inside: Tensor, planes: Sequence[Tensor]) -> Tensor:
    """A cotangent of logits that adds up to zero for each query: a softmax is blind to the rest."""
    rows, columns = map(compact, planes)
    for axis in range(cotangent.ndim):
        if rows.shape[axis] == 1 and columns.shape[axis] > 1:
            count = inside.expand(cotangent.shape).sum(axis, keepdim=True).clamp(min=1)
            cotangent = cotangent - cotangent.sum(axis, keepdim=True) / count * inside
    return cotangent


def _size(gradient: Tensor) -> float:
    return float(gradient.abs().nan_to_num(0, 0, 0).max()) if gradient.numel() else 0.0


def _live(gradient: Tensor, largest: float) -> Tensor:
    """Where a gradient is more than rounding beside the `largest`; NaN is no evidence."""
    return gradient.abs().nan_to_num(0, 0, 0) > _NOISE * max(largest, 1e-30)


def _inputs(capture: Capture) -> list[GradientEdge]:
    """The inputs that are numbers, and what became vectors of those that are integers."""
    roots = [edge for edge in capture.roots if edge is not None]
    return [*roots, *(edge for _, edge in capture.embedded)]


def _weighed(record: AttentionRecord, cotangent: Tensor, capture: Capture) -> Tensor | None:
    """The sum of a call's probabilities times their derivative; `None` if it has none."""
    source = record.source
    if isinstance(source, Explicit):
        (gradient,) = capture.products([record.result], [record.edge], [cotangent])
        if gradient is None:
            return None
        (weights,) = source.operands.read()
        return (weights.double() * gradient.double()).sum()
    blocks = source.blocks(source.operands.read(), cotangent, None)
    return (blocks.probabilities().double() * blocks.gradient().double()).sum()


def _closure(spaces: TokenSpaces, chosen: Tensor) -> Tensor:
    """`[ids]` True for tokens, what they were merged from, and what lives on as any of these."""
    size = max((space.stop for space in spaces), default=0)
    mine = torch.zeros(size, dtype=torch.bool)
    mine[chosen.long()] = True
    while True:
        before = int(mine.sum())
        for space in reversed(list(spaces)):
            own = mine[space.base : space.stop].view(-1, space.size)
            if not bool(own.any()):
                continue
            if space.parents is not None:
                parents = space.parents[own[: len(space.parents)]].reshape(-1)
                mine[parents[parents >= 0].long()] = True
            for other, table in spaces.absorbed_into(space):
                inside = own[:, table.clamp(min=0)[0]] if len(table) == 1 else torch.stack(
                    [own[min(i, len(own) - 1), row.clamp(min=0)] for i, row in enumerate(table)]
                )  # fmt: skip
                found = inside & (table >= 0)
                rows = max(other.examples, 1)
                mine[other.base : other.stop].view(rows, -1)[:] |= found.expand(rows, -1)
        if int(mine.sum()) == before:
            return mine


def _elements_of_tokens(spaces: TokenSpaces, mine: Tensor, name: str, shape: torch.Size) -> Tensor:
    """`[B, *shape[1:]]` True for elements of an input that some of the tokens were made of."""
    found = torch.zeros(shape, dtype=torch.bool)
    for space in spaces:
        own = mine[space.base : space.stop].view(-1, space.size)
        if not bool(own.any()) or space.name != name:
            continue
        if space.kind == "element" and space.shape is not None:
            found |= own.view(-1, *shape[1:])
        elif space.extent is None:
            if space.parents is None:  # nobody knows where: anywhere in its example
                found[own.any(1).expand(len(found))] = True
        else:
            for example, tokens in enumerate(own.expand(len(found), -1)):
                found[example] |= elements_of(space.extent.of(tokens), shape)
    return found


def _tokens_of_elements(spaces: TokenSpaces, plane: Tensor, mine: Tensor) -> Tensor:
    """Of integers `[B, N]`, which some of the tokens were made of."""
    found = torch.zeros(plane.shape, dtype=torch.bool)
    index, example, local = spaces.locate(plane)
    for i in torch.unique(index).tolist():
        if i < 0:
            found |= index < 0
            continue
        source = spaces[i]
        if source.shape is None:
            continue
        shape = torch.Size([max(source.examples, 1), *source.shape])
        name = source.name
        elements = torch.zeros(shape, dtype=torch.bool)
        for fed in {s.name for s in spaces if spaces.origin(s.name) == spaces.origin(name)}:
            elements |= _elements_of_tokens(spaces, mine, fed, shape)
        flat = elements.flatten(1)
        there = flat[example.clamp(min=0), local.clamp(min=0)]
        found |= there & (index == i)
    return found


def _near(request: Request, generator: torch.Generator) -> Request:
    """The same inputs with noise of a tenth of their deviation."""

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        spread = float(tensor.std()) if tensor.numel() > 1 else 1.0
        return tensor + 0.1 * spread * noise.to(tensor.dtype).to(tensor.device)

    own = {id(tensor): moved(tensor) for tensor in request.inputs}
    inputs = tuple(own[id(tensor)] for tensor in request.inputs)
    return Request(inputs, request.targets, request.additional, request.part)


def _add(live: list[Tensor | None], place: int, changed: Tensor) -> None:
    known = live[place]
    live[place] = changed if known is None else known | changed


def _add_integers(
    capture: Capture, live: list[Tensor | None], plane: Tensor, changed: Tensor,
    inputs: Sequence[Tensor],
) -> None:  # fmt: skip
    """Note which integers the vectors of a look-up that have a gradient came from."""
    changed = changed.any(-1) if changed.ndim > plane.ndim else changed
    index, example, local = capture.spaces.locate(plane)
    for i, (name, tensor) in enumerate(zip(capture.input_names, inputs, strict=True)):
        found = torch.zeros(tensor.shape, dtype=torch.bool).flatten(1)
        for space in capture.spaces:
            if space.name == name and space.kind == "element":
                here = changed.cpu() & (index == space.index)
                found[example[here], local[here]] = True
        if bool(found.any()):
            _add(live, i, found.view(tensor.shape))


# -- 8 -----------------------------------------------------------------------------------------


def _state(function: Callable[..., Any]) -> dict[str, object]:
    """What a method must leave as it was, in words."""
    found: dict[str, object] = {"random state": torch.get_rng_state().tolist()}
    found["function modes"] = torch._C._len_torch_function_stack()  # noqa: SLF001
    found["gradients enabled"] = torch.is_grad_enabled()
    modules = {
        f"{root}.{name}".strip("."): module
        for root, outer in modules_of(function).items() for name, module in outer.named_modules()
    }  # fmt: skip
    for name, module in modules.items():
        hooks = [key for key in vars(module) if "hooks" in key]
        found[f"hooks of {name or 'the model'}"] = {
            key: len(value) for key in hooks if isinstance(value := vars(module)[key], dict)
        }
        found[f"training flag of {name or 'the model'}"] = module.training
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:  # noqa: SLF001
            if tensor is not None:
                full = f"{name}.{own}".strip(".")
                found[f"{full} itself"] = id(tensor), tensor.requires_grad
                found[f"numbers of {full}"] = -1 if tensor.is_inference() else tensor._version  # noqa: SLF001
                if tensor.is_leaf:
                    found[f"gradient of {full}"] = id(tensor.grad) if tensor.grad is not None else 0
    return found


def _traces(before: dict[str, object], after: dict[str, object]) -> Check:
    changed = {k: None for k in {**before, **after} if before.get(k) != after.get(k)}
    if changed:
        return Check("traces", "failed", f"changed: {_listed(changed)}", 1)
    found = "hooks, flags, gradients, numbers and random state are as they were"
    return Check("traces", "passed", found, 1)
