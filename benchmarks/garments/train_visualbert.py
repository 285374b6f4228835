"""Trains a small VisualBERT to answer questions about garments: the paper's model of one stream.

Run by `make garments-visualbert`, or `python benchmarks/garments/train_visualbert.py --data DIR`;
goes on from its last checkpoint. It is Hugging Face's `VisualBertForQuestionAnswering`, unmodified,
in a tiny configuration, on the questions that LXMERT learns. The weights, rounded to float16, are
in `visualbert.safetensors` beside this file (they are no part of the package).
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from canvases import DEBIAN_FOLDER, SOURCE, Split
from questions import ANSWERS, LONGEST, VOCABULARY, Batch, ask, collate
from torch import Tensor
from torch.nn.functional import cross_entropy
from training import Recipe, Settings, train_and_write
from transformers import VisualBertConfig, VisualBertForQuestionAnswering

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "visualbert.safetensors"
BOX_SCALE = 8.0
"""VisualBERT has no input for boxes: they are four more features of a region, multiplied by this so
that 784 pixels do not drown them."""
CONFIG = {
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": LONGEST,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "visual_embedding_dim": SOURCE * SOURCE + 4,
    "num_labels": len(ANSWERS),
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def visualbert() -> tuple[torch.nn.Module, torch.nn.Module]:
    """An untrained model, and its layers."""
    model = VisualBertForQuestionAnswering(VisualBertConfig(**CONFIG))
    return model, model.visual_bert.encoder


def inputs(batch: Batch) -> dict[str, Tensor]:
    """Questions as VisualBERT takes them, by the names of its parameters."""
    return {
        "input_ids": batch.input_ids,
        "visual_embeds": torch.cat([batch.visual_feats, BOX_SCALE * batch.visual_pos], 2),
        "attention_mask": batch.attention_mask.long(),
        "visual_attention_mask": batch.visual_attention_mask,
    }


def loss(model: torch.nn.Module, split: Split, seed: int, start: int, count: int) -> Tensor:
    """Cross-entropy of the answers to `count` questions."""
    batch = collate(ask(split, seed, start, count), split)
    return cross_entropy(model(**inputs(batch)).logits, batch.answers)


def main(
    data: Path = DEBIAN_FOLDER,
    runs: Path = HERE / "runs",
    weights: Path = WEIGHTS,
    seed: int = 0,
    steps: int = 14000,
    batch_size: int = 64,
    highest_rate: float = 2e-3,
) -> None:
    """Train VisualBERT on questions about garments and write its weights."""
    notes = {
        "config": CONFIG, "vocabulary": VOCABULARY, "answers": ANSWERS, "box_scale": BOX_SCALE,
    }  # fmt: skip
    libraries = "torch", "transformers", "numpy", "safetensors"
    recipe = Recipe(visualbert, loss, notes, libraries)
    settings = Settings(seed, steps, batch_size, highest_rate)
    train_and_write(recipe, data, runs / "visualbert.pt", weights, settings)


if __name__ == "__main__":
    typer.run(main)
