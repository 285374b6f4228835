"""The experiment on CLIP: what its maps are to point at, and the difference of two captions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from captum_generic_attn import GenericAttention, demo, hf

KINDS = ("alone", "several", "garment", "place", "erased")


@pytest.fixture(scope="module")
def asked(evidence, sample):
    """What a model that is always right is asked, and its canvases."""
    clip = evidence.clip
    drawn = clip.draw(clip.load_split("test", sample), 3, 0, 120)

    class Right:
        """Gives the first caption of each canvas the highest score."""

        def __call__(self, pixel_values, input_ids):
            values = -torch.arange(len(input_ids), dtype=torch.float)
            return SimpleNamespace(logits_per_image=values[None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "drops", lambda model, pairs, drawn: torch.ones(len(pairs)))
        pairs, retrieval = clip.pairs(Right(), drawn)
    return pairs, retrieval, drawn


def test_what_is_asked(evidence, asked) -> None:
    pairs, retrieval, drawn = asked
    assert tuple(pairs) == KINDS
    assert retrieval.value == 1
    assert 60 < retrieval.count <= 120  # some captions have fewer than nine wrong ones
    assert len(pairs["alone"]) == 120
    for pair in pairs["alone"]:
        assert len(pair.caption.words) == 2
        assert pair.asked == pair.caption.mentions
        assert pair.asked[0].garment in drawn.classes[pair.canvas]
    assert len(pairs["several"]) > 20
    for pair in pairs["several"]:
        assert pair.asked == pair.caption.mentions
        assert len(pair.asked) > 1
        named = sum(evidence.clip.meant(drawn, pair.canvas, mention) for mention in pair.asked)
        assert ((drawn.classes[pair.canvas] >= 0) & (named == 0)).any()
    for kind in ("garment", "place"):
        assert len(pairs[kind]) > 30
        for pair in pairs[kind]:
            assert len(pair.caption.mentions) > 1
            (mine,) = pair.asked
            place = pair.caption.mentions.index(mine)
            changed = pair.other.mentions[place]
            assert pair.other.mentions[:place] == pair.caption.mentions[:place]
            assert pair.other.mentions[place + 1 :] == pair.caption.mentions[place + 1 :]
            same = mine.garment == changed.garment, mine.place == changed.place
            assert same == ((False, True) if kind == "garment" else (True, False))
    several = sum(len(pair.caption.mentions) > 1 for pair in pairs["erased"])
    assert several == len(pairs["erased"]) > 60
    places = [pair.caption.mentions.index(pair.asked[0]) for pair in pairs["erased"]]
    assert set(places) >= {0, 1, 2}  # not always the first that is named


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_to_point_at_boxes_and_words(evidence, asked, kind) -> None:
    every, _, drawn = asked
    pairs = every[kind]
    told = evidence.clip.told(pairs, drawn)
    assert len(told.inputs) == (2 if kind in {"alone", "several"} else 3)
    small = {"a", "and", "in", "the"}
    for row, pair in enumerate(pairs):
        read = [demo.VOCABULARY[token] for token in told.inputs[1][row, told.words[row]]]
        assert read == list(pair.caption.words)
        about = [demo.VOCABULARY[token] for token in told.inputs[1][row, told.about[row]]]
        expected = [word for mention in pair.asked for word in mention.words()]
        assert about == [word for word in expected if word not in small]
        tokens = np.zeros((8, 8), bool)
        for mention in pair.asked:
            for slot in np.flatnonzero(evidence.clip.meant(drawn, pair.canvas, mention)):
                left, top, right, bottom = drawn.boxes[pair.canvas, slot]
                tokens[top // 8 : -(-bottom // 8), left // 8 : -(-right // 8)] = True
        assert (told.right[row].numpy() == tokens).all()


def test_erased_garments_are_gone_and_nothing_else(evidence, asked) -> None:
    every, _, drawn = asked
    pairs = every["erased"]
    told = evidence.clip.told(pairs, drawn)
    for row, pair in enumerate(pairs):
        picture, bare = told.inputs[0][row], told.inputs[2][row]
        gone = evidence.clip.meant(drawn, pair.canvas, pair.asked[0])
        assert gone.any()
        ground = picture[:, ~torch.from_numpy(drawn.masks[pair.canvas].any(0))].mode(1).values
        places = torch.zeros(64, 64, dtype=torch.bool)
        for left, top, right, bottom in drawn.boxes[pair.canvas, gone]:
            places[top:bottom, left:right] = True
        assert (bare[:, places] == ground[:, None]).all()
        assert torch.equal(bare[:, ~places], picture[:, ~places])


def test_perfect_and_inverted_maps_of_pairs(evidence, asked) -> None:
    every, _, drawn = asked
    for pairs in every.values():
        told = evidence.clip.told(pairs, drawn)
        picture, words = told.right.float(), told.about.float()
        assert [found.value for found in evidence.clip.pointed(told, picture, words)] == [100, 100]
        wrong = evidence.clip.pointed(told, -picture, -words)
        assert [found.value for found in wrong] == [0, 0]


@pytest.fixture(scope="module")
def pictures():
    return torch.stack([demo.preprocess(canvas.image()) for canvas in demo.canvases()[:3]])


ONE = ("a bag", "a boot in the upper left", "a top")
OTHER = ("a boot", "a bag", "a dress in the lower left")


def test_a_difference_is_that_of_two_scores(evidence, pictures) -> None:
    model = demo.load_clip()
    difference, score = evidence.clip.Difference(model), hf.pairs(model)
    one, other = demo.tokenize(ONE), demo.tokenize(OTHER)
    cases = [
        (other, score(pictures, one) - score(pictures, other)),
        (pictures.flip(0), score(pictures, one) - score(pictures.flip(0), one)),
    ]
    for compared, expected in cases:
        found = difference(pictures, one, compared)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        alone = [
            difference(*(t[i : i + 1] for t in (pictures, one, compared)))[0] for i in range(3)
        ]
        torch.testing.assert_close(found, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_what_is_compared_counts_where_the_two_meet(evidence, pictures) -> None:
    """Of two captions, in the picture's map alone; of two pictures, in the text's alone."""
    model = demo.load_clip()
    method, plain = (
        GenericAttention(of) for of in (evidence.clip.Difference(model), hf.pairs(model))
    )
    one = demo.tokenize(ONE)
    usual = plain.attribute((pictures, one))
    for compared, same in ((demo.tokenize(OTHER), 1), (pictures.flip(0), 0)):
        found = method.attribute((pictures, one), additional_forward_args=(compared,))
        close = [
            torch.allclose(mine, its, atol=1e-4 * its.max(), rtol=0)
            for mine, its in zip(found, usual, strict=True)
        ]
        assert close[same]
        assert not close[1 - same]


def test_the_broken_variants_of_two_towers(evidence, pictures) -> None:
    model = hf.pairs(demo.load_clip())
    ids = demo.tokenize(ONE)
    found = GenericAttention(model).relevance((pictures, ids))
    broken = evidence.methods.broken_clip(model, (8, 8))
    of_image, of_text = broken["ours, broken: R transposed"].attribute((pictures, ids))
    matrix = found.matrix("pixel_values", "pixel_values")
    torch.testing.assert_close(of_image, matrix[:, 1:, 0].view(3, 8, 8))
    ends = (ids == demo.VOCABULARY.index("[END]")).int().argmax(1)
    for row, end in enumerate(ends.tolist()):
        column = found.matrix("input_ids", "input_ids")[row, :, end].clone()
        column[end] = 0
        torch.testing.assert_close(of_text[row], column)
    of_image, of_text = broken["ours, broken: wrong row"].attribute(
        (pictures, ids), return_input_shape=False
    )
    torch.testing.assert_close(of_image.flatten(1)[:, 1:], matrix[:, 1, 2:])
    torch.testing.assert_close(of_text[:, 0], found.matrix("input_ids", "input_ids")[:, 1, 0])
