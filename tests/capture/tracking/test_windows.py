"""Centres of windows against brute force."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.capture.tracking.token_creation.windows import window_centres

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
    ours = window_centres(centres, known, starts, stride, expected.shape[:-1])
    assert ours is not None
    lost = [axis for axis, n in enumerate(size) if n == 1]  # no distance along such an axis
    for axis in range(axes):
        if axis not in lost:
            torch.testing.assert_close(ours[..., axis], expected[..., axis])


def test_centres_of_an_irregular_grid_are_not_told() -> None:
    centres = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    known = torch.ones(3, dtype=torch.bool)
    assert window_centres(centres, known, [0.5], [1], torch.Size([2])) is None


def test_centres_of_padding_alone_are_not_told() -> None:
    known = torch.zeros(3, dtype=torch.bool)
    centres = torch.zeros(3, 1, dtype=torch.float64)
    assert window_centres(centres, known, [0.5], [1], torch.Size([2])) is None
