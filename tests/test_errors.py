"""Bad input and bad options: the error names what is wrong, what was seen and what fits.

Wrong targets stand in `contract/test_targets.py`; refused kinds of attention in
`test_refusals.py`.
"""

import warnings
from typing import NamedTuple

import pytest
import torch
from helpers.tiny_models import pictures, sentences, slow_relevance, tiny_text, tiny_vit, two_towers
from torch import Tensor, nn

from captum_generic_attn import GenericAttention, UnsupportedAttentionError


def explain(forward_func, inputs, target=1, rest=None, **options):
    return GenericAttention(forward_func, **options).attribute(inputs, target, rest)


# --- inputs


@pytest.mark.parametrize("inputs", [pictures()[:0], (pictures()[:0],)])
def test_empty_batch(inputs):
    with pytest.raises(ValueError, match=r"(?i)inputs.*example"):
        explain(tiny_vit(), inputs)


def test_empty_batch_of_text_and_no_tokens():
    with pytest.raises(ValueError, match=r"(?i)inputs.*example"):
        explain(tiny_text(), sentences()[:0])
    with pytest.raises(ValueError, match=r"3, 0\b"):
        explain(tiny_text("tokens"), sentences()[:, :0], target=(0, 0))


def test_nan_in_the_inputs():
    inputs = pictures()
    inputs[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"(?i)\bnan\b") as caught:
        explain(tiny_vit(), inputs)
    assert caught.match(r"\bx\b|inputs")


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinity_that_spoils_the_relevance(value):
    inputs = pictures()
    inputs[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"(?i)finite"):
        explain(tiny_vit(), inputs)


def test_infinity_in_a_mask_is_no_error():
    """Additive masks are full of it."""
    text = tiny_text(eager=True)

    def forward(input_ids, mask):
        x = text.words(input_ids) + text.positions[: input_ids.shape[1]]
        for block in text.blocks:
            q, k, v = block.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT + mask[:, None, None]).softmax(-1)
            x = x + block.proj((weights @ v).transpose(1, 2).flatten(2))
        return text.head(x)[:, 0]

    mask = torch.zeros(3, 6, dtype=torch.float64)
    mask[:, 4:] = -float("inf")
    ours = explain(forward, sentences(), rest=(mask,))
    assert (ours[:, 4:] == 0).all()
    assert (ours[:, 1:4] > 0).any()
    with pytest.warns(UserWarning, match="mask"):
        ids_map, mask_map = explain(forward, (sentences(), mask))
    assert torch.equal(ids_map, ours)
    assert not mask_map.any()


def test_nan_says_which_of_several_inputs():
    def forward(first, second):
        return tower(first) + tower(second)

    tower = tiny_vit()
    for bad, names in ((0, r"first|inputs\[0\]"), (1, r"second|inputs\[1\]")):
        inputs = [pictures(), pictures(seed=4)]
        inputs[bad][0, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"(?i)nan|finite") as caught:
            explain(forward, tuple(inputs))
        assert caught.match(names)
        other = {0: r"second", 1: r"first"}[bad]
        with pytest.raises(AssertionError):
            caught.match(other)


def test_inputs_on_another_device_than_the_model():
    with pytest.raises(ValueError, match="meta") as caught:
        explain(tiny_vit(), pictures().to("meta"))
    assert caught.match("cpu")
    with pytest.raises(ValueError, match="meta") as caught:
        explain(tiny_vit().to("meta"), pictures())
    assert caught.match("cpu")


def test_inputs_on_different_devices():
    with pytest.raises(ValueError, match="meta") as caught:
        explain(two_towers(), (pictures(3), sentences().to("meta")), target=None)
    assert caught.match("cpu")


@pytest.mark.parametrize("inputs", [[1, 2, 3], "words", None, 3.0, (), ("words",), [pictures()]])
def test_inputs_that_are_no_tensors(inputs):
    with pytest.raises((TypeError, ValueError), match="inputs"):
        explain(tiny_vit(), inputs)


def test_inputs_with_different_batch_sizes():
    with pytest.raises(ValueError, match=r"batch") as caught:
        explain(two_towers(), (pictures(2), sentences(3)), target=None)
    assert caught.match(r"\b2\b.*\b3\b|\b3\b.*\b2\b")


def test_forward_func_that_cannot_be_called():
    for wrong in (None, "model", 3):
        with pytest.raises(TypeError, match="forward_func"):
            GenericAttention(wrong).attribute(pictures(), 1)


# --- outputs


@pytest.mark.parametrize("output", [None, "logits", 1.5, ["a"], object(), {}, (), {"a": None}])
def test_forward_func_that_returns_no_tensor(output):
    tower = tiny_vit()

    def forward(x):
        tower(x)
        return output

    with pytest.raises((TypeError, ValueError), match=r"(?i)forward_func|output|return") as caught:
        explain(forward, pictures())
    if output is None or isinstance(output, (str, float)):
        assert caught.match(type(output).__name__)


def test_output_without_an_example_axis():
    tower = tiny_vit()
    with pytest.raises(ValueError, match=r"(?i)batch|shape|example"):
        explain(lambda x: tower(x).sum(), pictures(), target=None)
    with pytest.raises(ValueError, match=r"(?i)batch|shape|example"):
        explain(lambda x: tower(x).sum(0, keepdim=True), pictures(), target=1)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda logits: logits.detach(),
        lambda logits: logits.argmax(-1, keepdim=True),
        lambda logits: (logits > 0).long(),
        lambda logits: torch.zeros(2, 5, dtype=torch.float64),
        lambda logits: torch.tensor(logits.tolist(), dtype=torch.float64),
    ],
    ids=["detached", "argmax", "comparison", "constant", "rebuilt"],
)
def test_output_without_a_gradient(spoil):
    tower = tiny_vit()
    with pytest.raises((ValueError, TypeError), match=r"(?i)gradient|differentia|floating"):
        explain(lambda x: spoil(tower(x)), pictures(), target=0)


def test_nan_scores():
    """A model that makes NaN of finite inputs is not explained by NaN."""
    tower = tiny_vit()
    with pytest.raises(ValueError, match=r"(?i)nan|finite"):
        explain(lambda x: tower(x) * float("nan"), pictures())


def test_missing_target_is_never_the_largest_class():
    with pytest.raises(ValueError, match="target") as caught:
        explain(tiny_vit(), pictures(), target=None)
    assert caught.match(r"2, 5\b")


FORMS = {
    "mapping": lambda logits: {"hidden": logits * 3, "logits": logits, "loss": logits.sum()},
    "pairs of CLIP": lambda logits: {"features": logits * 3, "logits_per_image": logits},
    "answers": lambda logits: {"question_answering_score": logits, "other": logits * 2},
    "pretraining": lambda logits: {"loss": logits.sum(), "prediction_logits": logits},
    "detection": lambda logits: {"pred_boxes": logits * 2, "pred_logits": logits},
    "segmentation": lambda logits: {"aux": logits * 2, "out": logits},
    "first of two": lambda logits: {"out": logits * 2, "logits": logits},
    "tuple": lambda logits: (logits,),
    "tuple with others": lambda logits: (logits.argmax(-1), None, logits, "text"),
    "list": lambda logits: [logits],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_output(form):
    tower = tiny_vit()
    expected = explain(tower, pictures())
    assert torch.equal(explain(lambda x: FORMS[form](tower(x)), pictures()), expected)


def test_output_of_hugging_face():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    tower = tiny_vit()

    def forward(x):
        logits = tower(x)
        return outputs.ImageClassifierOutput(loss=logits.sum(), logits=logits)

    assert torch.equal(explain(forward, pictures()), explain(tower, pictures()))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda one, two: {"first": one, "second": two}, "second"),
        (lambda one, two: {"logits": one, "second": two}, "second"),
        (lambda one, two: (one, two), 1),
        (lambda one, two: (two, one), 0),
        (lambda one, two: (one, two), -1),
        (lambda one, two: {"deep": (one, two)}, lambda out: out["deep"][1]),
        (Pair, 1),
    ],
)
def test_output_option(wrap, output):
    tower = tiny_vit()

    def forward(x):
        logits = tower(x)
        return wrap(-logits, logits)

    ours = explain(forward, pictures(), output=output)
    assert torch.equal(ours, explain(tower, pictures()))
    assert not torch.equal(ours, explain(lambda x: -tower(x), pictures()))


AMBIGUOUS = {
    "tuple": (lambda a, b: (a, b), [r"\b0\b", r"\b1\b"]),
    "mapping": (lambda a, b: {"scores": a, "boxes": b}, ["scores", "boxes"]),
}


@pytest.mark.parametrize("form", AMBIGUOUS)
def test_outputs_to_choose_from_are_listed_with_shapes(form):
    tower = tiny_vit()
    wrap, fields = AMBIGUOUS[form]
    with pytest.raises(ValueError, match="output") as caught:
        explain(lambda x: wrap(tower(x), tower(x)[:, :4]), pictures())
    for text in (*fields, r"2, 5\b", r"2, 4\b"):
        assert caught.match(text)


def test_a_loss_alone_is_not_an_output():
    tower = tiny_vit()
    with pytest.raises(ValueError, match="loss") as caught:
        explain(lambda x: {"loss": tower(x)[:, 0]}, pictures(), target=None)
    assert caught.match("output")


@pytest.mark.parametrize("output", ["nope", 7])
def test_unknown_output(output):
    tower = tiny_vit()
    with pytest.raises((ValueError, KeyError), match=str(output)) as caught:
        explain(lambda x: {"logits": tower(x), "features": tower(x) * 2}, pictures(), output=output)
    assert caught.match("logits")
    assert caught.match("features")


def test_output_option_on_a_plain_tensor():
    with pytest.raises((ValueError, TypeError), match="output") as caught:
        explain(tiny_vit(), pictures(), output="logits")
    assert caught.match("logits")


@pytest.mark.parametrize("output", ["nope", 7, 0])
def test_output_that_is_no_tensor(output):
    tower = tiny_vit()
    with pytest.raises((ValueError, TypeError), match="output"):
        explain(lambda x: (None, tower(x), tower(x) * 2), pictures(), output=output)


# --- options


@pytest.mark.parametrize("interpolation", ["cubic", "", None, 3])
def test_unknown_interpolation(interpolation):
    with pytest.raises((ValueError, TypeError), match="interpolation") as caught:
        explain(tiny_vit(), pictures(), interpolation=interpolation)
    assert caught.match("nearest")
    assert caught.match("bilinear")
    assert caught.match(repr(interpolation))


@pytest.mark.parametrize("name", ["rules", "layer"])
def test_options_that_do_not_exist(name):
    with pytest.raises(TypeError, match=name):
        GenericAttention(tiny_vit(), **{name: None})


@pytest.mark.parametrize("start_layer", [2, 5, -3])
def test_start_layer_out_of_range(start_layer):
    with pytest.raises(ValueError, match="start_layer") as caught:
        explain(tiny_vit(), pictures(), start_layer=start_layer)
    assert caught.match(rf"{start_layer}\b")
    assert caught.match(r"\b2\b.*call|call.*\b2\b")


def test_start_layer_out_of_range_gives_the_count_of_each_stream():
    inputs = (pictures(3), sentences())
    GenericAttention(two_towers(), start_layer=1).attribute(inputs)
    with pytest.raises(ValueError, match="start_layer") as caught:
        GenericAttention(two_towers(), start_layer=2).attribute(inputs)
    assert caught.match(r"pixels\D*2|2\D*pixels")
    assert caught.match(r"input_ids\D*3|3\D*input_ids")


@pytest.mark.parametrize("start_layer", [0.5, "last", None])
def test_start_layer_of_another_type(start_layer):
    with pytest.raises((TypeError, ValueError), match="start_layer"):
        explain(tiny_vit(), pictures(), start_layer=start_layer)


@pytest.mark.parametrize("layers", [["nothing.here"], ["block"], "nothing.here"])
def test_layers_that_match_nothing(layers):
    with pytest.raises(ValueError, match="layers") as caught:
        explain(tiny_vit(), pictures(), layers=layers)
    assert caught.match(layers if isinstance(layers, str) else layers[0])
    assert caught.match(r"blocks\.")  # what there is


def test_layers_without_attention():
    with pytest.raises(ValueError, match="head") as caught:
        explain(tiny_vit(), pictures(), layers=["head"])
    assert caught.match("layers")


def test_layers_empty():
    with pytest.raises(ValueError, match="layers"):
        explain(tiny_vit(), pictures(), layers=[])


@pytest.mark.parametrize("layers", [0, [0], 1.5, {"blocks.0": 1}.values()])
def test_layers_of_another_type(layers):
    with pytest.raises((TypeError, ValueError), match="layers"):
        explain(tiny_vit(), pictures(), layers=layers)


def test_layers_one_of_which_matches_nothing():
    with pytest.raises(ValueError, match=r"blocks\.7"):
        explain(tiny_vit(), pictures(), layers=["blocks.0", "blocks.7"])


def test_layers_with_a_module_of_another_model():
    with pytest.raises(ValueError, match="layers"):
        explain(tiny_vit(), pictures(), layers=[tiny_vit().blocks[0]])


@pytest.mark.parametrize(
    "rows",
    [17, -18, [0, 17], torch.tensor([0, 17]), torch.tensor([[0, 1], [1, 17]])],
)
def test_rows_out_of_range(rows):
    with pytest.raises((ValueError, IndexError), match="rows") as caught:
        explain(tiny_vit(), pictures(), rows=rows)
    assert not isinstance(caught.value, IndexError), "the house's errors are ValueErrors"
    assert caught.match(r"\b17\b")


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(3, dtype=torch.long),
        torch.zeros(2, 2, 2, dtype=torch.long),
        torch.zeros(2, 16, dtype=torch.float64),
        torch.zeros(3, 17, dtype=torch.float64),
    ],
    ids=["other batch", "three axes", "weights of other tokens", "weights of other batch"],
)
def test_rows_of_a_wrong_shape(rows):
    with pytest.raises(ValueError, match="rows") as caught:
        explain(tiny_vit(), pictures(), rows=rows)
    assert caught.match(", ".join(str(size) for size in rows.shape))


@pytest.mark.parametrize(
    "rows",
    ["cls", 1.5, [], [0.5], torch.ones(2, 17, dtype=torch.bool)],
    ids=["name", "float", "nothing", "list of floats", "mask"],
)
def test_rows_of_another_type(rows):
    with pytest.raises((TypeError, ValueError), match="rows"):
        explain(tiny_vit(), pictures(), rows=rows)


def test_rows_of_a_stream_that_is_not_there():
    with pytest.raises((KeyError, ValueError), match="picture") as caught:
        explain(tiny_vit(), pictures(), rows={"picture": 0})
    assert caught.match(r"\bx\b")


def test_targets_that_are_no_sequence():
    for targets in (1, None, torch.tensor(1), "12"):
        with pytest.raises((TypeError, ValueError), match="targets"):
            GenericAttention(tiny_vit()).attribute_targets(pictures(), targets)


def test_no_targets_at_all():
    with pytest.raises(ValueError, match="targets"):
        GenericAttention(tiny_vit()).attribute_targets(pictures(), [])


def test_booleans_are_keyword_only():
    method = GenericAttention(tiny_vit())
    for call in (method.attribute, method.attribute_targets, method.relevance):
        with pytest.raises(TypeError, match="positional argument"):
            call(pictures(), [0], None, False)


# --- models


def test_model_without_attention():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)).double()
    with pytest.raises(UnsupportedAttentionError, match=r"(?i)attention") as caught:
        explain(model, pictures())
    assert isinstance(caught.value, ValueError)


def test_score_that_no_attention_reaches():
    """Attention runs, but the score is made of something else."""
    tower = tiny_vit()
    linear = nn.Linear(3 * 32 * 32, 5).double()

    def forward(x):
        tower(x)
        return linear(x.flatten(1))

    with pytest.warns(UserWarning, match="attention") as caught:
        ours = explain(forward, pictures())
    assert len(caught) == 1
    assert not ours.any()


@pytest.mark.parametrize("full", [True, False])
def test_zero_head_gives_zeros_and_one_warning(full):
    model = tiny_vit()
    nn.init.zeros_(model.head.weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = GenericAttention(model).attribute(pictures(), 1, return_input_shape=full)
    assert ours.shape == ((2, 3, 32, 32) if full else (2, 4, 4))
    assert not ours.any()
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert len(messages) == 1
    assert "gradient" in messages[0]


def test_zero_gradient_of_one_example_alone():
    """The others keep their maps."""
    tower = tiny_vit()
    gate = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = explain(lambda x: tower(x) * gate, pictures())
    assert not ours[0].any()
    alone = explain(tower, pictures()[1:])
    assert (ours[1] - alone[0]).abs().max() <= 1e-12 * alone.abs().max()


def test_no_warning_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(tiny_vit(), pictures())
        explain(tiny_text("tokens"), sentences(), target=(1, 2))
        explain(two_towers(), (pictures(3), sentences()), target=None)
        GenericAttention(tiny_vit()).relevance(pictures(), 1, keep_calls=True)


class Unnormalised(nn.Module):
    """Queries, keys and values are multiplied without a softmax."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y.mT @ y


class HalfRefused(nn.Module):
    """Text whose tokens attend to each other, and once without a softmax."""

    def __init__(self):
        super().__init__()
        self.text = tiny_text(eager=True)
        self.look_up = Unnormalised()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.text.blocks

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.text.words(input_ids) + self.text.positions[: input_ids.shape[1]]
        x = self.text.blocks[0](x)
        x = x + self.look_up(x, x / 16)
        x = self.text.blocks[1](x)
        return self.text.head(x)[:, 0]


def test_attention_without_a_softmax_is_refused_by_name():
    torch.manual_seed(0)
    with pytest.raises(UnsupportedAttentionError, match="look_up") as caught:
        explain(HalfRefused().eval(), sentences())
    assert caught.match(r"multiplied without a softmax .*; the method needs attention prob")


def test_strict_false_warns_once_and_skips():
    torch.manual_seed(0)
    model = HalfRefused().eval()
    expected, _ = slow_relevance(model, sentences(), lambda output: output[:, 1])
    method = GenericAttention(model, strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = method.attribute(sentences(), target=1)
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert len(messages) == 1
    assert "look_up" in messages[0]
    row = expected[:, 0].clone()
    row[:, 0] = 0
    assert (ours - row).abs().max() <= 1e-12 * row.abs().max()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = method.relevance(sentences(), target=1).calls
    (skipped,) = (call for call in calls if not call.used)
    assert "look_up" in skipped.module
    assert skipped.reason
    assert [call.module for call in calls if call.used] == ["text.blocks.0", "text.blocks.1"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_strict_false_with_nothing_left():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(20, 16)
            self.look_up = Unnormalised()
            self.head = nn.Linear(16, 5)

        def forward(self, input_ids, features):
            return self.head(self.look_up(self.words(input_ids), features)[:, 0])

    torch.manual_seed(0)
    model = Cross().eval()
    with pytest.raises(UnsupportedAttentionError, match="look_up"):
        explain(model, (sentences(), torch.randn(3, 4, 16)), strict=False)


class PatchesByHand(nn.Module):
    """Patches cut by shape operations alone, read by a linear layer: there is no convolution."""

    def __init__(self, shuffled: bool = False):
        super().__init__()
        self.vit = tiny_vit()
        order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
        self.order = order if shuffled else torch.arange(16)

    def forward(self, pixels: Tensor) -> Tensor:
        conv = self.vit.patch_embed.proj
        patches = pixels.unflatten(2, (4, 8)).unflatten(4, (4, 8)).permute(0, 2, 4, 1, 3, 5)
        x = patches.reshape(len(pixels), 16, -1) @ conv.weight.flatten(1).T + conv.bias
        x = x[:, self.order]
        x = torch.cat([self.vit.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + torch.cat([self.vit.pos_embed[:, :1], self.vit.pos_embed[:, 1:][:, self.order]], 1)
        return self.vit.head(self.vit.norm(self.vit.blocks(x))[:, 0])


@pytest.mark.parametrize("shuffled", [False, True])
def test_geometry_is_right_or_refused(shuffled):
    """Patches that no convolution made: the right picture, or an error; never a wrong picture."""
    model = PatchesByHand(shuffled)
    expected = explain(model.vit, pictures(), interpolation="nearest")
    assert (model(pictures()) - model.vit(pictures())).abs().max() <= 1e-12
    try:
        ours = explain(model, pictures(), interpolation="nearest")
    except ValueError as error:
        assert "pixels" in str(error) or "return_input_shape" in str(error)  # noqa: PT017
    else:
        assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()
