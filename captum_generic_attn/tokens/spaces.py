"""Token spaces: each token of a forward pass gets a number, and knows where it comes from.

The capture opens a space when tokens are created (an embedding, a patch convolution, a parameter
that joins the sequence) and carries token ids along: integer tensors that say of each element of an
activation which token it belongs to. Ids live on the CPU whatever the model's device is, so that
following tokens never waits for an accelerator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.tokens.extent import Extent, hull, joined
from captum_generic_attn.tokens.ids import distinct_ids, unique_rows
from captum_generic_attn.tokens.lineage import TokenLineage
from captum_generic_attn.tokens.registry import distinct
from captum_generic_attn.tokens.space import PADDING, Kind, Space


class _Owners(NamedTuple):
    """Whose tokens rows of parents make: a space whose examples get `size` of them each.

    `order` sorts the rows by example, then by place in the input.
    """

    source: Space
    size: int
    order: Tensor

    @property
    def examples(self) -> int:
        """The number of examples, 1 for tokens that all of them share."""
        return max(self.source.examples, 1)


class TokenSpaces(TokenLineage):
    """The registry of token spaces of one forward pass, which makes tokens of other tokens."""

    def created(
        self, parents: Tensor, centres: Tensor | None, extent: Extent | None = None, *,
        again: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """Make one token of each row of parents; tokens of the same parents are the same.

        Args:
            parents: `[*tokens, m]` ids of the elements or tokens that each is made of, negative for
                none. Of elements, some are enough: they tell the input, the example and the place.
            centres: `[tokens, d]` centres in the input, or `None` if unknown.
            extent: of the elements that they are made of, ranges `[tokens, d, 2]`; `None`: that of
                their parents.
            again: whether tokens with these centres that no call has read yet are these: features
                that are projected once for queries and once for keys.

        Returns:
            `[*tokens]` ids, padding where a row has no parents; `None` if the tokens are not spread
            evenly over the examples.
        """
        shape = parents.shape[:-1]
        rows = parents.reshape(-1, parents.shape[-1]).long()
        alive = (rows >= 0).any(-1)
        rows = rows[alive]
        sources = [self[i] for i in self.indices(rows)]
        raw = any(s.kind in ("element", "shared") for s in sources)
        if not raw and len(shape) > 1 and len(parents) > 1:
            distinct_parents, first, member = unique_rows(parents.flatten(1))
            if len(distinct_parents) < len(parents):  # heads that are pooled one by one
                if centres is not None:
                    centres = centres.view(len(parents), -1, centres.shape[-1])[first].flatten(0, 1)
                token_ids = self.created(parents[first], centres, again=again)
                return None if token_ids is None else token_ids[member]
        alike = len(sources) == 1 or not (raw or any(s.kind == "unknown" for s in sources))
        owners = self._owners(rows) if sources and alike else None
        if owners is None:
            return None
        if centres is not None:
            centres = _in_order(centres.flatten(0, -2)[alive], owners)
            centres = centres[:, 0] if bool((centres == centres[:, :1]).all()) else None
        extent = None if centres is None else extent or self.extent(rows)
        if extent is not None:  # of all examples
            ranges = extent.ranges.flatten(0, -3)
            ranges = ranges[alive] if len(ranges) == len(alive) else ranges
            extent = extent._replace(ranges=hull(_in_order(ranges, owners)))
        space = self._space_of(rows, owners, centres, extent, raw=raw, again=again)
        numbers = torch.empty(len(rows), dtype=torch.int32)
        numbers[owners.order] = torch.arange(space.base, space.stop, dtype=torch.int32)
        ids = torch.full((len(alive),), PADDING, dtype=torch.int32)
        ids[alive] = numbers
        return ids.view(shape)

    def _owners(self, rows: Tensor) -> _Owners | None:
        """Whose tokens rows `[n, m]` of parents make; `None` if examples are mixed or get unequal
        numbers of tokens.
        """  # fmt: skip
        _, example, _ = self.locate(rows)
        owner = example.amax(-1)
        if bool(((example >= 0) & (example != owner[:, None])).any()):
            return None  # made of several examples
        leader = torch.where(example == owner[:, None], rows, -1).amax(-1)
        source = self[int(self.locate(leader[:1])[0])]
        examples = max(source.examples, 1)
        if len(rows) % examples:
            return None
        owners = _Owners(source, len(rows) // examples, torch.argsort(leader, stable=True))
        expected = torch.arange(examples) if source.examples else torch.tensor([-1])
        sorted_owner = owner[owners.order].view(examples, owners.size)
        return owners if bool((sorted_owner == expected[:, None]).all()) else None

    def _space_of(
        self, rows: Tensor, owners: _Owners, centres: Tensor | None, extent: Extent | None, *,
        raw: bool, again: bool,
    ) -> Space:  # fmt: skip
        """The space of the tokens that are made of rows `[n, m]`: one that exists, or a new one."""
        source, size = owners.source, owners.size
        family: Tensor | None = None
        space: Space | None = None
        if not raw:
            family = distinct_ids(rows[owners.order]).view(owners.examples, size, -1)
            space = self._sibling(family)
        elif again:
            space = self._unread(size, source.name, centres, extent)
        if space is not None:
            return space
        kind: Kind = "token" if source.examples else source.kind
        return self._open(size, source.examples, source.name, kind, centres, family, extent=extent)

    def _sibling(self, parents: Tensor) -> Space | None:
        """The space whose tokens have these parents."""
        for space in self._spaces:
            if space.parents is not None and torch.equal(space.parents, parents):
                return space
        return None

    def _unread(
        self, size: int, name: str, centres: Tensor | None, extent: Extent | None
    ) -> Space | None:
        """Tokens of an input with these centres that no attention call has read.

        They were made of these elements as well.
        """
        for space in self._spaces:
            if (
                space.kind == "token"
                and (space.size, space.name) == (size, name)
                and space.index not in self._read
                and centres is not None
                and space.coordinates is not None
                and torch.equal(space.coordinates, centres)
            ):
                if space.extent is not None and extent is not None:
                    both = joined([space.extent, extent])
                    space = self._spaces[space.index] = replace(space, extent=both)
                return space
        return None

    def created_of_rows(self, parents: Tensor) -> Tensor | None:
        """Open a space with one token for each row of parents, centred among them.

        Args:
            parents: `[*tokens, m]` ids of elements or of tokens.

        Returns:
            A token_ids of shape `[*tokens]`, or `None`, as `born`.
        """
        rows = parents.reshape(-1, parents.shape[-1])
        alive = (rows >= 0).any(-1)
        most = rows.amax(-1)
        filled = torch.where(rows < 0, most.unsqueeze(-1), rows)[alive]
        index, example, local = self.locate(torch.stack([filled.amax(-1), filled.amin(-1)]))
        raw = any(self[i].kind in ("element", "shared") for i in distinct(index))
        if raw and bool((index != index[0, 0]).any()):
            return self._created_of_inputs(parents)
        one_space = torch.equal(index[0], index[1]) and torch.equal(example[0], example[1])
        placed = None
        if one_space and len(filled):
            placed = self._places_of_rows(rows[alive], filled, local)
        centres = extent = None
        if placed is not None:
            centres = placed[0].new_zeros(len(rows), placed[0].shape[1])
            centres[alive], extent = placed
        if raw:
            if not one_space:
                return None
            elements = parents.shape[-1] > 1  # an embedding's integers are one each: never again
            return self.created(most.view(*parents.shape[:-1], 1), centres, extent, again=elements)
        return self.created(parents, centres, extent)

    def _created_of_inputs(self, parents: Tensor) -> Tensor | None:
        """As `created_of_rows`, of elements of several inputs that were joined before.

        A row of elements of several inputs is one token, that of the first.
        """
        index = self.locate(parents)[0]
        inputs = distinct(index)
        if any(self[i].kind not in ("element", "shared") for i in inputs):
            return None
        together: Tensor | None = None
        for i in inputs:
            token_ids = self.created_of_rows(torch.where(index == i, parents, PADDING))
            if token_ids is None:
                return None
            if together is None:
                together = token_ids
                continue
            both = (together >= 0) & (token_ids >= 0)
            if bool(both.any()) and not self.identify(together[both], token_ids[both]):
                return None
            together = torch.where(together >= 0, together, token_ids)
        return together


def _in_order(values: Tensor, owners: _Owners) -> Tensor:
    """Values `[n, ...]` of tokens, as `[size, examples, ...]`."""
    sorted_values = values[owners.order]
    return sorted_values.view(owners.examples, owners.size, *values.shape[1:]).transpose(0, 1)
