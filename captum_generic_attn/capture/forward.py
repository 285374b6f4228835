"""Runs a forward function once, unmodified, and returns what its attention did.

`attribution` is the caller. Everything that touches the model happens inside one `with` block of
`capture_forward` and is undone when it ends, also after an error.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_generic_attn.capture.blocking import ending_at
from captum_generic_attn.capture.mode import CaptureMode, FrozenMode
from captum_generic_attn.capture.record import AttentionRecord
from captum_generic_attn.capture.recorder import Recorder, Refusal, kernel_refusal
from captum_generic_attn.capture.scope import Scope, modules_of, signature_of
from captum_generic_attn.capture.tracking.operations import Family, family_of
from captum_generic_attn.capture.tracking.shadow import Role, Shadow, Softmax
from captum_generic_attn.capture.tracking.transfer import Transfer
from captum_generic_attn.capture.undispatched import undispatched
from captum_generic_attn.capture.witness import Witness
from captum_generic_attn.errors import UnsupportedAttentionError
from captum_generic_attn.tokens.spaces import TokenSpaces
from captum_generic_attn.tokens.streams import TokenStreams


@dataclass(frozen=True, eq=False)
class Capture:
    """One forward pass: its output, its attention calls and its tokens.

    `roots` are where the graph begins for each input, `None` for those that are not differentiable;
    `embedded`, if they were asked for, what integers became vectors: the plane of the integers and
    where the graph begins for the vectors.
    """

    output: Tensor
    records: Sequence[AttentionRecord]
    ancestors: frozenset[int]
    spaces: TokenSpaces
    streams: TokenStreams
    input_names: tuple[str, ...]
    refusals: Sequence[Refusal]
    ignored: Sequence[Softmax]
    in_training: tuple[str, ...]
    modules: dict[str, nn.Module]
    parameters: Mapping[int, str]
    roots: Sequence[GradientEdge | None]
    embedded: Sequence[tuple[Tensor, GradientEdge]]
    written_out: bool

    def backward(
        self, score: Tensor, edges: Sequence[GradientEdge], *, retain_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        """Run the backward pass down to some edges; the records' taps hand gradients out.

        Args:
            score: a number.
            edges: where it stops.
            retain_graph: whether another backward pass follows.

        Returns:
            The gradient at each edge; `None` where the score does not depend on it.
        """
        return self._gradients([score], edges, None, retain_graph=retain_graph)

    def products(
        self, outputs: Sequence[Tensor | GradientEdge], edges: Sequence[GradientEdge],
        cotangents: Sequence[Tensor],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Vector-Jacobian products of any tensors of the graph, which is kept.

        Args:
            outputs: tensors, or where the graph holds them.
            edges: where the backward pass stops.
            cotangents: one of the shape of each output.

        Returns:
            The product at each edge; `None` where no output depends on it.
        """
        return self._gradients(outputs, edges, cotangents, retain_graph=True) if edges else ()

    def _gradients(
        self, outputs: Sequence[Tensor | GradientEdge], edges: Sequence[GradientEdge],
        cotangents: Sequence[Tensor] | None, *, retain_graph: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        gradients = undispatched(torch.autograd.grad)  # type: ignore[arg-type]
        with FrozenMode(self.parameters, written_out=self.written_out):
            found: tuple[Tensor | None, ...] = gradients(
                outputs, edges, cotangents, retain_graph=retain_graph, allow_unused=True
            )
        return found

    def blocked(
        self, score: Tensor, records: Sequence[AttentionRecord]
    ) -> tuple[Tensor | None, ...]:
        """The gradient of a number at the results of calls, as read without any other call between.

        The results of all calls that stand between are held constant. The graph is kept.

        Args:
            score: a number.
            records: the calls.

        Returns:
            As `backward`; see `AttentionRecord.read_rows`.
        """
        with ending_at(record.result for record in self.records):
            return self.backward(score, [r.result for r in records], retain_graph=True)


def name_of_input(capture: Capture, inputs: Sequence[Tensor], place: int) -> str:
    """The name of an input. A tensor that is passed twice is one origin, and has one name."""
    return capture.input_names[next(i for i in range(place + 1) if inputs[i] is inputs[place])]


def capture_forward(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    additional: tuple[Any, ...],
    choose: Callable[[Any], Tensor],
    *,
    copies: bool = False,
    beneath: Callable[[Transfer], contextlib.AbstractContextManager[object]] | None = None,
    witness: Witness | None = None,
) -> Capture:
    """Run `forward_func(*inputs, *additional)` and record its attention.

    Args:
        forward_func: the model, or a function round it.
        inputs: tensors, batch first, of one batch size.
        additional: further arguments; their tensors make tokens too, but are not explained.
        choose: picks the tensor to explain from what `forward_func` returns.
        copies: keep copies of what attention calls read, for a model that overwrites it.
        beneath: makes a function mode that runs the operations in place of PyTorch, each by itself:
            attention is written out then.
        witness: what is told of the tensors that attention calls read, for a check.

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
    names = _argument_names(forward_func, len(inputs) + len(additional))
    _check_devices(scope, dict(zip(names, (*inputs, *additional), strict=True)))
    spaces = TokenSpaces()
    transfer = Transfer(spaces, scope.parameters)
    recorder = Recorder(transfer, scope, len(inputs[0]), copies=copies, witness=witness)
    with torch.inference_mode(mode=False), torch.enable_grad():
        aliases: dict[int, Tensor] = {}
        arguments = [
            _traced(value, name, transfer, aliases, len(inputs[0]), explained=i < len(inputs))
            for i, (value, name) in enumerate(zip((*inputs, *additional), names, strict=True))
        ]
        roots = [
            get_gradient_edge(a) if isinstance(a, Tensor) and a.requires_grad else None
            for a in arguments[: len(inputs)]
        ]
        under = contextlib.nullcontext() if beneath is None else beneath(transfer)
        mode = CaptureMode(transfer, recorder, scope, written_out=beneath is not None)
        transfer.notes_embeddings = beneath is not None or witness is not None
        try:
            with _eager(), scope.keeping_state(), scope, under, mode:
                output = choose(forward_func(*arguments))
        except Exception as error:
            if kernel := _foreign_kernel(error, scope):
                raise UnsupportedAttentionError(
                    f"attention that cannot be explained:\n  {kernel}"
                ) from error
            if "nference tensor" in str(error):
                raise ValueError(
                    "the model holds tensors that were made under torch.inference_mode and are "
                    "neither parameters nor buffers; autograd cannot record what reads them: build "
                    "or load the model outside torch.inference_mode, or under torch.no_grad"
                ) from error
            raise
        shadow = transfer.of(output) if isinstance(output, Tensor) else Shadow()
        records = recorder.close()
    return Capture(
        output,
        records,
        shadow.ancestors,
        spaces,
        recorder.streams,
        tuple(names[: len(inputs)]),
        recorder.refusals,
        [s for s in recorder.softmaxes if not s.products],
        tuple(recorder.in_training),
        scope.modules,
        scope.parameters,
        roots,
        transfer.embedded,
        beneath is not None,
    )


def _foreign_kernel(error: Exception, scope: Scope) -> Refusal | None:
    """The refusal of a fused kernel that failed, such as one without a backward pass."""
    place = "", "function"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            place = scope.name_of(owner)
        if family_of(frame.f_code.co_name) is Family.FOREIGN_ATTENTION:
            return Refusal(-1, *place, *kernel_refusal(frame.f_code.co_name))
    return None


def _argument_names(forward_func: Callable[..., Any], count: int) -> list[str]:
    names: list[str] = []
    with contextlib.suppress(TypeError, ValueError):
        for parameter in inspect.signature(signature_of(forward_func)).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)  # stops at *args
            else:
                break
    return [*names[:count], *(f"input{i}" for i in range(len(names), count))]


def _traced(
    value: object, name: str, transfer: Transfer, aliases: dict[int, Tensor], examples: int, *,
    explained: bool,
) -> Any:  # fmt: skip
    """An argument as the model gets it: an alias of the user's tensor, with tokens to follow.

    A tensor of another batch size belongs to all examples alike (position ids, the texts of a
    zero-shot classifier): its tokens are nobody's.
    """
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(
            _traced(item, f"{name}[{i}]", transfer, aliases, examples, explained=False)
            for i, item in enumerate(value)
        )
    if not isinstance(value, Tensor):
        return value
    if id(value) not in aliases:
        if explained:  # a copy that is no leaf: the model may write into what it is given
            leaf = value.detach().clone() if value.is_inference() else value.detach()
            alias = leaf.requires_grad_(leaf.is_floating_point()).clone()
        else:
            alias = value.clone() if value.is_inference() else value.view_as(value)
        aliases[id(value)] = alias
        if alias.ndim > 0 and alias.dtype != torch.bool:
            shared = len(alias) != examples
            plane = transfer.spaces.of_input(name, alias.shape, shared=shared)
            transfer.shadows[alias] = Shadow(Role.RAW, (plane,), data=not shared)
    return aliases[id(value)]


class _CompilerPause:
    """Pauses `torch.compile` while captures are in flight: it must not trace one.

    The compiler's stance belongs to the whole process, so captures in several threads share one
    pause: the first one in sets it, the last one out restores what was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._undo.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._undo.close()


_pause_compiler = _CompilerPause()


def _eager() -> contextlib.AbstractContextManager[None]:
    """Compiled modules run uncompiled meanwhile; without Dynamo loaded there are none."""
    return _pause_compiler() if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _check_devices(scope: Scope, arguments: dict[str, Any]) -> None:
    """See that inputs and model are on one device, unless the model is spread over several."""
    tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
    devices = set(map(str, {tensor.device for tensor in scope.tensors()}))
    places = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(devices) == 1:
        places["the model"] = devices.pop()
    if len(devices) > 1 and "meta" not in places.values():
        return
    if len(set(places.values())) > 1 or "meta" in places.values():
        listed = ", ".join(f"{name} is on {device}" for name, device in places.items())
        raise ValueError(f"{listed}: move the inputs and the model to one device that holds values")


def no_attention_message(capture: Capture) -> str:
    """What to say where no attention call was found or left."""
    reasons = dict.fromkeys(f"\n  {refusal}" for refusal in capture.refusals)
    softmaxes = [f"{s.module} ({s.module_type})" for s in capture.ignored]
    seen = f" Softmaxes that met no values: {', '.join(softmaxes)}." if softmaxes else ""
    return (
        "no attention was found in the forward pass: no softmax of a product of queries and keys "
        f"met values, nor was scaled_dot_product_attention called.{seen} If the model is no "
        "transformer (a convolutional network, ...), methods of another kind fit it, such as "
        "captum.attr.LayerGradCam. If it is one, its attention runs in a kernel of another "
        'library, which is invisible: load it with attn_implementation="sdpa" or "eager".'
        + "".join(reasons)
    )
