"""A token space: tokens that were created together, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from captum_generic_attn.tokens.extent import Extent

PADDING = -1
"""Id of elements that belong to no token: padding and constants."""
EXTERNAL = -2
"""Id of elements that came from outside the forward pass, such as a filled cache."""
OVERWRITTEN = -3
"""Id of padding that was a query of attention: the result of the call was written to it."""

Kind = Literal["element", "token", "parameter", "shared", "unknown"]


@dataclass(frozen=True, eq=False)
class Space:
    """Tokens, or elements of an input (kind "element"), that were created together.

    Ids are `base + example * size + local`. Tokens of a parameter are shared by all examples:
    `examples` is 0. `name` is that of the input or parameter, and of unknown tokens the operation
    that lost them.

    `coordinates` `[size, d]` are the centres of the tokens along the axes of the input behind the
    batch, `None` if unknown. `parents` `[examples, size, m]` are the ids of the tokens that each
    was merged or pooled from (-1 fills up), `None` for tokens that were made of elements. `shape`
    is that of an input without its batch, for elements that lie where they are in it.
    """

    index: int
    base: int
    size: int
    examples: int
    name: str
    kind: Kind
    coordinates: Tensor | None = None
    parents: Tensor | None = None
    shape: Sequence[int] | None = None
    extent: Extent | None = None

    def at(self, local: Tensor) -> Tensor | None:
        """Centres `[*local, d]` of some of the tokens."""
        if self.shape is None:
            return None if self.coordinates is None else self.coordinates[local]
        if not self.shape:
            return torch.zeros(*local.shape, 0, dtype=torch.float64)
        return torch.stack(torch.unravel_index(local, self.shape), -1).double()

    def reads(self, local: Tensor) -> Tensor | None:
        """Ranges `[*local, d, 2]` of elements that some of the tokens were made of."""
        if self.shape is None:
            return None if self.extent is None else self.extent.ranges[local]
        axes = torch.unravel_index(local, self.shape) if self.shape else ()
        places = torch.stack(axes, -1) if axes else local.new_zeros(*local.shape, 0)
        return torch.stack([places, places], -1)

    @property
    def stop(self) -> int:
        """The first id after this space."""
        return self.base + self.size * max(self.examples, 1)
