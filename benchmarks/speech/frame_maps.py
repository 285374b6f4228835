"""Maps of the sound for each word that Whisper writes, by every method that is compared.

Used by `report.py`, `benchmarks/evidence/speech.py` and the tests.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from recordings import RATE, Recording
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from whisper_tiny import END, NO_TIMESTAMPS, START

from captum_generic_attn import (
    AttentionGradCam,
    AttentionRollout,
    GenericAttention,
    GradientAttention,
    LrpRollout,
    PartialLrp,
    TransformerAttribution,
)
from captum_generic_attn.attribution import AttentionAttribution
from captum_generic_attn.metrics import RandomAttribution

LONGEST = 40
LEFT_OUT = {
    "lrp": "relevance of the sound itself has both signs, so that it has no share near a word",
    "generic_attention_with_lrp": "it takes seven times as long as without",
}
"""Methods of the package that are not compared, and why."""

FrameMaps = Callable[["Written"], Tensor]
"""Of a transcript: [words, frames]."""


@dataclass(frozen=True)
class Written:
    """What Whisper wrote of a recording.

    `features` [1, 80, 3000]; `heard` [1, 1500, 384], what the encoder makes of them; `ids` [1, n],
    the prompt and all tokens but the end; `words`: index of a spoken word, place of its first token
    in `ids`, and that token as text.
    """

    recording: Recording
    features: Tensor
    heard: Tensor
    ids: Tensor
    words: tuple[tuple[int, int, str], ...]


@torch.no_grad()
def write(
    model: WhisperForConditionalGeneration, tokenizer: Tokenizer, recording: Recording
) -> Written:
    """Greedy transcription, and which of its words are the spoken ones."""
    features = WhisperFeatureExtractor()(
        recording.samples, sampling_rate=RATE, return_tensors="pt"
    ).input_features
    heard = model.model.encoder(features)
    ids = [START, NO_TIMESTAMPS]
    while len(ids) < LONGEST:
        logits = model(encoder_outputs=heard, decoder_input_ids=torch.tensor([ids])).logits
        best = int(logits[0, -1].argmax())
        if best == END:
            break
        ids.append(best)
    # A token that begins a word begins with a blank, which the vocabulary writes as Ġ.
    starts = [i for i in range(2, len(ids)) if tokenizer.id_to_token(ids[i]).startswith("Ġ")]
    written = [
        tokenizer.decode(ids[start:end]).strip(" .,!?").lower()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
    ]
    same = difflib.SequenceMatcher(None, recording.words, written, autojunk=False)
    words = tuple(
        (block.a + i, starts[block.b + i], tokenizer.decode([ids[starts[block.b + i]]]))
        for block in same.get_matching_blocks()
        for i in range(block.size)
    )
    return Written(recording, features, heard.last_hidden_state, torch.tensor([ids]), words)


def targets(written: Written) -> list[list[tuple[int, int]]]:
    """The logit of each word's first token: what is written at a place is decided one before."""
    return [[(place - 1, int(written.ids[0, place]))] for _, place, _ in written.words]


def generic_attention(
    model: WhisperForConditionalGeneration, layers: str | None = None
) -> FrameMaps:
    """Relevance of the 1500 frames for the logit of each word."""
    chosen = None
    if layers is not None:
        chosen = [name for name, _ in model.named_modules() if name.endswith(layers)]
    return from_sound(GenericAttention(of_sound(model), layers=chosen))


def of_sound(model: WhisperForConditionalGeneration) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits as a function of the sound and what is written."""

    def forward(input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        logits: Tensor = model(
            input_features=input_features, decoder_input_ids=decoder_input_ids
        ).logits
        return logits

    return forward


def of_heard(model: WhisperForConditionalGeneration) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits as a function of what the encoder made of the sound and what is written."""

    def forward(heard: Tensor, decoder_input_ids: Tensor) -> Tensor:
        logits: Tensor = model(encoder_outputs=(heard,), decoder_input_ids=decoder_input_ids).logits
        return logits

    return forward


def from_sound(method: AttentionAttribution) -> FrameMaps:
    """The maps of a method over `of_sound`."""

    def frame_maps(written: Written) -> Tensor:
        maps, _ = method.attribute_targets(
            (written.features, written.ids), targets(written), return_input_shape=False
        )
        return maps[:, 0]

    return frame_maps


def from_heard(method: AttentionAttribution) -> FrameMaps:
    """The maps of a method over `of_heard`: alike, of a method that reads the last cross-attention
    alone, and many times faster.
    """

    def frame_maps(written: Written) -> Tensor:
        maps, _ = method.attribute_targets(
            (written.heard, written.ids), targets(written), return_input_shape=False
        )
        return maps[:, 0]

    return frame_maps


def random_numbers(written: Written) -> Tensor:
    """The control, other numbers for each transcript."""
    control = RandomAttribution(torch.nn.Identity(), seed=int(written.ids.sum()))
    return control.attribute(written.heard.expand(len(written.words), -1, -1))[..., 0]


def raw_attention(model: WhisperForConditionalGeneration, layers: slice) -> FrameMaps:
    """Cross-attention of the place that writes each word: mean over heads and these layers."""

    @torch.no_grad()
    def frame_maps(written: Written) -> Tensor:
        kept = model.config._attn_implementation  # noqa: SLF001 - there is no public name
        model.set_attn_implementation("eager")
        try:
            output = model(
                input_features=written.features,
                decoder_input_ids=written.ids,
                output_attentions=True,
            )
        finally:
            model.set_attn_implementation(kept)
        attention = torch.stack(output.cross_attentions[layers]).mean((0, 2))[0]
        places = [place - 1 for _, place, _ in written.words]
        return attention[places]

    return frame_maps


def all_methods(model: WhisperForConditionalGeneration) -> dict[str, FrameMaps | None]:
    """All that are compared, by their names in the report; `None` is a constant map."""
    sound, heard = of_sound(model), of_heard(model)
    # No method is scaled by its least value: that would take from or add to all frames alike.
    return {
        "generic_attention": generic_attention(model),
        "generic_attention_cross_attention_only": generic_attention(model, "encoder_attn"),
        "raw_cross_attention_last_layer": raw_attention(model, slice(-1, None)),
        "raw_cross_attention_mean_of_layers": raw_attention(model, slice(None)),
        "attention_rollout": from_sound(AttentionRollout(sound)),
        "attention_grad_cam": from_heard(AttentionGradCam(heard, weights_from="all", scale=None)),
        "gradient_attention": from_sound(GradientAttention(sound)),
        "transformer_attribution": from_heard(TransformerAttribution(heard)),
        "partial_lrp": from_heard(PartialLrp(heard)),
        "lrp_rollout": from_sound(LrpRollout(sound)),
        "random": random_numbers,
        "chance": None,
    }
