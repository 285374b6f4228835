"""Which attention calls are used: those selected, upstream of the score, and read by the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from torch import nn

from captum_generic_attn.capture import (
    AttentionRecord,
    Capture,
    Reached,
)
from captum_generic_attn.errors import UnsupportedAttentionError
from captum_generic_attn.relevance.method import Layers, Method


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
    return set().union(*(_matches(element, names, capture) for element in elements))


def _matches(element: str | nn.Module, names: Sequence[str], capture: Capture) -> set[str]:
    """The names that one element of `layers` selects."""
    prefixes = [element] if isinstance(element, str) else [
        name for name, module in capture.modules.items() if module is element
    ]  # fmt: skip
    matches = {
        name for name in names
        if any(prefix in ("", name) or name.startswith(f"{prefix}.") for prefix in prefixes)
    }  # fmt: skip
    if not matches:
        shown = repr(element) if isinstance(element, str) else type(element).__name__
        raise ValueError(
            f"layers={shown} selects no attention call; attention was seen in: "
            f"{', '.join(dict.fromkeys(names))}"
        )
    return matches


def unused_calls(
    capture: Capture, reached: Reached, method: Method,
    states: Mapping[str, Sequence[frozenset[int]]],
) -> dict[int, str]:  # fmt: skip
    """Why calls are not used: not selected, not reached by the score, before `start_layer`.

    Args:
        capture: the forward pass.
        reached: the calls that the score depends on.
        method: its options `layers`, `start_layer` and `keep_last`.
        states: for each stream the states that its rows are read in. A method that keeps the last
            call of a pair of streams keeps the last of each state; by default there is one state,
            after all calls.

    Raises:
        ValueError: if `start_layer` is out of range.
    """
    modules = selected(capture, method.layers)
    unused = {
        record.index: reason
        for record in capture.records
        if (reason := _unusable(record, modules, reached))
    }
    used = [record for record in capture.records if record.index not in unused]
    calls_of, layers_of = _layers(used)
    start = method.start_layer
    if not all(-len(layers) <= start < len(layers) for layers in layers_of.values()):
        counts = ", ".join(f"{len(layers)} from {k} to {q}" for (q, k), layers in layers_of.items())
        raise ValueError(f"start_layer={start} is out of range; attention calls: {counts}")
    last_only = _pairs_kept_last(used, method)
    for pair, layers in layers_of.items():
        for layer in layers[: start % len(layers)]:
            unused.update(dict.fromkeys(calls_of[layer], "before start_layer"))
        if pair in last_only:
            kept = {
                max((i for i in layers if not state.isdisjoint(calls_of[i])), default=-1)
                for state in states.get(pair[0], [frozenset(reached)])
            }
            for call in chain.from_iterable(calls_of[layer] for layer in set(layers) - kept):
                unused.setdefault(call, "not the last of its pair of streams")
    return unused


def _layers(
    used: Sequence[AttentionRecord],
) -> tuple[dict[int, list[int]], dict[tuple[str, str], list[int]]]:
    """The calls of each layer, several where heads are called one by one, and the layers of each
    pair of streams.
    """
    calls_of: dict[int, list[int]] = {}
    layers_of: dict[tuple[str, str], list[int]] = {}
    for record in used:
        if record.layer not in calls_of:
            layers_of.setdefault(_pair(record), []).append(record.layer)
        calls_of.setdefault(record.layer, []).append(record.index)
    return calls_of, layers_of


def _unusable(record: AttentionRecord, modules: set[str], reached: Reached) -> str:
    if record.module not in modules:
        return "not in layers"
    return "" if record.index in reached else "does not reach the score"


def _pairs_kept_last(used: Sequence[AttentionRecord], method: Method) -> frozenset[tuple[str, str]]:
    """The (query stream, key stream) pairs of which a method uses the last call only."""
    if method.keep_last == "none":
        return frozenset()
    every = method.keep_last == "all"
    return frozenset(
        _pair(record) for record in used if every or record.stream_pair.is_cross_attention
    )


def used_in_state(
    used: Sequence[AttentionRecord], method: Method, state: frozenset[int]
) -> frozenset[int]:
    """The calls of a state that a method uses, which may be only the last of each pair."""
    last_only = _pairs_kept_last(used, method)
    own = [r for r in used if r.index in state and _pair(r) in last_only]
    last: dict[tuple[str, str], int] = {}
    for record in own:
        last[_pair(record)] = max(last.get(_pair(record), -1), record.layer)
    return state - {r.index for r in own if r.layer != last[_pair(r)]}


def _pair(record: AttentionRecord) -> tuple[str, str]:
    return record.query_stream, record.key_stream


def upstream(records: Sequence[AttentionRecord]) -> dict[int, frozenset[int]]:
    """The calls that each call depends on, directly or through others."""
    behind: dict[int, frozenset[int]] = {}
    for record in records:
        direct = record.query_ancestors | record.key_ancestors
        behind[record.index] = direct.union(*(behind.get(i, frozenset()) for i in direct))
    return behind


def read_calls(capture: Capture, reached: Reached) -> list[AttentionRecord]:
    """The calls whose results the score may read without another call in between.

    Raises:
        UnsupportedAttentionError: if the score depends on calls in a way that was not followed.
    """
    last, behind = capture.ancestors, upstream(capture.records)
    followed = last.union(*(behind.get(i, frozenset()) for i in last))
    if lost := [
        r.module for r in capture.records if r.index in reached and r.index not in followed
    ]:
        raise UnsupportedAttentionError(
            f"the score depends on {', '.join(dict.fromkeys(lost))} through operations that could "
            "not be followed (a scripted function, a custom autograd.Function, or a view that was "
            "written to); write them with plain torch operations"
        )
    return [r for r in capture.records if r.index in reached and r.index in last]


def check_heads(records: Sequence[AttentionRecord], method: Method) -> None:
    """Check that maps are means over heads where a model calls its heads one by one.

    Raises:
        UnsupportedAttentionError: if they are not.
    """
    apart = dict.fromkeys(
        r.module or "the forward function" for r in records if r.head_fraction != 1
    )
    if apart and method.needs_all_heads:
        raise UnsupportedAttentionError(
            f"{', '.join(apart)}: heads are called one by one, and with these options the map of "
            "a call is no mean over its heads (it is scaled, clamped, or a rule= of yours); use "
            "options without, or GenericAttention"
        )
