"""What `verify` checks: a method on one batch and target, its capture, and random probes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_generic_attn.captum_api.base import ModelAttribution, Request
from captum_generic_attn.captum_api.batching import parts_of
from captum_generic_attn.captum_api.inputs import TargetType
from captum_generic_attn.capture import AttentionRecord, Capture, Witness, capture_forward

NOISE = 1e-4
"""Derivatives below this part of the largest one are rounding errors."""


class Subject:
    """A method, the arguments of `attribute`, and one capture of the model.

    Attributes:
        method: the method.
        given: the inputs, as in `attribute`.
        target: as in `attribute`.
        more: additional forward arguments, as in `attribute`.
        samples: how many random probes each check makes.
        generator: of the random probes.
        request: the arguments, checked.
        witness: what the calls of `capture` read.
        capture: one forward pass; it exists after `capture_model`.
    """

    capture: Capture

    def __init__(
        self, method: ModelAttribution, inputs: Tensor | tuple[Tensor, ...], target: TargetType,
        additional: object, samples: int, seed: int,
    ) -> None:  # fmt: skip
        self.method, self.target, self.samples = method, target, samples
        self.given, self.more = inputs, additional
        self.generator = torch.Generator().manual_seed(seed)
        tensors = method._check_inputs(inputs)  # noqa: SLF001
        (part,) = parts_of(len(tensors[0]), None)
        self.request = method._request(tensors, [target], additional, part)  # noqa: SLF001
        self.witness = Witness()

    def capture_model(self) -> None:
        """Run the model and keep what its calls read."""
        self.capture = self.captured(self.request, self.witness)

    def captured(self, request: Request | None = None, witness: Witness | None = None) -> Capture:
        """One more forward pass."""
        request = self.request if request is None else request
        return capture_forward(
            self.method.forward_func, request.inputs, request.additional,
            self.method._choose, copies=True, witness=witness or Witness(),  # noqa: SLF001
        )  # fmt: skip

    def score(self, output: Tensor) -> Tensor:
        """The explained score of each example."""
        return self.method._score(output, self.request, self.target)  # noqa: SLF001

    def normal(self, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Normal random numbers of the type and device of a tensor, and of its shape or another."""
        drawn = torch.randn(shape or like.shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(like.dtype).to(like.device)


def name_of(record: AttentionRecord) -> str:
    """The module that makes a call."""
    return record.module or "the forward function"


def input_edges(capture: Capture) -> list[GradientEdge]:
    """Where the graph begins: at inputs that are numbers, and at the embeddings of integers."""
    roots = [edge for edge in capture.roots if edge is not None]
    return [*roots, *(edge for _, edge in capture.embedded)]


def largest(gradient: Tensor) -> float:
    """The largest absolute value of a gradient; NaN and infinity do not count."""
    return float(gradient.abs().nan_to_num(0, 0, 0).max()) if gradient.numel() else 0.0


def above_noise(gradient: Tensor, scale: float) -> Tensor:
    """Where a gradient is more than rounding errors beside `scale`; NaN counts as none."""
    return gradient.abs().nan_to_num(0, 0, 0) > NOISE * max(scale, 1e-30)
