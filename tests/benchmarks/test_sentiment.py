"""The text classifier of the tutorials: what it is trained on, and what it has learnt."""

import importlib
import io
import json
import random
import sys
import tarfile
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "sentiment"


@pytest.fixture(scope="module")
def training():
    pytest.importorskip("tqdm")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("train_bert")
        sys.modules.pop("train_bert")


def packed(files):
    """A gzipped tar of these files, as bytes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def test_sentences_and_words_are_read_from_the_distribution(training, tmp_path):
    rows = {
        "movieReviewSnippets": "1\t2.5\tA   fine &amp; quiet film.\n2\t-0.4\tA film.\n",
        "amazonReviewSnippets": "1_1\t-3\tIt broke.\n",
        "nytEditorialSnippets": "1_1\t0.5\tHe agreed.\n",
        "tweets": "1\t-0.5\tOh no\n",
    }
    files = {f"hutto_ICWSM_2014/{kind}_GroundTruth.txt": rows[kind].encode() for kind in rows}
    files[f"hutto_ICWSM_2014/{training.LEXICON}"] = (
        b"good\t1.9\t0.9\t[2, 1]\nbad\t-2.5\t0.7\t[-3]\n"
    )
    data = tmp_path / "vader.tar.gz"
    data.write_bytes(packed({training.INSIDE: packed(files)}))
    sentences, words = training.read(data)
    assert [(each.text, each.label) for each in sentences] == [
        ("A fine & quiet film.", 1),
        ("It broke.", 0),
        ("He agreed.", 1),
        ("Oh no", 0),
    ]
    assert [(each.text, each.label) for each in words] == [("good", 1), ("bad", 0)]


def test_some_words_of_a_drawn_sentence_are_left_out(training):
    rng = random.Random(0)
    long = training.Rated("one two three four five six seven eight nine ten", 1)
    drawn = [training.draw(rng, [long], [training.Rated("good", 1)]) for _ in range(2000)]
    words = sum(each.text == "good" for each in drawn) / len(drawn)
    assert abs(words - training.WORDS) < 0.03
    kept = [len(each.text.split()) for each in drawn if each.text != "good"]
    assert abs(sum(kept) / len(kept) - 10 * (1 - training.DROPPED)) < 0.1
    assert all(each.label == 1 and each.text for each in drawn)


def test_the_stored_model_tells_clear_sentences_apart():
    folder = FOLDER / "bert"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        "A wonderful film with a great cast.",
        "I love this camera, it works perfectly.",
        "A boring and stupid film.",
        "It broke after two days, what a terrible product.",
    ]
    with torch.no_grad():
        found = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert [model.config.id2label[index] for index in found.argmax(1).tolist()] == [
        "positive", "positive", "negative", "negative",
    ]  # fmt: skip
    assert found.softmax(1).max(1).values.min() > 0.8
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["correct"] > report["always_the_same_answer"] + 0.2
