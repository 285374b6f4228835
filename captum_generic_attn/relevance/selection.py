"""Which attention calls count: what the user selects, what a score reaches, what a method reads.

Called by `explanation` for each score; `attribution` asks what `layers=` selects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from captum_generic_attn.capture import AttentionRecord, Capture, Reached
from captum_generic_attn.errors import UnsupportedAttentionError
from captum_generic_attn.relevance.explained_rows import RowsOption
from captum_generic_attn.relevance.method import Method

Layers = str | nn.Module | Sequence[str | nn.Module] | None


@dataclass(frozen=True)
class Options:
    """What the user chose in the constructor of an attribution method."""

    layers: Layers
    start_layer: int
    rows: RowsOption
    method: Method


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


def unused_calls(
    capture: Capture, reached: Reached, options: Options,
    states: Mapping[str, Sequence[frozenset[int]]],
) -> dict[int, str]:  # fmt: skip
    """Why calls do not count: not selected, not reached, before `start_layer`.

    Where a method takes the last call of a pair of streams alone, it is the last of each of the
    `states` in which rows of a stream are read; by default there is one state, after all calls.
    """
    modules = selected(capture, options.layers)
    unused: dict[int, str] = {}
    pairs: dict[tuple[str, str], list[int]] = {}
    across: set[tuple[str, str]] = set()
    layers: dict[int, list[int]] = {}
    for record in capture.records:
        if record.module not in modules:
            unused[record.index] = "not in layers"
        elif record.index not in reached:
            unused[record.index] = "does not reach the score"
        else:
            pair = _pair(record)
            if record.meeting.crosses:
                across.add(pair)
            if record.layer not in layers:
                pairs.setdefault(pair, []).append(record.layer)
            layers.setdefault(record.layer, []).append(record.index)
    start = options.start_layer
    if not all(-len(indices) <= start < len(indices) for indices in pairs.values()):
        counts = ", ".join(f"{len(i)} from {k} to {q}" for (q, k), i in pairs.items())
        raise ValueError(f"start_layer={start} is out of range; attention calls: {counts}")
    last = options.method.last
    for pair, indices in pairs.items():
        for layer in indices[: start % len(indices)]:
            unused.update(dict.fromkeys(layers[layer], "before start_layer"))
        if last == "every" or (last == "crossing" and pair in across):
            kept = {
                max((i for i in indices if not state.isdisjoint(layers[i])), default=-1)
                for state in states.get(pair[0], [frozenset(reached)])
            }
            for layer in indices:
                for call in layers[layer] if layer not in kept else ():
                    unused.setdefault(call, "not the last of its pair of streams")
    return unused


def counting(
    used: Sequence[AttentionRecord], method: Method, state: frozenset[int]
) -> frozenset[int]:
    """The calls of a state that a method reads, which may be the last of each pair alone."""
    if method.last == "no":
        return state
    across = {_pair(r) for r in used if r.meeting.crosses}
    last: dict[tuple[str, str], int] = {}
    own = [
        r for r in used
        if r.index in state and (method.last == "every" or _pair(r) in across)
    ]  # fmt: skip
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
        UnsupportedAttentionError: if it depends on calls in a way that could not be followed.
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
    """See that a method's maps are means over heads where a model calls its heads one by one.

    Raises:
        UnsupportedAttentionError: if they are not.
    """
    apart = dict.fromkeys(r.module or "the forward function" for r in records if r.share != 1)
    if apart and method.needs_all_heads:
        raise UnsupportedAttentionError(
            f"{', '.join(apart)}: heads are called one by one, and with these options the map of "
            "a call is no mean over its heads (it is scaled, clamped, or a rule= of yours); use "
            "options without, or GenericAttention"
        )
