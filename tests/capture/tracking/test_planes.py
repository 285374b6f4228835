"""Arithmetic on planes of token ids, and centres of windows against brute force."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.capture.tracking import planes

IDS = torch.arange(6).view(2, 3)


def test_compact_keeps_one_of_each_repetition() -> None:
    plane = IDS[:, None, :, None].expand(2, 4, 3, 5)
    assert planes.compact(plane).shape == (2, 1, 3, 1)
    assert torch.equal(planes.compact(plane).expand(2, 4, 3, 5), plane)
    assert planes.compact(IDS) is IDS


@pytest.mark.parametrize(
    ("plane", "expected"),
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
def test_varies(plane: Tensor, expected: list[bool]) -> None:
    """Padding counts as any token."""
    assert [planes.varies(plane, axis) for axis in (0, 1)] == expected
    assert [planes.varies(plane, axis) for axis in (-2, -1)] == expected


def test_first_along_prefers_tokens_to_padding() -> None:
    plane = torch.tensor([[7, 7, -1], [-1, 8, 8], [-1, -1, -1]])
    assert planes.first_along(plane, 1).tolist() == [[7], [8], [-1]]
    expanded = IDS[:, :1].expand(2, 4)
    assert planes.first_along(expanded, 1).tolist() == [[0], [3]]
    assert planes.first_along(torch.empty(2, 0, dtype=torch.long), 1).shape == (2, 0)


def test_same_plane() -> None:
    assert planes.same_plane(IDS, IDS)
    assert planes.same_plane(IDS, IDS.clone())
    assert not planes.same_plane(IDS, IDS.flip(0))
    wide = IDS[..., None].expand(2, 3, 4)
    assert planes.same_plane(wide, IDS.clone()[..., None].expand(2, 3, 4))
    assert planes.same_plane(wide, wide.clone())
    assert not planes.same_plane(wide, IDS.flip(1)[..., None].expand(2, 3, 4))
    square = torch.arange(9).view(3, 3)
    assert not planes.same_plane(square, square.T), "one storage, other strides"


# --- relabel: its laws over random products stand in test_capture_contraction.py


def test_relabel_moves_and_repeats_axes() -> None:
    ours = planes.relabel(IDS, ("i", "h"), ("h", "j", "i"), torch.Size([3, 4, 2]))
    assert ours is not None
    assert torch.equal(ours, IDS.T[:, None, :].expand(3, 4, 2))


def test_relabel_of_what_is_summed() -> None:
    features = IDS[..., None].expand(2, 3, 4)
    ours = planes.relabel(features, ("b", "i", "d"), ("b", "i"), torch.Size([2, 3]))
    assert ours is not None
    assert torch.equal(ours, IDS)
    assert planes.relabel(features, ("b", "i", "d"), ("b", "d"), torch.Size([2, 4])) is None


def test_relabel_sums_over_padding() -> None:
    plane = torch.tensor([[5, -1], [-1, 6]])
    ours = planes.relabel(plane, ("i", "k"), ("i",), torch.Size([2]))
    assert ours is not None
    assert ours.tolist() == [5, 6]


# --- centres of windows

KERNELS = st.tuples(
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(1, 9)
)  # kernel, stride, padding, dilation, size


def lattice(sizes: list[int], slope: list[float], offset: list[float]) -> Tensor:
    grid = sizes, slope, offset
    lines = [o + s * torch.arange(n, dtype=torch.float64) for n, s, o in zip(*grid, strict=True)]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)


@given(windows=st.lists(KERNELS, min_size=1, max_size=2), skip=st.integers(0, 2))
@settings(deadline=None, max_examples=30)
def test_centres_of_windows(windows: list[tuple[int, ...]], skip: int) -> None:
    """Against the mean over each receptive field, on a grid that goes on beyond its edges."""
    kernel, stride, padding, dilation, size = (
        list(column) for column in zip(*windows, strict=True)
    )
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    size = [max(n, s + 1) for n, s in zip(size, spans, strict=True)]
    size[0] = max(size[0], skip + 2)  # one element does not tell how far the next would be
    axes = len(windows)
    slope, offset = [2.0, 3.0][:axes], [0.5, -1.0][:axes]
    wide = lattice(
        [n + 2 * p for n, p in zip(size, padding, strict=True)],
        slope,
        [o - p * s for o, p, s in zip(offset, padding, slope, strict=True)],
    )
    conv = (F.conv1d, F.conv2d)[axes - 1]
    ones = torch.ones(1, 1, *kernel, dtype=torch.float64)
    expected = conv(wide.movedim(-1, 0)[:, None], ones, stride=stride, dilation=dilation)[:, 0]
    expected = expected.movedim(0, -1) / ones.numel()

    known = torch.ones(size, dtype=torch.bool)
    known[:skip] = False  # padding that stands in the operand itself
    centres = lattice(size, slope, offset)
    centres[~known] = centres[known][0]
    starts = [span / 2 - p for span, p in zip(spans, padding, strict=True)]
    ours = planes.window_centres(centres, known, starts, stride, expected.shape[:-1])
    assert ours is not None
    lost = [axis for axis, n in enumerate(size) if n == 1]  # no distance along such an axis
    for axis in range(axes):
        if axis not in lost:
            torch.testing.assert_close(ours[..., axis], expected[..., axis])


def test_centres_of_an_irregular_grid_are_not_told() -> None:
    centres = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    known = torch.ones(3, dtype=torch.bool)
    assert planes.window_centres(centres, known, [0.5], [1], torch.Size([2])) is None


def test_centres_of_padding_alone_are_not_told() -> None:
    known = torch.zeros(3, dtype=torch.bool)
    centres = torch.zeros(3, 1, dtype=torch.float64)
    assert planes.window_centres(centres, known, [0.5], [1], torch.Size([2])) is None
