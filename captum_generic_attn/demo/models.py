"""The shipped models, each as its library has it, with weights trained on canvases."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from captum_generic_attn.demo.images import FOLDER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor, nn


VIT, CLIP, DETR = "garments-vit", "garments-clip", "garments-detr"
"""Names of the shipped models, by which `captum_generic_attn.models` loads them."""

PAD, START, END = "[PAD]", "[START]", "[END]"
_WORDS = (
    *("a", "and", "in", "the", "upper", "lower", "left", "right"),
    *("top", "trouser", "dress", "sandal", "sneaker", "bag", "boot"),
)
# CLIP reads a text at [END]; were its id 2, transformers would read it at the highest id instead.
VOCABULARY: tuple[str, ...] = (PAD, START, *_WORDS, END)
"""What the shipped CLIP knows, in the order of token ids: words, and marks round a caption."""

LONGEST = 29
"""No caption may have more tokens, `START` and `END` included."""


def load_model() -> nn.Module:
    """The trained model: timm's `VisionTransformer` (64 × 64 pixels, patches of 8, width 96, 4
    layers, class token), as timm has it, float32, in evaluation mode.

    Takes images `[B, 3, 64, 64]` from `preprocess`; returns logits `[B, 7]`, one per entry of
    `CLASSES`. Each says by itself whether its class is on the image (`sigmoid`, not `softmax`).

    Raises:
        ImportError: timm is not installed.

    Example:
        >>> import torch
        >>> from captum_generic_attn import demo
        >>> canvas = demo.canvases()[0]
        >>> with torch.no_grad():
        ...     logits = demo.load_model()(demo.preprocess(canvas.image())[None])
        >>> logits.shape
        torch.Size([1, 7])
    """
    from timm.models.vision_transformer import VisionTransformer

    notes, weights = read_weights(FOLDER / "vit.safetensors")
    return filled(VisionTransformer(**notes["config"]), weights)


def load_clip() -> nn.Module:
    """The trained dual encoder: Hugging Face's `CLIPModel` (64 × 64 pixels, patches of 8, width 96
    and 4 layers for images, width 64 and 2 layers for text), float32, in evaluation mode.

    Takes `pixel_values` `[B, 3, 64, 64]` from `preprocess` and `input_ids` `[T, N]` from
    `tokenize`; `logits_per_image` `[B, T]` of what it returns are cosine similarities times
    `logit_scale.exp()`.

    Raises:
        ImportError: transformers is not installed.

    Example:
        >>> import torch
        >>> from captum_generic_attn import demo
        >>> pixels = demo.preprocess(demo.canvases()[0].image())[None]
        >>> with torch.no_grad():
        ...     found = demo.load_clip()(pixel_values=pixels, input_ids=demo.tokenize(["a bag"]))
        >>> found.logits_per_image.shape
        torch.Size([1, 1])
    """
    from transformers import CLIPConfig, CLIPModel

    notes, weights = read_weights(FOLDER / "clip.safetensors")
    return filled(CLIPModel(CLIPConfig(**notes["config"])), weights)


def tokenize(texts: Sequence[str]) -> Tensor:
    """Captions as the shipped CLIP takes them: token ids `[B, N]`, each with `START` and `END` and
    filled up with `PAD` behind.

    The model was trained on such captions as "a bag and a boot in the upper left": garments, each
    once, and the quarter of the canvas that some lie in. Case does not matter.

    Raises:
        ValueError: a word is not in `VOCABULARY`, a caption is empty or longer than `LONGEST`, or
            there is none.

    Example:
        >>> from captum_generic_attn import demo
        >>> ids = demo.tokenize(["a bag and a boot", "a dress"])
        >>> [demo.VOCABULARY[index] for index in ids[1]]
        ['[START]', 'a', 'dress', '[END]', '[PAD]', '[PAD]', '[PAD]']
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"tokenize takes a sequence of captions, not {texts!r}")
    known = {word: index for index, word in enumerate(VOCABULARY)}
    sentences = [text.lower().split() for text in texts]
    for text, words in zip(texts, sentences, strict=True):
        if unknown := [word for word in words if word not in known]:
            listed = ", ".join(_WORDS)
            raise ValueError(
                f"the shipped CLIP does not know {', '.join(map(repr, unknown))} of {text!r}. "
                f"Its words are: {listed}"
            )
        if not 0 < len(words) <= LONGEST - 2:
            raise ValueError(
                f"{text!r} has {len(words)} words: the shipped CLIP takes 1 to {LONGEST - 2}"
            )
    longest = max(map(len, sentences)) + 2
    rows = [[START, *words, END] + [PAD] * (longest - 2 - len(words)) for words in sentences]
    return torch.tensor([[known[word] for word in row] for row in rows])


def load_detr() -> nn.Module:
    """The trained detector: Hugging Face's `DetrForObjectDetection` (one ConvNeXt stage of stride
    4, width 64, 3 encoder and 3 decoder layers, 10 object queries), float32, in evaluation mode.

    Takes `pixel_values` `[B, 3, 64, 64]` from `preprocess`; returns `logits` `[B, 10, 8]`, one per
    entry of `CLASSES` and, last, for no garment, and `pred_boxes` `[B, 10, 4]` (centre, width,
    height, in 0 … 1).

    Raises:
        ImportError: transformers is not installed, or older than 5.2.

    Example:
        >>> import torch
        >>> from captum_generic_attn import demo
        >>> with torch.no_grad():
        ...     found = demo.load_detr()(demo.preprocess(demo.canvases()[0].image())[None])
        >>> found.logits.shape, found.pred_boxes.shape
        (torch.Size([1, 10, 8]), torch.Size([1, 10, 4]))
    """
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 2):
        raise ImportError(
            "the shipped DETR needs transformers 5.2 or newer, this is "
            f"{transformers.__version__}: earlier ones call its layers otherwise"
        )
    notes, weights = read_weights(FOLDER / "detr.safetensors")
    config = transformers.DetrConfig(**notes["config"])
    return filled(transformers.DetrForObjectDetection(config), weights)


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All that a file of weights notes, its model's `config` among it, and the weights, float32."""
    with safe_open(path, framework="pt") as file:
        notes = {name: json.loads(note) for name, note in file.metadata().items()}
        weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    return notes, weights


def filled(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The model with these weights, in evaluation mode."""
    model.load_state_dict(weights)
    return model.eval()
