"""What is explained: the output tensor of a model, and one raw score per example in it.

Called by `attribution`. Nothing is guessed: where an output or a target does not say which score
is meant, the error lists what there is and which forms fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

OUTPUT_FIELDS = (
    "logits",
    "logits_per_image",
    "question_answering_score",
    "prediction_logits",
    "pred_logits",
    "out",
)
"""Fields of a mapping that hold scores, in the order in which they are tried."""

OutputChoice = str | int | Callable[[Any], Tensor] | None


def choose_output(returned: object, output: OutputChoice = None) -> Tensor:
    """The tensor to explain in what a model returned.

    Args:
        returned: a tensor, a mapping (a Hugging Face `ModelOutput` is one), a tuple or a list.
        output: a field name, an index, or a function of `returned`. Without it, a mapping gives the
            first of `OUTPUT_FIELDS`, a tuple its only floating tensor.

    Returns:
        A floating tensor, batch first.

    Raises:
        ValueError: if the choice is not there, or none can be made; the message lists what is.
        TypeError: if what is returned or chosen is no floating tensor.

    Example:
        >>> choose_output({"loss": torch.zeros(()), "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    if callable(output):
        chosen: object = output(returned)
    elif isinstance(returned, Tensor):
        if output is not None:
            raise ValueError(f"output={output!r}, but the model returns a tensor; leave output out")
        chosen = returned
    elif isinstance(returned, Mapping):
        chosen = _from_mapping(returned, output)
    elif isinstance(returned, (tuple, list)):
        chosen = _from_sequence(returned, output)
    else:
        raise TypeError(
            f"the model returned {type(returned).__name__}, not a tensor; pass output= with a "
            "function that picks the tensor to explain"
        )
    if not isinstance(chosen, Tensor) or not chosen.is_floating_point():
        kind = str(chosen.dtype) if isinstance(chosen, Tensor) else type(chosen).__name__
        raise TypeError(f"the output to explain must be a floating tensor, not {kind}")
    return chosen


def _from_mapping(returned: Mapping[str, object], output: OutputChoice) -> object:
    if isinstance(output, str):
        if output in returned:
            return returned[output]
        raise ValueError(f"output={output!r} is not among the model's outputs: {_list(returned)}")
    if isinstance(output, int):
        raise ValueError(  # noqa: TRY004 - the type is right for other models
            f"output={output} is no name; the model returns {_list(returned)}"
        )
    for field in OUTPUT_FIELDS:
        if isinstance(returned.get(field), Tensor):
            return returned[field]
    raise ValueError(
        f"which output to explain? The model returns {_list(returned)}; pass output= with a name"
    )


def _from_sequence(returned: tuple[Any, ...] | list[Any], output: OutputChoice) -> object:
    listed = _list(dict(enumerate(returned)))
    if isinstance(output, int):
        if -len(returned) <= output < len(returned):
            return returned[output]
        raise ValueError(f"output={output} is out of range; the model returns {listed}")
    if isinstance(output, str):
        raise ValueError(  # noqa: TRY004 - the type is right for other models
            f"output={output!r}, but the model returns a tuple, without names: {listed}"
        )
    floating = [t for t in returned if isinstance(t, Tensor) and t.is_floating_point()]
    if output is None and len(floating) == 1:
        return floating[0]
    raise ValueError(f"which output to explain? The model returns {listed}; pass output=<index>")


def _list(fields: Mapping[Any, object]) -> str:
    return ", ".join(
        f"{name} {tuple(value.shape)}" if isinstance(value, Tensor)
        else f"{name} ({type(value).__name__})"
        for name, value in fields.items()
    )  # fmt: skip


def check_target(output: Tensor, target: object, examples: int) -> None:
    """Check that a target picks one score of each example.

    Args:
        output: `[B, ...]` scores.
        target: anything that Captum's `target` accepts.
        examples: the batch size of the inputs.

    Raises:
        ValueError: if the target does not fit the output's shape; the message says what does.
        TypeError: if it is of no accepted type.

    Example:
        >>> check_target(torch.zeros(2, 3), 1, 2)
        >>> check_target(torch.zeros(2, 3), 5, 2)
        Traceback (most recent call last):
            ...
        ValueError: target 5 is out of range for an axis of 3 in the output of shape (2, 3)
    """
    shape = tuple(output.shape)
    if not shape or shape[0] != examples:
        raise ValueError(
            f"the output has shape {shape}, but there are {examples} examples; its first axis must "
            "be the batch"
        )
    if target is None:
        if shape[1:] in ((), (1,)):
            return
        raise ValueError(f"target=None, but the output has shape {shape}: {_forms(shape)}")
    if len(shape) == 1:
        raise ValueError(f"the output has shape {shape}, one score per example: leave target out")
    if isinstance(target, Tensor):
        target = _plain(target, examples, shape)
    if isinstance(target, list):
        _check_each(target, examples, shape)
    else:
        _check_choice(target, shape)


def _plain(target: Tensor, examples: int, shape: tuple[int, ...]) -> int | list[Any]:
    """A target tensor as an int or a list of ints."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold integers, not {target.dtype}: {_forms(shape)}")
    if target.numel() == 1:
        return int(target)
    if target.ndim == 1 and len(target) == examples:
        choices: list[Any] = target.tolist()
        return choices
    raise ValueError(f"target has shape {tuple(target.shape)}: {_forms(shape)}")


def _check_each(choices: list[Any], examples: int, shape: tuple[int, ...]) -> None:
    """Check a list with one choice for each example."""
    if len(choices) != examples:
        raise ValueError(
            f"target lists {len(choices)} choices for {examples} examples: {_forms(shape)}"
        )
    if len({isinstance(choice, tuple) for choice in choices}) > 1:
        raise TypeError(f"target mixes ints and tuples: {_forms(shape)}")
    for choice in choices:
        _check_choice(choice, shape)
        if isinstance(choice, int) and choice < 0:
            raise ValueError(f"target {choice} in a list counts from the end: pass indices ≥ 0")


def _check_choice(choice: object, shape: tuple[int, ...]) -> None:
    place = choice if isinstance(choice, tuple) else (choice,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in place):
        raise TypeError(f"target {choice!r} is not made of integers: {_forms(shape)}")
    if len(place) != len(shape) - 1:
        raise ValueError(
            f"target {choice!r} does not pick one value of each example of an output of shape "
            f"{shape}: {_forms(shape)}"
        )
    for i, size in zip(place, shape[1:], strict=True):
        if not -size <= int(i) < size:
            raise ValueError(
                f"target {i} is out of range for an axis of {size} in the output of shape {shape}"
            )


def _forms(shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return "pass an int, or one int per example as a list or a 1-D tensor"
    axes = len(shape) - 1
    return f"pass a tuple of {axes} ints, or a list of one such tuple per example"
