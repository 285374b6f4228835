"""Trains the small DETR that the package ships, to find the garments on canvases.

Run by `make garments-detr`, or `python benchmarks/garments/train_detr.py --data DIR`; goes on from
its last checkpoint. It is Hugging Face's `DetrForObjectDetection`, unmodified and with its own
loss, in a tiny configuration over one stage of a ConvNeXt, which unlike DETR's usual ResNet needs
no statistics of an earlier training. At the end the weights, rounded to float16, are in
`captum_generic_attn/demo/detr.safetensors`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from canvases import DEBIAN_FOLDER, Drawn, Split, draw, inputs
from torch import Tensor
from training import Recipe, Settings, train_and_write
from transformers import DetrConfig, DetrForObjectDetection

from captum_generic_attn.demo import CLASSES, MEAN, SIZE, STD

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parents[1] / "captum_generic_attn" / "demo" / "detr.safetensors"
CONFIG = {
    "backbone_config": {
        "model_type": "convnext",
        "num_stages": 1,
        "depths": [2],
        "hidden_sizes": [64],
        "layer_scale_init_value": 1.0,
        "out_features": ["stage1"],
    },
    "d_model": 64,
    "encoder_layers": 3,
    "encoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_layers": 3,
    "decoder_ffn_dim": 128,
    "decoder_attention_heads": 4,
    "num_queries": 10,
    "num_labels": len(CLASSES),
    "dropout": 0.0,
    "eos_coefficient": 0.4,
    "auxiliary_loss": True,
}


def detr() -> tuple[torch.nn.Module, torch.nn.Module]:
    """An untrained model, and its layers."""
    model = DetrForObjectDetection(DetrConfig(**CONFIG))
    return model, model.model


def labels(drawn: Drawn) -> list[dict[str, Tensor]]:
    """What DETR's loss takes: each canvas' classes, and boxes as (centre, size) in 0 … 1."""
    boxes = torch.from_numpy(drawn.boxes).float() / SIZE
    start, stop = boxes[..., :2], boxes[..., 2:]
    boxes = torch.cat([(start + stop) / 2, stop - start], -1)
    classes = torch.from_numpy(drawn.classes)
    return [
        {"class_labels": kinds[kinds >= 0], "boxes": place[kinds >= 0]}
        for kinds, place in zip(classes, boxes, strict=True)
    ]


def loss(model: torch.nn.Module, split: Split, seed: int, start: int, count: int) -> Tensor:
    """DETR's own: classes and boxes of the queries that the garments are matched to."""
    drawn = draw(split, seed, start, count)
    found: Tensor = model(pixel_values=inputs(drawn), labels=labels(drawn)).loss
    return found


def main(
    data: Path = DEBIAN_FOLDER,
    runs: Path = HERE / "runs",
    weights: Path = WEIGHTS,
    seed: int = 0,
    steps: int = 5500,
    batch_size: int = 32,
    highest_rate: float = 2e-3,
) -> None:
    """Train DETR on canvases and write its weights."""
    notes = {"config": CONFIG, "classes": CLASSES, "mean": MEAN, "std": STD}
    libraries = "torch", "transformers", "numpy", "scipy", "safetensors"
    recipe = Recipe(detr, loss, notes, libraries)
    settings = Settings(seed, steps, batch_size, highest_rate)
    train_and_write(recipe, data, runs / "detr.pt", weights, settings)


if __name__ == "__main__":
    typer.run(main)
