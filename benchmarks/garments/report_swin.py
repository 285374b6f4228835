"""Measures the Swin transformer of `train_swin.py`: do its maps point at the right garment?

Run by `make garments-swin`, or `python benchmarks/garments/report_swin.py --data DIR`. The paper
does not say how relevance goes through merged tokens; this measures what we do (equal shares). Same
canvases, same two ways to ask and same intervals as `report.py`; tokens are 4 × 4 pixels. Writes
`report_swin.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from canvases import DEBIAN_FOLDER, TEST_SEED, draw, load_split
from captum.attr import Saliency
from report import (
    EXPLAINED,
    NAMED,
    TokenMaps,
    about,
    average_precisions,
    generic_attention,
    localisation,
    summaries,
)
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from captum_generic_attn import demo
from captum_generic_attn.demo import read_weights

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "swin.safetensors"
GRID = 16


def load_swin() -> SwinTransformer:
    """The trained model, float32, in evaluation mode."""
    notes, state = read_weights(WEIGHTS)
    model = SwinTransformer(**notes["config"])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "mask" not in name and "index" not in name]
    return model.eval()


def saliency(model: nn.Module) -> TokenMaps:
    """The size of the input's gradient, summed over each token's pixels."""
    method = Saliency(model)

    def token_maps(pictures: Tensor, classes: Tensor) -> Tensor:
        gradient = method.attribute(pictures.clone().requires_grad_(), target=classes)
        return avg_pool2d(gradient.sum(1, keepdim=True), demo.SIZE // GRID)[:, 0]

    return token_maps


def main(data: Path = DEBIAN_FOLDER, threads: int = 2) -> None:
    """Measure the Swin transformer on canvases of the test split and write report_swin.json."""
    torch.set_num_threads(threads)
    split, model = load_split("test", data), load_swin()
    precisions = average_precisions(model, draw(split, TEST_SEED, 0, NAMED))
    explained = draw(split, TEST_SEED, 0, EXPLAINED)
    methods = {
        "generic_attention": generic_attention(model, 0),
        "generic_attention_last_layer_only": generic_attention(model, -1),
        "saliency": saliency(model),
        "chance": None,
    }
    scores = {name: localisation(explained, of, GRID) for name, of in methods.items()}
    report = {
        "model": about(model, WEIGHTS),
        "mean_average_precision": {
            "canvases": NAMED,
            "mean": round(float(precisions.mean()), 4),
        },
        "maximum_at_the_right_garment": {
            "canvases": EXPLAINED,
            "explanations": int(explained.labels.sum()),
            "interval": "95 %, percentile bootstrap over canvases, 5000 resamples",
            "pixel": "the highest pixel of the bilinear 64 × 64 map lies in the garment's box",
            "token": "the highest token's 4 × 4 pixels reach into the garment's box",
        }
        | summaries(scores),
        "canvas_seed": TEST_SEED,
    }
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (HERE / "report_swin.json").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
