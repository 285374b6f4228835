"""Parity with the authors' numbers where streams attend to each other, and where they are joined.

All in float64. `tests/parity/golden/README.md` says where the numbers come from.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from captum_generic_attn import GenericAttention
from parity.golden_crossing import (
    detr,
    hf_detr,
    lxmert,
    lxmert_forward,
    lxmert_inputs,
    visualbert,
    visualbert_forward,
)
from parity.golden_models import golden, manifest, relative_error

TOLERANCE = 1e-7
HF_DETR = 1e-5  # its position code is its own, computed in float32
SAME_NUMBERS = 1e-12
NOTHING = 1e-12
QUERIES = {"hf": "model.query_position_embeddings.weight", "torch": "query_embed.weight"}
SWITCHES = list(product([False, True], repeat=2))
PAPER = (True, True)


def assert_parity(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal to the golden array, or where that is all zero, nothing."""
    if theirs.abs().max() == 0:
        assert ours.abs().max() <= NOTHING
    else:
        assert relative_error(ours, theirs) <= tolerance


def switched(normalize: bool, self_in_cross: bool) -> str:
    return f"ours.lrp0.norm{int(normalize)}.self10_{int(self_in_cross)}"


# --- LXMERT: co-attention

LXMERT_CASES = [("s0", "argmax"), ("s0", "class4"), ("s1", "argmax"), ("s1", "class4")]


@pytest.fixture(scope="module")
def lxmert_model():
    return lxmert_forward(lxmert("lxmert"))


def lxmert_target(name: str, example: str, target: str) -> int:
    return manifest(name)["targets"][example][target]


def text_to_text(matrix: Tensor) -> Tensor:
    """As the authors return it: what CLS gave to itself is set to zero."""
    matrix = matrix[0].clone()
    matrix[0, 0] = 0
    return matrix


def test_lxmert_loads_the_golden_weights(lxmert_model) -> None:
    for example in ("s0", "s1"):
        logits = lxmert_model(*lxmert_inputs("lxmert", example))[0]
        assert relative_error(logits, golden("lxmert", f"{example}.logits")) <= TOLERANCE
        assert logits.argmax() == lxmert_target("lxmert", example, "argmax")


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: switched(*s))
@pytest.mark.parametrize(("example", "target"), LXMERT_CASES)
def test_lxmert_with_every_switch(lxmert_model, example, target, switches) -> None:
    normalize, self_in_cross = switches
    relevance = GenericAttention(
        lxmert_model, normalize=normalize, self_in_cross=self_in_cross
    ).relevance(lxmert_inputs("lxmert", example), lxmert_target("lxmert", example, target))
    key = f"{example}.{target}.{switched(*switches)}"
    text, image = "input_ids", "visual_feats"
    assert list(relevance.streams) == [text, image]
    assert_parity(relevance.matrix(text, image)[0], golden("lxmert", f"{key}.R_t_i"))
    assert_parity(text_to_text(relevance.matrix(text, text)), golden("lxmert", f"{key}.R_t_t"))
    if switches == PAPER:
        key = f"{example}.{target}"
        assert_parity(relevance.matrix(image, image)[0], golden("lxmert", f"{key}.ours_R_i_i"))
        assert_parity(relevance.matrix(image, text)[0], golden("lxmert", f"{key}.ours_R_i_t"))


@pytest.mark.parametrize(("example", "target"), LXMERT_CASES)
def test_lxmert_without_aggregation(lxmert_model, example, target) -> None:
    relevance = GenericAttention(lxmert_model, aggregate=False).relevance(
        lxmert_inputs("lxmert", example), lxmert_target("lxmert", example, target)
    )
    key = f"{example}.{target}.no_agg.lrp0.norm0"
    ours = relevance.matrix("input_ids", "visual_feats")[0]
    assert_parity(ours, golden("lxmert", f"{key}.R_t_i"))
    ours = text_to_text(relevance.matrix("input_ids", "input_ids"))
    assert_parity(ours, golden("lxmert", f"{key}.R_t_t"))


@pytest.mark.parametrize(("example", "target"), LXMERT_CASES)
def test_lxmert_all_inputs_in_one_call(lxmert_model, example, target) -> None:
    text, regions, boxes = GenericAttention(lxmert_model).attribute(
        lxmert_inputs("lxmert", example), lxmert_target("lxmert", example, target)
    )
    key = f"{example}.{target}.{switched(*PAPER)}"
    assert_parity(text[0], golden("lxmert", f"{key}.R_t_t")[0])
    for region in (regions, boxes):  # summed into one token, so each has its value
        for feature in region[0].unbind(-1):
            assert_parity(feature, golden("lxmert", f"{key}.R_t_i")[0])


def test_lxmert_the_last_image_layer_does_not_reach_the_answer(lxmert_model) -> None:
    relevance = GenericAttention(lxmert_model).relevance(lxmert_inputs("lxmert", "s0"), 6)
    unused = [call for call in relevance.calls if not call.used]
    assert [call.query_stream for call in unused] == ["visual_feats", "visual_feats"]
    assert {call.reason for call in unused} == {"does not reach the score"}
    assert relevance.rows["input_ids"].tolist() == [[1, 0, 0, 0, 0, 0, 0]]
    assert list(relevance.rows) == ["input_ids"]


def test_lxmert_batch_equals_its_examples(lxmert_model) -> None:
    ids, features, boxes = lxmert_inputs("lxmert", "s0")
    others = ids.flip(1), features * 0.5 - 1, boxes.flip(1)
    method = GenericAttention(lxmert_model)
    batch = tuple(torch.cat(pair) for pair in zip((ids, features, boxes), others, strict=True))
    together = method.attribute(batch, [6, 4])
    for i, (inputs, target) in enumerate((((ids, features, boxes), 6), (others, 4))):
        for ours, alone in zip(together, method.attribute(inputs, target), strict=True):
            assert relative_error(ours[i], alone[0]) <= SAME_NUMBERS


# --- where the authors divide zero by zero


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: switched(*s))
def test_lxmert_where_the_original_gives_nan(switches) -> None:
    """The original's R̄ holds 0/0 where a row of R − I is zero; ours is the identity's row there."""
    normalize, self_in_cross = switches
    model = lxmert_forward(lxmert("lxmert_nan"))
    relevance = GenericAttention(model, normalize=normalize, self_in_cross=self_in_cross).relevance(
        lxmert_inputs("lxmert_nan", "s0"), lxmert_target("lxmert_nan", "s0", "argmax")
    )
    key = f"s0.argmax.{switched(*switches)}"
    pairs = (
        (relevance.matrix("input_ids", "visual_feats")[0], golden("lxmert_nan", f"{key}.R_t_i")),
        (text_to_text(relevance.matrix("input_ids", "input_ids")),
         golden("lxmert_nan", f"{key}.R_t_t")),
    )  # fmt: skip
    for ours, theirs in pairs:
        if switches == PAPER:
            assert theirs.isnan().any()
            assert ours.isfinite().all()
            assert ours.abs().max() > 0
            known = theirs.isfinite()
            assert_parity(ours[known], theirs[known]) if known.any() else None
        else:
            assert_parity(ours, theirs)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: switched(*s))
def test_detr_where_the_original_gives_nan(switches) -> None:
    """The original drops a layer's whole cross-attention as soon as one row is 0/0; ours keeps it.

    `nan_layers` of the golden data says at which layers that happened.
    """
    normalize, self_in_cross = switches
    target = manifest("detr_nan")["targets"]["q2.argmax"]
    ours = GenericAttention(
        detr("detr_nan"), normalize=normalize, self_in_cross=self_in_cross
    ).attribute(
        golden("detr_nan", "input.features"), (target["query"], target["cls"]),
        return_input_shape=False,
    )  # fmt: skip
    theirs = golden("detr_nan", f"q2.argmax.{switched(*switches)}")
    if switches == PAPER:
        assert golden("detr_nan", "q2.argmax.nan_layers").sum() > 0
        assert ours.isfinite().all()
        # What the original dropped is non-negative, and here it is not nothing.
        assert (ours.flatten() >= theirs - 1e-12).all()
        assert (ours.flatten() - theirs).max() > 1e-6 * ours.max()
    else:
        assert_parity(ours.flatten(), theirs)


def test_detr_where_the_original_gives_nan_other_keys() -> None:
    """What does not divide is equal: logits, no aggregation, `R^{qq}` and `R^{ii}`."""
    target = manifest("detr_nan")["targets"]["q2.argmax"]
    model, features = detr("detr_nan"), golden("detr_nan", "input.features")
    assert relative_error(model(features)[0], golden("detr_nan", "pred_logits")) <= TOLERANCE
    explained = target["query"], target["cls"]
    ours = GenericAttention(model, aggregate=False).attribute(
        features, explained, return_input_shape=False
    )
    assert_parity(ours.flatten(), golden("detr_nan", "q2.argmax.no_agg.lrp0.norm0"))
    relevance = GenericAttention(model).relevance(features, explained)
    queries = QUERIES["torch"]
    (image,) = (name for name in relevance.streams if name != queries)
    for name, stream in (("R_q_q", queries), ("R_i_i", image)):
        theirs = golden("detr_nan", f"q2.argmax.ours_full.{name}")
        assert_parity(relevance.matrix(stream, stream)[0], theirs)
    across = relevance.matrix(queries, image)[0]
    assert across.isfinite().all()
    assert (across >= golden("detr_nan", "q2.argmax.ours_full.R_q_i") - 1e-12).all()


def test_lxmert_nan_loads_the_golden_weights() -> None:
    logits = lxmert_forward(lxmert("lxmert_nan"))(*lxmert_inputs("lxmert_nan", "s0"))[0]
    assert relative_error(logits, golden("lxmert_nan", "s0.logits")) <= TOLERANCE


# --- DETR: encoder and decoder, queries that are parameters

DETR_CASES = ["q1.argmax", "q4.class2"]


@pytest.fixture(scope="module", params=["torch", "hf-eager", "hf-sdpa"])
def detr_model(request):
    if request.param == "torch":
        return detr("detr"), QUERIES["torch"], TOLERANCE
    return hf_detr("detr", request.param[3:]), QUERIES["hf"], HF_DETR


def detr_target(case: str) -> tuple[int, int]:
    target = manifest("detr")["targets"][case]
    return target["query"], target["cls"]


def test_detr_loads_the_golden_weights(detr_model) -> None:
    model, _, tolerance = detr_model
    logits = model(golden("detr", "input.features"))[0]
    assert relative_error(logits, golden("detr", "pred_logits")) <= tolerance


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: switched(*s))
@pytest.mark.parametrize("case", DETR_CASES)
def test_detr_with_every_switch(detr_model, case, switches) -> None:
    model, _, tolerance = detr_model
    normalize, self_in_cross = switches
    ours = GenericAttention(model, normalize=normalize, self_in_cross=self_in_cross).attribute(
        golden("detr", "input.features"), detr_target(case), return_input_shape=False
    )
    assert ours.shape == (1, 4, 4)
    assert_parity(ours.flatten(), golden("detr", f"{case}.{switched(*switches)}"), tolerance)


@pytest.mark.parametrize("case", DETR_CASES)
def test_detr_without_aggregation(detr_model, case) -> None:
    model, _, tolerance = detr_model
    ours = GenericAttention(model, aggregate=False).attribute(
        golden("detr", "input.features"), detr_target(case), return_input_shape=False
    )
    assert_parity(ours.flatten(), golden("detr", f"{case}.no_agg.lrp0.norm0"), tolerance)


@pytest.mark.parametrize("case", DETR_CASES)
def test_detr_full_matrices(detr_model, case) -> None:
    model, queries, tolerance = detr_model
    relevance = GenericAttention(model).relevance(
        golden("detr", "input.features"), detr_target(case)
    )
    (image,) = (name for name in relevance.streams if name != queries)
    assert list(relevance.rows) == [queries]
    row = detr_target(case)[0]
    assert relevance.rows[queries].tolist() == [[float(q == row) for q in range(6)]]
    for name, matrix in (
        ("R_q_i", relevance.matrix(queries, image)),
        ("R_q_q", relevance.matrix(queries, queries)),
        ("R_i_i", relevance.matrix(image, image)),
    ):
        assert_parity(matrix[0], golden("detr", f"{case}.ours_full.{name}"), tolerance)
    assert relevance.matrix(image, queries).abs().max() == 0


def test_detr_batch_equals_its_examples(detr_model) -> None:
    model, _, _ = detr_model
    one = golden("detr", "input.features")
    method = GenericAttention(model)
    together = method.attribute(torch.cat([one, -one.flip(2)]), [(1, 3), (4, 2)])
    for i, (features, target) in enumerate(((one, (1, 3)), (-one.flip(2), (4, 2)))):
        assert relative_error(together[i], method.attribute(features, target)[0]) <= SAME_NUMBERS


# --- VisualBERT: one stream of text and regions


@pytest.fixture(scope="module")
def visualbert_model():
    return visualbert_forward(visualbert())


@pytest.mark.parametrize("target", ["argmax", "class3", "class7"])
@pytest.mark.parametrize("example", ["s0", "s1"])
def test_visualbert_gives_text_and_regions_their_own_slices(
    visualbert_model, example, target
) -> None:
    entry = manifest("visualbert")["inputs"][example]
    ids, mask, regions = (
        golden("visualbert", entry[key]) for key in ("input_ids", "input_mask", "visual_embeds")
    )
    words = entry["n_text"]
    logits = visualbert_model(ids[:, :words], regions, mask[:, :words])[0]
    assert relative_error(logits, golden("visualbert", f"{example}.logits")) <= TOLERANCE
    row = entry["cls_index"]  # the "?", from which the head reads the answer
    index = manifest("visualbert")["targets"][example][target]
    theirs = golden("visualbert", f"{example}.{target}.ours")
    text, image = GenericAttention(visualbert_model).attribute(
        (ids[:, :words], regions), index, mask[:, :words]
    )
    assert_parity(text[0], theirs[:words])
    assert text[0, row] == 0
    for feature in image[0].unbind(-1):
        assert_parity(feature, theirs[words:])
    relevance = GenericAttention(visualbert_model).relevance(
        (ids[:, :words], regions), index, mask[:, :words]
    )
    (stream,) = relevance.streams
    assert stream == "input_ids+visual_embeds"
    assert relevance.rows[stream].argmax() == row
    across = relevance.matrix("input_ids", "visual_embeds")[0, row]
    assert_parity(across, theirs[words:])
