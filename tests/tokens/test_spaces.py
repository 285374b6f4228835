"""Token spaces: numbering, looking up, births, and tokens that turn out to be the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.tokens.space import EXTERNAL, PADDING, Space
from captum_generic_attn.tokens.spaces import TokenSpaces


def centres_of(spaces: TokenSpaces, ids: Tensor) -> list[list[float]]:
    found = spaces.coordinates(ids)
    assert found is not None
    return found.tolist()


# --- numbering


def test_ids_are_base_plus_example_times_size_plus_local() -> None:
    spaces = TokenSpaces()
    spaces.of_parameter("prompt", torch.Size([3, 8]))
    token_ids = spaces.of_input("x", torch.Size([2, 3, 4]))
    space = spaces[1]
    assert (space.base, space.size, space.examples, space.stop) == (3, 12, 2, 27)
    assert (space.name, space.kind) == ("x", "element")
    for b in range(2):
        for i in range(3):
            for j in range(4):
                assert token_ids[b, i, j] == 3 + b * 12 + i * 4 + j


def test_an_input_s_elements_know_their_indices() -> None:
    spaces = TokenSpaces()
    token_ids = spaces.of_input("x", torch.Size([2, 3, 4]))
    expected = [[i, j] for i in range(3) for j in range(4)]
    assert centres_of(spaces, token_ids[0].reshape(-1)) == expected
    assert centres_of(spaces, token_ids[1].reshape(-1)) == expected


def test_input_of_one_value_per_example() -> None:
    spaces = TokenSpaces()
    token_ids = spaces.of_input("score", torch.Size([3]))
    assert token_ids.tolist() == [0, 1, 2]
    assert spaces.locate(token_ids)[1].tolist() == [0, 1, 2]
    assert spaces[0].at(torch.zeros(1).long()).shape == (1, 0)


def test_a_parameter_s_vectors_are_tokens_of_all_examples() -> None:
    spaces = TokenSpaces()
    spaces.of_input("x", torch.Size([2, 5]))
    token_ids = spaces.of_parameter("cls", torch.Size([1, 3, 7]))
    assert token_ids.shape == (1, 3, 7)
    assert token_ids[0, :, 0].tolist() == token_ids[0, :, 6].tolist() == [10, 11, 12]
    assert token_ids.stride(-1) == 0, "features take no memory"
    index, example, local = spaces.locate(token_ids[0, :, 0])
    assert (index.tolist(), example.tolist(), local.tolist()) == ([1] * 3, [-1] * 3, [0, 1, 2])
    assert spaces[1].kind == "parameter"
    assert spaces.coordinates(token_ids) is None


def test_unknown_tokens_are_named_after_where_they_were_lost() -> None:
    spaces = TokenSpaces()
    token_ids = spaces.unknown(torch.Size([2, 3]), "sort")
    assert token_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (spaces[0].name, spaces[0].kind, spaces[0].size) == ("sort", "unknown", 6)


SIZES = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=5
)  # size, examples (0: shared by all)


@given(sizes=SIZES)
@settings(deadline=None, max_examples=40)
def test_every_id_is_found_again(sizes: list[tuple[int, int]]) -> None:
    """Against the definition, one id after the other."""
    spaces = TokenSpaces()
    expected = []
    for number, (size, examples) in enumerate(sizes):
        if examples:
            spaces.of_input(str(number), torch.Size([examples, size]))
        else:
            spaces.of_parameter(str(number), torch.Size([size, 2]))
        for example in range(examples) if examples else [-1]:
            expected += [(number, example, local) for local in range(size)]
    ids = torch.arange(len(expected))
    found = torch.stack(spaces.locate(ids), -1).tolist()
    assert [tuple(row) for row in found] == expected


def test_no_token_is_nowhere() -> None:
    spaces = TokenSpaces()
    spaces.of_input("x", torch.Size([2, 5]))
    for located in spaces.locate(torch.tensor([PADDING, EXTERNAL])):
        assert located.tolist() == [-1, -1]
    assert spaces.indices(torch.tensor([PADDING, EXTERNAL])) == []
    assert spaces.coordinates(torch.tensor([PADDING])) is None
    assert spaces.coordinates(torch.tensor([], dtype=torch.int32)) is None


def test_indices_come_in_order_of_appearance() -> None:
    spaces = TokenSpaces()
    a = spaces.of_input("a", torch.Size([1, 2]))
    b = spaces.of_input("b", torch.Size([1, 2]))
    c = spaces.of_parameter("c", torch.Size([1, 2]))[..., 0]
    ids = torch.cat([c[None], a[:, :1], b, torch.tensor([[PADDING]]), a], 1)
    assert spaces.indices(ids) == [2, 0, 1]


def test_tokens_of_two_inputs_share_no_coordinates() -> None:
    spaces = TokenSpaces()
    a = spaces.of_input("a", torch.Size([1, 2]))
    b = spaces.of_input("b", torch.Size([1, 2]))
    assert spaces.coordinates(torch.cat([a, b], 1)) is None


def test_spaces_are_listed_in_the_order_of_their_birth() -> None:
    spaces = TokenSpaces()
    spaces.of_input("a", torch.Size([1, 2]))
    spaces.of_parameter("b", torch.Size([1, 2]))
    assert [(s.index, s.name) for s in spaces] == [(0, "a"), (1, "b")]


# --- births


def born(spaces: TokenSpaces, parents: Tensor, centres: Tensor | None = None) -> Tensor:
    token_ids = spaces.created(parents.unsqueeze(-1), centres)
    assert token_ids is not None
    return token_ids


def test_tokens_are_born_of_their_parents_examples() -> None:
    spaces = TokenSpaces()
    ids = spaces.of_input("ids", torch.Size([2, 3]))
    token_ids = born(spaces, ids, torch.arange(3.0).repeat(2)[:, None])
    assert token_ids.tolist() == [[6, 7, 8], [9, 10, 11]]
    assert token_ids.dtype == torch.int32
    space = spaces[1]
    assert (space.name, space.kind, space.size, space.examples) == ("ids", "token", 3, 2)


def test_tokens_first_layout_keeps_the_same_numbers() -> None:
    spaces = TokenSpaces()
    ids = spaces.of_input("ids", torch.Size([2, 3]))
    assert born(spaces, ids.T).T.tolist() == [[6, 7, 8], [9, 10, 11]]


@given(examples=st.integers(1, 3), size=st.integers(1, 4), draw=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_births_in_any_order_belong_to_their_parents_examples(examples, size, draw) -> None:
    spaces = TokenSpaces()
    ids = spaces.of_input("ids", torch.Size([examples, size])).reshape(-1)
    order = list(range(examples * size))
    draw.shuffle(order)
    token_ids = born(spaces, ids[order])
    assert sorted(token_ids.tolist()) == list(range(examples * size, 2 * examples * size))
    assert torch.equal(spaces.locate(token_ids)[1], spaces.locate(ids[order])[1])


def test_a_parameter_s_children_are_a_parameter_s() -> None:
    spaces = TokenSpaces()
    spaces.of_input("ids", torch.Size([2, 3]))
    queries = spaces.of_parameter("queries", torch.Size([4, 8]))
    token_ids = born(spaces, queries[:, 0])
    assert token_ids.tolist() == [10, 11, 12, 13]
    assert (spaces[2].kind, spaces[2].name) == ("parameter", "queries")


def test_a_new_space_remembers_its_parents() -> None:
    spaces = TokenSpaces()
    ids = spaces.of_input("ids", torch.Size([2, 4]))
    words = born(spaces, ids)  # 8 to 15
    assert spaces[1].parents is None, "made of an input's elements"
    pairs = spaces.created(words.view(2, 2, 2), None)
    assert pairs is not None
    assert pairs.tolist() == [[16, 17], [18, 19]]
    assert spaces[2].parents is not None
    assert spaces[2].parents.tolist() == [[[9, 8], [11, 10]], [[13, 12], [15, 14]]]


def test_children_of_the_same_parents_are_the_same_tokens() -> None:
    """In whatever order and however often the parents are listed."""
    spaces = TokenSpaces()
    words = born(spaces, spaces.of_input("ids", torch.Size([1, 4])))
    pairs = spaces.created(words.view(1, 2, 2), None)
    again = spaces.created(torch.tensor([[[5, 4, 5, PADDING], [7, 6, 7, 7]]]), None)
    others = spaces.created(torch.tensor([[[5, 6], [7, 4]]]), None)
    assert pairs is not None
    assert again is not None
    assert others is not None
    assert torch.equal(pairs, again)
    assert not torch.equal(pairs, others)
    assert len(list(spaces)) == 4


def test_a_row_without_parents_is_padding() -> None:
    spaces = TokenSpaces()
    words = born(spaces, spaces.of_input("ids", torch.Size([2, 2])))
    padded = torch.nn.functional.pad(words, (0, 2), value=PADDING).view(2, 2, 2)
    token_ids = spaces.created(padded, None)
    assert token_ids is not None
    assert token_ids.tolist() == [[8, PADDING], [9, PADDING]]


def test_parents_may_come_from_parameters_as_well() -> None:
    """The mean over a class token and patches: of each example's own, and shared by none."""
    spaces = TokenSpaces()
    words = born(spaces, spaces.of_input("ids", torch.Size([2, 2])))  # 4 to 7
    cls = spaces.of_parameter("cls", torch.Size([1, 8]))[:, 0]  # 8
    rows = torch.cat([cls.expand(2, -1), words], 1)
    token_ids = spaces.created(rows, None)
    assert token_ids is not None
    space = spaces[spaces.indices(token_ids)[0]]
    assert (space.name, space.kind, space.size, space.examples) == ("ids", "token", 1, 2)
    assert space.parents is not None
    assert space.parents.tolist() == [[[8, 5, 4]], [[8, 7, 6]]]


def test_constants_among_integers_are_tokens_of_the_table() -> None:
    spaces = TokenSpaces()
    spaces.of_input("ids", torch.Size([2, 3]))
    constant = torch.tensor([[True, False, False], [True, False, True]])
    ids = spaces.of_constants("embed.weight", constant)
    assert ids.tolist() == [[6, PADDING, 7]] * 2
    assert (spaces[1].name, spaces[1].kind, spaces[1].size) == ("embed.weight", "parameter", 2)


def attended(spaces: TokenSpaces, *every: Tensor) -> None:
    for token_ids in every:
        spaces.mark_queried(token_ids)


def test_tokens_that_attention_never_added_to_may_live_on_as_others() -> None:
    spaces = TokenSpaces()
    words = born(spaces, spaces.of_input("ids", torch.Size([1, 4])))
    others = born(spaces, spaces.of_input("types", torch.Size([1, 4])))
    assert spaces.is_subsumed(others, words)
    assert spaces.is_subsumed(words, others)
    attended(spaces, words)
    assert spaces.is_subsumed(others, words)
    assert not spaces.is_subsumed(words, others), "what attention taught words would be lost"


def test_what_was_pooled_before_is_known_to_what_was_pooled_and_attended() -> None:
    """The skip connection of a layer that pools its queries."""
    spaces = TokenSpaces()
    words = born(spaces, spaces.of_input("ids", torch.Size([1, 4])))
    attended(spaces, words)
    queries = spaces.created(words.view(1, 2, 2), None)
    skip = spaces.created(words[:, ::2, None], None)
    assert queries is not None
    assert skip is not None
    attended(spaces, queries)
    assert spaces.is_subsumed(skip, queries)
    assert not spaces.is_subsumed(queries, skip)
    assert not spaces.is_subsumed(words, queries), "words have a history of their own"


def test_several_tokens_of_one_example() -> None:
    spaces = TokenSpaces()
    words = born(spaces, spaces.of_input("ids", torch.Size([2, 3])))
    assert spaces.several(words)
    assert not spaces.several(words[:, :1])
    assert not spaces.several(torch.full((2, 3), PADDING))


UNBORN = {
    "padding alone": lambda a, b: torch.full((2, 3), PADDING),
    "two inputs": lambda a, b: torch.cat([a, b], 1),
    "a part of it is padding": lambda a, b: torch.tensor([[0, 1, 2], [3, 4, PADDING]]),
    "more tokens in one example than in the other": lambda a, b: torch.cat([a[0], a[1, :1]]),
    "an uneven split": lambda a, b: torch.cat([a[0], a[0, :2], a[1, :1]]),
}


@pytest.mark.parametrize("case", UNBORN)
def test_tokens_that_cannot_be_numbered(case: str) -> None:
    spaces = TokenSpaces()
    a, b = (spaces.of_input(name, torch.Size([2, 3])) for name in "ab")
    assert spaces.created(UNBORN[case](a, b).unsqueeze(-1), None) is None
    assert len(list(spaces)) == 2, "nothing is opened in vain"


def test_centres_that_differ_between_examples_are_not_told() -> None:
    spaces = TokenSpaces()
    ids = spaces.of_input("ids", torch.Size([2, 3]))
    token_ids = born(spaces, ids, torch.arange(6.0)[:, None])
    assert spaces.coordinates(token_ids) is None


def patches(spaces: TokenSpaces, shift: float = 0.0) -> Tensor:
    parents = torch.tensor([[0, 0, 0, 0], [16, 16, 16, 16]])
    centres = torch.tensor([[0, i, j] for i in (0.5, 2.5) for j in (0.5, 2.5)]) + shift
    return born(spaces, parents, centres.repeat(2, 1))


def test_patches_read_twice_are_other_patches() -> None:
    """Two towers on one picture are two streams; the branches of a stem are one by their sum."""
    spaces = TokenSpaces()
    spaces.of_input("x", torch.Size([2, 1, 4, 4]))
    first, second = patches(spaces), patches(spaces)
    assert spaces.indices(first) != spaces.indices(second)
    spaces.identify(first, second)
    ((absorbed, _),) = spaces.absorbed_into(spaces[spaces.indices(first)[0]])
    assert absorbed.index == spaces.indices(second)[0]


# --- births of rows


def test_a_row_s_centre_is_the_mean_of_its_elements() -> None:
    spaces = TokenSpaces()
    x = spaces.of_input("x", torch.Size([2, 4, 4]))
    rows = x.unflatten(2, (2, 2)).reshape(2, 8, 2)
    token_ids = spaces.created_of_rows(rows)
    assert token_ids is not None
    assert token_ids.tolist() == [list(range(32, 40)), list(range(40, 48))]
    assert centres_of(spaces, token_ids[1]) == [[i, j] for i in range(4) for j in (0.5, 2.5)]


def test_padding_in_a_row_does_not_move_its_centre() -> None:
    spaces = TokenSpaces()
    spaces.of_input("x", torch.Size([1, 6]))
    token_ids = spaces.created_of_rows(torch.tensor([[[0, 1, 2], [3, 5, PADDING]]]))
    assert token_ids is not None
    assert centres_of(spaces, token_ids[0]) == [[1.0], [4.0]]


def test_rows_at_an_edge_have_the_centre_of_their_like() -> None:
    """A word beside its neighbours: the first has none to its left."""
    spaces = TokenSpaces()
    spaces.of_input("x", torch.Size([1, 4]))
    rows = torch.tensor([[[PADDING, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, PADDING]]])
    token_ids = spaces.created_of_rows(rows)
    assert token_ids is not None
    assert centres_of(spaces, token_ids[0]) == [[0.0], [1.0], [2.0], [3.0]]


def test_rows_of_several_inputs_are_tokens_of_both() -> None:
    spaces = TokenSpaces()
    a = spaces.of_input("a", torch.Size([2, 2, 1]))
    b = spaces.of_input("b", torch.Size([2, 2, 1]))
    token_ids = spaces.created_of_rows(torch.cat([a, b], -1))
    assert token_ids is not None
    (first,) = spaces.indices(token_ids)
    assert spaces[first].name == "a"
    ((other, table),) = spaces.absorbed_into(spaces[first])
    assert other.name == "b"
    assert table.tolist() == [[0, 1], [0, 1]]


def test_sequences_of_several_inputs_are_tokens_of_each() -> None:
    spaces = TokenSpaces()
    a = spaces.of_input("a", torch.Size([2, 2, 1]))
    b = spaces.of_input("b", torch.Size([2, 3, 1]))
    token_ids = spaces.created_of_rows(torch.cat([a, b], 1))
    assert token_ids is not None
    assert [spaces[i].name for i in spaces.indices(token_ids)] == ["a", "b"]
    assert [spaces[i].size for i in spaces.indices(token_ids)] == [2, 3]


def test_rows_that_mix_examples_make_no_tokens() -> None:
    spaces = TokenSpaces()
    x = spaces.of_input("x", torch.Size([2, 3]))
    assert spaces.created_of_rows(x.T[None]) is None


def test_every_example_s_own_order_is_kept() -> None:
    """Elements moved about in another way in each example lie where they came from in each."""
    spaces = TokenSpaces()
    x = spaces.of_input("x", torch.Size([2, 3]))
    order = torch.tensor([[2, 0, 1], [0, 1, 2]])
    token_ids = spaces.created_of_rows(x.gather(1, order)[..., None])
    assert token_ids is not None
    for example in range(2):
        found = spaces.coordinates(token_ids[example])
        if found is not None:  # not to know is right as well
            assert found[:, 0].tolist() == order[example].tolist()


# --- tokens that are the same


def three_inputs() -> tuple[TokenSpaces, list[Tensor]]:
    spaces = TokenSpaces()
    return spaces, [spaces.of_input(name, torch.Size([2, 3])) for name in "abc"]


def absorbed(spaces: TokenSpaces, index: int) -> dict[str, list[int]]:
    """Where the tokens of each space went, the same in both examples."""
    found = {}
    for space, table in spaces.absorbed_into(spaces[index]):
        assert torch.equal(table.expand(2, -1), table[:1].expand(2, -1))
        found[space.name] = table[0].tolist()
    return found


def test_what_is_summed_lives_on_in_what_it_was_summed_into() -> None:
    spaces, (a, b, _) = three_inputs()
    spaces.identify(a, b.flip(1))
    assert absorbed(spaces, 0) == {"b": [2, 1, 0]}
    assert absorbed(spaces, 1) == {}


def test_examples_may_sum_in_orders_of_their_own() -> None:
    spaces, (a, b, c) = three_inputs()
    spaces.identify(a, b.gather(1, torch.tensor([[2, 0, 1], [0, 1, 2]])))
    spaces.identify(b, c.flip(1))
    found = {s.name: table.tolist() for s, table in spaces.absorbed_into(spaces[0])}
    assert found == {"b": [[1, 2, 0], [0, 1, 2]], "c": [[0, 2, 1], [2, 1, 0]]}


def test_absorption_is_followed_through() -> None:
    spaces, (a, b, c) = three_inputs()
    spaces.identify(b, c.roll(1, 1))
    spaces.identify(a, b.roll(1, 1))
    # c[i] was added to b[i + 1], b[i] to a[i + 1]
    assert absorbed(spaces, 0) == {"b": [1, 2, 0], "c": [2, 0, 1]}


def test_tokens_added_to_no_token_go_nowhere() -> None:
    spaces, (a, b, _) = three_inputs()
    kept = a.clone()
    kept[:, 1] = PADDING
    spaces.identify(kept, b)
    assert absorbed(spaces, 0) == {"b": [0, -1, 2]}


def test_the_first_sum_counts_and_none_goes_in_circles() -> None:
    spaces, (a, b, _) = three_inputs()
    spaces.identify(a, b)
    spaces.identify(a, b.flip(1))
    spaces.identify(b, a.flip(1))
    spaces.identify(a, a)
    assert absorbed(spaces, 0) == {"b": [0, 1, 2]}
    assert absorbed(spaces, 1) == {}


def test_the_elements_that_merged_tokens_were_made_of() -> None:
    """Each parent's own, of whichever space, in any example."""
    spaces = TokenSpaces()
    elements = spaces.of_input("x", torch.Size([2, 12]))
    first = spaces.created_of_rows(elements[:, :4].view(2, 2, 2))
    last = spaces.created_of_rows(elements[:, 6:12].view(2, 2, 3))
    assert first is not None
    assert last is not None
    rows = torch.stack([first, last], -1)
    found = spaces.extent(rows[0])
    assert found is not None
    assert found.ranges[:, 0].tolist() == [[0, 8], [2, 11]]
    assert found.along[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    alone = spaces.extent(torch.stack([first[0], torch.full_like(first[0], PADDING)], -1))
    assert alone is not None
    assert alone.ranges[:, 0].tolist() == [[0, 1], [2, 3]]
    centres = torch.tensor([[1.0], [5.0]]).repeat(2, 1)
    swapped = torch.stack([rows[0], torch.stack([first[1].flip(0), last[1]], -1)])
    merged = spaces.created(swapped, centres)
    assert merged is not None
    extent = spaces[spaces.indices(merged)[0]].extent
    assert extent is not None
    assert extent.ranges[:, 0].tolist() == [[0, 8], [0, 11]]  # those of all examples


def test_axes_of_tokens_and_of_examples() -> None:
    """Padding is no token, and what each example has once is no axis of tokens."""
    spaces = TokenSpaces()
    words = spaces.of_input("x", torch.Size([2, 3]))
    assert spaces.token_axes(words) == {1}
    assert spaces.example_axes(words) == {0}
    padded = torch.tensor([[0, PADDING, PADDING], [3, PADDING, 3]], dtype=torch.int32)
    assert spaces.token_axes(padded) == set()
    assert spaces.example_axes(padded) == {0}
    mixed = torch.tensor([[0, PADDING, 1], [3, 3, 3]], dtype=torch.int32)
    assert spaces.token_axes(mixed) == {1}
    shared = spaces.of_parameter("cls", torch.Size([2, 1]))[:, 0].expand(3, 2)
    assert spaces.token_axes(shared) == {1}
    assert spaces.example_axes(shared) == set()


def test_expanded_planes_are_the_same_as_plain_ones() -> None:
    spaces, (a, b, _) = three_inputs()
    spaces.identify(a[..., None].expand(-1, -1, 5), b.flip(1)[..., None].expand(-1, -1, 5))
    assert absorbed(spaces, 0) == {"b": [2, 1, 0]}


def test_parameters_are_absorbed_too() -> None:
    spaces = TokenSpaces()
    x = spaces.of_input("x", torch.Size([2, 3]))
    extra = spaces.of_parameter("extra", torch.Size([3, 2]))[:, 0]
    spaces.identify(x, extra.expand(2, -1))
    assert absorbed(spaces, 0) == {"extra": [0, 1, 2]}


def test_tokens_that_are_added_to_each_other_do_not_live_on_as_each_other() -> None:
    spaces, (a, _, _) = three_inputs()
    assert not spaces.identify(a, a.flip(1))
    assert not spaces._identified


def test_a_token_does_not_live_on_as_two_others() -> None:
    spaces, (a, b, _) = three_inputs()
    assert not spaces.identify(a, b[:, :1].expand(a.shape))
    assert not spaces._identified
    assert spaces.identify(a, b)
    assert not spaces.identify(a, b.flip(1))


def origins(spaces: TokenSpaces) -> dict[str, str]:
    """What `origin` says, were it to end."""
    for name in "abc":
        seen = [name]
        while (following := spaces._origins.get(seen[-1])) is not None:
            assert following not in seen, f"{seen} goes in a circle"
            seen.append(following)
    return {name: spaces.origin(name) for name in "abc"}


def test_inputs_that_are_summed_have_one_origin() -> None:
    spaces, (a, b, c) = three_inputs()
    assert origins(spaces) == {"a": "a", "b": "b", "c": "c"}
    spaces.same_input(b, c)
    spaces.same_input(a, b)
    assert origins(spaces) == {"a": "a", "b": "a", "c": "a"}


def test_inputs_that_are_summed_in_another_order_keep_theirs() -> None:
    spaces, (a, b, _) = three_inputs()
    spaces.same_input(a, b.flip(1))
    assert origins(spaces) == {"a": "a", "b": "b", "c": "c"}


def test_origins_never_go_in_circles() -> None:
    """`x * 2 + x`, or a sum of two inputs this way and that way."""
    spaces, (a, b, c) = three_inputs()
    spaces.same_input(a, a.clone())
    spaces.same_input(a, b)
    spaces.same_input(b, a)
    spaces.same_input(b, c)
    spaces.same_input(c, a)
    assert set(origins(spaces).values()) == {"a"}


def test_rows_of_a_table_are_numbered_once_each() -> None:
    spaces = TokenSpaces()
    spaces.of_input("x", torch.Size([2, 3]))
    token_ids = spaces.of_table("positions", torch.tensor([[4, 2, 4], [2, 2, 9]]))
    assert token_ids.tolist() == [[7, 6, 7], [6, 6, 8]]
    assert (spaces[1].kind, spaces[1].size, spaces[1].examples) == ("parameter", 3, 0)


def test_an_input_that_is_no_batch_is_shared() -> None:
    spaces = TokenSpaces()
    token_ids = spaces.of_input("grid", torch.Size([2, 3]), shared=True)
    assert token_ids.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert spaces.locate(token_ids)[1].unique().tolist() == [-1]
    assert (spaces[0].kind, spaces[0].size, spaces[0].coordinates) == ("shared", 6, None)


def test_a_space_is_frozen() -> None:
    space = Space(0, 0, 1, 1, "x", "element")
    with pytest.raises(AttributeError, match="name"):
        space.name = "y"
