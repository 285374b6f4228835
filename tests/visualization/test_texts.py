"""Words in the colours of their relevance: figures and HTML of texts, from tokens to pixels."""

from __future__ import annotations

import copy
import html
import pickle
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import hugging_face_folders as folders
from helpers.browser import chromium
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from zoo.oracles import randomise

from captum_generic_attn import GenericAttention, RawAttention, compare, hf
from captum_generic_attn.comparison import Comparison
from captum_generic_attn.visualization import (
    NotebookFigure,
    compared_words,
    overlay,
    text_figure,
    text_html,
    word_relevance,
)
from captum_generic_attn.visualization.titles import text_width, title_lines

transformers = pytest.importorskip("transformers")

SENTENCE = (
    "The film was, in spite of its Donaudampfschifffahrtsgesellschaftskapitän, a wonderful "
    "$x^2_{ piece of <b>cinema</b> & nothing else"
)
WORDS = SENTENCE.split()
MARKUP = [
    "<script>document.title='run'</script>", "a&amp;b", '"', "'x'", "</title>", "<!--", "$x^2",
]  # fmt: skip


def text_of(count: int, seed: int = 0, *, signed: bool = False):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=count) if signed else generator.random(count)
    return word_relevance([WORDS[i % len(WORDS)] for i in range(count)], values)


def backs(axes) -> np.ndarray:
    return np.array([patch.get_facecolor()[:3] for patch in axes.patches])


def word_axes(figure):
    return [axes for axes in figure.axes if axes.texts]


def bars(figure):
    """What is written under the bars: least, most, label."""
    drawn = [axes for axes in figure.axes if not axes.texts]
    return [
        (*(label.get_text() for label in axes.get_xticklabels()), axes.get_xlabel())
        for axes in drawn
    ]


# ---------------------------------------------------------------- words and values


@pytest.fixture(scope="module")
def tokenizer():
    return folders.bert_tokenizer()


@pytest.fixture(scope="module")
def encoding(tokenizer):
    return tokenizer(["two cats, two cats and two", "cats"], padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def method_and_arguments(tokenizer, encoding):
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), num_labels=3, max_position_embeddings=16, **folders.TINY
    )
    model = randomise(transformers.BertForSequenceClassification(config).double().eval())
    forward, inputs, rest = hf.unpack(model, encoding)
    return GenericAttention(forward), inputs, rest


def test_all_words_and_special_tokens_have_what_attribute_gave(
    tokenizer, encoding, method_and_arguments
) -> None:
    method, inputs, rest = method_and_arguments
    relevance = method.attribute(inputs, 1, rest)
    assert relevance.shape == (2, 11)
    for ids, values in zip(encoding["input_ids"], relevance, strict=True):
        everything = word_relevance(hf.words(tokenizer, ids, special=True), values)
        assert sum(r for word in everything for _, r in word) == pytest.approx(values.sum().item())
        # Without special tokens, theirs is missing, and nothing else.
        words = hf.words(tokenizer, ids)
        marked = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        assert sum(r for word in word_relevance(words, values) for _, r in word) == pytest.approx(
            values[~marked].sum().item(), abs=1e-12
        )
        assert values[marked].sum() > 0


def test_joined_words_have_the_sum_of_their_pieces(
    tokenizer, encoding, method_and_arguments
) -> None:
    method, inputs, rest = method_and_arguments
    values = method.attribute(inputs, 1, rest)[0]
    words = hf.words(tokenizer, encoding["input_ids"][0])
    apart, joined = (word_relevance(words, values, joined=joined) for joined in (False, True))
    assert [word[0][0] for word in joined] == ["two", "cats,", "two", "cats", "and", "two"]
    assert [len(word) for word in apart] == [1, 3, 1, 2, 1, 1]
    for pieces, [(_, relevance)] in zip(apart, joined, strict=True):
        assert relevance == pytest.approx(sum(value for _, value in pieces))
    assert joined[1][0][1] == pytest.approx(values[2:5].sum().item())


def test_what_relevance_and_attribute_targets_return_is_taken(
    tokenizer, encoding, method_and_arguments
) -> None:
    method, inputs, rest = method_and_arguments
    tokens = tokenizer.convert_ids_to_tokens(encoding["input_ids"][0])
    found = method.relevance(inputs, 1, rest)
    row = found.matrix("input_ids", "input_ids")[0, 0]
    text = word_relevance(tokens, row)
    assert [value for [(_, value)] in text] == row.tolist()
    both = method.attribute_targets(inputs, [0, 1], rest)
    for values, target in zip(both, (0, 1), strict=True):
        alone = method.attribute(inputs, target, rest)[0]
        given_values = [value for [(_, value)] in word_relevance(tokens, values[0])]
        assert given_values == pytest.approx(alone.tolist())


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_values_may_be_lists_arrays_and_tensors(kind) -> None:
    assert word_relevance(["a", "b"], kind([0.25, 2.0])) == [[("a", 0.25)], [("b", 2.0)]]


def test_values_may_need_a_gradient_and_be_of_half_precision() -> None:
    values = torch.tensor([0.25, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert word_relevance(("a", "b"), values) == [[("a", 0.25)], [("b", 2.0)]]


def test_features_are_summed_unless_all_are_alike() -> None:
    alike = np.repeat([[0.5], [2.0]], 3, axis=1)
    assert word_relevance(["a", "b"], alike) == [[("a", 0.5)], [("b", 2.0)]]
    different = np.array([[0.5, 0.5, 0.5], [2.0, -1.0, 0.5]])
    assert word_relevance(["a", "b"], different) == [[("a", 1.5)], [("b", 1.5)]]


PIECES = ((hf.Piece("cat", (1,)), hf.Piece("s", (2, 3))),)


@pytest.mark.parametrize(
    ("words", "values", "options", "message"),
    [
        (["a", "b"], [1.0] * 3, {}, r"2 words need as many values, not 3: relevance is \[3\]"),
        (["a", "b"], np.ones((1, 2)), {}, r"not 1: relevance is \[1, 2\], and must be .* one exa"),
        (["a"], np.ones((1, 2, 3)), {}, r"relevance is \[1, 2, 3\], and must .* relevance\[0\]"),
        (["a"], 1.0, {}, r"relevance is \[\]"),
        (["a"], [], {}, r"relevance is \[0\]"),
        ((), [1.0], {"joined": True}, "there are no words"),
        (PIECES, [1.0] * 3, {}, "of 4 tokens at least, but there are 3 values"),
        (["a", "b"], [1.0, np.nan], {}, "NaN or infinite"),
        (["cat", "##s"], [1.0, 2.0], {"joined": True}, "joined= needs .* give what hf.words"),
    ],
)
def test_words_and_values_that_do_not_fit(words, values, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        word_relevance(words, values, **options)


def test_words_may_be_an_array() -> None:
    text = word_relevance(np.array(["a", "b"]), [0.25, 2.0])
    assert text == [[("a", 0.25)], [("b", 2.0)]]
    assert {type(piece) for word in text for piece, _ in word} == {str}
    with pytest.raises(ValueError, match="there are no words"):
        word_relevance(np.array([], dtype=str), [1.0])


def test_one_string_is_no_words() -> None:
    with pytest.raises(TypeError, match="not the one string 'two cats'"):
        word_relevance("two cats", np.ones(8))


def test_the_methods_of_a_comparison(tokenizer, encoding, method_and_arguments) -> None:
    method, inputs, rest = method_and_arguments
    methods = {"ours": method, "raw": RawAttention(method.forward_func)}
    found = compare(methods, inputs, 1, rest)
    words = hf.words(tokenizer, encoding["input_ids"][1])
    texts, names = compared_words(words, found, example=1, joined=True)
    assert names == ["ours", "raw"]
    for text, name in zip(texts, names, strict=True):
        assert text == word_relevance(words, found[name][1], joined=True)
    assert texts[0] != texts[1]
    # The second of two inputs.
    paired = Comparison({"two": (torch.zeros(1, 3, 4, 4), torch.ones(1, 1))}, {"two": 1.0}, {}, {})
    assert compared_words(["a"], paired, part=1) == ([[[("a", 1.0)]]], ["two"])
    with pytest.raises(ValueError, match="no method of this comparison could be run"):
        compared_words(words, Comparison({}, {}, {"ours": "refused"}, {}))


# ---------------------------------------------------------------- the figure


def darkness(colours: np.ndarray) -> np.ndarray:
    return -colours @ [0.2126, 0.7152, 0.0722]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=12, unique=True))
def test_the_darker_a_word_the_higher_its_relevance(values) -> None:
    text = word_relevance([str(value) for value in values], values)
    (axes,) = word_axes(text_figure([text], [""]))
    assert np.argsort(darkness(backs(axes))).tolist() == np.argsort(values).tolist()
    document = text_html([text], [""])
    colours = [[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in pieces_of(document).colours]
    assert np.argsort(darkness(np.array(colours))).tolist() == np.argsort(values).tolist()


def test_each_text_has_its_own_scale() -> None:
    strong, weak = word_relevance(["a", "b"], [2.0, 1.0]), word_relevance(["a", "b"], [0.25, 0.5])
    figure = text_figure([strong, weak], ["strong", "weak"], title="two texts", label="share")
    assert isinstance(figure, NotebookFigure)
    assert [text.get_text() for text in figure.texts] == ["two texts", "strong", "weak"]
    assert bars(figure) == [("0", "2", "share, own scale"), ("0", "0.5", "share, own scale")]
    first, second = word_axes(figure)
    assert (backs(first) == backs(second)[::-1]).all()


def test_a_shared_scale_makes_texts_comparable() -> None:
    strong, weak = word_relevance(["a", "b"], [2.0, 1.0]), word_relevance(["c"], [1.0])
    figure = text_figure([strong, weak], ["strong", "weak"], shared_scale=True)
    assert bars(figure) == [("0", "2", "relevance, one scale for all")]
    first, second = word_axes(figure)
    assert (backs(first)[1] == backs(second)[0]).all()
    # A negative value anywhere makes the scale of all of them signed.
    against = word_relevance(["c"], [-4.0])
    figure = text_figure([strong, against], ["strong", "against"], shared_scale=True)
    assert bars(figure) == [("-4", "4", "relevance, one scale for all")]


def test_colours_are_those_of_pictures() -> None:
    values = np.array([0.0, 0.5, -0.25, 2.0, -1.0])
    (axes,) = word_axes(text_figure([word_relevance(list("abcde"), values)], ["signed"]))
    strip = overlay(np.ones((1, 5)), values[None], signed=True)[0]
    assert np.abs(backs(axes) - strip).max() < 1e-6
    blue = backs(axes)[:, 2] - backs(axes)[:, 0]
    assert (np.sign(np.round(blue, 3)) == -np.sign(values)).all()


def contrast(back: np.ndarray, front: str) -> float:
    linear = np.where(back > 0.04045, ((back + 0.055) / 1.055) ** 2.4, back / 12.92)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return 1.05 / (luminance + 0.05) if front == "white" else (luminance + 0.05) / 0.05


def test_letters_are_legible_on_every_colour() -> None:
    text = word_relevance([str(i) for i in range(81)], np.linspace(-1, 1, 81))
    (axes,) = word_axes(text_figure([text], [""]))
    fronts = [word.get_color() for word in axes.texts]
    assert set(fronts) == {"white", "black"}
    pairs = zip(backs(axes), fronts, strict=True)
    assert min(contrast(back, front) for back, front in pairs) >= 4.5  # WCAG's level AA


def test_words_without_relevance_are_drawn_without_colours() -> None:
    figure = text_figure([word_relevance(["a", "b"], [0.0, 0.0])], ["none"])
    (axes,) = word_axes(figure)
    assert (backs(axes) == 1).all()
    assert bars(figure) == [(" ", " ", "relevance: 0 everywhere")]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert np.ptp(np.asarray(canvas.buffer_rgba()).astype(int)[..., :3], axis=-1).max() == 0


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "counts",
    [(1,), (25, 1, 60, 12), pytest.param((500,), marks=[pytest.mark.slow, pytest.mark.ci_sample])],
)
def test_nothing_overlaps_or_leaves_the_page(counts, shared) -> None:
    texts = [text_of(count, seed, signed=seed % 2 == 1) for seed, count in enumerate(counts)]
    texts[0].append([("un", 0.1), ("x" * 200, 0.5), ("able", 0.2)])
    titles = ["positive", "long " * 60, "x" * 200, "$x^2_{"][: len(counts)]
    figure = text_figure(texts, titles, shared_scale=shared, title="Why? " * 30)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = figure.bbox
    blocks = [axes.get_tightbbox() for axes in figure.axes]
    blocks += [text.get_window_extent() for text in figure.texts]
    for block in blocks:
        assert page.x0 <= block.x0
        assert block.x1 <= page.x1
        assert page.y0 <= block.y0
        assert block.y1 <= page.y1
    for i, a in enumerate(blocks):
        for b in blocks[:i]:
            wide, tall = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(wide, tall) < 1.5
    for text, axes in zip(texts, word_axes(figure), strict=True):
        drawn = [word.get_text() for word in axes.texts]
        assert len(drawn) == sum(map(len, text))
        # Letters stay on their colour.
        for word, patch in zip(axes.texts, axes.patches, strict=True):
            letters, back = word.get_window_extent(), patch.get_window_extent()
            assert back.x0 - 0.5 <= letters.x0
            assert letters.x1 <= back.x1 + 0.5


def test_words_of_right_to_left_scripts_begin_at_the_right() -> None:
    text = word_relevance(["مرحبا", "بالعالم", "abc"], [1, 2, 3])
    (axes,) = word_axes(text_figure([text], [""]))
    lefts = [patch.get_x() for patch in axes.patches]
    assert lefts == sorted(lefts, reverse=True)
    last_right = lefts[0] + axes.patches[0].get_width()
    assert last_right == pytest.approx(axes.get_xlim()[1])
    (axes,) = word_axes(text_figure([word_relevance(["1", "abc", "مرحبا"], [1, 2, 3])], [""]))
    assert axes.patches[0].get_x() == 0


def test_characters_without_a_glyph_are_told_once() -> None:
    letters = [*"猫在沙发上", "\ud800", "\x00", "a\nb", "\t", "é"]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        figure = text_figure([word_relevance(letters, np.ones(10))] * 2, ["中", ""])
        FigureCanvasAgg(figure).draw()
    (warning,) = seen
    assert warning.filename == __file__
    assert re.search(
        "no glyph for 8 characters, such as .*猫.*: a box replaces each", str(warning.message)
    )
    assert [word.get_text() for word in figure.axes[0].texts] == [*"□" * 7, "a↵b", "⇥", "é"]
    assert figure.texts[0].get_text() == "□"


def test_a_further_font_gives_its_glyphs() -> None:
    rune = "\N{MATHEMATICAL BOLD SCRIPT CAPITAL A}"
    has = [
        font.name
        for font in font_manager.fontManager.ttflist
        if font.name in {"STIXGeneral", "DejaVu Math TeX Gyre"}
        and ord(rune) in font_manager.get_font(font.fname).get_charmap()
    ]
    sans = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    if not has or ord(rune) in sans:
        pytest.skip("Matplotlib has no font for a letter that its usual one lacks")
    with rc_context({"font.family": ["DejaVu Sans", "no such font", has[0]]}):
        figure = text_figure([word_relevance([rune], [1.0])], [""])
    assert figure.axes[0].texts[0].get_text() == rune


@pytest.mark.parametrize("draw", [text_figure, text_html])
@pytest.mark.parametrize(
    ("texts", "titles", "message"),
    [
        ([], [], "no text to draw"),
        ([text_of(2)], ["a", "b"], "1 texts need as many titles, not 2"),
        ([text_of(2), []], ["a", "b"], "the text 'b' has no words"),
        ([[[("a", np.inf)]]], ["x"], "relevance of a word of 'x' is NaN or infinite"),
    ],
)
def test_texts_that_cannot_be_drawn(draw, texts, titles, message) -> None:
    with pytest.raises(ValueError, match=message):
        draw(texts, titles)


# ---------------------------------------------------------------- HTML


class Pieces(HTMLParser):
    """What a document holds: its tags, its words, and the colours and values of their pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.colours: list[str] = []
        self.letters: list[str] = []
        self.values: list[str] = []
        self.data: dict[str, str] = {}
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        given_attributes = dict(attrs)
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        assert not [name for name in given_attributes if name.startswith("on") or name == "src"]
        if tag == "bdi":
            self.words.append("")
        if "title" in given_attributes:
            style = re.match("background:#(.{6});color:(black|white);", given_attributes["style"])
            self.colours.append(style[1])
            self.letters.append(style[2])
            self.values.append(given_attributes["title"])

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.data[self.open[-1] if self.open else ""] = data
        if "bdi" in self.open:
            self.words[-1] += data


def pieces_of(document: str) -> Pieces:
    parser = Pieces()
    parser.feed(document)
    parser.close()
    assert parser.open == []
    return parser


def test_markup_in_words_and_titles_is_shown() -> None:
    text = word_relevance(MARKUP, np.arange(len(MARKUP)))
    document = text_html([text], MARKUP[:1], title=MARKUP[4], label="<i>")
    found = pieces_of(document)
    assert found.words == MARKUP
    assert found.data["title"] == MARKUP[4]
    known = {"html", "head", "meta", "title", "body", "div", "p", "bdi", "span"}
    assert set(found.tags) == known
    assert html.escape(MARKUP[0]) in document
    assert "&lt;i&gt;, own scale" in document


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4), st.text(max_size=8))
def test_no_text_breaks_the_document(words, title) -> None:
    document = text_html([word_relevance(words, np.ones(len(words)))], [title], title=title)
    document.encode()  # nothing that UTF-8 has not
    controls = {chr(number) for number in range(32)} - set("\t\n\r")
    shown = ["".join("\ufffd" if c in controls else c for c in word) for word in words]
    assert pieces_of(document).words == [
        word.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for word in shown
    ]


def test_html_has_the_figures_colours_and_the_values() -> None:
    text = [[("un", -1.0), ("able", 0.123456)], [("two", 2.0)], [("x", 0.0)]]
    found = pieces_of(text_html([text], ["signed"]))
    assert found.words == ["unable", "two", "x"]
    assert found.values == ["-1", "0.1235", "2", "0"]
    (axes,) = word_axes(text_figure([text], ["signed"]))
    expected = ["".join(f"{round(255 * part):02x}" for part in back) for back in backs(axes)]
    assert found.colours == expected
    assert found.letters == [word.get_color() for word in axes.texts]


def scales_in(document: str) -> list[tuple[str, str, str]]:
    return re.findall("<span>([^<]*)</span><span>([^<]*)</span><span>([^<]*)</span>", document)


def test_html_states_its_scales() -> None:
    strong, weak = word_relevance(["a", "b"], [2.0, 1.0]), word_relevance(["c"], [-0.5])
    own = text_html([strong, weak], ["strong", "weak"])
    assert scales_in(own) == [
        ("0", "relevance, own scale", "2"),
        ("-0.5", "relevance, own scale", "0.5"),
    ]
    one = text_html([strong, weak], ["strong", "weak"], shared_scale=True, label="share")
    assert scales_in(one) == [("-2", "share, one scale for all", "2")]
    nothing = text_html([word_relevance(["a"], [0.0])], [""])
    assert scales_in(nothing) == []
    assert "relevance: 0 everywhere" in nothing
    assert pieces_of(nothing).colours == ["ffffff"]


def test_html_is_a_string_that_notebooks_show(tmp_path) -> None:
    document = text_html([word_relevance(["a", "b"], [2.0, 1.0])], ["title"])
    assert isinstance(document, str)
    path = tmp_path / "words.html"
    path.write_text(document, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == document
    shown = document._repr_html_()
    assert shown in document
    assert shown.startswith("<div style=")
    assert {"html", "head", "body", "title", "style"} & set(pieces_of(shown).tags) == set()
    assert pieces_of(shown).words == ["a", "b"]
    assert repr(document) == f"<HTML document of {len(document)} characters>"
    for twin in (copy.deepcopy(document), pickle.loads(pickle.dumps(document))):  # noqa: S301
        assert twin == document
        assert twin._repr_html_() == shown


def test_a_notebook_shows_the_documents_body() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    document = text_html([word_relevance(["a"], [1.0])], ["title"])
    assert formatters.HTMLFormatter()(document) == document._repr_html_()


@pytest.fixture(scope="module")
def browser():
    with chromium("--window-size=700,900") as driver:
        yield driver


@pytest.mark.slow
@pytest.mark.ci_sample
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_words_and_runs_nothing(browser, tmp_path, dark) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    words = [*MARKUP, "x" * 300, *"猫好", "مرحبا", *WORDS * 5]
    text = word_relevance(words, np.random.default_rng(0).normal(size=len(words)))
    document = text_html([text, text], [MARKUP[0], ""], title="a </title> b")
    path = tmp_path / "words.html"
    path.write_text(document, encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.title == "a </title> b"
    query = "return [...document.querySelectorAll('bdi')].map(word => word.textContent)"
    assert browser.execute_script(query) == words * 2
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.compatMode") == "CSS1Compat"
    # No sideways scrolling, in spite of a word wider than the page.
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    styles = browser.execute_script(
        "return [...document.querySelectorAll('bdi > span')].map(piece => {"
        "const style = getComputedStyle(piece); return [style.backgroundColor, style.color]})"
    )
    page = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert page == "rgb(255, 255, 255)"
    numbers = [[[int(n) for n in re.findall(r"\d+", c)] for c in style] for style in styles]
    for back, front in numbers:
        letters = "white" if front == [255, 255, 255] else "black"
        assert front in ([0, 0, 0], [255, 255, 255])
        assert contrast(np.array(back) / 255, letters) >= 4.5
    assert sorted({back[0] > back[2] for back, _ in numbers}) == [False, True]


@pytest.mark.parametrize("room", [30.0, 80.0, 200.0])
def test_titles_are_broken_into_lines_that_fit_and_lose_nothing(room):
    title = "which garment is extraordinarilylong\nand  where ?"
    lines = title_lines(title, room, 11)
    assert all(text_width(line, 11) <= room for line in lines)
    assert "".join(lines).replace(" ", "") == title.replace(" ", "").replace("\n", "")
    assert any(line.startswith("and") for line in lines)  # a line of its own stays one
    assert title_lines("bag  0.99", 200.0, 11) == ["bag  0.99"]
