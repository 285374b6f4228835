"""The methods that `speed.py` compares: each takes a task and returns what makes one attribution.

- `ours`: this package.
- `saliency`: Captum's `Saliency`, the gradient of the input.
- `limit`: one forward pass with fused attention, and the gradient of the input with frozen
  parameters. Whoever needs the gradients of all attention needs at least about that.
- `recipe`: the method as it is published: written-out attention, all maps and their gradients kept,
  gradients of all weights, R as a matrix, one example at a time. Ours, from the paper.
- `integrated_gradients`: Captum's, with 50 steps.
- `eight_targets`, `eight_calls`: this package, eight scores of one picture at once or one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from workloads import Task

from captum_generic_attn import GenericAttention

Call = Callable[[], object]
EIGHT = tuple(range(8))


def ours(task: Task) -> Call:
    method = GenericAttention(task.model)
    return lambda: method.attribute(
        task.inputs, target=task.target, additional_forward_args=task.rest or None
    )


def saliency(task: Task) -> Call:
    from captum.attr import Saliency

    method = Saliency(task.model)
    return lambda: method.attribute(
        task.inputs.detach().requires_grad_(),
        target=task.target,
        additional_forward_args=task.rest or None,
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient; afterwards, those do that did before."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(requires_grad=False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def score(task: Task, inputs: Tensor) -> Tensor:
    """The sum of the examples' scores: their gradients do not mix."""
    index = task.target if isinstance(task.target, tuple) else (task.target,)
    picked: Tensor = task.model(inputs, *task.rest)[(slice(None), *index)]
    return picked.sum()


def limit(task: Task) -> Call:
    def of_inputs() -> Tensor:
        inputs = task.inputs.detach().requires_grad_()
        with frozen(task.model):
            return torch.autograd.grad(score(task, inputs), inputs)[0]

    def of_embedding() -> Tensor:
        embedded: list[Tensor] = []
        handle = task.embedding.register_forward_hook(
            lambda _module, _inputs, output: embedded.append(output.requires_grad_())
        )
        try:
            with frozen(task.model):
                return torch.autograd.grad(score(task, task.inputs), embedded)[0]
        finally:
            handle.remove()

    return of_inputs if task.embedding is None else of_embedding


def recipe(task: Task) -> Call:
    """Of timm's vision transformers: row of the class token, [B, N - 1]."""
    model = copy.deepcopy(task.model)
    maps: list[Tensor] = []
    gradients: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor], attention: Tensor) -> None:
        maps.append(attention)
        attention.register_hook(gradients.append)

    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(keep)

    def explain(example: Tensor) -> Tensor:
        model(example)[0, task.target].backward()
        model.zero_grad()
        tokens = maps[0].shape[-1]
        R = torch.eye(tokens, dtype=example.dtype)
        with torch.no_grad():
            # The backward pass met the last layer first.
            for attention, gradient in zip(maps, reversed(gradients), strict=True):
                R = R + (gradient * attention)[0].clamp(min=0).mean(0) @ R
        maps.clear()
        gradients.clear()
        return R[0, 1:]

    return lambda: torch.stack([explain(example[None]) for example in task.inputs])


def integrated_gradients(task: Task) -> Call:
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(task.model)
    return lambda: method.attribute(
        task.inputs, target=task.target, n_steps=50, internal_batch_size=10
    )


def eight_targets(task: Task) -> Call:
    method = GenericAttention(task.model)
    return lambda: method.attribute_targets(task.inputs, targets=EIGHT)


def eight_calls(task: Task) -> Call:
    method = GenericAttention(task.model)
    return lambda: [method.attribute(task.inputs, target=target) for target in EIGHT]


CONTENDERS: dict[str, Callable[[Task], Call]] = {
    made.__name__: made
    for made in (
        ours,
        saliency,
        limit,
        recipe,
        integrated_gradients,
        eight_targets,
        eight_calls,
    )
}
