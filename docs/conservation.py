"""How much relevance LRP keeps: sums over the inputs beside the score, for each rule set.

`python docs/conservation.py` writes the tables of `docs/baselines.md`; the tests call `sums`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from captum.attr import LRP
from torch import Tensor, nn

from captum_generic_attn import Lrp
from captum_generic_attn.lrp import RULE_SETS

BEGIN, END = "<!-- conservation -->", "<!-- end of conservation -->"
MODELS = ("ViT", "BERT", "GPT-2")


def _vit() -> tuple[nn.Module, Tensor, int]:
    """All relevance ends at pixels: no class token, no position code."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=7,
        class_token=False, global_pool="avg", pos_embed="none",
    )  # fmt: skip
    return model, torch.randn(3, 3, 32, 32, dtype=torch.float64), 2


def _bert() -> tuple[nn.Module, Tensor, int]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=20, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    nn.init.zeros_(model.bert.embeddings.position_embeddings.weight)
    nn.init.zeros_(model.bert.embeddings.token_type_embeddings.weight)
    return model, torch.randint(50, (3, 9)), 1


def _gpt2() -> tuple[nn.Module, Tensor, int]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=20, n_embd=48, n_layer=3, n_head=4)
    model = GPT2LMHeadModel(config)
    nn.init.zeros_(model.transformer.wpe.weight)
    return model, torch.randint(50, (3, 9)), 7


_BUILD = {"ViT": _vit, "BERT": _bert, "GPT-2": _gpt2}


def _built(name: str, *, biases: bool) -> tuple[nn.Module, Tensor, int]:
    torch.manual_seed(0)
    model, inputs, target = _BUILD[name]()
    model = model.double().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1) if biases else parameter.zero_()
            elif parameter.ndim > 1:
                parameter.mul_(2)
    return model, inputs, target


def sums(name: str, rules: str, *, biases: bool) -> tuple[Tensor, Tensor]:
    """The scores `[B]` of a small random model, and the sums of all relevance of its inputs."""
    model, inputs, target = _built(name, biases=biases)
    last = name == "GPT-2"

    def forward(x: Tensor) -> Tensor:
        output = model(x)
        logits: Tensor = getattr(output, "logits", output)
        return logits[:, -1] if last else logits

    with torch.no_grad():
        score = forward(inputs)[:, target]
    relevance = Lrp(forward, rules=rules).attribute(inputs, target)
    return score, relevance.flatten(1).sum(1)


class CaptumsLrp(NamedTuple):
    """What `captum.attr.LRP` says of a transformer, and how many modules it leaves changed."""

    refusal: str
    left_behind: int


def captums_lrp() -> CaptumsLrp:
    """Captum's own LRP on the same small vision transformer."""
    model, inputs, target = _built("ViT", biases=True)
    before = {id(m): set(vars(m)) for m in model.modules()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LRP(model).attribute(inputs.requires_grad_(), target)
    except (TypeError, RuntimeError, AssertionError) as error:
        refusal = str(error)
    else:
        refusal = ""
    changed = sum(bool(set(vars(m)) - before[id(m)]) for m in model.modules())
    return CaptumsLrp(refusal, changed)


def table(*, biases: bool) -> str:
    """Least and greatest sum of relevance of three examples, over what relevance starts from."""
    lines = ["| `rules=` | " + " | ".join(MODELS) + " |", "| --- " * (len(MODELS) + 1) + "|"]
    for rules in RULE_SETS:
        cells = []
        for name in MODELS:
            score, total = sums(name, rules, biases=biases)
            kept = total if RULE_SETS[rules].start == "one" else total / score
            cells.append(f"{float(kept.min()):.4g} … {float(kept.max()):.4g}")
        lines.append(f"| `{rules!r}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def text() -> str:
    """What stands between the marks of `docs/baselines.md`."""
    found = captums_lrp()
    return f"""
Written by `python docs/conservation.py`. Small random models in float64, without class token and
position codes, which would take relevance that is no input's. The sum of the relevance of all
inputs, over what relevance starts from (1, or the score): least … greatest of three examples. Where
all biases are zero:

{table(biases=False)}

With random biases (standard deviation 0.1), which take their share of each result:

{table(biases=True)}

Captum's own `captum.attr.LRP` refuses the same vision transformer: “{found.refusal.strip()}” It
also leaves attributes of its own behind on {found.left_behind} of the model's modules.
"""


def main() -> None:
    """Write the tables."""
    path = Path(__file__).with_name("baselines.md")
    before, begin, rest = path.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    path.write_text(f"{before}{begin}\n{text().strip()}\n{end}{after}", "utf-8")
    print(text())


if __name__ == "__main__":
    main()
