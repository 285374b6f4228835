"""Relevance of a tape by the paper's equations, one example and one matrix at a time.

Nothing here uses the package. `R - I` is kept over all tokens of all streams at once, `[T, T]` for
each example: the sum of what the calls add that a state of tokens depends on. The identity is left
out so that small relevance keeps its digits, which equation 8 makes large.

Source: Chefer, Gur, Wolf, ICCV 2021 (arXiv 2103.15679), eq. 5 to 11. Where the paper is silent:
explained rows are those tokens whose row in the output of some call has a gradient with queries,
keys and values of all calls held constant, each read after the calls where it has, all with equal
weight within their stream; the only explained row of a stream gives its own token nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laws.random_programs.tape import Call, Tape

Follow = Callable[[Tape], Tensor]


@dataclass(frozen=True)
class Mistakes:
    """Deliberate mistakes, so that tests can see that the comparison tells them apart."""

    transposed: bool = False
    heads_added: bool = False
    unnormalized: bool = False
    last_call_only: bool = False


NO_MISTAKES = Mistakes()


def score(output: Tensor, target: Sequence[tuple[int, ...]]) -> Tensor:
    """The sum of the explained scores, one for each example."""
    return torch.stack([output[(i, *t)] for i, t in enumerate(target)]).sum()


def relevance(
    follow: Follow, target: Sequence[tuple[int, ...]], sizes: Sequence[int],
    mistakes: Mistakes = NO_MISTAKES,
) -> list[Tensor]:  # fmt: skip
    """The values of the elements of each input, `[B, size]`.

    Args:
        follow: runs the program on a tape and returns its output.
        target: the index of the explained score of each example.
        sizes: how many elements of each input can have a value.
        mistakes: what to do wrong.

    Raises:
        LostTokensError: if an attention call reads what are no tokens any more.
    """
    tape = Tape(len(target))
    gradients = torch.autograd.grad(
        score(follow(tape), target), [call.P for call in tape.calls], allow_unused=True
    )
    maps = [
        attention_map(call.P.detach(), gradient, mistakes)
        for call, gradient in zip(tape.calls, gradients, strict=True)
    ]
    live = live_rows(follow, target)
    values = [torch.zeros(len(target), size, dtype=torch.float64) for size in sizes]
    for example in range(len(target)):
        additions = additions_of(tape, maps, example, mistakes)
        for origin, value in zip(
            tape.origins, read_out(tape, additions, live, example, mistakes), strict=True
        ):
            if origin is not None:
                values[origin[0]][example, origin[1]] += value
    return values


def attention_map(P: Tensor, gradient: Tensor | None, mistakes: Mistakes = NO_MISTAKES) -> Tensor:
    """Eq. 5, `[G, nq, nk]`: the mean over heads of the positive part of gradient times P."""
    total = torch.zeros_like(P[:, 0])
    if gradient is None:
        return total
    for head in range(P.shape[1]):
        product = P[:, head] * gradient[:, head]
        total += torch.where(product > 0, product, 0.0)
    total = total if mistakes.heads_added else total / P.shape[1]
    if mistakes.transposed and P.shape[-1] == P.shape[-2]:
        return total.transpose(-1, -2)
    return total


def live_rows(follow: Follow, target: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """`[G, nq]` for each call: whether the score reads the row along everything but attention."""
    tape = Tape(len(target), blocked=True)
    total = score(follow(tape), target)
    if not total.requires_grad:
        return [torch.zeros(call.queries.shape, dtype=torch.bool) for call in tape.calls]
    outputs = [call.out for call in tape.calls]
    gradients = torch.autograd.grad(total, outputs, allow_unused=True)
    return [
        torch.zeros(call.queries.shape, dtype=torch.bool)
        if gradient is None
        else (gradient != 0).any(-1).any(1)
        for call, gradient in zip(tape.calls, gradients, strict=True)
    ]


# -- equations 6 to 11 ------------------------------------------------------------------------


def additions_of(
    tape: Tape, maps: Sequence[Tensor], example: int, mistakes: Mistakes
) -> list[Tensor]:
    """What each call adds to R, `[T, T]`, in the order of execution."""
    additions: list[Tensor] = []
    for call, its_map in zip(tape.calls, maps, strict=True):
        keys = learnt(tape, additions, call.key_ancestors)
        queries = learnt(tape, additions, call.query_ancestors)
        total = torch.zeros_like(keys)
        dense = laid_out(tape, call, its_map, example)
        for stream in call.key_streams:
            total += addition(call, dense, stream, queries, keys, mistakes)
        additions.append(total)
    return additions


def learnt(tape: Tape, additions: Sequence[Tensor], ancestors: frozenset[int]) -> Tensor:
    """R - I of a tensor that depends on these calls."""
    total = torch.zeros(len(tape.origins), len(tape.origins), dtype=torch.float64)
    for index in sorted(ancestors):
        total = total + additions[index]
    return total


def laid_out(tape: Tape, call: Call, its_map: Tensor, example: int) -> Tensor:
    """The map of a call over all tokens, `[T, T]`; windows lie at their tokens."""
    size = len(tape.origins)
    dense = torch.zeros(size, size, dtype=torch.float64)
    for group in (call.examples == example).nonzero().flatten().tolist():
        for m, query in enumerate(call.queries[group].tolist()):
            for n, key in enumerate(call.keys[group].tolist()):
                dense[query, key] += its_map[group, m, n]
    return dense


def addition(
    call: Call, dense: Tensor, stream: frozenset[int], queries: Tensor, keys: Tensor,
    mistakes: Mistakes,
) -> Tensor:  # fmt: skip
    """Eq. 6 and 7 of self-attention; eq. 10 and 11 for one stream of the keys."""
    columns = sorted(stream)
    part = torch.zeros_like(dense)
    part[:, columns] = dense[:, columns]
    update = part + part @ keys
    if stream == call.query_stream:
        return update
    own = sorted(call.query_stream)
    update[:, columns] = 0
    crossed = bar(queries, own, mistakes).T @ dense[own][:, columns] @ bar(keys, columns, mistakes)
    for row, values in zip(own, crossed, strict=True):
        update[row, columns] = values
    return update


def bar(change: Tensor, stream: Sequence[int], mistakes: Mistakes) -> Tensor:
    """Eq. 8 and 9: the rows of R - I, each divided by its sum, plus I; a row of zeros stays one."""
    own = change[list(stream)][:, list(stream)]
    result = torch.eye(len(stream), dtype=torch.float64)
    for row, values in enumerate(own):
        if mistakes.unnormalized:
            result[row] += values
        elif values.sum() > 0:
            result[row] += values / values.sum()
    return result


# -- read-out ---------------------------------------------------------------------------------


def read_out(
    tape: Tape, additions: Sequence[Tensor], live: Sequence[Tensor], example: int,
    mistakes: Mistakes,
) -> Tensor:  # fmt: skip
    """The values of all tokens, `[T]`: explained rows of R - I, equally weighted."""
    read = calls_that_are_read(tape, live, example)
    values = torch.zeros(len(tape.origins), dtype=torch.float64)
    for stream in tape.streams():
        rows = [token for token in sorted(stream) if token in read]
        for token in rows:
            row = torch.zeros_like(values)
            for index in read[token][-1:] if mistakes.last_call_only else read[token]:
                row = row + additions[index][token]
            if len(rows) == 1:
                row[token] = 0
            values += row / len(rows)
    return values


def calls_that_are_read(tape: Tape, live: Sequence[Tensor], example: int) -> dict[int, list[int]]:
    """For each explained token the calls in which it asked and whose row the score reads."""
    read: dict[int, list[int]] = {}
    for call, rows in zip(tape.calls, live, strict=True):
        for group in (call.examples == example).nonzero().flatten().tolist():
            for token, lives in zip(
                call.queries[group].tolist(), rows[group].tolist(), strict=True
            ):
                if lives:
                    read.setdefault(token, []).append(call.index)
    return read
