"""Checks of scores: what rows and examples they are read from, and whether LRP conserves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_generic_attn.attribution import AttentionAttribution
from captum_generic_attn.captum_api.base import autograd_enabled
from captum_generic_attn.capture import Capture
from captum_generic_attn.lrp.propagation import Propagation
from captum_generic_attn.lrp.rule_sets import rule_set
from captum_generic_attn.tokens.streams import TokenStream
from captum_generic_attn.verification.report import Check
from captum_generic_attn.verification.subject import (
    NOISE,
    Subject,
    above_noise,
    input_edges,
    largest,
)


def check_rows(subject: Subject) -> Check:
    """Whether the explained rows are those that the score has a gradient at.

    The gradient is taken with the results of all other attention calls held constant.
    """
    method = subject.method
    if not isinstance(method, AttentionAttribution):
        return Check("rows", "skipped", "this method explains no rows", 0)
    if method.rows is not None or method.row_source == "all":
        return Check("rows", "skipped", "the rows are given", 0)
    capture = subject.captured()
    score = subject.score(capture.output)
    relevance = method.relevance(subject.given, subject.target, subject.more)
    gradients = capture.blocked(score.sum(), capture.records)
    problems = [
        stream.name for stream in capture.streams
        if stream.name in relevance.rows
        and _differ(relevance.rows[stream.name].cpu(), capture, stream, gradients)
    ]  # fmt: skip
    if problems:
        found = f"of {', '.join(problems)}, others have a gradient than those explained"
        if subject.capture.spaces.approximations:
            return Check("rows", "noted", f"{found}, perhaps by an approximation", 1)
        return Check("rows", "failed", found, 1)
    counts = ", ".join(
        f"{int((rows != 0).sum(-1).max())} of {name}" for name, rows in relevance.rows.items()
    )
    return Check("rows", "passed", f"as the gradient says: {counts}", 1)


def _differ(
    rows: Tensor, capture: Capture, stream: TokenStream, gradients: Sequence[Tensor | None]
) -> bool:
    """Whether the explained rows `[B, N]` of a stream are others than those with a gradient."""
    read = _rows_with_a_gradient(
        torch.zeros_like(rows, dtype=torch.bool), capture, stream, gradients
    )
    explained = rows != 0
    through = stream.unpool(explained.double().unsqueeze(1))[:, 0] != 0
    return bool((explained & ~read).any()) or bool((read & ~through).any())


def _rows_with_a_gradient(
    read: Tensor, capture: Capture, stream: TokenStream, gradients: Sequence[Tensor | None]
) -> Tensor:
    """`read` `[B, N]`, True where a call of the stream has a gradient at its result."""
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
    return read


def check_examples(subject: Subject) -> Check:
    """Whether the score of each example depends on that example alone."""
    count = len(subject.request.inputs[0])
    if count < 2:
        return Check("examples", "skipped", "one example; pass two or more", 0)
    capture = subject.captured()
    score = subject.score(capture.output)
    for _ in range(subject.samples):
        order = torch.randperm(count, generator=subject.generator)
        own = torch.zeros(count, dtype=torch.bool).index_fill(0, order[: count // 2 or 1], True)
        if any(_reads_others(capture, score, half) for half in (own, ~own)):
            return Check("examples", "failed", "the score of an example reads another", 1)
    found = f"each of {count} scores reads its own example alone"
    return Check("examples", "passed", found, subject.samples)


def _reads_others(capture: Capture, score: Tensor, half: Tensor) -> bool:
    """Whether the scores of some examples have a gradient at others."""
    asked = score[half.to(score.device)].sum()
    for gradient in capture.products([asked], input_edges(capture), [torch.ones_like(asked)]):
        if gradient is None or not gradient.ndim or len(gradient) != len(half):
            continue
        if bool(above_noise(gradient, largest(gradient)).cpu()[~half].any()):
            return True
    return False


def check_conservation(subject: Subject) -> Check:
    """By how much the relevance of LRP differs from the score, and where most of it is lost."""
    from captum_generic_attn.baselines import Lrp

    method, request = subject.method, subject.request
    if not isinstance(method, Lrp):
        return Check("conservation", "skipped", "relevance is no share of a score here", 0)
    leaks: dict[str, float] = {}
    with autograd_enabled():
        propagation = Propagation(
            method.forward_func, request.inputs, request.additional,
            method._choose, rule_set(method.rules), copies=True, leaks=leaks,  # noqa: SLF001
        )  # fmt: skip
        score = subject.score(propagation.capture.output)
        found = propagation.of(score, retain_graph=False)
    scores = score.detach().double()
    begun = scores if propagation.starts_from_score else torch.ones_like(scores)
    total = torch.stack([r.double().flatten(1).sum(1) for r in found.inputs]).sum(0)
    missed = float(((total - begun) / begun).abs().max())
    told = f"the sum of relevance misses what it started from by {missed:.1%}"
    if leaks and missed > NOISE:
        name = max(leaks, key=lambda operation: abs(leaks[operation]))
        told += f", most of it at {name} ({leaks[name] / float(begun.sum()):+.1%})"
    return Check("conservation", "noted" if missed > NOISE else "passed", told, len(scores))
