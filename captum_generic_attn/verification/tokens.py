"""Check of tokens: what a call reads at a position changes with no token of another position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord
from captum_generic_attn.capture.gradient_stops import ending_at
from captum_generic_attn.capture.witness import Read
from captum_generic_attn.tokens import TokenSpaces, elements_of
from captum_generic_attn.tokens.ids import squeeze_expanded
from captum_generic_attn.verification.report import Check, listed
from captum_generic_attn.verification.subject import (
    Subject,
    above_noise,
    input_edges,
    largest,
    name_of,
)


def check_tokens(subject: Subject) -> Check:
    """Whether what calls read changes only with the tokens that it is said to hold.

    Each probe takes a random half of the tokens that a call reads, and a vector-Jacobian product
    from there to the inputs and to the results of earlier calls.
    """
    wrong: dict[str, None] = {}
    near: dict[str, None] = {}
    probes = 0
    approximations = subject.capture.spaces.approximations
    for record, read in _reads(subject):
        for _ in range(subject.samples):
            probes += 1
            other_examples, other_tokens = _probe(subject, read, record)
            where = f"{name_of(record)} ({read.what})"
            if other_examples or (other_tokens and not approximations):
                wrong[where] = None
            elif other_tokens:
                near[where] = None
    if wrong:
        found = f"positions change with tokens that they do not list: {listed(wrong)}"
        return Check("tokens", "failed", found, probes)
    if approximations:
        kinds = "; ".join(f"{kind} ({operation})" for kind, operation in approximations)
        found = f"approximations: {kinds}; they show at {len(near)} of what calls read"
        return Check("tokens", "noted" if near else "passed", found, probes)
    return Check("tokens", "passed", f"{probes} probes, no approximation", probes)


def _reads(subject: Subject) -> Iterator[tuple[AttentionRecord, Read]]:
    for record in subject.capture.records:
        seen = subject.witness.calls.get(record.index)
        if seen is not None:
            yield from ((record, read) for read in seen.reads)


def _probe(subject: Subject, read: Read, record: AttentionRecord) -> tuple[bool, bool]:
    """Whether a random half of what a call reads changes with tokens that it does not hold.

    Returns:
        Whether some of these are of other examples, and whether there are any.
    """
    capture = subject.capture
    chosen = _half(subject, read)
    cotangent = _cotangent(subject, read, chosen)
    sources = [
        r for r in capture.records if r.index < record.index and r.index in subject.witness.calls
    ]
    edges = [*input_edges(capture), *(r.result for r in sources)]
    with ending_at(r.result for r in capture.records):
        found = capture.products([read.edge], edges, [cotangent])
    held = _closure(capture.spaces, chosen)
    own = set(capture.spaces.locate(chosen)[1].tolist()) - {-1}
    scale = max((largest(gradient) for gradient in found if gradient is not None), default=0.0)
    other_examples = other_tokens = False
    for gradient, allowed in _allowed(subject, held, sources, found):
        if gradient is None:
            continue
        bad = above_noise(gradient, scale) & ~allowed.to(gradient.device)
        if not bool(bad.any()):
            continue
        other_tokens = True
        if own and bad.ndim and len(bad) == len(subject.request.inputs[0]):
            rows = bad.flatten(1).any(1).nonzero().flatten().tolist()
            other_examples |= not set(rows) <= own
    return other_examples, other_tokens


def _half(subject: Subject, read: Read) -> Tensor:
    """A random half of the tokens that a call reads."""
    every = torch.unique(torch.cat([p.reshape(-1) for p in map(squeeze_expanded, read.token_ids)]))
    every = every[every >= 0]
    order = torch.randperm(len(every), generator=subject.generator)
    chosen: Tensor = every[order[: max(len(every) // 2, 1)]]
    return chosen


def _cotangent(subject: Subject, read: Read, chosen: Tensor) -> Tensor:
    """Random numbers where a call reads the chosen tokens, zero elsewhere."""
    inside = torch.ones((), dtype=torch.bool)
    for ids in read.token_ids:
        inside = inside & torch.isin(squeeze_expanded(ids), chosen)
    cotangent = subject.normal(read.like, read.token_ids[0].shape)
    inside = inside.to(cotangent.device)
    cotangent = cotangent * inside
    return _centred(cotangent, inside, read.token_ids) if len(read.token_ids) == 2 else cotangent


def _centred(cotangent: Tensor, inside: Tensor, token_ids: Sequence[Tensor]) -> Tensor:
    """A cotangent of logits with mean zero for each query: softmax does not see their mean."""
    rows, columns = map(squeeze_expanded, token_ids)
    for axis in range(cotangent.ndim):
        if rows.shape[axis] == 1 and columns.shape[axis] > 1:
            count = inside.expand(cotangent.shape).sum(axis, keepdim=True).clamp(min=1)
            cotangent = cotangent - cotangent.sum(axis, keepdim=True) / count * inside
    return cotangent


def _allowed(
    subject: Subject, held: Tensor, sources: Sequence[AttentionRecord],
    found: Sequence[Tensor | None],
) -> Iterator[tuple[Tensor | None, Tensor]]:  # fmt: skip
    """Each gradient, and where it may differ from zero: at what the tokens `held` were made of."""
    capture, spaces = subject.capture, subject.capture.spaces
    left = iter(found)
    for i, (tensor, root) in enumerate(zip(subject.request.inputs, capture.roots, strict=True)):
        if root is not None:
            name = capture.input_names[i]
            yield next(left), _elements_of_tokens(spaces, held, name, tensor.shape)
    for ids, _ in capture.embedded:
        gradient = next(left)
        if gradient is not None:
            gradient = gradient.abs().sum(-1) if gradient.ndim > ids.ndim else gradient
            yield gradient, _tokens_of_elements(spaces, ids, held)
    for record in sources:
        ids = subject.witness.calls[record.index].ids
        yield next(left), held[ids.clamp(min=0).long()] | (ids < 0)


def _closure(spaces: TokenSpaces, chosen: Tensor) -> Tensor:
    """`[ids]` True for tokens, for what they were merged from, and for what became one of these."""
    size = max((space.stop for space in spaces), default=0)
    held = torch.zeros(size, dtype=torch.bool)
    held[chosen.long()] = True
    while True:
        before = int(held.sum())
        for space in reversed(list(spaces)):
            own = held[space.base : space.stop].view(-1, space.size)
            if not bool(own.any()):
                continue
            if space.parents is not None:
                parents = space.parents[own[: len(space.parents)]].reshape(-1)
                held[parents[parents >= 0].long()] = True
            for other, table in spaces.absorbed_into(space):
                inside = own[:, table.clamp(min=0)[0]] if len(table) == 1 else torch.stack(
                    [own[min(i, len(own) - 1), row.clamp(min=0)] for i, row in enumerate(table)]
                )  # fmt: skip
                found = inside & (table >= 0)
                rows = max(other.examples, 1)
                held[other.base : other.stop].view(rows, -1)[:] |= found.expand(rows, -1)
        if int(held.sum()) == before:
            return held


def _elements_of_tokens(spaces: TokenSpaces, held: Tensor, name: str, shape: torch.Size) -> Tensor:
    """`[B, *shape[1:]]` True for elements of an input that some of the tokens were made of."""
    found = torch.zeros(shape, dtype=torch.bool)
    for space in spaces:
        own = held[space.base : space.stop].view(-1, space.size)
        if not bool(own.any()) or space.name != name:
            continue
        if space.kind == "element" and space.shape is not None:
            found |= own.view(-1, *shape[1:])
        elif space.extent is None:
            if space.parents is None:  # the place is not known: anywhere in the example
                found[own.any(1).expand(len(found))] = True
        else:
            for example, tokens in enumerate(own.expand(len(found), -1)):
                found[example] |= elements_of(space.extent.of(tokens), shape)
    return found


def _tokens_of_elements(spaces: TokenSpaces, ids: Tensor, held: Tensor) -> Tensor:
    """Which integers `[B, N]` some of the tokens were made of."""
    found = torch.zeros(ids.shape, dtype=torch.bool)
    index, example, local = spaces.locate(ids)
    for i in torch.unique(index).tolist():
        if i < 0:
            found |= index < 0
            continue
        source = spaces[i]
        if source.shape is None:
            continue
        shape = torch.Size([max(source.examples, 1), *source.shape])
        origin = spaces.origin(source.name)
        elements = torch.zeros(shape, dtype=torch.bool)
        for fed in {s.name for s in spaces if spaces.origin(s.name) == origin}:
            elements |= _elements_of_tokens(spaces, held, fed, shape)
        flat = elements.flatten(1)
        there = flat[example.clamp(min=0), local.clamp(min=0)]
        found |= there & (index == i)
    return found
