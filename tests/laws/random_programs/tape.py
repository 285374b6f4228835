"""What a program writes down while it runs in its plainest form: its tokens and attention calls.

Token numbers count through all tokens of a program, the same for each example. Nothing here knows
an equation; `reference` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class LostTokensError(Exception):
    """An attention call reads positions that are no tokens any more: there is no reference."""


@dataclass(frozen=True, eq=False)
class Book:
    """Which token stands at each position of a tensor `[G, n, D]`.

    `tokens` is `[G, n]`, or `None` once positions are mixtures; `examples` is `[G]`, the example of
    each row (windows are rows of their own). `ancestors` are the calls that the tensor depends on
    with no other call between.
    """

    tokens: Tensor | None
    examples: Tensor
    ancestors: frozenset[int] = frozenset()

    def moved(self, tokens: Tensor | None) -> Book:
        return replace(self, tokens=tokens)

    def after(self, *calls: frozenset[int]) -> Book:
        return replace(self, ancestors=self.ancestors.union(*calls))


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call, `P` `[G, H, nq, nk]` its probabilities and `out` `[G, H, nq, d]`.

    `query_stream` are the tokens of the stream that asks and `key_streams` those of each stream
    that is asked, as streams were at the time; self-attention has the same one on both sides.
    """

    index: int
    P: Tensor
    out: Tensor
    queries: Tensor
    keys: Tensor
    examples: Tensor
    query_ancestors: frozenset[int]
    key_ancestors: frozenset[int]
    query_stream: frozenset[int]
    key_streams: tuple[frozenset[int], ...]


class Tape:
    """The calls and tokens of one run.

    `blocked`: queries, keys and values are held constant, so that gradients at the outputs of the
    calls are those of the score along everything but attention.
    """

    def __init__(self, examples: int, *, blocked: bool = False) -> None:
        self.examples = examples
        self.blocked = blocked
        self.calls: list[Call] = []
        self.origins: list[tuple[int, int] | None] = []
        self._stream: list[int] = []

    # -- tokens -------------------------------------------------------------------------------

    def born(self, origins: Sequence[tuple[int, int] | None]) -> Book:
        """New tokens, a stream of their own: for each the input and position that it is made of."""
        first = len(self.origins)
        self.origins.extend(origins)
        self._stream.extend([first] * len(origins))
        tokens = torch.arange(first, first + len(origins)).expand(self.examples, -1)
        return Book(tokens, torch.arange(self.examples))

    def parameters(self, count: int) -> Book:
        return self.born([None] * count)

    def streams(self) -> list[frozenset[int]]:
        """The streams as they are now."""
        numbers = dict.fromkeys(self._stream)
        return [self._members(number) for number in numbers]

    def _members(self, number: int) -> frozenset[int]:
        return frozenset(t for t, own in enumerate(self._stream) if own == number)

    def _join(self, numbers: set[int]) -> int:
        kept = min(numbers)
        self._stream = [kept if own in numbers else own for own in self._stream]
        return kept

    def _meet(
        self, queries: Tensor, keys: Tensor
    ) -> tuple[frozenset[int], tuple[frozenset[int], ...]]:
        """Who asks is one stream; keys join it if some of them are of it."""
        own = self._join({self._stream[t] for t in queries.flatten().tolist()})
        asked = list(dict.fromkeys(self._stream[t] for t in keys.flatten().tolist()))
        if own in asked:
            own = self._join({own, *asked})
            return self._members(own), (self._members(own),)
        return self._members(own), tuple(self._members(number) for number in asked)

    # -- calls --------------------------------------------------------------------------------

    def attend(
        self, P: Tensor, value: Tensor, asking: Book, asked: Book
    ) -> tuple[Tensor, frozenset[int]]:
        """Note a call and return its output `P V` and the ancestors of that: the call alone.

        Equation 6 adds because a residual does: what goes round the call keeps its own ancestors.
        """
        if asking.tokens is None or asked.tokens is None:
            raise LostTokensError
        if self.blocked:
            P, value = P.detach(), value.detach()
        elif P.requires_grad:
            P.retain_grad()
        out = P @ value
        if self.blocked:
            out.requires_grad_()
        query_stream, key_streams = self._meet(asking.tokens, asked.tokens)
        index = len(self.calls)
        self.calls.append(
            Call(
                index, P, out, asking.tokens, asked.tokens, asking.examples,
                asking.ancestors, asked.ancestors, query_stream, key_streams,
            )
        )  # fmt: skip
        return out, frozenset([index])
