"""Trains a small model on Fashion-MNIST's training split; the scripts `train_*.py` say which model
and on what.

Stopped and started again, a training goes on from its last checkpoint and ends the same. The
weights are rounded to float16.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from canvases import Split, load_split
from muon import Muon
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

CHECKPOINT_EVERY = 250
WATCHED = 5000
"""So many garments at the end of the training split are not trained on, but watched."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on what.

    `build` returns an untrained model and the part of it whose matrices Muon trains; `loss` of a
    model, a split, a seed, the first example and their count is the loss of those examples, of
    which half a batch is given at a time;
    `notes` is written beside the weights, all that is needed to use them; `libraries` are those
    whose versions matter.
    """

    build: Callable[[], tuple[nn.Module, nn.Module]]
    loss: Callable[[nn.Module, Split, int, int, int], Tensor]
    notes: Mapping[str, object]
    libraries: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """How it is trained."""

    seed: int
    steps: int
    batch_size: int
    learning_rate: float


def optimizers_of(
    model: nn.Module, layers: nn.Module, highest: float
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, by their shapes; AdamW for all other parameters."""
    shapes: dict[torch.Size, list[nn.Parameter]] = {}
    for module in layers.modules():
        if isinstance(module, nn.Linear):
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
def watched_loss(recipe: Recipe, model: nn.Module, split: Split, seed: int) -> float:
    model.eval()
    loss = recipe.loss(model, split, seed + 1, 0, 256).item()
    model.train()
    return loss


def set_gradients(
    recipe: Recipe, model: nn.Module, split: Split, seed: int, start: int, count: int,
    workers: Executor,
) -> Tensor:  # fmt: skip
    """Draws a batch, sets the gradients of its loss, half a batch per core, and returns the loss.

    Operations on batches this small gain next to nothing from threads of their own.
    """
    parameters = list(model.parameters())
    half = count // 2

    def of_half(start: int, count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = recipe.loss(model, split, seed, start, count)
        # A model of a library may hold parameters that its answer does not need.
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return loss.detach(), found

    losses, gradients = zip(
        *workers.map(of_half, (start, start + half), (half, count - half)), strict=True
    )
    shares = torch.tensor([half / count, 1 - half / count])
    for parameter, *halves in zip(parameters, *gradients, strict=True):
        parameter.grad = torch.tensordot(shares, torch.stack(halves), 1)
    return shares @ torch.stack(losses)


def train(
    recipe: Recipe, split: Split, checkpoint: Path, settings: Settings
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the trained model and how it was trained; goes on from `checkpoint` if it exists."""
    torch.manual_seed(settings.seed)
    model, layers = recipe.build()
    model.train()
    optimizers = optimizers_of(model, layers, settings.learning_rate)
    done, seconds, core_seconds = 0, 0.0, 0.0
    notes = json.dumps(dict(recipe.notes))
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        for name, mine in (("settings", vars(settings)), ("notes", notes)):
            if state[name] != mine:
                raise ValueError(
                    f"{checkpoint} belongs to a run with {state[name]}, this one has {mine}; "
                    "delete it or give another folder with --runs"
                )
        model.load_state_dict(state["model"])
        for optimizer, held in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        done, seconds, core_seconds = state["done"], state["seconds"], state["core_seconds"]

    seed, steps, count = settings.seed, settings.steps, settings.batch_size
    learnt, watched = split.part(0, -WATCHED), split.part(-WATCHED, len(split.images))
    # Held for whoever reads the log: reported figures come from the test split alone.
    loss_of_watched = math.nan
    started, core_started = time.perf_counter(), time.process_time()
    progress = tqdm(range(done, steps), initial=done, total=steps, unit="step", mininterval=5)
    with ThreadPoolExecutor(2) as workers:
        for step in progress:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, settings.learning_rate)
            loss = set_gradients(recipe, model, learnt, seed, step * count, count, workers)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
                loss_of_watched = watched_loss(recipe, model, watched, seed)
                write_atomically(
                    checkpoint,
                    {
                        "settings": vars(settings),
                        "notes": notes,
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
    return model.eval(), vars(settings) | {
        "canvases": steps * count,
        "seconds": round(seconds),
        "core_seconds": round(core_seconds),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in recipe.libraries},
    }


def write_weights(
    recipe: Recipe, model: nn.Module, training: Mapping[str, object], path: Path
) -> None:
    """Writes the float16 weights and, as metadata, all that is needed to use them."""
    tensors = {
        name: tensor.half().contiguous().clone() for name, tensor in model.state_dict().items()
    }
    notes = {**recipe.notes, "training": training}
    save_file(tensors, path, {name: json.dumps(note) for name, note in notes.items()})
    # The writer leaves a file that only its owner may read, and one of them goes into a wheel.
    path.chmod(0o644)


def train_and_write(
    recipe: Recipe, data: Path, checkpoint: Path, weights: Path, settings: Settings
) -> None:
    """Trains on the training split in the folder `data`, and writes the weights."""
    # Each half of a batch has a core; threads within an operation would only fight over them.
    torch.set_num_threads(1)
    split = load_split("train", data)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    model, training = train(recipe, split, checkpoint, settings)
    write_weights(recipe, model, training, weights)
    print(f"{weights}: {weights.stat().st_size} bytes")
