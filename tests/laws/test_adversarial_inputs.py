"""What a call leaves in the model and the caller's tensors, and where odd models read their input.

Each was once wrong; `test_adversarial_models.py` has the models whose tokens are hard to follow.
"""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.adversarial import FORMS, Walker, everywhere, maps, row
from safetensors.torch import save_file
from torch import Tensor, nn
from zoo.encoder import BATCH, WIDTH, features, ids
from zoo.laws import assert_same

from captum_generic_attn import GenericAttention, Relevance, UnsupportedAttentionError

both_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def explain(model, inputs, return_input_shape=False, **settings):
    """A warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return GenericAttention(model, **settings).attribute(
            inputs, 1, return_input_shape=return_input_shape
        )


def pictures(height=12, width=8):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BATCH, 3, height, width, generator=generator, dtype=torch.float64)


def plain_walk(model, x):
    return model.finish(model.encode(model.start(x)))


# What the call leaves behind


class RunningMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean(dim=(0, 1)))
        return x - self.mean


class Memory(nn.Module):
    """Keeps what it saw last, under no_grad."""

    last: Tensor | None = None

    def forward(self, x):
        with torch.no_grad():
            self.last = x.mean(dim=1)
        return x


def through_more(model, x):
    return model.finish(model.encode(model.more(model.start(x))))


@both_forms
def test_running_mean_is_updated_and_holds_no_graph(form):
    model = Walker(through_more, form, more=RunningMean())
    once = copy.deepcopy(model)
    expected = row(maps(model, [features()]))
    once(features())
    assert_same(explain(model, features()), expected)
    assert model.more.mean.grad_fn is None
    assert not model.more.mean.requires_grad
    assert_same(model.more.mean, once.more.mean)
    assert_same(explain(copy.deepcopy(model), features()), row(maps(model, [features()])))


def test_tensor_kept_under_no_grad_holds_no_graph():
    model = Walker(through_more, more=Memory())
    assert_same(explain(model, features()), row(maps(model, [features()])))
    assert model.more.last.grad_fn is None
    with torch.no_grad():
        assert_same(model.more.last, model.start(features()).mean(dim=1))
    assert_same(copy.deepcopy(model)(features()), model(features()))


def test_weights_renormalised_under_no_grad():
    def walk(model, x):
        with torch.no_grad():
            model.head.weight.copy_(F.normalize(model.head.weight))
        return plain_walk(model, x)

    model = Walker(walk)
    normal = F.normalize(model.head.weight.detach())
    expected = row(maps(model, [features()]))
    assert_same(explain(model, features()), expected)
    assert_same(model.head.weight.detach(), normal)
    assert model.head.weight.requires_grad
    assert model.head.weight.is_leaf
    copy.deepcopy(model)


@both_forms
def test_model_that_writes_to_its_features(form):
    def walk(model, x):
        x -= x.mean(dim=1, keepdim=True)
        return plain_walk(model, x)

    def out_of_place(model, x):
        return plain_walk(model, x - x.mean(dim=1, keepdim=True))

    model, x = Walker(walk, form), features()
    assert_same(explain(model, x), row(maps(model, [x], walk=out_of_place)))
    assert torch.equal(x, features())
    assert not x.requires_grad


def test_model_that_writes_to_its_ids():
    def walk(model, words):
        words[words == 19] = 0
        return model.finish(model.encode(model.table(words)))

    model, words = Walker(walk), ids()
    words[:, 2] = 19
    before = words.clone()
    assert_same(explain(model, words), row(maps(model, [words.clone()])))
    assert torch.equal(words, before)


@both_forms
def test_function_that_finds_the_model_by_itself(form):
    """Its own modules say nothing of the model, whose parameters are tokens all the same."""
    model = Walker(lambda m, x: m.finish(m.encode(m.with_cls(m.start(x)))), form)
    found, scale = {"model": model}, nn.Identity()
    expected = row(maps(model, [features()]), start=1)
    assert_same(explain(lambda x: scale(found["model"](x)), features()), expected)
    assert_same(explain(lambda x: found["model"](x) * 1.0, features()), expected)


# Where the tokens lie


class Stem(nn.Module):
    def __init__(self, embed, *parts):
        super().__init__()
        self.embed = embed
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return self.embed(x, self.parts)


def of_stem(embed, *parts):
    """The stem's tokens to the mean of all, with positions by which they differ."""

    def walk(model, x):
        x = model.stem(x)
        places = model.table.weight[: x.shape[1]] if x.shape[1] <= 20 else 0.0
        return model.head(model.encode(x + places).mean(dim=1))

    return Walker(walk, stem=Stem(embed, *parts))


def cells(values, height, width, shape):
    """The values of a grid of tokens as equal cells of the picture."""
    values = values.view(len(values), 1, height, width)
    across = (shape[-2] // height, shape[-1] // width)
    grown = values.repeat_interleave(across[0], 2).repeat_interleave(across[1], 3)
    return grown.expand(shape)


def by_columns(x, parts):
    return torch.stack([part(x[:, j]) for j, part in enumerate(parts)], dim=1)


def by_columns_of_one(x, parts):
    return torch.stack([part(x[:, j : j + 1]) for j, part in enumerate(parts)], dim=1)


def in_two_halves(x, parts):
    return torch.cat([parts[0](x[:, :2]), parts[0](x[:, 2:])], dim=1)


COLUMNS = {
    "an embedding for each": (by_columns, lambda: [nn.Embedding(20, WIDTH) for _ in range(6)], ids),
    "a linear for each": (
        by_columns_of_one,
        lambda: [nn.Linear(1, WIDTH) for _ in range(6)],
        lambda: features()[..., 0],
    ),
}


@pytest.mark.parametrize("whole", [False, True], ids=["tokens", "input shape"])
@pytest.mark.parametrize(("embed", "parts", "inputs"), COLUMNS.values(), ids=COLUMNS)
def test_columns_made_tokens_one_by_one(embed, parts, inputs, whole):
    model, x = of_stem(embed, *parts()), inputs()
    expected = row(maps(model, [x]), everywhere())
    assert_same(explain(model, x, return_input_shape=whole), expected)


def test_ids_made_tokens_in_two_halves():
    model = of_stem(in_two_halves, nn.Embedding(20, WIDTH))
    expected = row(maps(model, [ids()]), everywhere())
    assert_same(explain(model, ids(), return_input_shape=True), expected)


def patches_cut_by_index(x, parts):
    cut = [x[:, :, i : i + 4, j : j + 4] for i in (0, 4, 8) for j in (0, 4)]
    return torch.stack([parts[0](one.flatten(1)) for one in cut], dim=1)


def patches_cut_by_split(x, parts):
    cut = [one for line in x.split(4, 2) for one in line.split(4, 3)]
    return torch.cat([parts[0](one.flatten(1))[:, None] for one in cut], dim=1)


@pytest.mark.parametrize("embed", [patches_cut_by_index, patches_cut_by_split])
def test_patches_made_tokens_one_by_one(embed):
    model, x = of_stem(embed, nn.Linear(48, WIDTH)), pictures()
    expected = row(maps(model, [x]), everywhere())
    assert_same(explain(model, x), expected.view(BATCH, 3, 2))
    near = explain(model, x, return_input_shape=True, interpolation="nearest")
    assert_same(near, cells(expected, 3, 2, x.shape))


def patched(x, parts):
    return parts[0](x).flatten(2).mT


def mirrored(x):
    matrix = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]], dtype=torch.float64)
    grid = F.affine_grid(matrix.expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def restrided(x):
    size = (len(x), 3, 8, 8)
    return x[:, :, :8].contiguous().as_strided(size, (192, 64, 1, 8))


def sorted_rows(x):
    return x.cummax(dim=2).values


@pytest.mark.parametrize(
    "step",
    [mirrored, restrided, lambda x: torch.fft.fft2(x).real, lambda x: x.cumsum(dim=2), sorted_rows],
    ids=["grid_sample", "as_strided", "fft", "cumsum", "cummax"],
)
def test_pictures_whose_places_are_lost_are_refused(step):
    """The tokens are known no more, and never laid out over the wrong places."""
    model = of_stem(lambda x, parts: patched(step(x), parts), nn.Conv2d(3, WIDTH, 4, 4))
    with pytest.raises(UnsupportedAttentionError, match=r"blocks\.0\.attention"):
        explain(model, pictures())


def test_pixels_beyond_the_last_whole_patch_have_nothing():
    model, x = of_stem(patched, nn.Conv2d(3, WIDTH, 4, 4)), pictures(14, 9)
    inside = cells(row(maps(model, [x]), everywhere()), 3, 2, (BATCH, 3, 12, 8))
    found = explain(model, x, return_input_shape=True, interpolation="nearest")
    assert_same(found, F.pad(inside, (0, 1, 0, 2)))


# Small things


def test_bounds_of_a_batch_are_no_booleans():
    method = GenericAttention(Walker(plain_walk))
    with pytest.raises(ValueError, match="internal_batch_size=True must be an int of at least 1"):
        method.attribute_targets(features(), [0, 1], internal_batch_size=True)


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "damaged.safetensors"
    save_file({"rows": torch.zeros(1)}, path, {"relevance": '{"streams": 3'})
    with pytest.raises(ValueError, match=r"damaged\.safetensors") as damage:
        Relevance.load(path)
    assert not isinstance(damage.value, json.JSONDecodeError)
