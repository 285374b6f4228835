"""`GenericAttention`: the method as a Captum attribution; the only room that knows Captum.

Inputs are checked, the forward pass is captured (`capture`), each target is explained
(`explanation`), and values per token go back to the shape of the inputs (`input_maps`).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from captum._utils.common import (
    _format_output,
    _format_tensor_into_tuples,
    _is_tuple,
    _run_forward,
)
from captum._utils.typing import TargetType, TensorOrTupleOfTensorsGeneric
from captum.attr import GradientAttribution
from captum.log import log_usage
from torch import Tensor

from captum_generic_attn.capture import (
    Capture,
    UnsupportedAttentionError,
    capture_forward,
    no_attention_message,
)
from captum_generic_attn.explanation import (
    Explanation,
    Layers,
    Options,
    explain,
    selected,
)
from captum_generic_attn.input_maps import maps_of_inputs
from captum_generic_attn.parts import Part, parts_of
from captum_generic_attn.relevance import Relevance
from captum_generic_attn.rows import RowsOption, warn_of_no_gradient
from captum_generic_attn.score import OutputChoice, check_target, choose_output

_INTERPOLATIONS = ("bilinear", "nearest")


@dataclass(frozen=True, eq=False)
class _Call:
    """What is explained at once: the inputs of a part of the batch, and all that goes with them."""

    inputs: tuple[Tensor, ...]
    targets: Sequence[TargetType]
    additional: object
    part: Part
    matrices: bool = False
    keep_calls: bool = False


class GenericAttention(GradientAttribution):
    """Generic attention explainability (Chefer et al., ICCV 2021) for any transformer.

    Which tokens made the model give this score: attention maps, weighted by their gradients,
    averaged over heads and multiplied up through the layers (eq. 5 to 11). The model is used as it
    is: fused attention stays fused, and nothing of the capture is left behind.

    Args:
        forward_func: a module, a bound method, a `functools.partial`, or a closure round modules.
        layers: names, name prefixes or modules whose attention counts; `None`: all.
        start_layer: leave out the first `start_layer` calls of each (query stream, key stream)
            pair among those that `layers` selects and the score reaches; -1 keeps the last. Merged
            tokens count with the stream that they were merged from.
        rows: which rows are explained; `None`: those that the score is computed from. Else an int
            (negative from the end), a list of ints, `[B]` or `[B, k]` indices, `[B, N]` weights,
            or a mapping from stream names to one of these.
        normalize: eq. 8 and 9, in attention between streams (object queries and image).
        self_in_cross: the two `R̄` factors of eq. 10, in attention between streams.
        aggregate: `False` is the authors' ablation "no aggregation": each `+=` becomes `=`.
        output: field name, index or function that picks the output to explain; see
            `captum_generic_attn.score.choose_output`.
        interpolation: `"bilinear"` (the authors' pictures) or `"nearest"` (each element has the
            value of its token).
        strict: whether attention calls that cannot be explained raise, or are skipped with one
            warning.

    Raises:
        ValueError: if `interpolation` is none of the two.
        TypeError: if `start_layer` is no int, or `forward_func` cannot be called.

    Source: arXiv 2103.15679. With several explained rows (mean pooling) each has equal weight, a
    case that the paper does not cover.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import GenericAttention
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> images = torch.rand(2, 3, 160, 160)
        >>> heatmap = GenericAttention(model).attribute(images, target=1)
        >>> heatmap.shape
        torch.Size([2, 3, 160, 160])
        >>> GenericAttention(model).attribute(images, target=1, return_input_shape=False).shape
        torch.Size([2, 10, 10])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        layers: Layers = None,
        start_layer: int = 0,
        rows: RowsOption = None,
        normalize: bool = True,
        self_in_cross: bool = True,
        aggregate: bool = True,
        output: OutputChoice = None,
        interpolation: str = "bilinear",
        strict: bool = True,
    ) -> None:
        if not callable(forward_func):
            raise TypeError(
                f"forward_func must be callable, such as a module; it is {type(forward_func)}"
            )
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation={interpolation!r} is none of {_INTERPOLATIONS}")
        if not isinstance(start_layer, int) or isinstance(start_layer, bool):
            raise TypeError(f"start_layer must be an int, not {start_layer!r}")
        super().__init__(forward_func)
        self.layers = layers
        self.start_layer = start_layer
        self.rows = rows
        self.normalize = normalize
        self.self_in_cross = self_in_cross
        self.aggregate = aggregate
        self.output = output
        self.interpolation = interpolation
        self.strict = strict

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object = None,
        return_input_shape: bool = True,
        *,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
    ) -> TensorOrTupleOfTensorsGeneric:
        """Attribute the score of each example to its tokens, in the shape of the inputs.

        Args:
            inputs: a tensor, or a tuple of tensors of one batch size, batch first.
            target: which score: an int, one int per example, or for outputs with more axes tuples
                of ints; `None` only where the output is `[B]` or `[B, 1]`.
            additional_forward_args: further arguments of `forward_func`, not explained.
            return_input_shape: `False` gives one value per token: text `[B, N]`, pictures
                `[B, h, w]`.
            internal_batch_size: at most so many examples go through the model at once, which bounds
                memory; `None`: all. Arguments whose first axis is the batch are cut alike.
            show_progress: whether a bar on stderr counts the parts of the batch.

        Returns:
            A tensor, or a tuple like `inputs`, detached, on the inputs' devices, float32 (float64
            for a float64 model), non-negative, in the unit of the score. Each element has the
            undivided value of its token; pictures have the same map in each channel. An input that
            reaches no attention gets zeros of its own shape, and a warning.

        Raises:
            UnsupportedAttentionError: if attention is missing or cannot be explained.
            ValueError: if the inputs, the target or an option do not fit; if a picture's geometry
                cannot be told.
            TypeError: if inputs or targets are of no accepted type.

        Source: eq. 5 to 11 of arXiv 2103.15679. What is done with tokens that are merged or joined
        between attention calls is ours: see the README.
        """
        return cast(
            TensorOrTupleOfTensorsGeneric,
            self._attribute(
                inputs, [target], additional_forward_args, return_input_shape,
                internal_batch_size, show_progress, stacked=False,
            ),
        )  # fmt: skip

    def attribute_targets(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        targets: Sequence[TargetType],
        additional_forward_args: object = None,
        targets_per_backward: int | None = None,
        return_input_shape: bool = True,
        *,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
    ) -> TensorOrTupleOfTensorsGeneric:
        """Attribute several scores of each example, with one forward pass.

        Args:
            inputs: as in `attribute`.
            targets: a sequence, each element anything that `target` of `attribute` accepts.
            additional_forward_args: as in `attribute`.
            targets_per_backward: at most so many targets share a backward pass, which bounds
                memory. Each target takes a pass of its own, so any bound holds.
            return_input_shape: as in `attribute`.
            internal_batch_size: as in `attribute`.
            show_progress: whether a bar on stderr counts the targets of each part of the batch.

        Returns:
            `[T, B, ...]` per input: the stacked results of `attribute` for each target.

        Raises:
            ValueError: if `targets` is empty, and as `attribute`.
            TypeError: if `targets` is no sequence, and as `attribute`.

        Example:
            >>> import torch, timm
            >>> from captum_generic_attn import GenericAttention
            >>> method = GenericAttention(timm.create_model("test_vit", num_classes=5).eval())
            >>> method.attribute_targets(torch.rand(1, 3, 160, 160), [0, 3]).shape
            torch.Size([2, 1, 3, 160, 160])
        """
        given: object = targets
        listed = isinstance(given, Sequence) and not isinstance(given, str)
        if not listed and not (isinstance(given, Tensor) and given.ndim > 0):
            raise TypeError(f"targets must be a sequence of targets, not {type(targets).__name__}")
        if len(targets) == 0:
            raise ValueError("targets is empty; pass at least one target")
        _check_count("targets_per_backward", targets_per_backward)
        return cast(
            TensorOrTupleOfTensorsGeneric,
            self._attribute(
                inputs, list(targets), additional_forward_args, return_input_shape,
                internal_batch_size, show_progress, stacked=True,
            ),
        )  # fmt: skip

    def relevance(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object = None,
        keep_calls: bool = False,
    ) -> Relevance:
        """Token-to-token relevance maps, streams and attention calls.

        Args:
            inputs: as in `attribute`.
            target: as in `attribute`.
            additional_forward_args: as in `attribute`.
            keep_calls: keep the maps of every call too.

        Returns:
            A frozen `Relevance`; `.matrix(query, key)` is `[B, Nq, Nk]`, R of the paper.

        Raises:
            ValueError: as `attribute`.
            TypeError: as `attribute`.

        Example:
            >>> import torch, timm
            >>> from captum_generic_attn import GenericAttention
            >>> model = timm.create_model("test_vit", num_classes=5).eval()
            >>> relevance = GenericAttention(model).relevance(torch.rand(1, 3, 160, 160), target=1)
            >>> relevance.matrix("x", "x").shape
            torch.Size([1, 101, 101])
            >>> list(relevance.streams["x"].parts)
            ['cls_token', 'x']
        """
        tensors = self._check_inputs(inputs)
        (part,) = parts_of(len(tensors[0]), None)
        call = _Call(
            tensors, [target], additional_forward_args, part, matrices=True, keep_calls=keep_calls
        )
        with _undisturbed():
            ((_, explanation),) = self._explanations(call)
        warn_of_no_gradient(explanation.dark, len(tensors[0]))
        return cast(Relevance, explanation.relevance)

    # -- the way through ----------------------------------------------------------------------

    def _attribute(
        self, inputs: object, targets: list[TargetType], additional: object,
        return_input_shape: bool, internal_batch_size: int | None, show_progress: bool, *,
        stacked: bool,
    ) -> object:  # fmt: skip
        _check_count("internal_batch_size", internal_batch_size)
        tensors = self._check_inputs(inputs)
        examples = len(tensors[0])
        parts = list(parts_of(examples, internal_batch_size))
        interpolation = self.interpolation if return_input_shape else None
        results: list[list[list[Tensor]]] = [[] for _ in targets]  # of targets, parts, inputs
        dark: list[list[int]] = [[] for _ in targets]
        bar = _bar(f"{self.get_name()} attribution", len(parts) * len(targets), show_progress)
        with bar as advance, _undisturbed():
            for part in parts:
                call = _Call(part.of(tensors), targets, additional, part)
                for i, (capture, explanation) in enumerate(self._explanations(call)):
                    first = part.start == 0 and i == 0
                    maps = maps_of_inputs(
                        capture, explanation.values, call.inputs, interpolation, warn=first
                    )
                    results[i].append(maps)
                    advance()
                    dark[i] += [part.start + example for example in explanation.dark]
        for found in dict.fromkeys(map(tuple, dark)):
            warn_of_no_gradient(found, examples)
        joined = [[torch.cat(of) for of in zip(*maps, strict=True)] for maps in results]
        if not stacked:
            return _format_output(_is_tuple(inputs), tuple(joined[0]))
        per_input = tuple(torch.stack(of) for of in zip(*joined, strict=True))
        return _format_output(_is_tuple(inputs), per_input)

    def _explanations(self, call: _Call) -> Iterator[tuple[Capture, Explanation]]:
        done = 0
        try:
            for found in self._run(call):
                done += 1
                yield found
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            return
        # The model overwrites what its backward or its attention needs: once more, with copies.
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            yield from itertools.islice(self._run(call, copies=True), done, None)

    def _run(self, call: _Call, *, copies: bool = False) -> Iterator[tuple[Capture, Explanation]]:
        more = () if call.additional is None else call.additional
        more = more if isinstance(more, tuple) else (more,)
        inputs, part = call.inputs, call.part
        targets = [part.of_target(target) for target in call.targets]
        capture = capture_forward(
            self.forward_func, inputs, part.of(more),
            lambda returned: choose_output(returned, self.output), copies=copies,
        )  # fmt: skip
        options = Options(
            self.layers, self.start_layer, part.of_rows(self.rows), self.normalize,
            self.self_in_cross, self.aggregate,
        )  # fmt: skip
        self._check_attention(capture, warn=part.start == 0)
        for target in targets:
            check_target(capture.output, target, len(inputs[0]))
        if not capture.output.requires_grad:
            raise ValueError(
                "the model's output depends on nothing differentiable: it was detached, made under "
                "inference_mode, or computed outside torch"
            )
        for i, target in enumerate(targets):
            target = target.long() if isinstance(target, Tensor) else target
            score = _run_forward(lambda *_: capture.output, inputs, target)
            # Under the user's autocast, relevance would lose the digits that it is made for.
            with torch.autocast(score.device.type, enabled=False):
                explanation = explain(
                    capture, score.reshape(len(inputs[0])), options,
                    retain_graph=i + 1 < len(targets), matrices=call.matrices,
                    keep_calls=call.keep_calls,
                )  # fmt: skip
            yield capture, explanation

    def _check_inputs(self, inputs: object) -> tuple[Tensor, ...]:
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        for i, part in enumerate(parts):
            if not isinstance(part, Tensor):
                raise TypeError(f"inputs[{i}] must be a tensor, not {type(part).__name__}")
            if part.ndim == 0 or part.numel() == 0:
                raise ValueError(
                    f"inputs[{i}] has shape {tuple(part.shape)}; it needs at least one example, "
                    "and something in it"
                )
            if len(part) != len(parts[0]):
                sizes = [len(p) for p in parts]
                raise ValueError(f"all inputs must share one batch size; they have {sizes}")
            if not part.is_meta and part.is_floating_point() and bool(part.isnan().any()):
                raise ValueError(f"inputs[{i}] holds NaN")
        if not parts:
            raise ValueError("inputs is an empty tuple")
        return cast(tuple[Tensor, ...], _format_tensor_into_tuples(parts))

    def _check_attention(self, capture: Capture, *, warn: bool) -> None:
        if not capture.records and not capture.refusals:
            raise UnsupportedAttentionError(no_attention_message(capture))
        modules = selected(capture, self.layers)
        refused = [r for r in capture.refusals if r.module in modules and not r.harmless]
        listed = "".join(f"\n  {seen}" for seen in dict.fromkeys(map(str, refused)))
        if refused and self.strict:
            raise UnsupportedAttentionError(f"attention that cannot be explained:{listed}")
        if refused and warn:
            warnings.warn(
                f"attention calls that cannot be explained are skipped:{listed}",
                UserWarning,
                stacklevel=2,
            )
        if not any(r.module in modules for r in capture.records):
            raise UnsupportedAttentionError(no_attention_message(capture))
        if capture.dropout_seen and warn:
            warnings.warn(
                "fused attention ran with dropout, whose mask cannot be known: relevance is that "
                "of the probabilities before dropout. Call model.eval() first",
                UserWarning,
                stacklevel=2,
            )


def _check_count(name: str, value: object) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name}={value!r} must be an int of at least 1")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Gradients are recorded, whatever the caller has switched off."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


@contextlib.contextmanager
def _bar(title: str, total: int, show: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr that what it yields advances by one; nothing unless it is to be shown."""
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
