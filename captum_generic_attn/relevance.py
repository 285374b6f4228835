"""Relevance: what users keep of one explanation; maps of tokens to tokens, streams and calls.

`explanation` makes it from the sums of `additions`; it can be saved, loaded, copied and pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from types import MappingProxyType

from torch import Tensor

from captum_generic_attn import saved

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
        tensors: dict[tuple[object, ...], Tensor] = {}
        for (query, key), matrix in self.matrices.items():
            tensors["matrix", query, key] = matrix
        for name, rows in self.rows.items():
            tensors["rows", name] = rows
        calls = []
        for call in self.calls:
            plain = {f.name: getattr(call, f.name) for f in fields(Call)}
            for name, value in list(plain.items()):
                if isinstance(value, Tensor):
                    tensors["call", call.index, name] = plain.pop(name)
            calls.append(plain)
        streams = {
            name: [s.tokens, {part: [p.start, p.stop] for part, p in s.parts.items()}]
            for name, s in self.streams.items()
        }
        saved.write(path, _ENTRY, {"streams": streams, "calls": calls}, tensors)

    @staticmethod
    def load(path: str | PathLike[str]) -> Relevance:
        """Read what `save` wrote.

        Args:
            path: a file written by `save`.

        Returns:
            An equal `Relevance`, on the CPU.

        Raises:
            ValueError: if the file is no saved `Relevance`.
        """
        plain_parts, tensors = saved.read(path, _ENTRY)
        streams = {
            name: (size, {p: slice(*ends) for p, ends in parts.items()})
            for name, (size, parts) in plain_parts["streams"].items()
        }
        calls = []
        for plain in plain_parts["calls"]:
            for key, tensor in tensors.items():
                if key[:2] == ("call", plain["index"]):
                    plain[key[2]] = tensor
            calls.append(Call(**plain))
        return _rebuilt(
            streams,
            {str(k[1]): t for k, t in tensors.items() if k[0] == "rows"},
            tuple(calls),
            {(str(k[1]), str(k[2])): t for k, t in tensors.items() if k[0] == "matrix"},
        )


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
