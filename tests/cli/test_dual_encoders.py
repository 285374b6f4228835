"""`explain` of dual encoders: what is printed, what is drawn, and what is refused."""

import re

import numpy as np
import pytest
import torch
from helpers import hugging_face_folders as folders
from helpers.command_line import explain, recorded
from PIL import Image

from captum_generic_attn import GenericAttention, demo, hf

CLIP = "--model", "garments-clip"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def figures(monkeypatch):
    return recorded(monkeypatch, "pairs_figure")


def texts(*sentences):
    return [part for sentence in sentences for part in ("--text", sentence)]


def listed(output, text):
    """The printed numbers of a text."""
    (row,) = re.findall(rf"{re.escape(text)} ((?:-?\d+\.\d+ )+)explained", output)
    return [float(number) for number in row.split()]


def test_the_shipped_clip_explains_texts(figures):
    sentences = ["a bag and a boot", "a dress in the upper right", "a sneaker"]
    output = explain(*CLIP, *texts(*sentences))
    assert "How well the shipped CLIP finds that texts fit the image:" in output
    assert output.endswith("Wrote explanation.png")

    model, ids = demo.load_clip(), demo.tokenize(sentences)
    pixels = demo.preprocess(demo.canvases()[0].image())[None]
    with torch.no_grad():
        found = model(pixel_values=pixels, input_ids=ids)
    logits = found.logits_per_image[0]
    cosines = (found.image_embeds @ found.text_embeds.T)[0]
    for sentence, *expected in zip(sentences, cosines, logits, logits.softmax(0), strict=True):
        cosine, logit, share = map(float, expected)
        numbers = listed(output, sentence)
        assert numbers == [
            pytest.approx(cosine, abs=6e-4), pytest.approx(logit, abs=6e-3),
            pytest.approx(share, abs=6e-4),
        ]  # fmt: skip

    ((image, heatmaps, words, titles, options),) = figures
    assert options == {"title": "image", "crop_box": (0, 0, 64, 64)}
    assert (
        np.abs(np.asarray(image) / 255 - np.asarray(demo.canvases()[0].image()) / 255).max() < 1e-6
    )
    in_picture, in_texts = GenericAttention(hf.pairs(model)).attribute(
        (pixels.repeat(3, 1, 1, 1), ids)
    )
    assert np.abs(heatmaps - in_picture[:, 0].numpy()).max() < 1e-6
    for sentence, drawn, expected in zip(sentences, words, in_texts, strict=True):
        # One piece a word, and neither the start nor the end nor padding.
        assert [[text for text, _ in word] for word in drawn] == [[w] for w in sentence.split()]
        values = [value for word in drawn for _, value in word]
        assert values == pytest.approx(expected[1 : 1 + len(values)].tolist(), abs=1e-6)
    assert titles == [
        f"logit {logit:.2f}, softmax {share:.2f}"
        for logit, share in zip(logits, logits.softmax(0), strict=True)
    ]


def test_a_single_text_has_no_softmax(figures):
    output = explain(*CLIP, *texts("a bag", "a bag"))
    assert "softmax" not in output
    assert len(listed(output, "a bag")) == 2
    ((_, heatmaps, _, (title,), _),) = figures
    assert len(heatmaps) == 1
    assert re.fullmatch(r"logit -?\d+\.\d\d", title)


def test_start_layer_is_the_one_of_the_method(figures):
    explain(*CLIP, *texts("a trouser"), "--start-layer=-1")
    pixels = demo.preprocess(demo.canvases()[0].image())[None]
    inputs = pixels, demo.tokenize(["a trouser"])
    pairs = hf.pairs(demo.load_clip())
    last = GenericAttention(pairs, start_layer=-1).attribute(inputs)[0][0, 0].numpy()
    every = GenericAttention(pairs).attribute(inputs)[0][0, 0].numpy()
    assert np.abs(figures[0][1][0] - last).max() < 1e-6
    assert np.abs(every - last).max() > 1e-4


def test_the_figure_is_a_picture_of_panels():
    explain(*CLIP, *texts("a bag", "a boot and a top"))
    with Image.open("explanation.png") as figure:
        pixels = np.asarray(figure.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert 1.5 < width / height < 3.5
    colourful = np.ptp(pixels, axis=2) > 60
    assert all(colourful[:, part : part + width // 3].any() for part in (0, width // 3, width // 2))


def test_a_folder_of_hugging_face(figures, tmp_path):
    model = folders.clip(tmp_path / "saved")
    output = explain("--model", "saved", *texts("Two cats!", "[and] $x$"))
    assert "How well saved finds that texts fit the image:" in output
    assert len(listed(output, "[and] $x$")) == 3
    tokenizer = folders.clip_tokenizer()
    encoding = tokenizer(["Two cats!", "[and] $x$"], padding=True, return_tensors="pt")
    processor = folders.T.CLIPProcessor.from_pretrained("saved").image_processor
    pixels = processor(demo.canvases()[0].image(), return_tensors="pt")["pixel_values"]
    inputs = pixels.repeat(2, 1, 1, 1), encoding["input_ids"]
    in_picture, in_texts = GenericAttention(hf.pairs(model)).attribute(
        inputs, None, encoding["attention_mask"]
    )
    ((image, heatmaps, words, _, options),) = figures
    assert image.size == (64, 64)
    assert options["crop_box"] == (0, 0, 64, 64)
    assert np.abs(heatmaps - in_picture[:, 0].numpy()).max() < 1e-6
    assert [[text for text, _ in word] for word in words[0]] == [["two"], ["ca", "ts"], ["!"]]
    values = [value for word in words[0] for _, value in word]
    assert values == pytest.approx(in_texts[0, 1:5].tolist(), abs=1e-6)


def test_a_siglip(figures, tmp_path):
    folders.siglip(tmp_path / "saved")
    output = explain("--model", "./saved", *texts("two cats"))
    ((_, heatmaps, words, (title,), _),) = figures
    # Each text is judged by itself.
    (logit,) = re.findall(r"two cats +\S+ +(\S+)", output)
    share = torch.tensor(float(logit)).sigmoid().item()
    assert "sigmoid" in output
    assert title == f"logit {logit}, sigmoid {share:.2f}"
    assert heatmaps.shape == (1, 32, 32)
    assert [[text for text, _ in word] for word in words[0]] == [["two"], ["cat", "s"]]


def test_characters_without_a_glyph_are_told(tmp_path):
    folders.clip(tmp_path / "saved")
    output = explain("--model", "saved", *texts("🐈"))
    assert output.count("Warning: Glyph 128008") == 1
    assert output.endswith("Wrote explanation.png")


def test_methods_explain_the_first_text(monkeypatch):
    drawn = recorded(monkeypatch, "comparison_figure")
    names = "Generic attention", "Raw attention", "Saliency"
    output = explain(*CLIP, *texts("a top", "a bag"), "--methods", ",".join(names))
    ((_, comparison, options),) = drawn
    assert options == {"title": "a top", "crop_box": (0, 0, 64, 64)}
    assert list(comparison.attributions) == ["Generic attention", "Raw attention"]
    # Token ids are whole numbers, which have no gradient.
    assert "Warning: Saliency is left out: One of the differentiated Tensors" in output
    pixels = demo.preprocess(demo.canvases()[0].image())[None]
    expected = GenericAttention(hf.pairs(demo.load_clip())).attribute(
        (pixels, demo.tokenize(["a top"]))
    )
    found = comparison["Generic attention"]
    assert all(
        (ours - theirs[:, : ours.shape[1]]).abs().max() < 1e-6
        for ours, theirs in zip(expected, found, strict=True)
    )
    assert len(re.findall("explained", output)) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--text: garments-clip compares the image with texts: give at least one (two"),
        (
            texts("a hat"),
            2,
            "does not know 'hat' of 'a hat'. Its words are: a, and, in, the, upper",
        ),
        (texts(""), 2, "'' has 0 words"),
        (
            [*texts("a bag"), "--target", "bag"],
            2,
            "--target: garments-clip scores texts, not class",
        ),
        ([*texts("a bag"), "--top", "2"], 2, "--top: garments-clip scores the texts that it is gi"),
        ([*texts("a bag"), "--weights", "x.pth"], 2, "garments-clip brings its own weights"),
        ([*texts("a bag"), "--start-layer", "9"], 1, "Error: the shipped CLIP: start_layer=9"),
        ([*texts("a bag"), "--methods", "theirs"], 2, "'theirs': there are all; generic; Generic"),
    ],
)
def test_failures_say_what_to_do(arguments, code, message, tmp_path):
    (tmp_path / "x.pth").touch()
    output = explain(*CLIP, *arguments, code=code)
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "explanation.png").exists()


@pytest.mark.parametrize("model", ["garments-vit", "test_vit", "garments-detr"])
def test_models_that_take_no_text_say_so(model):
    output = explain("--model", model, *texts("a bag"), code=2)
    assert "--text" in output
    assert (
        "takes no text: leave it out, or give a dual encoder, such as --model garments-cl" in output
    )


def test_too_long_a_text_is_told(tmp_path):
    folders.clip(tmp_path / "saved")
    output = explain("--model", "saved", *texts("two " * 30), code=2)
    assert "--text: the longest text has 32 tokens, and the model takes 20" in output
