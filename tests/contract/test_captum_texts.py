"""Captum's own images of texts, made of what our methods return."""

import re

import numpy as np
import pytest
import torch
from captum.attr import visualization as viz
from helpers import hugging_face_folders as folders
from helpers.tiny_models import sentences, tiny_text

from captum_generic_attn import GenericAttention, Lrp, hf
from captum_generic_attn.visualization import word_relevance

pytest.importorskip("IPython")

WORDS = ["The", "two", "cats", "are", "very", "old"]
MARK = re.compile(
    r'<mark.*?hsl\((\d+), 75%, (\d+)%\).*?<font color="black"> (.*?)\s*</font>', re.DOTALL
)


def record(words, values):
    return viz.VisualizationDataRecord(
        word_attributions=values, pred_prob=0.9, pred_class=1, true_class=2, attr_class=3,
        attr_score=values.sum(), raw_input_ids=words, convergence_score=0.0,
    )  # fmt: skip


def shown(*records):
    """The words of Captum's HTML with their hue and their lightness in percent."""
    document = viz.visualize_text(records, legend=False).data
    return [(word, int(hue), int(lightness)) for hue, lightness, word in MARK.findall(document)]


def expected(words, values):
    """Captum's scale: green for the score and red against it, both from white to half dark."""
    return [
        (word, 120, 100 - int(50 * value)) if value > 0 else (word, 0, 100 - int(-40 * value))
        for word, value in zip(words, values, strict=True)
    ]


def test_an_attribution_is_shown():
    values = GenericAttention(tiny_text()).attribute(sentences(1), target=2)[0]
    values /= values.norm()  # as Captum's tutorials do
    found = shown(record(WORDS, values))
    assert found == expected(WORDS, values.tolist())
    lightness = [light for _, _, light in found]
    most = int(values.argmax())
    assert lightness[most] == min(lightness) == 100 - int(50 * values.max())
    assert lightness.count(min(lightness)) == 1
    # A row for each record, with its classes and the sum of its values.
    document = viz.visualize_text([record(WORDS, values)]).data
    assert f"<b>{values.sum():.2f}</b>" in document
    assert "<b>1 (0.90)</b>" in document


def test_several_targets_are_rows():
    maps = GenericAttention(tiny_text()).attribute_targets(sentences(1), [0, 3])[:, 0]
    maps /= maps.amax()
    found = shown(*(record(WORDS, values) for values in maps))
    assert found == expected(WORDS, maps[0].tolist()) + expected(WORDS, maps[1].tolist())
    assert found[:6] != found[6:]


def test_a_method_with_signs_is_shown_in_two_colours():
    model = tiny_text()
    embeddings = (model.words(sentences(1)) + model.positions[:6]).detach()

    def forward(x):
        for block in model.blocks:
            x = block(x)
        return model.head(x)[:, 0]

    signed = Lrp(forward, rules="frozen").attribute(embeddings, target=0)[0]
    text = word_relevance(WORDS, signed)
    values = np.array([value for [(_, value)] in text])
    assert values == pytest.approx(signed.sum(-1).numpy())
    assert values.min() < 0 < values.max()
    values /= np.abs(values).max()
    found = shown(record(WORDS, values))
    assert found == expected(WORDS, values)
    assert found[-1] == ("old", 0, 60)  # what speaks most against the score
    assert {hue for _, hue, _ in found} == {0, 120}


def test_joined_words_are_shown():
    tokenizer = folders.bert_tokenizer()
    ids = torch.tensor(tokenizer("two cats, two")["input_ids"])
    values = GenericAttention(tiny_text()).attribute(ids[None], target=1)[0]
    values /= values.sum()
    joined = word_relevance(hf.words(tokenizer, ids, special=True), values, joined=True)
    names, sums = zip(*(word[0] for word in joined), strict=True)
    assert names == ("[CLS]", "two", "cats,", "two", "[SEP]")
    assert sum(sums) == pytest.approx(1)
    assert shown(record(names, np.array(sums))) == expected(names, sums)
