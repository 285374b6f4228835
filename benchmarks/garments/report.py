"""Measures the demo model: does it name the garments, and do its explanations point at them?

Called by `train_vit.py` at the end of training; alone, `python benchmarks/garments/report.py
--data DIR` measures the shipped weights again. Writes `report.json`. Everything is measured on
canvases of Fashion-MNIST's test split, with the float16-rounded weights that the package ships.

Every class on a canvas is explained, and the explanation should be highest at a garment of its
class. Both ways to ask that are reported, each beside its own chance level:

- pixel: the token map is interpolated bilinearly to 64 × 64 pixels; the highest pixel lies in the
  garment's box. The box may miss by a hair a token that holds the garment's edge.
- token: the highest token's 8 × 8 pixels reach into the garment's box.

Where several share the maximum, the score is the share of them that are right: a constant map
scores what chance scores.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import typer
from canvases import DEBIAN_FOLDER, TEST_SEED, Drawn, Floats, draw, load_split, right_places
from PIL import Image
from safetensors import safe_open
from scipy.stats import bootstrap
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d
from tqdm import tqdm

from captum_generic_attn import GenericAttention, demo

HERE = Path(__file__).resolve().parent
WEIGHTS = Path(demo.__file__).parent / "vit.safetensors"
NAMED, EXPLAINED = 2000, 500
CHUNK = 50

TokenMaps = Callable[[Tensor, Tensor], Tensor]
"""Of pictures [N, 3, 64, 64] and classes [N]: [N, 8, 8], or of a finer grid."""


def pictures_of(drawn: Drawn) -> Tensor:
    """The canvases as the model takes them: [B, 3, 64, 64]."""
    return torch.stack([demo.preprocess(Image.fromarray(picture)) for picture in drawn.pictures])


@torch.no_grad()
def average_precisions(model: nn.Module, drawn: Drawn) -> Floats:
    """Average precision of each class over the canvases: [7]."""
    logits = torch.cat([model(chunk) for chunk in pictures_of(drawn).split(CHUNK)])
    precisions: Floats = average_precision_score(drawn.labels, logits.numpy(), average=None)
    return precisions


def raw_attention(model: nn.Module) -> TokenMaps:
    """The class token's row of the last layer's attention, mean over the heads. It is the same for
    every class.
    """
    attention = model.blocks[-1].attn
    attention.fused_attn = False
    kept: list[Tensor] = []
    attention.attn_drop.register_forward_hook(lambda _module, _inputs, output: kept.append(output))

    @torch.no_grad()
    def token_maps(pictures: Tensor, _classes: Tensor) -> Tensor:
        kept.clear()
        model(pictures)
        row = kept[0].mean(1)[:, 0, 1:]
        return row.unflatten(1, model.patch_embed.grid_size)

    return token_maps


def generic_attention(model: nn.Module, start_layer: int) -> TokenMaps:
    method = GenericAttention(model, start_layer=start_layer)
    return lambda pictures, classes: method.attribute(
        pictures, target=classes, return_input_shape=False
    )


def points(maps: Tensor, right: Tensor) -> Floats:
    """The share of each map's maxima that are right: both [N, height, width]."""
    highest = maps == maps.amax((1, 2), keepdim=True)
    shares: Floats = ((highest & right).sum((1, 2)) / highest.sum((1, 2))).double().numpy()
    return shares


def localisation(drawn: Drawn, token_maps: TokenMaps | None, grid: int = 8) -> dict[str, Floats]:
    """Per way to ask, the score of every class on every canvas [B, 7]; NaN where the class is not
    on the canvas. Without `token_maps`, chance: a place drawn blindly. `grid`: tokens along a side.
    """
    canvases, classes = torch.from_numpy(drawn.labels).nonzero().unbind(1)
    pixels = right_places(drawn)[canvases, classes]
    tokens = max_pool2d(pixels.float(), demo.SIZE // grid).bool()
    if token_maps is None:
        asked = {
            "pixel": pixels.double().mean((1, 2)).numpy(),
            "token": tokens.double().mean((1, 2)).numpy(),
        }
    else:
        pictures = pictures_of(drawn)
        maps = torch.cat(
            [
                token_maps(pictures[canvases[chunk]], classes[chunk])
                for chunk in tqdm(torch.arange(len(canvases)).split(CHUNK))
            ]
        )
        fine = interpolate(maps[:, None], pixels.shape[1:], mode="bilinear")[:, 0]
        asked = {"pixel": points(fine, pixels), "token": points(maps, tokens)}
    scores = {way: np.full(drawn.labels.shape, np.nan) for way in asked}
    for way, values in asked.items():
        scores[way][canvases, classes] = values
    return scores


def summary(scores: Floats) -> dict[str, object]:
    """Share of all explanations with its interval, and of each class."""
    held = ~np.isnan(scores)
    # Explanations of one canvas are not independent, so canvases are drawn again, not explanations.
    interval = bootstrap(
        (np.nansum(scores, 1), held.sum(1)),
        lambda hits, asked, axis: hits.sum(axis) / asked.sum(axis),
        paired=True,
        n_resamples=5000,
        method="percentile",
        rng=np.random.default_rng(TEST_SEED),
    ).confidence_interval
    by_class = {
        name: round(float(share), 4)
        for name, share in zip(demo.CLASSES, np.nanmean(scores, 0), strict=True)
    }
    return {
        "share": round(float(scores[held].mean()), 4),
        "interval": [round(float(end), 4) for end in interval],
        "by_class": by_class,
    }


def summaries(scores: dict[str, dict[str, Floats]]) -> dict[str, object]:
    """The summary of each method and each way to ask."""
    return {
        name: {way: summary(values) for way, values in ways.items()}
        for name, ways in scores.items()
    }


def about(model: nn.Module, weights: Path) -> dict[str, object]:
    """A trained model, and the file that holds its weights and how it was trained."""
    with safe_open(weights, framework="pt") as file:
        training = json.loads(file.metadata()["training"])
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": weights.stat().st_size,
        "stored_as": "float16",
        "training": training,
    }


def write_report(data: Path) -> None:
    """Measures the shipped weights and writes `report.json` beside this script."""
    split = load_split("test", data)
    model = demo.load_model()
    named, explained = draw(split, TEST_SEED, 0, NAMED), draw(split, TEST_SEED, 0, EXPLAINED)
    precisions = average_precisions(model, named)
    methods = {
        "generic_attention": generic_attention(model, 0),
        "generic_attention_last_layer_only": generic_attention(model, -1),
        "raw_attention_last_layer": raw_attention(demo.load_model()),
        "chance": None,
    }
    scores = {name: localisation(explained, of) for name, of in methods.items()}
    report = {
        "model": about(model, WEIGHTS),
        "average_precision": {
            "canvases": NAMED,
            "mean": round(float(precisions.mean()), 4),
            "by_class": {
                name: round(float(value), 4)
                for name, value in zip(demo.CLASSES, precisions, strict=True)
            },
        },
        "maximum_at_the_right_garment": {
            "canvases": EXPLAINED,
            "explanations": int(explained.labels.sum()),
            "explained": "every class on every canvas, whether or not the model names it",
            "interval": "95 %, percentile bootstrap over canvases, 5000 resamples",
            "pixel": "the highest pixel of the bilinear 64 × 64 map lies in the garment's box",
            "token": "the highest token's 8 × 8 pixels reach into the garment's box",
        }
        | summaries(scores),
        "canvas_seed": TEST_SEED,
        "python": platform.python_version(),
        "versions": {
            name: version(name)
            for name in ("captum-generic-attn", "torch", "timm", "numpy", "scikit-learn", "scipy")
        },
    }
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (HERE / "report.json").write_text(text, "utf-8")
    print(text)


def main(data: Path = DEBIAN_FOLDER, threads: int = 2) -> None:
    """Measure the demo model on canvases of the test split and write report.json."""
    torch.set_num_threads(threads)
    write_report(data)


if __name__ == "__main__":
    typer.run(main)
