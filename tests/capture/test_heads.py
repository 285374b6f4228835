"""The maps of a call are sorted into examples (or windows) and heads, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_generic_attn.capture.heads import Groups, group_heads
from captum_generic_attn.capture.unsupported import UnsupportedCallError
from captum_generic_attn.tokens.space import EXTERNAL, PADDING
from captum_generic_attn.tokens.spaces import TokenSpaces

B, H, N = 3, 2, 4


def words(count: int = N) -> tuple[TokenSpaces, Tensor]:
    spaces = TokenSpaces()
    spaces.of_parameter("prompt", torch.Size([5, 1]))
    return spaces, spaces.of_input("ids", torch.Size([B, count]))


def check(groups: Groups, queries: Tensor, keys: Tensor) -> None:
    """Each map belongs to one group with the same tokens; heads keep their order."""
    assert sorted(groups.head_index.flatten().tolist()) == list(range(queries[..., 0].numel()))
    assert (groups.head_index.diff(dim=1) > 0).all()
    flat_queries, flat_keys = queries.flatten(0, -2), keys.flatten(0, -2)
    for group, places in enumerate(groups.head_index):
        for place in places:
            assert torch.equal(flat_queries[place], groups.query_tokens[group])
            assert torch.equal(flat_keys[place], groups.key_tokens[group])


# name -> (layout of [B, N] ids with H heads, the places of the heads of each example)
LAYOUTS = {
    "[B, H, N]": (lambda ids: ids[:, None].expand(B, H, N), [[0, 1], [2, 3], [4, 5]]),
    "[B, H, N], copied": (
        lambda ids: ids[:, None].expand(B, H, N).contiguous(), [[0, 1], [2, 3], [4, 5]],
    ),
    "[B * H, N]": (
        lambda ids: ids[:, None].expand(B, H, N).reshape(B * H, N), [[0, 1], [2, 3], [4, 5]],
    ),
    "[H * B, N]": (lambda ids: ids.repeat(H, 1), [[0, 3], [1, 4], [2, 5]]),
    "[H, B, N]": (lambda ids: ids.expand(H, B, N), [[0, 3], [1, 4], [2, 5]]),
    "[H, B, N], copied": (
        lambda ids: ids.expand(H, B, N).contiguous(), [[0, 3], [1, 4], [2, 5]],
    ),
    "[B, N], one head": (lambda ids: ids, [[0], [1], [2]]),
    "[B, 1, H, N]": (lambda ids: ids[:, None, None].expand(B, 1, H, N), [[0, 1], [2, 3], [4, 5]]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    spaces, ids = words()
    arrange, places = LAYOUTS[layout]
    rows = arrange(ids)
    groups = group_heads(rows, rows, spaces, B)
    check(groups, rows, rows)
    assert torch.equal(groups.query_tokens, ids)
    assert torch.equal(groups.key_tokens, ids)
    assert groups.examples.tolist() == [0, 1, 2]
    assert groups.head_index.tolist() == places


def test_groups_of_heads_within_groups() -> None:
    """Grouped queries: `[B, groups, H, N]` is `groups * H` heads."""
    spaces, ids = words()
    rows = ids[:, None, None].expand(B, 2, H, N)
    groups = group_heads(rows, rows, spaces, B)
    assert groups.head_index.tolist() == [[4 * b + i for i in range(4)] for b in range(B)]


def test_queries_may_be_others_than_keys() -> None:
    spaces, ids = words()
    queries, keys = ids[:, None, :1].expand(B, H, 1), ids[:, None].expand(B, H, N)
    groups = group_heads(queries, keys, spaces, B)
    check(groups, queries, keys)
    assert groups.query_tokens.shape == (B, 1)
    assert groups.key_tokens.shape == (B, N)


@pytest.mark.parametrize("layout", ["windows in front", "windows inside"])
def test_windows(layout: str) -> None:
    spaces, ids = words(6)
    windows = ids.view(B, 2, 3)
    rows = windows[:, :, None].expand(B, 2, H, 3)
    if layout == "windows in front":
        rows = rows.reshape(B * 2, H, 3)
    groups = group_heads(rows, rows, spaces, B)
    check(groups, rows, rows)
    assert torch.equal(groups.query_tokens, windows.reshape(6, 3))
    assert groups.examples.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_class_token_belongs_to_every_example() -> None:
    spaces, ids = words()
    rows = torch.cat([torch.zeros(B, 1, dtype=ids.dtype), ids], 1)[:, None].expand(B, H, N + 1)
    groups = group_heads(rows, rows, spaces, B)
    check(groups, rows, rows)
    assert groups.examples.tolist() == [0, 1, 2]
    assert groups.query_tokens[:, 0].tolist() == [0, 0, 0]


def test_padding_belongs_to_no_example() -> None:
    spaces, ids = words()
    padded = torch.nn.functional.pad(ids, (0, 2), value=PADDING)
    rows = padded[:, None].expand(B, H, N + 2)
    groups = group_heads(rows, rows, spaces, B)
    assert torch.equal(groups.query_tokens, padded)
    assert groups.examples.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "rows",
    [
        torch.arange(5).expand(B, H, 5),
        torch.arange(5).expand(B, H, 5).contiguous(),
        torch.arange(5).expand(B * H, 5),
        torch.arange(5).expand(B * H, 5).contiguous(),
    ],
    ids=["[B, H, N]", "[B, H, N], copied", "[B * H, N]", "[B * H, N], copied"],
)
def test_parameters_alone_are_told_apart_by_their_place(rows: Tensor) -> None:
    """Object queries among themselves: the same ids in each example."""
    spaces, _ = words()
    groups = group_heads(rows, rows, spaces, B)
    assert groups.examples.tolist() == [0, 1, 2]
    assert groups.head_index.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert groups.query_tokens.tolist() == [list(range(5))] * B


def test_parameters_of_a_single_example() -> None:
    spaces, _ = words()
    rows = torch.arange(5).expand(1, H, 5)
    groups = group_heads(rows, rows, spaces, 1)
    assert groups.examples.tolist() == [0]
    assert groups.head_index.tolist() == [[0, 1]]


REFUSED = {
    "tokens of two examples": (
        lambda ids: ids.T[:, None].expand(N, H, B), "tokens of different examples",
    ),
    "a cache": (
        lambda ids: torch.cat([torch.full((B, 2), EXTERNAL), ids], 1)[:, None],
        "no input feeds (a filled key-value cache?)",
    ),
    "heads that read other tokens": (
        lambda ids: torch.cat([ids[:, None], ids[:, None].flip(2)], 1)[[0, 0, 1, 2]],
        "heads of one example read different tokens",
    ),
    "one example alone": (
        lambda ids: ids[:1, None].expand(1, H, N), "it reads tokens of 1 of the 3 examples",
    ),
    "a token twice": (
        lambda ids: torch.cat([ids, ids[:, :1]], 1)[:, None].expand(B, H, N + 1),
        "one token stands in several places of the sequence",
    ),
    "shared parameters": (
        lambda ids: torch.arange(5).expand(H, 5), "between parameters that all examples share",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_grouped(case: str) -> None:
    spaces, ids = words()
    arrange, seen = REFUSED[case]
    rows = arrange(ids)
    with pytest.raises(UnsupportedCallError) as caught:
        group_heads(rows, rows, spaces, B)
    assert seen in caught.value.reason.seen
    assert str(caught.value) == caught.value.reason.seen
    assert caught.value.reason.advice
