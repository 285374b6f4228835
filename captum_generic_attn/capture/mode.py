"""Function modes: one sees every torch call of a forward pass and tracks tokens through it.

The modes belong to the thread and patch nothing. `CaptureMode` looks up the family of each
operation and applies its transfer function; products, softmaxes and fused kernels go to the modules
that recognise attention. The backward pass runs under `ConstantParametersMode`, which `CaptureMode`
extends.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_generic_attn.capture.attention import Attention
from captum_generic_attn.capture.constants import Constants, require_gradient
from captum_generic_attn.capture.fused_calls import FusedCalls
from captum_generic_attn.capture.fused_kernels import Kernel, is_foreign, kernel_named
from captum_generic_attn.capture.operands import save
from captum_generic_attn.capture.recorder import Recorder
from captum_generic_attn.capture.scope import Scope
from captum_generic_attn.capture.torch_function import bypass_torch_function, dispatches_itself
from captum_generic_attn.capture.tracking import contraction, opaque
from captum_generic_attn.capture.tracking.abstract_value import Role
from captum_generic_attn.capture.tracking.operations import (
    Family,
    argument,
    canonical,
    family_of,
    tensors_in,
)
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.capture.unsupported import foreign_kernel, many_factors

Function = Callable[..., Any]
Args = Sequence[Any]
Kwargs = dict[str, Any]

_TRAINED = {
    **{f"{kind}dropout": (2, True) for kind in ("", "alpha_", "feature_", "feature_alpha_")},
    **{f"dropout{axes}d": (2, True) for axes in (1, 2, 3)},
    "batch_norm": (5, False),
}
"""Operations that behave differently in training mode: where their flag is, and its default."""
_SHOWS_GRADIENTS = {"register_hook", "retain_grad", "grad_fn"}
"""Functions by which users see the gradient of a tensor, or the node behind it."""
_TIMES = {"mul", "multiply"}
_SUMS = {"sum", "mean"}


def _trains(name: str, args: Args, kwargs: Kwargs) -> bool:
    """Whether a call behaves as in training mode."""
    place, usual = _TRAINED[name]
    flag = args[place] if len(args) > place else kwargs.get("training", kwargs.get("train", usual))
    probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    return bool(flag) and (name == "batch_norm" or probability > 0)


class _Identity(NamedTuple):
    """What a mode knows of a function.

    A function is `opaque` if it is Python code that may call attention. `kernel` is its entry in
    the table of fused attention functions.
    """

    name: str
    in_place: bool
    family: Family
    opaque: bool
    kernel: Kernel | None


def _identity_of(func: Function) -> _Identity:
    name, in_place = canonical(func)
    kernel = kernel_named(name)
    family = Family.FOREIGN_ATTENTION if is_foreign(name) else family_of(name)
    return _Identity(name, in_place, family, kernel is None and dispatches_itself(func), kernel)


class ConstantParametersMode(TorchFunctionMode):
    """Runs a model with its parameters as constants.

    No operation saves what only the gradient of a parameter would need. If the model checkpoints
    its activations, parts of its forward pass run again in the backward pass and must save the same
    tensors as before, so the backward pass runs under this mode too.
    """

    def __init__(self, parameters: Container[int], *, eager_attention: bool = False) -> None:
        """Start a mode.

        Args:
            parameters: the ids of the parameters and buffers.
            eager_attention: whether fused attention is computed from single operations.
        """
        super().__init__()
        self._parameters = parameters
        self._eager_attention = eager_attention
        self._constants = Constants(parameters)
        self._opened: set[object] = set()
        self._without_grad = False
        self._known: dict[object, _Identity] = {}

    def __torch_function__(
        self,
        func: Function,
        types: object,  # the protocol's
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        identity = self._known.get(func)
        if identity is None:
            identity = self._known[func] = _identity_of(func)
        if identity.opaque and func not in self._opened:
            return self._open(func, args, kwargs)
        if self._eager_attention and identity.kernel is not None:
            with self:
                return identity.kernel.eager(identity.kernel.read(*args, **kwargs))
        if identity.name == "_set_grad_enabled":
            return self._set_grad_enabled(func, args, kwargs)
        if self._without_grad and self._writes_to_state(identity, args):
            with torch.no_grad():  # a running mean: it must not grow a graph
                return func(*args, **kwargs)
        return self._run(identity, func, args, kwargs)

    def _open(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run the body of a Python function under this mode."""
        self._opened.add(func)
        try:
            with self:
                return bypass_torch_function(func)(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            self._opened.discard(func)

    def _set_grad_enabled(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Leave gradients on: attention under `torch.no_grad` needs its gradient as well."""
        if args and args[0] is False and torch.is_grad_enabled():
            self._without_grad = True
            return None
        self._without_grad = False
        return func(*args, **kwargs)

    def _run(self, identity: _Identity, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run an operation, and let it leave the graph that it left in the forward pass."""
        out = self._compute(identity, func, args, kwargs)
        if identity.kernel is not None:
            call = identity.kernel.read(*args, **kwargs)
            require_gradient(out)
            if torch.is_grad_enabled():
                save(*call.tensors)
        return out

    def _compute(self, identity: _Identity, func: Function, args: Args, kwargs: Kwargs) -> Any:
        writes = identity.in_place or identity.name == "set"
        return self._constants.run_any(identity.family, func, args, kwargs, writes=writes)

    def _writes_to_state(self, identity: _Identity, args: Args) -> bool:
        """Whether an operation writes to a parameter or buffer of the model, or a view of one."""
        if not identity.in_place or not args:
            return False
        tensor = args[0]
        base = tensor._base if isinstance(tensor, Tensor) else None  # noqa: SLF001
        return id(tensor) in self._parameters or id(base) in self._parameters


class CaptureMode(ConstantParametersMode):
    """Tracks tokens and records attention in the forward pass of one thread."""

    def __init__(
        self,
        tracker: TokenTracker,
        recorder: Recorder,
        scope: Scope,
        *,
        eager_attention: bool = False,
    ) -> None:
        """Start a mode.

        Args:
            tracker: tracks tokens.
            recorder: gets the attention calls.
            scope: the modules of the model.
            eager_attention: whether fused attention is computed from single operations.
        """
        super().__init__(scope.parameters, eager_attention=eager_attention)
        self._tracker = tracker
        self._attention = Attention(tracker, recorder, scope, self._constants)
        self._fused = FusedCalls(tracker, recorder, self._constants)
        self._recorder = recorder

    def _run(self, identity: _Identity, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run one operation and track the tokens of its results."""
        if identity.kernel is not None:
            return self._fused.run(identity.kernel, func, args, kwargs)
        name, _, family, *_ = identity
        if name in _TRAINED and self._in_training(name, args, kwargs):
            self._recorder.in_training[name] = None
        if name in _SHOWS_GRADIENTS:
            return self._show_gradient(func, args, kwargs)
        if family in (Family.PRODUCT, Family.LINEAR):
            terms = self._terms(identity, args, kwargs)
            if terms is not None:
                return self._multiply(identity, func, args, kwargs, terms)
        if family is Family.FOREIGN_ATTENTION:
            self._recorder.refuse(foreign_kernel(name))
        if family is Family.PRODUCT:
            self._check_many_factors(args, kwargs, name)
        if family in (Family.UNKNOWN, Family.PRODUCT):
            return self._run_unknown(identity, func, args, kwargs)
        if name in _SUMS:
            found = self._sum(name, func, args, kwargs)
            if found is not None:
                return found
        return self._run_known(identity, func, args, kwargs)

    def _run_known(self, identity: _Identity, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run an operation of a known family that makes no attention."""
        name, in_place, family, *_ = identity
        tracker = self._tracker
        if family is Family.SHAPE and tracker.looks_up(args, kwargs):
            family = Family.EMBEDDING
        weighs = self._attention.weighs(args, kwargs) if name in _TIMES else None
        if in_place and args and isinstance(args[0], Tensor):
            tracker.settle(args[0])
        out = self._compute(identity._replace(family=family), func, args, kwargs)
        if name == "batch_norm" and out.ndim > 3 and len(out) == 1 and out.requires_grad:
            out.register_hook(_contiguous)
        if family is Family.SOFTMAX:
            self._attention.softmax(args, kwargs, out)
            return out
        tracker.apply(family, name, func, args, kwargs, out, in_place=in_place)
        if weighs is not None:
            tracker.abstract_values[out] = tracker.of(out)._replace(weighing=weighs)
        return out

    def _run_unknown(self, identity: _Identity, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run an operation of no known family; what it overwrites is looked up before."""
        given = opaque.given_to(self._tracker, args, kwargs)
        if identity.in_place and args and isinstance(args[0], Tensor):
            self._tracker.settle(args[0])
        out = self._compute(identity, func, args, kwargs)
        if given:
            self._tracker.unknown(identity.name, given, out, in_place=identity.in_place)
        return out

    def _show_gradient(self, func: Function, args: Args, kwargs: Kwargs) -> Any:
        """Run a function by which users see a gradient; a probe of the tensor must come first."""
        tracker = self._tracker
        if tracker.knows(args[0]):
            tracker.of(args[0])
        out = func(*args, **kwargs)
        tracker.hooks.note(args[0])
        return out

    # -- products and sums that may be attention -----------------------------------------------

    def _terms(
        self, identity: _Identity, args: Args, kwargs: Kwargs
    ) -> contraction.Contraction | None:
        """The two factors of a product; `None` of a linear layer, or of more than two tensors."""
        if identity.family is Family.LINEAR and not self._weight_is_data(args):
            return None
        return contraction.read(identity.name, args, kwargs)

    def _weight_is_data(self, args: Args) -> bool:
        """Whether the weight of a linear layer is data, or both are attention and parameters."""
        weight = args[1] if len(args) > 1 else None
        if not isinstance(weight, Tensor) or id(weight) in self._parameters:
            return False
        known = self._tracker.abstract_values.get(weight)
        if known is None or not isinstance(args[0], Tensor):
            return False
        return known.data or (
            known.role is Role.TOKENS and self._tracker.abstract_values[args[0]].pairs
        )

    def _multiply(
        self, identity: _Identity, func: Function, args: Args, kwargs: Kwargs,
        terms: contraction.Contraction,
    ) -> Any:  # fmt: skip
        if self._tracker.knows(terms.left) or self._tracker.knows(terms.right):
            return self._attention.product(identity.name, func, args, kwargs, terms)
        return self._constants.run(func, args, kwargs)

    def _sum(self, name: str, func: Function, args: Args, kwargs: Kwargs) -> Tensor | None:
        """Run a sum if it makes attention of an element-wise product; else `None`."""
        operand = args[0] if args else None
        terms = self._tracker.weighing(operand) if isinstance(operand, Tensor) else None
        if terms is None:
            return None
        return self._attention.summed(name, func, args, kwargs, terms)

    def _check_many_factors(self, args: Args, kwargs: Kwargs, name: str) -> None:
        for tensor in tensors_in((args, kwargs)):
            abstract = self._tracker.of(tensor)
            if abstract.role is Role.PROBABILITIES and abstract.softmax is not None:
                abstract.softmax.products += 1
                self._recorder.refuse(many_factors(name))

    # -- training mode -------------------------------------------------------------------------

    def _in_training(self, name: str, args: Args, kwargs: Kwargs) -> bool:
        """Whether an operation treats data as in training mode.

        `batch_norm` also standardises weights and normalises single examples, which is no such
        case.
        """
        tensor = argument(args, kwargs, 0, "input")
        tracker = self._tracker
        if not _trains(name, args, kwargs) or not isinstance(tensor, Tensor):
            return False
        if not tracker.knows(tensor) or not tracker.of(tensor).data:
            return False
        if name != "batch_norm" or argument(args, kwargs, 1, "running_mean") is not None:
            return True
        token_ids = tracker.of(tensor).token_ids
        # Statistics of a channel belong to one example if no two examples share the channel.
        return not token_ids or not tracker.spaces.example_axes(token_ids[0]) <= {1}


def _contiguous(gradient: Tensor) -> Tensor:
    """A gradient in the usual layout.

    For one example, the CPU kernel of batch norm takes some layouts for others and then returns a
    wrong gradient.
    """
    with torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001
        return gradient.contiguous()
