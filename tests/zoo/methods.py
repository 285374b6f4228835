"""Every method on one model of the zoo: which run, and why the others are refused.

`test_methods.py` asserts over what `examine` found, and `docs/methods_table.py` writes it down.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from captum_generic_attn import (
    GenericAttention,
    Lrp,
    UnsupportedAttentionError,
    UnsupportedOperationError,
)
from captum_generic_attn.baselines import method_classes
from captum_generic_attn.capture.scope import modules_of
from zoo.census import _difference, _settle, _state, wake
from zoo.models import Entry, entries

METHODS = {
    **{cls.__name__: cls for cls in method_classes() if cls is not Lrp},
    "GenericAttention(lrp=True)": partial(GenericAttention, lrp=True),
    "Lrp": Lrp,
    **{f'Lrp(rules="{name}")': partial(Lrp, rules=name) for name in ("epsilon", "gamma", "frozen")},
}

ALL_ZERO = "all zero"
"""Grad-CAM's outcome where no head has positive evidence: its `relu` leaves nothing."""

SLICE = """
    timm: beit: beit_base_patch16_224
    timm: cait: cait_xxs24_224
    timm: deit: deit_tiny_distilled_patch16_224
    timm: eva: vit_tiny_patch16_dinov3_qkvb
    timm: swin_transformer: swin_tiny_patch4_window7_224
    timm: swin_transformer_v2: swinv2_tiny_window8_256
    timm: pvt_v2: pvt_v2_b0
    timm: vision_transformer: test_vit
    torchvision: VisionTransformer
    torchvision: SwinTransformer
    torch: MultiheadAttention, key_padding_mask
    torch: TransformerEncoder, padding
    torch: TransformerDecoder
    torch: Transformer, causal target
    open_clip: CLIP
    transformers: dinov2
    transformers: wav2vec2
    transformers: bart
    transformers: bert
    transformers: electra
    transformers: gemma2
    transformers: gpt2
    transformers: gpt_neox
    transformers: llama
    transformers: mistral
    transformers: opt
    transformers: qwen3
    transformers: roberta
    transformers: albert
    transformers: deberta-v2
    transformers: distilbert
    transformers: modernbert
    transformers: detr
    transformers: clip
    transformers: siglip
    transformers: lxmert
    transformers: visual_bert
    transformers: vilt
    transformers: t5
    transformers: whisper
    transformers: mixtral
    transformers: bloom
"""
"""One model of every kind that users ask for: by label, as in `docs/models.md`."""


def slice_of_the_zoo() -> list[Entry]:
    """The entries of the slice, in its order."""
    by_label = {entry.label: entry for entry in entries()}
    return [by_label[label.strip()] for label in SLICE.strip().splitlines()]


@dataclass
class Outcomes:
    """What each method did on one model: `""` where it gave finite maps, not all of them zero."""

    label: str
    outcomes: dict[str, str] = field(default_factory=dict)
    left_behind: str = ""


def examine(entry: Entry) -> Outcomes:
    """Build a model, and let every method explain it."""
    found = Outcomes(entry.label)
    torch.manual_seed(0)
    built = entry.build()
    models = list(modules_of(built.forward).values())
    for model in models:
        wake(model)
    _settle(built, models)
    before = [_state(model) for model in models]
    for name, method in METHODS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                maps = method(built.forward, output=built.output).attribute(
                    built.inputs, built.target, built.additional
                )
            except (UnsupportedAttentionError, UnsupportedOperationError) as error:
                found.outcomes[name] = str(error)
                continue
        assert [m.shape for m in maps] == [x.shape for x in built.inputs], name
        assert all(bool(m.isfinite().all()) for m in maps), name
        greatest = max(float(m.abs().max()) for m in maps)
        found.outcomes[name] = "" if greatest > 0 else ALL_ZERO
    for model, known in zip(models, before, strict=True):
        found.left_behind += _difference(known, _state(model))
    return found


def write_down(found: Outcomes) -> None:
    """Keep what was found for the table, if a folder for it is named by `METHODS_FINDINGS`."""
    if folder := os.environ.get("METHODS_FINDINGS"):
        path = Path(folder) / f"{re.sub(r'[^a-z0-9]+', '_', found.label.lower())}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found), indent=1))
