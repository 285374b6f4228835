"""Trains the demo model that the package ships, and writes its report.

Run by `make garments`, or `python benchmarks/garments/train_vit.py --data DIR`. Stopped and started
again, it goes on from its last checkpoint. At the end the weights, rounded to float16, are in
`captum_generic_attn/demo/vit.safetensors` and every figure in `report.json` is of those rounded
weights.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import typer
from canvases import DEBIAN_FOLDER, Split, draw, load_split
from muon import Muon
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

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
CHECKPOINT_EVERY = 250
WATCHED = 5000
"""So many garments at the end of the training split are not trained on, but watched."""


def batch(split: Split, seed: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Canvases as the model takes them: pictures [B, 3, 64, 64], labels [B, 7]."""
    drawn = draw(split, seed, start, count)
    pixels = torch.from_numpy(drawn.pictures).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN) / STD, torch.from_numpy(drawn.labels)


@torch.no_grad()
def start_with_places(model: VisionTransformer) -> None:
    """Starts the position embedding with waves along both axes, so that nearness need not be learnt
    first. It is trained like any other parameter.
    """
    waves = build_sincos2d_pos_embed(
        list(model.patch_embed.grid_size), model.embed_dim, temperature=100
    )
    model.pos_embed[0, model.num_prefix_tokens :] = waves


def optimizers_of(
    model: torch.nn.Module, layers: torch.nn.Module, highest: float
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, by their shapes; AdamW for all other parameters."""
    shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
    for module in layers.modules():
        if isinstance(module, torch.nn.Linear):
            shapes.setdefault(module.weight.shape, []).append(module.weight)
    matrices = {id(matrix) for group in shapes.values() for matrix in group}
    others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return (
        Muon([{"params": group} for group in shapes.values()], lr=highest, weight_decay=0.05),
        torch.optim.AdamW(others, lr=highest, weight_decay=0.05),
    )


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up over the first 5 %, then half a cosine down to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return highest * (step + 1) / warm_up
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """A checkpoint that is either the old one or the new one, wherever the run is cut off."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    unfinished.replace(path)


@torch.no_grad()
def watched_loss(model: torch.nn.Module, split: Split, seed: int) -> float:
    model.eval()
    pictures, labels = batch(split, seed + 1, 0, 256)
    loss = binary_cross_entropy_with_logits(model(pictures), labels).item()
    model.train()
    return loss


def set_gradients(
    model: torch.nn.Module, split: Split, seed: int, start: int, count: int, workers: Executor
) -> torch.Tensor:
    """Draws a batch, sets the gradients of its loss, half a batch per core, and returns the loss.

    Operations on batches this small gain next to nothing from threads of their own.
    """
    parameters = list(model.parameters())
    half = count // 2

    def of_half(start: int, count: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        pictures, labels = batch(split, seed, start, count)
        loss = binary_cross_entropy_with_logits(model(pictures), labels)
        return loss.detach(), torch.autograd.grad(loss, parameters)

    losses, gradients = zip(
        *workers.map(of_half, (start, start + half), (half, count - half)), strict=True
    )
    shares = torch.tensor([half / count, 1 - half / count])
    for parameter, *halves in zip(parameters, *gradients, strict=True):
        parameter.grad = torch.tensordot(shares, torch.stack(halves), 1)
    return shares @ torch.stack(losses)


def plain_vit() -> tuple[torch.nn.Module, torch.nn.Module]:
    """An untrained model, and its layers."""
    model = VisionTransformer(**CONFIG)
    start_with_places(model)
    return model, model.blocks


def train(
    split: Split, checkpoint: Path, seed: int, steps: int, batch_size: int, highest: float,
    build: Callable[[], tuple[torch.nn.Module, torch.nn.Module]] = plain_vit,
) -> tuple[torch.nn.Module, dict[str, Any]]:  # fmt: skip
    """Returns the trained model and how it was trained; goes on from `checkpoint` if it exists."""
    settings = {"seed": seed, "steps": steps, "batch_size": batch_size, "learning_rate": highest}
    torch.manual_seed(seed)
    model, layers = build()
    optimizers = optimizers_of(model, layers, highest)
    done, seconds, core_seconds = 0, 0.0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{checkpoint} belongs to a run with {state['settings']}, this one has {settings}; "
                f"delete it or give another folder with --runs"
            )
        model.load_state_dict(state["model"])
        for optimizer, held in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        done, seconds, core_seconds = state["done"], state["seconds"], state["core_seconds"]

    learnt, watched = split.part(0, -WATCHED), split.part(-WATCHED, len(split.images))
    # Held for whoever reads the log: the figures of the report come from the test split alone.
    loss_of_watched = math.nan
    started, core_started = time.perf_counter(), time.process_time()
    progress = tqdm(range(done, steps), initial=done, total=steps, unit="step", mininterval=5)
    with ThreadPoolExecutor(2) as workers:
        for step in progress:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, highest)
            loss = set_gradients(model, learnt, seed, step * batch_size, batch_size, workers)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
                loss_of_watched = watched_loss(model, watched, seed)
                write_atomically(
                    checkpoint,
                    {
                        "settings": settings,
                        "model": model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "done": step + 1,
                        "seconds": seconds + time.perf_counter() - started,
                        "core_seconds": core_seconds + time.process_time() - core_started,
                    },
                )
            progress.set_postfix(
                loss=f"{loss.item():.3f}", watched=f"{loss_of_watched:.3f}", refresh=False
            )
    seconds += time.perf_counter() - started
    core_seconds += time.process_time() - core_started
    return model.eval(), settings | {
        "canvases": steps * batch_size,
        "seconds": round(seconds),
        "core_seconds": round(core_seconds),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "timm", "numpy", "safetensors")},
    }


def write_weights(
    model: torch.nn.Module, training: dict[str, Any], path: Path, config: dict[str, Any]
) -> None:
    """Writes the float16 weights and, as metadata, all that is needed to use them."""
    tensors = {
        name: tensor.half().contiguous().clone() for name, tensor in model.state_dict().items()
    }
    notes = {
        "config": config,
        "classes": CLASSES,
        "mean": MEAN,
        "std": STD,
        "training": training,
    }
    save_file(tensors, path, {name: json.dumps(note) for name, note in notes.items()})
    # The writer leaves a file that only its owner may read, and this one goes into a wheel.
    path.chmod(0o644)


def train_and_write(
    data: Path, checkpoint: Path, weights: Path, settings: tuple[int, int, int, float],
    build: Callable[[], tuple[torch.nn.Module, torch.nn.Module]], config: dict[str, Any],
) -> None:  # fmt: skip
    """Trains on the canvases of the training split, and writes the weights."""
    # Each half of a batch has a core; threads within an operation would only fight over them.
    torch.set_num_threads(1)
    split = load_split("train", data)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    model, training = train(split, checkpoint, *settings, build)
    write_weights(model, training, weights, config)
    print(f"{weights}: {weights.stat().st_size} bytes")


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
    settings = seed, steps, batch_size, highest_rate
    train_and_write(data, runs / "vit.pt", weights, settings, plain_vit, CONFIG)
    if weights.resolve() == WEIGHTS:
        # Only now do the shipped weights exist in a first run.
        from report import write_report

        write_report(data)


if __name__ == "__main__":
    typer.run(main)
