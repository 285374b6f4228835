"""Parity of the baselines and of LRP with the numbers of the authors' own code.

All in float64, through public model classes. Options alone choose a variant: `OPTIONS` below is the
table of `docs/baselines.md`. `tests/parity/golden/README.md` says where the numbers come from.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_generic_attn import (
    AttentionGradCam,
    AttentionRollout,
    GenericAttention,
    Lrp,
    LrpRollout,
    PartialLrp,
    RawAttention,
    TransformerAttribution,
)
from captum_generic_attn.lrp import RULE_SETS
from parity.golden_crossing import (
    detr,
    hf_detr,
    lxmert,
    lxmert_forward,
    lxmert_inputs,
    visualbert,
    visualbert_forward,
)
from parity.golden_models import bert, golden, manifest, relative_error, vit

TOLERANCE = 1e-7
HF_DETR = 1e-5  # its position code is its own, computed in float32
SAME_NUMBERS = 1e-12
FLAVOURS = {"layers_lrp": "chefer2021_full", "layers_ours": "chefer2021"}


# --- ViT

VIT_METHODS = {
    "raw_attn_last_layer": RawAttention,
    "attn_gradcam": AttentionGradCam,
    "transformer_attribution.start0": TransformerAttribution,
    "transformer_attribution.start1": lambda m: TransformerAttribution(m, start_layer=1),
    "lrp_rollout.start0": LrpRollout,
    "lrp_last_layer.layers_lrp": PartialLrp,
    "lrp_last_layer.layers_ours": lambda m: PartialLrp(m, rules="chefer2021"),
    "lrp_second_layer.layers_lrp": lambda m: PartialLrp(m, layers="blocks.1"),
    "lrp_last_layer_ablation.layers_lrp": lambda m: TransformerAttribution(
        m, start_layer=-1, rules="chefer2021_full"
    ),
    "full_lrp.layers_lrp": Lrp,
    "full_lrp.layers_ours": lambda m: Lrp(m, rules="chefer2021"),
}
VIT_TARGETS = ("argmax", "class5", "class0")


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "eager"])
def vit_model(request):
    return vit(fused=request.param)


def vit_targets(name: str) -> list[int]:
    return [manifest("vit")["targets"][f"img{image}"][name] for image in (0, 1)]


@pytest.mark.parametrize("target", VIT_TARGETS)
@pytest.mark.parametrize("key", VIT_METHODS)
def test_vit(vit_model, key, target) -> None:
    images = golden("vit", "input.image")
    ours = VIT_METHODS[key](vit_model).attribute(
        images, vit_targets(target), return_input_shape=False
    )
    for image in (0, 1):
        theirs = golden("vit", f"img{image}.{target}.{key}")
        assert relative_error(ours[image].reshape(theirs.shape), theirs) <= TOLERANCE


@pytest.mark.parametrize("start", [0, 1])
def test_vit_rollout(vit_model, start) -> None:
    ours = AttentionRollout(vit_model, start_layer=start).attribute(
        golden("vit", "input.image"), 0, return_input_shape=False
    )
    for image in (0, 1):
        theirs = golden("vit", f"img{image}.rollout.start{start}")
        assert relative_error(ours[image].flatten(), theirs) <= TOLERANCE


SHIPPED = [key for key in VIT_METHODS if "lrp" in key or "transformer" in key]


@pytest.mark.parametrize("key", SHIPPED)
def test_vit_with_the_norm_that_the_authors_ship(vit_model, key) -> None:
    """The last norm of their LRP models divides by another epsilon than timm's."""
    before = vit_model.norm.eps
    vit_model.norm.eps = 1e-5
    try:
        ours = VIT_METHODS[key](vit_model).attribute(
            golden("vit", "input.image")[:1], vit_targets("argmax")[0], return_input_shape=False
        )
    finally:
        vit_model.norm.eps = before
    theirs = golden("vit", f"img0.argmax.eps1e-5.{key}")
    assert relative_error(ours[0].reshape(theirs.shape), theirs) <= TOLERANCE


# --- BERT

AT_WORDS = {"inert": True, "masks": "added", "divided_copies": False}
BERT_METHODS = {
    "attn_gradcam": lambda m: AttentionGradCam(m, weights_from="all"),
    "partial_lrp.layers_lrp": PartialLrp,
    "partial_lrp.layers_ours": lambda m: PartialLrp(m, rules="chefer2021"),
    "transformer_attribution.start0": lambda m: TransformerAttribution(
        m, row_normalize=True, own="row_min"
    ),
    "transformer_attribution.start2": lambda m: TransformerAttribution(
        m, row_normalize=True, own="row_min", start_layer=2
    ),
    # The words take all of the relevance of the encoder's input: position codes get none.
    "full_lrp.layers_lrp": lambda m: Lrp(
        m, rules=replace(RULE_SETS["chefer2021_full"], **AT_WORDS)
    ),
    "full_lrp.layers_ours": lambda m: Lrp(m, rules=replace(RULE_SETS["chefer2021"], **AT_WORDS)),
}
BERT_UNTARGETED = {
    "last_attn": RawAttention,
    "rollout.start0": AttentionRollout,
    "rollout.start1": lambda m: AttentionRollout(m, start_layer=1),
}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def bert_model(request):
    return bert(request.param)


def of_bert(model, method, name: str, target: int, padding: int = 0) -> Tensor:
    ids, mask = (
        F.pad(golden("bert", f"input.{name}.{key}"), (0, padding))
        for key in ("input_ids", "attention_mask")
    )
    return method(model).attribute(ids, target, (mask,))[0, : ids.shape[1] - padding]


@pytest.mark.parametrize("target", ["argmax", "class0", "class1"])
@pytest.mark.parametrize("name", ["s0", "s1"])
@pytest.mark.parametrize("key", BERT_METHODS)
def test_bert(bert_model, key, name, target) -> None:
    index = manifest("bert")["targets"][name][target]
    model, padding = bert_model, 0
    if key.startswith("full_lrp"):
        # As the authors' always does, the model adds a mask: eager attention, and a padded token.
        model, padding = bert("eager"), 1
    ours = of_bert(model, BERT_METHODS[key], name, index, padding)
    if key.startswith("full_lrp"):
        ours = ours.clone()
        ours[0] = 0  # as the authors return it
    assert relative_error(ours, golden("bert", f"{name}.{target}.{key}")) <= TOLERANCE


@pytest.mark.parametrize("name", ["s0", "s1"])
@pytest.mark.parametrize("key", BERT_UNTARGETED)
def test_bert_without_target(bert_model, key, name) -> None:
    ours = of_bert(bert_model, BERT_UNTARGETED[key], name, 0)
    assert relative_error(ours, golden("bert", f"{name}.{key}")) <= TOLERANCE


# --- VisualBERT

VISUALBERT_METHODS = {
    "attn_gradcam": lambda m: AttentionGradCam(m, weights_from="all"),
    "partial_lrp": lambda m: PartialLrp(m, rules="chefer2021", clamp=False, scale="minmax"),
    "transformer_attribution.start0": TransformerAttribution,
    "transformer_attribution.start1": lambda m: TransformerAttribution(m, start_layer=1),
}
VISUALBERT_UNTARGETED = {
    "raw_attn": RawAttention,
    "rollout.start0": lambda m: AttentionRollout(m, row_normalize=False),
    "rollout.start1": lambda m: AttentionRollout(m, row_normalize=False, start_layer=1),
}


@pytest.fixture(scope="module")
def visualbert_model():
    return visualbert_forward(visualbert())


def of_visualbert(model, method, example: str, target: int) -> Tensor:
    entry = manifest("visualbert")["inputs"][example]
    ids, mask, regions = (
        golden("visualbert", entry[key]) for key in ("input_ids", "input_mask", "visual_embeds")
    )
    words = entry["n_text"]
    text, image = method(model).attribute(
        (ids[:, :words], regions), target, mask[:, :words], return_input_shape=False
    )
    return torch.cat([text[0], image[0]])


@pytest.mark.parametrize("target", ["argmax", "class3", "class7"])
@pytest.mark.parametrize("example", ["s0", "s1"])
@pytest.mark.parametrize("key", VISUALBERT_METHODS)
def test_visualbert(visualbert_model, key, example, target) -> None:
    index = manifest("visualbert")["targets"][example][target]
    ours = of_visualbert(visualbert_model, VISUALBERT_METHODS[key], example, index)
    theirs = golden("visualbert", f"{example}.{target}.{key}")
    assert relative_error(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("example", ["s0", "s1"])
@pytest.mark.parametrize("key", VISUALBERT_UNTARGETED)
def test_visualbert_without_target(visualbert_model, key, example) -> None:
    ours = of_visualbert(visualbert_model, VISUALBERT_UNTARGETED[key], example, 0)
    assert relative_error(ours, golden("visualbert", f"{example}.{key}")) <= TOLERANCE


# --- LXMERT

LXMERT_METHODS = {
    "gradcam": lambda m: AttentionGradCam(m, weights_from="all", scale=None),
    "transformer_attr": TransformerAttribution,
    "partial_lrp": lambda m: PartialLrp(m, rules="chefer2021", clamp=False, scale="minmax"),
    **{
        f"ours.lrp1.norm{int(normalize)}.self10_{int(self_in_cross)}": (
            lambda m, normalize=normalize, self_in_cross=self_in_cross: GenericAttention(
                m, lrp=True, normalize=normalize, self_in_cross=self_in_cross
            )
        )
        for normalize in (False, True)
        for self_in_cross in (False, True)
    },
}
LXMERT_UNTARGETED = {
    "raw_attn": RawAttention,
    "rollout": AttentionRollout,
}
LXMERT_CASES = [("s0", "argmax"), ("s0", "class4"), ("s1", "argmax"), ("s1", "class4")]


@pytest.fixture(scope="module")
def lxmert_model():
    return lxmert_forward(lxmert("lxmert"))


def assert_lxmert(relevance, key: str) -> None:
    text = relevance.matrix("input_ids", "input_ids")[0].clone()
    text[0, 0] = 0
    image = relevance.matrix("input_ids", "visual_feats")[0]
    for ours, name in ((text, "R_t_t"), (image, "R_t_i")):
        assert relative_error(ours, golden("lxmert", f"{key}.{name}")) <= TOLERANCE


@pytest.mark.parametrize(("example", "target"), LXMERT_CASES)
@pytest.mark.parametrize("key", LXMERT_METHODS)
def test_lxmert(lxmert_model, key, example, target) -> None:
    index = manifest("lxmert")["targets"][example][target]
    method = LXMERT_METHODS[key](lxmert_model)
    relevance = method.relevance(lxmert_inputs("lxmert", example), index)
    assert_lxmert(relevance, f"{example}.{target}.{key}")
    text, regions, _ = method.attribute(lxmert_inputs("lxmert", example), index)
    row = relevance.matrix("input_ids", "input_ids")[0, 0].clone()
    row[0] = 0
    assert relative_error(text[0], row) <= SAME_NUMBERS
    across = relevance.matrix("input_ids", "visual_feats")[0, 0]
    assert relative_error(regions[0, :, 0], across) <= SAME_NUMBERS


@pytest.mark.parametrize("example", ["s0", "s1"])
@pytest.mark.parametrize("key", LXMERT_UNTARGETED)
def test_lxmert_without_target(lxmert_model, key, example) -> None:
    relevance = LXMERT_UNTARGETED[key](lxmert_model).relevance(lxmert_inputs("lxmert", example), 6)
    assert_lxmert(relevance, f"{example}.{key}")


# --- DETR

DETR_METHODS = {
    "raw_attn": RawAttention,
    "rollout": AttentionRollout,
    "attn_gradcam": lambda m: AttentionGradCam(m, weights_from="all", scale=None),
}
DETR_LRP = {
    "partial_lrp": lambda m: PartialLrp(m, rules="chefer2021_detr", clamp=False, scale="minmax"),
    "transformer_att": lambda m: TransformerAttribution(m, rules="chefer2021_detr"),
    **{
        f"ours.lrp1.norm{int(normalize)}.self10_{int(self_in_cross)}": (
            lambda m, normalize=normalize, self_in_cross=self_in_cross: GenericAttention(
                m, lrp="chefer2021_detr", normalize=normalize, self_in_cross=self_in_cross
            )
        )
        for normalize in (False, True)
        for self_in_cross in (False, True)
    },
}
DETR_CASES = ["q1.argmax", "q4.class2"]


def of_detr(model, method, case: str) -> Tensor:
    target = manifest("detr")["targets"][case]
    return method(model).attribute(
        golden("detr", "input.features"), (target["query"], target["cls"]),
        return_input_shape=False,
    )[0].flatten()  # fmt: skip


@pytest.mark.parametrize("case", DETR_CASES)
@pytest.mark.parametrize("key", DETR_METHODS)
@pytest.mark.parametrize("source", ["torch", "hf-eager", "hf-sdpa"])
def test_detr(source, key, case) -> None:
    tolerance = TOLERANCE if source == "torch" else HF_DETR
    model = detr("detr") if source == "torch" else hf_detr("detr", source[3:])
    ours = of_detr(model, DETR_METHODS[key], case)
    assert relative_error(ours, golden("detr", f"{case}.{key}")) <= tolerance


@pytest.mark.parametrize("case", DETR_CASES)
@pytest.mark.parametrize("key", DETR_LRP)
def test_detr_lrp(key, case) -> None:
    ours = of_detr(detr("detr"), DETR_LRP[key], case)
    assert relative_error(ours, golden("detr", f"{case}.{key}")) <= TOLERANCE


def test_sums_of_lrp_are_over_examples_where_the_sequence_comes_first() -> None:
    """DETR puts tokens before examples; its rules rescale by sums over an example."""
    model, one = detr("detr"), golden("detr", "input.features")
    other = -one.flip(2)
    method = GenericAttention(model, lrp="chefer2021_detr")
    together = method.attribute(torch.cat([one, other]), [(1, 3), (4, 2)])
    for i, (features, target) in enumerate(((one, (1, 3)), (other, (4, 2)))):
        assert relative_error(together[i], method.attribute(features, target)[0]) <= 1e-9
