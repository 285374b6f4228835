"""Dual encoders by name, with their own preprocessing and tokens: the shipped CLIP, and Hugging
Face's (CLIP, SigLIP, ...). Explaining a model of one's own needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_generic_attn import demo, hf
from captum_generic_attn.errors import UnavailableWeightsError
from captum_generic_attn.models.checkpoints import from_hugging_face, require_transformers
from captum_generic_attn.models.preprocessing import (
    ImageModel,
    preprocessing_of,
    shipped_preprocessing,
)


@dataclass(frozen=True, eq=False)
class Texts:
    """Tokenised texts, as a dual encoder takes them.

    Attributes:
        encoding: keyword arguments of the model, `input_ids` `[T, N]` among them.
        words: of each text, its words, each of one or several pieces. Tokens that stand for no word
            (start, end, padding) are in none.
    """

    encoding: Mapping[str, Tensor]
    words: tuple[hf.Words, ...]

    def __len__(self) -> int:
        return len(self.words)


class Scores(NamedTuple):
    """Similarity and logit of an image and each of T texts, both `[T]`."""

    cosines: Tensor
    logits: Tensor


@dataclass(frozen=True)
class DualEncoder(ImageModel):
    """A model that compares images with texts.

    Attributes:
        model: takes `pixel_values` `[B, 3, H, W]` and what `encode` makes of T texts; returns an
            output with `logits_per_image` `[B, T]`, `image_embeds` `[B, D]` and `text_embeds`
            `[T, D]`.
        encode: texts to what the model takes. Raises `ValueError` for texts that it cannot take.
        multi_label: whether each text is judged by itself (sigmoid, as in SigLIP) instead of
            against the others (softmax).
    """

    encode: Callable[[Sequence[str]], Texts]
    multi_label: bool = False

    @torch.no_grad()
    def scores(self, pixels: Tensor, texts: Texts) -> Scores:
        """Cosine similarity and logit of an image `[3, H, W]` and each text.

        Raises:
            ValueError: the model returns no such logits and embeddings.

        Example:
            >>> from captum_generic_attn import demo
            >>> from captum_generic_attn.models.dual_encoders import load_dual_encoder
            >>> garments = load_dual_encoder("garments-clip")
            >>> pixels = garments.preprocess(demo.canvases()[0].image())
            >>> scores = garments.scores(pixels, garments.encode(["a bag", "a dress"]))
            >>> torch.allclose(scores.logits, scores.cosines * garments.model.logit_scale.exp())
            True
        """
        output = self.model(pixel_values=pixels[None], **texts.encoding)
        needed = "logits_per_image", "image_embeds", "text_embeds"
        if missing := [name for name in needed if output.get(name) is None]:
            raise ValueError(
                f"it returns no {', '.join(missing)}, but {', '.join(output)}: a dual encoder is "
                "needed"
            )
        embeddings = output.image_embeds, output.text_embeds
        if any(embedding.ndim != 2 for embedding in embeddings):
            shapes = " and ".join(str(tuple(embedding.shape)) for embedding in embeddings)
            raise ValueError(
                f"it returns embeddings {shapes}: one vector for the image and one for each text "
                "is needed"
            )
        cosines = F.cosine_similarity(*embeddings)
        return Scores(cosines, output.logits_per_image[0])

    def pairs(
        self, pixels: Tensor, texts: Texts
    ) -> tuple[hf.Keywords, tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        """The explained score: the logit of the image `[3, H, W]` and each text.

        Returns:
            `forward, (pixels, ids), rest` for `GenericAttention(forward).attribute(inputs, None,
            rest)`: `[T, 3, H, W]`, the image once for each text, and `[T, N]`.
        """
        encoding = {"pixel_values": pixels.repeat(len(texts), 1, 1, 1), **texts.encoding}
        forward, inputs, rest = hf.unpack(
            hf.pairs(self.model), encoding, ("pixel_values", "input_ids")
        )
        return forward, (inputs[0], inputs[1]), rest


def load_dual_encoder(name: str) -> DualEncoder:
    """The dual encoder of that name, on the CPU, float32, in evaluation mode.

    Args:
        name: `garments-clip` for the shipped one; the id of a Hugging Face model (`owner/model`)
            that classifies images zero-shot, or a folder that holds one.

    Raises:
        UnavailableWeightsError: there is none, it was never trained, or it comes without an image
            processor or a tokenizer.
        ImportError: transformers is not installed.

    Example:
        >>> from captum_generic_attn.models.dual_encoders import load_dual_encoder
        >>> texts = load_dual_encoder("garments-clip").encode(["a bag and a boot"])
        >>> [piece.text for word in texts.words[0] for piece in word]
        ['a', 'bag', 'and', 'a', 'boot']
    """
    if name == demo.CLIP:
        require_transformers("the shipped CLIP")
        return DualEncoder(
            "the shipped CLIP", demo.load_clip(), *shipped_preprocessing(), _shipped_texts
        )
    model, processor, what = from_hugging_face(
        name, "dual encoder", "AutoModelForZeroShotImageClassification",
        "processor", "AutoProcessor",
    )  # fmt: skip
    parts = [getattr(processor, part, None) for part in ("image_processor", "tokenizer")]
    if None in parts:
        raise UnavailableWeightsError(
            f"{what} has a {type(processor).__name__} in place of a processor that holds an image "
            "processor and a tokenizer: save both beside the model"
        )
    image_processor, tokenizer = parts

    def encode(texts: Sequence[str]) -> Texts:
        return _encoded(model, tokenizer, texts)

    alone = "siglip" in model.config.model_type
    return DualEncoder(name, model, *preprocessing_of(image_processor), encode, alone)


def _shipped_texts(texts: Sequence[str]) -> Texts:
    # Each word is a token; the first one is behind the mark of the start.
    words = [
        tuple((hf.Piece(word, (place,)),) for place, word in enumerate(text.split(), 1))
        for text in texts
    ]
    return Texts({"input_ids": demo.tokenize(texts)}, tuple(words))


def _encoded(model: Any, tokenizer: Any, texts: Sequence[str]) -> Texts:
    limit = tokenizer.model_max_length
    text_config = getattr(model.config, "text_config", None)
    longest = min(limit, getattr(text_config, "max_position_embeddings", limit))
    padding: dict[str, Any] = {"padding": True}
    if "siglip" in model.config.model_type:
        # Trained on texts filled up to this, without a mask: as transformers' pipeline has it.
        padding = {"padding": "max_length", "max_length": min(64, longest)}
    encoding = tokenizer(list(texts), return_tensors="pt", **padding)
    ids = encoding["input_ids"]
    if ids.shape[1] > longest:
        raise ValueError(
            f"the longest text has {ids.shape[1]} tokens, and the model takes {longest}: give a "
            "shorter one"
        )
    words = tuple(hf.words(tokenizer, row) for row in ids.tolist())
    for text, found in zip(texts, words, strict=True):
        if not found:
            raise ValueError(f"{text!r} has no words")
    return Texts(dict(encoding), words)
