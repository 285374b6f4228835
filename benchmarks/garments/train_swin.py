"""Trains a small Swin transformer on the garment canvases: a hierarchical model to point with.

Run by `make garments-swin`, or `python benchmarks/garments/train_swin.py --data DIR`; goes on from
its last checkpoint. The weights, rounded to float16, are in `swin.safetensors` beside this file
(they are no part of the package), and `report_swin.py` measures them.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from canvases import DEBIAN_FOLDER
from timm.models.swin_transformer import SwinTransformer
from train_vit import LIBRARIES, loss, notes
from training import Recipe, Settings, train_and_write

from captum_generic_attn.demo import CLASSES, SIZE

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "swin.safetensors"
CONFIG = {
    "img_size": SIZE,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 4, 1],
    "num_heads": [2, 4, 8],
    "window_size": 4,
    "mlp_ratio": 3.0,
    "num_classes": len(CLASSES),
}


def swin() -> tuple[torch.nn.Module, torch.nn.Module]:
    """An untrained model, and its layers: 16 × 16, 8 × 8, then 4 × 4 tokens."""
    model = SwinTransformer(**CONFIG)
    return model, model.layers


def main(
    data: Path = DEBIAN_FOLDER,
    runs: Path = HERE / "runs",
    weights: Path = WEIGHTS,
    seed: int = 0,
    steps: int = 6000,
    batch_size: int = 32,
    highest_rate: float = 2e-3,
) -> None:
    """Train the Swin transformer on garment canvases and write its weights."""
    recipe = Recipe(swin, loss, notes(CONFIG), LIBRARIES)
    settings = Settings(seed, steps, batch_size, highest_rate)
    train_and_write(recipe, data, runs / "swin.pt", weights, settings)


if __name__ == "__main__":
    typer.run(main)
