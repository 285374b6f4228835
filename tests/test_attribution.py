"""The options and methods of `GenericAttention`: each as a law, on small models in float64."""

import functools

import pytest
import torch
from helpers.tiny_models import pictures, sentences, slow_relevance, tiny_text, tiny_vit, two_towers

from captum_generic_attn import GenericAttention


def close(ours, expected, limit: float = 1e-12) -> bool:
    assert ours.shape == expected.shape
    assert expected.abs().max() > 0
    return bool((ours - expected).abs().max() <= limit * expected.abs().max())


def tokens(model, inputs, target=1, **options):
    return GenericAttention(model, **options).attribute(inputs, target, return_input_shape=False)


def matrix(model, inputs, target=1, **options):
    return GenericAttention(model, **options).relevance(inputs, target).matrix("x", "x")


# --- attribute_targets


TARGETS = {
    "ints": [0, 3, 1, 1],
    "tensor": torch.tensor([4, 0]),
    "per example": [[0, 1], torch.tensor([2, 3]), [(4,), (0,)], (2,), torch.tensor(1)],
    "one": (2,),
}


@pytest.mark.parametrize("form", TARGETS)
def test_attribute_targets_equals_stacked_calls(form):
    method, targets = GenericAttention(tiny_vit()), TARGETS[form]
    full = form != "ints"
    ours = method.attribute_targets(pictures(), targets, return_input_shape=full)
    expected = torch.stack(
        [method.attribute(pictures(), t, return_input_shape=full) for t in targets]
    )
    assert ours.shape == (len(targets), *expected.shape[1:])
    assert ours.is_contiguous()
    assert close(ours, expected)


def test_attribute_targets_runs_one_forward():
    model, count = tiny_vit(), []
    model.register_forward_hook(lambda *_: count.append(1))
    GenericAttention(model).attribute_targets(pictures(), [0, 1, 2, 3, 4])
    assert len(count) == 1


def test_attribute_targets_of_several_inputs():
    method = GenericAttention(two_towers("classes"))
    inputs = (pictures(3), sentences())
    ours = method.attribute_targets(inputs, [2, [0, 1, 3]])
    assert isinstance(ours, tuple)
    for index, target in enumerate([2, [0, 1, 3]]):
        for mine, its in zip(ours, method.attribute(inputs, target), strict=True):
            assert close(mine[index], its)
    alone = method.attribute_targets((inputs[0], inputs[1]), [2], return_input_shape=False)
    assert [tuple(part.shape) for part in alone] == [(1, 3, 4, 4), (1, 3, 6)]
    (wrapped,) = GenericAttention(tiny_vit()).attribute_targets((pictures(),), [1, 2])
    assert wrapped.shape == (2, 2, 3, 32, 32)


def test_attribute_targets_of_queries_with_rows_of_their_own():
    """Different targets may be read from different rows."""
    method = GenericAttention(tiny_text("tokens"))
    targets = [(0, 1), (3, 2), [(0, 0), (1, 1), (2, 2)]]
    ours = method.attribute_targets(sentences(), targets)
    for mine, target in zip(ours, targets, strict=True):
        assert close(mine, method.attribute(sentences(), target))


def test_attribute_targets_with_the_rest():
    model = tiny_text()
    gain = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)

    def forward(input_ids, factor):
        return model(input_ids) * factor

    method = GenericAttention(forward)
    ours = method.attribute_targets(sentences(), [0, 2], additional_forward_args=gain)
    assert close(ours[1], method.attribute(sentences(), 2, gain))
    assert not torch.equal(ours[1], GenericAttention(model).attribute(sentences(), 2))


# --- layers and start_layer


def test_start_layer_keeps_the_later_calls():
    model = tiny_vit(depth=3)
    maps = [
        call.map for call in GenericAttention(model).relevance(pictures(), 1, keep_calls=True).calls
    ]
    eye = torch.eye(17, dtype=torch.float64)
    for start_layer, first in ((0, 0), (1, 1), (2, 2), (-1, 2), (-2, 1), (-3, 0)):
        expected = eye.expand(2, -1, -1)
        for averaged in maps[first:]:
            expected = expected + averaged @ expected
        assert close(matrix(model, pictures(), start_layer=start_layer), expected)
        ours = tokens(model, pictures(), start_layer=start_layer)
        assert close(ours.flatten(1), expected[:, 0, 1:])


def test_layers_by_name_prefix_and_module():
    model = tiny_vit(depth=3)
    expected = tokens(model, pictures(), start_layer=1)
    for layers in (
        ["blocks.1", "blocks.2"],
        ["blocks.1.attn", "blocks.2"],
        [model.blocks[1], model.blocks[2].attn],
        [model.blocks[1], "blocks.2"],
        ("blocks.2", "blocks.1"),
    ):
        assert torch.equal(tokens(model, pictures(), layers=layers), expected)
    for layers in (["blocks"], [model], None, ["blocks.0", "blocks"]):
        assert torch.equal(tokens(model, pictures(), layers=layers), tokens(model, pictures()))
    assert not torch.equal(tokens(model, pictures()), expected)


def test_a_name_prefix_ends_at_a_dot():
    """`blocks.1` is not `blocks.10`."""
    model = tiny_vit(depth=11, embed_dim=8)
    relevance = GenericAttention(model, layers=["blocks.1"]).relevance(pictures(1), 1)
    assert [call.index for call in relevance.calls if call.used] == [1]


def test_start_layer_counts_among_the_selected_layers():
    model = tiny_vit(depth=4)
    ours = GenericAttention(model, layers=["blocks.1", "blocks.2", "blocks.3"], start_layer=1)
    calls = ours.relevance(pictures(1), 1).calls
    assert [call.used for call in calls] == [False, False, True, True]


def test_start_layer_counts_for_each_tower():
    method = GenericAttention(two_towers(), start_layer=1)
    calls = method.relevance((pictures(3), sentences())).calls
    assert [call.used for call in calls] == [False, True, False, True, True]


def test_explained_rows_do_not_depend_on_the_layers():
    """Of the last call the CLS row alone has a gradient, of the first call every row."""
    for options in ({}, {"layers": ["blocks.0"]}, {"start_layer": 1}):
        rows = GenericAttention(tiny_vit(), **options).relevance(pictures(), 1).rows["x"]
        assert rows.tolist() == [[1.0] + [0.0] * 16] * 2


# --- forward functions


class Owner:
    """Something that holds a model and is no module itself."""

    def __init__(self, model):
        self.model = model

    def scores(self, x, scale=1.0):
        return self.model(x) * scale


def test_forward_func_in_every_form():
    model = tiny_vit()
    expected = tokens(model, pictures())
    owner = Owner(model)

    def closure(x):
        return model(x)

    forms = {
        "forward": model.forward,
        "closure": closure,
        "bound method": owner.scores,
        "partial": functools.partial(owner.scores, scale=1.0),
        "partial of a module": functools.partial(model.forward),
        "wrapped": torch.nn.Sequential(model),
    }
    for name, form in forms.items():
        assert torch.equal(tokens(form, pictures()), expected), name


def test_layers_work_for_closures():
    model = tiny_vit()
    expected = tokens(model, pictures(), layers=["blocks.1"])

    def closure(x):
        return model(x)

    for form in (closure, Owner(model).scores, functools.partial(Owner(model).scores, scale=1.0)):
        assert torch.equal(tokens(form, pictures(), layers=[model.blocks[1]]), expected)
        assert torch.equal(tokens(form, pictures(), layers=["blocks.1"]), expected)


# --- rows


def test_one_row():
    model = tiny_vit()
    whole = matrix(model, pictures())
    for rows in (5, -12, [5], torch.tensor([5, 5]), torch.tensor([[5], [5]]), {"x": 5}):
        relevance = GenericAttention(model, rows=rows).relevance(pictures(), 1)
        assert relevance.rows["x"].argmax(1).tolist() == [5, 5]
        assert torch.equal(relevance.matrix("x", "x"), whole)
        ours = tokens(model, pictures(), rows=rows).flatten(1)
        expected = whole[:, 5].clone()
        expected[:, 5] = 0
        assert close(ours, expected[:, 1:])


def test_rows_that_differ_between_examples():
    model = tiny_vit()
    ours = tokens(model, pictures(), rows=torch.tensor([3, 8])).flatten(1)
    whole = matrix(model, pictures())
    for example, row in enumerate([3, 8]):
        expected = whole[example, row].clone()
        expected[row] = 0
        assert close(ours[example], expected[1:])


@pytest.mark.parametrize("rows", [[3, 8], torch.tensor([[3, 8], [3, 8]]), [3, -9], {"x": [3, 8]}])
def test_several_rows_weigh_the_same(rows):
    """The mean of R - I over the rows, nothing zeroed."""
    model = tiny_vit()
    without = matrix(model, pictures()) - torch.eye(17, dtype=torch.float64)
    ours = tokens(model, pictures(), rows=rows).flatten(1)
    assert close(ours, without[:, [3, 8]].mean(1)[:, 1:])


def test_weights_for_rows():
    model = tiny_vit()
    weights = torch.zeros(2, 17, dtype=torch.float64)
    weights[0, 2], weights[0, 7], weights[1, 9] = 0.25, 0.75, 1.0
    without = matrix(model, pictures()) - torch.eye(17, dtype=torch.float64)
    expected = torch.einsum("bn,bnm->bm", weights, without)
    expected[1, 9] = 0  # one explained row: its own entry
    assert close(tokens(model, pictures(), rows=weights).flatten(1), expected[:, 1:])
    relevance = GenericAttention(model, rows=weights).relevance(pictures(), 1)
    assert (relevance.rows["x"] - weights).abs().max() <= 1e-12


def test_rows_of_one_tower():
    """A mapping may name some streams; the others keep the rows found from the gradient."""
    inputs = (pictures(3), sentences())
    plain = GenericAttention(two_towers()).attribute(inputs, return_input_shape=False)
    method = GenericAttention(two_towers(), rows={"input_ids": 2})
    relevance = method.relevance(inputs)
    assert relevance.rows["pixels"].argmax(1).tolist() == [0, 0, 0]
    assert relevance.rows["input_ids"].argmax(1).tolist() == [2, 2, 2]
    image_map, text_map = method.attribute(inputs, return_input_shape=False)
    assert torch.equal(image_map, plain[0])
    expected = relevance.matrix("input_ids", "input_ids")[:, 2].clone()
    expected[:, 2] = 0
    assert close(text_map, expected)


# --- the own entry of the only explained row


@pytest.mark.parametrize("own", ["zero", "keep"])
@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (None, [[2]] * 3),
        (4, [[4]] * 3),
        ([4, 1], [[4, 1]] * 3),
        (torch.tensor([3, 0, 5]), [[3], [0], [5]]),
    ],
)
def test_own_entry_in_loops(own, rows, chosen):
    """R − I of eq. 6 in loops; 0 for the token of an example's only row, or its value."""
    model = tiny_text("tokens", eager=True, depth=3)
    whole = slow_relevance(model, sentences(), lambda output: output[:, 2, 1])[0].detach()
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for example, its in enumerate(chosen):
        for row in its:
            for token in range(6):
                value = whole[example, row, token] - int(row == token)
                if own == "zero" and len(its) == 1 and row == token:
                    value = 0
                expected[example, token] += value / len(its)
    method = GenericAttention(model, rows=rows, own=own)
    assert close(method.attribute(sentences(), (2, 1)), expected)
    relevance = method.relevance(sentences(), (2, 1))
    assert close(relevance.matrix("input_ids", "input_ids"), whole)


def test_own_entry_of_examples_with_one_row_and_with_two():
    model = tiny_text("tokens", eager=True)
    weights = torch.zeros(3, 6, dtype=torch.float64)
    weights[0, 1], weights[1, [1, 2]], weights[2, 5] = 1, 0.5, 1
    zero, keep = (
        GenericAttention(model, rows=weights, own=own).attribute(sentences(), (2, 1))
        for own in ("zero", "keep")
    )
    assert ((keep != zero).nonzero().tolist()) == [[0, 1], [2, 5]]
    whole = slow_relevance(model, sentences(), lambda output: output[:, 2, 1])[0].detach()
    expected = (weights.unsqueeze(1) @ (whole - torch.eye(6, dtype=torch.float64))).squeeze(1)
    assert close(keep, expected)


def test_own_entry_without_aggregation():
    model = tiny_text("tokens", eager=True)
    _, maps = slow_relevance(model, sentences(), lambda output: output[:, 2, 1])
    expected = (maps[1] @ maps[0])[:, 2]
    ours = GenericAttention(model, aggregate=False, own="keep").attribute(sentences(), (2, 1))
    assert close(ours, expected)


@pytest.mark.parametrize("own", ["row_min", "", None, 0, ["keep"]])
def test_own_of_no_choice(own):
    with pytest.raises(ValueError, match=r"own=.* is none of \('zero', 'keep'\)$") as caught:
        GenericAttention(tiny_vit(), own=own)
    assert repr(own) in str(caught.value)


# --- aggregation and the switches of two streams


def test_without_aggregation():
    """Every `+=` becomes `=`: the product of the maps; the own entry is 0."""
    model = tiny_text("tokens", eager=True)
    _, maps = slow_relevance(model, sentences(), lambda output: output[:, 2, 1])
    expected = maps[1] @ maps[0]
    method = GenericAttention(model, aggregate=False)
    relevance = method.relevance(sentences(), target=(2, 1))
    assert close(relevance.matrix("input_ids", "input_ids"), expected)
    row = expected[:, 2].clone()
    row[:, 2] = 0
    assert close(method.attribute(sentences(), target=(2, 1)), row)


@pytest.mark.parametrize("option", ["normalize", "self_in_cross"])
def test_switches_of_cross_attention_change_nothing_here(option):
    expected = tokens(tiny_vit(), pictures())
    for value in (True, False):
        assert torch.equal(tokens(tiny_vit(), pictures(), **{option: value}), expected)


# --- geometry


def test_picture_that_is_not_square():
    model = tiny_vit(img_size=(24, 40))
    inputs = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    ours = tokens(model, inputs)
    assert ours.shape == (2, 3, 5)
    assert close(ours.flatten(1), matrix(model, inputs)[:, 0, 1:])
    whole = GenericAttention(model, interpolation="nearest").attribute(inputs, 1)
    cells = ours.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(whole, cells[:, None].expand_as(whole))


def test_picture_larger_than_its_patches():
    """The rest that the stride leaves at an edge was read by nothing, and gets nothing."""
    model = tiny_vit(img_size=(36, 37))
    inputs = torch.randn(1, 3, 36, 37, dtype=torch.float64)
    ours = tokens(model, inputs)
    assert ours.shape == (1, 4, 4)
    smooth = GenericAttention(model).attribute(inputs, 1)
    alone = GenericAttention(tiny_vit()).attribute(inputs[..., :32, :32], 1)
    assert close(smooth, torch.nn.functional.pad(alone, (0, 5, 0, 4)))
    whole = GenericAttention(model, interpolation="nearest").attribute(inputs, 1)
    assert whole.shape == inputs.shape
    assert torch.equal(
        whole[0, 0, :32, :32], ours[0].repeat_interleave(8, 0).repeat_interleave(8, 1)
    )
    assert not whole[0, 0, 32:].any()
    assert not whole[0, 0, :, 32:].any()


def test_text_ids_one_to_one():
    model = tiny_text()
    full = GenericAttention(model).attribute(sentences(), 1)
    assert full.shape == (3, 6)
    assert torch.equal(full, tokens(model, sentences()))
    assert full[:, 0].tolist() == [0.0, 0.0, 0.0]  # the explained token's own entry
    assert (full[:, 1:] >= 0).all()


def test_words_that_the_model_cuts_off_get_nothing():
    model = tiny_text()
    ours = GenericAttention(lambda input_ids: model(input_ids[:, :4])).attribute(sentences(), 1)
    expected = GenericAttention(model).attribute(sentences()[:, :4], 1)
    assert close(ours[:, :4], expected)
    assert not ours[:, 4:].any()


def test_words_in_another_order():
    model = tiny_text()
    ours = GenericAttention(lambda input_ids: model(input_ids.flip(1))).attribute(sentences(), 1)
    assert close(ours.flip(1), GenericAttention(model).attribute(sentences().flip(1), 1))


FRAMES = {
    "mirrored": (lambda x: x.flip(-1), lambda heat: heat.flip(-1)),
    "transposed": (lambda x: x.mT, lambda heat: heat.mT),
    "turned": (lambda x: torch.rot90(x, 1, (2, 3)), lambda heat: torch.rot90(heat, -1, (2, 3))),
    "scaled": (lambda x: (x - 0.5) / 0.25, lambda heat: heat),
}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_picture_that_the_model_turns(frame, interpolation):
    """The map lies on the picture as it was given, whatever the model does with it first."""
    forth, back = FRAMES[frame]
    model = tiny_vit()
    ours = GenericAttention(lambda x: model(forth(x)), interpolation=interpolation).attribute(
        pictures(), 1
    )
    expected = GenericAttention(model, interpolation=interpolation).attribute(forth(pictures()), 1)
    assert close(ours, back(expected))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_two_crops_of_one_picture(interpolation):
    """Two passes over two halves: each half gets its own map, none of the other's."""
    model = tiny_vit()

    def forward(x):
        return model(x[..., :32]) + model(x[..., 32:])

    halves = pictures(), pictures(seed=6)
    whole = torch.cat(halves, -1)
    method = GenericAttention(forward, interpolation=interpolation)
    ours = method.attribute(whole, 1)
    alone = GenericAttention(model, interpolation=interpolation)
    assert close(ours, torch.cat([alone.attribute(half, 1) for half in halves], -1))
    side_by_side = torch.cat([tokens(model, half) for half in halves], -1)
    assert close(method.attribute(whole, 1, return_input_shape=False), side_by_side)


def test_two_crops_that_overlap():
    """What both read gets both; their tokens have no grid together."""
    model = tiny_vit()
    whole = torch.cat([pictures(), pictures(seed=6)], -1)
    method = GenericAttention(lambda x: model(x[..., :32]) + model(x[..., 28:60]))
    pad, alone = torch.nn.functional.pad, GenericAttention(model)
    expected = pad(alone.attribute(whole[..., :32], 1), (0, 32)) + pad(
        alone.attribute(whole[..., 28:60], 1), (28, 4)
    )
    assert close(method.attribute(whole, 1), expected)
    with pytest.raises(ValueError, match="grids"):
        method.attribute(whole, 1, return_input_shape=False)


def test_a_picture_and_its_mirror():
    """Two passes over the same places: their maps add up."""
    model = tiny_vit()
    method = GenericAttention(lambda x: model(x) + model(x.flip(-1)))
    alone = GenericAttention(model)
    expected = (
        alone.attribute(pictures(), 1) + alone.attribute(pictures().flip(-1), 1).flip(-1)
    )  # fmt: skip
    assert close(method.attribute(pictures(), 1), expected)
    ours = method.attribute(pictures(), 1, return_input_shape=False)
    once = tokens(model, pictures()) + tokens(model, pictures().flip(-1)).flip(-1)
    assert close(ours, once)


def test_one_tensor_for_two_inputs():
    """An object that is given twice is one input: both places get all that its tokens gave.

    Self-attention is called with one tensor for queries, keys and values; as three tensors they
    would be three streams.
    """
    one, other = tiny_vit(), tiny_vit(seed=4)

    def forward(first, second):
        return one(first) + other(second)

    apart = GenericAttention(forward).attribute((pictures(), pictures()), 1)
    same = pictures()
    first, second = GenericAttention(forward).attribute((same, same), 1)
    assert torch.equal(first, second)
    assert close(first, apart[0] + apart[1])

    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    words = torch.randn(2, 5, 8, dtype=torch.float64)
    query, key, value = GenericAttention(attention, output=0).attribute((words,) * 3, (1, 2))
    assert query.any()
    assert torch.equal(query, key)
    assert torch.equal(query, value)


def test_two_pictures_through_one_model():
    model = tiny_vit()
    inputs = pictures(), pictures(seed=6)
    ours = GenericAttention(lambda first, second: model(first) - model(second)).attribute(inputs, 1)
    assert close(ours[0], GenericAttention(model).attribute(inputs[0], 1))
    negative = GenericAttention(lambda x: -model(x)).attribute(inputs[1], 1)
    assert close(ours[1], negative)


def test_embeddings_as_inputs():
    """Float inputs that enter as tokens: one value for each token, in every feature."""
    model = tiny_text()

    def forward(embeddings):
        x = embeddings + model.positions[: embeddings.shape[1]]
        for block in model.blocks:
            x = block(x)
        return model.head(x)[:, 0]

    expected = GenericAttention(model).attribute(sentences(), 1)
    embeddings = model.words(sentences())
    assert torch.equal(tokens(forward, embeddings), expected)
    ours = GenericAttention(forward).attribute(embeddings, 1)
    assert torch.equal(ours, expected[..., None].expand_as(ours))
    assert not ours.requires_grad
