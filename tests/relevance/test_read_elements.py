"""A value lies on the elements that its token was made of, and nowhere else.

Frames, slices, bands, crops and channels that a model does not read have nothing, whatever way it
picks the others; each that it reads has the map that it has alone.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import tiny_vit
from torch import Tensor, nn

from captum_generic_attn import GenericAttention, GradientAttention

MODEL = tiny_vit()
POOLED = tiny_vit(class_token=False, global_pool="avg")
BOTH = pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def alone(picture: Tensor, interpolation: str = "bilinear", model: nn.Module = MODEL) -> Tensor:
    return GenericAttention(model, interpolation=interpolation).attribute(picture, 1)


def check(forward, given: Tensor, expected: Tensor, interpolation: str = "bilinear") -> None:
    ours = GenericAttention(forward, interpolation=interpolation).attribute(given, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-14)


# --- frames of a clip

CLIP = drawn(2, 4, 3, 32, 32)
ONE_FRAME = {
    "indexed": lambda x: x[:, 2],
    "unbound": lambda x: x.unbind(1)[2],
    "selected": lambda x: x.select(1, 2),
    "narrowed": lambda x: x.narrow(1, 2, 1).squeeze(1),
    "split": lambda x: x.split(1, 1)[2].flatten(0, 1),
    "index_select": lambda x: x.index_select(1, torch.tensor([2]))[:, 0],
    "time first": lambda x: x.transpose(0, 1)[2],
}


@BOTH
@pytest.mark.parametrize("way", ONE_FRAME)
def test_one_frame_of_a_clip(way: str, interpolation: str) -> None:
    expected = torch.zeros_like(CLIP)
    expected[:, 2] = alone(CLIP[:, 2], interpolation)
    check(lambda x: MODEL(ONE_FRAME[way](x)), CLIP, expected, interpolation)


@BOTH
@pytest.mark.parametrize(
    "forward",
    [
        lambda x: sum(POOLED(x[:, t]) for t in (0, 3)),
        lambda x: POOLED(x[:, ::3].flatten(0, 1)).unflatten(0, (-1, 2)).sum(1),
        lambda x: POOLED(x[:, [3, 0]].flatten(0, 1)).unflatten(0, (-1, 2)).sum(1),
    ],
    ids=["a loop", "in the batch", "picked by a list"],
)
def test_two_frames_of_a_clip(forward, interpolation: str) -> None:
    """Each has its own map, in one stream half of it: all tokens of both are explained alike."""
    method = GenericAttention(forward, interpolation=interpolation)
    ours = method.attribute(CLIP, 1)
    tokens = method.attribute(CLIP, 1, return_input_shape=False)
    assert tokens.shape == (2, 4, 4, 4)
    scale = ours[0, 0].sum() / alone(CLIP[:, 0], interpolation, POOLED)[0].sum()
    assert float(scale) == pytest.approx(1) or float(scale) == pytest.approx(0.5)
    for t in range(4):
        if t in (0, 3):
            one = scale * alone(CLIP[:, t], interpolation, POOLED)
            torch.testing.assert_close(ours[:, t], one, rtol=1e-9, atol=1e-14)
            cells = GenericAttention(POOLED).attribute(CLIP[:, t], 1, return_input_shape=False)
            torch.testing.assert_close(tokens[:, t], scale * cells, rtol=1e-9, atol=1e-14)
        else:
            assert not ours[:, t].any()
            assert not tokens[:, t].any()


def test_frames_behind_channels() -> None:
    """`[B, C, T, H, W]`."""
    clip = CLIP.transpose(1, 2).contiguous()
    expected = torch.zeros_like(clip)
    expected[:, :, 1] = alone(clip[:, :, 1])
    check(lambda x: MODEL(x[:, :, 1]), clip, expected)
    tokens = GenericAttention(lambda x: MODEL(x[:, :, 1])).attribute(
        clip, 1, return_input_shape=False
    )
    assert tokens.shape == (2, 4, 4, 4)
    own = GenericAttention(MODEL).attribute(clip[:, :, 1], 1, return_input_shape=False)
    torch.testing.assert_close(tokens[:, 1], own)
    assert not tokens[:, [0, 2, 3]].any()


def test_frames_as_channels() -> None:
    """Three grey frames of six are the channels of a picture."""
    clip = drawn(2, 6, 32, 32)
    picked = [0, 2, 5]
    expected = torch.zeros_like(clip)
    expected[:, picked] = alone(clip[:, picked])
    check(lambda x: MODEL(x[:, picked]), clip, expected)


# --- slices of a volume


@BOTH
def test_slices_of_a_volume(interpolation: str) -> None:
    """Each slice is a grey picture, written to three channels."""
    volume = drawn(1, 5, 32, 32)

    def grey(x: Tensor) -> Tensor:
        return MODEL(x.unsqueeze(1).expand(-1, 3, -1, -1))

    expected = torch.zeros_like(volume)
    for d in (1, 2):
        expected[:, d] = GenericAttention(grey, interpolation=interpolation).attribute(
            volume[:, d], 1
        )
    check(lambda x: grey(x[:, 1]) + grey(x[:, 2]), volume, expected, interpolation)
    assert expected[:, 1:3].any(-1).any(-1).all()


# --- bands of a picture

BANDS = {
    "the first": slice(0, 3),
    "every second": slice(1, 6, 2),
    "a false colour": [4, 0, 2],
    "one thrice": [5, 5, 5],
}


@BOTH
@pytest.mark.parametrize("which", BANDS)
def test_bands_of_a_picture(which: str, interpolation: str) -> None:
    picture, bands = drawn(2, 6, 32, 32), BANDS[which]
    expected = torch.zeros_like(picture)
    expected[:, bands] = alone(picture[:, bands], interpolation)
    check(lambda x: MODEL(x[:, bands]), picture, expected, interpolation)


@BOTH
def test_two_dates_side_by_side(interpolation: str) -> None:
    dates = drawn(1, 6, 32, 32)

    def change(before: Tensor, after: Tensor) -> Tensor:
        return MODEL(before) - MODEL(after)

    apart = GenericAttention(change, interpolation=interpolation).attribute(
        (dates[:, :3].clone(), dates[:, 3:].clone()), 1
    )
    check(lambda x: change(x[:, :3], x[:, 3:]), dates, torch.cat(apart, 1), interpolation)
    stacked = dates.unflatten(1, (2, 3))
    check(lambda x: change(*x.unbind(1)), stacked, torch.stack(apart, 1), interpolation)
    check(lambda x: change(*x.split(3, 1)), dates, torch.cat(apart, 1), interpolation)


@BOTH
@pytest.mark.parametrize("order", ["bands first", "examples first", "backwards"])
def test_groups_of_bands_in_the_batch(order: str, interpolation: str) -> None:
    """Three bands at a time are a picture; each group has its own map."""
    picture = drawn(2, 9, 32, 32)

    def forward(x: Tensor) -> Tensor:
        groups = x.unflatten(1, (3, 3))
        if order == "backwards":
            groups = groups.flip(1)
        if order == "bands first":
            return POOLED(groups.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1)).sum(0)
        return POOLED(groups.flatten(0, 1)).unflatten(0, (-1, 3)).sum(1)

    ours = GenericAttention(forward, interpolation=interpolation).attribute(picture, 1)
    parts = [alone(picture[:, i : i + 3], interpolation, POOLED) for i in (0, 3, 6)]
    expected = torch.cat(parts, 1)
    scale = ours.sum() / expected.sum()
    torch.testing.assert_close(ours, scale * expected, rtol=1e-9, atol=1e-14)
    tokens = GenericAttention(forward).attribute(picture, 1, return_input_shape=False)
    assert tokens.shape == (2, 3, 4, 4)


def test_bands_among_bands_of_other_tokens_have_no_grid() -> None:
    """Every second band is of another group: no map is better than a wrong one."""

    def forward(x: Tensor) -> Tensor:
        groups = x.unflatten(1, (3, 2)).transpose(1, 2)
        return POOLED(groups.flatten(0, 1)).unflatten(0, (-1, 2)).sum(1)

    with pytest.raises(ValueError, match="no regular grid"):
        GenericAttention(forward).attribute(drawn(2, 6, 32, 32), 1)


def test_two_patch_embeddings_that_are_summed() -> None:
    """Tokens of the first bands and of the last, summed: one token, made of both."""
    torch.manual_seed(0)
    first, last = (nn.Conv2d(2, 24, 8, 8).double() for _ in range(2))

    def forward(x: Tensor) -> Tensor:
        tokens = (first(x[:, :2]) + last(x[:, 3:])).flatten(2).mT
        hidden = MODEL.blocks(torch.cat([MODEL.cls_token.expand(len(x), -1, -1), tokens], 1))
        return MODEL.head(MODEL.norm(hidden)[:, 0])

    given = drawn(1, 5, 32, 32)
    ours = GenericAttention(forward, interpolation="nearest").attribute(given, 1)[0]
    values = GenericAttention(forward).attribute(given, 1, return_input_shape=False)[0]
    assert values.shape == (4, 4)
    once = values.repeat_interleave(8, 0).repeat_interleave(8, 1)
    for band in range(5):
        assert torch.equal(ours[band], 0 * once if band == 2 else once)


# --- crops and remainders

CROPS = {
    "of the middle": (slice(5, 37), slice(9, 41)),
    "of a corner": (slice(0, 32), slice(8, 40)),
    "every second": (slice(0, None, 2), slice(1, None, 2)),
}


@BOTH
@pytest.mark.parametrize("which", ["of the middle", "of a corner"])
def test_a_crop(which: str, interpolation: str) -> None:
    picture, (rows, columns) = drawn(2, 3, 44, 41), CROPS[which]
    expected = torch.zeros_like(picture)
    expected[:, :, rows, columns] = alone(picture[:, :, rows, columns], interpolation)
    check(lambda x: MODEL(x[:, :, rows, columns]), picture, expected, interpolation)


def test_every_second_pixel() -> None:
    picture = drawn(1, 3, 64, 64)
    ours = GenericAttention(lambda x: MODEL(x[..., ::2, 1::2]), interpolation="nearest").attribute(
        picture, 1
    )
    read = torch.zeros(64, 64).bool()
    read[::2, 1::2] = True
    assert not ours[..., ~read].any()
    expected = alone(picture[..., ::2, 1::2], "nearest")
    assert torch.equal(ours[..., ::2, 1::2], expected)


@BOTH
def test_crops_in_a_loop(interpolation: str) -> None:
    picture = drawn(1, 3, 32, 96)
    at = (0, 20, 60)
    expected = torch.zeros_like(picture)
    for left in at:
        expected[..., left : left + 32] += alone(picture[..., left : left + 32], interpolation)
    check(lambda x: sum(MODEL(x[..., a : a + 32]) for a in at), picture, expected, interpolation)


class Stem(nn.Module):
    """Two convolutions make the tokens: what is left over by the second was read by the first."""

    def __init__(self, *convolutions: nn.Conv2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(*convolutions).double()
        self.vit = MODEL

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).mT
        tokens = torch.cat([self.vit.cls_token.expand(len(x), -1, -1), tokens], 1)
        return self.vit.head(self.vit.norm(self.vit.blocks(tokens))[:, 0])


STEMS = {
    "remainders of both": (nn.Conv2d(3, 8, 3, 3), nn.Conv2d(8, 24, 2, 2)),
    "overlap": (nn.Conv2d(3, 8, 5, 2), nn.Conv2d(8, 24, 3, 3)),
    "padding": (nn.Conv2d(3, 8, 4, 4, padding=2), nn.Conv2d(8, 24, 2, 2)),
    "holes": (nn.Conv2d(3, 24, 2, 7),),
    "dilated": (nn.Conv2d(3, 24, 3, 12, dilation=4),),
}


@BOTH
@pytest.mark.parametrize("stem", STEMS)
def test_elements_without_a_gradient_have_no_relevance(stem: str, interpolation: str) -> None:
    """And those that are read have some: of strictly positive values, as gradients say."""
    torch.manual_seed(0)
    model, picture = Stem(*STEMS[stem]), drawn(1, 3, 39, 35)
    leaf = picture.clone().requires_grad_()
    read = torch.autograd.grad(model.stem(leaf).pow(2).sum(), leaf)[0] != 0
    given = GenericAttention(
        model, interpolation=interpolation, rule=lambda a, g: (g.abs() * a).mean(1) + 1e-3
    ).attribute(picture, 1)
    assert (given > 0).equal(read)
    assert not read.all()


@BOTH
def test_patches_that_are_dropped_have_nothing(interpolation: str) -> None:
    """Each example keeps other patches, as in masked pre-training."""
    torch.manual_seed(0)
    patches = nn.Conv2d(3, 24, 8, 8).double()
    kept = torch.tensor([[0, 1, 5, 9], [2, 6, 10, 15]])

    def forward(x: Tensor) -> Tensor:
        tokens = patches(x).flatten(2).mT
        tokens = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, 24))
        tokens = torch.cat([MODEL.cls_token.expand(len(x), -1, -1), tokens], 1)
        return MODEL.head(MODEL.norm(MODEL.blocks(tokens))[:, 0])

    given = drawn(2, 3, 32, 32)
    ours = GenericAttention(forward, interpolation=interpolation).attribute(given, 1)
    cells = ours.abs().unflatten(2, (4, 8)).unflatten(4, (4, 8)).amax((1, 3, 5)).flatten(1)
    for example, own in enumerate(kept.tolist()):
        assert cells[example].nonzero().flatten().tolist() == own


def test_a_picture_that_is_resized_first() -> None:
    """Between the pixels that are sampled, the map goes on; what is cropped away has nothing."""
    picture = drawn(1, 3, 80, 64)
    ours = GenericAttention(
        lambda x: MODEL(F.interpolate(x[:, :, :64], (32, 32), mode="bilinear"))
    ).attribute(picture, 1)
    assert not ours[:, :, 64:].any()
    small = alone(F.interpolate(picture[:, :, :64], (32, 32), mode="bilinear"), "nearest")
    big = small.repeat_interleave(2, -1).repeat_interleave(2, -2)
    nearest = GenericAttention(
        lambda x: MODEL(F.interpolate(x[:, :, :64], (32, 32), mode="bilinear")),
        interpolation="nearest",
    ).attribute(picture, 1)
    torch.testing.assert_close(nearest[:, :, :64], big, rtol=1e-9, atol=1e-14)


# --- features of tables and series


def test_features_that_are_not_read() -> None:
    """Of `[B, N, D]` rows: the value lies on the columns that are projected."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    project, head = nn.Linear(3, 8).double(), nn.Linear(8, 3).double()
    rows = drawn(2, 5, 7)
    for columns in (slice(0, 3), slice(2, 7, 2), [6, 1, 3]):
        ours = GenericAttention(
            lambda x, c=columns: head(block(project(x[..., c]))[:, 0])
        ).attribute(rows, 1)
        picked = rows[..., columns]
        expected = torch.zeros_like(rows)
        expected[..., columns] = GenericAttention(
            lambda x: head(block(project(x))[:, 0])
        ).attribute(picked, 1)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-14)


def test_other_methods_lay_their_values_out_alike() -> None:
    expected = torch.zeros_like(CLIP)
    expected[:, 2] = GradientAttention(MODEL).attribute(CLIP[:, 2], 1)
    ours = GradientAttention(lambda x: MODEL(x[:, 2])).attribute(CLIP, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-14)
