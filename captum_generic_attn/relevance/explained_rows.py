"""The explained rows of relevance: those that the score is computed from, or those of `rows=`.

A row of `R` belongs to a token. The rows with a non-zero gradient at a stream's last attention call
are those that the score reads (CLS, EOS, the last token, all tokens).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord, Capture
from captum_generic_attn.capture.blocks import computing_dtype
from captum_generic_attn.tokens import TokenStream

Rows = int | Sequence[int] | Tensor | None
RowsOption = Rows | Mapping[str, Rows]


def explained_rows(
    record: AttentionRecord, live: Tensor, capture: Capture, examples: int
) -> Tensor:
    """`[B, N]` True for the query rows of a call whose gradient is not zero.

    Args:
        record: the call.
        live: `[G, Nq]` True where a query's gradient is not zero in some head.
        capture: the forward pass.
        examples: the batch size.

    Raises:
        ValueError: if one of them is padding.
    """
    rows = placed(record, live, capture, examples)
    if bool(rows[:, -1].any()):
        raise ValueError(
            f"the score is read at a position of {record.module or 'the forward function'} that "
            "holds padding, no token of an input or a parameter"
        )
    return rows[:, :-1]


def placed(record: AttentionRecord, live: Tensor, capture: Capture, examples: int) -> Tensor:
    """`[B, N + 1]` True at the places of some queries `[G, Nq]` in their stream, padding last."""
    stream = capture.streams.of(record.query_tokens)
    places = capture.streams.positions(record.query_tokens).to(live.device)
    rows = live.new_zeros(examples, stream.size + 1, dtype=torch.int32)
    owners = record.examples.to(live.device)[:, None].expand_as(places)
    rows.index_put_((owners, places), live.to(rows.dtype), accumulate=True)
    return rows > 0


def equal_weights(explained: Tensor, score: Tensor) -> Tensor:
    """`[B, N]` weights, equal over the explained rows of an example and summing to 1."""
    weights = explained.to(computing_dtype(score))
    return weights / weights.sum(-1, keepdim=True).clamp(min=1)


def given_rows(
    capture: Capture, automatic: Sequence[str], option: RowsOption, examples: int, like: Tensor
) -> dict[str, Tensor]:
    """`[B, N]` weights of the rows that the user chose, by stream.

    Args:
        capture: the forward pass.
        automatic: the streams that the score reads directly; a single choice is for these.
        option: the user's `rows=`; a mapping is for the streams that it names.
        examples: the batch size.
        like: a tensor of the precision and device of the weights.

    Raises:
        ValueError: if the option does not fit the streams.
        TypeError: if it is of no accepted form.
    """
    if option is None:
        return {}
    streams = {s.name: s for s in capture.streams}
    given = option if isinstance(option, Mapping) else dict.fromkeys(automatic or streams, option)
    if unknown := [name for name in given if name not in streams]:
        raise ValueError(f"rows= names {unknown}, but the streams are: {', '.join(streams)}")
    return {
        name: _row_weights(streams[name], choice, examples).to(like)
        for name, choice in given.items()
        if choice is not None
    }


def all_rows(
    capture: Capture, names: Collection[str], examples: int, like: Tensor
) -> dict[str, Tensor]:
    """`[B, N]` equal weights of all rows of some streams."""
    return {
        stream.name: like.new_full((examples, stream.size), 1 / stream.size)
        for stream in capture.streams
        if stream.name in names
    }


def without_gradient(rows: Mapping[str, Tensor], examples: int) -> list[int]:
    """The examples with no explained row `[B, N]`: their score has no gradient."""
    read = torch.zeros(examples, dtype=torch.bool)
    for weights in rows.values():
        read |= (weights != 0).any(-1).cpu()
    found: list[int] = (~read).nonzero().flatten().tolist()
    return found


def warn_of_no_gradient(found: Sequence[int], examples: int) -> None:
    """Warn of the examples, of `examples`, whose scores have no gradient."""
    _warn_of_scores(
        found, examples,
        "has no gradient at any attention call (a zero head, or a score that does not depend on "
        "attention): its attributions are zero",
    )  # fmt: skip


def warn_of_zero_scores(zero: Sequence[int], examples: int) -> None:
    """Warn of the examples, of `examples`, whose scores are 0 where relevance starts from them."""
    _warn_of_scores(
        zero, examples,
        "is exactly 0, and LRP with these rules shares the score out: there is nothing to share, "
        "its relevance is zero",
    )  # fmt: skip


def _warn_of_scores(found: Sequence[int], examples: int, why: str) -> None:
    if found:
        which = "the score" if len(found) == examples else f"the score of example {[*found]}"
        warnings.warn(f"{which} {why}", UserWarning, stacklevel=3)


def _row_weights(stream: TokenStream, choice: Rows, examples: int) -> Tensor:
    """`[B, N]` weights summing to 1 from any form of `rows=`."""
    forms = (
        f"for stream {stream.name!r} of {stream.size} tokens and {examples} examples, rows= takes "
        "an int, a list of ints, [B] or [B, k] indices, or [B, N] floating weights"
    )
    if isinstance(choice, Tensor) and (choice.dtype == torch.bool or choice.is_complex()):
        raise TypeError(f"rows= holds {choice.dtype}: {forms}")
    if isinstance(choice, Tensor) and choice.is_floating_point():
        weights = _checked_weights(choice, (examples, stream.size), forms)
    else:
        index = _row_indices(choice, examples, forms)
        if bool(((index < -stream.size) | (index >= stream.size)).any()):
            raise ValueError(f"rows= holds an index out of range: {forms}")
        weights = torch.zeros(examples, stream.size, dtype=torch.float64)
        weights.scatter_(1, index % stream.size, 1.0)
    return weights / weights.sum(-1, keepdim=True)


def _checked_weights(choice: Tensor, shape: tuple[int, int], forms: str) -> Tensor:
    if choice.shape != shape:
        raise ValueError(f"rows= has shape {tuple(choice.shape)}: {forms}")
    weights = choice.detach().double()
    if not bool((weights >= 0).all()) or not bool(0 < weights.sum(-1).amin() < math.inf):
        raise ValueError(
            "weights in rows= must be numbers, neither negative nor infinite, and not all zero for "
            "an example"
        )
    return weights


def _row_indices(choice: Rows, examples: int, forms: str) -> Tensor:
    """`[B, k]` indices, negative ones from the end."""
    if isinstance(choice, Tensor) and choice.ndim > 0:
        index = choice.detach().cpu().long()
        index = index[:, None] if index.ndim == 1 else index
        if index.ndim != 2 or len(index) != examples:
            raise ValueError(f"rows= has shape {tuple(choice.shape)}: {forms}")
        return index
    if isinstance(choice, (int, Tensor)) and not isinstance(choice, bool):
        return torch.full((examples, 1), int(choice))
    if isinstance(choice, Sequence) and choice and all(type(i) is int for i in choice):
        return torch.tensor(list(choice)).expand(examples, -1)
    raise TypeError(f"rows={choice!r} is of no accepted form: {forms}")
