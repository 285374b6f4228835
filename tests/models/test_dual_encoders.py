"""Dual encoders: their texts as tokens and words, and their scores."""

import json
import sys

import pytest
import torch
import transformers
from helpers import hugging_face_folders as folders
from PIL import Image

from captum_generic_attn import GenericAttention, demo, hf
from captum_generic_attn.errors import UnavailableWeightsError
from captum_generic_attn.models import dual_encoders
from captum_generic_attn.models.dual_encoders import load_dual_encoder


def pieces(words):
    return [[piece.text for piece in word] for word in words]


def places(words):
    return [place for word in words for piece in word for place in piece.tokens]


# ---------------------------------------------------------------- the shipped one


def test_the_shipped_clip_scores_as_its_model_does():
    encoder = load_dual_encoder("garments-clip")
    image = demo.canvases()[1].image()
    texts = encoder.encode(["a bag", "A boot and a dress"])
    pixels = encoder.preprocess(image)
    found = encoder.scores(pixels, texts)
    with torch.no_grad():
        expected = demo.load_clip()(
            pixel_values=demo.preprocess(image)[None],
            input_ids=demo.tokenize(["a bag", "a boot and a dress"]),
        )
    assert torch.equal(found.logits, expected.logits_per_image[0])
    cosines = expected.image_embeds @ expected.text_embeds.T
    assert (found.cosines - cosines[0]).abs().max() < 1e-6
    assert pieces(texts.words[1]) == [["A"], ["boot"], ["and"], ["a"], ["dress"]]
    assert places(texts.words[1]) == [1, 2, 3, 4, 5]
    assert len(texts) == 2


def test_the_shipped_clip_says_which_words_it_knows():
    with pytest.raises(ValueError, match=r"does not know 'hat' .* Its words are: a, and, .*boot"):
        load_dual_encoder("garments-clip").encode(["a hat"])


def test_a_pair_is_scored_by_itself():
    encoder = load_dual_encoder("garments-clip")
    pixels = encoder.preprocess(demo.canvases()[0].image())
    sentences = ["a bag and a boot in the upper left", "a dress", "a top"]
    texts = encoder.encode(sentences)
    forward, inputs, rest = encoder.pairs(pixels, texts)
    logits = forward(*inputs, *rest)
    assert (logits - encoder.scores(pixels, texts).logits).abs().max() < 1e-5
    together = GenericAttention(forward).attribute(inputs, None, rest)
    for i, sentence in enumerate(sentences):
        ids = demo.tokenize([sentence])
        alone = GenericAttention(hf.pairs(encoder.model)).attribute((pixels[None], ids))
        assert (together[0][i] - alone[0][0]).abs().max() < 1e-6
        assert (together[1][i, : ids.shape[1]] - alone[1][0]).abs().max() < 1e-6


# ---------------------------------------------------------------- Hugging Face's


def test_a_clip_of_hugging_face(tmp_path):
    model = folders.clip(tmp_path)
    encoder = load_dual_encoder(str(tmp_path))
    texts = encoder.encode(["Two cats!", "and"])
    assert pieces(texts.words[0]) == [["two"], ["ca", "ts"], ["!"]]
    assert pieces(texts.words[1]) == [["and"]]
    # Neither the start, nor the end, nor what fills up the second text.
    assert [places(words) for words in texts.words] == [[1, 2, 3, 4], [1]]
    assert texts.encoding["input_ids"].shape == (2, 6)
    assert texts.encoding["attention_mask"].sum(1).tolist() == [6, 3]

    image = Image.new("RGB", (60, 40), (200, 30, 90))
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path)
    both = processor(text=["Two cats!", "and"], images=image, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**both)
    found = encoder.scores(encoder.preprocess(image), texts)
    assert (found.logits - expected.logits_per_image[0]).abs().max() < 1e-6
    picture = encoder.image(encoder.preprocess(image))
    assert picture.shape == (32, 32, 3)
    assert abs(picture - torch.tensor([200, 30, 90]).numpy() / 255).max() < 1e-6


def test_a_siglip_gets_texts_filled_up_as_in_training(tmp_path):
    folders.siglip(tmp_path)
    texts = load_dual_encoder(str(tmp_path)).encode(["two cats", "a"])
    assert texts.encoding["input_ids"].shape == (2, 64)
    assert pieces(texts.words[0]) == [["two"], ["cat", "s"]]
    ids = texts.encoding["input_ids"]
    assert (ids[0, : places(texts.words[0])[0]] == 0).all()  # filled up on the left
    assert pieces(texts.words[1]) == [["a"]]


def test_a_siglip_of_short_texts_gets_them_filled_up_to_what_it_takes(tmp_path):
    folders.siglip(tmp_path, longest=16)
    encoder = load_dual_encoder(str(tmp_path))
    assert encoder.multi_label
    assert encoder.encode(["two cats"]).encoding["input_ids"].shape == (1, 16)
    with pytest.raises(
        ValueError, match=r"the longest text has \d+ tokens, and the model takes 16"
    ):
        encoder.encode(["two cats " * 20])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["two", ""], "'' has no words"),
        (["abcdefghijklmnopqrstuvwxyz"], "the longest text has 28 tokens, and the model takes 20"),
    ],
)
def test_texts_that_cannot_be_taken(texts, message, tmp_path):
    folders.clip(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_dual_encoder(str(tmp_path)).encode(texts)


def test_without_a_processor(tmp_path):
    folders.clip(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(UnavailableWeightsError, match="no dual encoder with its processor can be"):
        load_dual_encoder(str(tmp_path))


def test_a_tokenizer_alone_is_no_processor(tmp_path, monkeypatch):
    # So AutoProcessor answers for models whose processor it does not know.
    loaded = folders.clip(tmp_path), folders.clip_tokenizer(), "the folder 'saved'"
    monkeypatch.setattr(dual_encoders, "from_hugging_face", lambda *arguments: loaded)
    expected = "the folder 'saved' has a CLIPTokenizer in place of a processor .* save both beside"
    with pytest.raises(UnavailableWeightsError, match=expected):
        load_dual_encoder("saved/model")


def test_a_classifier_is_no_dual_encoder(tmp_path):
    folders.clip(tmp_path, "CLIPForImageClassification", num_labels=3)
    with pytest.raises(UnavailableWeightsError, match="holds no trained dual encoder: weights are"):
        load_dual_encoder(str(tmp_path))


def test_a_model_without_embeddings_is_told(tmp_path):
    folders.clip(tmp_path)
    encoder = load_dual_encoder(str(tmp_path))
    forward = encoder.model.forward

    def without(**keywords):
        output = forward(**keywords)
        return type(output)(logits_per_image=output.logits_per_image)

    encoder.model.forward = without
    texts = encoder.encode(["two"])
    with pytest.raises(ValueError, match="it returns no image_embeds, text_embeds, but logits_per"):
        encoder.scores(torch.zeros(3, 32, 32), texts)


def test_a_model_with_several_vectors_for_a_picture_is_told(tmp_path):
    folders.clip(tmp_path)
    encoder = load_dual_encoder(str(tmp_path))
    forward = encoder.model.forward

    def several(**keywords):
        output = forward(**keywords)
        output.image_embeds = output.image_embeds[:, None].expand(-1, 3, -1)
        return output

    encoder.model.forward = several
    expected = r"it returns embeddings \(1, 3, 8\) and \(1, 8\): one vector for the image and one"
    with pytest.raises(ValueError, match=expected):
        encoder.scores(torch.zeros(3, 32, 32), encoder.encode(["two"]))


def test_pictures_that_are_no_planes_are_told(tmp_path):
    folders.clip(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    config["image_processor"] = {"image_processor_type": "Siglip2ImageProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    encoder = load_dual_encoder(str(tmp_path))
    with pytest.raises(ValueError, match=r"makes \(256, 768\) of an image"):
        encoder.preprocess(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize("name", ["garments-clip", "openai/clip-vit-base-patch32"])
def test_without_transformers_the_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'captum-generic-attn\[hf\]'"):
        load_dual_encoder(name)
