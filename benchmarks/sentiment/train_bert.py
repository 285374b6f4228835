"""Trains a small BERT to tell whether a sentence is positive or negative: the text model of the
tutorials, in `bert/` beside this file, a folder as `save_pretrained` writes it (float16; no part of
the package).

Run by `make sentiment`, some fifteen minutes of one core. Its data are real sentences (film and
product reviews, editorials, tweets), each with the mean of what people rated it, from −4 to 4, and
words rated likewise. They are not stored here:

    pip download --no-deps --no-binary :all: -d ~/.cache/captum-generic-attn vaderSentiment==3.2.1

brings them, as a source distribution of 2.5 MB, which is read as it is (C.J. Hutto, E. Gilbert:
*VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text*, ICWSM 2014;
MIT).
"""

from __future__ import annotations

import html
import io
import json
import math
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
MODEL = HERE / "bert"
DATA = Path.home() / ".cache" / "captum-generic-attn" / "vaderSentiment-3.2.1.tar.gz"
INSIDE = "vaderSentiment-3.2.1/additional_resources/hutto_ICWSM_2014.tar.gz"
KINDS = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")
LEXICON = "vader_sentiment_lexicon.txt"

CLASSES = ("negative", "positive")
CLEAR = 0.5
"""A sentence whose mean rating is nearer to 0 is neither."""
TESTED = 2000
"""So many sentences are not trained on."""
WORDS = 0.25
"""So large a share of what is trained on are single words of the lexicon."""
DROPPED = 0.1
"""So many words of a sentence are left out, others each time."""
SEED, STEPS, BATCH, RATE = 0, 1500, 64, 1e-3
VOCABULARY = 5000
LONGEST = 64
PAD, UNKNOWN, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.3,
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": 0.3,
}


@dataclass(frozen=True)
class Rated:
    """A sentence and whether people found it positive (1) or negative (0)."""

    text: str
    label: int


def read(data: Path) -> tuple[list[Rated], list[Rated]]:
    """The rated sentences and words of the source distribution."""
    with tarfile.open(data) as outer:
        held = outer.extractfile(INSIDE)
        assert held is not None
        with tarfile.open(fileobj=io.BytesIO(held.read())) as inner:

            def lines(name: str) -> list[list[str]]:
                file = inner.extractfile(f"hutto_ICWSM_2014/{name}")
                assert file is not None
                text = file.read().decode("utf-8", "replace")
                return [line.split("\t") for line in text.split("\n") if line.strip()]

            sentences = [
                (text, float(rating))
                for kind in KINDS
                for _, rating, text in lines(f"{kind}_GroundTruth.txt")
            ]
            words = [(row[0], float(row[1])) for row in lines(LEXICON)]
    return [_rated(*s) for s in sentences if abs(s[1]) >= CLEAR], [_rated(*w) for w in words]


def _rated(text: str, rating: float) -> Rated:
    return Rated(" ".join(html.unescape(text).split()), int(rating > 0))


def trained_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """WordPiece on these texts, lower case."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, UNKNOWN, CLS, SEP], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", special_tokens=marks
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=LONGEST,
        pad_token=PAD, unk_token=UNKNOWN, cls_token=CLS, sep_token=SEP,
    )  # fmt: skip


def batch_of(tokenizer: PreTrainedTokenizerFast, rated: Sequence[Rated]) -> dict[str, Tensor]:
    """What the model takes."""
    texts = [each.text for each in rated]
    encoded = tokenizer(
        texts, truncation=True, padding=True, return_tensors="pt", return_token_type_ids=False
    )
    return dict(encoded)


def correct(model: nn.Module, tokenizer: PreTrainedTokenizerFast, rated: Sequence[Rated]) -> float:
    """The share of these sentences that the model is right about."""
    model.eval()
    with torch.inference_mode():
        found = [
            model(**batch_of(tokenizer, rated[start : start + 100])).logits.argmax(1)
            for start in range(0, len(rated), 100)
        ]
    model.train()
    labels = torch.tensor([each.label for each in rated])
    return (torch.cat(found) == labels).float().mean().item()


def draw(rng: random.Random, sentences: Sequence[Rated], words: Sequence[Rated]) -> Rated:
    """A sentence without some of its words, or a rated word."""
    drawn = rng.choice(words if rng.random() < WORDS else sentences)
    left = [word for word in drawn.text.split() if rng.random() >= DROPPED]
    return Rated(" ".join(left) or drawn.text, drawn.label)


def train(
    tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Rated], words: Sequence[Rated]
) -> BertForSequenceClassification:
    """The trained model: AdamW, a linear warm-up and half a cosine down to zero."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LONGEST,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
        **SHAPE,
    )
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    for step in tqdm(range(STEPS), unit="step", mininterval=5):
        rate = RATE * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rated = [draw(rng, sentences, words) for _ in range(BATCH)]
        labels = torch.tensor([each.label for each in rated])
        logits = model(**batch_of(tokenizer, rated)).logits
        loss = cross_entropy(logits, labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def main(data: Path = DATA, model: Path = MODEL) -> None:
    """Train the model and write it with its tokenizer, and how often it is right."""
    torch.set_num_threads(1)
    sentences, words = read(data)
    random.Random(SEED).shuffle(sentences)
    tested, learnt = sentences[:TESTED], sentences[TESTED:]
    tokenizer = trained_tokenizer([each.text for each in (*learnt, *words)])
    trained = train(tokenizer, learnt, words).half()
    trained.save_pretrained(model)
    tokenizer.save_pretrained(model)
    (model / "model.safetensors").chmod(0o644)  # the writer lets only its owner read it
    share = correct(trained.float(), tokenizer, tested)
    majority = max(sum(each.label == label for each in tested) for label in (0, 1)) / TESTED
    report = {
        "sentences": len(learnt),
        "words": len(words),
        "tested": TESTED,
        "correct": round(share, 4),
        "always_the_same_answer": majority,
        "parameters": sum(parameter.numel() for parameter in trained.parameters()),
    }
    (model / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
