"""Runs a forward function once, unmodified, and returns what its attention did.

`attribution` is the caller. Everything that touches the model happens inside one `with` block of
`capture_forward` and is undone when it ends, also after an error.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_generic_attn.capture.attention import Attention, Refusal
from captum_generic_attn.capture.mode import CaptureMode
from captum_generic_attn.capture.record import AttentionRecord
from captum_generic_attn.capture.scope import Scope, modules_of, signature_of
from captum_generic_attn.capture.shadow import Role, Shadow, Softmax
from captum_generic_attn.capture.transfer import Transfer
from captum_generic_attn.tokens.spaces import TokenSpaces
from captum_generic_attn.tokens.streams import TokenStreams


class UnsupportedAttentionError(ValueError):
    """An attention call that cannot be explained, or no attention call at all.

    The message names each module, says what was seen there and what can be done.

    Example:
        >>> import torch
        >>> from captum_generic_attn import GenericAttention
        >>> try:
        ...     GenericAttention(torch.nn.Linear(3, 2)).attribute(torch.zeros(1, 3), target=0)
        ... except UnsupportedAttentionError as error:
        ...     print(str(error).split(":")[0])
        no attention was found in the forward pass
    """


@dataclass(frozen=True, eq=False)
class Capture:
    """One forward pass: its output, its attention calls and its tokens."""

    output: Tensor
    records: Sequence[AttentionRecord]
    ancestors: frozenset[int]
    spaces: TokenSpaces
    streams: TokenStreams
    input_names: tuple[str, ...]
    refusals: Sequence[Refusal]
    ignored: Sequence[Softmax]
    dropout_seen: bool
    modules: dict[str, nn.Module]


def capture_forward(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...],
    choose: Callable[[Any], Tensor],
) -> Capture:
    """Run `forward_func(*inputs, *additional)` and record its attention.

    Args:
        forward_func: the model, or a function round it.
        inputs: tensors, batch first, of one batch size.
        additional: further arguments; their tensors make tokens too, but are not explained.
        choose: picks the tensor to explain from what `forward_func` returns.

    Raises:
        UnsupportedAttentionError: if attention hides in a scripted module.
    """
    scope = Scope(modules_of(forward_func))
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
    spaces = TokenSpaces()
    transfer = Transfer(spaces, scope.parameters)
    attention = Attention(transfer, scope, len(inputs[0]))
    names = _argument_names(forward_func, len(inputs) + len(additional))
    with torch.inference_mode(mode=False), torch.enable_grad():
        copies: dict[int, Tensor] = {}
        arguments = [
            _traced(value, name, transfer, copies, explained=i < len(inputs))
            for i, (value, name) in enumerate(zip((*inputs, *additional), names, strict=True))
        ]
        with _eager(scope), scope, CaptureMode(transfer, attention):
            returned = forward_func(*arguments)
            output = choose(returned)
        shadow = transfer.of(output) if isinstance(output, Tensor) else Shadow()
        records = attention.close()
    return Capture(
        output,
        records,
        shadow.ancestors,
        spaces,
        attention.streams,
        tuple(names[: len(inputs)]),
        attention.refusals,
        [s for s in attention.softmaxes if not s.products],
        attention.dropout_seen,
        scope.modules,
    )


def _argument_names(forward_func: Callable[..., Any], count: int) -> list[str]:
    names: list[str] = []
    with contextlib.suppress(TypeError, ValueError):
        for parameter in inspect.signature(signature_of(forward_func)).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)  # noqa: PERF401 - stops at *args
            else:
                break
    return [*names[:count], *(f"input{i}" for i in range(len(names), count))]


def _traced(
    value: object, name: str, transfer: Transfer, copies: dict[int, Tensor], *, explained: bool
) -> Any:  # noqa: ANN401
    """An argument as the model gets it: an alias of the user's tensor, with tokens to follow."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(
            _traced(item, f"{name}[{i}]", transfer, copies, explained=False)
            for i, item in enumerate(value)
        )
    if not isinstance(value, Tensor):
        return value
    if id(value) not in copies:
        plain = value.clone() if value.is_inference() else value
        alias = plain.detach() if explained or plain is not value else plain
        if explained and alias.is_floating_point():
            alias.requires_grad_(True)  # noqa: FBT003 - the alias is ours
        elif alias is value:
            alias = plain.view_as(plain)  # shadows must not outlive the call on the user's tensor
        copies[id(value)] = alias
        if alias.ndim > 0 and alias.dtype != torch.bool:
            plane = transfer.spaces.of_input(name, alias.shape)
            transfer.shadows[alias] = Shadow(Role.RAW, (plane,), data=True)
    return copies[id(value)]


@contextlib.contextmanager
def _eager(scope: Scope) -> Iterator[None]:
    """Compiled modules run uncompiled meanwhile: a compiler must not trace the capture."""
    if scope.compiled():
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def no_attention_message(capture: Capture) -> str:
    """What to say where no attention call was found or left."""
    reasons = [f"\n  {refusal}" for refusal in capture.refusals]
    softmaxes = [f"{s.module} ({s.module_type})" for s in capture.ignored]
    seen = f" Softmaxes that met no values: {', '.join(softmaxes)}." if softmaxes else ""
    return (
        "no attention was found in the forward pass: no softmax of a product of queries and keys "
        f"met values, nor was scaled_dot_product_attention called.{seen} Kernels of other "
        'libraries are invisible: load the model with attn_implementation="sdpa" or "eager".'
        + "".join(reasons)
    )


__all__ = ["Capture", "UnsupportedAttentionError", "capture_forward", "no_attention_message"]
