"""Token ids: where they repeat, and what differs along an axis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_generic_attn.tokens import ids

IDS = torch.arange(6).view(2, 3)


def test_compact_keeps_one_of_each_repetition() -> None:
    token_ids = IDS[:, None, :, None].expand(2, 4, 3, 5)
    assert ids.squeeze_expanded(token_ids).shape == (2, 1, 3, 1)
    assert torch.equal(ids.squeeze_expanded(token_ids).expand(2, 4, 3, 5), token_ids)
    assert ids.squeeze_expanded(IDS) is IDS


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        (IDS, [True, True]),
        (IDS[:, :1].expand(2, 5), [True, False]),
        (torch.zeros(2, 3, dtype=torch.long), [False, False]),
        (torch.tensor([[4, 4, -1], [4, -1, 4]]), [False, False]),
        (torch.tensor([[-1, -1], [4, 5]]), [False, True]),
        (torch.full((2, 2), -2), [False, False]),
        (torch.zeros(1, 1, dtype=torch.long), [False, False]),
    ],
    ids=["ids", "expanded", "one token", "padded", "padded row", "foreign", "one element"],
)
def test_varies(token_ids: Tensor, expected: list[bool]) -> None:
    """Padding counts as any token."""
    assert [ids.varies(token_ids, axis) for axis in (0, 1)] == expected
    assert [ids.varies(token_ids, axis) for axis in (-2, -1)] == expected


def test_first_along_prefers_tokens_to_padding() -> None:
    token_ids = torch.tensor([[7, 7, -1], [-1, 8, 8], [-1, -1, -1]])
    assert ids.first_along(token_ids, 1).tolist() == [[7], [8], [-1]]
    expanded = IDS[:, :1].expand(2, 4)
    assert ids.first_along(expanded, 1).tolist() == [[0], [3]]
    assert ids.first_along(torch.empty(2, 0, dtype=torch.long), 1).shape == (2, 0)


def test_same_ids() -> None:
    assert ids.same_ids(IDS, IDS)
    assert ids.same_ids(IDS, IDS.clone())
    assert not ids.same_ids(IDS, IDS.flip(0))
    wide = IDS[..., None].expand(2, 3, 4)
    assert ids.same_ids(wide, IDS.clone()[..., None].expand(2, 3, 4))
    assert ids.same_ids(wide, wide.clone())
    assert not ids.same_ids(wide, IDS.flip(1)[..., None].expand(2, 3, 4))
    square = torch.arange(9).view(3, 3)
    assert not ids.same_ids(square, square.T), "one storage, other strides"


def test_repeats_is_what_is_stored_once() -> None:
    wide = IDS[:, None].expand(2, 4, 3)
    assert [ids.repeats(wide, axis) for axis in (0, 1, 2)] == [False, True, False]
    assert not ids.repeats(wide.clone(), 1), "equal, but stored apart"
    assert ids.repeats(IDS[:, :1], 1), "one element"


def test_distinct_along_drops_what_repeats_the_entry_before() -> None:
    lines = torch.tensor([[1, 1, 2], [3, 3, 4]])
    assert ids.distinct_along(lines, 1).tolist() == [[1, 2], [3, 4]]
    wide = lines[..., None].expand(2, 3, 5)
    assert ids.distinct_along(wide, 1).shape == (2, 2, 5)
    assert ids.distinct_along(wide, 2).shape == (2, 3, 1)
    assert torch.equal(ids.distinct_along(lines, 0), lines)


def test_fingerprint_tells_ids_and_how_they_repeat() -> None:
    wide = IDS[:, None].expand(2, 4, 3)
    assert ids.fingerprint(wide) == ids.fingerprint(IDS.clone()[:, None].expand(2, 4, 3))
    assert ids.fingerprint(wide) != ids.fingerprint(wide.clone())
    assert ids.fingerprint(wide) != ids.fingerprint(IDS.flip(0)[:, None].expand(2, 4, 3))
