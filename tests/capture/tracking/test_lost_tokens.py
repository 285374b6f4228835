"""Where tokens are lost, the operation that lost them is named, not the one that noticed.

Also: kernels that keep their probabilities are refused by name, and what is skipped on the user's
word hands on the tokens of its queries; memory errors are no answers; inference tensors.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import oracles
from zoo.encoder import BATCH, TOKENS, WIDTH, Block, Encoder, features, ids
from zoo.laws import assert_same

from captum_generic_attn import GenericAttention, UnsupportedAttentionError

TARGET = 1
MIXING = torch.linspace(-1, 1, TOKENS**2, dtype=torch.float64).view(TOKENS, TOKENS).sin()
MIXING = MIXING + 3 * torch.eye(TOKENS, dtype=torch.float64)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def explain(model: Callable[..., Any], inputs: Any, **options: Any) -> Any:
    method = GenericAttention(model, **options)
    return method.attribute(inputs, TARGET, return_input_shape=False)


def refusal(model: Callable[..., Any], inputs: Any, **options: Any) -> str:
    with pytest.raises(UnsupportedAttentionError) as caught:
        explain(model, inputs, **options)
    return str(caught.value)


class Between(Encoder):
    """Two layers with one step between them; `vocabulary` for ids."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor], vocabulary: int | None = None):
        super().__init__(fused, vocabulary=vocabulary)
        self.step = step
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.mix = nn.Linear(TOKENS, TOKENS)
        oracles.randomise(self.double())

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(x) + self.position)
        return self.head(self.blocks[1](self.step(self, x))[:, 0])


# -- the operation that lost tokens is named ---------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy()[:, ::-1].copy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.flip(1)


def over_the_batch(m: Any, x: Tensor) -> Tensor:
    """Examples change places: what follows reads tokens of another one."""
    return torch.cat([x[1:], x[:1]])


LOSSES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "cumsum": (lambda m, x: x.cumsum(1), "cumsum"),
    "cumprod": (lambda m, x: x.tanh().cumprod(1), "cumprod"),
    "logcumsumexp": (lambda m, x: x.logcumsumexp(1), "logcumsumexp"),
    "fft": (lambda m, x: torch.fft.fft(x, dim=1).real, "fft"),
    "fft of tokens and features (FNet)": (lambda m, x: torch.fft.fft2(x).real, "fft2"),
    "rfft and back": (lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1), 6, dim=1), "rfft"),
    "a matrix": (lambda m, x: MIXING @ x, "matmul"),
    "einsum": (lambda m, x: torch.einsum("mn,bnd->bmd", MIXING, x), "einsum"),
    "a layer over tokens (MLP-Mixer)": (lambda m, x: m.mix(x.mT).mT, "linear"),
    "a convolution over tokens": (
        lambda m, x: F.conv1d(x, MIXING[:, :, None]), "conv1d"
    ),
    "LSTM": (lambda m, x: m.lstm(x)[0], "lstm"),
    "GRU": (lambda m, x: m.gru(x)[0], "gru"),
    "solve": (lambda m, x: torch.linalg.solve(MIXING, x), "linalg_solve"),
    "solve_triangular": (
        lambda m, x: torch.linalg.solve_triangular(MIXING.triu(), x, upper=True),
        "linalg_solve_triangular",
    ),
    "custom function": (lambda m, x: Reversed.apply(x), "Reversed"),
    "sorted features": (lambda m, x: x.sort(1).values, "sort"),
    "grid_sample": (
        lambda m, x: F.grid_sample(
            x.mT[:, :, None], torch.zeros(BATCH, 1, 6, 2).double(), align_corners=False
        )[:, :, 0].mT,
        "grid_sampler|grid_sample",
    ),
    "as_strided": (lambda m, x: x.clone().as_strided(x.shape, (48, 1, 6)), "as_strided"),
    "softplus behind cumsum": (lambda m, x: F.softplus(x.cumsum(1)).tanh() + 1, "cumsum"),
    "cumsum, then a layer": (lambda m, x: m.blocks[0].mlp(x.cumsum(1)), "cumsum"),
    "cumsum, then matrices": (lambda m, x: MIXING @ x.cumsum(1), "cumsum"),
    "residual round cumsum": (lambda m, x: x + x.cumsum(1), "cumsum"),
    "some of the features": (
        lambda m, x: torch.cat([x[..., :4], x[..., 4:].cumsum(1)], -1),
        "cumsum",
    ),
    "written over": (
        lambda m, x: x.clone().index_copy(1, torch.tensor([2]), x.cumsum(1)[:, 2:3]), "cumsum"
    ),
}  # fmt: skip


@pytest.mark.parametrize("vocabulary", [None, 20], ids=["features", "ids"])
@pytest.mark.parametrize("name", LOSSES)
def test_lost_between_two_layers(name: str, vocabulary: int | None) -> None:
    step, lost = LOSSES[name]
    model = Between(step, vocabulary)
    message = refusal(model, ids() if vocabulary else features())
    assert "blocks.1.attention" in message
    assert "blocks.0.attention" not in message
    through = message.partition("through ")[2].partition(";")[0].partition(",")[0]
    assert through.split()[0] in lost.split("|"), message


def test_native_layer_norm_is_a_norm_of_each_token() -> None:
    """It is not a norm over examples: it loses no tokens and gives the maps of `layer_norm`."""
    model = Between(lambda m, x: F.layer_norm(x, [WIDTH]))
    expected = explain(model, features())
    model.step = lambda m, x: torch.native_layer_norm(x, [WIDTH], None, None, 1e-5)[0]
    torch.testing.assert_close(explain(model, features()), expected)


def test_examples_that_change_places() -> None:
    """The second layer explains another example's tokens: the score reads them, and it is said."""
    with pytest.raises(ValueError, match=r"read tokens of|different examples"):
        explain(Between(over_the_batch), features())


# -- before there are tokens: hints fit what the inputs are ------------------------------------

UNFOLDED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "cumsum of a picture": (lambda m, x: m.patch(x.cumsum(-1)).flatten(2).mT, "cumsum"),
    "fft of a picture": (lambda m, x: m.patch(torch.fft.fft2(x).real).flatten(2).mT, "fft2"),
    "a matrix over rows of pixels": (
        lambda m, x: m.patch(torch.ones(8, 8).double() @ x).flatten(2).mT, "matmul"
    ),
    "examples joined": (
        lambda m, x: m.patch(torch.cat([x[:1], x[:1] + x[1:]], 0)).flatten(2).mT, "cat|add"
    ),
}  # fmt: skip


class Pictures(Encoder):
    def __init__(self, step: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(fused)
        self.step, self.patch = step, nn.Conv2d(3, WIDTH, 4, 4)
        self.flat = nn.Linear(48, WIDTH)
        oracles.randomise(self.double())

    def forward(self, x: Tensor) -> Tensor:
        x = self.step(self, x)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, 3, 8, 12, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", UNFOLDED)
def test_lost_in_a_picture(name: str) -> None:
    step, lost = UNFOLDED[name]
    message = refusal(Pictures(step), pictures())
    through = message.partition("through ")[2].partition(";")[0].partition(",")[0]
    assert any(word in lost.split("|") for word in through.split()), message
    assert "text" not in message
    assert "ids" not in message


@pytest.mark.parametrize(
    ("step", "lost"),
    [
        (lambda m, x: m.embed(x.cumsum(1)), "cumsum"),
        (lambda m, x: m.embed(MIXING @ x), "matmul"),
        (lambda m, x: m.embed(torch.fft.fft(x, dim=1).real), "fft"),
    ],
    ids=["cumsum", "matmul", "fft"],
)
def test_lost_in_features(step: Callable[[Any, Tensor], Tensor], lost: str) -> None:
    message = refusal(Pictures(step), features())
    assert f"through {lost}" in message
    assert "text" not in message
    assert "ids" not in message


def test_a_view_that_mixes_makes_tokens_of_those_in_each_row() -> None:
    """Each row holds features of all six tokens: equal shares of them, as where tokens merge."""
    model = Between(lambda m, x: x.mT.reshape(x.shape))
    kept: list[Tensor] = []

    def keeping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return kept[-1] @ v

    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.attention.form = keeping
    first, last = oracles.maps_from(lambda: twin(features()), kept, TARGET)
    shares = torch.full((TOKENS, TOKENS), 1 / TOKENS, dtype=torch.float64)
    merged = shares @ (torch.eye(TOKENS) + first)
    assert_same(explain(model, features()), (merged + last @ merged - shares)[:, 0])


@pytest.mark.parametrize("padding", [0, 2])
def test_patches_by_unfold(padding: int) -> None:
    """They are the patches of a convolution, with padding too."""

    def unfolded(m: Any, x: Tensor) -> Tensor:
        return m.flat(F.unfold(x, 4, stride=4, padding=padding).mT)

    def convolved(m: Any, x: Tensor) -> Tensor:
        weight = m.flat.weight.view(WIDTH, 3, 4, 4)
        return F.conv2d(x, weight, m.flat.bias, stride=4, padding=padding).flatten(2).mT

    found, expected = (
        GenericAttention(Pictures(step)).attribute(pictures(), TARGET)
        for step in (unfolded, convolved)
    )
    assert_same(found, expected)


# -- kernels that keep their probabilities -----------------------------------------------------

_LIBRARY = torch.library.Library("captum_generic_attn_tests", "FRAGMENT")
_LIBRARY.define("flash_attn_func(Tensor q, Tensor k, Tensor v) -> Tensor")
_LIBRARY.impl("flash_attn_func", fused, "CompositeImplicitAutograd")
aten = torch.ops.aten


KERNELS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "aten's on the CPU": (
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "aten's on the CPU, an overload": (
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0],
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "a custom operator": (
        torch.ops.captum_generic_attn_tests.flash_attn_func,
        "flash_attn_func",
    ),
    "a custom operator's overload": (
        torch.ops.captum_generic_attn_tests.flash_attn_func.default,
        "flash_attn_func",
    ),
}


class Skipping(Encoder):
    """The middle one of three layers has another kernel."""

    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__(fused, blocks=[Block(fused), Block(form), Block(fused)])


def by_hand(form: Callable[..., Tensor]) -> Tensor:
    """Eq. 6 over the first and the last layer."""
    kept: list[Tensor] = []

    def keeping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return kept[-1] @ v

    twin = Encoder(fused, blocks=[Block(keeping), Block(fused), Block(keeping)])
    twin.load_state_dict(Skipping(form).state_dict())
    return oracles.read_row(
        oracles.propagate(oracles.maps_from(lambda: twin(features()), kept, TARGET)), 0
    )


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).sigmoid() @ v


def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q.mT @ k).softmax(-1) @ v.mT).mT


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_refused_by_name(name: str) -> None:
    form, seen = KERNELS[name]
    message = refusal(Skipping(form), features())
    assert f"blocks.1.attention (SelfAttention): the kernel {seen} keeps" in message
    assert '"sdpa" or "eager"' in message


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_skipped_on_the_users_word(name: str) -> None:
    form, seen = KERNELS[name]
    with pytest.warns(UserWarning, match=seen) as told:
        found = explain(Skipping(form), features(), strict=False)
    assert len(told) == 1
    assert_same(found, by_hand(form))
    layers = ["blocks.0", "blocks.2"]
    assert_same(explain(Skipping(form), features(), layers=layers), by_hand(form))


@pytest.mark.parametrize("form", [mixed, channels], ids=["sigmoid", "channels"])
def test_skipped_calls_hand_on_the_tokens_of_their_queries(form: Callable[..., Tensor]) -> None:
    """What follows them is explained as if there were none."""
    model = Skipping(form)
    kept: list[Tensor] = []

    def keeping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return kept[-1] @ v

    twin = copy.deepcopy(model)
    for place in (0, 2):
        twin.blocks[place].attention.form = keeping
    maps = oracles.maps_from(lambda: twin(features()), kept, TARGET)
    expected = oracles.read_row(oracles.propagate(maps), 0)
    with pytest.warns(UserWarning, match=r"blocks\.1\.attention"):
        found = explain(model, features(), strict=False)
    assert_same(found, expected)
    assert_same(explain(model, features(), layers=["blocks.0", "blocks.2"]), expected)


@pytest.mark.parametrize(
    "form",
    [
        lambda q, k, v: fused(q, k, v.flip(2)),
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v.flip(2),
        lambda q, k, v: fused(q, k, v.cumsum(2)),
    ],
    ids=["other values, fused", "other values", "lost values"],
)
def test_refused_values_are_skipped_too(form: Callable[..., Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        relevance = GenericAttention(Skipping(form), strict=False).relevance(features(), TARGET)
    used = [call.module for call in relevance.calls if call.used]
    assert used == ["blocks.0.attention", "blocks.2.attention"]


# -- memory ------------------------------------------------------------------------------------

MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
]
memory_errors = pytest.mark.parametrize("error", MEMORY, ids=["accelerator", "CPU"])


@memory_errors
@pytest.mark.parametrize("operation", ["flatten", "transpose", "unflatten"])
def test_memory_errors_in_shape_operations_are_not_swallowed(
    operation: str, error: Exception
) -> None:
    """Only the operation on token ids fails: the one that the model asked for ran before."""
    moved = "captum_generic_attn.capture.tracking.families.layout.moved"
    from captum_generic_attn.capture.tracking.families.layout import moved as really

    def failing(ids: Tensor, op: Any) -> list[Tensor]:
        if op.name == operation:
            raise error
        return really(ids, op)

    with mock.patch(moved, failing), pytest.raises(type(error), match="allocate"):
        explain(Encoder(fused), features())


@contextmanager
def failing_gradients(error: Exception) -> Iterator[None]:
    with mock.patch("torch.autograd.grad", side_effect=error):
        yield


@memory_errors
def test_memory_errors_in_probes_are_not_swallowed(error: Exception) -> None:
    model = Between(lambda m, x: m.lstm(x)[0])
    with failing_gradients(error), pytest.raises(type(error), match="allocate"):
        explain(model, features())


@memory_errors
def test_memory_errors_of_the_model_are_its_own(error: Exception) -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error), match="allocate"):
        explain(Between(step), features())


def test_other_errors_of_a_probe_lose_tokens_by_name() -> None:
    model = Between(lambda m, x: m.lstm(x)[0])
    with (
        mock.patch("captum_generic_attn.capture.tracking.probe._gradients", return_value=None),
        pytest.raises(UnsupportedAttentionError, match="lstm"),
    ):
        explain(model, features())


# -- models that were built in inference mode --------------------------------------------------


def timm_vit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm", reason="the families of timm need timm")
    model = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=16)
    return model.double(), torch.randn(BATCH, 3, 32, 32, dtype=torch.float64)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def bert() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers", reason="BERT is Hugging Face's")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    return Logits(transformers.BertForSequenceClassification(config).double()), ids()


def torch_encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(48, 4)
    )
    return model.double(), features()


BUILT = {"timm": timm_vit, "BERT": bert, "torch.nn": torch_encoder, "plain": None}


@pytest.mark.parametrize("name", BUILT)
def test_models_that_were_built_in_inference_mode(name: str) -> None:
    build = BUILT[name] or (lambda: (Encoder(fused), features()))
    torch.manual_seed(0)
    usual, inputs = build()
    torch.manual_seed(0)
    with torch.inference_mode():
        built, _ = build()
        oracles.randomise(built.eval())
    oracles.randomise(usual.eval())
    assert next(built.parameters()).is_inference()
    assert_same(explain(built, inputs), explain(usual, inputs))
    assert_same(explain(built, inputs.clone()), explain(usual, inputs))


def test_inference_tensors_that_are_no_parameters_are_said_to_be() -> None:
    class Scaled(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.scale)

    model = Scaled(fused)
    with torch.inference_mode():
        model.scale = torch.full((3,), 2.0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"neither parameters nor buffers.*outside"):
        explain(model, features())
