"""Token spaces: the tokens of one forward pass, their numbers, and what they were made of.

The capture opens a space when tokens are created (an embedding, a patch convolution, a parameter
that joins the sequence). Token ids are integer tensors that say which token each element of an
activation belongs to. Ids are on the CPU, whatever the device of the model is: tracking tokens
never waits for an accelerator.
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

_TOKENS: set[Kind] = {"token", "parameter"}
"""The kinds of spaces whose tokens may be merged with those of other spaces."""


class _Owners(NamedTuple):
    """The space whose examples own the tokens that are made of rows of parents.

    Each example gets `size` tokens. `order` sorts the rows by example, then by place in the input.
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
                none. A few of the elements are enough: they tell the input, example and place.
            centres: `[tokens, d]` centres in the input, or `None` if unknown.
            extent: the elements that they are made of, with ranges `[tokens, d, 2]`. `None` stands
                for that of their parents.
            again: whether tokens with these centres are taken if they exist and no call has read
                them yet: features that are projected once for queries and once for keys.

        Returns:
            `[*tokens]` ids, padding where a row has no parents; `None` if the tokens are not spread
            evenly over the examples.
        """
        rows = parents.reshape(-1, parents.shape[-1]).long()
        alive = (rows >= 0).any(-1)
        rows = rows[alive]
        kinds = [self[i].kind for i in self.indices(rows)]
        raw = "element" in kinds or "shared" in kinds
        if not raw and parents.ndim > 2 and len(parents) > 1:
            distinct_parents, first, member = unique_rows(parents.flatten(1))
            if len(distinct_parents) < len(parents):  # heads that are pooled one by one
                if centres is not None:
                    centres = centres.view(len(parents), -1, centres.shape[-1])[first].flatten(0, 1)
                token_ids = self.created(parents[first], centres, again=again)
                return None if token_ids is None else token_ids[member]
        owners = self._owners(rows)
        if owners is None:
            return None
        centres = None if centres is None else _shared(centres.flatten(0, -2)[alive], owners)
        extent = None if centres is None else self._extent_of(rows, alive, owners, extent)
        space = self._space_of(rows, owners, centres, extent, raw=raw, again=again)
        numbers = torch.empty(len(rows), dtype=torch.int32)
        numbers[owners.order] = torch.arange(space.base, space.stop, dtype=torch.int32)
        ids = torch.full((len(alive),), PADDING, dtype=torch.int32)
        ids[alive] = numbers
        return ids.view(parents.shape[:-1])

    def _extent_of(
        self, rows: Tensor, alive: Tensor, owners: _Owners, given: Extent | None
    ) -> Extent | None:
        """The extent of each token, over all examples: the one `given`, or that of its parents.

        Args:
            rows: `[n, m]` the parents of each token.
            alive: `[k]` which rows have parents. A given extent is of all `k` rows or of the `n`.
            owners: whose tokens these are.
            given: the extent, if it is known.
        """
        extent = given or self.extent(rows)
        if extent is None:
            return None
        ranges = extent.ranges.flatten(0, -3)
        ranges = ranges[alive] if len(ranges) == len(alive) else ranges
        return extent._replace(ranges=hull(_in_order(ranges, owners)))

    def _owners(self, rows: Tensor) -> _Owners | None:
        """Who owns the tokens that are made of rows `[n, m]` of parents.

        `None` if a row mixes examples, if examples get unequal numbers of tokens, or if elements or
        unknown tokens meet tokens of other spaces.
        """
        kinds = [self[i].kind for i in self.indices(rows)]
        if not kinds or (len(kinds) > 1 and not _TOKENS.issuperset(kinds)):
            return None
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
            `[*tokens]` ids, or `None`, as `created`.
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
        """As `created_of_rows`, for elements of several inputs that were joined before.

        A row with elements of several inputs is one token, that of the first input.
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


def _shared(centres: Tensor, owners: _Owners) -> Tensor | None:
    """Centres `[n, d]` of tokens as the `[size, d]` of each example; `None` if examples differ."""
    ordered = _in_order(centres, owners)
    return ordered[:, 0] if bool((ordered == ordered[:, :1]).all()) else None
