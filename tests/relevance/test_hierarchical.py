"""The maps of a trained hierarchical model, which merges its tokens twice, point at what it names:
a Swin transformer and garments whose places are known. `benchmarks/garments/report_swin.json` has
the figures of 500 canvases; here they are measured again on the few that the package ships.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from captum_generic_attn import GenericAttention, demo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def garments():
    """The benchmark's modules, which are scripts beside the package."""
    for needed in ("scipy", "sklearn", "timm", "tqdm", "typer"):
        pytest.importorskip(needed)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks" / "garments")
        import canvases
        import report
        import report_swin

        yield SimpleNamespace(canvases=canvases, report=report, swin=report_swin)
        for name in ("canvases", "report", "report_swin"):
            sys.modules.pop(name)


@pytest.fixture(scope="module")
def model(garments):
    return garments.swin.load_swin()


def shipped(garments, count):
    """The first canvases of the package as the benchmark draws them."""
    pictures, labels = [], np.zeros((count, len(demo.CLASSES)), np.float32)
    classes, boxes = np.full((count, 4), -1), np.zeros((count, 4, 4), int)
    for i, canvas in enumerate(demo.canvases()[:count]):
        pictures.append(np.asarray(canvas.image()))
        for k, garment in enumerate(canvas.garments):
            classes[i, k] = demo.CLASSES.index(garment.name)
            labels[i, classes[i, k]] = 1
            boxes[i, k] = garment.box
    unread = np.zeros((count, 4, 64, 64), bool)
    return garments.canvases.Drawn(np.stack(pictures), labels, classes, boxes, unread)


def pointed(garments, model, drawn, start_layer=0):
    """Share of explanations whose highest token, and whose highest pixel, is at a right garment."""
    maps = garments.report.generic_attention(model, start_layer)
    scores = garments.report.localisation(drawn, maps, garments.swin.GRID)
    return {way: float(np.nanmean(values)) for way, values in scores.items()}


def chance(garments, drawn):
    scores = garments.report.localisation(drawn, None, garments.swin.GRID)
    return {way: float(np.nanmean(values)) for way, values in scores.items()}


def test_the_weights_name_the_garments(garments, model):
    drawn = shipped(garments, 24)
    with torch.no_grad():
        named = model(garments.report.pictures_of(drawn)) > 0
    assert (named.numpy() == (drawn.labels > 0)).mean() > 0.93


def test_the_weights_are_small_and_say_how_they_were_made(garments):
    from safetensors import safe_open

    assert garments.swin.WEIGHTS.stat().st_size <= 1_000_000
    with safe_open(garments.swin.WEIGHTS, framework="pt") as file:
        training = json.loads(file.metadata()["training"])
        config = json.loads(file.metadata()["config"])
    assert training["canvases"] == training["steps"] * training["batch_size"]
    report = json.loads((ROOT / "benchmarks/garments/report_swin.json").read_text("utf-8"))
    assert report["model"]["training"] == training
    assert report["model"]["bytes"] == garments.swin.WEIGHTS.stat().st_size
    assert config["img_size"] // config["patch_size"] == garments.swin.GRID


def test_every_stage_counts_and_every_second_layer_shifts(model):
    picture = demo.preprocess(demo.canvases()[0].image())[None]
    relevance = GenericAttention(model).relevance(picture, 0)
    (stream,) = relevance.streams.values()
    assert [part.stop - part.start for part in stream.parts.values()] == [256, 64, 16]
    assert [call.used for call in relevance.calls] == [True] * 7
    assert [call.query_tokens.shape for call in relevance.calls] == [
        *[(16, 16)] * 2, *[(4, 16)] * 4, (1, 16)
    ]  # fmt: skip
    windows = [{tuple(window) for window in call.query_tokens.tolist()} for call in relevance.calls]
    assert windows[0] != windows[1]
    assert windows[2] != windows[3]
    assert windows[2] == windows[4]


def test_a_map_has_the_finest_grid(model):
    picture = demo.preprocess(demo.canvases()[0].image())[None]
    token_map = GenericAttention(model).attribute(picture, 0, return_input_shape=False)
    assert token_map.shape == (1, 16, 16)
    by_blocks = token_map.unflatten(2, (4, 4)).unflatten(1, (4, 4)).movedim(3, 2).flatten(3)
    assert (by_blocks.std(-1) > 0.01 * token_map.max()).any(), "finer than the last stage's grid"


def test_maps_of_a_few_canvases_point_at_the_right_garments(garments, model):
    drawn = shipped(garments, 6)
    shares, blind = pointed(garments, model, drawn), chance(garments, drawn)
    assert drawn.labels.sum() >= 12
    for way, share in shares.items():
        assert share > 0.7 > 2 * blind[way], (way, shares, blind)


@pytest.mark.slow
def test_maps_of_all_shipped_canvases_point_at_the_right_garments(garments, model):
    """The report, on 500 canvases: tokens 0.97, pixels 0.94; chance 0.19 and 0.15."""
    drawn = shipped(garments, 24)
    shares, blind = pointed(garments, model, drawn), chance(garments, drawn)
    assert blind["token"] < 0.25
    assert blind["pixel"] < 0.25
    assert shares["token"] > 0.85
    assert shares["pixel"] > 0.8
    # All layers, not the last alone: it sees blocks of 16 × 16 pixels.
    last = pointed(garments, model, drawn, start_layer=-1)
    assert last["pixel"] < shares["pixel"]


@pytest.mark.slow
def test_the_figures_of_the_report_are_those_of_the_weights(garments, model):
    """The first canvases of the report's 500, where Fashion-MNIST is installed."""
    folder = garments.canvases.DEBIAN_FOLDER
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: needs Debian's package dataset-fashion-mnist")
    split = garments.canvases.load_split("test", folder)
    drawn = garments.canvases.draw(split, garments.canvases.TEST_SEED, 0, 100)
    report = json.loads((ROOT / "benchmarks/garments/report_swin.json").read_text("utf-8"))
    expected = report["maximum_at_the_right_garment"]["generic_attention"]
    for way, share in pointed(garments, model, drawn).items():
        # A fifth of the canvases: four standard errors of about 260 explanations.
        assert share == pytest.approx(expected[way]["share"], abs=0.06), way
