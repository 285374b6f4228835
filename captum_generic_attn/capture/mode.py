"""The function modes: one sees every torch call of a forward pass and keeps its shadows.

The modes are local to the thread and patch nothing. After each operation `CaptureMode` looks up the
family of the operation and applies its transfer; products, softmaxes and fused kernels go to
`attention`. `FrozenMode`, which it extends, is what the backward pass runs under.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_generic_attn.capture import written_out
from captum_generic_attn.capture.attention import Attention, fused_operands, leave_graph
from captum_generic_attn.capture.constants import Constants
from captum_generic_attn.capture.record import Saved
from captum_generic_attn.capture.recorder import Recorder
from captum_generic_attn.capture.scope import Scope
from captum_generic_attn.capture.tracking import contraction, opaque
from captum_generic_attn.capture.tracking.operations import (
    Family,
    argument,
    canonical,
    family_of,
    tensors_in,
)
from captum_generic_attn.capture.tracking.shadow import Role
from captum_generic_attn.capture.tracking.transfer import Transfer
from captum_generic_attn.capture.undispatched import dispatches_itself, undispatched

Function = Callable[..., Any]


# What acts otherwise in training mode: where its flag stands, how it is called, and its default.
_TRAINED = {
    **{f"{kind}dropout": (2, True) for kind in ("", "alpha_", "feature_", "feature_alpha_")},
    **{f"dropout{axes}d": (2, True) for axes in (1, 2, 3)},
    "batch_norm": (5, False),
}


def _trains(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    place, usual = _TRAINED[name]
    asked = args[place] if len(args) > place else kwargs.get("training", kwargs.get("train", usual))
    share = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    return bool(asked) and (name == "batch_norm" or share > 0)


_HANGS_ON = {"register_hook", "retain_grad", "grad_fn"}
"""What lets users see the gradients of a tensor or of the node behind it."""
_TIMES = {"mul", "multiply"}
_SUMS = {"sum", "mean"}


class _Identity(NamedTuple):
    """What a mode knows of a function."""

    name: str
    in_place: bool
    family: Family
    opaque: bool  # Python code that may hide attention inside


class FrozenMode(TorchFunctionMode):
    """Runs a model with its parameters taken as constants.

    No operation saves what only the gradient of a weight would need, and the parameters themselves
    are left alone. Where a model checkpoints its activations, its forward pass runs again in the
    backward pass, and must leave the same graph there: so the backward pass has this mode too.
    """

    def __init__(self, parameters: Container[int], *, written_out: bool = False) -> None:
        """Take `parameters` as constants; with `written_out`, no attention is fused."""
        super().__init__()
        self._parameters = parameters
        self._written_out = written_out
        self._constants = Constants(parameters)
        self._opened: set[object] = set()
        self._without_grad = False
        self._known: dict[object, _Identity] = {}

    def __torch_function__(
        self,
        func: Function,
        types: object,  # the protocol's
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        identity = self._known.get(func) or self._identify(func)
        if identity.opaque and func not in self._opened:
            self._opened.add(func)
            try:
                with self:
                    return undispatched(func)(*args, **kwargs)  # type: ignore[arg-type]
            finally:
                self._opened.discard(func)
        if self._written_out and identity.family is Family.ATTENTION:
            with self:
                return written_out.attention(*args, **kwargs)
        if identity.name == "_set_grad_enabled":
            # a frozen tower runs under no_grad; its attention still needs its gradient
            if args and args[0] is False and torch.is_grad_enabled():
                self._without_grad = True
                return None
            self._without_grad = False
            return func(*args, **kwargs)
        if identity.in_place and self._without_grad and args and self._is_state(args[0]):
            with torch.no_grad():  # a running mean: it must not grow a graph
                return func(*args, **kwargs)
        return self._run(identity, func, args, kwargs)

    def _identify(self, func: Function) -> _Identity:
        name, in_place = canonical(func)
        identity = _Identity(name, in_place, family_of(name), dispatches_itself(func))
        self._known[func] = identity
        return identity

    def _run(
        self, identity: _Identity, func: Function, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run an operation, and let it leave the graph that it left in the forward pass."""
        out = self._compute(identity, func, args, kwargs)
        if identity.family is Family.ATTENTION:
            operands = fused_operands(*args, **kwargs)
            leave_graph(out)
            if torch.is_grad_enabled():
                Saved(*operands.tensors)
        return out

    def _compute(
        self, identity: _Identity, func: Function, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        writes = identity.in_place or identity.name == "set"
        return self._constants.run_any(identity.family, func, args, kwargs, writes=writes)

    def _is_state(self, tensor: object) -> bool:
        """Whether a tensor is a parameter or buffer of the model, or a view of one."""
        base = tensor._base if isinstance(tensor, Tensor) else None  # noqa: SLF001
        return id(tensor) in self._parameters or id(base) in self._parameters


class CaptureMode(FrozenMode):
    """Interprets the forward pass of one thread while it is active."""

    def __init__(
        self, transfer: Transfer, recorder: Recorder, scope: Scope, *, written_out: bool = False
    ) -> None:
        super().__init__(scope.parameters, written_out=written_out)
        self._transfer = transfer
        self._attention = Attention(transfer, recorder, scope, self._constants)
        self._recorder = recorder

    def _run(
        self, identity: _Identity, func: Function, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run one operation and give its results their shadows."""
        name, in_place, family, _ = identity
        if name in _TRAINED and self._in_training(name, args, kwargs):
            self._recorder.in_training[name] = None
        transfer = self._transfer
        if name in _HANGS_ON:
            if transfer.knows(args[0]):
                transfer.of(args[0])  # probed before anybody looks on
            out = func(*args, **kwargs)
            transfer.hooks.note(args[0])
            return out
        product = family is Family.PRODUCT or (
            family is Family.LINEAR and self._weight_is_data(args)
        )
        if product and (terms := contraction.read(name, args, kwargs)):
            if transfer.knows(terms.left) or transfer.knows(terms.right):
                return self._attention.product(name, func, args, kwargs, terms)
            return self._constants.run(func, args, kwargs)
        if family is Family.ATTENTION:
            return self._attention.fused(func, args, kwargs)
        if family is Family.FOREIGN_ATTENTION:
            self._recorder.refuse_kernel(name)
        if family is Family.PRODUCT:
            self._check_many_factors(args, kwargs, name)
        if family in (Family.UNKNOWN, Family.PRODUCT):
            return self._run_unknown(identity, func, args, kwargs)
        if family is Family.SHAPE and transfer.looks_up(args, kwargs):
            family = Family.EMBEDDING
        summed = args[0] if name in _SUMS and args else None
        if isinstance(summed, Tensor) and (terms := transfer.weighing(summed)):
            found = self._attention.summed(name, func, args, kwargs, terms)
            if found is not None:
                return found
        weighs = self._attention.weighs(args, kwargs) if name in _TIMES else None
        if in_place and args and isinstance(args[0], Tensor):
            transfer.settle(args[0])
        out = self._compute(identity._replace(family=family), func, args, kwargs)
        if name == "batch_norm" and out.ndim > 3 and len(out) == 1 and out.requires_grad:
            out.register_hook(_laid_out)
        if family is Family.SOFTMAX:
            self._attention.softmax(args, kwargs, out)
        else:
            transfer.apply(family, name, func, args, kwargs, out, in_place=in_place)
            if weighs is not None:
                transfer.shadows[out] = transfer.of(out)._replace(weighing=weighs)
        return out

    def _in_training(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether an operation treats what inputs feed as it does in training mode alone.

        Weights are standardised by `batch_norm` as well, and single examples are normed by it.
        """
        tensor = argument(args, kwargs, 0, "input")
        transfer = self._transfer
        if not _trains(name, args, kwargs) or not isinstance(tensor, Tensor):
            return False
        if not transfer.knows(tensor) or not transfer.of(tensor).data:
            return False
        if name != "batch_norm" or argument(args, kwargs, 1, "running_mean") is not None:
            return True
        planes = transfer.of(tensor).planes
        # Statistics of a channel, of which no two examples have a part, are an example's own.
        return not planes or not transfer.spaces.example_axes(planes[0]) <= {1}

    def _run_unknown(
        self, identity: _Identity, func: Function, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run an operation in no list; what it wrote over is known as it was before."""
        given = opaque.given_to(self._transfer, args, kwargs)
        if identity.in_place and args and isinstance(args[0], Tensor):
            self._transfer.settle(args[0])
        out = self._compute(identity, func, args, kwargs)
        if given:
            self._transfer.unknown(identity.name, given, out, in_place=identity.in_place)
        return out

    def _weight_is_data(self, args: Sequence[Any]) -> bool:
        """Whether a linear layer is a product of two: of data, or of attention and parameters."""
        weight = args[1] if len(args) > 1 else None
        if not isinstance(weight, Tensor) or id(weight) in self._parameters:
            return False
        known = self._transfer.shadows.get(weight)
        if known is None or not isinstance(args[0], Tensor):
            return False
        return known.data or (known.role is Role.TOKENS and self._transfer.shadows[args[0]].pairs)

    def _check_many_factors(self, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> None:
        for tensor in tensors_in((args, kwargs)):
            shadow = self._transfer.of(tensor)
            if shadow.role is Role.PROBABILITIES and shadow.softmax is not None:
                shadow.softmax.products += 1
                self._recorder.refuse(
                    f"attention probabilities enter {name} with other than one other tensor",
                    "write the product with values as a matmul or an einsum of two tensors",
                )


def _laid_out(gradient: Tensor) -> Tensor:
    """A gradient in the usual layout.

    Of one example, the CPU kernel of batch norm mistakes some layouts for another, and its gradient
    is wrong then.
    """
    with torch.no_grad(), torch._C.DisableTorchFunction():  # noqa: SLF001
        return gradient.contiguous()
