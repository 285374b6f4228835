"""Which attention calls count: what the user selects, what a score reaches, what a method reads.

Called by `explanation` for each score; `attribution` asks what `layers=` selects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from captum_generic_attn.capture import (
    AttentionRecord,
    Capture,
    Reached,
    UnsupportedAttentionError,
)
from captum_generic_attn.method import Method
from captum_generic_attn.rows import RowsOption

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


def unused_calls(capture: Capture, reached: Reached, options: Options) -> dict[int, str]:
    """Why calls do not count: not selected, not reached, before `start_layer`."""
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
            pair = record.query_stream, record.key_stream
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
            for layer in indices[:-1]:
                for call in layers[layer]:
                    unused.setdefault(call, "not the last of its pair of streams")
    return unused


def final_calls(capture: Capture, reached: Reached) -> set[int]:
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
