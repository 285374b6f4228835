"""From values per token to maps of the inputs: the last step before Captum.

`attribution` hands over the values of every stream; here they go back to the inputs that fed it,
by the token spaces of the forward pass and the grids that they form.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from captum_generic_attn.capture import Capture, name_of_input
from captum_generic_attn.tokens import Grid, TokenStream, fit_grid


def maps_of_inputs(
    capture: Capture, values: Mapping[str, Tensor], inputs: tuple[Tensor, ...],
    interpolation: str | None, *, warn: bool,
) -> list[Tensor]:  # fmt: skip
    """One map for each input.

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
    for i, tensor in enumerate(inputs):
        name = name_of_input(capture, inputs, i)
        feeding = [
            fed
            for stream in capture.streams if stream.name in values
            for fed in _feeding(capture, stream, values[stream.name], name, tensor)
        ]  # fmt: skip
        grids = [grid for grid, _ in feeding]
        alone = all(_same_grid(grid, grids[0]) for grid in grids)
        of_elements = all(grid is not None and grid.of_elements for grid in grids)
        if interpolation is None and not alone and not of_elements:
            raise ValueError(
                f"{name} feeds tokens on several grids ({', '.join(map(_describe, grids))}); ask "
                "for return_input_shape=True, which adds their maps"
            )
        parts = [
            _lay_out(name, tensor, grid, part, interpolation, spill=alone) for grid, part in feeding
        ]
        if not parts:
            silent.append(name)
            dtype = next(iter(values.values())).dtype
            parts = [torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)]
        maps.append(torch.stack(parts).sum(0))
    if silent and warn:
        warnings.warn(
            f"{', '.join(silent)} reaches no attention that the score depends on: zeros",
            UserWarning,
            stacklevel=2,
        )
    return maps


def _feeding(
    capture: Capture, stream: TokenStream, values: Tensor, name: str, tensor: Tensor
) -> list[tuple[Grid | None, Tensor]]:
    """Grid and `[B, n]` values of the tokens of a stream that come from an input.

    Tokens that were summed into one (word and position, the branches of a stem) are one token: an
    input that feeds it twice gets its value once.
    """
    found: list[tuple[Tensor | None, Tensor]] = []
    origin = capture.spaces.origin(name)
    for index, places in stream.places.items():
        space = capture.spaces[index]
        if bool((places >= stream.roots).any()):
            continue  # merged tokens handed their values on
        itself = torch.arange(space.size)[None]
        sources = [(space, itself), *capture.spaces.absorbed_into(space)]
        named = [(s.coordinates, t) for s, t in sources if s.name == origin and s.kind == "token"]
        for centres, table in sorted(named, key=lambda pair: _grid(pair[0], tensor) is None)[:1]:
            positions = torch.where(table >= 0, places[table.clamp(min=0)], -1).to(values.device)
            positions = positions.expand(len(values), -1)
            picked = values.gather(1, positions.clamp(min=0))
            found.append((centres, picked.masked_fill(positions < 0, 0.0)))
    # Tokens that are made one by one, a projection for each, form their grid together.
    single = [(c, v) for c, v in found if c is not None and v.shape[1] == 1]
    if len(found) > 1 and single:
        centres = torch.cat([c for c, _ in single])
        pooled = (centres, torch.cat([v for _, v in single], 1))
        found = [f for f in found if f[1].shape[1] > 1 or f[0] is None] + [pooled]
        if _grid(centres, tensor) is None or len(single) == 1:
            found[-1] = None, pooled[1]
    return [(_grid(c, tensor), v) for c, v in found]


def _grid(coordinates: Tensor | None, tensor: Tensor) -> Grid | None:
    return None if coordinates is None else fit_grid(coordinates, tensor.shape)


def _same_grid(one: Grid | None, other: Grid | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.axes, one.counts, one.offset, one.stride) == (
        other.axes, other.counts, other.offset, other.stride,
    )  # fmt: skip


def _describe(grid: Grid | None) -> str:
    if grid is None:
        return "no regular grid"
    return f"{'×'.join(map(str, grid.counts))} from {grid.offset}"


def _lay_out(
    name: str, tensor: Tensor, grid: Grid | None, values: Tensor, interpolation: str | None, *,
    spill: bool,
) -> Tensor:  # fmt: skip
    values = values.to(tensor.device)
    if interpolation is None:
        if grid is None:
            return values
        return (
            grid.to_elements(values, tensor.shape) if grid.of_elements else grid.to_tokens(values)
        )
    if grid is None:
        raise ValueError(
            f"where the {values.shape[1]} tokens of {name} lie in its shape "
            f"{tuple(tensor.shape)} could not be told: they form no regular grid. Use "
            "return_input_shape=False for one value per token"
        )
    return grid.to_input(values, tensor.shape, interpolation, spill=spill)
