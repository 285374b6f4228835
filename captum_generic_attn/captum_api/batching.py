"""Large batches in parts: what of a call's arguments belongs to some of its examples.

`attribution` explains a part at a time, so that memory is bounded by `internal_batch_size`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some examples of a batch: those from `start` to `stop`, of `examples`."""

    start: int
    stop: int
    examples: int

    @property
    def whole(self) -> bool:
        """Whether it is the batch."""
        return self.stop - self.start == self.examples

    def of(self, argument: Any) -> Any:
        """The part's share of an argument: of tensors whose first axis is the batch, their rows.

        Tensors of another first axis belong to all examples alike.

        Example:
            >>> import torch
            >>> Part(0, 2, 3).of((torch.arange(3), torch.arange(4), "text"))
            (tensor([0, 1]), tensor([0, 1, 2, 3]), 'text')
        """
        if self.whole:
            return argument
        if isinstance(argument, Tensor):
            mine = argument.ndim > 0 and len(argument) == self.examples
            return argument[self.start : self.stop] if mine else argument
        if type(argument) in (list, tuple):
            return type(argument)(self.of(item) for item in argument)
        if type(argument) is dict:
            return {key: self.of(value) for key, value in argument.items()}
        return argument

    def of_target(self, target: Any) -> Any:
        """The part's share of a target: of a list or 1-D tensor with a choice for each example.

        Raises:
            ValueError: if there are more or fewer choices than examples.
        """
        if self.whole:
            return target
        each = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)
        if not each:
            return target
        if len(target) != self.examples:
            raise ValueError(
                f"target lists {len(target)} choices for {self.examples} examples: pass one choice "
                "for all, or one for each"
            )
        return target[self.start : self.stop]

    def of_rows(self, rows: Any) -> Any:
        """The part's share of `rows=`: of tensors, which hold something for each example."""
        if isinstance(rows, Mapping):
            return {stream: self.of_rows(choice) for stream, choice in rows.items()}
        return self.of(rows) if isinstance(rows, Tensor) else rows


def parts_of(examples: int, size: int | None) -> Iterator[Part]:
    """A batch in parts of at most `size` examples; all at once for `None`.

    Example:
        >>> [(part.start, part.stop) for part in parts_of(5, 2)]
        [(0, 2), (2, 4), (4, 5)]
    """
    size = examples if size is None else size
    for start in range(0, examples, size):
        yield Part(start, min(start + size, examples), examples)
