"""Runs a forward function once, unmodified, and returns its `Capture`.

All that touches the model happens inside one `with` block and is undone when it ends, also after an
error.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from captum_generic_attn.capture.arguments import Arguments, argument_names, check_devices
from captum_generic_attn.capture.captured import Capture
from captum_generic_attn.capture.fused_kernels import is_foreign
from captum_generic_attn.capture.mode import CaptureMode
from captum_generic_attn.capture.recorder import Recorder
from captum_generic_attn.capture.scope import Scope, modules_of
from captum_generic_attn.capture.torch_compile import paused_compiler
from captum_generic_attn.capture.tracking.abstract_value import AbstractValue
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.capture.unsupported import UnsupportedCall, foreign_kernel
from captum_generic_attn.capture.witness import Witness
from captum_generic_attn.errors import UnsupportedAttentionError
from captum_generic_attn.tokens.spaces import TokenSpaces


def capture_forward(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...],
    choose: Callable[[Any], Tensor],
    *,
    copies: bool = False,
    inner_mode: Callable[[TokenTracker], contextlib.AbstractContextManager[object]] | None = None,
    witness: Witness | None = None,
) -> Capture:
    """Run `forward_func(*inputs, *additional)` and record its attention.

    Args:
        forward_func: the model, or a function that calls it.
        inputs: tensors, batch first, of one batch size.
        additional: further arguments. Their tensors have tokens too, but are not explained.
        choose: picks the tensor to explain from what `forward_func` returns.
        copies: keep copies of what attention calls read, for a model that overwrites it.
        inner_mode: makes a function mode that runs below the capture and computes the operations in
            place of PyTorch. Fused attention is then computed from single operations.
        witness: is told what attention calls read, for a check.

    Raises:
        UnsupportedAttentionError: if attention runs in a scripted module, in another thread or in a
            kernel that fails.
        ValueError: if the inputs and the model are on several devices, or if the model holds
            tensors of `torch.inference_mode` that are neither parameters nor buffers.
    """
    scope = Scope(modules_of(forward_func))
    _check_modules(scope)
    names = argument_names(forward_func, len(inputs) + len(additional))
    check_devices(scope, dict(zip(names, (*inputs, *additional), strict=True)))
    spaces = TokenSpaces()
    tracker = TokenTracker(spaces, scope.parameters)
    tracker.notes_embeddings = inner_mode is not None or witness is not None
    recorder = Recorder(tracker, scope, len(inputs[0]), copies=copies, witness=witness)
    with torch.inference_mode(mode=False), torch.enable_grad():
        given = Arguments(tracker, len(inputs[0]))
        arguments = [
            given.alias(value, name, explained=i < len(inputs))
            for i, (value, name) in enumerate(zip((*inputs, *additional), names, strict=True))
        ]
        roots = [
            get_gradient_edge(a) if isinstance(a, Tensor) and a.requires_grad else None
            for a in arguments[: len(inputs)]
        ]
        inner = contextlib.nullcontext() if inner_mode is None else inner_mode(tracker)
        mode = CaptureMode(tracker, recorder, scope, eager_attention=inner_mode is not None)
        try:
            with paused_compiler(), scope.keeping_state(), scope, inner, mode:
                output = choose(forward_func(*arguments))
        except Exception as error:
            _explain(error, scope)
            raise
        abstract = tracker.of(output) if isinstance(output, Tensor) else AbstractValue()
        records = recorder.close()
    return Capture(
        output,
        records,
        abstract.ancestors,
        spaces,
        recorder.streams,
        tuple(names[: len(inputs)]),
        recorder.refusals,
        [s for s in recorder.softmaxes if not s.products],
        tuple(recorder.in_training),
        scope.modules,
        scope.parameters,
        roots,
        tracker.embedded,
        inner_mode is not None,
    )


def _check_modules(scope: Scope) -> None:
    """Refuse modules that run their attention where no function mode sees it."""
    if scripted := scope.scripted_attention():
        raise UnsupportedAttentionError(
            f"attention inside scripted or traced modules cannot be seen: {', '.join(scripted)}. "
            "Use the modules that they were made from."
        )
    for name, module in scope.modules.items():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise UnsupportedAttentionError(
                f"{name or 'the model'} (DataParallel) runs its replicas in other threads, where "
                "attention cannot be seen. Pass its .module instead."
            )


def _explain(error: Exception, scope: Scope) -> None:
    """Raise an error that says what to do in place of some errors of the forward pass."""
    if kernel := _failed_kernel(error, scope):
        message = f"attention that cannot be explained:\n  {kernel}"
        raise UnsupportedAttentionError(message) from error
    if "nference tensor" in str(error):
        raise ValueError(
            "the model holds tensors that were made under torch.inference_mode and are neither "
            "parameters nor buffers; autograd cannot record what reads them: build or load the "
            "model outside torch.inference_mode, or under torch.no_grad"
        ) from error


def _failed_kernel(error: Exception, scope: Scope) -> UnsupportedCall | None:
    """The refusal of a fused kernel that failed, such as one without a backward pass."""
    place = "", "function"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            place = scope.name_of(owner)
        if is_foreign(frame.f_code.co_name):
            return UnsupportedCall(-1, *place, *foreign_kernel(frame.f_code.co_name))
    return None
