"""Captum's contract for all methods: inputs, targets, batches in parts, and the shape of results.

Subclasses compute the attributions of one part of the batch.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

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

from captum_generic_attn.captum_api.batching import Part, parts_of
from captum_generic_attn.captum_api.targets import OutputChoice, check_target, choose_output
from captum_generic_attn.progress import bar
from captum_generic_attn.relevance import padding
from captum_generic_attn.relevance.explained_rows import warn_of_no_gradient, warn_of_zero_scores

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of one part of the batch."""

    inputs: tuple[Tensor, ...]
    targets: Sequence[TargetType]
    additional: tuple[Any, ...]
    part: Part

    @property
    def first(self) -> bool:
        """Whether this is the first part, which issues the warnings that are given once."""
        return self.part.start == 0


class Attributed(NamedTuple):
    """The attributions of each input, and the examples to warn of.

    `without_gradient` have a score with no gradient, `zero` a score of 0 from which LRP would
    start; `padded` are, by stream, those whose explained tokens are padding.
    """

    maps: list[Tensor]
    without_gradient: Sequence[int]
    zero: Sequence[int] = ()
    padded: Mapping[str, Sequence[int]] = MappingProxyType({})


class _ToWarn:
    """The examples to warn of, over all parts of the batch: one warning per call."""

    def __init__(self, targets: int) -> None:
        self._without_gradient: list[list[int]] = [[] for _ in range(targets)]
        self._zero: list[list[int]] = [[] for _ in range(targets)]
        self._padded: dict[str, set[int]] = {}

    def add(self, target: int, part: Part, found: Attributed) -> None:
        """Add the examples of one part of the batch, for one target."""
        self._without_gradient[target] += [part.start + i for i in found.without_gradient]
        self._zero[target] += [part.start + i for i in found.zero]
        for stream, examples in found.padded.items():
            self._padded.setdefault(stream, set()).update(part.start + i for i in examples)

    def warn(self, examples: int) -> None:
        """Issue the warnings; targets with the same examples share one."""
        for group in dict.fromkeys(map(tuple, self._without_gradient)):
            warn_of_no_gradient(group, examples)
        for group in dict.fromkeys(map(tuple, self._zero)):
            warn_of_zero_scores(group, examples)
        if self._padded:
            named = {stream: sorted(of) for stream, of in self._padded.items()}
            warnings.warn(padding.message(named), UserWarning, stacklevel=2)


class ModelAttribution(GradientAttribution):
    """Base of all methods of this package: `attribute` and `attribute_targets`."""

    def __init__(self, forward_func: Callable[..., Any], output: OutputChoice) -> None:
        if not callable(forward_func):
            raise TypeError(
                f"forward_func must be callable, such as a module; it is {type(forward_func)}"
            )
        super().__init__(forward_func)
        self.output = output

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        return_input_shape: bool = True,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
    ) -> TensorOrTupleOfTensorsGeneric:
        """Attribute the score of each example to its tokens, in the shape of the inputs.

        Args:
            inputs: a tensor, or a tuple of tensors of one batch size, batch first.
            target: which score: an int, one int per example, or for outputs with more axes tuples
                of ints; `None` only where the output is `[B]` or `[B, 1]`.
            additional_forward_args: further arguments of `forward_func`, not explained.
            return_input_shape: `False` gives one value per token: text `[B, N]`, images
                `[B, h, w]`, frames `[B, t, h, w]`, zero for tokens that were not read.
            internal_batch_size: the largest number of examples that go through the model at once,
                which bounds memory; `None`: all. Arguments whose first axis is the batch are split
                in the same way.
            show_progress: whether to show a progress bar on stderr that counts parts of the batch.

        Returns:
            A tensor, or a tuple like `inputs`, detached, on the inputs' devices, float32 (float64
            for a float64 model). Values are non-negative, except for LRP with signed rules. Each
            element has the undivided value of its token; images have the same map in each channel
            that was read, and zero where nothing was read. Only `Lrp` has a value of its own for
            each element. An input that reaches no attention gets zeros of its own shape, and a
            warning; so do examples whose score has no gradient. Another warning names examples
            whose explained token is padding according to a mask `[B, N]` among the arguments
            (texts padded on the right and target=(-1, class)).

            If the score is computed from one token, the relevance of that token to itself is left
            out: `own="zero"` in the constructor of a method over attention. That is right for a
            class token. If the token belongs to the input, such as the last token of a prompt, the
            last item of a recommender or the word that is classified, use `own="keep"`: its own
            value may be the answer. With several such tokens (mean pooling) nothing is left out.

        Raises:
            UnsupportedAttentionError: if attention is missing or cannot be explained.
            ValueError: if the inputs, the target or an option do not fit; if an image's geometry
                cannot be inferred; if relevance is not finite, or too large for its precision.
            TypeError: if inputs or targets are of no accepted type.

        Source: eq. 5 to 11 of arXiv 2103.15679. How tokens are treated that are merged or
        concatenated between attention calls is ours: see the README.
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
        *,
        return_input_shape: bool = True,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
    ) -> TensorOrTupleOfTensorsGeneric:
        """Attribute several scores of each example, with one forward pass.

        Args:
            inputs: as in `attribute`.
            targets: a sequence, each element anything that `target` of `attribute` accepts.
            additional_forward_args: as in `attribute`.
            return_input_shape: as in `attribute`.
            internal_batch_size: as in `attribute`.
            show_progress: as in `attribute`; the bar counts the targets of each part of the batch.

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
        return cast(
            TensorOrTupleOfTensorsGeneric,
            self._attribute(
                inputs, list(targets), additional_forward_args, return_input_shape,
                internal_batch_size, show_progress, stacked=True,
            ),
        )  # fmt: skip

    # -- the way through ----------------------------------------------------------------------

    @abstractmethod
    def _attributed(self, request: Request, *, return_input_shape: bool) -> Iterator[Attributed]:
        """The maps of each target, in turn."""

    def _attribute(
        self, inputs: object, targets: list[TargetType], additional: object,
        return_input_shape: bool, internal_batch_size: int | None, show_progress: bool, *,
        stacked: bool,
    ) -> object:  # fmt: skip
        _check_count("internal_batch_size", internal_batch_size)
        tensors = self._check_inputs(inputs)
        examples = len(tensors[0])
        parts = list(parts_of(examples, internal_batch_size))
        results: list[list[list[Tensor]]] = [[] for _ in targets]  # of targets, parts, inputs
        to_warn = _ToWarn(len(targets))
        title = f"{self.get_name()} attribution"
        with (
            bar(title, len(parts) * len(targets), show=show_progress) as advance,
            autograd_enabled(),
        ):
            for part in parts:
                request = self._request(tensors, targets, additional, part)
                attributed = self._attributed(request, return_input_shape=return_input_shape)
                for i, found in enumerate(attributed):
                    results[i].append(found.maps)
                    to_warn.add(i, part, found)
                    advance()
        to_warn.warn(examples)
        joined = [[torch.cat(of) for of in zip(*maps, strict=True)] for maps in results]
        if not stacked:
            return _format_output(_is_tuple(inputs), tuple(joined[0]))
        per_input = tuple(torch.stack(of) for of in zip(*joined, strict=True))
        return _format_output(_is_tuple(inputs), per_input)

    def _request(
        self, inputs: tuple[Tensor, ...], targets: Sequence[TargetType], additional: object,
        part: Part,
    ) -> Request:  # fmt: skip
        more = () if additional is None else additional
        more = more if isinstance(more, tuple) else (more,)
        own = {id(tensor): part.of(tensor) for tensor in inputs}  # one tensor twice stays one
        return Request(
            tuple(own[id(tensor)] for tensor in inputs),
            [part.of_target(target) for target in targets],
            part.of(more),
            part,
        )

    def _choose(self, returned: Any) -> Tensor:
        return choose_output(returned, self.output)

    def _check_output(self, output: Tensor, request: Request) -> None:
        for target in request.targets:
            check_target(output, target, len(request.inputs[0]))
        if not output.requires_grad:
            raise ValueError(
                "the model's output depends on nothing differentiable: it was detached, made under "
                "inference_mode, or computed outside torch"
            )

    def _score(self, output: Tensor, request: Request, target: TargetType) -> Tensor:
        """`[B]`, the explained score of each example, part of the graph of `output`."""
        target = target.long() if isinstance(target, Tensor) else target
        score: Tensor = _run_forward(lambda *_: output, request.inputs, target)
        return score.reshape(len(request.inputs[0]))

    def _check_inputs(self, inputs: object) -> tuple[Tensor, ...]:
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        for i, part in enumerate(parts):
            if not isinstance(part, Tensor):
                hint = ": hf.unpack makes tensors of it" if isinstance(part, Mapping) else ""
                raise TypeError(f"inputs[{i}] must be a tensor, not {type(part).__name__}{hint}")
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


def retry_with_copies(run: Callable[[bool], Iterator[T]]) -> Iterator[T]:
    """What `run(False)` yields; where the model overwrites what is needed, the rest of `run(True)`.

    A model may write into what its backward pass or its attention needs: then it runs once more,
    with copies.
    """
    done = 0
    try:
        for found in run(False):
            done += 1
            yield found
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        return
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        yield from itertools.islice(run(True), done, None)


def _check_count(name: str, value: object) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name}={value!r} must be an int of at least 1")


@contextlib.contextmanager
def autograd_enabled() -> Iterator[None]:
    """Gradients are recorded, whatever the caller has switched off."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield
