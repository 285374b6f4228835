"""What one forward pass gave: the output, the attention calls, the tokens; and backward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from captum_generic_attn.capture.gradient_stops import ending_at
from captum_generic_attn.capture.mode import ConstantParametersMode
from captum_generic_attn.capture.record import AttentionRecord
from captum_generic_attn.capture.torch_function import bypass_torch_function
from captum_generic_attn.capture.tracking.abstract_value import Softmax
from captum_generic_attn.capture.unsupported import UnsupportedCall
from captum_generic_attn.tokens.spaces import TokenSpaces
from captum_generic_attn.tokens.streams import TokenStreams


@dataclass(frozen=True, eq=False)
class Capture:
    """One forward pass.

    Attributes:
        output: the tensor that is explained.
        records: the attention calls that can be explained, in execution order.
        ancestors: indices of the calls that the output depends on, with no other call between.
        spaces: all tokens.
        streams: the streams that they form.
        input_names: the names of the inputs.
        refusals: the attention calls that cannot be explained.
        ignored: softmaxes whose result met no values.
        in_training: operations that behaved as in training mode.
        modules: the modules of the model by name.
        parameters: the names of parameters and buffers by the ids of the tensors.
        roots: where the graph begins for each input; `None` for inputs of integers.
        embedded: for each embedding of input integers, their token ids and where the graph begins.
        eager_attention: whether fused attention was computed from single operations.
    """

    output: Tensor
    records: Sequence[AttentionRecord]
    ancestors: frozenset[int]
    spaces: TokenSpaces
    streams: TokenStreams
    input_names: tuple[str, ...]
    refusals: Sequence[UnsupportedCall]
    ignored: Sequence[Softmax]
    in_training: tuple[str, ...]
    modules: dict[str, nn.Module]
    parameters: Mapping[int, str]
    roots: Sequence[GradientEdge | None]
    embedded: Sequence[tuple[Tensor, GradientEdge]]
    eager_attention: bool

    def backward(
        self, score: Tensor, edges: Sequence[GradientEdge], *, retain_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        """Run the backward pass down to some edges; the taps of the records receive gradients.

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
        gradients = bypass_torch_function(torch.autograd.grad)  # type: ignore[arg-type]
        with ConstantParametersMode(self.parameters, eager_attention=self.eager_attention):
            found: tuple[Tensor | None, ...] = gradients(
                outputs, edges, cotangents, retain_graph=retain_graph, allow_unused=True
            )
        return found

    def blocked(
        self, score: Tensor, records: Sequence[AttentionRecord]
    ) -> tuple[Tensor | None, ...]:
        """The gradient of a number at the results of calls, with all other calls held constant.

        It shows which rows of a result are read without another attention call between. The graph
        is kept.

        Args:
            score: a number.
            records: the calls.

        Returns:
            As `backward`; see `AttentionRecord.read_rows`.
        """
        with ending_at(record.result for record in self.records):
            return self.backward(score, [r.result for r in records], retain_graph=True)


def name_of_input(capture: Capture, inputs: Sequence[Tensor], place: int) -> str:
    """The name of an input. A tensor that is passed twice is one input and has one name."""
    return capture.input_names[next(i for i in range(place + 1) if inputs[i] is inputs[place])]


def no_attention_message(capture: Capture) -> str:
    """The message of the error where no attention call was found or is left."""
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
