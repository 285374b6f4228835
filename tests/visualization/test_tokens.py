"""Figures of regions, words and patches, layers and heads: which numbers are drawn, and where."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch
from helpers.tiny_models import pictures, randomise_zeros, sentences, tiny_vit, two_towers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

from captum_generic_attn import GenericAttention
from captum_generic_attn.comparison import Comparison
from captum_generic_attn.hf import Piece
from captum_generic_attn.relevance.result import Call
from captum_generic_attn.visualization import (
    NotebookFigure,
    heads_figure,
    layers_figure,
    overlay,
    regions_figure,
    word_maps_figure,
)

WHITE = np.ones((16, 24))


@pytest.fixture(scope="module")
def vit():
    """Two images of 4 × 4 patches behind a class token."""
    return GenericAttention(tiny_vit()).relevance(pictures(), target=[1, 3], keep_calls=True)


@pytest.fixture(scope="module")
def swin():
    """8 × 8 patches in windows of 4 × 4, shifted in the second layer; then 4 × 4 merged ones."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 4),
        num_classes=3,
    )  # fmt: skip
    method = GenericAttention(randomise_zeros(model.double().eval()))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    return method.relevance(images, target=[1, 2], keep_calls=True)


def shown(axes):
    """The array of the one image that axes show."""
    (picture,) = axes.images
    return np.asarray(picture.get_array())


def reddest(panel):
    """(row, column) of the pixel with most colour."""
    redness = panel[..., 0] - panel[..., 2]
    return np.unravel_index(redness.argmax(), redness.shape)


def texts_below(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


# Layers


@pytest.mark.parametrize("example", [0, 1])
def test_a_cell_is_the_sum_of_the_map_of_a_head(vit, example) -> None:
    figure = layers_figure(vit, example=example)
    expected = [
        [call.per_head[example, head].sum().item() for head in range(call.heads)]
        for call in vit.calls
    ]
    np.testing.assert_allclose(shown(figure.axes[0]), expected, rtol=1e-6)
    assert shown(figure.axes[0]).min() >= 0
    assert figure.axes[0].images[0].get_clim() == pytest.approx((0, np.max(expected)))
    assert figure.axes[0].get_title() == "x ← x"
    bar = figure.axes[-1]
    assert bar.get_xlabel() == "map of a head, summed over queries and keys"
    assert bar.get_xticklabels()[1].get_text() == f"{np.max(expected):.2g}"


def test_windows_of_an_example_are_summed(swin) -> None:
    found = shown(layers_figure(swin, example=1).axes[0])
    for row, call in zip(found, swin.calls, strict=True):
        windows = len(call.per_head) // 2
        own = call.per_head[windows:].sum((0, 2, 3))
        np.testing.assert_allclose(row[: call.heads], own, rtol=1e-6)
    assert np.isnan(np.asarray(found.filled(np.nan) if np.ma.isMA(found) else found)[0, 2:]).all()


def test_calls_that_were_not_used_are_hatched_with_the_reason() -> None:
    method = GenericAttention(tiny_vit(), start_layer=1)
    relevance = method.relevance(pictures(), target=1, keep_calls=True)
    figure = layers_figure(relevance)
    hatched = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    first = relevance.calls[0]
    assert not first.used
    assert [(patch.get_y(), patch.get_width()) for patch in hatched] == [(-0.5, first.heads)]
    assert texts_below(figure) == [f"not used: {first.reason}"]


def test_refused_calls_stand_below(vit) -> None:
    none = torch.zeros(0, 0, dtype=torch.long)
    refused = Call(9, "odd", "", "", 0, False, "odd: " + "copies of a token " * 9, none, none)
    figure = layers_figure(dataclasses.replace(vit, calls=(*vit.calls, refused)))
    assert len(figure.axes) == 2  # a table and the bar
    (text,) = texts_below(figure)
    assert text.startswith("not used: odd: copies")
    assert len(text) == 90


def test_a_table_without_a_used_call_leaves_the_others_their_colours() -> None:
    method = GenericAttention(two_towers(), layers="vision")
    relevance = method.relevance((pictures(3), sentences()), keep_calls=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = layers_figure(relevance)
    used = [call for call in relevance.calls if call.used]
    assert 0 < len(used) < len(relevance.calls)
    most = max(call.per_head[0].sum((1, 2)).max().item() for call in used)
    assert figure.axes[0].images[0].get_clim() == pytest.approx((0, most))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.axes[0].get_window_extent()
    page = np.asarray(canvas.buffer_rgba()).astype(float)[..., :3] / 255
    rows = slice(round(page.shape[0] - box.y1), round(page.shape[0] - box.y0))
    panel = page[rows, round(box.x0) : round(box.x1)]
    assert np.ptp(panel, axis=2).max() > 0.3
    assert figure.axes[1].images[0].get_array().mask.all()


@pytest.mark.parametrize("draw", [layers_figure, heads_figure])
def test_a_long_title_keeps_to_the_page(vit, draw) -> None:
    short, long = draw(vit, title="short"), draw(vit, title="which score this is of " * 9)
    assert long.get_figheight() > short.get_figheight()
    FigureCanvasAgg(long).draw()
    written = long.texts[0].get_window_extent()
    assert long.bbox.x0 <= written.x0
    assert written.x1 <= long.bbox.x1
    assert written.y1 <= long.bbox.y1
    assert max(axes.get_tightbbox().y1 for axes in long.axes) <= written.y0


class WithoutFloat64(torch.Tensor):
    """A tensor of a device that has no float64, such as Apple's."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.double:
            raise TypeError("this device has no float64")
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else found


@pytest.mark.parametrize("draw", [layers_figure, heads_figure])
def test_devices_without_float64(vit, draw) -> None:
    calls = tuple(
        dataclasses.replace(
            call,
            map=call.map.float().as_subclass(WithoutFloat64),
            per_head=call.per_head.float().as_subclass(WithoutFloat64),
        )
        for call in vit.calls
    )
    figure = draw(dataclasses.replace(vit, calls=calls))
    np.testing.assert_allclose(shown(figure.axes[0]), shown(draw(vit).axes[0]), rtol=1e-5)


def test_pairs_of_streams_have_tables_of_their_own() -> None:
    relevance = GenericAttention(two_towers()).relevance(
        (pictures(3), sentences()), keep_calls=True
    )
    figure = layers_figure(relevance)
    assert isinstance(figure, NotebookFigure)
    for axes, stream in zip(figure.axes, ("pixels", "input_ids"), strict=False):
        assert axes.get_title() == f"{stream} ← {stream}"
        own = [call for call in relevance.calls if call.query_stream == stream]
        expected = np.stack([call.per_head[0].sum((1, 2)) for call in own])
        np.testing.assert_allclose(shown(axes), expected, rtol=1e-6)


# Heads


def test_rows_are_calls_and_columns_heads_after_their_mean(vit) -> None:
    figure = heads_figure(vit, example=1)
    heads = vit.calls[0].heads
    panels = np.array(figure.axes).reshape(len(vit.calls), 1 + heads)
    for row, call in zip(panels, vit.calls, strict=True):
        np.testing.assert_allclose(shown(row[0]), call.map[1], rtol=1e-6)
        for head, axes in enumerate(row[1:]):
            np.testing.assert_allclose(shown(axes), call.per_head[1, head], rtol=1e-6)
        most = call.per_head[1].max().item()
        assert {axes.images[0].get_clim() for axes in row} == {(0, most)}
        assert row[0].texts[0].get_text().endswith(f"0 … {most:.2g}")
    assert [axes.get_title() for axes in panels[0][:3]] == ["mean", "head 0", "head 1"]


def test_a_query_is_laid_out_on_the_patches_without_the_class_token(vit) -> None:
    figure = heads_figure(vit, query=0, key="x", grid=(4, 4), calls=[1])
    call = vit.calls[1]
    assert figure.axes[0].texts[0].get_text().startswith("blocks.1.attn\n")
    np.testing.assert_allclose(shown(figure.axes[0]), call.map[0, 0, 1:].view(4, 4), rtol=1e-6)
    for head in range(call.heads):
        expected = call.per_head[0, head, 0, 1:].reshape(4, 4)
        np.testing.assert_allclose(shown(figure.axes[1 + head]), expected, rtol=1e-6)


def with_heads(relevance, index, maps):
    """The same with other maps of the heads of a call."""
    call = dataclasses.replace(relevance.calls[index], per_head=maps, map=maps.mean(1))
    calls = (*relevance.calls[:index], call, *relevance.calls[index + 1 :])
    return dataclasses.replace(relevance, calls=calls)


def test_the_last_patch_of_the_first_row_is_drawn_upper_right(vit) -> None:
    maps = torch.zeros_like(vit.calls[0].per_head)
    maps[0, 1, 0, 1 + 3] = 2.0  # behind the class token
    maps[0, 1, 5, 2] = maps[0, 0, 0, 0] = 9.0  # another query, and the class token as a key
    relevance = with_heads(vit, 0, maps)
    given = {"query": 0, "key": "x", "grid": (4, 4), "calls": [0]}
    figure = heads_figure(relevance, image=WHITE, **given)
    row, column = reddest(shown(figure.axes[2]))
    assert 0 <= row < 4
    assert 18 <= column < 24
    assert np.ptp(shown(figure.axes[1]), axis=2).max() == 0, "another head saw nothing"
    plain = heads_figure(relevance, **given)
    assert plain.axes[2].images[0].get_clim() == (0, 2.0), "the scale is that of what is drawn"
    for drawn in (figure, plain):
        canvas = FigureCanvasAgg(drawn)
        canvas.draw()
        page = np.asarray(canvas.buffer_rgba()).astype(float)[..., :3] / 255
        box = drawn.axes[2].get_window_extent()
        down, right = reddest(page[:, round(box.x0) : round(box.x1)])
        assert page.shape[0] - box.y1 - 1 <= down < page.shape[0] - box.y1 + box.height / 4
        assert 0.75 * box.width - 2 <= right <= box.width


def test_windows_are_put_together(swin) -> None:
    """Both the shifted windows and the merged patches, in a matrix of the tokens."""
    figure = heads_figure(swin, example=1)
    panels = np.array(figure.axes).reshape(3, 5)
    for row, call, start, size in zip(panels, swin.calls, (0, 0, 64), (64, 64, 16), strict=True):
        expected = np.zeros((call.heads, size, size))
        windows = len(call.per_head) // 2
        for group in range(windows, 2 * windows):
            queries = (call.query_tokens[group] - start).tolist()
            keys = (call.key_tokens[group] - start).tolist()
            for i, query in enumerate(queries):
                for j, key in enumerate(keys):
                    expected[:, query, key] = call.per_head[group, :, i, j]
        assert (expected > 0).any()
        for head, axes in enumerate(row[1 : 1 + call.heads]):
            np.testing.assert_allclose(shown(axes), expected[head], rtol=1e-6)
        assert [len(axes.images) for axes in row[1 + call.heads :]] == [0] * (4 - call.heads)


@pytest.mark.parametrize("index", [0, 1])
def test_a_query_in_a_window_looks_at_its_window_alone(swin, index) -> None:
    call = swin.calls[index]
    own = call.per_head[: len(call.per_head) // 2, 1].sum(-1)
    group, place = divmod(int(own.argmax()), own.shape[1])
    query = int(call.query_tokens[group, place])
    figure = heads_figure(swin, query=query, key="x", grid=(8, 8), calls=[index])
    expected = np.zeros((8, 8))
    for j, key in enumerate(call.key_tokens[group].tolist()):
        expected[divmod(key, 8)] = call.per_head[group, 1, place, j]
    np.testing.assert_allclose(shown(figure.axes[2]), expected, rtol=1e-6)
    assert 0 < (shown(figure.axes[2]) > 0).sum() <= 16


def test_padding_is_no_token(vit) -> None:
    call = vit.calls[0]
    keys = call.key_tokens.clone()
    keys[:, -1] = -1
    padded = dataclasses.replace(call, key_tokens=keys)
    figure = heads_figure(dataclasses.replace(vit, calls=(padded,)))
    np.testing.assert_allclose(shown(figure.axes[1]), call.per_head[0, 0, :, :-1], rtol=1e-6)


def test_keys_of_several_streams_stand_in_the_order_of_the_call(vit) -> None:
    """Positions of two streams cannot be told apart: no image is made of them."""
    call = vit.calls[0]
    keys = torch.cat([torch.arange(9), torch.arange(8)]).expand(2, -1)
    mixed = dataclasses.replace(call, key_stream="x+y", key_tokens=keys)
    relevance = dataclasses.replace(vit, calls=(mixed,))
    figure = heads_figure(relevance)
    np.testing.assert_allclose(shown(figure.axes[2]), call.per_head[0, 1], rtol=1e-6)
    with pytest.raises(ValueError, match=r"keys of several streams \(x\+y\)"):
        heads_figure(relevance, query=0, key="x", grid=(4, 4))


def test_a_query_is_laid_out_on_regions(vit) -> None:
    boxes = [(x, y, x + 6, y + 4) for y in range(0, 16, 4) for x in range(0, 24, 6)]
    figure = heads_figure(vit, query=0, key="x", boxes=boxes, image=WHITE, calls=[0])
    values = vit.calls[0].per_head[0, :, 0, 1:]
    cells = values[1].reshape(4, 4).numpy().repeat(4, 0).repeat(6, 1)
    expected = overlay(WHITE, cells, maximum=float(values.max()))
    np.testing.assert_allclose(shown(figure.axes[2]), expected, rtol=1e-6)


def test_what_heads_cannot_be_drawn_is_said(vit, swin) -> None:
    unkept = GenericAttention(tiny_vit()).relevance(pictures(), target=1)
    for draw in (layers_figure, heads_figure):
        with pytest.raises(ValueError, match="keep_calls=True"):
            draw(unkept)
        with pytest.raises(IndexError, match="no example 2; there are 0 … 1"):
            draw(vit, example=2)
    rule = GenericAttention(tiny_vit(), rule=lambda a, g: (a * g).abs().mean(1))
    with pytest.raises(ValueError, match="no map for each head: with rule="):
        layers_figure(rule.relevance(pictures(), target=1, keep_calls=True))
    late = GenericAttention(tiny_vit(), start_layer=1)
    with pytest.raises(ValueError, match=r"call 0 \(blocks.0.attn\) was not used: "):
        heads_figure(late.relevance(pictures(), target=1, keep_calls=True), calls=[0])
    for wrong, message in (
        ({"grid": (4, 4)}, "give query= as well"),
        ({"query": 0}, "give one of them"),
        ({"query": 0, "grid": (4, 4), "boxes": [(0, 0, 1, 1)]}, "give one of them"),
        ({"query": 0, "boxes": [(0, 0, 1, 1)]}, "give image= as well"),
        (
            {"query": 0, "grid": (4, 4)},
            r"16 tokens, .* has 17 keys: .* 'cls_token' \(1\), 'x' \(16\)",
        ),
        (
            {"query": 0, "grid": (4, 4), "key": "y"},
            "no part 'y' among its keys, which have 'cls_token'",
        ),
        ({"query": 17, "grid": (4, 4), "key": "x"}, "no query 17: .* tokens 0 … 16 of 'x'"),
        ({"calls": []}, "names no attention call"),
    ):
        with pytest.raises(ValueError, match=message):
            heads_figure(vit, **wrong)
    with pytest.raises(IndexError, match=re.escape("no call 7; there are 0 …")):
        heads_figure(vit, calls=[7])
    with pytest.raises(ValueError, match=r"call 2 .* no query 5: .* tokens 64 … 79 of 'x'"):
        heads_figure(swin, query=5, key="x", grid=(8, 8))
    pairs = GenericAttention(two_towers()).relevance((pictures(3), sentences()), keep_calls=True)
    with pytest.raises(ValueError, match=r"of 2; choose .*: 'pixels': .*'input_ids'"):
        heads_figure(pairs, query=0, key="pixels", grid=(4, 4))


# Words


def test_each_word_has_its_row_over_the_picture() -> None:
    matrix = np.random.default_rng(0).random((3, 6))
    figure = word_maps_figure(WHITE, ["a", "red", "$bag$"], torch.tensor(matrix), grid=(2, 3))
    assert [axes.get_title() for axes in figure.axes[1:4]] == ["a", "red", "$bag$"]
    for axes, row in zip(figure.axes[1:], matrix, strict=False):
        heat = row.reshape(2, 3)
        expected = overlay(WHITE, heat, crop_box=(0, 0, 24, 16), maximum=matrix.max())
        np.testing.assert_allclose(shown(axes), expected)
    bar = figure.axes[-1]
    assert bar.get_xlabel() == "relevance, one scale for all words"
    assert bar.get_xticklabels()[1].get_text() == f"{matrix.max():.2g}"


def test_the_patches_of_a_word_are_where_attribute_draws_them() -> None:
    """Half-pixel centres, as in bilinear interpolation without aligned corners."""
    row = torch.rand(1, 6)
    figure = word_maps_figure(WHITE, ["bag"], row, grid=(2, 3))
    spread = torch.nn.functional.interpolate(
        row.view(1, 1, 2, 3), (16, 24), mode="bilinear", align_corners=False
    )
    expected = overlay(WHITE, spread[0, 0], maximum=float(row.max()))
    np.testing.assert_allclose(shown(figure.axes[1]), expected, atol=1e-6)
    corner = np.eye(1, 6, 2)
    row, column = reddest(shown(word_maps_figure(WHITE, ["bag"], corner, grid=(2, 3)).axes[1]))
    assert row < 8
    assert column >= 16


def test_own_scales() -> None:
    matrix = np.array([[0.1, 0.0], [0.0, 5.0]])
    figure = word_maps_figure(WHITE, ["a", "bag"], matrix, grid=(1, 2), shared_scale=False)
    first, second, *bars = figure.axes[1:]
    np.testing.assert_allclose(shown(first), shown(second)[:, ::-1])
    assert [bar.get_xticklabels()[1].get_text() for bar in bars] == ["0.1", "5"]
    assert {bar.get_xlabel() for bar in bars} == {"own scale"}


def test_tokens_of_a_word_are_summed() -> None:
    matrix = np.random.default_rng(0).random((5, 6))
    words = [(Piece("a", (1,)),), (Piece("sand", (2,)), Piece("als", (3, 4)))]
    figure = word_maps_figure(WHITE, words, matrix, grid=(2, 3))
    assert [axes.get_title() for axes in figure.axes[1:3]] == ["a", "sandals"]
    same = word_maps_figure(
        WHITE, ["a", "sandals"], np.stack([matrix[1], matrix[2:].sum(0)]), grid=(2, 3)
    )
    for one, other in zip(figure.axes[1:3], same.axes[1:3], strict=True):
        np.testing.assert_allclose(shown(one), shown(other))


def test_words_look_at_regions() -> None:
    boxes = [(0, 0, 12, 16), (12, 0, 24, 16)]
    figure = word_maps_figure(WHITE, ["bag", "the"], [[0.2, 1.0], [0.5, 0.0]], boxes=boxes)
    heat = np.repeat([[0.2, 1.0]], 16, 0).repeat(12, 1)
    np.testing.assert_allclose(shown(figure.axes[1]), overlay(WHITE, heat, maximum=1.0))
    assert [p.get_x() for p in figure.axes[1].patches if isinstance(p, Rectangle)] == [-0.5, 11.5]


def test_words_may_be_an_array_and_look_away() -> None:
    figure = word_maps_figure(WHITE, np.array(["a", "bag"]), [[0.5, 0], [0, -1.0]], grid=(1, 2))
    assert [axes.get_title() for axes in figure.axes[1:3]] == ["a", "bag"]
    expected = overlay(
        WHITE, np.array([[0.0, -1.0]]), crop_box=(0, 0, 24, 16), maximum=1.0, signed=True
    )
    np.testing.assert_allclose(shown(figure.axes[2]), expected)
    assert [tick.get_text() for tick in figure.axes[-1].get_xticklabels()] == ["-1", "1"]
    with pytest.raises(ValueError, match="there are no words"):
        word_maps_figure(WHITE, np.array([], dtype=str), np.ones((2, 6)), grid=(2, 3))


def test_twenty_words_have_a_panel_each() -> None:
    words = [f"word{k}" for k in range(20)]
    figure = word_maps_figure(WHITE, words, np.random.default_rng(0).random((20, 6)), grid=(2, 3))
    assert [axes.get_title() for axes in figure.axes[1:21]] == words
    figure.draw_without_rendering()
    boxes = [axes.get_window_extent() for axes in figure.axes[:21]]
    assert min(box.width for box in boxes) > 100, "wide enough to be read"
    width, height = figure.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
               for box in boxes)  # fmt: skip


class OneStream(torch.nn.Module):
    """Words and 4 × 4 patches, joined behind a class token, as in ViLT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(20, 8)
        self.patches = torch.nn.Conv2d(3, 8, 8, 8)
        self.start = torch.nn.Parameter(torch.randn(1, 1, 8))
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)
        )

    def forward(self, input_ids, pixel_values):
        patches = self.patches(pixel_values).flatten(2).mT
        tokens = torch.cat([self.start, self.words(input_ids), patches], 1)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens[:, 0]


def test_words_and_patches_of_one_stream() -> None:
    pair = torch.tensor([[3, 4, 5]]), torch.rand(1, 3, 32, 32)
    relevance = GenericAttention(OneStream().eval()).relevance(pair, target=1)
    matrix = relevance.matrix("input_ids", "pixel_values")[0]
    figure = word_maps_figure(pair[1][0], ["a", "red", "bag"], matrix, grid=(4, 4))
    heat = matrix[2].view(4, 4)
    expected = overlay(pair[1][0], heat, crop_box=(0, 0, 32, 32), maximum=float(matrix.max()))
    np.testing.assert_allclose(shown(figure.axes[3]), expected, atol=1e-6)
    assert np.ptp(shown(figure.axes[3]), axis=2).max() > 0


def test_what_words_cannot_be_drawn_is_said() -> None:
    matrix = np.ones((2, 6))
    words = ["a", "bag"]
    with pytest.raises(ValueError, match="2 × 4 has 8 patches, but the matrix has 6 columns"):
        word_maps_figure(WHITE, words, matrix, grid=(2, 4))
    with pytest.raises(ValueError, match="1 boxes, but 6 columns"):
        word_maps_figure(WHITE, words, matrix, boxes=[(0, 0, 4, 4)])
    with pytest.raises(ValueError, match="must be given"):
        word_maps_figure(WHITE, words, matrix)
    with pytest.raises(ValueError, match="3 words, but 2 rows"):
        word_maps_figure(WHITE, [*words, "?"], matrix, grid=(2, 3))
    with pytest.raises(ValueError, match=r"not \[1, 2, 6\]: pick one of the batch, matrix\[0\]"):
        word_maps_figure(WHITE, words, matrix[None], grid=(2, 3))
    with pytest.raises(ValueError, match="there are no words"):
        word_maps_figure(WHITE, [], matrix, grid=(2, 3))
    with pytest.raises(TypeError, match="not one text: 'a bag'"):
        word_maps_figure(WHITE, "a bag", matrix, grid=(2, 3))
    with pytest.raises(IndexError, match=r"'bag' has the tokens \[2\], the matrix 2 rows"):
        word_maps_figure(WHITE, [[("bag", [2])]], matrix, grid=(2, 3))
    with pytest.raises(ValueError, match="NaN"):
        word_maps_figure(WHITE, words, matrix * np.nan, grid=(2, 3))
    towers = GenericAttention(two_towers()).relevance((pictures(3), sentences()))
    unmet = towers.matrix("input_ids", "pixels")[0, :, 1:]
    with pytest.raises(ValueError, match=r"all 0: these words never attended .* pairs_figure"):
        word_maps_figure(WHITE, ["w"] * 6, unmet, grid=(4, 4))


# Regions

BOXES = [(0, 0, 16, 16), (8, 0, 24, 16), (10, 4, 14, 8)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_most_relevant_region_is_on_top(order) -> None:
    values = np.array([0.5, 1.0, 0.1])
    figure = regions_figure(WHITE, [BOXES[k] for k in order], values[list(order)])
    heat = np.full((16, 24), 0.5)
    heat[:, 8:] = 1.0
    np.testing.assert_allclose(shown(figure.axes[1]), overlay(WHITE, heat, maximum=1.0))
    # The edges of those beneath are still seen.
    lefts = [p.get_x() + 0.5 for p in figure.axes[1].patches if not p.get_fill()]
    assert lefts == [10, 0, 8]
    assert len(figure.axes[0].patches) == 0, "the image itself comes first"


def test_the_most_relevant_regions_are_named() -> None:
    labels = ["left", "$right$", "small"]
    figure = regions_figure(WHITE, BOXES, [0.5, 1.0, 0.25], labels=labels, named=2)
    assert [text.get_text() for text in figure.axes[1].texts] == ["$right$", "left"]
    figure = regions_figure(WHITE, BOXES, [0.5, 1.0, 0.0])
    assert [text.get_text() for text in figure.axes[1].texts] == ["1", "0.5"]


def test_names_wider_than_their_regions_are_shortened() -> None:
    boxes = [(0, 0, 60, 200), (150, 0, 154, 200), (240, 0, 300, 200), (100, 100, 250, 200)]
    labels = ["a very long name", "thin", "another long name", "short"]
    figure = regions_figure(np.ones((200, 300)), boxes, [4, 3, 2, 1], labels=labels)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[1]
    written = {text.get_text(): text.get_window_extent() for text in axes.texts}
    first, second, third = written
    assert first.startswith("a ")
    assert second.startswith("ano")
    assert first[-1] == second[-1] == "…"
    assert third == "short"
    backs = [patch for patch in axes.patches if patch.get_fill()]
    for extent, back, box in zip(
        written.values(), backs, [boxes[k] for k in (0, 2, 3)], strict=True
    ):
        assert back.get_x() + 0.5 >= box[0] - 1e-6
        assert back.get_x() + 0.5 + back.get_width() <= box[2] + 1e-6
        assert back.get_window_extent().x0 <= extent.x0
        assert extent.x1 <= back.get_window_extent().x1
    # A number without its end is another number.
    figure = regions_figure(np.ones((200, 300)), boxes, [4, 1.2e-5, 2, 1])
    assert "1.2e-05" in [text.get_text() for text in figure.axes[1].texts]


def test_names_of_regions_keep_apart_and_inside() -> None:
    boxes = [(0, 0, 300, 200), (0, 0, 290, 190), (250, 0, 300, 200)]
    figure = regions_figure(np.ones((200, 300)), boxes, [1, 2, 3], labels=["boot"] * 3)
    backs = [p for p in figure.axes[1].patches if p.get_fill()]
    spans = [(p.get_x(), p.get_y(), p.get_x() + p.get_width(), p.get_y() + p.get_height())
             for p in backs]  # fmt: skip
    assert len(spans) == 3
    for k, (left, top, right, bottom) in enumerate(spans):
        assert left >= -0.5
        assert top >= -0.5
        assert right <= 299.5
        assert bottom <= 199.5
        for other in spans[:k]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


@pytest.mark.parametrize("form", [lambda v: v, lambda v: v[:, None].expand(-1, 7)])
def test_features_that_are_alike_are_one_value(form) -> None:
    values = torch.tensor([0.5, 1.0, 0.1])
    figure = regions_figure(WHITE, BOXES, form(values))
    np.testing.assert_allclose(
        shown(figure.axes[1]), shown(regions_figure(WHITE, BOXES, [0.5, 1.0, 0.1]).axes[1]),
        atol=1e-6,
    )  # fmt: skip


def test_features_that_differ_are_summed_and_signed() -> None:
    values = torch.tensor([[0.5, -1.0], [0.25, 0.75], [0.0, 0.0]])
    figure = regions_figure(WHITE, BOXES, values)
    heat = np.full((16, 24), -0.5)
    heat[:, 8:] = 1.0
    expected = overlay(WHITE, heat, maximum=1.0, signed=True)
    np.testing.assert_allclose(shown(figure.axes[1]), expected)
    ticks = [tick.get_text() for tick in figure.axes[-1].get_xticklabels()]
    assert ticks == ["-1", "1"]


@pytest.mark.parametrize("shared", [False, True])
def test_targets_and_methods_have_panels(shared) -> None:
    values = torch.tensor([[0.5, 1.0, 0.1], [4.0, 0.0, -2.0]])
    several = values[..., None].expand(-1, -1, 5)
    by_title = {"bag": values[0], "boot": several[1]}
    for given, titles in ((values, ["bag", "boot"]), (several, ["bag", "boot"]), (by_title, None)):
        figure = regions_figure(WHITE, BOXES, given, titles, title="which?", shared_scale=shared)
        assert [axes.get_title() for axes in figure.axes[:3]] == ["which?", "bag", "boot"]
        ends = [[tick.get_text() for tick in bar.get_xticklabels()] for bar in figure.axes[3:]]
        assert ends == ([["-4", "4"]] * 2 if shared else [["0", "1"], ["-4", "4"]])
        scale = "one scale for all" if shared else "own scale"
        assert {bar.get_xlabel() for bar in figure.axes[3:]} == {f"relevance, {scale}"}


def test_methods_of_a_comparison_have_panels() -> None:
    words, regions = torch.rand(2, 6), torch.rand(2, 3, 5)
    several = Comparison({"ours": (words, regions)}, {"ours": 0.5}, {}, {})
    alone = Comparison({"ours": regions}, {"ours": 0.5}, {}, {})
    expected = shown(regions_figure(WHITE, BOXES, regions[1]).axes[1])
    for found, part in ((several, 1), (alone, 0)):
        figure = regions_figure(WHITE, BOXES, found, example=1, part=part)
        assert figure.axes[1].get_title() == "ours"
        np.testing.assert_array_equal(shown(figure.axes[1]), expected)
    with pytest.raises(ValueError, match=r"\[3\] or \[3, D\], not \[6\]"):
        regions_figure(WHITE, BOXES, several)


def test_regions_without_relevance_stay_pale() -> None:
    figure = regions_figure(WHITE, BOXES, np.zeros(3))
    assert np.ptp(shown(figure.axes[1]), axis=2).max() == 0
    assert len(figure.axes[1].texts) == 0


def test_what_regions_cannot_be_drawn_is_said() -> None:
    values = np.ones(3)
    shares = np.array(BOXES) / [24, 16, 24, 16]
    for boxes, message in (
        (shares, r"lie in 0 … 1, .* 24 × 16 pixels: .* multiply them by \[24, 16, 24, 16\]"),
        (np.array(BOXES) * 10, "centre of box 0, .* 24 × 16 pixels: .* another size"),
        ([(8, 0, 0, 16)] * 3, "box 0 is .* left ≤ right and top ≤ bottom"),
        ([(0, 0, 16)] * 3, r"\[R, 4\], .* not \[3, 3\]"),
        (np.full((3, 4), np.nan), "box 0 is"),
    ):
        with pytest.raises(ValueError, match=message):
            regions_figure(WHITE, boxes, values)
    np.testing.assert_allclose(
        shown(regions_figure(WHITE, shares * [24, 16, 24, 16], values).axes[1]),
        shown(regions_figure(WHITE, BOXES, values).axes[1]),
    )
    for relevance, titles, message in (
        (np.ones(4), None, r"3 regions of one example is \[3\] or \[3, D\], not \[4\]"),
        (np.ones((1, 3, 5)), None, "pick one of the batch"),
        (np.ones((3, 5)), ["a", "b"], r"with 2 titles, relevance is \[2, R\]"),
        (np.ones((2, 3)), ["a", "a"], "titles must differ"),
        ({"a": values}, ["a"], "has titles already"),
        ({}, None, "no relevance to draw"),
        (values * np.inf, None, "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            regions_figure(WHITE, BOXES, relevance, titles)
    with pytest.raises(ValueError, match="3 boxes need as many labels, not 1"):
        regions_figure(WHITE, BOXES, values, labels=["a"])
