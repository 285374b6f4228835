"""Figures of heat maps: right way up, on one scale, without pyplot's state, shown by notebooks.

What lies in their panels is in test_visualization_overlays.py, grids are in
test_visualization_grids.py.
"""

import base64
import sys
import threading

import nbformat
import numpy as np
import pytest
import torch
from captum.attr import visualization as captum_visualization
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from nbclient import NotebookClient

from captum_generic_attn import GenericAttention, demo
from captum_generic_attn.comparison import Comparison
from captum_generic_attn.visualization import (
    NotebookFigure,
    comparison_figure,
    detections_figure,
    grid_figure,
    heatmap_figure,
    overlay,
    pairs_figure,
    regions_figure,
    text_figure,
    text_html,
)


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
    _, panel, bar = drawn(figure)
    assert (panel == 255).all()
    assert (bar == 255).all(), "a bar of colours would say that there are values"
    assert figure.axes[-1].get_xlabel() == "relevance: 0 everywhere"
    assert [tick.get_text().strip() for tick in figure.axes[-1].get_xticklabels()] == ["", ""]


@pytest.mark.parametrize("shape", [(20, 400), (10, 400), (400, 20), (40, 60)])
def test_bars_are_as_wide_as_their_pictures(shape):
    heat = np.linspace(0, 0.003, shape[0] * shape[1]).reshape(shape)
    for figure in (
        heatmap_figure(np.ones(shape), [heat, -heat], ["a", "b"]),
        grid_figure([np.ones(shape)], {"a": [heat], "b": [-heat]}),
    ):
        FigureCanvasAgg(figure).draw()
        *_, first, second, bar, signed_bar = figure.axes
        for axes, under in ((first, bar), (second, signed_bar)):
            assert under.get_window_extent().width > 0.9 * axes.get_window_extent().width
            assert under.get_window_extent().height >= 2
            ends = [tick.get_window_extent() for tick in under.get_xticklabels()]
            said = under.xaxis.label.get_window_extent()
            assert ends[0].x1 < said.x0
            assert said.x1 < ends[1].x0
            assert under.get_window_extent().y1 <= axes.get_window_extent().y0


FOR, AGAINST = np.diag([2.0, 0.0]), np.diag([0.0, -4.0])
TEXTS = [[[("for", 3.0)]], [[("against", -6.0)]]]


def signed_figure(name, *, shared=False):
    """Of a map, or a map and a text, that speak for a score, and of others that speak against."""
    maps, titles, image = [FOR, AGAINST], ["for", "against"], np.ones((2, 2))
    if name == "heatmap":
        return heatmap_figure(image, maps, titles, shared_scale=shared)
    if name == "detections":
        return detections_figure(image, [(0, 0, 1, 1)] * 2, titles, maps, shared_scale=shared)
    return pairs_figure(image, maps, TEXTS, titles, shared_scale=shared)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["heatmap", "detections", "pairs"])
def test_negative_values_are_blue(name, shared):
    figure = signed_figure(name, shared=shared)
    by_title = {axes.get_title(): np.asarray(axes.images[0].get_array())
                for axes in figure.axes if axes.images}  # fmt: skip
    top = 4.0 if shared else 2.0
    expected = overlay(np.ones((2, 2)), FOR, maximum=top, signed=shared)
    assert (by_title["for"] == expected).all()
    assert (by_title["against"] == overlay(np.ones((2, 2)), AGAINST, signed=True)).all()
    assert redness(by_title["against"])[1, 1] < -0.3
    ends = [tuple(tick.get_text() for tick in axes.get_xticklabels()) for axes in figure.axes]
    assert ends.count(("-4", "4")) == (2 if shared else 1)
    assert ends.count(("0", "2")) == (0 if shared else 1)
    if name == "pairs":
        assert ends.count(("-6", "6")) == (2 if shared else 1)
        assert ends.count(("0", "3")) == (0 if shared else 1)
        back = word_axes(figure)[1].patches[0].get_facecolor()
        assert back[2] - back[0] > 0.3
        said = {axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()}
        extents = {"one scale for all maps", "one scale for all texts"} if shared else {"own scale"}
        assert said == {f"relevance, {extent}" for extent in extents}


@pytest.mark.parametrize("strings", ["s", "two"])
def test_a_string_is_no_titles(strings):
    heat, text = np.eye(4), [[("word", 1.0)]]
    boxes, count = [(0, 0, 2, 2)] * len(strings), len(strings)
    for draw in (
        lambda: heatmap_figure(heat, [heat] * count, strings),
        lambda: pairs_figure(heat, [heat] * count, [text] * count, strings),
        lambda: text_figure([text] * count, strings),
        lambda: text_html([text] * count, strings),
        lambda: detections_figure(heat, boxes, strings, [heat]),
        lambda: regions_figure(heat, boxes, np.ones((count, count)), strings),
        lambda: regions_figure(heat, boxes, np.ones(count), labels=strings),
        lambda: grid_figure([heat] * count, {"map": [heat] * count}, names=strings),
    ):
        with pytest.raises(TypeError, match=f"sequence of strings, not the one string '{strings}'"):
            draw()
    with pytest.raises(TypeError, match="titles are strings, not float"):
        heatmap_figure(heat, [heat], [0.5])


def test_one_map_needs_no_title():
    figure = heatmap_figure(np.ones((4, 4)), [np.eye(4)], title="picture")
    assert [axes.get_title() for axes in figure.axes[:2]] == ["picture", ""]
    with pytest.raises(ValueError, match=r"3 heat maps need as many titles, .* give \[map\]"):
        heatmap_figure(np.ones((4, 4)), torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match=r"not 1; for the channels .* give \[map\]"):
        heatmap_figure(np.ones((4, 4)), torch.ones(3, 4, 4), ["bag"])
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\]: pick .* or maps\[:, 0\] of what attrib"):
        heatmap_figure(np.ones((4, 4)), torch.ones(2, 2, 3, 4, 4), ["bag", "boot"])
    with pytest.raises(ValueError, match=r"\[2, 2, 3, 4, 4\]: pick .* or maps\[:, 0\] of what at"):
        overlay(np.ones((4, 4)), torch.ones(2, 2, 3, 4, 4))


def test_long_titles_of_pairs_keep_apart_and_on_the_page():
    titles = ["what the image shows, said at great length " * 3, "short", "x" * 80, "short"]
    figure = pairs_figure(
        np.zeros((8, 8)), np.ones((4, 8, 8)), [text_of(3)] * 4, titles, title="a file " * 20
    )
    FigureCanvasAgg(figure).draw()
    extents = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert len(extents) == 5
    bars = [axes.get_tightbbox() for axes in figure.axes if axes.get_xlabel()]
    for place, extent in enumerate(extents):
        assert figure.bbox.x0 <= extent.x0
        assert extent.x1 <= figure.bbox.x1
        assert extent.y1 <= figure.bbox.y1
        for other in [*extents[:place], *bars]:
            wide = min(extent.x1, other.x1) - max(extent.x0, other.x0)
            assert min(wide, min(extent.y1, other.y1) - max(extent.y0, other.y0)) < 1.5
    short = pairs_figure(np.zeros((8, 8)), np.ones((1, 8, 8)), [text_of(3)], ["short"])
    long = pairs_figure(np.zeros((8, 8)), np.ones((1, 8, 8)), [text_of(3)], ["a\nb\nc"])
    assert long.get_figheight() - short.get_figheight() == pytest.approx(2 * 0.19)


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
    package = "captum_generic_attn.visualization"
    modules = [module for name, module in sys.modules.items() if name.startswith(package)]
    assert len(modules) >= 6
    assert all("pyplot" not in vars(module) for module in modules)


def test_file_names_and_class_names_are_no_formulas():
    strange = r"$\frac{x_{1}$ 5$ ^_{"
    figure = heatmap_figure(np.zeros((8, 8)), np.ones((1, 8, 8)), [strange], title=strange)
    assert drawn(figure)[0].shape[0] > 100
    assert [axes.get_title() for axes in figure.axes[:2]] == [strange, strange]


def test_a_figure_says_which_scale_it_has():
    maps = np.ones((2, 4, 4))
    for shared, said in [(False, "own scale"), (True, "one scale for all")]:
        figure = heatmap_figure(np.zeros((4, 4)), maps, ["a", "b"], shared_scale=shared)
        assert [bar.get_xlabel() for bar in figure.axes[-2:]] == [f"relevance, {said}"] * 2


def test_what_attribute_targets_returns_is_drawn():
    canvas = demo.canvases()[0]
    image = demo.preprocess(canvas.image())[None]
    maps = GenericAttention(demo.load_model()).attribute_targets(image, [1, 3])
    figure = heatmap_figure(canvas.image(), maps[:, 0], ["trouser", "sandal"])
    for axes, heat in zip(figure.axes[1:3], maps[:, 0, 0].numpy(), strict=True):
        expected = overlay(np.asarray(canvas.image()), heat)
        assert (np.asarray(axes.images[0].get_array()) == expected).all()


# ---------------------------------------------------------------- notebooks, and Captum's figures


def pictures_of_cell(source):
    """How many PNGs a fresh kernel shows after a cell, and the first of them."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    shown = [output.data["image/png"] for output in notebook.cells[0].outputs if "data" in output]
    return len(shown), base64.b64decode(shown[0])


@pytest.mark.slow
@pytest.mark.ci_sample
@pytest.mark.parametrize("before", ["", "%matplotlib inline\n"])
def test_a_notebook_shows_a_figure_once(before):
    count, png = pictures_of_cell(
        f"{before}import numpy as np\n"
        "from captum_generic_attn.visualization import heatmap_figure\n"
        "heatmap_figure(np.zeros((8, 8)), [np.eye(8)], ['map'])"
    )
    assert count == 1
    assert png.startswith(b"\x89PNG\r\n\x1a\n")


def test_every_figure_shows_itself():
    heat = np.eye(4)
    found = Comparison({"ours": torch.ones(1, 1, 4, 4)}, {"ours": 1.0}, {}, {})
    figures = [
        heatmap_figure(heat, [heat], [""]),
        comparison_figure(heat, found),
        detections_figure(heat, [(0, 0, 2, 2)], ["bag"], [heat]),
        pairs_figure(heat, [heat], [[[("word", 1.0)]]], [""]),
        grid_figure([heat], found),
    ]
    for figure in figures:
        assert isinstance(figure, NotebookFigure)
        assert figure._repr_png_().startswith(b"\x89PNG\r\n\x1a\n")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("kind", ["heat_map", "blended_heat_map"])
def test_captums_own_figures_show_our_maps_the_right_way_up(kind):
    canvas = demo.canvases()[0]
    image = demo.preprocess(canvas.image())[None]
    ours = GenericAttention(demo.load_model()).attribute(image, target=3)[0]
    picture, last = np.asarray(canvas.image()), ours.permute(1, 2, 0).numpy()
    _, axis = captum_visualization.visualize_image_attr(
        last, picture, method=kind, sign="positive", use_pyplot=False
    )
    _, (first, second) = captum_visualization.visualize_image_attr_multiple(
        last, picture, ["original_image", kind], ["all", "positive"], use_pyplot=False
    )
    assert (first.images[0].get_array() == picture).all()
    expected = ours.sum(0).numpy()
    for axes in (axis, second):
        shown = np.asarray(axes.images[-1].get_array())
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is the upper one
        right = np.corrcoef(shown.ravel(), expected.ravel())[0, 1]
        assert right > 0.95
        for wrong in (expected[::-1], expected[:, ::-1], expected.T):
            assert np.corrcoef(shown.ravel(), wrong.ravel())[0, 1] < right - 0.5


# ---------------------------------------------------------------- detections


def pixel_of(figure, axes, x, y):
    """The drawn colour at a place of an image, in its pixels: (0, 0) is its upper left corner."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = np.asarray(canvas.buffer_rgba())[..., :3]
    # Matplotlib has whole numbers in the middle of pixels.
    column, row = axes.transData.transform((x - 0.5, y - 0.5))
    return page[page.shape[0] - 1 - round(row), round(column)].astype(int)


def test_a_box_is_drawn_at_its_pixels_and_in_one_colour():
    heat = np.zeros((40, 60))
    heat[25:30, 5:20] = 1
    boxes = [(5, 25, 20, 30), (30, 4, 55, 36)]
    figure = detections_figure(np.ones((40, 60, 3)), boxes, ["low", "high"], [heat, heat])
    picture, first, second = figure.axes[:3]
    colours = {}
    for axes, box in [(picture, 0), (picture, 1), (first, 0), (second, 1)]:
        left, top, right, bottom = boxes[box]
        middle = (left + right) / 2, (top + bottom) / 2
        edges = [
            (left, middle[1]), (right, middle[1]), (middle[0], bottom)
        ]  # fmt: skip
        for x, y in edges:
            colours.setdefault(box, pixel_of(figure, axes, x, y))
            assert np.abs(pixel_of(figure, axes, x, y) - colours[box]).max() <= 90
    assert np.abs(colours[0] - colours[1]).max() > 40
    # The other detection's box is on the image alone; the heat fills its own.
    assert (pixel_of(figure, first, 55, 20) > 240).all()
    reds = pixel_of(figure, first, 12, 27)
    assert reds[0] - reds[2] > 60
    assert np.ptp(pixel_of(figure, first, 12, 12)) < 10  # not upside down


def test_each_detection_has_its_own_scale_and_title():
    boxes = [(0, 0, 4, 4), (4, 4, 8, 8), (0, 4, 4, 8)]
    labels = ["bag  0.99", "$b$  0.80", "top  0.60"]
    heatmaps = np.stack([np.eye(8), 0.25 * np.eye(8)])
    figure = detections_figure(np.ones((8, 8)), boxes, labels, heatmaps, title="picture")
    assert [axes.get_title() for axes in figure.axes[:3]] == ["picture", *labels[:2]]
    assert [text.get_text() for text in figure.axes[0].texts] == labels
    assert scales(figure, 2) == ([(0.0, 1.0), (0.0, 0.25)], ["1", "0.25"])


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (600, 800)])
@pytest.mark.parametrize("count", [1, 3, 8, 12])
def test_labels_keep_inside_the_picture_and_apart(size, count):
    height, width = size
    rng = np.random.default_rng(count)
    starts = rng.random((count, 2)) * 0.8
    ends = starts + 0.02 + rng.random((count, 2)) * (0.98 - starts)
    boxes = np.concatenate([starts, ends], axis=1) * [width, height, width, height]
    boxes[-1] = boxes[0]  # twice the same box
    labels = [f"potted plant  0.{i:02}" for i in range(count)]
    heatmaps = np.ones((min(count, 8), height, width))
    figure = detections_figure(np.zeros(size), boxes, labels, heatmaps)
    FigureCanvasAgg(figure).draw()
    panel = figure.axes[0].get_window_extent()
    extents = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(extents) == count
    for extent in extents:
        assert panel.x0 <= extent.x0
        assert extent.x1 <= panel.x1
        assert panel.y0 - 1 <= extent.y0
        assert extent.y1 <= panel.y1 + 1
    pairs = [(a, b) for i, a in enumerate(extents) for b in extents[:i]]
    # Letters may touch where they have no ascenders; they never cover each other.
    shared = [
        max(0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0, min(a.y1, b.y1) - max(a.y0, b.y0) - 2)
        for a, b in pairs
    ]
    assert max(shared, default=0) == 0


@pytest.mark.parametrize(
    ("boxes", "labels", "count", "message"),
    [
        ([(0, 0, 1, 1)], [], 1, "1 boxes need as many labels, not 0"),
        ([(0, 0, 1, 1)], ["bag"], 2, "there are 2 heat maps and 1 boxes"),
        ([(0, 0, 1, 1)], ["bag"], 0, "there are 0 heat maps and 1 boxes"),
        ([(3, 0, 1, 1)], ["bag"], 1, r"\(left, top, right, bottom\) in pixels, not \[3, 0, 1, 1\]"),
        ([(0, 0, 1)], ["bag"], 1, r"not \[0, 0, 1\]"),
        ([(0, 0, 1, np.nan)], ["bag"], 1, "nan"),
    ],
)
def test_detections_say_what_does_not_fit(boxes, labels, count, message):
    with pytest.raises(ValueError, match=message):
        detections_figure(np.zeros((4, 4)), boxes, labels, np.ones((count, 4, 4)))


# ---------------------------------------------------------------- images and texts

SENTENCE = (
    "a bag and a boot in the upper left and a dress in the lower right and an unusually long "
    "word: Donaudampfschifffahrtsgesellschaftskapitän $x^2_{"
)
WORDS = SENTENCE.split()


def text_of(count, seed=0):
    """So many words with a relevance each."""
    values = np.random.default_rng(seed).random(count)
    return [[(WORDS[i % len(WORDS)], float(value))] for i, value in enumerate(values)]


def word_axes(figure):
    return [axes for axes in figure.axes if axes.texts]


def test_words_are_coloured_by_their_relevance():
    text = [[("pale", 0.0)], [("mid", 0.5), ("dle", 0.25)], [("dark", 2.0)], [("light", 0.1)]]
    figure = pairs_figure(np.ones((4, 4)), [np.eye(4)], [text], ["logit 3"], title="picture")
    (axes,) = word_axes(figure)
    assert [word.get_text() for word in axes.texts] == ["pale", "mid", "dle", "dark", "light"]
    backs = [patch.get_facecolor()[:3] for patch in axes.patches]
    strip = overlay(np.ones((1, 5)), np.array([[0.0, 0.5, 0.25, 2.0, 0.1]]))[0]
    assert np.abs(np.array(backs) - strip).max() < 1e-6
    assert [word.get_color() for word in axes.texts] == [
        "black",
        "black",
        "black",
        "white",
        "black",
    ]
    # Pieces of a word stand together, words apart.
    lefts = [patch.get_x() for patch in axes.patches]
    rights = [left + patch.get_width() for left, patch in zip(lefts, axes.patches, strict=True)]
    gaps = np.array(lefts[1:]) - rights[:-1]
    assert gaps == pytest.approx([gaps[0], 0.0, gaps[0], gaps[0]], abs=1e-9)
    assert gaps[0] > 1
    # The bars tell both scales: of the image, and of the words.
    _, labels = scales(figure, 3)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["picture", "logit 3"]
    assert "2" in labels


def test_words_are_legible_on_every_colour():
    text = [[(str(i), i / 40)] for i in range(41)]
    (axes,) = word_axes(pairs_figure(np.ones((4, 4)), [np.eye(4)], [text], [""]))
    for word, patch in zip(axes.texts, axes.patches, strict=True):
        linear = np.array(patch.get_facecolor()[:3]) ** 2.2
        back = linear @ [0.2126, 0.7152, 0.0722]
        front = 1.0 if word.get_color() == "white" else 0.0
        contrast = (max(back, front) + 0.05) / (min(back, front) + 0.05)
        assert contrast > 3.0


@pytest.mark.parametrize("size", [(64, 64), (30, 60), (60, 30)])
@pytest.mark.parametrize("counts", [(2,), (25, 3), (7, 25, 2), (12, 2, 25, 19)])
def test_nothing_of_pairs_overlaps_or_leaves_the_page(size, counts):
    texts = [text_of(count, seed) for seed, count in enumerate(counts)]
    heatmaps = np.ones((len(counts), *size))
    titles = ["logit 24.13, softmax 0.93"] * len(counts)
    figure = pairs_figure(np.zeros(size), heatmaps, texts, titles, title="a_long_file-name.png")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = figure.bbox
    blocks = []
    for axes in figure.axes:
        tight = axes.get_tightbbox()
        assert page.x0 <= tight.x0
        assert tight.x1 <= page.x1
        assert page.y0 <= tight.y0
        assert tight.y1 <= page.y1
        blocks.append(tight)
    for i, a in enumerate(blocks):
        for b in blocks[:i]:
            wide, tall = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(wide, tall) < 1.5
    for axes, text in zip(word_axes(figure), texts, strict=True):
        room = axes.get_window_extent()
        drawn_words = [word.get_text() for word in axes.texts]
        assert len(drawn_words) == len(text)
        for word, patch, ((given, _),) in zip(axes.texts, axes.patches, text, strict=True):
            # Letters within their colour, colours within the axes.
            letters, back = word.get_window_extent(), patch.get_window_extent()
            assert back.x0 <= letters.x0 + 1
            assert letters.x1 <= back.x1 + 1
            assert back.y0 <= letters.y0
            assert letters.y1 <= back.y1
            assert room.x0 - 1 <= back.x0
            assert back.x1 <= room.x1 + 1
            assert word.get_text() == given or given.startswith(word.get_text().removesuffix("…"))
        # Line after line, from left to right.
        places = [(-patch.get_window_extent().y0, patch.get_x()) for patch in axes.patches]
        assert [(round(y), x) for y, x in places] == sorted((round(y), x) for y, x in places)


def test_a_word_wider_than_a_line_is_broken_between_its_pieces():
    long = [("Donaudampfschifffahrts", 0.5), ("gesellschafts", 0.2), ("kapitänsmütze", 0.1)]
    figure = pairs_figure(np.ones((4, 4)), [np.eye(4)], [[long, [("x" * 90, 1.0)]]], [""])
    (axes,) = word_axes(figure)
    words = [word.get_text() for word in axes.texts]
    assert words[:3] == [text for text, _ in long]
    assert words[3].startswith("xxxx")
    assert words[3].endswith("x…")
    assert len(words[3]) < 60


def test_pairs_are_the_right_way_up():
    heat = np.zeros((8, 8))
    heat[4:, :4] = 1.0
    figure = pairs_figure(np.full((8, 8), 0.5), [heat], [text_of(3)], [""])
    panel = drawn(figure)[1]
    reds = {at: redness(quarter(panel, *at).astype(int)) for at in np.ndindex(2, 2)}
    assert reds.pop((1, 0)) > 60
    assert set(reds.values()) == {0}


@pytest.mark.parametrize(
    ("texts", "titles", "message"),
    [
        ([], [""], "1 heat maps need as many texts, not 0"),
        ([text_of(2)], [], "1 heat maps need as many titles, not 0"),
        ([[]], ["a"], "the text 'a' has no words"),
        ([[[("a", np.nan)]]], ["a"], "the relevance of a word of 'a' is NaN or infinite"),
    ],
)
def test_pairs_say_what_does_not_fit(texts, titles, message):
    with pytest.raises(ValueError, match=message):
        pairs_figure(np.zeros((4, 4)), [np.eye(4)], texts, titles)
    with pytest.raises(ValueError, match="no heat map"):
        pairs_figure(np.zeros((4, 4)), [], [], [])
