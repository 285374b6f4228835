"""Evidence on visual question answering with two streams: a small LXMERT.

Two tables, made as `vqa.py` says. Run by `make evidence`; alone,
`python benchmarks/evidence/lxmert.py --data DIR`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import typer
import vqa
from garments import DEBIAN_FOLDER, Batch
from methods import Methods, broken_lxmert, of_lxmert, some
from tables import Table
from torch import Tensor
from transformers import LxmertConfig, LxmertForQuestionAnswering

from captum_generic_attn import hf
from captum_generic_attn.demo import filled, read_weights
from captum_generic_attn.metrics import TOKENS

WEIGHTS = Path(__file__).resolve().parents[1] / "garments" / "lxmert.safetensors"
NAMES = "input_ids", "visual_feats", "attention_mask", "visual_pos", "visual_attention_mask"
"""The order of the model's arguments: what is explained, then the rest."""


def answerer() -> vqa.Answerer:
    """The trained LXMERT."""
    notes, weights = read_weights(WEIGHTS)
    lxmert = filled(LxmertForQuestionAnswering(LxmertConfig(**notes["config"])), weights)
    model = hf.Keywords(lxmert, NAMES)
    return vqa.Answerer(
        "lxmert", "LXMERT", model, scores(model), inputs, of_regions=(1, 3, 4), kept=1,
        fractions=TOKENS,
    )  # fmt: skip


def inputs(batch: Batch) -> tuple[Tensor, ...]:
    """Questions in the order of `NAMES`."""
    given = batch.inputs()
    return tuple(given[name] for name in NAMES)


def scores(model: Callable[..., Any]) -> Callable[..., Tensor]:
    """Those of the answers, also of inputs that have lost all of their regions.

    Hugging Face's LXMERT cannot reshape a sequence of no regions. It gets one of zeros, in a box
    without extent.
    """

    def forward(*inputs: Tensor) -> Tensor:
        ids, features, mask, boxes, present = inputs
        if features.shape[1] == 0:
            features, boxes, present = (
                tensor.new_zeros(len(ids), 1, *tensor.shape[2:])
                for tensor in (features, boxes, present)
            )
        found: Tensor = model(ids, features, mask, boxes, present).question_answering_score
        return found

    return forward


def every_method(model: Callable[..., Any]) -> Methods:
    """All methods, the control, and broken variants of ours."""
    return of_lxmert(model) | broken_lxmert(model)


def experiment(
    data: Path = DEBIAN_FOLDER, samples: int = vqa.SAMPLES, names: Collection[str] | None = None
) -> tuple[Table, Table]:
    """Both tables, of the first `samples` questions; of all methods, or these."""
    lxmert = answerer()
    methods = some(every_method(lxmert.model), names)
    return vqa.experiment(lxmert, methods, data, samples, (_NEEDED, _DECIDING))


_NEEDED = """A small LXMERT answers questions about four to eight garments. We explain its
predicted answer. A growing share of the words or regions is dropped (0 to 1, the authors'
steps), starting with the most (*positive*) or the least relevant ones (*negative*); [CLS] and
[SEP] stay. The value is the area under the accuracy of the new answers. (If no region is left,
Hugging Face's LXMERT gets one region of zeros, because it cannot run without.)"""

_DECIDING = """The same explanations, for the correctly answered questions: how often one of the
deciding regions or words is ranked first, in percent. The deciding evidence is known from how a
question was generated. For "what is left of the bag ?" (*relation*) it is the bag and what is
left of it (*answer only*: the latter alone), and the words "left" and "bag". For "which garment
is in the upper left ?" (*place*) it is that garment, and the words of the place. For "do you
see a boot ?" (*existence*) it is the boot and its word."""


def main(data: Path = DEBIAN_FOLDER, samples: int = vqa.SAMPLES, threads: int = 1) -> None:
    """Make both tables and store them."""
    torch.set_num_threads(threads)
    for table in experiment(data, samples):
        print(table.store())


if __name__ == "__main__":
    typer.run(main)
