"""Lineage: what tokens were merged from, and which of them live on as others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from captum_generic_attn.tokens.ids import squeeze_expanded_together
from captum_generic_attn.tokens.places import TokenPlaces
from captum_generic_attn.tokens.registry import distinct
from captum_generic_attn.tokens.space import Space


class TokenLineage(TokenPlaces):
    """A registry of token spaces that knows how tokens are related.

    Tokens that are summed may *live on as* one: a word and its position. Tokens that attention
    added to have a history of their own, and are merged into new tokens instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._identified: dict[tuple[int, int], Tensor] = {}
        self._origins: dict[str, str] = {}
        self._read: set[int] = set()
        self._queried: set[int] = set()
        self._made_of: dict[int, list[int]] = {}

    # -- attention calls ------------------------------------------------------------------------

    def mark_read(self, ids: Tensor) -> None:
        """Note that an attention call reads these tokens: those made later are other tokens."""
        self._read.update(self.indices(ids))

    def mark_queried(self, queries: Tensor) -> None:
        """Note that these tokens are queries of an attention call: its result is added to them."""
        self._queried.update(self.indices(queries))

    def is_subsumed(self, absorbed: Tensor, kept: Tensor) -> bool:
        """Whether tokens may be identified with others, place by place.

        All that attention added to `absorbed` must be in `kept` as well: nothing was added to
        `absorbed` itself, and either nothing to the tokens that it was merged from, or `kept` was
        merged from these too.
        """
        of = self.indices(absorbed)
        if self._queried & set(of):
            return False
        return not self._histories(of) or self.contains(kept, absorbed)

    def _histories(self, indices: Iterable[int]) -> set[int]:
        """The spaces with queries of a call, among some and those that they were merged from."""
        found, frontier = set(indices), list(indices)
        while frontier:
            new = [i for i in self.made_of(frontier.pop()) if i not in found]
            found.update(new)
            frontier += new
        return found & self._queried

    # -- what tokens were merged from -----------------------------------------------------------

    def made_of(self, index: int) -> list[int]:
        """The spaces that the tokens of a space were merged from, without itself."""
        if index not in self._made_of:
            parents = self[index].parents
            self._made_of[index] = [] if parents is None else self.indices(parents)
        return self._made_of[index]

    def contains(self, whole: Tensor, part: Tensor, *, at_home: bool = False) -> bool:
        """Whether, place by place, a token was made of all that another was made of.

        Args:
            whole: `[n]` ids of tokens.
            part: `[n]` ids of tokens at the same places, negative for none.
            at_home: whether tokens count as those that they live on as, or were first made as.
        """
        pairs = torch.unique(torch.stack([whole.reshape(-1), part.reshape(-1)]), dim=1)
        known, own, needed = self._made_from(*pairs.unbind())
        left = ~(_among(own, known) | ((needed >= 0).any(-1) & _among(needed, known)))
        if not at_home or not bool(left.any()):
            return not bool(left.any())
        known, own, needed = (self._home_of(ids[left]) for ids in (known, own, needed))
        return bool((_among(own, known) | ((needed >= 0).any(-1) & _among(needed, known))).all())

    def _made_from(self, whole: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `contains` compares, `[n, *]` each.

        The tokens `whole` with those that they were merged from, the tokens `part`, and what these
        were merged from.
        """
        parents = []
        for ids in (whole, part):
            index, example, local = self.locate(ids)
            layers = [ids.new_full((len(ids), 1), -1, dtype=torch.long)]
            for i in distinct(index):
                table = self[i].parents
                if table is not None:
                    owners = example.clamp(0, len(table) - 1)
                    rows = table[owners, local.clamp(0, table.shape[1] - 1)].long()
                    layers.append(torch.where((index == i).unsqueeze(-1), rows, -1))
            parents.append(torch.cat(layers, 1))
        known = torch.cat([whole.long().unsqueeze(-1), parents[0]], 1)
        return known, part.long().unsqueeze(-1), parents[1]

    def belong(self, keys: Tensor, values: Tensor) -> bool:
        """Whether, place by place, a value was made of nothing but what its key was made of.

        Values that are no tokens of an input (padding, constants, parameters) belong to any key.
        Where there is no key, any value belongs.
        """
        index = self.locate(values)[0]
        learned = [s.index for s in self._spaces if s.kind == "parameter"]
        pick = (values >= 0) & (keys >= 0) & (values != keys)
        pick &= ~torch.isin(index, torch.tensor(learned))
        return not bool(pick.any()) or self.contains(keys[pick], values[pick], at_home=True)

    # -- tokens that live on as others ----------------------------------------------------------

    def identify(self, kept: Tensor, absorbed: Tensor) -> bool:
        """Note that tokens were summed, ids of one shape: `absorbed` live on as `kept`.

        Returns:
            `False`, with nothing noted, if that cannot be: a token would live on as several, tokens
            of one space or of different examples were added to each other, or `kept` live on as
            `absorbed` already.
        """
        kept, absorbed = squeeze_expanded_together(kept, absorbed)
        to, owner, to_local = self.locate(kept.reshape(-1))
        of, example, of_local = self.locate(absorbed.reshape(-1))
        if bool(((owner >= 0) & (example >= 0) & (owner != example)).any()):
            return False
        shared = set(of.tolist()) & set(to.tolist()) - {-1}
        if any(bool(((of == i) & (to == i) & (of_local != to_local)).any()) for i in shared):
            return False
        tables: dict[tuple[int, int], Tensor] = {}
        homes: dict[int, Tensor] = {}
        for a in set(of.tolist()):
            for k in set(to[of == a].tolist()):
                if a < 0 or k < 0 or a == k:
                    continue
                pick = (of == a) & (to == k)
                places = example[pick].clamp(min=0), of_local[pick]
                if (k, a) in self._identified:
                    return False
                known = self._identified.get((a, k))
                size = max(self[a].examples, 1), self[a].size
                table = torch.full(size, -1) if known is None else known.clone()
                before = table[places]
                table[places] = to_local[pick]
                moved = (before >= 0) & (before != to_local[pick])
                home = homes.setdefault(a, torch.full(size, -1))
                elsewhere = (home[places] >= 0) & (home[places] != k)
                home[places] = k
                if bool((moved | elsewhere | (table[places] != to_local[pick])).any()):
                    return False
                tables[a, k] = table
        self._identified.update(tables)
        return True

    def absorbed_into(self, space: Space) -> list[tuple[Space, Tensor]]:
        """Spaces whose tokens live on in this one, with their `[examples, size]` numbers there, or
        -1.
        """  # fmt: skip
        examples = max(space.examples, 1)
        found = {space.index: torch.arange(space.size).expand(examples, -1)}
        frontier = [space.index]
        while frontier:
            k = frontier.pop()
            for (a, into), table in self._identified.items():
                if into == k and a not in found:
                    known = found[k].expand(max(len(found[k]), len(table)), -1)
                    through = known.gather(1, table.clamp(min=0).expand(len(known), -1))
                    found[a] = torch.where(table >= 0, through, -1)
                    frontier.append(a)
        return [(self[i], table) for i, table in found.items() if i != space.index]

    def _home_of(self, ids: Tensor) -> Tensor:
        """The tokens that these live on as.

        Tokens that were made twice of the same places of an input (by a projection for keys and
        one for values) live on as the first.
        """
        while True:
            index, example, local = self.locate(ids)
            moved = ids
            for i in distinct(index):
                mine = index == i
                for (a, k), table in self._identified.items():
                    if a == i:
                        owners = example.clamp(0, len(table) - 1)
                        places = table[owners, local.clamp(0, table.shape[1] - 1)]
                        home = self[k]
                        owner = example if home.examples else torch.zeros_like(example)
                        there = home.base + owner.clamp(min=0) * home.size + places
                        moved = torch.where(mine & (places >= 0), there, moved)
                if (twin := self._twin(self[i])) is not None:
                    there = ids - self[i].base + twin.base
                    moved = torch.where(mine & (moved == ids), there, moved)
            if moved is ids or torch.equal(moved, ids):
                return ids
            ids = moved

    def _twin(self, space: Space) -> Space | None:
        """The first space of tokens of the same places of the same input, if it is another."""
        if space.kind != "token" or space.parents is not None or space.coordinates is None:
            return None
        for other in self._spaces[: space.index]:
            if (
                other.kind == "token" and other.parents is None and other.coordinates is not None
                and self.origin(other.name) == self.origin(space.name)
                and (other.size, other.examples) == (space.size, space.examples)
                and torch.equal(other.coordinates, space.coordinates)
            ):  # fmt: skip
                return other
        return None

    # -- inputs that are summed -----------------------------------------------------------------

    def same_input(self, kept: Tensor, absorbed: Tensor) -> bool:
        """Note that two inputs were summed, element by element, before the model made tokens.

        Returns:
            `False`, with nothing noted, if elements of different places or examples met.
        """
        (to, one, place), (of, two, other) = self.locate(kept), self.locate(absorbed)
        if (
            not (torch.equal(place, other) and torch.equal(one, two))
            or len(distinct(to)) > 1
            or len(distinct(of)) > 1
        ):
            return False
        name, theirs = self[int(to.max())].name, self[int(of.max())].name
        if self.origin(name) != self.origin(theirs):
            self._origins[self.origin(theirs)] = self.origin(name)
        return True

    def origin(self, name: str) -> str:
        """The input whose tokens an input feeds: itself, or the one that it was added to."""
        while name in self._origins:
            name = self._origins[name]
        return name


def _among(ids: Tensor, known: Tensor) -> Tensor:
    """`[n]` whether all ids `[n, m]` of a row are among those that are known; -1 always is."""
    return ((ids.unsqueeze(-1) == known.unsqueeze(1)).any(-1) | (ids < 0)).all(-1)
