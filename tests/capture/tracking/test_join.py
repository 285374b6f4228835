"""The join of abstract values, on all pairs of a small set of them.

The order: what was lost is above everything of its shape. A join may lose tokens, never find them.
"""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import CONSTANT, AbstractValue, Role
from captum_generic_attn.capture.tracking.join import join, mixture
from captum_generic_attn.capture.tracking.operand import Operand
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.tokens.space import PADDING
from captum_generic_attn.tokens.spaces import TokenSpaces

B, N, D = 2, 3, 4
SHAPE = torch.Size([B, N, D])


class World:
    """One forward pass with some values of each kind, by name."""

    def __init__(self) -> None:
        self.spaces = TokenSpaces()
        self.state = TokenTracker(self.spaces, {})
        raw = self.spaces.of_input("x", SHAPE)
        self.first = self.born("a")
        word = self.born("b")
        self.attended = self.born("c")
        also = self.born("d")
        self.spaces.mark_queried(self.attended)
        self.spaces.mark_queried(also)
        unknown = self.spaces.unknown(SHAPE[:2], "scan").unsqueeze(-1).expand(SHAPE)
        weight = self.spaces.of_parameter("w", torch.Size([N, D])).expand(SHAPE)
        padded = torch.where(torch.arange(N)[:, None] == 0, PADDING, self.first).expand(SHAPE)
        lines = raw[:, :, :1].expand(SHAPE)
        self.operands = {
            "lost": self.operand(
                AbstractValue(Role.TOKENS, (), frozenset([1]), data=True, lost_at="scan")
            ),
            "tokens": self.tokens(self.first, 2),
            "same tokens, other calls": self.tokens(self.first, 3),
            "tokens of another space": self.tokens(word, 4),
            "tokens that attention added to": self.tokens(self.attended, 5),
            "others that attention added to": self.tokens(also, 9),
            "tokens and padding": self.tokens(padded, 6),
            "tokens of which some are lost": self.tokens(unknown, 7),
            "elements": self.operand(AbstractValue(Role.RAW, (raw,), data=True)),
            "elements of other places": self.operand(
                AbstractValue(Role.RAW, (raw.flip(1),), data=True)
            ),
            "statistic": self.operand(AbstractValue(Role.STATISTIC, (lines,), data=True)),
            "logits": self.pairs(Role.LOGITS),
            "probabilities": self.pairs(Role.PROBABILITIES),
            "parameter": self.operand(AbstractValue(Role.PARAMETER, (weight,))),
            "constant": self.operand(CONSTANT),
        }

    def born(self, name: str) -> Tensor:
        elements = self.spaces.of_input(name, SHAPE[:2])
        ids = self.spaces.created(elements.unsqueeze(-1), None)
        assert ids is not None
        return ids.unsqueeze(-1).expand(SHAPE)

    def operand(self, abstract: AbstractValue) -> Operand:
        generator = torch.Generator().manual_seed(1)
        tensor = torch.rand(SHAPE, generator=generator, requires_grad=True) * 2
        self.state.abstract_values[tensor] = abstract
        return Operand(tensor, SHAPE, abstract)

    def tokens(self, ids: Tensor, call: int) -> Operand:
        return self.operand(AbstractValue(Role.TOKENS, (ids,), frozenset([call]), data=True))

    def pairs(self, role: Role) -> Operand:
        queries = self.first
        keys = self.attended[:, :1, :1].expand(SHAPE)
        return self.operand(AbstractValue(role, (queries, keys), frozenset([8]), data=True))

    def sources(self, token: int) -> frozenset[int]:
        """A token with all that it was merged from, and what lives on as any of these."""
        found, waiting = set[int](), [token]
        while waiting:
            one = waiting.pop()
            if one < 0 or one in found:
                continue
            found.add(one)
            index, example, local = (int(n) for n in self.spaces.locate(torch.tensor([one])))
            space = self.spaces[index]
            owner = max(example, 0)
            if space.parents is not None:
                waiting += space.parents[owner, local].tolist()
            for other, table in self.spaces.absorbed_into(space):
                row = table[min(owner, len(table) - 1)].tolist()
                waiting += [
                    other.base + owner * other.size + i
                    for i, place in enumerate(row) if place == local
                ]  # fmt: skip
        return frozenset(found)

    def of(self, abstract: AbstractValue) -> tuple[Any, ...]:
        """What a value says: of each element the sources of its tokens; all that is lost is one."""
        known = []
        for ids in abstract.token_ids:
            each = torch.unique(ids)
            pairs = zip(each.tolist(), self.spaces.lost(each).tolist(), strict=True)
            told = {i: "lost" if gone else self.sources(i) for i, gone in pairs}
            known.append([told[i] for i in ids.reshape(-1).tolist()])
        return known, abstract.ancestors, abstract.data, abstract.pairs


NAMES = list(World().operands)
FEW = ["lost", "tokens", "tokens of another space", "tokens that attention added to", "elements"]


def mix(world: World, *names: str) -> AbstractValue:
    return mixture(world.state, "add", [world.operands[name] for name in names], SHAPE)


@pytest.mark.parametrize("name", NAMES)
def test_idempotent(name: str) -> None:
    """A value joined with itself is itself; a parameter that is computed with becomes tokens."""
    world = World()
    abstract = world.operands[name].abstract
    found = mix(world, name, name)
    assert world.of(found) == world.of(abstract)
    role = Role.TOKENS if abstract.role is Role.PARAMETER else abstract.role
    assert found.role is role


@pytest.mark.parametrize(("one", "other"), list(product(NAMES, NAMES)))
def test_the_order_of_operands_does_not_matter(one: str, other: str) -> None:
    """Each order in a world of its own: the same tokens, ancestors and role."""
    worlds = World(), World()
    found = mix(worlds[0], one, other), mix(worlds[1], other, one)
    assert worlds[0].of(found[0]) == worlds[1].of(found[1])
    assert found[0].role is found[1].role
    assert bool(found[0].lost_at) == bool(found[1].lost_at)


@pytest.mark.parametrize(("one", "other"), list(product(NAMES, NAMES)))
def test_the_join_is_an_upper_bound(one: str, other: str) -> None:
    """Nothing is forgotten: ancestors, data, and of tokens all sources, or the result is lost."""
    world = World()
    operands = [world.operands[name] for name in (one, other)]
    found = mix(world, one, other)
    for operand in operands:
        abstract = operand.abstract
        assert abstract.ancestors <= found.ancestors
        assert abstract.data <= found.data
        if not abstract.data or not abstract.token_ids or abstract.role is not Role.TOKENS:
            continue
        if not found.token_ids or found.pairs:  # lost, or a bias of logits
            continue
        told, needed = world.of(found)[0][0], world.of(abstract)[0][0]
        for mine, theirs in zip(told, needed, strict=True):
            assert mine == "lost" or (theirs != "lost" and theirs <= mine)


@pytest.mark.parametrize("other", NAMES)
def test_lost_joined_with_anything_of_data_is_lost(other: str) -> None:
    """Also with what has no data. Logits alone keep their pairs: a bias moves attention weights,
    and not the tokens that attention reads.
    """  # fmt: skip
    world = World()
    found = mix(world, "lost", other)
    if world.operands[other].abstract.pairs:
        assert world.of(found)[0] == world.of(world.operands[other].abstract)[0]
    else:
        assert not found.token_ids
        assert found.lost_at == "scan"
    assert 1 in found.ancestors


@pytest.mark.parametrize("other", [n for n in NAMES if n not in ("logits", "probabilities")])
def test_places_that_are_lost_stay_lost(other: str) -> None:
    world = World()
    found = mix(world, "tokens of which some are lost", other)
    assert not found.token_ids or bool(world.spaces.lost(found.token_ids[0]).all())


@pytest.mark.parametrize(("one", "other", "third"), list(product(FEW, repeat=3)))
def test_monotone(one: str, other: str, third: str) -> None:
    """Losing an operand cannot give tokens back: what is lost of a pair is lost of a triple."""
    world = World()
    pair = mix(world, one, other)
    if pair.token_ids or not pair.data:
        return
    again = World()
    found = mix(again, one, other, third)
    assert not found.token_ids, "a third operand found what two had lost"


def test_tokens_live_on_as_those_that_attention_added_to_but_these_are_merged() -> None:
    """Two tokens with histories of their own make a third, with both as parents."""
    world = World()
    found = mix(world, "tokens", "tokens that attention added to")
    assert torch.equal(found.token_ids[0], world.attended)
    found = mix(world, "tokens that attention added to", "others that attention added to")
    (new,) = world.spaces.indices(found.token_ids[0])
    parents = world.spaces[new].parents
    assert parents is not None
    both = [world.operands[n].ids[..., 0] for n in (NAMES[4], NAMES[5])]
    assert torch.equal(parents.sort(-1).values, torch.stack(both, -1).sort(-1).values)


def test_elements_of_different_places_are_lost() -> None:
    found = mix(World(), "elements", "elements of other places")
    assert not found.token_ids
    assert found.lost_at == "add"


def test_a_fold_is_what_three_operands_are() -> None:
    world, other = World(), World()
    names = "tokens", "tokens of another space", "tokens that attention added to"
    found = mix(world, *names)
    pair = mix(other, *names[:2])
    step = Operand(None, SHAPE, pair)
    folded = join(other.state, "add", step, other.operands[names[2]], SHAPE)
    assert world.of(found)[0] == other.of(folded)[0]


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_a_third_operand_meets_what_the_first_two_became(order: tuple[int, ...]) -> None:
    """All three can change the result, so its tokens were merged from all three."""
    world = World()
    names = (
        "tokens of another space",
        "tokens that attention added to",
        "others that attention added to",
    )
    found = mix(world, *(names[i] for i in order))
    (sources,) = world.of(found)[0]
    for name in names:
        (each,) = world.of(world.operands[name].abstract)[0]
        assert all(own <= those for own, those in zip(each, sources, strict=True)), name


def test_padding_takes_the_token_of_the_other() -> None:
    world = World()
    found = mix(world, "tokens and padding", "tokens")
    assert torch.equal(found.token_ids[0], world.first)
