"""Checks of attention calls: their probabilities, and which calls are heads of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord, Capture
from captum_generic_attn.capture.record import Explicit
from captum_generic_attn.verification.report import Check, listed
from captum_generic_attn.verification.subject import Subject, name_of


def check_attention(subject: Subject) -> Check:
    """Whether probabilities times values are what each call returned.

    The result is linear in the probabilities. So for a random cotangent of the result, the sum of
    probabilities times their gradient is the sum of result times cotangent (Euler's theorem).
    """
    capture, calls = subject.capture, subject.witness.calls
    worst, place = 0.0, ""
    for record in capture.records:
        seen = calls.get(record.index)
        if seen is None:
            continue
        for _ in range(subject.samples):
            cotangent = subject.normal(seen.result)
            ours = _probabilities_times_gradient(record, cotangent, capture)
            if ours is None:
                continue
            terms = (cotangent.double() * seen.result.double()).flatten()
            error = abs(float(ours - terms.sum())) / max(float(terms.abs().sum()), 1e-30)
            if error > worst:
                worst, place = error, name_of(record)
    if worst > 1e3 * torch.finfo(capture.output.dtype).eps:
        found = f"probabilities times values miss the output of {place} by {worst:.1%}"
        return Check("attention", "failed", found, subject.samples)
    found = f"probabilities times values are the output of all {len(calls)} calls"
    return Check("attention", "passed", found, subject.samples)


def _probabilities_times_gradient(
    record: AttentionRecord, cotangent: Tensor, capture: Capture
) -> Tensor | None:
    """The sum of a call's probabilities times their gradient; `None` if they have none."""
    source = record.source
    if isinstance(source, Explicit):
        (gradient,) = capture.products([record.result], [record.edge], [cotangent])
        if gradient is None:
            return None
        (weights,) = source.operands.read()
        return (weights.double() * gradient.double()).sum()
    blocks = source.blocks(source.operands.read(), cotangent, None)
    return (blocks.probabilities().double() * blocks.gradient().double()).sum()


def check_heads(subject: Subject) -> Check:
    """Which calls are taken for heads of one layer, and which for branches. A person must judge."""
    records = subject.capture.records
    layers: dict[int, list[AttentionRecord]] = {}
    alike: dict[object, list[AttentionRecord]] = {}
    for record in records:
        layers.setdefault(record.layer, []).append(record)
        queries = tuple(torch.unique(record.query_tokens).tolist())
        alike.setdefault((queries, record.query_ancestors), []).append(record)
    joined = [calls for calls in layers.values() if len(calls) > 1]
    branches = [calls for calls in alike.values() if len({r.layer for r in calls}) > 1]
    told = {"averaged as heads of one layer": joined, "added up as branches": branches}
    found = "; ".join(
        f"{how}: {listed([', '.join(map(_call, calls)) for calls in groups])}"
        for how, groups in told.items() if groups
    )  # fmt: skip
    if not found:
        found = f"each of {len(records)} calls has its heads in one tensor"
        return Check("heads", "passed", found, len(records))
    return Check("heads", "noted", found, len(records))


def _call(record: AttentionRecord) -> str:
    return f"{name_of(record)} (call {record.index})"
