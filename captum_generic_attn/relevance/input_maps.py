"""Input maps: values per token in the shape of the inputs that the tokens were made of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.capture import Capture, name_of_input
from captum_generic_attn.tokens import Extent, Grid, TokenStream, elements_of, fit_grid
from captum_generic_attn.tokens.extent import along_of_all


class _Fed(NamedTuple):
    """Tokens made of an input, and their values.

    `values` are `[B, n]`; `present` `[E, n]` is True for tokens that attention reads. `centres`
    `[n, d]` and `extent` are the centre and the elements of each token in the input, if known.
    """

    values: Tensor
    present: Tensor
    centres: Tensor | None
    extent: Extent | None

    def grid(self, shape: torch.Size, *, several: bool = False) -> Grid | None:
        """The grid that the tokens form."""
        if self.centres is None or self.extent is None:
            return None
        return fit_grid(self.centres, self.extent.ranges, shape, several=several)

    def elements(self, shape: torch.Size) -> Tensor:
        """`[E, *shape[1:]]` True for the elements of the tokens that attention reads."""
        assert self.extent is not None  # noqa: S101 - they have a grid
        present = self.present
        if bool((present == present[:1]).all()):
            present = present[:1]
        return torch.stack([elements_of(self.extent.of(own), shape) for own in present])


def maps_of_inputs(
    capture: Capture, values: Mapping[str, Tensor], inputs: tuple[Tensor, ...],
    interpolation: str | None, *, warn: bool,
) -> list[Tensor]:  # fmt: skip
    """The map of each input: each element has the value of the token that was made of it, or 0.

    Args:
        capture: the forward pass.
        values: `[B, N]` values of the tokens, by stream.
        inputs: the user's inputs.
        interpolation: `"bilinear"` or `"nearest"` for maps of the inputs' shapes; `None` for one
            value per token.
        warn: whether to warn of inputs that reach no attention; they get zeros.

    Raises:
        ValueError: if the tokens of an input form no regular grid, or several.
    """
    maps = []
    silent = []
    read = _read_by(capture)
    for i, tensor in enumerate(inputs):
        name = name_of_input(capture, inputs, i)
        feeding = [
            fed
            for stream in capture.streams if stream.name in values
            for fed in _feeding(capture, stream, values[stream.name], name, read)
        ]  # fmt: skip
        if not feeding:
            silent.append(name)
            dtype = next(iter(values.values())).dtype
            maps.append(torch.zeros(tensor.shape, dtype=dtype, device=tensor.device))
        elif interpolation is None:
            maps.append(_tokens(name, [fed[0] for fed in feeding], tensor.shape).to(tensor.device))
        else:
            parts = [
                _map(name, fed, tensor.shape, interpolation)
                for fed in _pooled(feeding, tensor.shape)
            ]
            maps.append(torch.stack(parts).sum(0).to(tensor.device))
    if silent and warn:
        warnings.warn(
            f"{', '.join(silent)} reaches no attention that the score depends on: zeros",
            UserWarning,
            stacklevel=2,
        )
    return maps


def _feeding(
    capture: Capture, stream: TokenStream, values: Tensor, name: str, read: Tensor
) -> list[Sequence[_Fed]]:
    """The tokens of a stream that are made of an input, one entry for each token space.

    Tokens that were summed (word and position, the branches of a stem, the bands of an image) are
    one token. An input that is part of it twice gets its value once, on all elements of both
    summands; an entry lists all of these.
    """
    found: list[Sequence[_Fed]] = []
    origin = capture.spaces.origin(name)
    for index, places in stream.places.items():
        space = capture.spaces[index]
        if bool((places >= stream.num_base_tokens).any()):
            continue  # the values of merged tokens were passed to their parents
        itself = torch.arange(space.size)[None]
        known = read[space.base : space.stop].view(-1, space.size)
        sources = [(space, itself), *capture.spaces.absorbed_into(space)]
        fed = []
        for source, table in sources:
            if source.name != origin or source.kind != "token":
                continue
            positions = torch.where(table >= 0, places[table.clamp(min=0)], -1).to(values.device)
            picked = values.gather(1, positions.clamp(min=0).expand(len(values), -1))
            picked = picked.masked_fill(positions < 0, 0.0)
            rows = max(len(known), len(table))
            here = known.expand(rows, -1).gather(1, table.clamp(min=0).expand(rows, -1))
            here &= table >= 0
            present = here & (positions >= 0).cpu()
            fed.append(_Fed(picked, present, source.coordinates, source.extent))
        if fed:
            found.append(sorted(fed, key=lambda f: f.centres is None))
    return found


def _read_by(capture: Capture) -> Tensor:
    """`[ids]` True for tokens that attention calls read, directly or merged into others."""
    spaces = capture.spaces
    read = torch.zeros(max((space.stop for space in spaces), default=0), dtype=torch.bool)
    seen = {id(ids): ids for r in capture.records for ids in (r.query_tokens, r.key_tokens)}
    for ids in seen.values():
        read[ids[ids >= 0].long()] = True
    for space in reversed(list(spaces)):
        if space.parents is not None:
            merged = read[space.base : space.stop].view(-1, space.size)
            parents = space.parents[merged[: len(space.parents)]]
            read[parents[parents >= 0].long()] = True
    return read


def _pooled(feeding: list[Sequence[_Fed]], shape: torch.Size) -> list[Sequence[_Fed]]:
    """Tokens that are made one by one, with a projection for each, form one grid together."""
    single = [fed for fed in feeding if fed[0].values.shape[1] == 1]
    if len(single) < 2:
        return feeding
    together = _joined([fed[0] for fed in single])
    if together is None or together.grid(shape) is None:
        return feeding
    return [*(fed for fed in feeding if fed[0].values.shape[1] > 1), [together]]


def _joined(feeding: Sequence[_Fed]) -> _Fed | None:
    """All tokens as one entry; `None` if the elements of some are unknown."""
    centres = [f.centres for f in feeding if f.centres is not None]
    extents = [f.extent for f in feeding if f.extent is not None]
    if len(centres) < len(feeding) or len(extents) < len(feeding):
        return None
    values = torch.cat([f.values for f in feeding], 1)
    present = torch.cat([f.present.expand(len(values), -1) for f in feeding], 1)
    extent = Extent(torch.cat([e.ranges for e in extents]), along_of_all(extents))
    return _Fed(values, present, torch.cat(centres), extent)


def _tokens(name: str, feeding: Sequence[_Fed], shape: torch.Size) -> Tensor:
    """One value per token, laid out on the grid that all tokens of an input form together."""
    together = _joined(feeding)
    grid = None if together is None else together.grid(shape, several=True)
    if together is not None and grid is not None:
        return grid.to_tokens(together.values)
    if len(feeding) == 1 or all(f.values.shape[1] == 1 for f in feeding):
        return torch.cat([f.values for f in feeding], 1)
    grids = ", ".join(_describe(f.grid(shape)) for f in feeding)
    raise ValueError(
        f"{name} feeds tokens on several grids ({grids}); ask for return_input_shape=True, which "
        "adds their maps"
    )


def _map(name: str, fed: Sequence[_Fed], shape: torch.Size, interpolation: str) -> Tensor:
    """The values of tokens on the elements that they were made of."""
    found: Tensor | None = None
    known = torch.zeros((), dtype=torch.bool)
    for tokens in fed:
        grid = tokens.grid(shape)
        if grid is None:
            continue
        own = tokens.elements(shape).to(tokens.values.device)
        part = grid.to_input(tokens.values, shape, interpolation) * own
        found = part if found is None else torch.where(known, found, part)
        known = known.to(own.device) | own
    if found is None:
        raise ValueError(
            f"where the {fed[0].values.shape[1]} tokens of {name} lie in its shape {tuple(shape)} "
            "could not be told: they form no regular grid. Use return_input_shape=False for one "
            "value per token"
        )
    return found


def _describe(grid: Grid | None) -> str:
    if grid is None:
        return "no regular grid"
    return f"{'×'.join(map(str, grid.counts))} from {grid.offset}"
