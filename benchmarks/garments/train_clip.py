"""Trains the small CLIP that the package ships, on canvases and their captions.

Run by `make garments-clip`, or `python benchmarks/garments/train_clip.py --data DIR`; goes on from
its last checkpoint. It is Hugging Face's `CLIPModel`, unmodified, in a tiny configuration. At the
end the weights, rounded to float16, are in `captum_generic_attn/demo/clip.safetensors`.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
import typer
from canvases import DEBIAN_FOLDER, Drawn, Split, draw, inputs
from captions import EVERY_MENTION, Caption, certain, describe, distort, possible, true_of
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus
from training import Recipe, Settings, train_and_write
from transformers import CLIPConfig, CLIPModel

from captum_generic_attn.demo import LONGEST, MEAN, SIZE, STD, VOCABULARY, tokenize
from captum_generic_attn.demo.models import END, PAD, START

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parents[1] / "captum_generic_attn" / "demo" / "clip.safetensors"
PATCH = 8
CONFIG = {
    "projection_dim": 64,
    "vision_config": {
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "text_config": {
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": LONGEST,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": VOCABULARY.index(PAD),
        "bos_token_id": VOCABULARY.index(START),
        "eos_token_id": VOCABULARY.index(END),
    },
}
WRONG = 3
"""So many wrong captions of its own does each canvas see in a step."""
MENTIONS = [str(Caption((mention,))) for mention in EVERY_MENTION]


@torch.no_grad()
def clip() -> tuple[torch.nn.Module, torch.nn.Module]:
    """An untrained model, and itself: its layers are all over it. The position embedding starts
    with waves along both axes, so that nearness need not be learnt first.
    """
    model = CLIPModel(CLIPConfig(**CONFIG))
    positions = model.vision_model.embeddings.position_embedding.weight
    side = SIZE // PATCH
    positions[1:] = build_sincos2d_pos_embed([side, side], positions.shape[1], temperature=100)
    return model, model


def loss(model: torch.nn.Module, split: Split, seed: int, start: int, count: int) -> Tensor:
    """Contrastive: each canvas is to find its caption among all of these and among wrong ones of
    its own, each caption its canvas, and each canvas every single mention that is true of it among
    those that are false. What is true by chance is no wrong choice.
    """
    drawn = draw(split, seed, start, count)
    captions = describe(drawn, seed, start)
    wrong = distort(captions, drawn, seed, start, WRONG)
    texts = [str(caption) for caption in [*captions, *chain.from_iterable(wrong)]]
    told = model(input_ids=tokenize(texts + MENTIONS), pixel_values=inputs(drawn))
    pictures = model.logit_scale.exp() * normalize(told.image_embeds, dim=1)
    said = normalize(told.text_embeds, dim=1)
    of_captions, of_wrong, of_mentions = said.split([count, len(texts) - count, len(MENTIONS)])
    by_chance = true_of(captions, drawn) & ~torch.eye(count, dtype=torch.bool)
    scores = (pictures @ of_captions.T).masked_fill(by_chance, -torch.inf)
    wrong_scores = pictures.new_full((count, WRONG), -torch.inf)
    owners = [(row, place) for row, found in enumerate(wrong) for place in range(len(found))]
    rows, places = torch.tensor(owners).T
    wrong_scores[rows, places] = (pictures[rows] * of_wrong).sum(1)
    own = torch.arange(count)
    by_canvas = cross_entropy(torch.cat([scores, wrong_scores], 1), own)
    by_caption = cross_entropy(scores.T, own)
    return (by_canvas + by_caption) / 2 + mentions_loss(pictures @ of_mentions.T, drawn)


def mentions_loss(scores: Tensor, drawn: Drawn) -> Tensor:
    """Of every true mention among the false ones, of `scores` [B, 35]."""
    true, held = (torch.from_numpy(known(drawn)).flatten(1) for known in (certain, possible))
    false = scores.masked_fill(held, -torch.inf).logsumexp(1, keepdim=True)
    return softplus(false - scores)[true].mean()


def main(
    data: Path = DEBIAN_FOLDER,
    runs: Path = HERE / "runs",
    weights: Path = WEIGHTS,
    seed: int = 0,
    steps: int = 6500,
    batch_size: int = 64,
    highest_rate: float = 2e-3,
) -> None:
    """Train CLIP on canvases and captions and write its weights."""
    notes = {"config": CONFIG, "vocabulary": VOCABULARY, "mean": MEAN, "std": STD}
    libraries = "torch", "transformers", "timm", "numpy", "safetensors"
    recipe = Recipe(clip, loss, notes, libraries)
    settings = Settings(seed, steps, batch_size, highest_rate)
    train_and_write(recipe, data, runs / "clip.pt", weights, settings)


if __name__ == "__main__":
    typer.run(main)
