"""Evidence on visual question answering with one stream: a small VisualBERT.

Two tables, made as `vqa.py` says. Run by `make evidence`; alone,
`python benchmarks/evidence/visualbert.py --data DIR`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
import vqa
from garments import DEBIAN_FOLDER, Batch
from methods import Methods, broken_visualbert, of_visualbert, some
from tables import Table
from torch import Tensor
from transformers import VisualBertConfig, VisualBertForQuestionAnswering

from captum_generic_attn import hf
from captum_generic_attn.demo import filled, read_weights
from captum_generic_attn.metrics import VISUALBERT_REGIONS

WEIGHTS = Path(__file__).resolve().parents[1] / "garments" / "visualbert.safetensors"
NAMES = "input_ids", "visual_embeds", "attention_mask", "visual_attention_mask"
"""The order of the model's arguments: what is explained, then the rest."""


def answerer() -> vqa.Answerer:
    """The trained VisualBERT."""
    notes, weights = read_weights(WEIGHTS)
    config = VisualBertConfig(**notes["config"])
    visualbert = filled(VisualBertForQuestionAnswering(config), weights)
    model = hf.Keywords(visualbert, NAMES)
    return vqa.Answerer(
        "visualbert", "VisualBERT", model, lambda *given: model(*given).logits,
        partial(inputs, box_scale=notes["box_scale"]), of_regions=(1, 3), kept=2,
        fractions=VISUALBERT_REGIONS,
    )  # fmt: skip


def inputs(batch: Batch, box_scale: float) -> tuple[Tensor, ...]:
    """Questions in the order of `NAMES`; boxes are features of regions, as in the training."""
    regions = torch.cat([batch.visual_feats, box_scale * batch.visual_pos], 2)
    return batch.input_ids, regions, batch.attention_mask.long(), batch.visual_attention_mask


def every_method(model: Callable[..., Any]) -> Methods:
    """All methods, the control, and broken variants of ours."""
    return of_visualbert(model) | broken_visualbert(model)


def experiment(
    data: Path = DEBIAN_FOLDER, samples: int = vqa.SAMPLES, names: Collection[str] | None = None
) -> tuple[Table, Table]:
    """Both tables, of the first `samples` questions; of all methods, or these."""
    visualbert = answerer()
    methods = some(every_method(visualbert.model), names)
    return vqa.experiment(visualbert, methods, data, samples, (_NEEDED, _DECIDING))


_NEEDED = """A small VisualBERT answers the same questions as LXMERT. Words and regions form one
sequence, and the answer is read at the question mark. We explain its predicted answer. A
growing share of the words or regions is dropped, in the authors' steps, starting with the most
(*positive*) or the least relevant ones (*negative*); [CLS], "?" and [SEP] stay. The value is
the area under the accuracy of the new answers. The authors' steps for regions (0, ½, ¾, 0.95
and on to 1) are made for images with many regions; with four to eight, all are gone from 0.95
on. Eq. 8 and 9 have no effect here, because they concern attention between streams."""

_DECIDING = """The same explanations, for the correctly answered questions: how often one of the
deciding regions or words is ranked first, in percent, as for LXMERT above."""


def main(data: Path = DEBIAN_FOLDER, samples: int = vqa.SAMPLES, threads: int = 1) -> None:
    """Make both tables and store them."""
    torch.set_num_threads(threads)
    for table in experiment(data, samples):
        print(table.store())


if __name__ == "__main__":
    typer.run(main)
