"""The function mode: sees every torch call of a forward pass, and keeps its shadows.

The mode is local to the thread and patches nothing. After each operation it looks up the family
of the operation and applies its transfer; products, softmaxes and fused kernels go to `attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from captum_generic_attn.capture import contraction
from captum_generic_attn.capture.attention import Attention
from captum_generic_attn.capture.operations import Family, canonical, family_of, tensors_in
from captum_generic_attn.capture.recorder import Recorder
from captum_generic_attn.capture.scope import Scope
from captum_generic_attn.capture.shadow import Role
from captum_generic_attn.capture.transfer import Transfer
from captum_generic_attn.capture.undispatched import dispatches_itself, undispatched


class CaptureMode(TorchFunctionMode):
    """Interprets the forward pass of one thread while it is active."""

    def __init__(self, transfer: Transfer, recorder: Recorder, scope: Scope) -> None:
        super().__init__()
        self._transfer = transfer
        self._attention = Attention(transfer, recorder, scope)
        self._recorder = recorder
        self._opened: set[object] = set()
        self._without_grad = False
        self._known: dict[object, tuple[str, bool, Family]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,  # the protocol's
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and give its results their shadows."""
        kwargs = kwargs or {}
        if dispatches_itself(func) and func not in self._opened:
            self._opened.add(func)
            try:
                with self:
                    return undispatched(func)(*args, **kwargs)  # type: ignore[arg-type]
            finally:
                self._opened.discard(func)
        name, in_place, family = self._identify(func)
        if name == "_set_grad_enabled":
            # a frozen tower runs under no_grad; its attention still needs its gradient
            if args and args[0] is False and torch.is_grad_enabled():
                self._without_grad = True
                return None
            self._without_grad = False
            return func(*args, **kwargs)
        if in_place and self._without_grad and self._transfer.is_state(args[0]):
            with torch.no_grad():  # a running mean: it must not grow a graph
                return func(*args, **kwargs)
        if family is Family.PRODUCT and (terms := contraction.read(name, args, kwargs)):
            if self._transfer.knows(terms.left) or self._transfer.knows(terms.right):
                return self._attention.product(name, func, args, kwargs, terms)
            return func(*args, **kwargs)
        if family is Family.ATTENTION:
            return self._attention.fused(func, args, kwargs)
        if family is Family.FOREIGN_ATTENTION:
            self._recorder.refuse_kernel(name)
        out = func(*args, **kwargs)
        if family is Family.SOFTMAX:
            self._attention.softmax(args, kwargs, out)
        else:
            if family is Family.EMBEDDING and torch.is_grad_enabled() and not out.requires_grad:
                out.requires_grad_(True)  # frozen weights must leave a graph
            if family is Family.PRODUCT:
                self._check_many_factors(args, kwargs, name)
                family = Family.TOKENWISE
            self._transfer.apply(family, name, func, args, kwargs, out, in_place=in_place)
        return out

    def _identify(self, func: Callable[..., Any]) -> tuple[str, bool, Family]:
        known = self._known.get(func)
        if known is None:
            name, in_place = canonical(func)
            known = self._known[func] = name, in_place, family_of(name)
        return known

    def _check_many_factors(self, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> None:
        for tensor in tensors_in((args, kwargs)):
            shadow = self._transfer.of(tensor)
            if shadow.role is Role.PROBABILITIES and shadow.softmax is not None:
                shadow.softmax.products += 1
                self._recorder.refuse(
                    f"attention probabilities enter {name} with other than one other tensor",
                    "write the product with values as a matmul or an einsum of two tensors",
                )
