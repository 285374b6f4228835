"""Every form of target that Captum accepts, on every form of output.

The reference of each case selects the scores inside `forward_func`, so that no target is given.
"""

import pytest
import torch
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit, two_towers

from captum_generic_attn import GenericAttention

NAMES = {"n": 3}


def explain(model, ids, target):
    return GenericAttention(model).attribute(ids, target=target)


def picked(model, ids, indices):
    """Explain example i by its own entry `indices[i]`, selected in the forward."""

    def scores(input_ids):
        output = model(input_ids)
        return torch.stack([output[(i, *index)] for i, index in enumerate(indices)])

    return GenericAttention(scores).attribute(ids)


ON_CLASSES = {
    "int": (1, [1, 1, 1]),
    "negative int": (-1, [3, 3, 3]),
    "0-d tensor": (torch.tensor(2), [2, 2, 2]),
    "1-element tensor": (torch.tensor([2]), [2, 2, 2]),
    "1-d tensor": (torch.tensor([0, 3, 1]), [0, 3, 1]),
    "list of ints": ([0, 3, 1], [0, 3, 1]),
    "tuple": ((3,), [3, 3, 3]),
    "list of tuples": ([(0,), (3,), (1,)], [0, 3, 1]),
}


@pytest.mark.parametrize("form", ON_CLASSES)
def test_classes(form):
    target, columns = ON_CLASSES[form]
    model, ids = tiny_text("classes"), sentences()
    ours = explain(model, ids, target)
    expected = picked(model, ids, [(column,) for column in columns])
    assert ours.shape == (3, 6)
    assert expected.abs().max() > 0
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_integer_tensors_of_every_width(dtype):
    model, ids = tiny_text("classes"), sentences()
    ours = explain(model, ids, torch.tensor([0, 3, 1], dtype=dtype))
    assert torch.equal(ours, explain(model, ids, [0, 3, 1]))


def test_targets_tell_examples_apart():
    """Without this the cases above could all agree on one map."""
    model, ids = tiny_text("classes"), sentences()
    maps = torch.stack([explain(model, ids, target) for target in range(4)])
    for first in range(4):
        for second in range(first):
            difference = (maps[first] - maps[second]).abs().amax(1)
            assert (difference > 1e-3 * maps.abs().max()).all()


ON_TOKENS = {
    "tuple": ((2, 1), [(2, 1), (2, 1), (2, 1)]),
    "list of tuples": ([(0, 1), (2, 0), (5, 3)], [(0, 1), (2, 0), (5, 3)]),
}


@pytest.mark.parametrize("form", ON_TOKENS)
def test_tokens_and_classes(form):
    target, indices = ON_TOKENS[form]
    model, ids = tiny_text("tokens"), sentences()
    ours = explain(model, ids, target)
    expected = picked(model, ids, indices)
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()
    rows = GenericAttention(model).relevance(ids, target=target).rows["input_ids"]
    assert rows.argmax(1).tolist() == [query for query, _ in indices]
    for example, (query, _) in enumerate(indices):
        assert ours[example, query] == 0  # the explained token's own entry
        assert ours[example].count_nonzero() >= 2


@pytest.mark.parametrize("form", ["score", "column"])
def test_no_target_where_one_value_per_example(form):
    model, ids = tiny_text(form), sentences()
    ours = explain(model, ids, None)
    if form == "column":
        assert torch.equal(ours, explain(model, ids, 0))
        assert torch.equal(ours, explain(model, ids, [0, 0, 0]))
        expected = picked(model, ids, [(0,), (0,), (0,)])
    else:
        expected = picked(model, ids, [(), (), ()])
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


WRONG = {
    # output form, target, what the message must show beside the word `target` and the shape
    "classes": {
        "none": None,
        "out of range": 4,
        "below the range": -5,
        "list too short": [0, 1],
        "list too long": [0, 1, 2, 3],
        "tensor too long": torch.tensor([0, 1, 2, 3]),
        "2-d tensor": torch.zeros(3, 2, dtype=torch.long),
        "tensor entry out of range": torch.tensor([0, 1, 4]),
        "list entry out of range": [0, 1, 4],
        "float tensor": torch.tensor([0.5, 1.0, 2.0]),
        "tuple too long": (0, 1),
        "list of long tuples": [(0, 1), (0, 1), (0, 1)],
        "list of strings": ["a", "b", "c"],
        "empty list": [],
        "list of ints and tuples": [1, (2,), 0],
        "list of tuples and ints": [(1,), 2, 0],
        "string": "one",
        "float": 1.5,
        "mapping": NAMES,
    },
    "tokens": {
        "none": None,
        "int": 1,
        "0-d tensor": torch.tensor(1),
        "1-d tensor": torch.tensor([0, 1, 2]),
        "list of ints": [0, 1, 2],
        "short tuple": (1,),
        "tuple out of range": (6, 0),
        "list of short tuples": [(1,), (1,), (1,)],
        "list of tuples too short": [(0, 0), (1, 1)],
    },
    "score": {"int": 1, "list": [0, 0, 0], "tuple": (0,)},
}


@pytest.mark.parametrize(
    ("form", "case"), [(form, case) for form, cases in WRONG.items() for case in cases]
)
def test_wrong_targets(form, case):
    """The message names the argument and shows the output's shape or the forms that fit it."""
    fits = {
        "classes": r"3, 4\b|an int",
        "tokens": r"3, 6, 4\b|tuple of 2 ints",
        "score": r"\(3,\)",
    }[form]
    with pytest.raises((ValueError, TypeError), match="target") as caught:
        explain(tiny_text(form), sentences(), WRONG[form][case])
    assert caught.match(fits)


@pytest.mark.parametrize(
    "target", [[-1, -1, -1], torch.tensor([-1, -1, -1]), [(-1,), (-1,), (-1,)]]
)
def test_negative_entries_count_from_the_end_or_are_refused(target):
    """Captum takes a negative int, but gathers lists: no error of its depths may come through."""
    model, ids = tiny_text("classes"), sentences()
    try:
        ours = explain(model, ids, target)
    except ValueError as error:
        assert "target" in str(error)  # noqa: PT017
    else:
        assert torch.equal(ours, explain(model, ids, 3))


def test_missing_target_says_which_forms_fit():
    with pytest.raises(ValueError, match="target") as caught:
        explain(tiny_text("classes"), sentences(), None)
    assert caught.match("int")
    with pytest.raises(ValueError, match="target") as caught:
        explain(tiny_text("tokens"), sentences(), None)
    assert caught.match("tuple")


@pytest.mark.parametrize("target", [1, [0, 3, 1], torch.tensor([0, 3, 1]), [(0,), (3,), (1,)]])
def test_pictures_and_pairs_take_the_same_forms(target):
    columns = [1, 1, 1] if isinstance(target, int) else [0, 3, 1]
    vit, inputs = tiny_vit(), pictures(3)
    ours = GenericAttention(vit).attribute(inputs, target=target)
    towers, both = two_towers("classes"), (pictures(3), sentences())
    image_map, text_map = GenericAttention(towers).attribute(both, target=target)
    for index, column in enumerate(columns):
        one = slice(index, index + 1)
        alone = GenericAttention(vit).attribute(inputs[one], target=column)
        assert (ours[one] - alone).abs().max() <= 1e-12 * alone.abs().max()
        alone = GenericAttention(towers).attribute(tuple(x[one] for x in both), target=column)
        for together, single in zip((image_map, text_map), alone, strict=True):
            assert (together[one] - single).abs().max() <= 1e-12 * single.abs().max()
