"""Relevance: the equations of `rules` over the attention calls of one forward pass.

A residual stream is a sum, and each rule has the form `R += addition`. So each call gets the
addition that it makes, and the relevance of a state is the identity plus the additions of the
calls that the state depends on: parallel branches read the same old state by themselves.

`attribution` fills `Additions` and reads the answer; `Relevance` is what users keep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from types import MappingProxyType

import torch
from torch import Tensor

from captum_generic_attn.rules import self_attention_update

_METADATA = "relevance"  # of a saved file: all that is no tensor


class Additions:
    """What each attention call adds to the relevance of its stream.

    Relevance is kept without its identity (`R − I`), so nothing cancels; with `aggregate=False`
    (the authors' ablation, every `+=` an `=`) it is `R` of the latest call itself.
    """

    def __init__(self, *, aggregate: bool = True) -> None:
        self._aggregate = aggregate
        self._added: dict[int, Tensor] = {}
        self._streams: dict[int, str] = {}
        self._states: dict[frozenset[int], Tensor] = {}

    def add(
        self, index: int, stream: str, attention_map: Tensor, ancestors: frozenset[int]
    ) -> None:
        """Eq. 6: a self-attention call, with the map of eq. 5 and the ancestors of its keys."""
        before = self.state(stream, ancestors)
        if before is None:
            update = attention_map
        else:
            update = self_attention_update(attention_map, before)
            if self._aggregate:
                update = update + attention_map
        self._added[index] = update
        self._streams[index] = stream

    def state(self, stream: str, ancestors: frozenset[int]) -> Tensor | None:
        """`R − I` (`R` without aggregation) of a state of a stream; `None` if `R = I`."""
        own = frozenset(i for i in ancestors if self._streams.get(i) == stream)
        if not own:
            return None
        last = max(own)
        if not self._aggregate:
            return self._added[last]
        if own not in self._states:
            before = self.state(stream, own - {last})
            added = self._added[last]
            self._states[own] = added if before is None else before + added
        return self._states[own]

    def matrix(self, stream: str, ancestors: frozenset[int]) -> Tensor | None:
        """R of the paper, `[B, N, N]`, identity included; `None` if it is the identity."""
        state = self.state(stream, ancestors)
        if state is None or not self._aggregate:
            return state
        return state + torch.eye(state.shape[-1], dtype=state.dtype, device=state.device)


def read_out(state: Tensor | None, rows: Tensor) -> Tensor:
    """Values of a stream's tokens: the explained rows of `R − I`, weighted.

    Args:
        state: `[B, N, N]` from `Additions.state`, or `None` for the identity.
        rows: `[B, N]` weights of the explained rows.

    Returns:
        `[B, N]`. Where an example has exactly one explained row, that token's own entry is 0.
    """
    if state is None:
        return torch.zeros_like(rows)
    values = (rows.unsqueeze(1) @ state).squeeze(1)
    single = (rows != 0).sum(-1, keepdim=True) == 1
    return values.masked_fill(single & (rows != 0), 0.0)


@dataclass(frozen=True)
class Stream:
    """A stream of tokens: how many, and which slice came from which input or parameter."""

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
    `calls` lists every attention call in execution order. `matrices` holds what `matrix` reads:
    `[B, N, N]` for each stream.

    Example:
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

        Raises:
            KeyError: if there is no stream or part of that name; the message lists them.
        """
        query_stream, rows = self._find(query)
        key_stream, columns = self._find(key)
        matrix = self.matrices.get((query_stream, key_stream))
        if matrix is None:
            like = self.matrices[query_stream, query_stream]
            size = self.streams[key_stream].tokens
            matrix = like.new_zeros(*like.shape[:2], size)
        return matrix[:, rows, columns].clone()

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
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for (query, key), matrix in self.matrices.items():
            tensors[json.dumps(["matrix", query, key])] = matrix.clone(
                memory_format=torch.contiguous_format
            )
        for name, rows in self.rows.items():
            tensors[json.dumps(["rows", name])] = rows.clone(memory_format=torch.contiguous_format)
        calls = []
        for call in self.calls:
            plain = {f.name: getattr(call, f.name) for f in fields(Call)}
            for name, value in list(plain.items()):
                if isinstance(value, Tensor):
                    tensors[json.dumps(["call", call.index, name])] = plain.pop(name).clone(
                        memory_format=torch.contiguous_format
                    )
            calls.append(plain)
        streams = {
            name: [s.tokens, {part: [p.start, p.stop] for part, p in s.parts.items()}]
            for name, s in self.streams.items()
        }
        # One entry: the order of several is not kept, and equal objects make equal files.
        save_file(tensors, path, {_METADATA: json.dumps({"streams": streams, "calls": calls})})

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
        from safetensors import SafetensorError, safe_open

        tensors: dict[tuple[object, ...], Tensor] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if _METADATA not in metadata:
                    raise ValueError(
                        f"{path} holds no saved Relevance: its metadata has {[*metadata]}"
                    )
                plain_parts = json.loads(metadata[_METADATA])
                for key in file.keys():  # noqa: SIM118 - no mapping
                    tensors[tuple(json.loads(key))] = file.get_tensor(key)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no saved Relevance: {error}") from error
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
