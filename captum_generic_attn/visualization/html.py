"""Text heat maps as self-contained HTML documents, which notebooks display."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from captum_generic_attn.visualization.scales import ONE, OWN, Scale, nothing_of
from captum_generic_attn.visualization.texts import scales_of_texts
from captum_generic_attn.visualization.words import colours_of, right_to_left, share_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from captum_generic_attn.visualization.words import Word

# Styles are inline, so that they do not affect the notebook. The background is the one that the
# colours were designed for, also in dark mode.
_PAGE = (
    "background:#fff;color:#111;color-scheme:light;padding:0.8em 1em;"
    "font:16px/1.9 system-ui,sans-serif;text-align:left;white-space:normal;"
    "print-color-adjust:exact;-webkit-print-color-adjust:exact"
)
_BODY = '<body style="margin:0;background:#fff">\n'
_PIECE = "padding:0.15em 0.2em;white-space:pre-wrap;overflow-wrap:anywhere"
_STEPS = 16  # colour steps of a colour bar
# HTML allows neither these characters nor lone surrogates, not even escaped.
_NO_TEXT = dict.fromkeys((*range(9), 11, 12, *range(14, 32)), "\N{REPLACEMENT CHARACTER}")


class Html(str):
    """An HTML document as a string; a notebook displays it if it is the last value of a cell.

    To save it, use `pathlib.Path("words.html").write_text(document, encoding="utf-8")`.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """A short text, since notebooks store it beside what they display."""
        return f"<HTML document of {len(self)} characters>"

    def _repr_html_(self) -> str:
        """The document's body, which Jupyter displays."""
        return self.partition(_BODY)[2].partition("</body>")[0]


def text_html(
    texts: Sequence[Sequence[Word]],
    titles: Sequence[str],
    *,
    title: str = "",
    shared_scale: bool = False,
    label: str = "relevance",
) -> Html:
    """An HTML document of texts whose words are coloured by their relevance.

    Colours and scales are those of `text_figure`. Hovering over a word shows its value. The
    document has no scripts and loads nothing; texts and titles are escaped.

    Args:
        texts: at least one text from `word_relevance`, each with at least one word.
        titles: one per text.
        title: heading and title of the document.
        shared_scale: one scale for all texts, so that their colours can be compared.
        label: the quantity that the colour bars show.

    Returns:
        The document as a string that notebooks display.

    Raises:
        TypeError: titles are no sequence of strings.
        ValueError: there is no text, there is not one title for each, a text has no words, or a
            value is NaN or infinite.

    Example:
        >>> from captum_generic_attn.visualization import text_html, word_relevance
        >>> text = word_relevance(["a", "<b>fine</b>", "film"], [0.1, 2.0, 0.4])
        >>> document = text_html([text], ["positive"])
        >>> document[:15], "<b>" in document, "&lt;b&gt;fine&lt;/b&gt;" in document
        ('<!DOCTYPE html>', False, True)
    """
    scales = scales_of_texts(texts, titles, shared=shared_scale)
    parts = [_heading(title, 1.2)]
    for words, name, scale in zip(texts, titles, scales, strict=True):
        parts += [_heading(name, 1.0), _paragraph(words, scale)]
        if not shared_scale:
            parts.append(_bar(scale, f"{label}, {OWN}", label))
    if shared_scale:
        parts.append(_bar(scales[0], f"{label}, {ONE}", label))
    inside = "\n".join(part for part in parts if part)
    return Html(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title or label)}</title>\n</head>\n"
        f'{_BODY}<div style="{_PAGE}">\n{inside}\n</div>\n</body>\n</html>\n'
    )


def _heading(text: str, size: float) -> str:
    if not text:
        return ""
    return f'<div style="font-weight:bold;font-size:{size}em" dir="auto">{_escaped(text)}</div>'


def _paragraph(words: Sequence[Word], scale: Scale) -> str:
    # Isolate each word (<bdi>), so that its direction does not reorder its neighbours.
    spans = " ".join(
        f"<bdi>{''.join(_piece(text, relevance, scale) for text, relevance in word)}</bdi>"
        for word in words
    )
    direction = "rtl" if right_to_left(words) else "ltr"
    # The language is unknown.
    return f'<p style="margin:0.2em 0" lang="" dir="{direction}">{spans}</p>'


def _piece(text: str, relevance: float, scale: Scale) -> str:
    back, letters = colours_of(share_of(relevance, scale.maximum, signed=scale.signed))
    return (
        f'<span style="background:{_hex(back)};color:{letters};{_PIECE}" '
        f'title="{relevance:.4g}">{_escaped(text)}</span>'
    )


def _bar(scale: Scale, text: str, label: str) -> str:
    if scale.maximum == 0:
        return f'<div style="font-size:0.75em">{_escaped(nothing_of(label))}</div>'
    shares = np.linspace(-1 if scale.signed else 0, 1, _STEPS + 1)
    steps = ",".join(_hex(colours_of(share)[0]) for share in shares)
    least = f"{-scale.maximum:.2g}" if scale.signed else "0"
    return (
        '<div style="width:max-content;min-width:16em;margin-bottom:1.2em;font-size:0.75em;'
        'line-height:1.5">'
        f'<div style="height:0.7em;background:linear-gradient(to right,{steps})"></div>'
        '<div style="display:flex;justify-content:space-between;gap:1em">'
        f"<span>{least}</span><span>{_escaped(text)}</span><span>{scale.maximum:.2g}</span>"
        "</div></div>"
    )


def _hex(colour: NDArray[np.float64]) -> str:
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in colour)


def _escaped(text: str) -> str:
    known = text.translate(_NO_TEXT).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return escape(known)
