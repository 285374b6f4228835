"""Recordings in which it is known when each word is spoken: a speech synthesizer says the words one
by one, and they are joined with silence. Used by `report.py` and the tests.

Needs `espeak-ng` (Debian's package of that name, or https://github.com/espeak-ng/espeak-ng).
"""

from __future__ import annotations

import io
import shutil
import subprocess
import wave
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

RATE = 16000
LEAD, GAP = 0.5, 0.3
"""Seconds of silence before the first word, and after every word."""
QUIET = 0.01
"""What a word starts and ends with, as a share of full scale, is silence."""

# Written down for this benchmark. Plain words, each one token of Whisper's vocabulary or two.
SENTENCES = (
    "my brother bought a new bicycle yesterday",
    "she wrote a long letter to her sister",
    "we found seven silver coins under the table",
    "the garden is full of yellow flowers",
    "the train to london leaves this evening",
    "the doctor opened the window in the morning",
    "our teacher read a story about wild horses",
    "they built a small house near the river",
    "his father works in a hospital every night",
    "children love to play football after school",
    "the old captain told us about the storm",
    "please bring some water and fresh bread",
)


@dataclass(frozen=True)
class Recording:
    """`samples` float32 in −1 … 1 at 16 kHz; `words` and, of each, its (start, end) in seconds."""

    samples: NDArray[np.float32]
    words: tuple[str, ...]
    spans: tuple[tuple[float, float], ...]

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples) / RATE


def available() -> bool:
    """Whether the synthesizer is installed."""
    return shutil.which("espeak-ng") is not None


def say(word: str, voice: str = "en-us") -> NDArray[np.float32]:
    """One word in a voice of the synthesizer's, without the silence round it."""
    if not available():
        raise FileNotFoundError("espeak-ng is not installed; Debian has a package of that name")
    spoken = subprocess.run(  # noqa: S603 - words of our own
        ["espeak-ng", "-v", voice, "-s", "140", "--stdout", word],  # noqa: S607
        check=True,
        capture_output=True,
    ).stdout
    with wave.open(io.BytesIO(spoken)) as file:
        rate = file.getframerate()
        # The header of what goes to a pipe gives no length; the data are all that follows it.
        raw = np.frombuffer(spoken[44:], "<i2")
    samples = resample_poly(raw / 2**15, RATE, rate)
    (loud,) = np.nonzero(np.abs(samples) > QUIET)
    trimmed: NDArray[np.float32] = samples[loud[0] : loud[-1] + 1].astype(np.float32)
    return trimmed


def record(sentence: str, voice: str = "en-us") -> Recording:
    """The words of a sentence, one by one, in a voice of the synthesizer's."""
    words = tuple(sentence.split())
    pieces = [np.zeros(round(LEAD * RATE), np.float32)]
    silence, spans = np.zeros(round(GAP * RATE), np.float32), []
    place = len(pieces[0])
    for word in words:
        spoken = say(word, voice)
        spans.append((place / RATE, (place + len(spoken)) / RATE))
        pieces += [spoken, silence]
        place += len(spoken) + len(silence)
    return Recording(np.concatenate(pieces), words, tuple(spans))
