"""Trains the demo model that the package ships, and writes its report.

Run by `make garments`, or `python benchmarks/garments/train_vit.py --data DIR`; goes on from its
last checkpoint. At the end the weights, rounded to float16, are in
`captum_generic_attn/demo/vit.safetensors` and every figure in `report.json` is of those rounded
weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from canvases import DEBIAN_FOLDER, Split, draw, inputs
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import binary_cross_entropy_with_logits
from training import Recipe, Settings, train_and_write

from captum_generic_attn.demo import CLASSES, MEAN, SIZE, STD

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parents[1] / "captum_generic_attn" / "demo" / "vit.safetensors"
CONFIG = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 4,
    "num_classes": len(CLASSES),
}
LIBRARIES = ("torch", "timm", "numpy", "safetensors")


def batch(split: Split, seed: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Canvases as the model takes them: pictures [B, 3, 64, 64], labels [B, 7]."""
    drawn = draw(split, seed, start, count)
    return inputs(drawn), torch.from_numpy(drawn.labels)


@torch.no_grad()
def start_with_places(model: VisionTransformer) -> None:
    """Starts the position embedding with waves along both axes, so that nearness need not be learnt
    first. It is trained like any other parameter.
    """
    waves = build_sincos2d_pos_embed(
        list(model.patch_embed.grid_size), model.embed_dim, temperature=100
    )
    model.pos_embed[0, model.num_prefix_tokens :] = waves


def loss(model: torch.nn.Module, split: Split, seed: int, start: int, count: int) -> torch.Tensor:
    """Of the logits of every class on `count` canvases, each class by itself."""
    pictures, labels = batch(split, seed, start, count)
    return binary_cross_entropy_with_logits(model(pictures), labels)


def plain_vit() -> tuple[torch.nn.Module, torch.nn.Module]:
    """An untrained model, and its layers."""
    model = VisionTransformer(**CONFIG)
    start_with_places(model)
    return model, model.blocks


def notes(config: dict[str, object]) -> dict[str, object]:
    """What is needed to use a model that names the garments of a canvas."""
    return {"config": config, "classes": CLASSES, "mean": MEAN, "std": STD}


def main(
    data: Path = DEBIAN_FOLDER,
    runs: Path = HERE / "runs",
    weights: Path = WEIGHTS,
    seed: int = 0,
    steps: int = 8000,
    batch_size: int = 32,
    highest_rate: float = 2e-3,
) -> None:
    """Train the demo model on garment canvases, write its weights and, if they are the ones that
    the package ships, report.json.
    """
    recipe = Recipe(plain_vit, loss, notes(CONFIG), LIBRARIES)
    settings = Settings(seed, steps, batch_size, highest_rate)
    train_and_write(recipe, data, runs / "vit.pt", weights, settings)
    if weights.resolve() == WEIGHTS:
        # Only now do the shipped weights exist in a first run.
        from report import write_report

        write_report(data)


if __name__ == "__main__":
    typer.run(main)
