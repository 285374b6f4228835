"""The maps of attention calls as arrays of one example, indexed by the tokens of its streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_generic_attn.visualization.arrays import numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from captum_generic_attn.relevance.result import Call, Relevance


def check_kept(relevance: Relevance) -> None:
    """Check that the relevance has a map of each head.

    Raises:
        ValueError: it has none. The message says which option keeps them.
    """
    used = [call for call in relevance.calls if call.used]
    if not used:
        raise ValueError("no attention call of this relevance was used: there is nothing to draw")
    if all(call.map is None for call in used):
        raise ValueError(
            "the maps of the attention calls were not kept: ask for relevance(..., keep_calls=True)"
        )
    if any(call.per_head is None for call in used):
        raise ValueError(
            "these attention calls have no map for each head: with rule= a layer has one map"
        )


def chosen_calls(relevance: Relevance, calls: Iterable[int] | None) -> list[Call]:
    """Select calls by index; `None` selects all calls that were used.

    Raises:
        ValueError: a selected call was not used, or no call is selected.
        IndexError: there is no such call.
    """
    if calls is None:
        return [call for call in relevance.calls if call.used]
    known = {call.index: call for call in relevance.calls}
    chosen = []
    for index in calls:
        if index not in known:
            raise IndexError(f"there is no call {index}; there are 0 … {max(known)}")
        if not known[index].used:
            raise ValueError(f"{_named(known[index])} was not used: {known[index].reason}")
        chosen.append(known[index])
    if not chosen:
        raise ValueError("calls= names no attention call: there is nothing to draw")
    return chosen


def check_one_stream(calls: Sequence[Call]) -> None:
    """Check that a query position denotes the same token in all calls.

    Raises:
        ValueError: the calls have queries of several streams.
    """
    indices: dict[str, list[int]] = {}
    for call in calls:
        indices.setdefault(call.query_stream, []).append(call.index)
    if len(indices) > 1:
        listed = "; ".join(f"{name!r}: {own}" for name, own in indices.items())
        raise ValueError(
            f"query= is a position in one stream, but these calls have queries of {len(indices)}; "
            f"choose calls= of one of them: {listed}"
        )


def _groups(relevance: Relevance, call: Call, example: int) -> slice:
    """The groups of a call that belong to an example (its windows), which are consecutive."""
    examples = next(iter(relevance.matrices.values())).shape[0]
    if not 0 <= example < examples:
        raise IndexError(f"there is no example {example}; there are 0 … {examples - 1}")
    windows, rest = divmod(len(call.query_tokens), examples)
    if rest:
        raise ValueError(
            f"{_named(call)} has {len(call.query_tokens)} groups of tokens for {examples} examples "
            "with different numbers of windows: compute the relevance of one example alone"
        )
    return slice(example * windows, (example + 1) * windows)


def sums_of_heads(relevance: Relevance, calls: Sequence[Call], example: int) -> NDArray[np.float64]:
    """The sum of each head's map, `[calls, heads]`; NaN where a call has no such head."""
    sums = np.full((len(calls), max(call.heads for call in calls)), np.nan)
    for row, call in zip(sums, calls, strict=True):
        if call.per_head is not None:
            own = call.per_head[_groups(relevance, call, example)]
            row[: call.heads] = numbers(own).sum((0, 2, 3))
    return sums


class CallMaps(NamedTuple):
    """The maps of a call for one example.

    `queries` `[n]` and `keys` `[m]` are positions in their streams. `values` `[1 + H, n, m]` holds
    the mean over heads, then each head.
    """

    queries: Tensor
    keys: Tensor
    values: NDArray[np.float64]


def maps_of(relevance: Relevance, call: Call, example: int) -> CallMaps:
    """The maps of one example, with its windows combined in the order of the streams."""
    assert call.map is not None and call.per_head is not None  # noqa: S101, PT018 - checked before
    groups = _groups(relevance, call, example)
    maps = torch.cat([call.map[groups].unsqueeze(1), call.per_head[groups]], 1).cpu().double()
    key_tokens = call.key_tokens[groups]
    if call.key_stream not in relevance.streams:
        # Keys of several streams have several sets of positions: keep the order of the call.
        key_tokens = torch.arange(key_tokens.shape[1]).expand_as(key_tokens)
    queries, row = torch.unique(call.query_tokens[groups], return_inverse=True)
    keys, column = torch.unique(key_tokens, return_inverse=True)
    values = maps.new_zeros(maps.shape[1], len(queries), len(keys))
    for window, its_rows, its_columns in zip(maps, row, column, strict=True):
        values[:, its_rows[:, None], its_columns] += window
    tokens, attended = queries >= 0, keys >= 0  # negative positions are padding
    return CallMaps(queries[tokens], keys[attended], values[:, tokens][:, :, attended].numpy())


def of_keys(
    relevance: Relevance, call: Call, maps: CallMaps, query: int, key: str | None,
    grid: tuple[int, int] | None, boxes: NDArray[np.float64] | None,
) -> NDArray[np.float64]:  # fmt: skip
    """The row of one query in the maps: `[1 + H, rows, columns]`, or `[1 + H, R]` for regions."""
    if query not in maps.queries:
        raise ValueError(
            f"{_named(call)} has no query {query}: its queries are the tokens "
            f"{int(maps.queries[0])} … {int(maps.queries[-1])} of {call.query_stream!r}; choose "
            "calls of one stream with calls="
        )
    if call.key_stream not in relevance.streams:
        raise ValueError(
            f"{_named(call)} has keys of several streams ({call.key_stream}), which cannot be "
            "drawn on one image: choose other calls with calls="
        )
    stream = relevance.streams[call.key_stream]
    parts = ", ".join(f"{name!r} ({s.stop - s.start})" for name, s in stream.parts.items())
    if key is not None and key not in stream.parts:
        raise ValueError(
            f"{_named(call)} has no part {key!r} among its keys, which have {parts}; choose calls "
            "of one stream with calls="
        )
    part = slice(0, stream.tokens) if key is None else stream.parts[key]
    size = part.stop - part.start
    places = grid[0] * grid[1] if grid is not None else len(boxes if boxes is not None else ())
    if size != places:
        what = f"a grid of {grid[0]} × {grid[1]} has" if grid is not None else "there are boxes for"
        raise ValueError(
            f"{what} {places} tokens, but {_named(call)} has {size} keys: select a part of them "
            f"with key=, one of {parts}"
        )
    inside = (maps.keys >= part.start) & (maps.keys < part.stop)
    if not inside.any():
        raise ValueError(
            f"{_named(call)} has no key in {key or call.key_stream!r}: choose other calls with "
            "calls="
        )
    found = np.zeros((len(maps.values), size))
    row = maps.values[:, int((maps.queries == query).nonzero())]
    found[:, maps.keys[inside].numpy() - part.start] = row[:, inside.numpy()]
    return found if grid is None else found.reshape(-1, *grid)


def _named(call: Call) -> str:
    return f"call {call.index} ({call.module or 'the forward function'})"
