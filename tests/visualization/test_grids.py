"""Batches as grids: each map in its place, on the scale that is said, legible."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from captum_generic_attn.comparison import Comparison
from captum_generic_attn.visualization import (
    centre_crop,
    comparison_figure,
    grid_figure,
    overlay,
)


def corner_map(row, column, value):
    heat = np.zeros((4, 6))
    heat[row, column] = value
    return heat


CORNERS = {
    "first": np.stack([corner_map(0, 0, 1.0), corner_map(3, 0, 2.0)]),
    "second": np.stack([corner_map(0, 5, 4.0), corner_map(3, 5, 8.0)]),
    "third": np.stack([corner_map(1, 2, 16.0), corner_map(2, 3, 32.0)]),
}
# The scales of the maps of two examples and three columns.
SCALES = {
    "own": [[1, 4, 16], [2, 8, 32]],
    "row": [[16, 16, 16], [32, 32, 32]],
    "column": [[2, 8, 32], [2, 8, 32]],
    "all": [[32, 32, 32], [32, 32, 32]],
}
SAID = {
    "own": (["1", "4", "16", "2", "8", "32"], "own scale"),
    "row": (["16", "32"], "the row's scale"),
    "column": (["2", "8", "32"], "column's scale"),
    "all": (["32"], "one scale for all"),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_has_each_map_in_its_place_and_on_its_scale(scale, channels, monkeypatch):
    # With a percentile of 100 the scales are whole numbers.
    monkeypatch.setattr("captum_generic_attn.visualization.scales._PERCENTILE", 100)
    images = np.stack([np.full((4, 6), 0.25), np.full((4, 6), 0.75)])
    columns = {
        title: torch.from_numpy(maps)[:, None].expand(2, channels, 4, 6)
        for title, maps in CORNERS.items()
    }
    figure = grid_figure(images, columns, names=["dark", "light"], scale=scale)
    panels = np.array(figure.axes[:8]).reshape(2, 4)
    for row, column in np.ndindex(2, 3):
        shown = np.asarray(panels[row, column + 1].images[0].get_array())
        heat = list(CORNERS.values())[column][row]
        assert (shown == overlay(images[row], heat, maximum=SCALES[scale][row][column])).all()
    for row in range(2):
        assert (panels[row, 0].images[0].get_array() == images[row]).all()
    assert [axes.get_title() for axes in panels[0]] == ["", "first", "second", "third"]
    assert {axes.get_title() for axes in panels[1]} == {""}
    assert [axes.get_ylabel() for axes in panels[:, 0]] == ["dark", "light"]
    bars = figure.axes[8:]
    most, said = SAID[scale]
    assert [bar.get_xticklabels()[1].get_text() for bar in bars] == most
    assert {bar.get_xlabel() for bar in bars} == {said}


def test_a_grid_of_a_comparison_is_signed_where_a_method_is():
    maps = {"ours": torch.rand(2, 3, 8, 8), "theirs": torch.randn(2, 3, 8, 8)}
    found = Comparison(maps, dict.fromkeys(maps, 1.0), {}, {})
    figure = grid_figure(np.zeros((2, 8, 8)), found, scale="column")
    ours, theirs = figure.axes[6:]
    assert ours.get_xlim()[0] == 0
    assert theirs.get_xlim()[0] == -theirs.get_xlim()[1]
    both = maps["theirs"].sum(1).abs().double()
    top = max(np.percentile(heat, 99.5) for heat in both.numpy())
    assert theirs.get_xlim()[1] == pytest.approx(top)
    # Each row looks as its own comparison_figure where the scale is its own.
    own = grid_figure(np.zeros((2, 8, 8)), found)
    one = comparison_figure(np.zeros((8, 8)), found, example=1)
    for place in (1, 2):
        shown = np.asarray(own.axes[3 + place].images[0].get_array())
        assert (shown == np.asarray(one.axes[place].images[0].get_array())).all()


def test_pictures_of_a_grid_may_differ_in_size_and_area():
    images = [np.zeros((70, 100, 3)), Image.new("RGB", (40, 90))]
    crop_boxes = [centre_crop(100, 70), centre_crop(40, 90)]
    heat = np.ones((2, 1, 16, 16))
    figure = grid_figure(images, {"map": heat}, crop_box=crop_boxes)
    shapes = [axes.images[0].get_array().shape for axes in figure.axes[:4]]
    assert shapes == [(70, 100, 3), (70, 100, 3), (90, 40, 3), (90, 40, 3)]
    FigureCanvasAgg(figure).draw()
    for axes, ratio in zip(figure.axes[:4], [0.7, 0.7, 2.25, 2.25], strict=True):
        window = axes.get_window_extent()
        assert window.height / window.width == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 8), (6, 2)])
def test_nothing_of_a_grid_overlaps_or_leaves_the_page(rows, columns, scale):
    maps = torch.randn(rows, 3, 8, 8)
    titles = {f"a method of long name {place}": maps for place in range(columns)}
    names = [f"a_file_name_of_some_length_{row}.jpeg" for row in range(rows)]
    figure = grid_figure(np.zeros((rows, 8, 8)), titles, names=names, scale=scale)
    FigureCanvasAgg(figure).draw()
    count = rows * (columns + 1)
    blocks = [axes.get_tightbbox() for axes in figure.axes[:count]]
    for bar in figure.axes[count:]:
        words = [bar.xaxis.label, *bar.get_xticklabels()]
        blocks += [word.get_window_extent() for word in words]
    for i, a in enumerate(blocks):
        assert figure.bbox.x0 - 1 <= a.x0
        assert a.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 - 1 <= a.y0
        assert a.y1 <= figure.bbox.y1 + 1
        for b in blocks[:i]:
            wide, tall = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(wide, tall) < 1.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": []}, "nothing to draw: 0 images and 1 columns"),
        ({"columns": {}}, "nothing to draw: 2 images and 0 columns"),
        ({"columns": {"a": np.ones((3, 1, 4, 4))}}, "'a' has 3 maps for 2 images"),
        ({"columns": {"a": np.ones((2, 1, 4, 5))}}, "4 × 5, its image 4 × 4 pixels"),
        ({"names": ["one"]}, "2 images need as many names, not 1"),
        ({"scale": "shared"}, "scale is one of 'own', 'row', 'column', 'all', not 'shared'"),
        ({"crop_box": [(0, 0, 4, 4)] * 3}, r"one for all 2 images or one for each, not \[3, 4\]"),
    ],
)
def test_a_grid_says_what_does_not_fit(changed, message):
    given = {"images": np.zeros((2, 4, 4)), "columns": {"a": np.ones((2, 1, 4, 4))}} | changed
    with pytest.raises(ValueError, match=message):
        grid_figure(given.pop("images"), given.pop("columns"), **given)


@pytest.mark.parametrize("scale", SCALES)
def test_a_bar_says_that_it_is_cut_where_it_is(scale):
    """One pixel in 400 is an outlier that the percentile leaves out."""
    flat, spiky = torch.ones(1, 1, 20, 20), torch.ones(1, 1, 20, 20)
    spiky[..., 3, 4] = 9.0
    found = Comparison({"flat": flat, "spiky": spiky}, {}, {}, {})
    bars = grid_figure([np.zeros((20, 20))], found, scale=scale).axes[3:]
    most = [bar.get_xticklabels()[1].get_text() for bar in bars]
    assert most == (["1", "≥ 1"] if scale in {"own", "column"} else ["≥ 1"])


def test_a_title_stands_over_a_grid():
    maps = {"a": np.ones((2, 1, 8, 8))}
    bare, titled = (
        grid_figure(np.zeros((2, 8, 8)), maps, title=title) for title in ("", "$x " * 60)
    )
    assert bare.get_suptitle() == ""
    assert titled.get_suptitle().replace("\n", " ") == ("$x " * 60).strip()
    assert titled.get_figheight() > bare.get_figheight()
    FigureCanvasAgg(titled).draw()
    written = titled.texts[0].get_window_extent()
    assert titled.bbox.x0 <= written.x0
    assert written.x1 <= titled.bbox.x1
    assert written.y1 <= titled.bbox.y1
    assert written.y0 >= titled.axes[1].get_tightbbox().y1


@pytest.mark.parametrize("image", [Image.new("RGB", (8, 8)), np.zeros((8, 8))])
def test_one_picture_is_no_batch(image):
    with pytest.raises(TypeError, match=r"for a single image, give \[image\]"):
        grid_figure(image, {"a": np.ones((1, 1, 8, 8))})
    for colours in (np.zeros((8, 8, 3)), torch.zeros(3, 8, 8)):
        with pytest.raises(ValueError, match=r"'a' has 1 maps for . images; .* images=\[image\]"):
            grid_figure(colours, {"a": np.ones((1, 1, 8, 8))})
