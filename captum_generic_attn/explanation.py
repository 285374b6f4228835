"""From the records of one forward pass to the relevance of every token, for one score.

`attribution` captures a forward pass and asks `explain` for each target. Here the choices of the
user (`Options`: which calls count, which rows are explained) meet the records; the equations are
in `rules`, their order in `additions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from captum_generic_attn.additions import Additions, MappedCall, Source, Switches, read_out
from captum_generic_attn.capture import AttentionRecord, Capture, Refusal, UnsupportedAttentionError
from captum_generic_attn.relevance import Call, Relevance, Stream
from captum_generic_attn.rows import (
    RowsOption,
    choose_rows,
    dtype_for,
    equal_weights,
    explained_rows,
)
from captum_generic_attn.rules import average_heads
from captum_generic_attn.tokens import TokenStream

Layers = str | nn.Module | Sequence[str | nn.Module] | None


@dataclass(frozen=True)
class Options:
    """What the user chose in the constructor of `GenericAttention`."""

    layers: Layers
    start_layer: int
    rows: RowsOption
    normalize: bool
    self_in_cross: bool
    aggregate: bool


@dataclass(frozen=True, eq=False)
class Explanation:
    """Values `[B, roots]` of each stream's tokens, and the relevance that they were read from."""

    values: Mapping[str, Tensor]
    relevance: Relevance | None


def selected(capture: Capture, layers: Layers) -> set[str]:
    """Names of the modules with attention that `layers` selects.

    Raises:
        ValueError: if an element selects none of them; the message lists them.
    """
    names = [*(r.module for r in capture.records), *(r.module for r in capture.refusals)]
    if layers is None:
        return set(names)
    elements = [layers] if isinstance(layers, (str, nn.Module)) else layers
    if not isinstance(elements, Sequence) or not all(
        isinstance(element, (str, nn.Module)) for element in elements
    ):
        raise TypeError(f"layers= takes module names, name prefixes or modules, not {layers!r}")
    if not elements:
        raise ValueError("layers= is empty; it selects no attention call")
    chosen: set[str] = set()
    for element in elements:
        if isinstance(element, nn.Module):
            prefixes = [name for name, module in capture.modules.items() if module is element]
        else:
            prefixes = [element]
        matched = {
            name for name in names
            if any(p in ("", name) or name.startswith(f"{p}.") for p in prefixes)
        }  # fmt: skip
        if not matched:
            shown = type(element).__name__ if isinstance(element, nn.Module) else repr(element)
            raise ValueError(
                f"layers={shown} selects no attention call; attention was seen in: "
                f"{', '.join(dict.fromkeys(names))}"
            )
        chosen |= matched
    return chosen


def explain(
    capture: Capture, score: Tensor, options: Options, *, retain_graph: bool, matrices: bool,
    keep_calls: bool,
) -> Explanation:  # fmt: skip
    """Explain one score of each example.

    Args:
        capture: the forward pass.
        score: `[B]`, one raw score per example, part of the forward pass's graph.
        options: the user's choices.
        retain_graph: whether another score of the same forward pass follows.
        matrices: whether to return a `Relevance` too.
        keep_calls: whether that keeps the maps of each call.

    Raises:
        ValueError: if an option does not fit the model, or relevance is not finite.
    """
    gradients = torch.autograd.grad(
        score.sum(), [r.edge for r in capture.records], allow_unused=True, retain_graph=retain_graph
    )
    reached = {r.index: g for r, g in zip(capture.records, gradients, strict=True) if g is not None}
    unused = _unused(capture, set(reached), options)
    examples = len(score)
    switches = Switches(
        options.normalize,
        options.self_in_cross,
        options.aggregate,
        frozenset((r.query_stream, r.key_stream) for r in capture.records if r.meeting.crosses),
    )
    like = torch.empty(0, dtype=dtype_for(score), device=score.device)
    additions = Additions(capture.streams, examples, like, switches)
    final = _final_calls(capture, set(reached))
    found_rows: dict[str, Tensor] = {}
    calls = []
    for record in capture.records:
        queries = capture.streams.positions(record.query_tokens)
        keys = capture.streams.positions(record.key_tokens)
        read = record.index in final and record.index in capture.ancestors
        per_head = None
        if record.index in reached and (record.index not in unused or read):
            gradient = record.gradient(reached.pop(record.index))
            if read:
                explained = explained_rows(record, gradient, capture, examples)
                before = found_rows.get(record.query_stream, torch.zeros_like(explained))
                found_rows[record.query_stream] = before | explained
            if record.index not in unused:
                probabilities = record.probabilities()
                heads_mean = average_heads(probabilities, gradient) * record.share
                if keep_calls:
                    per_head = (probabilities * gradient).clamp(min=0)
                additions.add(_mapped(record, heads_mean.to(like), capture, queries, keys))
        calls.append(_call(record, queries, keys, unused.get(record.index, ""), per_head))
    automatic = {name: equal_weights(rows, score) for name, rows in found_rows.items()}
    rows = choose_rows(capture, automatic, options.rows, examples, score)
    finals = {
        stream.name: capture.ancestors if stream.name in automatic
        else frozenset(r.index for r in capture.records)
        for stream in capture.streams
    }  # fmt: skip
    values: dict[str, Tensor] = {}
    for name, weights in rows.items():
        for stream in capture.streams:
            state = additions.gain(name, finals[name], stream.name)
            if state is not None or stream.name == name:
                part = read_out(state, weights, stream.roots, own=stream.name == name)
                values[stream.name] = values.get(stream.name, 0) + part
    _check_finite(values, calls)
    relevance = None
    if matrices:
        relevance = Relevance(
            MappingProxyType({s.name: _stream(s) for s in capture.streams}),
            MappingProxyType(rows),
            tuple(sorted([*calls, *map(_refused, capture.refusals)], key=lambda c: c.index)),
            MappingProxyType(_matrices(capture, additions, finals, examples)),
        )
    return Explanation(values, relevance)


def _unused(capture: Capture, reached: set[int], options: Options) -> dict[int, str]:
    """Why calls do not count: not selected, not reached, before `start_layer`."""
    modules = selected(capture, options.layers)
    unused: dict[int, str] = {}
    pairs: dict[tuple[str, str], list[int]] = {}
    layers: dict[int, list[int]] = {}
    for record in capture.records:
        if record.module not in modules:
            unused[record.index] = "not in layers"
        elif record.index not in reached:
            unused[record.index] = "does not reach the score"
        else:
            pair = record.query_stream, record.key_stream
            if record.layer not in layers:
                pairs.setdefault(pair, []).append(record.layer)
            layers.setdefault(record.layer, []).append(record.index)
    start = options.start_layer
    if not all(-len(indices) <= start < len(indices) for indices in pairs.values()):
        counts = ", ".join(f"{len(i)} from {k} to {q}" for (q, k), i in pairs.items())
        raise ValueError(f"start_layer={start} is out of range; attention calls: {counts}")
    for indices in pairs.values():
        for layer in indices[: start % len(indices)]:
            unused.update(dict.fromkeys(layers[layer], "before start_layer"))
    return unused


def _final_calls(capture: Capture, reached: set[int]) -> set[int]:
    """The last calls of each stream: those that no later call of the stream depends on.

    Usually one; several where a layer works in parallel branches or in chunks of queries.
    """
    streams = {r.index: r.query_stream for r in capture.records if r.index in reached}
    last = capture.ancestors
    behind: dict[int, frozenset[int]] = {}
    passed: set[int] = set()
    for record in capture.records:
        direct = record.query_ancestors | record.key_ancestors
        behind[record.index] = direct.union(*(behind.get(i, frozenset()) for i in direct))
        if record.index in reached:
            stream = streams[record.index]
            passed |= {i for i in behind[record.index] if streams.get(i) == stream}
    followed = last.union(*(behind.get(i, frozenset()) for i in last))
    if lost := [
        r.module for r in capture.records if r.index in reached and r.index not in followed
    ]:
        raise UnsupportedAttentionError(
            f"the score depends on {', '.join(dict.fromkeys(lost))} through operations that could "
            "not be followed (a scripted function, a custom autograd.Function, or a view that was "
            "written to); write them with plain torch operations"
        )
    return set(streams) - passed


def _mapped(
    record: AttentionRecord, maps: Tensor, capture: Capture, queries: Tensor, keys: Tensor
) -> MappedCall:
    """A record and its map as the rules see them: tokens as positions in their streams."""
    streams, meeting = capture.streams, record.meeting
    padded = (queries < 0).to(maps.device)
    if bool((padded.unsqueeze(-1) & (maps != 0)).any()):
        raise UnsupportedAttentionError(
            f"{record.module or 'the forward function'} ({record.module_type}): padding stays "
            "among the tokens and hands relevance on; pad with a parameter or an embedding, whose "
            "tokens can be followed"
        )
    index = capture.spaces.locate(record.key_tokens)[0]
    sources = tuple(
        Source(
            streams.having(spaces).name,
            torch.where(torch.isin(index, torch.tensor([*spaces])), keys, -1),
            streams.columns(spaces),
        )
        for spaces in meeting.keys
    )
    return MappedCall(
        record.index, record.query_stream, maps, record.examples, queries, sources,
        meeting.crosses, record.query_ancestors, record.key_ancestors,
        streams.columns(meeting.queries),
    )  # fmt: skip


def _check_finite(values: Mapping[str, Tensor], calls: Sequence[Call]) -> None:
    if all(bool(v.isfinite().all()) for v in values.values()):
        return
    modules = ", ".join(dict.fromkeys(call.module for call in calls if call.used))
    raise ValueError(
        "relevance is not finite: attention probabilities or their gradients hold NaN or infinity. "
        f"Look for NaN in the weights of, or overflow in: {modules}"
    )


def _call(
    record: AttentionRecord, queries: Tensor, keys: Tensor, reason: str, per_head: Tensor | None
) -> Call:
    return Call(
        record.index,
        record.module,
        record.query_stream,
        record.key_stream,
        record.heads,
        not reason,
        reason,
        queries,
        keys,
        None if per_head is None else per_head.mean(1),
        per_head,
    )


def _refused(refusal: Refusal) -> Call:
    none = torch.zeros(0, 0, dtype=torch.long)
    return Call(refusal.index, refusal.module, "", "", 0, False, str(refusal), none, none)


def _stream(stream: TokenStream) -> Stream:
    return Stream(stream.size, MappingProxyType(stream.parts))


def _matrices(
    capture: Capture, additions: Additions, finals: Mapping[str, frozenset[int]], examples: int
) -> dict[tuple[str, str], Tensor]:  # fmt: skip
    matrices = {}
    for query in capture.streams:
        for key in capture.streams:
            matrix = additions.relevance(query.name, finals[query.name], key.name)
            if matrix is not None:
                matrices[query.name, key.name] = matrix.expand(examples, -1, -1)
    return matrices
