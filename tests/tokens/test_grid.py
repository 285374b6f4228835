"""Grids: from a value per token to a map of an input, against loops and PyTorch's interpolation."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.tokens.extent import NOWHERE, Extent
from captum_generic_attn.tokens.grid import Grid, elements_of, fit_grid

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def centres(counts: list[int], stride: list[float], offset: list[float]) -> Tensor:
    """Centres of a grid of tokens behind one axis along which they do not differ (channels)."""
    lines = [[o + s * i for i in range(n)] for n, s, o in zip(counts, stride, offset, strict=True)]
    return torch.tensor([(1.0, *c) for c in itertools.product(*lines)], dtype=torch.float64)


def ranges(coordinates: Tensor, shape: tuple[int, ...], *, single: bool = False) -> Tensor:
    """What tokens were made of: the element at their centre, or all."""
    last = torch.tensor(shape[1:]) - 1
    ends = [coordinates.long()] * 2 if single else [0 * last, last]
    return torch.stack([end.expand(coordinates.shape) for end in ends], -1).clone()


def fitted(coordinates: Tensor, *shape: int, single: bool = False) -> Grid:
    grid = fit_grid(coordinates, ranges(coordinates, shape, single=single), torch.Size(shape))
    assert grid is not None
    return grid


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- fitting


def test_patches_of_a_picture() -> None:
    grid = fitted(centres([2, 3], [16, 16], [7.5, 7.5]), 1, 3, 32, 48)
    assert grid.axes == (2, 3)
    assert grid.counts == (2, 3)
    assert grid.offset == (7.5, 7.5)
    assert grid.stride == (16.0, 16.0)
    assert grid.cells.tolist() == list(range(6))
    assert grid.single == (False, False)


def test_words_of_a_sentence() -> None:
    grid = fitted(torch.arange(5.0)[:, None], 2, 5, single=True)
    assert grid.single == (True,)
    assert (grid.axes, grid.counts, grid.offset, grid.stride) == ((1,), (5,), (0.0,), (1.0,))


def test_regions_differ_along_one_axis() -> None:
    grid = fitted(torch.tensor([[0.0, 3.5], [1.0, 3.5], [2.0, 3.5]]), 2, 3, 8)
    assert (grid.axes, grid.counts) == ((1,), (3,))


@pytest.mark.parametrize(
    ("counts", "size"), [([1, 3], (8, 24)), ([3, 1], (24, 8)), ([1, 1], (8, 8))]
)
def test_a_picture_keeps_both_axes(counts: list[int], size: tuple[int, int]) -> None:
    """However narrow it is: `[B, h, w]` is always told apart from a sentence."""
    grid = fitted(centres(counts, [8, 8], [3.5, 3.5]), 1, 3, *size)
    assert grid.counts == tuple(counts)
    values = draw(2, counts[0] * counts[1])
    assert grid.to_tokens(values).shape == (2, *counts)
    whole = grid.to_input(values, torch.Size([2, 3, *size]), "nearest")
    expected = values.view(2, 1, *counts).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(whole, expected.expand(-1, 3, -1, -1))


def test_a_single_word() -> None:
    grid = fitted(torch.zeros(1, 1), 2, 1)
    values = draw(2, 1)
    assert torch.equal(grid.to_input(values, torch.Size([2, 1]), "bilinear"), values)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    ("centre", "shape"), [([0.0, 3.5], (2, 1, 8)), ([0.0, 199.5], (2, 1, 400))],
    ids=["one region", "one frame of audio"],
)  # fmt: skip
def test_a_single_token_fills_its_input(centre, shape, interpolation) -> None:
    values = draw(2, 1)
    grid = fitted(torch.tensor([centre]), *shape)
    whole = grid.to_input(values, torch.Size(shape), interpolation)
    assert torch.equal(whole, values.unsqueeze(-1).expand(shape))


def test_a_video_keeps_its_three_axes() -> None:
    grid = fitted(centres([2, 2, 3], [2, 8, 8], [0.5, 3.5, 3.5]), 1, 3, 4, 16, 24)
    assert (grid.axes, grid.counts) == ((2, 3, 4), (2, 2, 3))


@pytest.mark.parametrize(
    "coordinates",
    [
        [[0.0], [1.0], [3.0]],  # steps differ
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]],  # a corner is missing
        [[0.0], [1.0], [1.0], [2.0]],  # two tokens at one place
        [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]],  # as many as cells, two of them empty
    ],
    ids=["irregular", "hole", "double", "diagonal"],
)
def test_what_is_no_grid(coordinates) -> None:
    coordinates = torch.tensor(coordinates)
    shape = (1, *[8] * coordinates.shape[1])
    assert fit_grid(coordinates, ranges(coordinates, shape), torch.Size(shape)) is None


def test_words_need_no_regular_grid() -> None:
    """Tokens of single elements stand at their places; where there is none, there is nothing."""
    grid = fitted(torch.tensor([[3.0], [0.0], [1.0]]), 2, 5, single=True)
    values = draw(2, 3)
    expected = torch.stack([values[:, 1], values[:, 2], 0 * values[:, 0], values[:, 0]], 1)
    assert torch.equal(grid.to_tokens(values), F.pad(expected, (0, 1)))
    for interpolation in ("nearest", "bilinear"):
        whole = grid.to_input(values, torch.Size([2, 5]), interpolation)
        assert torch.equal(whole, grid.to_tokens(values))


def test_frames_stand_at_their_places() -> None:
    """Of a video `[B, T, C, H, W]`, be one frame read of four, or two."""
    for frames in ([2], [3, 0]):
        spots = [(float(f), 1.0, *c) for f in frames for c in [(3.5, 3.5), (3.5, 11.5)]]
        coordinates = torch.tensor(spots)
        lie = ranges(coordinates, (1, 4, 3, 8, 16))
        lie[:, 0] = coordinates[:, :1].long()
        grid = fit_grid(coordinates, lie, torch.Size([1, 4, 3, 8, 16]))
        assert grid is not None
        values = draw(1, len(spots))
        tokens = grid.to_tokens(values)[0]
        assert tokens.flatten(1).shape == (4, 2)
        whole = grid.to_input(values, torch.Size([1, 4, 3, 8, 16]), "bilinear")[0]
        for f in range(4):
            own = values[0, 2 * frames.index(f) :][:2] if f in frames else torch.zeros(2)
            assert torch.equal(tokens[f].flatten(), own.to(tokens))
            assert torch.equal(whole[f, 0, 0, [0, -1]], own.to(tokens))


def test_tokens_that_share_their_cells() -> None:
    """Two towers over one picture: as many tokens in each cell may be asked for together."""
    coordinates = centres([2, 2], [4, 4], [1.5, 1.5])
    twice, shape = torch.cat([coordinates, coordinates]), torch.Size([1, 3, 8, 8])
    lie = ranges(twice, shape)
    assert fit_grid(twice, lie, shape) is None
    grid = fit_grid(twice, lie, shape, several=True)
    assert grid is not None
    assert grid.to_tokens(torch.arange(8.0)[None]).tolist() == [[[4, 6], [8, 10]]]
    assert fit_grid(twice[:-1], lie[:-1], shape, several=True) is None  # one cell has one only


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_an_input_of_one_value_per_example(interpolation: str) -> None:
    """Such as a time step that is embedded as a token."""
    values = draw(2, 1)
    whole = fitted(torch.zeros(1, 0), 2).to_input(values, torch.Size([2]), interpolation)
    assert torch.equal(whole, values[:, 0])


SHAPES = st.lists(st.integers(2, 4), min_size=1, max_size=3)
DRAWS = st.randoms(use_true_random=False)


@given(counts=SHAPES, draws=DRAWS)
@settings(deadline=None, max_examples=15)
def test_the_order_of_tokens_does_not_matter(counts: list[int], draws) -> None:
    strides, offset = [3.0] * len(counts), [1.0] * len(counts)
    coordinates = centres(counts, strides, offset)
    shape = torch.Size([2, 2, *[3 * n for n in counts]])
    order = list(range(len(coordinates)))
    draws.shuffle(order)
    values = draw(2, len(order))
    plain = fitted(coordinates, *shape)
    mixed = fitted(coordinates[order], *shape)
    assert (mixed.axes, mixed.counts, mixed.offset, mixed.stride) == (
        plain.axes, plain.counts, plain.offset, plain.stride,
    )  # fmt: skip
    assert torch.equal(mixed.to_tokens(values[:, order]), plain.to_tokens(values))
    assert torch.equal(mixed.to_tokens(values[:, order]), values.view(2, *counts))
    for interpolation in ("nearest", "bilinear"):
        ours = mixed.to_input(values[:, order], shape, interpolation)
        assert torch.equal(ours, plain.to_input(values, shape, interpolation))


# --- nearest


@given(
    counts=SHAPES,
    strides=st.lists(st.sampled_from([1, 2, 3, 7, 8]), min_size=3, max_size=3),
    halves=st.lists(st.integers(-4, 8), min_size=3, max_size=3),
    margins=st.lists(st.integers(0, 5), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=30)
def test_every_element_has_its_nearest_token_s_value(counts, strides, halves, margins) -> None:
    """Against all distances; of two equally near centres either will do. Nothing is divided."""
    axes = range(len(counts))
    strides, offset = [float(strides[a]) for a in axes], [halves[a] / 2 for a in axes]
    sizes = [int(strides[a]) * counts[a] + margins[a] for a in axes]
    coordinates = centres(counts, strides, offset)
    grid = fitted(coordinates, 1, 2, *sizes)
    tokens = torch.arange(1.0, len(coordinates) + 1)[None]
    whole = grid.to_input(tokens, torch.Size([1, 2, *sizes]), "nearest")
    assert torch.equal(whole[:, 0], whole[:, 1])
    at = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in sizes])
    far = (coordinates[:, None, 1:] - at.reshape(-1, len(counts))).abs().sum(-1)
    chosen = whole[0, 0].reshape(-1).long() - 1
    assert torch.equal(far.gather(0, chosen[None])[0], far.amin(0))


def test_nearest_copies_values_bit_by_bit() -> None:
    values = draw(1, 1000).float()
    grid = fitted(centres([1000], [320], [199.5]), 1, 1, 320 * 1000 + 80)
    whole = grid.to_input(values, torch.Size([1, 1, 320_080]), "nearest")[0, 0]
    at = (torch.arange(320_080, dtype=torch.float64) - 199.5) / 320
    assert torch.equal(whole, values[0][at.round().clamp(0, 999).long()])


# --- bilinear


@given(counts=SHAPES, patch=st.lists(st.integers(1, 6), min_size=3, max_size=3))
@settings(deadline=None, max_examples=20)
def test_patches_side_by_side_are_interpolated_as_pytorch_does(counts, patch) -> None:
    axes = range(len(counts))
    patches, sizes = [patch[a] for a in axes], [patch[a] * counts[a] for a in axes]
    coordinates = centres(counts, [float(p) for p in patches], [(p - 1) / 2 for p in patches])
    shape = torch.Size([2, 3, *sizes])
    values = draw(2, len(coordinates))
    ours = fitted(coordinates, *shape).to_input(values, shape, "bilinear")
    expected = F.interpolate(
        values.view(2, 1, *counts), size=sizes, mode=LINEAR[len(counts)], align_corners=False
    )
    torch.testing.assert_close(ours, expected.expand(shape), rtol=1e-12, atol=1e-12)


def test_bilinear_goes_through_the_centres() -> None:
    """Overlapping windows too: at a token's centre its own value, half-way their mean."""
    grid = fitted(torch.tensor([[0.0, 2.0], [0.0, 6.0], [0.0, 10.0]]), 1, 1, 16)
    values = torch.tensor([[1.0, 5.0, -3.0]], dtype=torch.float64)
    whole = grid.to_input(values, torch.Size([1, 1, 16]), "bilinear")[0, 0]
    expected = [1, 1, 1, 2, 3, 4, 5, 3, 1, -1, -3, -3, -3, -3, -3, -3]
    torch.testing.assert_close(whole, torch.tensor(expected).double(), rtol=0, atol=1e-12)


def test_a_constant_stays_constant() -> None:
    grid = fitted(centres([3, 4], [5, 7], [1.0, -2.5]), 1, 3, 18, 27)
    whole = grid.to_input(torch.full((2, 12), 0.3).double(), torch.Size([2, 3, 18, 27]), "bilinear")
    torch.testing.assert_close(whole, torch.full((2, 3, 18, 27), 0.3).double())


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_a_token_for_each_element_is_left_alone(interpolation: str) -> None:
    values = draw(2, 5)
    grid = fitted(torch.tensor([[4.0], [2.0], [0.0], [1.0], [3.0]]), 2, 5, single=True)
    expected = values[:, [2, 3, 1, 4, 0]]
    assert torch.equal(grid.to_input(values, torch.Size([2, 5]), interpolation), expected)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_regions_fill_their_features(interpolation: str) -> None:
    grid = fitted(torch.tensor([[0.0, 3.5], [1.0, 3.5], [2.0, 3.5]]), 2, 3, 8)
    values = draw(2, 3)
    whole = grid.to_input(values, torch.Size([2, 3, 8]), interpolation)
    assert torch.equal(whole, values[..., None].expand(2, 3, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_values(dtype: torch.dtype) -> None:
    grid = fitted(centres([2, 2], [4, 4], [1.5, 1.5]), 1, 3, 8, 8)
    for interpolation in ("nearest", "bilinear"):
        shape = torch.Size([1, 3, 8, 8])
        assert grid.to_input(draw(1, 4).to(dtype), shape, interpolation).dtype == dtype


def test_channels_are_never_mixed() -> None:
    """Tokens of two halves of the channels of a picture, in a grid of their own."""
    spots = [(c, 3.5, w) for c in (1.0, 4.0) for w in (3.5, 11.5)]
    shape = torch.Size([1, 6, 8, 16])
    grid = fitted(torch.tensor(spots), *shape)
    assert (grid.axes, grid.counts) == ((1, 2, 3), (2, 1, 2))
    values = draw(1, 4)
    whole = grid.to_input(values, shape, "bilinear")[0]
    for half in range(2):
        alone = fitted(torch.tensor(spots[:2]), 1, 3, 8, 16)
        expected = alone.to_input(
            values[:, 2 * half :][:, :2], torch.Size([1, 3, 8, 16]), "bilinear"
        )
        assert torch.equal(whole[3 * half : 3 * half + 3], expected[0])


# --- which elements were read


@given(data=st.data(), sizes=st.lists(st.integers(1, 5), max_size=4))
@settings(deadline=None, max_examples=60)
def test_elements_that_tokens_were_made_of(data, sizes: list[int]) -> None:
    """Against a loop over tokens."""
    count = data.draw(st.integers(0, 4))
    drawn = [[[data.draw(st.integers(0, n - 1)) for _ in range(2)] for n in sizes]
             for _ in range(count)]  # fmt: skip
    lie = torch.tensor(drawn, dtype=torch.long).view(count, len(sizes), 2)
    expected = torch.zeros(sizes, dtype=torch.bool)
    for token in lie.tolist():
        expected[tuple(slice(first, last + 1) for first, last in token)] = True
    along = tuple(
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in sizes
    )
    for axis, read in enumerate(along):
        expected &= read.view([-1 if a == axis else 1 for a in range(len(sizes))])
    assert torch.equal(elements_of(Extent(lie, along), torch.Size([2, *sizes])), expected)


def test_no_token_holds_no_element() -> None:
    nothing = torch.tensor([NOWHERE]).expand(3, 2, 2)
    along = torch.ones(2).bool(), torch.ones(3).bool()
    assert not elements_of(Extent(nothing, along), torch.Size([1, 2, 3])).any()
    some = torch.tensor([[[0, 0], [1, 2]]])
    found = elements_of(Extent(torch.cat([some, nothing]), along), torch.Size([1, 2, 3]))
    assert found.tolist() == [[False, True, True], [False] * 3]
