"""Text heat maps: words with their relevance, and their figure. `html` draws the same in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from captum_generic_attn.visualization.arrays import merged, numbers
from captum_generic_attn.visualization.figures import NotebookFigure
from captum_generic_attn.visualization.overlays import scale_bar
from captum_generic_attn.visualization.scales import ONE, OWN, scales_of
from captum_generic_attn.visualization.titles import checked_titles, title_lines
from captum_generic_attn.visualization.words import (
    LINE,
    SIZE,
    Word,
    draw_lines,
    drawable,
    set_lines,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    from captum_generic_attn.comparison import Comparison
    from captum_generic_attn.hf import Words
    from captum_generic_attn.visualization.scales import Scale

# Lengths are in inches.
_WIDTH = 6.8
_EDGE = 0.12
_TITLE = 0.24  # a line of a title
_BAR, _BAR_WIDTH = 0.09, 2.4
_BAR_ABOVE, _BAR_BELOW = 0.07, 0.34  # the space above a colour bar; the bar with its numbers
_GAP = 0.12  # between texts that share a bar


def word_relevance(
    words: Sequence[str] | Words, relevance: ArrayLike | Tensor, *, joined: bool = False
) -> list[Word]:
    """Words with their relevance, for `text_figure`, `text_html` and `pairs_figure`.

    Args:
        words: `N` strings, each a word; or what `hf.words` returned, where a piece gets the sum
            over its tokens.
        relevance: the relevance of one example, `[N]`: a row of what `attribute` returned, or of a
            matrix from `relevance`. For inputs that are embeddings, `[N, D]`: the features of a
            token are summed, unless they are all equal, as those of our own method are.
        joined: whether the pieces of a word become one piece, with the sum of their relevance.

    Returns:
        For each word its pieces, each with its relevance.

    Raises:
        TypeError: if `words` is one string.
        ValueError: if words and relevance do not fit, a value is NaN or infinite, or `joined` is
            set for strings, which have no pieces.

    Example:
        >>> from captum_generic_attn.hf import Piece
        >>> from captum_generic_attn.visualization import word_relevance
        >>> word_relevance(["two", "cats"], [0.5, 2.0])
        [[('two', 0.5)], [('cats', 2.0)]]
        >>> words = ((Piece("two", (1,)),), (Piece("cat", (2,)), Piece("s", (3,))))
        >>> word_relevance(words, [0.0, 0.5, 1.5, 0.25, 0.0])
        [[('two', 0.5)], [('cat', 1.5), ('s', 0.25)]]
        >>> word_relevance(words, [0.0, 0.5, 1.5, 0.25, 0.0], joined=True)
        [[('two', 0.5)], [('cats', 1.75)]]
    """
    values = _of_tokens(relevance)
    if isinstance(words, str):
        raise TypeError(f"words are a sequence of strings, not the one string {words!r:.40}")
    if len(words) == 0:
        raise ValueError("there are no words")
    shape = list(np.shape(relevance))
    if not all(isinstance(word, str) for word in words):
        return _of_pieces(cast("Words", words), values, shape, joined=joined)
    if joined:
        raise ValueError(
            "joined= needs the pieces of each word, which strings do not have: give what "
            "hf.words(tokenizer, ids) returns"
        )
    if len(words) != len(values):
        raise ValueError(
            f"{len(words)} words need as many values, not {len(values)}: relevance is {shape}, and "
            "must be [N] or [N, D], of one example"
        )
    return [[(str(word), float(value))] for word, value in zip(words, values, strict=True)]


def _of_pieces(
    words: Words, values: NDArray[np.float64], shape: list[int], *, joined: bool
) -> list[Word]:
    """Split words into their pieces, each with the sum over its tokens."""
    last = max(place for word in words for _, tokens in word for place in tokens)
    if last >= len(values):
        raise ValueError(
            f"the words are of {last + 1} tokens at least, but there are {len(values)} values: "
            f"relevance is {shape}, and must be [N] or [N, D], of one example"
        )
    found = [[(text, float(values[list(tokens)].sum())) for text, tokens in word] for word in words]
    if not joined:
        return list(found)
    return [
        [("".join(text for text, _ in word), sum(value for _, value in word))] for word in found
    ]


def compared_words(
    words: Sequence[str] | Words,
    comparison: Comparison,
    *,
    example: int = 0,
    part: int = 0,
    joined: bool = False,
) -> tuple[list[list[Word]], list[str]]:
    """The words of a text with the relevance from each method of a comparison, and the method
    names.

    Args:
        words: the words of that example, as in `word_relevance`.
        comparison: what `compare` returned.
        example: index in the batch.
        part: index of the input that holds the text, where there are several.
        joined: as in `word_relevance`.

    Returns:
        The first two arguments of `text_figure` and `text_html`.

    Raises:
        ValueError: if no method of the comparison could be run, or words and attributions do not
            fit.

    Example:
        >>> import torch
        >>> from captum_generic_attn.comparison import Comparison
        >>> from captum_generic_attn.visualization import compared_words, text_figure
        >>> found = Comparison({"ours": torch.tensor([[0.5, 2.0]])}, {"ours": 0.1}, {}, {})
        >>> compared_words(["two", "cats"], found)
        ([[[('two', 0.5)], [('cats', 2.0)]]], ['ours'])
        >>> figure = text_figure(*compared_words(["two", "cats"], found))
    """
    if not comparison.attributions:
        raise ValueError("no method of this comparison could be run: there is nothing to draw")
    texts = []
    for found in comparison.attributions.values():
        tensor = found[part] if isinstance(found, tuple) else found
        texts.append(word_relevance(words, tensor[example], joined=joined))
    return texts, list(comparison.attributions)


def text_figure(
    texts: Sequence[Sequence[Word]],
    titles: Sequence[str],
    *,
    title: str = "",
    shared_scale: bool = False,
    label: str = "relevance",
) -> NotebookFigure:
    """A figure of texts, one below the other, whose words are coloured by their relevance.

    The texts may be one text for several scores or methods, or several texts. Red marks evidence
    for the score; blue, where values are negative, evidence against it. Each text has its own
    scale, shown by the colour bar under it, unless `shared_scale`.

    Args:
        texts: at least one text from `word_relevance`, each with at least one word.
        titles: one per text.
        title: title of the figure.
        shared_scale: one scale for all texts, so that their colours can be compared.
        label: the quantity that the colour bars show.

    Raises:
        TypeError: titles are no sequence of strings.
        ValueError: there is no text, there is not one title for each, a text has no words, or a
            value is NaN or infinite.

    Warns:
        UserWarning: if Matplotlib's font lacks characters of the texts.

    Example:
        >>> from captum_generic_attn.visualization import text_figure, word_relevance
        >>> positive = word_relevance(["a", "fine", "film"], [0.1, 2.0, 0.4])
        >>> negative = word_relevance(["a", "fine", "film"], [0.2, 0.0, 0.1])
        >>> figure = text_figure([positive, negative], ["positive", "negative"])
        >>> [word.get_text() for word in figure.axes[0].texts]
        ['a', 'fine', 'film']
        >>> figure.axes[1].get_xlabel()
        'relevance, own scale'
    """
    scales = scales_of_texts(texts, titles, shared=shared_scale)
    width = 72 * (_WIDTH - 2 * _EDGE)
    # Check the characters of titles too.
    names = [[[(line, 0.0)] for line in name.split("\n")] for name in (title, *titles)]
    known = drawable([*texts, *names])
    over_all, *headings = [_heading(name, width) for name in known[len(texts) :]]
    lines = [set_lines(text, width) for text in known[: len(texts)]]
    below = _BAR_ABOVE + _BAR + _BAR_BELOW
    heights = [
        _TITLE * len(heading) + LINE / 72 * len(own) + (_GAP if shared_scale else below)
        for heading, own in zip(headings, lines, strict=True)
    ]
    top = _EDGE + _TITLE * len(over_all)
    tall = top + sum(heights) + (below - _GAP if shared_scale else 0)
    figure = NotebookFigure(figsize=(_WIDTH, tall))

    def axes_at(top: float, wide: float, high: float) -> Axes:
        return figure.add_axes(
            (_EDGE / _WIDTH, 1 - (top + high) / tall, wide / _WIDTH, high / tall)
        )

    def write(heading: Sequence[str], top: float, size: float) -> None:
        for row, line in enumerate(heading, 1):
            figure.text(
                _EDGE / _WIDTH, 1 - (top + _TITLE * (row - 0.3)) / tall, line,
                fontsize=size, weight="bold", parse_math=False,
            )  # fmt: skip

    def bar(top: float, scale: Scale, extent: str) -> None:
        axes = axes_at(top + _BAR_ABOVE, _BAR_WIDTH, _BAR)
        scale_bar(figure, axes, scale, label, extent, fill=True)

    write(over_all, _EDGE, SIZE + 1)
    for heading, own, scale, height in zip(headings, lines, scales, heights, strict=True):
        write(heading, top, SIZE)
        start = top + _TITLE * len(heading)
        high = LINE / 72 * len(own)
        draw_lines(axes_at(start, width / 72, high), own, width, scale.maximum, signed=scale.signed)
        if not shared_scale:
            bar(start + high, scale, OWN)
        top += height
    if shared_scale:
        bar(top - _GAP, scales[0], ONE)
    return figure


def scales_of_texts(
    texts: Sequence[Sequence[Word]], titles: Sequence[str], *, shared: bool
) -> list[Scale]:
    """One scale per text; it is signed if a value is negative.

    Raises:
        TypeError: titles are no sequence of strings.
        ValueError: there is no text, there is not one title for each, a text has no words, or a
            value is NaN or infinite.
    """
    if len(texts) == 0:
        raise ValueError("there is no text to draw")
    names = checked_titles(titles, len(texts), of="texts")
    values = [values_of(words, name) for words, name in zip(texts, names, strict=True)]
    return scales_of(values, shared=shared)


def values_of(words: Sequence[Word], title: str) -> list[float]:
    """The relevance of each piece of a text; messages name the text by its title.

    Raises:
        ValueError: the text has no words, or a value is NaN or infinite.
    """
    values = [value for word in words for _, value in word]
    if not values:
        raise ValueError(f"the text {title!r} has no words")
    if not np.isfinite(values).all():
        raise ValueError(f"the relevance of a word of {title!r} is NaN or infinite")
    return values


def _heading(own_lines: Sequence[Word], width: float) -> list[str]:
    """Convert a title in lines of words to lines of text."""
    found = [title_lines(word[0][0], width, SIZE + 1, bold=True) for word in own_lines]
    return [line for lines in found for line in lines if line]


def _of_tokens(relevance: ArrayLike | Tensor) -> NDArray[np.float64]:
    """Check the relevance of tokens, and return it as `[N]`."""
    values = numbers(relevance)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(
            f"relevance is {list(values.shape)}, and must be [N] or [N, D], of one example: pick "
            "one of the batch, relevance[0]"
        )
    if not np.isfinite(values).all():
        raise ValueError("the relevance of a token is NaN or infinite")
    return values if values.ndim == 1 else merged(values, axis=1)
