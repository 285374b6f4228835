"""The names of running modules, for any kind of forward function."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch import Tensor, nn

from captum_generic_attn.capture.scope import Scope, modules_of, qualified, signature_of


class Layer(nn.Module):
    """Keeps what the scope says while it runs; fails if it is told to."""

    def __init__(self, log: list[tuple[str, str]] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.ones(3))
        self.inner = nn.Identity()
        self.log = log
        self.scope: Scope | None = None
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.scope is not None and self.log is not None:
            self.log.append(self.scope.current())
        if self.fails:
            raise RuntimeError("on purpose")
        return x * 2


class Owner:
    """An object that holds models and is no module."""

    def __init__(self, *models: nn.Module) -> None:
        self.model = models[0]
        self.others = models[1:]

    def scores(self, x: Tensor) -> Tensor:
        return self.model(x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)


GLOBAL = nn.Linear(2, 2)


def reads_a_global(x: Tensor) -> Tensor:
    return GLOBAL(x)


def decorated(function):
    @functools.wraps(function)
    def inside(*args):
        return function(*args)

    return inside


def forms(model: nn.Module) -> dict[str, object]:
    def closure(x):
        return model(x)

    def nested(x):
        return closure(x) + 1

    return {
        "module": model,
        "bound method": model.forward,
        "partial": functools.partial(model.forward),
        "partial of a partial": functools.partial(functools.partial(closure)),
        "closure": closure,
        "nested closure": nested,
        "decorated": decorated(closure),
        "lambda": lambda x: model(x)[0],
        "owner that is called": Owner(model),
        "argument of a partial": functools.partial(lambda m, x: m(x), model),
        "keyword of a partial": functools.partial(lambda x, m: m(x), m=model),
        "compiled": torch.compile(model, backend="eager"),
    }


@pytest.mark.parametrize("form", forms(nn.Identity()))
def test_the_module_behind_a_forward_function(form: str) -> None:
    model = nn.Sequential(Layer())
    assert modules_of(forms(model)[form]) == {"": model}


def test_a_global_module_is_found() -> None:
    assert modules_of(reads_a_global) == {"": GLOBAL}


def test_several_modules_have_the_names_of_their_variables() -> None:
    vision, text = Layer(), Layer()
    assert modules_of(lambda x: vision(x) + text(x)) == {"vision": vision, "text": text}


def test_modules_inside_others_are_not_roots() -> None:
    model = nn.Sequential(Layer(), Layer())
    first = model[0]
    assert modules_of(lambda x: model(x) + first(x)) == {"": model}


def test_a_module_known_by_two_names_is_one() -> None:
    one = Layer()
    other = one
    assert modules_of(lambda x: one(x) + other(x)) == {"": one}


def test_functions_without_modules() -> None:
    assert modules_of(torch.relu) == {}
    assert modules_of(lambda x: x * 2) == {}
    assert modules_of(None) == {}


def test_a_method_s_owner_is_known_when_it_runs() -> None:
    """It is not known beforehand what a method of a normal object calls."""
    log: list[tuple[str, str]] = []
    model = nn.Sequential(Layer(log))
    forward = Owner(model).scores
    roots = modules_of(forward)
    with listening(model, roots) as scope:
        forward(torch.ones(2))
    assert log == [("0", "Layer")]
    assert scope.modules["0"] is model[0]


def test_a_cell_that_is_not_filled_yet() -> None:
    def outer():
        def inside(x):
            return late(x)

        found = modules_of(inside)
        late = Layer()
        return found, late

    assert outer()[0] == {}


def test_qualified() -> None:
    assert qualified("a", "b") == "a.b"
    assert qualified("", "b") == "b"
    assert qualified("a", "") == "a"
    assert qualified("", "") == ""


def test_signature_of() -> None:
    model = Layer()
    assert signature_of(model) == model.forward
    assert signature_of(torch.compile(model, backend="eager")) == model.forward
    assert signature_of(reads_a_global) is reads_a_global


# --- where it is


def listening(model: nn.Module, roots: dict[str, nn.Module] | None = None) -> Scope:
    scope = Scope({"": model} if roots is None else roots)
    for module in model.modules():
        if isinstance(module, Layer):
            module.scope = scope
    return scope


def test_the_running_module_is_named() -> None:
    log: list[tuple[str, str]] = []
    model = nn.Sequential(Layer(log), nn.Sequential(Layer(log)))
    with listening(model) as scope:
        model(torch.ones(2))
        assert scope.current() == ("", "function")
    assert log == [("0", "Layer"), ("1.0", "Layer")]


def test_roots_give_their_names_as_prefixes() -> None:
    log: list[tuple[str, str]] = []
    vision, text = nn.Sequential(Layer(log)), Layer(log)
    scope = Scope({"vision": vision, "text": text})
    vision[0].scope = text.scope = scope
    with scope:
        text(vision(torch.ones(2)))
    assert log == [("vision.0", "Layer"), ("text", "Layer")]
    assert scope.modules["vision.0"] is vision[0]
    assert scope.parameters[id(text.weight)] == "text.weight"
    assert scope.parameters[id(vision[0].table)] == "vision.0.table"
    assert {id(t) for t in scope.tensors()} == set(scope.parameters)
    assert scope.name_of(vision[0]) == ("vision.0", "Layer")
    assert scope.name_of(Layer()) == ("", "Layer")


class Softmax(nn.Softmax):
    """A subclass of a model, as for a softmax in float32: it has hooks, unlike PyTorch's own."""


class Dropout(nn.Dropout):
    """A subclass of a model."""


class Identity(nn.Identity):
    """A subclass of a model."""


class Attention(nn.Module):
    """Its softmax and dropout are modules."""

    def __init__(self, *inside: type[nn.Module]) -> None:
        super().__init__()
        softmax, dropout, identity = inside
        self.softmax, self.dropout, self.tap = softmax(-1), dropout(0.1), identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.tap(self.dropout(self.softmax(x)))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "inside", [(nn.Softmax, nn.Dropout, nn.Identity), (Softmax, Dropout, Identity)],
    ids=["PyTorch's", "the model's own"],
)  # fmt: skip
def test_a_softmax_module_counts_as_its_owner(inside: tuple, known: bool) -> None:
    """Also with the global hooks, where no module is found beforehand."""
    model = nn.Sequential(Attention(*inside))
    seen = []
    with Scope({"": model} if known else {}) as scope:
        for module in model[0].children():
            module.register_forward_pre_hook(lambda *_: seen.append(scope.current()))
            module.register_forward_hook(lambda *_: seen.append(scope.current()))
        model(torch.ones(2))
    assert len(seen) == 6
    assert {*seen} == {("0", "Attention")}


def test_without_roots_the_outermost_module_gives_the_names() -> None:
    log: list[tuple[str, str]] = []
    model = nn.Sequential(nn.Sequential(Layer(log)))
    with listening(model, roots={}) as scope:
        model(torch.ones(2))
        assert scope.parameters[id(model[0][0].weight)] == "0.0.weight"
    assert log == [("0.0", "Layer")]
    model(torch.ones(2))
    assert log[1:] == [("", "function")], "nobody listens any more"


def test_a_module_that_fails_leaves_the_stack() -> None:
    log: list[tuple[str, str]] = []
    model = nn.Sequential(Layer(log), Layer(log))
    model[1].fails = True
    with listening(model) as scope:
        with pytest.raises(RuntimeError, match="on purpose"):
            model(torch.ones(2))
        assert scope.current() == ("", "function")
        model[0](torch.ones(2))
    assert log == [("0", "Layer"), ("1", "Layer"), ("0", "Layer")]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_leave_with_the_block() -> None:
    model = nn.Sequential(Layer(), Layer())
    with Scope({"": model}):
        assert hooks_of(model) == 2 * 3  # PyTorch's building blocks need none
    assert hooks_of(model) == 0
    with pytest.raises(KeyError, match="here"), Scope({"": model}):
        raise KeyError("here")
    assert hooks_of(model) == 0


def test_calls_from_other_threads_pass_unseen() -> None:
    model = nn.Sequential(Layer())
    seen = []
    with Scope({"": model}) as scope:
        model[0].inner.register_forward_hook(lambda *_: seen.append(scope.current()))
        thread = threading.Thread(target=model[0].inner, args=(torch.ones(2),))
        thread.start()
        thread.join()
        assert seen == [("", "function")]
        assert scope._stack == []


class Softmaxes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


def test_softmaxes_in_scripted_modules_are_found() -> None:
    example = torch.ones(2, 2)
    model = nn.Sequential(
        torch.jit.trace(Softmaxes(), example), torch.jit.trace(nn.ReLU(), example), Softmaxes()
    )
    scope = Scope({"": model})
    assert scope.scripted_attention() == ["0"]
    with scope:
        assert torch.equal(model(example), torch.full((2, 2), 0.5).softmax(-1))
