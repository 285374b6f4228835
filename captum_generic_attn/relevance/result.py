"""`Relevance`: the result of one explanation, with token-to-token matrices, streams and calls.

It can be saved, loaded, copied and pickled.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from itertools import pairwise
from os import PathLike
from types import MappingProxyType

from torch import Tensor

from captum_generic_attn.files import tensors as saved

_ENTRY = "relevance"  # of a saved file


@dataclass(frozen=True)
class Stream:
    """A stream of tokens: how many, and which slice came from which input or parameter.

    Tokens that were merged from others stand behind them, in parts of their own; the name of such a
    part says where they are attended to, as `"x@layers.1"`.
    """

    tokens: int
    parts: Mapping[str, slice]


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of the forward pass.

    `used` says whether it counts, `reason` why not. `query_tokens` `[G, Nq]` and `key_tokens`
    `[G, Nk]` are positions in their streams (-1: padding), `G` the examples or their windows. With
    `keep_calls=True`, `map` `[G, Nq, Nk]` is Ā of eq. 5 and `per_head` `[G, H, Nq, Nk]` is
    `relu(∇A ⊙ A)` before its mean.
    """

    index: int
    module: str
    query_stream: str
    key_stream: str
    heads: int
    used: bool
    reason: str
    query_tokens: Tensor
    key_tokens: Tensor
    map: Tensor | None = field(default=None, repr=False)
    per_head: Tensor | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        state = "used" if self.used else f"not used: {self.reason}"
        shape = f"{self.query_tokens.shape[-1]}×{self.key_tokens.shape[-1]}"
        return (
            f"<Call {self.index} {self.module or 'forward'} {shape}, {self.heads} heads, {state}>"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Relevance:
    """Token-to-token relevance of one forward pass, from `GenericAttention.relevance`.

    `streams` maps names to `Stream`, `rows` maps the streams that the score reads directly to
    `[B, N]` weights of the explained rows, which sum to 1 (all 0 where the score has no gradient);
    `calls` lists every attention call in execution order. `matrices` holds what `matrix` reads,
    for each pair of streams that met: `[B, N, n]`, columns for the tokens that were not merged.

    Example:
        >>> import torch
        >>> from captum_generic_attn import GenericAttention
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> model = lambda tokens: layer(tokens)[:, 0]
        >>> relevance = GenericAttention(model).relevance(torch.rand(1, 4, 8), target=3)
        >>> relevance.matrix("tokens", "tokens").shape
        torch.Size([1, 4, 4])
        >>> relevance.rows["tokens"]
        tensor([[1., 0., 0., 0.]])
    """

    streams: Mapping[str, Stream]
    rows: Mapping[str, Tensor]
    calls: tuple[Call, ...]
    matrices: Mapping[tuple[str, str], Tensor]

    def matrix(self, query: str, key: str) -> Tensor:
        """R of the paper: what the tokens of `key` (columns) gave to those of `query` (rows).

        Args:
            query: name of a stream, or of a part of one.
            key: likewise.

        Returns:
            `[B, Nq, Nk]`, identity included, nothing zeroed; zero between streams that never met.
            Merged tokens have rows, but their columns are zero: what they got, they handed on to
            the tokens that they were merged from, in equal shares.

        Raises:
            KeyError: if there is no stream or part of that name; the message lists them.
        """
        query_stream, rows = self._find(query)
        key_stream, columns = self._find(key)
        like = self.matrices[query_stream, query_stream]
        full = like.new_zeros(*like.shape[:2], self.streams[key_stream].tokens)
        if (matrix := self.matrices.get((query_stream, key_stream))) is not None:
            full[..., : matrix.shape[-1]] = matrix
        return full[:, rows, columns].clone()

    def _find(self, name: str) -> tuple[str, slice]:
        if name in self.streams:
            return name, slice(None)
        for stream, content in self.streams.items():
            if name in content.parts:
                return stream, content.parts[name]
        known = ", ".join(
            f"{stream} (parts: {', '.join(content.parts)})"
            for stream, content in self.streams.items()
        )
        raise KeyError(f"no stream or part is named {name!r}; there are: {known}")

    def __repr__(self) -> str:
        lines = []
        for name, stream in self.streams.items():
            parts = ", ".join(f"{part} {s.start}:{s.stop}" for part, s in stream.parts.items())
            read = ", read by the score" if name in self.rows else ""
            lines.append(f"  {name}: {stream.tokens} tokens ({parts}){read}")
        used = sum(call.used for call in self.calls)
        batch = next(iter(self.matrices.values())).shape[0]
        calls = f"{used} of {len(self.calls)} attention calls used"
        return "\n".join([f"Relevance of {batch} examples, {calls}", *lines])

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles: read-only mappings know neither."""
        streams = {name: (s.tokens, dict(s.parts)) for name, s in self.streams.items()}
        return _rebuilt, (streams, dict(self.rows), self.calls, dict(self.matrices))

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a safetensors file.

        Args:
            path: where to; an existing file is replaced.
        """
        tensors: dict[saved.Key, Tensor] = {("matrix", *p): m for p, m in self.matrices.items()}
        tensors |= {("rows", name): weights for name, weights in self.rows.items()}
        calls = []
        for call in self.calls:
            plain = {f.name: getattr(call, f.name) for f in fields(Call)}
            plain["shape"] = [*call.query_tokens.shape, call.key_tokens.shape[-1]]
            plain["maps"] = [name for name in ("map", "per_head") if plain[name] is not None]
            for name in ("query_tokens", "key_tokens", "map", "per_head"):
                if (tensor := plain.pop(name)) is not None:
                    tensors["call", call.index, name] = tensor
            calls.append(plain)
        streams = {
            name: {
                "tokens": s.tokens,
                "columns": self.matrices[name, name].shape[-1],
                "parts": {part: [p.start, p.stop] for part, p in s.parts.items()},
            }
            for name, s in self.streams.items()
        }
        plain = {
            "examples": next(iter(self.matrices.values())).shape[0],
            "streams": streams,
            "matrices": [*self.matrices],
            "rows": [*self.rows],
            "calls": calls,
        }
        saved.write(path, _ENTRY, plain, tensors)

    @staticmethod
    def load(path: str | PathLike[str]) -> Relevance:
        """Read what `save` wrote.

        Args:
            path: a file written by `save`.

        Returns:
            An equal `Relevance`, on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no saved `Relevance`, or one of a newer format; the message
                says what was seen in it, and what was expected.
        """
        with saved.opened(path, _ENTRY) as file:
            return _read(file)


def _read(file: saved.SavedFile) -> Relevance:
    """What `Relevance.save` wrote, each value as it has to be."""
    found = file.plain.fields("examples", "streams", "matrices", "rows", "calls")
    examples, plain_calls = found[0].whole(1), found[4].entries()
    streams = {name: _read_stream(stream) for name, stream in found[1].items().items()}
    if not streams:
        raise found[1].wrong("at least one stream")
    tokens = {name: size for name, (size, _, _) in streams.items()}
    columns = {name: size for name, (_, size, _) in streams.items()}
    pairs = _read_pairs(found[2], streams)
    named = {part for name in ["", *streams] for part in name.split("+")}
    calls = [_read_call(call, file, tokens, named) for call in plain_calls]
    if not all(one.index < other.index for one, other in pairwise(calls)):
        raise found[4].wrong("calls in the order of their indices")
    return _rebuilt(
        {name: (size, parts) for name, (size, _, parts) in streams.items()},
        {
            name: file.tensor(("rows", name), saved.FLOATS, (examples, tokens[name]))
            for name in (row.text(among=streams) for row in found[3].entries())
        },
        tuple(calls),
        {
            (query, key): file.tensor(
                ("matrix", query, key), saved.FLOATS, (examples, tokens[query], columns[key])
            )
            for query, key in pairs
        },
    )


def _read_pairs(matrices: saved.Value, streams: Mapping[str, object]) -> list[tuple[str, ...]]:
    """The (query stream, key stream) pairs of the matrices."""
    pairs = [tuple(end.text(among=streams) for end in p.entries()) for p in matrices.entries()]
    if {*map(len, pairs)} != {2} or not {(name, name) for name in streams} <= {*pairs}:
        raise matrices.wrong("pairs of streams, and each stream with itself")
    return pairs


def _read_stream(stream: saved.Value) -> tuple[int, int, dict[str, slice]]:
    """Tokens, columns of matrices, parts: these lie side by side and hold all tokens."""
    size, columns, parts = stream.fields("tokens", "columns", "parts")
    tokens = size.whole(1)
    slices: dict[str, slice] = {}
    start = 0
    for name, ends in parts.items().items():
        numbers = [end.whole(0, tokens) for end in ends.entries()]
        if len(numbers) != 2 or numbers[0] != start or numbers[1] <= start:
            raise ends.wrong(f"first token and the one behind the last: {start}, and a greater one")
        slices[name] = slice(*numbers)
        start = numbers[1]
    if start != tokens:
        raise parts.wrong(f"parts of all {tokens} tokens")
    return tokens, columns.whole(1, tokens), slices


def _read_call(
    call: saved.Value, file: saved.SavedFile, tokens: Mapping[str, int], named: AbstractSet[str]
) -> Call:
    """A call: its streams are those of the file, its tokens theirs, its maps of its size."""
    index, module, query, key, heads, used, reason, shape, maps = call.fields(
        "index", "module", "query_stream", "key_stream", "heads", "used", "reason", "shape", "maps"
    )
    sizes = [axis.whole(0) for axis in shape.entries()]
    if len(sizes) != 3:
        raise shape.wrong("the numbers of groups, queries and keys")
    if used.flag() == bool(reason.text()):
        raise reason.wrong("the reason of a call that is not used, and no text where it is")
    if query.text() or used.flag():  # refused calls have no streams
        query.text(among=tokens)
    if not named >= {*key.text().split("+")}:  # keys of several streams name them all
        raise key.wrong(f"{reprlib.repr([*tokens])}, one or several with + between them")
    groups, queries, keys = sizes
    number, largest = index.whole(0), max(tokens.values())
    shapes = {"map": (groups, queries, keys), "per_head": (groups, heads.whole(0), queries, keys)}
    kept = [name.text(among=shapes) for name in maps.entries()]
    return Call(
        number, module.text(), query.text(), key.text(), heads.whole(0), used.flag(),
        reason.text(),
        file.positions(
            ("call", number, "query_tokens"), (groups, queries), tokens.get(query.text(), largest)
        ),
        file.positions(
            ("call", number, "key_tokens"), (groups, keys), tokens.get(key.text(), largest)
        ),
        **{
            name: file.tensor(("call", number, name), saved.FLOATS, shapes[name]) for name in kept
        },
    )  # fmt: skip


def _rebuilt(
    streams: Mapping[str, tuple[int, dict[str, slice]]],
    rows: dict[str, Tensor],
    calls: tuple[Call, ...],
    matrices: dict[tuple[str, str], Tensor],
) -> Relevance:
    """A `Relevance` from plain containers."""
    return Relevance(
        MappingProxyType(
            {name: Stream(size, MappingProxyType(parts)) for name, (size, parts) in streams.items()}
        ),
        MappingProxyType(rows),
        calls,
        MappingProxyType(matrices),
    )
