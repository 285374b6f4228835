"""Parity with the numbers of the authors' own code, through public model classes, unmodified.

All in float64. `tests/parity/golden/README.md` says where the numbers come from.
"""

import pytest
import torch
import torch.nn.functional as F

from captum_generic_attn import GenericAttention
from captum_generic_attn.relevance.equations import average_heads
from parity.golden_models import bert, golden, hf_clip, manifest, open_clip, relative_error, vit

TOLERANCE = 1e-7
STORED_AS_FLOAT32 = 1e-6
HF_CLIP = 1e-5  # parts of it compute in float32 whatever the model's dtype
SAME_NUMBERS = 1e-12

TARGETS = ("argmax", "class5", "class0")


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "eager"])
def vit_model(request):
    return vit(fused=request.param)


@pytest.fixture(scope="module")
def images():
    return golden("vit", "input.image")


def vit_target(image: int, name: str) -> int:
    return manifest("vit")["targets"][f"img{image}"][name]


def test_vit_loads_the_golden_weights(vit_model, images):
    logits = vit_model(images)
    for image in (0, 1):
        theirs = golden("vit", f"img{image}.logits")
        assert relative_error(logits[image], theirs) <= TOLERANCE
        assert logits[image].argmax() == vit_target(image, "argmax")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("image", [0, 1])
def test_vit_one_image(vit_model, images, image, name):
    ours = GenericAttention(vit_model).attribute(
        images[image : image + 1], target=vit_target(image, name), return_input_shape=False
    )
    assert ours.shape == (1, 4, 4)
    assert ours.dtype == torch.float64
    assert relative_error(ours.flatten(), golden("vit", f"img{image}.{name}.ours")) <= TOLERANCE


@pytest.mark.parametrize("name", TARGETS)
def test_vit_batch(vit_model, images, name):
    targets = [vit_target(image, name) for image in (0, 1)]
    method = GenericAttention(vit_model)
    ours = method.attribute(images, target=targets, return_input_shape=False)
    for image in (0, 1):
        theirs = golden("vit", f"img{image}.{name}.ours")
        assert relative_error(ours[image].flatten(), theirs) <= TOLERANCE
        single = method.attribute(
            images[image : image + 1], target=targets[image], return_input_shape=False
        )
        assert relative_error(ours[image], single[0]) <= SAME_NUMBERS


def test_vit_all_targets_in_one_forward(vit_model, images):
    targets = [[vit_target(0, name), vit_target(1, name)] for name in TARGETS]
    ours = GenericAttention(vit_model).attribute_targets(images, targets, return_input_shape=False)
    assert ours.shape == (3, 2, 4, 4)
    for row, name in zip(ours, TARGETS, strict=True):
        for image in (0, 1):
            theirs = golden("vit", f"img{image}.{name}.ours")
            assert relative_error(row[image].flatten(), theirs) <= TOLERANCE


def test_vit_maps_of_each_call(vit_model, images):
    relevance = GenericAttention(vit_model).relevance(
        images[:1], target=vit_target(0, "argmax"), keep_calls=True
    )
    assert len(relevance.calls) == 3
    for layer, call in enumerate(relevance.calls):
        attention = golden("vit", f"img0.argmax.attn.layer{layer}")
        gradient = golden("vit", f"img0.argmax.attn_grad.layer{layer}")
        theirs = average_heads(attention, gradient)
        assert relative_error(call.map[0], theirs) <= STORED_AS_FLOAT32
        assert call.heads == 4
        assert relative_error(call.per_head[0].mean(0), theirs) <= STORED_AS_FLOAT32


@pytest.mark.parametrize("name", TARGETS)
def test_vit_matrix_holds_the_row(vit_model, images, name):
    relevance = GenericAttention(vit_model).relevance(images[1:], target=vit_target(1, name))
    matrix = relevance.matrix("x", "x")
    assert matrix.shape == (1, 17, 17)
    assert relative_error(matrix[0, 0, 1:], golden("vit", f"img1.{name}.ours")) <= TOLERANCE


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_vit_picture_is_the_interpolated_golden_map(vit_model, images, mode):
    theirs = golden("vit", "img0.class5.ours").reshape(1, 1, 4, 4)
    options = {"align_corners": False} if mode == "bilinear" else {}
    expected = F.interpolate(theirs, size=(32, 32), mode=mode, **options)
    ours = GenericAttention(vit_model, interpolation=mode).attribute(images[:1], target=5)
    assert ours.shape == images[:1].shape
    for channel in range(3):
        assert relative_error(ours[:, channel : channel + 1], expected) <= TOLERANCE


def test_interpolation_is_bilinear_unless_told(vit_model, images):
    ours = GenericAttention(vit_model).attribute(images, target=0)
    bilinear = GenericAttention(vit_model, interpolation="bilinear").attribute(images, target=0)
    nearest = GenericAttention(vit_model, interpolation="nearest").attribute(images, target=0)
    assert torch.equal(ours, bilinear)
    assert relative_error(ours, nearest) > 1e-2


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def bert_model(request):
    return bert(request.param)


def sentence(name: str):
    return golden("bert", f"input.{name}.input_ids"), golden("bert", f"input.{name}.attention_mask")


def padded_batch():
    """Both sentences, the shorter one padded to the length of the longer."""
    ids, mask = sentence("s0")
    longer_ids, longer_mask = sentence("s1")
    padding = (0, longer_ids.shape[1] - ids.shape[1])
    return (
        torch.cat([F.pad(ids, padding), longer_ids]),
        torch.cat([F.pad(mask, padding), longer_mask]),
    )


@pytest.mark.parametrize("name", ["s0", "s1"])
def test_bert_loads_the_golden_weights(bert_model, name):
    ids, mask = sentence(name)
    logits = bert_model(ids, mask).logits[0]
    assert relative_error(logits, golden("bert", f"{name}.logits")) <= TOLERANCE
    assert logits.argmax() == manifest("bert")["targets"][name]["argmax"]


@pytest.mark.parametrize("target", ["argmax", "class0", "class1"])
@pytest.mark.parametrize("name", ["s0", "s1"])
def test_bert(bert_model, name, target):
    ids, mask = sentence(name)
    theirs = golden("bert", f"{name}.{target}.ours.R")
    index = manifest("bert")["targets"][name][target]
    method = GenericAttention(bert_model)

    relevance = method.relevance(ids, target=index, additional_forward_args=(mask,))
    matrix = relevance.matrix("input_ids", "input_ids")
    assert relative_error(matrix[0], theirs) <= TOLERANCE
    assert relevance.rows["input_ids"].tolist() == [[1.0] + [0.0] * (ids.shape[1] - 1)]

    row = theirs[0].clone()
    row[0] = 0
    ours = method.attribute(ids, target=index, additional_forward_args=(mask,))
    assert ours.shape == ids.shape
    assert ours.dtype == torch.float64
    assert relative_error(ours[0], row) <= TOLERANCE
    tokens = method.attribute(
        ids, target=index, additional_forward_args=(mask,), return_input_shape=False
    )
    assert torch.equal(tokens, ours)


def test_bert_padding_gets_nothing(bert_model):
    ids, mask = sentence("s1")
    assert mask[0, -3:].tolist() == [0, 0, 0]
    ours = GenericAttention(bert_model).attribute(ids, target=1, additional_forward_args=(mask,))
    assert ours[0, -3:].tolist() == [0.0, 0.0, 0.0]
    assert (ours[0, 1:-3] > 0).all()


@pytest.mark.parametrize("target", [0, 1])
def test_bert_batch(bert_model, target):
    ids, mask = padded_batch()
    method = GenericAttention(bert_model)
    ours = method.attribute(ids, target=target, additional_forward_args=(mask,))
    for index, name in enumerate(["s0", "s1"]):
        one = slice(index, index + 1)
        single = method.attribute(ids[one], target=target, additional_forward_args=(mask[one],))
        assert relative_error(ours[one], single) <= SAME_NUMBERS
        theirs = golden("bert", f"{name}.class{target}.ours.R")[0]
        theirs[0] = 0
        assert relative_error(ours[index, : len(theirs)], theirs) <= TOLERANCE
        assert (ours[index, len(theirs) :] == 0).all()


def open_clip_pairs():
    model = open_clip()

    def pairs(image, text):
        return model.get_logits(image, text)[0].diagonal()

    return pairs


def hf_pairs(implementation: str):
    model = hf_clip(implementation)

    def pairs(image, text):
        return model(input_ids=text, pixel_values=image).logits_per_image.diagonal()

    return pairs


@pytest.fixture(scope="module", params=["open_clip", "hf-sdpa", "hf-eager"])
def clip(request):
    """The paired logits of one CLIP implementation, and the tolerance that it allows."""
    if request.param == "open_clip":
        return open_clip_pairs(), TOLERANCE
    return hf_pairs(request.param.removeprefix("hf-")), HF_CLIP


def clip_inputs(*images: int):
    """Each of the images repeated for every text, beside the texts."""
    pixels, texts = golden("clip", "input.image"), golden("clip", "input.texts")
    return (
        torch.cat([pixels[image].expand(len(texts), -1, -1, -1) for image in images]),
        texts.repeat(len(images), 1),
    )


@pytest.mark.parametrize("image", [0, 1])
def test_clip_loads_the_golden_weights(clip, image):
    pairs, tolerance = clip
    theirs = golden("clip", f"img{image}.logits_per_image")[0]
    assert relative_error(pairs(*clip_inputs(image)), theirs) <= tolerance


@pytest.mark.parametrize("start_layer", [-1, 0, 1])
@pytest.mark.parametrize("image", [0, 1])
def test_clip_both_towers_in_one_call(clip, image, start_layer):
    pairs, tolerance = clip
    image_map, text_map = GenericAttention(pairs, start_layer=start_layer).attribute(
        clip_inputs(image), return_input_shape=False
    )
    assert image_map.shape == (3, 4, 4)
    assert text_map.shape == (3, 12)
    prefix = f"img{image}.start{start_layer}"
    theirs = golden("clip", f"{prefix}.image_relevance")
    assert relative_error(image_map.flatten(1), theirs) <= tolerance
    matrices = golden("clip", f"{prefix}.R_text")
    for text, end in enumerate(manifest("clip")["eos_index"]):
        words = text_map[text, 1:end]
        heatmap = golden("clip", f"{prefix}.text{text}.heatmap")
        assert relative_error(words / words.sum(), heatmap) <= tolerance
        row = matrices[text, end].clone()
        row[end] = 0
        assert relative_error(text_map[text], row) <= tolerance


@pytest.mark.parametrize("start_layer", [-1, 0, 1])
@pytest.mark.parametrize("image", [0, 1])
def test_clip_matrices(clip, image, start_layer):
    pairs, tolerance = clip
    relevance = GenericAttention(pairs, start_layer=start_layer).relevance(clip_inputs(image))
    prefix = f"img{image}.start{start_layer}"
    theirs = golden("clip", f"{prefix}.R_text")
    assert relative_error(relevance.matrix("text", "text"), theirs) <= tolerance
    row = relevance.matrix("image", "image")[:, 0, 1:]
    assert relative_error(row, golden("clip", f"{prefix}.image_relevance")) <= tolerance


def test_clip_explains_the_class_token_and_the_end_of_text(clip):
    pairs, _ = clip
    rows = GenericAttention(pairs).relevance(clip_inputs(0)).rows
    assert set(rows) == {"image", "text"}
    assert rows["image"].argmax(1).tolist() == [0, 0, 0]
    assert rows["text"].argmax(1).tolist() == manifest("clip")["eos_index"]
    for weights in rows.values():
        assert weights.amax(1).tolist() == [1.0, 1.0, 1.0]
        assert weights.sum(1).tolist() == [1.0, 1.0, 1.0]


def test_clip_full_shape(clip):
    pairs, tolerance = clip
    inputs = clip_inputs(0)
    image_map, text_map = GenericAttention(pairs).attribute(inputs)
    assert image_map.shape == inputs[0].shape
    assert text_map.shape == inputs[1].shape
    theirs = golden("clip", "img0.start0.image_relevance").reshape(3, 1, 4, 4)
    expected = F.interpolate(theirs, size=(32, 32), mode="bilinear", align_corners=False)
    assert relative_error(image_map, expected.expand_as(image_map)) <= tolerance


def test_clip_batch_of_both_images(clip):
    pairs, tolerance = clip
    method = GenericAttention(pairs)
    together = method.attribute(clip_inputs(0, 1), return_input_shape=False)
    for image in (0, 1):
        alone = method.attribute(clip_inputs(image), return_input_shape=False)
        for whole, part in zip(together, alone, strict=True):
            # The same examples in another batch; Hugging Face's float32 parts round otherwise.
            limit = SAME_NUMBERS if tolerance == TOLERANCE else tolerance
            assert relative_error(whole[3 * image : 3 * image + 3], part) <= limit
        theirs = golden("clip", f"img{image}.start0.image_relevance")
        assert relative_error(together[0][3 * image :][:3].flatten(1), theirs) <= tolerance


def test_clip_single_pair_equals_its_row_of_the_batch():
    method = GenericAttention(open_clip_pairs())
    inputs = clip_inputs(0)
    together = method.attribute(inputs, return_input_shape=False)
    for index in range(3):
        one = slice(index, index + 1)
        alone = method.attribute((inputs[0][one], inputs[1][one]), return_input_shape=False)
        for whole, part in zip(together, alone, strict=True):
            assert relative_error(whole[one], part) <= SAME_NUMBERS
