"""After any call, however it ends, the model and the process are as they were before it.

Modelled on what Captum asks of its own methods after a normal call, a wrong target and a module
that raises; here also after a refusal and an interruption, and in whatever context the user works.
"""

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import pictures, sentences, tiny_text, tiny_vit, two_towers
from torch import Tensor, nn
from torch.nn.modules import module as module_registry

from captum_generic_attn import GenericAttention, UnsupportedAttentionError

GLOBAL_HOOKS = [
    name
    for name, value in vars(module_registry).items()
    if name.startswith("_global_") and isinstance(value, dict)
]

PATCHABLE = {
    "F.scaled_dot_product_attention": lambda: F.scaled_dot_product_attention,
    "F.softmax": lambda: F.softmax,
    "F.multi_head_attention_forward": lambda: F.multi_head_attention_forward,
    "F.linear": lambda: F.linear,
    "torch.matmul": lambda: torch.matmul,
    "torch.bmm": lambda: torch.bmm,
    "torch.einsum": lambda: torch.einsum,
    "torch.softmax": lambda: torch.softmax,
    "Tensor.softmax": lambda: Tensor.softmax,
    "Tensor.__matmul__": lambda: Tensor.__matmul__,
    "nn.Module.__call__": lambda: nn.Module.__call__,
    "nn.MultiheadAttention.forward": lambda: nn.MultiheadAttention.forward,
    "no_grad.__enter__": lambda: torch.no_grad.__enter__,
    "_set_grad_enabled": lambda: torch._C._set_grad_enabled,
}


def process_state() -> dict[str, Any]:
    """What a call could leave in the process, apart from the model."""
    return {
        "compiler stance": torch._dynamo.eval_frame._stance,
        "global hooks": {name: dict(getattr(module_registry, name)) for name in GLOBAL_HOOKS},
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "nothing patched": {name: get() for name, get in PATCHABLE.items()},
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warning filters": list(warnings.filters),
    }


def module_state(model: nn.Module) -> dict[str, Any]:
    """All that a call could leave on a model; tensors by identity, version and value."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name] = {
            "type": type(module),
            "training": module.training,
            "attributes": {key: id(value) for key, value in vars(module).items()},
            "hooks": {
                key: {number: id(hook) for number, hook in value.items()}
                for key, value in vars(module).items()
                if "hooks" in key and isinstance(value, dict)
            },
        }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state[f"tensor {name}"] = {
            "id": id(tensor),
            "version": tensor._version,
            "requires_grad": tensor.requires_grad,
            "grad id": id(tensor.grad),
            "attributes": sorted(vars(tensor)),
            "backward hooks": list((tensor._backward_hooks or {}).items()),
        }
    return state


def tensor_values(model: nn.Module) -> dict[str, Tensor]:
    values = {f"{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            values[f"{name}.grad"] = parameter.grad.clone()
    return values


@contextmanager
def everything_as_before(model: nn.Module, *inputs: Tensor) -> Iterator[None]:
    process, modules, values = process_state(), module_state(model), tensor_values(model)
    kept = [(x, x.detach().clone(), x.requires_grad, x.grad, x._version) for x in inputs]
    yield
    assert process_state() == process
    assert module_state(model) == modules
    after = tensor_values(model)
    assert after.keys() == values.keys()
    assert all(torch.equal(after[name], value) for name, value in values.items())
    for x, value, requires_grad, grad, version in kept:
        assert torch.equal(x.detach(), value)
        assert x.requires_grad == requires_grad
        assert x.grad is grad
        assert x._version == version


class Encoder(nn.Module):
    """`nn.TransformerEncoder` over token ids: `nn.MultiheadAttention` and its fast paths."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(self.words(input_ids)))[:, 0])


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().double().eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "timm": (tiny_vit, pictures),
    "sdpa": (tiny_text, sentences),
    "eager": (lambda: tiny_text(eager=True), sentences),
    "nn.TransformerEncoder": (encoder, sentences),
}


@pytest.fixture(params=MODELS)
def case(request) -> tuple[nn.Module, Tensor]:
    build, inputs = MODELS[request.param]
    return build(), inputs()


class BrokenError(RuntimeError):
    pass


class Breaking(nn.Module):
    def __init__(self, error: BaseException):
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


CALLS: dict[str, Callable[[GenericAttention, Tensor], object]] = {
    "attribute": lambda method, x: method.attribute(x, target=1),
    "attribute per token": lambda method, x: method.attribute(x, 1, return_input_shape=False),
    "attribute_targets": lambda method, x: method.attribute_targets(x, [0, 1, 2]),
    "relevance": lambda method, x: method.relevance(x, target=1, keep_calls=True),
}


@pytest.mark.parametrize("call", CALLS)
def test_after_success(case, call):
    model, inputs = case
    with everything_as_before(model, inputs):
        CALLS[call](GenericAttention(model), inputs)


@pytest.mark.parametrize("call", CALLS)
def test_after_a_wrong_target(case, call):
    model, inputs = case
    wrong = {
        "attribute": lambda method: method.attribute(inputs, target=99),
        "attribute per token": lambda method: method.attribute(inputs, "one"),
        "attribute_targets": lambda method: method.attribute_targets(inputs, [0, 99]),
        "relevance": lambda method: method.relevance(inputs, target=None),
    }[call]
    with everything_as_before(model, inputs), pytest.raises((ValueError, TypeError)):
        wrong(GenericAttention(model))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [BrokenError("broken on purpose"), KeyboardInterrupt()])
def test_after_a_module_that_raises(case, call, error):
    model, inputs = case
    model.norm = Breaking(error)
    if hasattr(model, "blocks"):
        model.blocks[-1] = nn.Sequential(model.blocks[-1], Breaking(error))
    with everything_as_before(model, inputs), pytest.raises(type(error)) as caught:
        CALLS[call](GenericAttention(model), inputs)
    assert caught.value is error


def test_a_failed_call_does_not_disturb_the_next():
    expected = GenericAttention(tiny_vit()).attribute(pictures(), target=1)
    model = tiny_vit()
    whole, model.norm = model.norm, Breaking(BrokenError())
    method = GenericAttention(model)
    with pytest.raises(BrokenError):
        method.attribute(pictures(), target=1)
    model.norm = whole
    assert torch.equal(method.attribute(pictures(), target=1), expected)


@pytest.mark.parametrize("where", ["pre", "post"])
def test_after_a_hook_of_the_user_that_raises(case, where):
    model, inputs = case

    def hook(*_):
        raise BrokenError

    module = model.head
    register = module.register_forward_pre_hook if where == "pre" else module.register_forward_hook
    register(hook)
    with everything_as_before(model, inputs), pytest.raises(BrokenError):
        GenericAttention(model).attribute(inputs, target=1)


class Unnormalised(nn.Module):
    """Queries, keys and values are multiplied without a softmax."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y.mT @ y


class HalfRefused(nn.Module):
    """Words attend to each other, then to a second sequence in a way that is refused."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.other = Unnormalised()
        self.head = nn.Linear(16, 5)

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        x = self.words(input_ids)
        x = x + self.own(x, x, x)[0]
        x = x + self.other(x, features)
        return self.head(x[:, 0])


@pytest.mark.parametrize("call", ["attribute", "attribute_targets", "relevance"])
def test_after_a_refusal(call):
    torch.manual_seed(0)
    model = HalfRefused().double().eval()
    inputs = (sentences(), torch.randn(3, 4, 16, dtype=torch.float64))
    with everything_as_before(model, *inputs), pytest.raises(UnsupportedAttentionError) as caught:
        CALLS[call](GenericAttention(model), inputs)
    assert caught.match("other")


def test_after_no_attention_was_found():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)).double().eval()
    with everything_as_before(model), pytest.raises(UnsupportedAttentionError):
        GenericAttention(model).attribute(pictures(), target=1)


def test_after_options_that_fit_nothing(case):
    model, inputs = case
    for options in ({"start_layer": 9}, {"layers": ["nowhere"]}, {"rows": 99}, {"output": "none"}):
        with everything_as_before(model, inputs), pytest.raises((ValueError, KeyError)):
            GenericAttention(model, **options).attribute(inputs, target=1)


@pytest.mark.filterwarnings("error")
def test_after_a_warning_turned_into_an_error():
    model = tiny_vit()
    nn.init.zeros_(model.head.weight)
    with everything_as_before(model), pytest.raises(UserWarning):
        GenericAttention(model).attribute(pictures(), target=1)


@pytest.mark.parametrize("call", CALLS)
def test_gradients_of_the_user(case, call):
    """Existing `.grad` tensors stay, bit for bit, and none is added."""
    model, inputs = case
    expected = CALLS["attribute"](GenericAttention(model), inputs)
    for index, parameter in enumerate(model.parameters()):
        if index % 3:
            parameter.grad = torch.full_like(parameter, float(index))
    with everything_as_before(model, inputs):
        CALLS[call](GenericAttention(model), inputs)
    assert any(p.grad is None for p in model.parameters())
    assert torch.equal(CALLS["attribute"](GenericAttention(model), inputs), expected)


def test_inputs_that_require_gradients():
    model = tiny_vit()
    expected = GenericAttention(model).attribute(pictures(), target=1)
    leaf = pictures().requires_grad_()
    leaf.grad = torch.ones_like(leaf)
    with everything_as_before(model, leaf):
        ours = GenericAttention(model).attribute(leaf, target=1)
    assert torch.equal(ours, expected)
    assert not ours.requires_grad


def test_model_that_changes_its_pictures_in_place():
    """What the model gets is its own: the user's tensor stays, also where a plain run spoils it."""
    model = tiny_vit()

    def forward(x):
        x.mul_(2)
        return model(x)

    inputs = pictures()
    ours = GenericAttention(forward).attribute(inputs, target=1)
    assert torch.equal(inputs, pictures())
    assert torch.equal(ours, GenericAttention(model).attribute(2 * pictures(), target=1))


def test_model_that_changes_its_words_in_place():
    model = tiny_text()

    def forward(input_ids):
        input_ids[input_ids == -100] = 0
        return model(input_ids)

    marked, clean = sentences(), sentences()
    marked[0, 3], clean[0, 3] = -100, 0
    inputs = marked.clone()
    ours = GenericAttention(forward).attribute(inputs, target=1)
    assert torch.equal(inputs, marked)
    assert torch.equal(ours, GenericAttention(model).attribute(clean, target=1))


def test_inputs_computed_by_the_user():
    """A user's own graph before the model gets no gradient from us, and still works after."""
    model = tiny_vit()
    scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    computed = pictures() * scale
    ours = GenericAttention(model).attribute(computed, target=1)
    assert scale.grad is None
    assert torch.equal(ours, GenericAttention(model).attribute(pictures(), target=1))
    computed.sum().backward()
    assert (scale.grad - pictures().sum()).abs() <= 1e-9


def test_a_graph_of_the_user_through_the_model():
    """A forward of the user's own before the call can still be differentiated after it."""
    model = tiny_vit()
    loss = model(pictures())[:, 1].sum()
    GenericAttention(model).attribute(pictures(), target=2)
    loss.backward()
    twin = tiny_vit()
    twin(pictures())[:, 1].sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("which", ["all", "blocks"])
def test_frozen_parameters(case, which):
    model, inputs = case
    expected = GenericAttention(model).attribute(inputs, target=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(which == "blocks" and not name.startswith(("blocks", "encoder")))
    with everything_as_before(model, inputs):
        ours = GenericAttention(model).attribute(inputs, target=1)
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_switched_off_around(case, context, frozen):
    model, inputs = case
    expected = GenericAttention(model).attribute(inputs, target=1)
    model.requires_grad_(not frozen)
    with context():
        made_inside = inputs.clone()
        with everything_as_before(model):
            ours = GenericAttention(model).attribute(inputs, target=1)
            other = GenericAttention(model).attribute(made_inside, target=1)
        assert not torch.is_grad_enabled()
    for result in (ours, other):
        assert (result - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert not result.requires_grad
    assert torch.equal(made_inside, inputs)


class FrozenTower(nn.Module):
    """A tower that its owner runs without gradients, under a trained head."""

    def __init__(self, tower: nn.Module, how: str):
        super().__init__()
        self.tower = tower
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                features = self.tower(x)
        else:
            torch.set_grad_enabled(False)
            features = self.tower(x)
            torch.set_grad_enabled(True)
        return features * 2


@pytest.mark.parametrize("how", ["no_grad", "set_grad_enabled"])
def test_gradients_switched_off_inside(how):
    tower = tiny_vit()
    expected = GenericAttention(lambda x: tower(x) * 2).attribute(pictures(), target=1)
    model = FrozenTower(tower, how)
    with everything_as_before(model):
        ours = GenericAttention(model).attribute(pictures(), target=1)
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert torch.is_grad_enabled()
    assert not model(pictures()).requires_grad


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_flags(case):
    """A model in training mode stays there, and so does each module of a mixed one."""
    model, inputs = case
    model.train()
    list(model.modules())[-1].eval()
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with everything_as_before(model, inputs):
        GenericAttention(model).attribute(inputs, target=1)


def test_hooks_of_the_user_stay_and_fire(case):
    model, inputs = case
    expected = GenericAttention(model).attribute(inputs, target=1)
    fired = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: fired.append(("pre", name)))
        module.register_forward_hook(lambda m, args, out, name=name: fired.append(("post", name)))
        module.register_forward_hook(
            lambda m, args, kwargs, out, name=name: fired.append(("kwargs", name)),
            with_kwargs=True,
        )
    model(inputs)
    plain = list(fired)
    fired.clear()
    with everything_as_before(model, inputs):
        ours = GenericAttention(model).attribute(inputs, target=1)
    assert fired == plain
    assert len(fired) > 20
    assert torch.equal(ours, expected)


def test_a_hook_that_changes_the_output_counts():
    """What is explained is the model as the user runs it, hooks included."""
    model = tiny_vit()
    handle = model.head.register_forward_hook(lambda module, args, output: output[:, [1, 0, 2]])
    ours = GenericAttention(model).attribute(pictures(), target=0)
    handle.remove()
    assert torch.equal(ours, GenericAttention(model).attribute(pictures(), target=1))


def test_global_hooks_of_the_user_stay_and_fire():
    model = tiny_vit()
    fired = []
    handle = module_registry.register_module_forward_hook(lambda m, i, o: fired.append(type(m)))
    try:
        with everything_as_before(model):
            GenericAttention(model).attribute(pictures(), target=1)
        assert type(model) in fired
        fired.clear()
        model(pictures())
        assert type(model) in fired
    finally:
        handle.remove()


def test_under_a_function_mode_of_the_user():
    """`with torch.device(...)` is one; ours must leave it where it is."""
    model = tiny_vit()
    expected = GenericAttention(model).attribute(pictures(), target=1)
    with torch.device("cpu"), everything_as_before(model):
        ours = GenericAttention(model).attribute(pictures(), target=1)
    assert torch.equal(ours, expected)
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("build", [tiny_vit, encoder])
def test_autocast(build):
    model = build().float()
    inputs = pictures(dtype=torch.float32) if build is tiny_vit else sentences()
    expected = GenericAttention(model).attribute(inputs, target=1)
    with torch.autocast("cpu", dtype=torch.bfloat16), everything_as_before(model, inputs):
        ours = GenericAttention(model).attribute(inputs, target=1)
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, expected)
    error = (ours - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (error < 0.2).all()


def test_models_around_a_closure():
    model = two_towers()
    inputs = (pictures(3), sentences())
    expected = GenericAttention(model).attribute(inputs)

    def closure(pixels, ids):
        return model.vision(pixels).mul(model.text(ids)).sum(-1)

    with everything_as_before(model, *inputs):
        ours = GenericAttention(closure).attribute(inputs)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


def in_threads(count: int, work: Callable[[int], object]) -> list[object]:
    """Results of `work(0)` … `work(count - 1)`, each in a thread of its own, at once."""
    results: list[object] = [None] * count
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            torch.set_num_threads(1)
            barrier.wait()
            results[index] = work(index)
        except BaseException as error:  # noqa: BLE001  (a thread's error would be lost)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return results


@pytest.mark.parametrize("build", [tiny_vit, encoder])
def test_threads(build):
    """Eight threads on one model, each with its own input: as one after the other."""
    model = build()
    method = GenericAttention(model)
    draw = pictures if build is tiny_vit else sentences
    inputs = [draw(2, seed=seed) for seed in range(8)]
    serial = [method.attribute(x, target=index % 5) for index, x in enumerate(inputs)]

    def work(index: int) -> list[Tensor]:
        return [method.attribute(inputs[index], target=index % 5) for _ in range(3)]

    with everything_as_before(model, *inputs):
        found = in_threads(8, work)
    for results, expected in zip(found, serial, strict=True):
        for ours in results:
            assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.ci_sample
def test_threads_on_a_compiled_model():
    """Switching compilation off and on again is process-wide: threads must not mix it up."""
    plain = tiny_vit()
    expected = GenericAttention(plain).attribute(pictures(), target=1)
    torch._dynamo.reset()
    model = torch.compile(plain, backend="eager")
    method = GenericAttention(model)

    def work(index: int) -> list[Tensor]:
        return [method.attribute(pictures(), target=1) for _ in range(5)]

    with everything_as_before(model):
        found = in_threads(8, work)
    for results in found:
        for ours in results:
            assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("failing", [True, False])
def test_threads_some_of_which_fail(failing):
    """An error in one thread leaves the others, and the model, alone."""
    model = tiny_vit()
    method = GenericAttention(model)
    expected = method.attribute(pictures(), target=1)

    def work(index: int) -> Tensor | None:
        if index % 2:
            return method.attribute(pictures(), target=1)
        with pytest.raises(ValueError, match="target"):
            method.attribute(pictures(), target=99 if failing else None)
        return None

    with everything_as_before(model):
        found = in_threads(6, work)
    for ours in found[1::2]:
        assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_another_thread_may_use_the_model_meanwhile():
    """A plain forward elsewhere is neither recorded nor disturbed."""
    model = tiny_vit()
    method = GenericAttention(model)
    expected, output = method.attribute(pictures(), target=1), model(pictures())
    stop = threading.Event()
    differences: list[bool] = []

    def forward_all_the_time() -> None:
        while not stop.is_set():
            result = model(pictures())
            differences.append(result.requires_grad and torch.equal(result, output))

    thread = threading.Thread(target=forward_all_the_time)
    thread.start()
    try:
        results = [method.relevance(pictures(), target=1) for _ in range(2)]
        maps = [method.attribute(pictures(), target=1) for _ in range(3)]
    finally:
        stop.set()
        thread.join()
    assert differences
    assert all(differences)
    assert all(len(result.calls) == 2 for result in results)
    for ours in maps:
        assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


def compiled_model_gives_the_same(backend: Any) -> None:
    plain = tiny_vit()
    expected = GenericAttention(plain).attribute(pictures(), target=1)
    torch._dynamo.reset()
    model = torch.compile(copy.deepcopy(plain), backend=backend)
    with everything_as_before(model):
        ours = GenericAttention(model).attribute(pictures(), target=1)
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()
    # Compiled and run by the user first, the result is the same.
    output = model(pictures())
    assert (output - plain(pictures())).abs().max() <= 1e-9
    again = GenericAttention(model).attribute(pictures(), target=1)
    assert (again - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_compiled_model():
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled_model_gives_the_same(counting)
    # The user's forward was compiled: our call did not switch compilation off for good.
    assert graphs


@pytest.mark.slow
def test_model_compiled_by_inductor():
    compiled_model_gives_the_same("inductor")
