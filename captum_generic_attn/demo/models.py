"""The shipped models: unchanged classes of their libraries, with weights trained on canvases."""

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
"""The names of the shipped models, for `captum_generic_attn.models`."""

PAD, START, END = "[PAD]", "[START]", "[END]"
_WORDS = (
    *("a", "and", "in", "the", "upper", "lower", "left", "right"),
    *("top", "trouser", "dress", "sandal", "sneaker", "bag", "boot"),
)
# CLIP pools a text at [END]; if that had the id 2, transformers would pool at the highest id.
VOCABULARY: tuple[str, ...] = (PAD, START, *_WORDS, END)
"""The vocabulary of the shipped CLIP, in the order of token ids: words and special tokens."""

LONGEST = 29
"""The maximum number of tokens in a caption, including `START` and `END`."""


def load_model() -> nn.Module:
    """Load the vision transformer: timm's `VisionTransformer`, float32, in evaluation mode.

    It has images of 64 × 64 pixels, patches of 8 × 8, width 96, 4 layers, and a class token. It
    takes images `[B, 3, 64, 64]` from `preprocess`, and returns logits `[B, 7]`, one per entry of
    `CLASSES`. Each class is scored independently (`sigmoid`, not `softmax`).

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
    """Load the dual encoder: Hugging Face's `CLIPModel`, float32, in evaluation mode.

    It has images of 64 × 64 pixels, patches of 8 × 8, width 96 and 4 layers for images, and width
    64 and 2 layers for texts. It takes `pixel_values` `[B, 3, 64, 64]` from `preprocess` and
    `input_ids` `[T, N]` from `tokenize`. The `logits_per_image` `[B, T]` of its output are cosine
    similarities times `logit_scale.exp()`.

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
    """Tokenize captions for the shipped CLIP: ids `[B, N]` with `START` and `END`, right-padded by
    `PAD`.

    The model was trained on captions such as "a bag and a boot in the upper left": garments, each
    once, and the quarter of the canvas where some of them are. Case is ignored.

    Raises:
        ValueError: a word is not in `VOCABULARY`, a caption is empty or longer than `LONGEST`, or
            there is no caption.

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
    """Load the detector: Hugging Face's `DetrForObjectDetection`, float32, in evaluation mode.

    It has a ConvNeXt stage of stride 4, width 64, 3 encoder and 3 decoder layers, and 10 object
    queries. It takes `pixel_values` `[B, 3, 64, 64]` from `preprocess`, and returns `logits` `[B,
    10, 8]`, one per entry of `CLASSES` and a last one for "no object", and `pred_boxes` `[B, 10,
    4]` (centre, width, height, in 0 … 1).

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
            f"{transformers.__version__}: older releases have other names for its layers"
        )
    notes, weights = read_weights(FOLDER / "detr.safetensors")
    config = transformers.DetrConfig(**notes["config"])
    return filled(transformers.DetrForObjectDetection(config), weights)


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a weights file: its metadata, including the model's `config`, and the
    weights, float32.
    """
    with safe_open(path, framework="pt") as file:
        notes = {name: json.loads(note) for name, note in file.metadata().items()}
        weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    return notes, weights


def filled(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Load weights into a model, and set it to evaluation mode."""
    model.load_state_dict(weights)
    return model.eval()
