"""Parameters as constants: what operations get, what the model sees, what autograd saves.

The model is never changed: it reads and writes its own parameters. Only the operations compute with
detached ones.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import sentences, tiny_text
from torch import Tensor, nn

from captum_generic_attn import GenericAttention
from captum_generic_attn.capture import capture_forward
from captum_generic_attn.capture.constants import Constants
from captum_generic_attn.capture.mode import ConstantParametersMode


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def frozen(*owners: nn.Module | Tensor) -> ConstantParametersMode:
    """The mode for the parameters and buffers of modules, or for some tensors."""
    tensors = [
        tensor
        for owner in owners
        for tensor in ([owner] if isinstance(owner, Tensor)
                       else [*owner.parameters(), *owner.buffers()])
    ]  # fmt: skip
    return ConstantParametersMode({id(tensor) for tensor in tensors})


def leaves_below(tensor: Tensor) -> list[Tensor]:
    """The leaves of the graph of a tensor."""
    found, seen, waiting = [], set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [below for below, _ in node.next_functions]
    return found


def leads_to(tensor: Tensor, leaf: Tensor) -> bool:
    return any(found is leaf for found in leaves_below(tensor))


# --- what operations see


def in_place_sum(x: Tensor, w: Tensor) -> Tensor:
    y = x * 1
    y += w
    return y.add_(w)


def written_into(x: Tensor, w: Tensor) -> Tensor:
    y = x * 1
    y[0] = w[0]
    return y


def by_attention_function(x: Tensor, w: Tensor) -> Tensor:
    """A Python function of PyTorch that hands itself to the mode as one operation."""
    batch, wide = x[:, None], torch.cat([w, w, w])
    return F.multi_head_attention_forward(
        batch, batch, batch, 4, 2, wide, None, None, None, False, 0.0, w, None, need_weights=False
    )[0]


# x and w are [4, 4]; w is the parameter
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "linear, by keyword": lambda x, w: F.linear(x, weight=w),
    "bias, by keyword": lambda x, w: F.linear(x, x, bias=w[0]),
    "all by keyword": lambda x, w: F.linear(input=x, weight=w),
    "product": lambda x, w: x @ w,
    "product from the left": lambda x, w: w @ x,
    "einsum": lambda x, w: torch.einsum("ij,jk->ik", x, w),
    "einsum of a list": lambda x, w: torch.einsum("ij,jk->ik", [x, w]),
    "cat of a list": lambda x, w: torch.cat([w, x]),
    "cat of a tuple": lambda x, w: torch.cat((x, w), dim=1),
    "cat by keyword": lambda x, w: torch.cat(tensors=[x, w, x]),
    "stack": lambda x, w: torch.stack([x, w]),
    "sum": lambda x, w: 2 + w + x,
    "method": lambda x, w: w.mul(x),
    "a view": lambda x, w: x * w[1:3, :1].reshape(2, 1, 1),
    "transposed": lambda x, w: x @ w.T,
    "its data": lambda x, w: x @ w.data,
    "expanded": lambda x, w: x + w.unsqueeze(0).expand(3, -1, -1),
    "in place": in_place_sum,
    "written into": written_into,
    "norm": lambda x, w: F.layer_norm(x, (4,), w[0], w[1]),
    "convolution": lambda x, w: F.conv1d(x[None], w[:, :, None]),
    "embedding": lambda x, w: x + F.embedding(torch.tensor([0, 3, 1, 1]), w),
    "condition": lambda x, w: torch.where(x > 0, x, w),
    "fused attention": lambda x, w: F.scaled_dot_product_attention(x[None], w[None], w[None])[0],
    "attention function": by_attention_function,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_see_constants(name: str) -> None:
    """Results and gradients of other tensors are the same; the parameter has no gradient."""
    run, weight, x = OPERATIONS[name], nn.Parameter(draw(4, 4)), draw(4, 4, seed=1).requires_grad_()
    plain = run(x, weight)
    assert leads_to(plain, weight) != (name == "its data")
    with frozen(weight):
        ours = run(x, weight)
    assert torch.equal(ours, plain)
    assert not leads_to(ours, weight)
    assert leads_to(ours, x)
    for mine, its in zip(
        torch.autograd.grad(ours.sin().sum(), x), torch.autograd.grad(plain.sin().sum(), x),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)
    assert weight.requires_grad
    assert weight.grad is None


def test_what_is_made_of_parameters_alone_needs_no_gradient() -> None:
    weight = nn.Parameter(draw(4, 4))
    with frozen(weight):
        assert not (weight * 2).requires_grad
        assert not F.normalize(weight).requires_grad


def test_other_tensors_are_no_constants() -> None:
    """Only parameters of the model are constants: no others, and no tensors of equal values."""
    own, other = nn.Parameter(draw(4, 4)), nn.Parameter(draw(4, 4))
    tied = own.view_as(own)
    with frozen(own):
        result = F.linear(other, own) + tied
    assert leads_to(result, other)
    assert leads_to(result, own)  # through the view, which was made before


def test_the_arguments_themselves_stay_as_they_are() -> None:
    weight, x = nn.Parameter(draw(2)), draw(2)
    pieces, keywords = [weight, x], {"tensors": [x, weight]}
    seen: list[object] = []

    def note(*args: object, **kwargs: object) -> str:
        seen.extend((*args, *kwargs.values()))
        return "done"

    constants = Constants({id(weight)})
    assert constants.run(note, (pieces, x, 3, "a", None), keywords) == "done"
    assert pieces[0] is weight
    assert keywords["tensors"][1] is weight
    given, same, *rest, by_keyword = seen
    assert same is x
    assert rest == [3, "a", None]
    assert given[1] is by_keyword[0] is x
    for constant in (given[0], by_keyword[1]):
        assert not constant.requires_grad
        assert constant.data_ptr() == weight.data_ptr()


def test_nothing_is_replaced_where_nothing_must_be() -> None:
    weight, x = nn.Parameter(draw(2), requires_grad=False), draw(2)
    args = (weight, [x, weight], (x,))
    seen: list[object] = []
    Constants({id(weight)}).run(lambda *given: seen.extend(given), args, {})
    assert all(a is b for a, b in zip(seen[:1], args[:1], strict=True))
    assert seen[1][1] is weight


# --- what the model sees


class Asking(nn.Module):
    """Reads attributes of its parameter, as models do that freeze or count parameters."""

    def __init__(self, *, trained: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(4, 4), requires_grad=trained)

    def forward(self, x: Tensor) -> dict[str, object]:
        return {
            "requires_grad": self.weight.requires_grad,
            "is_leaf": self.weight.is_leaf,
            "grad": self.weight.grad,
            "grad_fn": self.weight.grad_fn,
            "type": type(self.weight),
            "same": self.weight is dict(self.named_parameters())["weight"],
            "any trained": any(p.requires_grad for p in self.parameters()),
            "shape": self.weight.shape,
            "device": self.weight.device,
            "dtype": self.weight.dtype,
            "address": self.weight.data_ptr(),
            "version": self.weight._version,
        }


@pytest.mark.parametrize("trained", [True, False])
def test_a_model_that_asks_its_parameters(trained: bool) -> None:
    model = Asking(trained=trained)
    if trained:
        model.weight.grad = draw(4, 4)
    expected = model(draw(1))
    assert expected["requires_grad"] is trained
    with frozen(model):
        answers = model(draw(1))
    assert answers.pop("grad") is expected.pop("grad")
    assert answers == expected


class Writer(nn.Module):
    """Writes to its state in one way, and returns something that depends on `x`."""

    def __init__(self, write: Callable[[Writer, Tensor], None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(4, 4))
        self.register_buffer("table", draw(4, 4, seed=1))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        return x @ self.weight + self.table


def without_grad(write: Callable[[Writer, Tensor], object]) -> Callable[[Writer, Tensor], None]:
    def inside(model: Writer, x: Tensor) -> None:
        with torch.no_grad():
            write(model, x)

    return inside


def flag(model: Writer, _: Tensor) -> None:
    model.weight.requires_grad_(False)


WRITES: dict[str, Callable[[Writer, Tensor], object]] = {
    "buffer, in place": lambda m, x: m.table.add_(1),
    "buffer, operator": lambda m, x: m.table.__iadd__(2),
    "buffer, an element": lambda m, x: m.table.__setitem__((0, 1), 7.0),
    "buffer, copied": lambda m, x: m.table.copy_(torch.ones(4, 4)),
    "buffer, out=": lambda m, x: torch.add(m.table, 1, out=m.table),
    "buffer, running mean of x": without_grad(lambda m, x: m.table.mul_(0.9).add_(0.1 * x.mean(0))),
    "buffer, from the parameter": without_grad(lambda m, x: m.table.copy_(m.weight)),
    "data, in place": lambda m, x: m.weight.data.mul_(2),
    "data, a row": lambda m, x: m.weight.data[1].zero_(),
    "data, set": lambda m, x: setattr(m.weight, "data", m.weight.data * 3),
    "parameter, in place": without_grad(lambda m, x: m.weight.add_(1)),
    "parameter, an element": without_grad(lambda m, x: m.weight.__setitem__((2, 2), 5.0)),
    "parameter, copied from x": without_grad(lambda m, x: m.weight.copy_(x * 2)),
    "parameter, a view": without_grad(lambda m, x: m.weight.view(-1)[3:5].fill_(1)),
    "parameter, a row from x": without_grad(lambda m, x: m.weight[1].copy_(x[0])),
    "parameter, clamped": without_grad(lambda m, x: m.weight.clamp_(min=0)),
    "parameter, initialised": lambda m, x: nn.init.constant_(m.weight, 0.5),
    "several at once": without_grad(lambda m, x: torch._foreach_mul_([m.weight, m.table], 2.0)),
    "frozen by the model": flag,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_a_model_that_writes_to_its_state(name: str) -> None:
    """The real tensor is written to, and has no graph afterwards."""
    x = draw(4, 4, seed=2)
    expected, model = Writer(WRITES[name]), Writer(WRITES[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weight, table = model.weight, model.table
    plain = expected(x.requires_grad_())
    with frozen(model):
        ours = model(x)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert model.weight is weight
    assert model.table is table
    changed = False
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[key], rtol=1e-12, atol=1e-12)
        changed |= not torch.equal(value, before[key])
    assert changed != (name == "frozen by the model")
    assert weight.requires_grad == (name != "frozen by the model")
    assert weight.is_leaf
    assert weight.grad is None
    assert not table.requires_grad
    assert not leads_to(ours, weight)
    assert leads_to(ours, x)


def test_a_write_that_the_model_could_not_make_is_still_an_error() -> None:
    model = Writer(lambda m, x: m.weight.add_(1))
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        model(draw(4, 4))
    with frozen(model), pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        model(draw(4, 4))


def test_a_model_that_hooks_its_parameter() -> None:
    """As models do that scale or mask gradients in training."""
    weight, x = nn.Parameter(draw(4, 4)), draw(5, 4).requires_grad_()
    with frozen(weight):
        handle = weight.register_hook(lambda gradient: gradient * 2)
        result = x @ weight
    assert not leads_to(result, weight)
    (doubled,) = torch.autograd.grad((weight * 3).sum(), weight)
    assert torch.equal(doubled, torch.full((4, 4), 6.0, dtype=torch.float64))
    handle.remove()


# --- what is left behind


class Failing(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        self.model(input_ids)
        raise ArithmeticError("on purpose")


@contextlib.contextmanager
def parameters_as_before(model: nn.Module) -> Iterator[None]:
    """Some need a gradient, some are frozen; all stay the same objects."""
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    seen = [
        (p, p.requires_grad, p.grad, p.detach().clone(), p._version) for p in model.parameters()
    ]
    assert len({requires_grad for _, requires_grad, *_ in seen}) == 2
    yield
    after = [*model.parameters()]
    for i, (parameter, requires_grad, grad, value, version) in enumerate(seen):
        assert after[i] is parameter
        assert type(parameter) is nn.Parameter
        assert parameter.requires_grad == requires_grad
        assert parameter.is_leaf
        assert parameter.grad is grad
        assert grad is None or bool((grad == i).all())
        assert torch.equal(parameter, value)
        assert parameter._version == version


@pytest.mark.parametrize("eager", [False, True])
def test_parameters_are_untouched_by_an_explanation(eager: bool) -> None:
    model = tiny_text(eager=eager)
    with parameters_as_before(model):
        assert GenericAttention(model).attribute(sentences(), 1).any()


@pytest.mark.parametrize("eager", [False, True])
def test_parameters_are_untouched_by_an_error(eager: bool) -> None:
    model = Failing(tiny_text(eager=eager))
    with parameters_as_before(model), pytest.raises(ArithmeticError, match="on purpose"):
        GenericAttention(model).attribute(sentences(), 1)
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_capture_leads_to_no_parameter() -> None:
    model = tiny_text()
    capture = capture_forward(model, (sentences(),), (), lambda output: output)
    parameters = [*model.parameters()]
    assert not any(leads_to(capture.output, parameter) for parameter in parameters)
    assert all(leads_to(model(sentences()), parameter) for parameter in parameters)
    for record in capture.records:  # which the graph does lead to
        (gradient,) = torch.autograd.grad(capture.output.sum(), record.edge, retain_graph=True)
        assert gradient.any()


def test_frozen_parameters_change_nothing() -> None:
    """It does not matter which parameters are frozen, or whether there are any."""
    expected = GenericAttention(tiny_text()).attribute(sentences(), 1)
    for part in ("", "words", "blocks.0", "head"):
        model = tiny_text()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(part))
        assert torch.equal(GenericAttention(model).attribute(sentences(), 1), expected)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad != name.startswith(part)


# --- what is kept


class Layer(nn.Module):
    """Attention and an MLP; the storage of each activation is kept by name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)
        self.activations: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        mixed = F.scaled_dot_product_attention(*qkv[:, None].chunk(3, -1))
        up = self.up(mixed[:, 0])
        act = F.gelu(up)
        self.activations = {"x": x, "qkv": qkv, "mixed": mixed, "up": up, "act": act}
        return self.down(act)


def kept_by(model: Layer, mode: contextlib.AbstractContextManager[object]) -> Counter[str]:
    """How often autograd saves each tensor of a forward pass, all views of one storage together."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = draw(2, 5, 4).float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mode:
        model(x)
    tensors = {**model.activations, **dict(model.named_parameters())}
    names = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    return Counter(names.get(t.untyped_storage().data_ptr(), "other") for t in saved)


def test_inputs_of_weights_are_not_kept() -> None:
    """A linear layer keeps its weight for what comes before it, not its input for the weight.

    Attention keeps queries, keys and values, its output, and a logarithm (`other`); the record
    keeps queries, keys and values once more, which costs nothing: they are the same tensors.
    """
    model = Layer()
    weights = {"qkv.weight": 1, "up.weight": 1, "down.weight": 1}
    attention = {"qkv": 3, "mixed": 1, "other": 1}
    inputs = {"x": 1, "mixed": 2, "act": 1}  # those of the three layers
    assert kept_by(model, contextlib.nullcontext()) == {**weights, **attention, **inputs, "up": 1}
    assert kept_by(model, frozen(model)) == {**weights, **attention, "qkv": 6, "up": 1}


def test_a_capture_keeps_no_more_than_the_mode() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    model = Layer().double()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        capture_forward(model, (draw(2, 5, 4),), (), lambda output: output)
    known = {t.untyped_storage().data_ptr(): name for name, t in model.activations.items()}
    kept = {t.untyped_storage().data_ptr() for t in saved} - parameters
    assert {known.get(storage, "other") for storage in kept} == {"qkv", "mixed", "other", "up"}
    assert len(kept) == 4
