"""Trains a small LXMERT to answer questions about garments: the model of the paper's first table.

Run by `make garments-lxmert`, or `python benchmarks/garments/train_lxmert.py --data DIR`; goes on
from its last checkpoint. It is Hugging Face's `LxmertForQuestionAnswering`, unmodified, in a tiny
configuration. The weights, rounded to float16, are in `lxmert.safetensors` beside this file (they
are no part of the package).
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from canvases import DEBIAN_FOLDER, SOURCE, Split
from questions import ANSWERS, LONGEST, VOCABULARY, ask, collate
from torch.nn.functional import cross_entropy
from training import Recipe, Settings, train_and_write
from transformers import LxmertConfig, LxmertForQuestionAnswering

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "lxmert.safetensors"
CONFIG = {
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": LONGEST,
    "type_vocab_size": 1,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "l_layers": 2,
    "r_layers": 2,
    "x_layers": 3,
    "visual_feat_dim": SOURCE * SOURCE,
    "visual_pos_dim": 4,
    "num_qa_labels": len(ANSWERS),
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def lxmert() -> tuple[torch.nn.Module, torch.nn.Module]:
    """An untrained model, and its layers."""
    model = LxmertForQuestionAnswering(LxmertConfig(**CONFIG))
    return model, model.lxmert.encoder


def loss(model: torch.nn.Module, split: Split, seed: int, start: int, count: int) -> torch.Tensor:
    """Cross-entropy of the answers to `count` questions."""
    batch = collate(ask(split, seed, start, count), split)
    return cross_entropy(model(**batch.inputs()).question_answering_score, batch.answers)


def main(
    data: Path = DEBIAN_FOLDER,
    runs: Path = HERE / "runs",
    weights: Path = WEIGHTS,
    seed: int = 0,
    steps: int = 10500,
    batch_size: int = 64,
    highest_rate: float = 2e-3,
) -> None:
    """Train LXMERT on questions about garments and write its weights."""
    notes = {"config": CONFIG, "vocabulary": VOCABULARY, "answers": ANSWERS}
    libraries = "torch", "transformers", "numpy", "safetensors"
    recipe = Recipe(lxmert, loss, notes, libraries)
    settings = Settings(seed, steps, batch_size, highest_rate)
    train_and_write(recipe, data, runs / "lxmert.pt", weights, settings)


if __name__ == "__main__":
    typer.run(main)
