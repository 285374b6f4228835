"""How attention sits in a model, and how the model is called: what is captured stays the same."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import encoder, laws, oracles
from zoo.encoder import BATCH, TOKENS, WIDTH, Block, Encoder, SelfAttention, plain

from captum_generic_attn import GenericAttention

TARGET = 1
fused = F.scaled_dot_product_attention


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k) @ v


both_forms = pytest.mark.parametrize("form", [fused, eager], ids=["fused", "eager"])


def tokens(model: nn.Module | Callable[..., Tensor], inputs: Tensor, **options: object) -> Tensor:
    method = GenericAttention(model, **options)
    return method.attribute(inputs, TARGET, return_input_shape=False)


# --- where attention sits ---------------------------------------------------------------------


class ParallelBlock(nn.Module):
    """Two attentions that read the same state, as in ViTs with parallel blocks."""

    def __init__(self, form: encoder.Form) -> None:
        super().__init__()
        self.first, self.second = SelfAttention(form), SelfAttention(form)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.first(self.norm(x)) + self.second(self.norm(x))


class StackedBranches(ParallelBlock):
    """The same, summed through a stack."""

    def forward(self, x: Tensor) -> Tensor:
        state = self.norm(x)
        return x + torch.stack([self.first(state), self.second(state)]).sum(dim=0)


class BesideItsMlp(nn.Module):
    """Attention and MLP read the same state (GPT-J, ViT-22B)."""

    def __init__(self, form: encoder.Form) -> None:
        super().__init__()
        self.attention = SelfAttention(form)
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        state = self.norm(x)
        return x + self.attention(state) + self.mlp(state)


@both_forms
@pytest.mark.parametrize("order", ["pre-norm", "post-norm"])
def test_order_of_norm_and_residual(form: encoder.Form, order: str) -> None:
    model, inputs = Encoder(form, order=order, depth=3), encoder.features()
    laws.assert_same(tokens(model, inputs), encoder.expected_tokens(model, inputs, TARGET))


@both_forms
def test_without_residual_a_state_keeps_only_its_own_identity(form: encoder.Form) -> None:
    """Equation 6 adds because the residual does; without it a state has one call to thank.

    Then R = I + Ā R of the state before, and no product of I + Ā.
    """
    model, inputs = Encoder(form, order="no residual", depth=3), encoder.features()
    identity = torch.eye(TOKENS, dtype=torch.float64)
    relevance = identity.expand(BATCH, -1, -1)
    for one in encoder.expected_maps(model, inputs, TARGET):
        relevance = identity + one @ relevance
    laws.assert_same(tokens(model, inputs), oracles.read_row(relevance, 0))


@both_forms
@pytest.mark.parametrize("block", [ParallelBlock, StackedBranches])
def test_parallel_branches_read_the_same_state(form: encoder.Form, block: type) -> None:
    model, inputs = Encoder(form, blocks=[block(form), block(form)]), encoder.features()
    a, b, c, d = encoder.expected_maps(model, inputs, TARGET)
    parallel = oracles.read_row(oracles.propagate([[a, b], [c, d]]), 0)
    one_after_the_other = oracles.read_row(oracles.propagate([a, b, c, d]), 0)
    assert (parallel - one_after_the_other).abs().max() > 1e-3 * parallel.max()
    laws.assert_same(tokens(model, inputs), parallel)


@both_forms
def test_attention_beside_its_mlp(form: encoder.Form) -> None:
    model, inputs = Encoder(form, blocks=[BesideItsMlp(form) for _ in range(2)]), encoder.features()
    laws.assert_same(tokens(model, inputs), encoder.expected_tokens(model, inputs, TARGET))


@both_forms
def test_one_module_called_several_times_gives_one_record_per_call(form: encoder.Form) -> None:
    shared = Block(form)
    model, inputs = Encoder(form, blocks=[shared, shared, shared]), encoder.features()
    laws.assert_same(tokens(model, inputs), encoder.expected_tokens(model, inputs, TARGET))
    relevance = GenericAttention(model).relevance(inputs, TARGET)
    assert laws.used_modules(relevance) == ["blocks.0.attention"] * 3


@both_forms
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_residual_added_in_place(form: encoder.Form, frozen: bool) -> None:
    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            x += self.attention(self.norm(x))
            return x.add_(self.mlp(self.norm_mlp(x)))

    plain_model, inputs = Encoder(form), encoder.features()
    expected = encoder.expected_tokens(plain_model, inputs, TARGET)
    model = Encoder(form, blocks=[InPlace(form), InPlace(form)])
    model.load_state_dict(plain_model.state_dict())
    laws.assert_same(tokens(model.requires_grad_(not frozen), inputs), expected)


@both_forms
def test_score_that_reads_every_layer(form: encoder.Form) -> None:
    model = Encoder(form, depth=3)

    def forward(encoder_: Encoder, x: Tensor) -> Tensor:
        x = encoder_.embed(x) + encoder_.position
        scores = 0
        for block in encoder_.blocks:
            x = block(x)
            scores = scores + encoder_.head(x[:, 0])
        return scores

    reference, probabilities = encoder.twin(model)
    inputs = encoder.features()
    maps = oracles.maps_from(lambda: forward(reference, inputs), probabilities, TARGET)
    expected = oracles.read_row(oracles.propagate(maps), 0)
    laws.assert_same(tokens(lambda x: forward(model, x), inputs), expected)


@both_forms
def test_branch_that_does_not_reach_the_score_adds_nothing(form: encoder.Form) -> None:
    class Aside(ParallelBlock):
        def forward(self, x: Tensor) -> Tensor:
            self.second(self.norm(x))
            return x + self.first(self.norm(x))

    model, inputs = Encoder(form, blocks=[Aside(form), Block(form)]), encoder.features()
    laws.assert_same(tokens(model, inputs), encoder.expected_tokens(model, inputs, TARGET))
    calls = GenericAttention(model).relevance(inputs, TARGET).calls
    unused = [call for call in calls if not call.used]
    assert [call.module for call in unused] == ["blocks.0.second"]
    assert unused[0].reason


# --- what the model is fed --------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("read", [0, -1, "mean"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_ids_or_features(form: encoder.Form, read: int | str, frozen: bool) -> None:
    for vocabulary, inputs in ((20, encoder.ids()), (None, encoder.features())):
        model = Encoder(form, vocabulary=vocabulary, read=read)
        expected = encoder.expected_tokens(model, inputs, TARGET)
        model.requires_grad_(not frozen)
        laws.assert_same(tokens(model, inputs), expected)


class OnFeatures(nn.Module):
    """Attention straight on the input, positions added to queries and keys but not to values."""

    def __init__(self, form: encoder.Form, touch: str) -> None:
        super().__init__()
        self.touch = touch
        self.attention = SelfAttention(form)
        self.norm = nn.LayerNorm(WIDTH)
        self.position = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.head = nn.Linear(WIDTH, 4)
        oracles.randomise(self.double().eval())

    def forward(self, x: Tensor) -> Tensor:
        prepared = {
            "nothing": (x, x, x),
            "positions": (x + self.position, x + self.position, x),
            "three norms": (self.norm(x), self.norm(x), self.norm(x)),
            "scales": (x * 2, x * 3, x),
        }[self.touch]
        attention = self.attention
        q, k, v = (
            projection(part).unflatten(-1, (encoder.HEADS, -1)).transpose(1, 2)
            for projection, part in zip(
                (attention.query, attention.key, attention.value), prepared, strict=True
            )
        )
        x = x + attention.out(attention.form(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x[:, 1])


@both_forms
@pytest.mark.parametrize("touch", ["nothing", "positions", "three norms", "scales"])
def test_attention_straight_on_the_input(form: encoder.Form, touch: str) -> None:
    model = OnFeatures(form, touch)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    expected = oracles.read_row(oracles.propagate(encoder.expected_maps(model, inputs, TARGET)), 1)
    laws.assert_same(tokens(model, inputs), expected)


@both_forms
def test_results_joined_as_features_are_heads_of_one_attention(form: encoder.Form) -> None:
    """Heads written as modules of their own, called one by one: eq. 5 takes the mean of them all.

    Results that are summed are branches instead, and each adds its whole map.
    """

    class SideBySide(ParallelBlock):
        def __init__(self, form: encoder.Form) -> None:
            super().__init__(form)
            self.join = nn.Linear(2 * WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            state = self.norm(x)
            return x + self.join(torch.cat([self.first(state), self.second(state)], dim=-1))

    model = Encoder(form, blocks=[SideBySide(form), Block(form)])
    inputs = encoder.features()
    a, b, c = encoder.expected_maps(model, inputs, TARGET)
    expected = oracles.read_row(oracles.propagate([(a + b) / 2, c]), 0)
    laws.assert_same(tokens(model, inputs), expected)


@both_forms
def test_embeddings_as_input(form: encoder.Form) -> None:
    model = Encoder(form, vocabulary=20)
    embedded = model.embed(encoder.ids()).detach()

    def from_embeddings(inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds + model.position
        for block in model.blocks:
            x = block(x)
        return model.head(x[:, 0])

    expected = encoder.expected_tokens(model, encoder.ids(), TARGET)
    laws.assert_same(tokens(from_embeddings, embedded), expected)
    whole = GenericAttention(from_embeddings).attribute(embedded, TARGET)
    laws.assert_same(whole, expected[..., None].expand(BATCH, TOKENS, WIDTH))


@both_forms
def test_nothing_of_one_call_stays_for_the_next(form: encoder.Form) -> None:
    model = Encoder(form)
    method = GenericAttention(model)
    for inputs in (encoder.features(1), encoder.features(2)[:1], encoder.features(1)):
        expected = encoder.expected_tokens(model, inputs, TARGET)
        actual = method.attribute(inputs, TARGET, return_input_shape=False)
        laws.assert_same(actual, expected)


# --- how the model is reached -----------------------------------------------------------------


class Holder:
    """Not a module: the model is one of its attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def predict(self, x: Tensor) -> Tensor:
        return self.model(x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)


def with_a_flag(model: nn.Module, flag: bool, x: Tensor) -> Tensor:
    assert flag
    return model(x)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def forward_functions(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    def closure(x: Tensor) -> Tensor:
        return model(x)

    return {
        "module": model,
        "bound method": model.forward,
        "lambda": lambda x: model(x)[:, :3],
        "closure": closure,
        "partial": functools.partial(with_a_flag, model, True),
        "partial of a bound method": functools.partial(model.forward),
        "method of an object": Holder(model).predict,
        "callable object": Holder(model),
        "functional_call": lambda x: torch.func.functional_call(model, parameters_of(model), (x,)),
        "compiled": torch.compile(model, backend="eager"),
    }


# The import of the compiler alone takes many seconds.
COMPILED = pytest.param("compiled", marks=[pytest.mark.slow, pytest.mark.ci_sample])
CASES = [COMPILED if name == "compiled" else name for name in forward_functions(nn.Identity())]


@both_forms
@pytest.mark.parametrize("name", CASES)
def test_forward_function(form: encoder.Form, name: str) -> None:
    model, inputs = Encoder(form), encoder.features()
    expected = encoder.expected_tokens(model, inputs, TARGET)
    laws.assert_same(tokens(forward_functions(model)[name], inputs), expected)


@pytest.mark.parametrize("name", CASES)
def test_layers_by_name_whatever_the_forward_function(name: str) -> None:
    model, inputs = Encoder(fused, depth=3), encoder.features()
    maps = encoder.expected_maps(model, inputs, TARGET)
    expected = oracles.read_row(oracles.propagate(maps[1:]), 0)
    function = forward_functions(model)[name]
    selection = ["blocks.1.attention", "blocks.2"]
    laws.assert_same(tokens(function, inputs, layers=selection), expected)
    laws.assert_same(tokens(function, inputs, layers=[model.blocks[1], model.blocks[2]]), expected)
    calls = GenericAttention(function, layers=selection).relevance(inputs, TARGET).calls
    assert [call.used for call in calls] == [False, True, True]
    assert calls[1].module.endswith("blocks.1.attention")


# --- which layers, which rows -----------------------------------------------------------------

DEPTH = 12
SELECTIONS = {
    "one name": (["blocks.1.attention"], [1]),
    "a prefix ends at a dot": (["blocks.1"], [1]),
    "all of a prefix": (["blocks"], range(DEPTH)),
    "names in any order": (["blocks.7", "blocks.3.attention"], [3, 7]),
    "none given": (None, range(DEPTH)),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_layers(selection: str) -> None:
    model, inputs = Encoder(fused, depth=DEPTH), encoder.features()
    layers, indices = SELECTIONS[selection]
    maps = encoder.expected_maps(model, inputs, TARGET)
    expected = oracles.read_row(oracles.propagate([maps[i] for i in indices]), 0)
    laws.assert_same(tokens(model, inputs, layers=layers), expected)


@pytest.mark.parametrize("start_layer", [-3, -1, 0, 1, 2])
@pytest.mark.parametrize("layers", [None, ["blocks.0", "blocks.2", "blocks.3"]])
def test_start_layer_counts_within_the_selection(
    start_layer: int, layers: list[str] | None
) -> None:
    model, inputs = Encoder(fused, depth=4), encoder.features()
    maps = encoder.expected_maps(model, inputs, TARGET)
    chosen = (maps if layers is None else [maps[0], maps[2], maps[3]])[start_layer:]
    expected = oracles.read_row(oracles.propagate(chosen), 0)
    actual = tokens(model, inputs, layers=layers, start_layer=start_layer)
    laws.assert_same(actual, expected)


@pytest.mark.parametrize("start_layer", [4, -5])
def test_start_layer_out_of_range(start_layer: int) -> None:
    with pytest.raises(ValueError, match=r"start_layer.*4"):
        tokens(Encoder(fused, depth=4), encoder.features(), start_layer=start_layer)


def test_layers_that_match_nothing_are_named() -> None:
    with pytest.raises((ValueError, KeyError), match=r"blocks\.9"):
        tokens(Encoder(fused), encoder.features(), layers=["blocks.9"])


WEIGHTS = torch.tensor([[0.1, 0.2, 0, 0.3, 0.4, 0], [0, 0, 0, 0, 0, 1.0]], dtype=torch.float64)
ROWS = {
    "one": (3, [[3], [3]]),
    "from the end": (-2, [[4], [4]]),
    "several": ([0, 2], [[0, 2], [0, 2]]),
    "one per example": (torch.tensor([1, 5]), [[1], [5]]),
    "several per example": (torch.tensor([[1, 5, 0], [2, 3, 4]]), [[1, 5, 0], [2, 3, 4]]),
    "weights": (WEIGHTS, WEIGHTS),
    "mapping": ({"x": 3}, [[3], [3]]),
    "mapping to weights": ({"x": WEIGHTS}, WEIGHTS),
}


@both_forms
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_the_user_gives(form: encoder.Form, name: str) -> None:
    model, inputs = Encoder(form, depth=3, read="mean"), encoder.features()
    given, wanted = ROWS[name]
    weights = wanted
    if not isinstance(wanted, Tensor):
        weights = torch.zeros(BATCH, TOKENS, dtype=torch.float64)
        for example, chosen in enumerate(wanted):
            weights[example, chosen] = 1 / len(chosen)
    relevance = oracles.propagate(encoder.expected_maps(model, inputs, TARGET))
    expected = oracles.read_row(relevance, weights)
    laws.assert_same(tokens(model, inputs, rows=given), expected)
    found = GenericAttention(model, rows=given).relevance(inputs, TARGET)
    laws.assert_same(found.matrix("x", "x"), relevance)
    torch.testing.assert_close(found.rows["x"].double(), weights, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rows", [TOKENS, -TOKENS - 1, [0, TOKENS], torch.tensor([0, TOKENS])])
def test_rows_out_of_range(rows: object) -> None:
    with pytest.raises((ValueError, IndexError), match=r"rows"):
        tokens(Encoder(fused), encoder.features(), rows=rows)


# --- precision and modes ----------------------------------------------------------------------


@both_forms
def test_float32(form: encoder.Form) -> None:
    model, inputs = Encoder(form, depth=3), encoder.features()
    expected = encoder.expected_tokens(model, inputs, TARGET)
    heatmap = tokens(model.float(), inputs.float())
    assert heatmap.dtype == torch.float32
    laws.assert_same(heatmap, expected, 1e-4)


@both_forms
def test_autocast_keeps_probabilities_and_gradients_in_float32(form: encoder.Form) -> None:
    """bfloat16 has 8 bits: the forward is only good to some 1e-2, the bookkeeping must be exact."""
    model, inputs = Encoder(form, depth=3), encoder.features()
    expected = encoder.expected_tokens(model, inputs, TARGET)
    model.float()

    def automatic(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    method = GenericAttention(automatic)
    relevance = method.relevance(inputs.float(), TARGET, keep_calls=True)
    assert {call.map.dtype for call in relevance.calls} == {torch.float32}
    heatmap = method.attribute(inputs.float(), TARGET, return_input_shape=False)
    assert heatmap.dtype == torch.float32
    laws.assert_same(heatmap, expected, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = GenericAttention(model).attribute(inputs.float(), TARGET, return_input_shape=False)
    laws.assert_same(around, expected, 0.05)


@both_forms
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_around_the_call(form: encoder.Form, mode: Callable[[], object]) -> None:
    model = Encoder(form)
    expected = encoder.expected_tokens(model, encoder.features(), TARGET)
    with mode():
        laws.assert_same(tokens(model, encoder.features()), expected)


def test_tensors_of_inference_mode_as_input() -> None:
    model = Encoder(fused)
    with torch.inference_mode():
        inputs = encoder.features() * 1
    expected = encoder.expected_tokens(model, encoder.features(), TARGET)
    laws.assert_same(tokens(model, inputs), expected)


def test_inputs_with_and_without_gradients() -> None:
    model, inputs = Encoder(fused), encoder.features()
    expected = encoder.expected_tokens(model, inputs, TARGET)
    leaf = inputs.clone().requires_grad_()
    for given in (leaf, leaf * 1):
        laws.assert_same(tokens(model, given), expected)
    assert leaf.grad is None
    assert leaf.requires_grad


def test_training_mode_with_dropout_warns() -> None:
    def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    model = Encoder(dropping).train()
    with pytest.warns(UserWarning, match=r"(?i)dropout"):
        tokens(model, encoder.features())
    assert model.training


def test_evaluation_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(Encoder(fused), encoder.features())
        tokens(Encoder(eager), encoder.features())


@pytest.mark.parametrize(
    ("module", "name"), [(nn.Dropout(0.3), "dropout"), (nn.BatchNorm1d(TOKENS), "batch_norm")]
)
def test_what_acts_otherwise_in_training_mode_is_told_of(module: nn.Module, name: str) -> None:
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.module = Encoder(eager), module

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(self.module(x))

    model = Trained().double().train()
    message = rf"training mode \({name}\).* Call model.eval\(\) first"
    with pytest.warns(UserWarning, match=message) as caught:
        tokens(model, encoder.features())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(model.eval(), encoder.features())


DRAWN = encoder.features().shape[-1]


class Between(nn.Module):
    """An encoder whose input is treated by some function, which gets a weight and a buffer too."""

    def __init__(self, treat: Callable[..., Tensor]) -> None:
        super().__init__()
        self.encoder = Encoder(eager)
        self.treat = treat
        self.weight = nn.Parameter(torch.randn(DRAWN, DRAWN))
        self.register_buffer("constant", torch.randn(DRAWN, DRAWN))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.treat(x, self.weight, self.constant))


def standardised(weight: Tensor, **options: object) -> Tensor:
    """Weight standardisation as timm has it."""
    flat = weight.reshape(1, len(weight), -1)
    return F.batch_norm(flat, None, None, training=True, **options).reshape_as(weight)


def normed_alone(x: Tensor) -> Tensor:
    """Instance norm written with batch norm: examples are channels."""
    flat = F.batch_norm(x.mT.reshape(1, -1, x.shape[1]), None, None, training=True)
    return flat.view(*x.mT.shape).mT


NOT_IN_TRAINING: dict[str, Callable[..., Tensor]] = {
    "batch norm of a parameter": lambda x, w, _: F.linear(x, standardised(w)),
    "by keyword": lambda x, w, _: x @ F.batch_norm(
        input=w, running_mean=None, running_var=None, training=True
    ),
    "torch.batch_norm of a parameter": lambda x, w, _: x @ torch.batch_norm(
        w, None, None, None, None, True, 0.0, 1e-6, False
    ),
    "batch norm of a scaled parameter": lambda x, w, _: F.linear(x, standardised(2 * w)),
    "batch norm of a buffer": lambda x, _, c: x @ standardised(c),
    "batch norm of a constant": lambda x, *_: x * F.batch_norm(
        torch.arange(12.0, dtype=x.dtype).view(3, 4), None, None, training=True
    ).std(),
    "instance norm": lambda x, *_: F.instance_norm(x.mT, use_input_stats=True).mT,
    "instance norm by batch norm": lambda x, *_: normed_alone(x),
    "dropout of a parameter": lambda x, w, _: x @ F.dropout(w, 0.5),
    "alpha dropout of a buffer": lambda x, _, c: x @ F.alpha_dropout(c, 0.5, training=True),
}  # fmt: skip
IN_TRAINING: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "batch norm": ("batch_norm", lambda x, *_: F.batch_norm(x.mT, None, None, training=True).mT),
    "by keyword": ("batch_norm", lambda x, *_: F.batch_norm(
        input=x.mT, running_mean=None, running_var=None, training=True
    ).mT),
    "with running statistics": ("batch_norm", lambda x, *_: F.batch_norm(
        x.mT, torch.zeros(DRAWN).double(), torch.ones(DRAWN).double(), training=True
    ).mT),
    "of the sum with a parameter": ("batch_norm", lambda x, w, _: F.batch_norm(
        (x + w[0]).mT, None, None, training=True
    ).mT),
    "dropout": ("dropout", lambda x, *_: F.dropout(x, 0.5)),
    "dropout of a product": ("dropout", lambda x, w, _: F.dropout(x @ w, 0.5)),
    "both": ("dropout", lambda x, w, _: F.dropout(x @ standardised(w), 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_IN_TRAINING)
def test_what_treats_weights_or_single_examples_is_no_training_mode(name: str) -> None:
    model = Between(NOT_IN_TRAINING[name]).double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokens(model, encoder.features()).max() > 0


def test_dropout_in_fused_attention_of_parameters_alone() -> None:
    def treat(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
        F.scaled_dot_product_attention(w[None], w[None], w[None], dropout_p=0.5)
        return x

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens(Between(treat).double().eval(), encoder.features(), layers="encoder")
    assert not [w for w in caught if "training mode" in str(w.message)]


@pytest.mark.parametrize("name", IN_TRAINING)
def test_what_treats_activations_is(name: str) -> None:
    told, treat = IN_TRAINING[name]
    model = Between(treat).double().eval()
    with pytest.warns(UserWarning, match=rf"training mode \({told}\)") as caught:
        tokens(model, encoder.features())
    assert len(caught) == 1


@pytest.mark.parametrize("training", [True, False])
def test_hybrids_with_standardised_weights(training: bool) -> None:
    """Timm's ResNetV2 in front of a vision transformer standardises its weights by batch norm."""
    from timm.layers import HybridEmbed, StdConv2dSame
    from timm.models.resnetv2 import ResNetV2
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    backbone = ResNetV2(
        layers=(1,), channels=(128,), num_classes=0, global_pool="", preact=False, stem_chs=32,
        stem_type="same", conv_layer=StdConv2dSame,
    )  # fmt: skip
    model = VisionTransformer(
        img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5, proj_drop_rate=0.1,
        embed_layer=lambda **given: HybridEmbed(
            backbone, img_size=given["img_size"], patch_size=1, in_chans=3,
            embed_dim=given["embed_dim"],
        ),
    ).train(training)  # fmt: skip
    nn.init.normal_(model.head.weight)
    pictures = torch.randn(4, 3, 32, 32)
    if training:
        with pytest.warns(UserWarning, match=r"training mode \(dropout\)"):
            GenericAttention(model).attribute(pictures, 1)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = GenericAttention(model).attribute(pictures, 1)
    assert ours.max() > 0
    with pytest.raises(ValueError, match="must depend on that example alone"):
        GenericAttention(lambda x: model(x) - model(x).mean(0)).attribute(pictures, 1)


def test_what_is_drawn_by_nn_init_while_the_model_runs() -> None:
    """PyTorch hands its tensor over by keyword."""
    plain = Between(lambda x, *_: x).double().eval()

    def treat(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            zeros = nn.init.zeros_(torch.empty_like(w))
        ones = nn.init.constant_(torch.empty(len(w), dtype=w.dtype), 1.0)
        return x * ones + nn.init.normal_(zeros, 0.0, 1e-300).sum() * 0

    drawn = Between(treat).double().eval()
    drawn.load_state_dict(plain.state_dict())
    laws.assert_same(tokens(drawn, encoder.features()), tokens(plain, encoder.features()))
