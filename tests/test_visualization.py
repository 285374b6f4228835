"""Pictures of heat maps: right way up, on one scale, without any state of pyplot."""

import sys
import threading

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from captum_generic_attn.visualization import heatmap_figure, overlay


def redness(panel):
    return panel[..., 0] - panel[..., 2]


def drawn(figure):
    """The rendered pixels of each axes of a figure, as [H, W, 3] bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[..., :3]
    panels = []
    for axes in figure.axes:
        box = axes.get_window_extent()
        top, bottom = page.shape[0] - box.y1, page.shape[0] - box.y0
        panels.append(page[round(top) : round(bottom), round(box.x0) : round(box.x1)])
    return panels


def quarter(panel, row, column):
    """The colour in the middle of one quarter of a panel."""
    height, width = panel.shape[:2]
    return panel[round(height * (0.25 + 0.5 * row)), round(width * (0.25 + 0.5 * column))]


def test_overlay_keeps_the_places_and_the_order_of_relevance():
    heat = np.random.default_rng(0).random((5, 7))
    panel = overlay(np.ones((5, 7)), heat)
    assert panel.shape == (5, 7, 3)
    darkness = -panel.sum(axis=2)
    assert (np.argsort(darkness, axis=None) == np.argsort(heat, axis=None)).all()


def test_overlay_of_nothing_is_the_pale_picture():
    image = np.random.default_rng(0).random((4, 4))
    panel = overlay(image, np.zeros((4, 4)))
    assert np.ptp(panel, axis=2).max() == 0
    assert (np.argsort(panel[..., 0], axis=None) == np.argsort(image, axis=None)).all()
    assert panel.min() >= 0.4


def test_overlay_counts_negative_values_as_none():
    heat = np.array([[-5.0, 0.0], [1.0, 2.0]])
    assert (overlay(np.zeros((2, 2)), heat) == overlay(np.zeros((2, 2)), heat.clip(0))).all()


def test_overlay_colours_follow_a_given_maximum():
    grey = np.full((2, 2), 0.5)
    halves = overlay(grey, np.array([[0.5, 0.0], [0.0, 1.0]]))
    assert (overlay(grey, np.eye(2), maximum=2.0)[0, 0] == halves[0, 0]).all()
    assert (overlay(grey, 9 * np.eye(2), maximum=1.0) == overlay(grey, np.eye(2))).all()


def test_bytes_and_floats_give_the_same_overlay():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    heat = np.arange(24.0).reshape(4, 6)
    assert np.allclose(overlay(pixels, heat), overlay(pixels / 255, heat), atol=1e-12)


@pytest.mark.parametrize(
    ("image", "heat", "message"),
    [
        (np.zeros((4, 4)), np.zeros((4, 5)), r"4 × 5, its picture 4 × 4 pixels"),
        (np.zeros((4, 4)), np.zeros((1, 4, 4)), r"heat map is \[H, W\], not \[1, 4, 4\]"),
        (np.zeros((3, 4, 4)), np.zeros((4, 4)), r"picture is .*, not \[3, 4, 4\]"),
        (np.full((4, 4), 2.0), np.zeros((4, 4)), r"not 2 … 2: undo the model's normalisation"),
        (np.full((4, 4), np.nan), np.zeros((4, 4)), r"values are in 0 … 1"),
        (np.zeros((4, 4)), np.full((4, 4), np.inf), r"NaN or infinite"),
    ],
)
def test_overlay_says_what_does_not_fit(image, heat, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, heat)


def test_figure_is_the_right_way_up():
    image = np.zeros((8, 8, 3))
    image[:4, :4], image[:4, 4:], image[4:, :4] = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    heat = np.zeros((8, 8))
    heat[4:, :4] = 1.0
    picture, panel, *_ = drawn(heatmap_figure(image, [heat], ["lower left"]))
    assert [quarter(picture, *at).tolist() for at in [(0, 0), (0, 1), (1, 0), (1, 1)]] == [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [0, 0, 0],
    ]
    reds = {at: redness(quarter(panel, *at).astype(int)) for at in np.ndindex(2, 2)}
    assert reds.pop((1, 0)) > 60
    assert set(reds.values()) == {0}


def scales(figure, count):
    """What the bars under the maps reach to, as drawn and as written."""
    bars = figure.axes[-count:]
    return [bar.get_xlim() for bar in bars], [bar.get_xticklabels()[1].get_text() for bar in bars]


def test_each_map_has_its_own_scale():
    strong, weak = np.diag([2.0, 1.0]), np.diag([0.5, 0.25])
    figure = heatmap_figure(np.ones((2, 2)), [strong, weak], ["strong", "weak"], title="picture")
    assert [axes.get_title() for axes in figure.axes] == ["picture", "strong", "weak", "", ""]
    assert scales(figure, 2) == ([(0.0, 2.0), (0.0, 0.5)], ["2", "0.5"])
    _, strong_panel, weak_panel, *_ = drawn(figure)
    expected = overlay(np.ones((2, 2)), weak)[0, 0] * 255
    for panel in (strong_panel, weak_panel):
        assert np.abs(quarter(panel, 0, 0) - expected).max() <= 1
        assert quarter(panel, 0, 0).sum() < quarter(panel, 1, 1).sum()


def test_a_shared_scale_makes_colours_comparable():
    strong, weak = np.full((4, 4), 2.0), np.full((4, 4), 0.5)
    figure = heatmap_figure(np.ones((4, 4)), [strong, weak], ["strong", "weak"], shared_scale=True)
    assert scales(figure, 2) == ([(0.0, 2.0), (0.0, 2.0)], ["2", "2"])
    _, strong_panel, weak_panel, *_ = drawn(figure)
    expected = overlay(np.ones((4, 4)), weak, maximum=2.0)[0, 0] * 255
    assert np.abs(quarter(weak_panel, 0, 0) - expected).max() <= 1
    assert quarter(strong_panel, 0, 0).sum() < quarter(weak_panel, 0, 0).sum()


def test_a_map_of_zeros_is_drawn():
    figure = heatmap_figure(np.ones((4, 4)), [np.zeros((4, 4))], ["nothing"])
    assert (drawn(figure)[1] == 255).all()


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 2), (3, 1, 4), (4, 2, 3), (9, 3, 4)])
def test_figure_breaks_into_rows(count, rows, columns):
    titles = [str(number) for number in range(count)]
    figure = heatmap_figure(np.zeros((4, 4)), np.ones((count, 4, 4)), titles)
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == (rows, columns)
    assert [axes.get_title() for axes in figure.axes[1 : count + 1]] == titles


def test_figure_says_what_does_not_fit():
    with pytest.raises(ValueError, match="no heat map"):
        heatmap_figure(np.zeros((4, 4)), [], [])
    with pytest.raises(ValueError, match="2 heat maps need as many titles, not 1"):
        heatmap_figure(np.zeros((4, 4)), np.ones((2, 4, 4)), ["one"])


def test_figures_of_threads_are_equal_and_unknown_to_pyplot():
    heat = np.random.default_rng(0).random((6, 6))
    results = [None] * 4

    def draw(place):
        results[place] = drawn(heatmap_figure(np.zeros((6, 6)), [heat], ["map"]))[1]

    threads = [threading.Thread(target=draw, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((result == results[0]).all() for result in results)
    assert plt.get_fignums() == []
    assert "pyplot" not in vars(sys.modules["captum_generic_attn.visualization"])
