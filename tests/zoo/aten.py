"""Counts attention below PyTorch's Python functions, where the package does not look.

A dispatch mode sees the operations that are really run. A fused kernel is one call; a softmax is
one if what becomes of its result (a view, a cast, dropout, a mask) enters a product of matrices.
Called by the census.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"bmm", "mm", "baddbmm", "addmm", "mv", "addmv", "dot"}
_PASSING = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand",
    "squeeze", "unsqueeze", "slice", "select", "split", "split_with_sizes", "clone", "_to_copy",
    "alias", "detach", "mul", "div", "native_dropout", "dropout", "masked_fill", "where", "copy",
    "contiguous", "cat", "constant_pad_nd", "as_strided", "convolution", "index", "lift_fresh",
}  # fmt: skip


class AttentionCounter(TorchDispatchMode):
    """Counts fused kernels, and softmaxes by whether their result met a product."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self._met: list[bool] = []
        self._made_of: dict[int, tuple[Tensor, set[int]]] = {}  # the tensor stays, so its id does

    @property
    def attention(self) -> int:
        """Attention calls."""
        return self.kernels + sum(self._met)

    @property
    def others(self) -> int:
        """Softmaxes that met no product."""
        return len(self._met) - sum(self._met)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if "scaled_dot_product" in name:
            self.kernels += 1
        elif name in ("_softmax", "_safe_softmax", "softmax") and out.numel():
            self._met.append(False)
            self._note(out, {len(self._met) - 1})
        else:
            behind = {
                origin
                for tensor in _tensors(args)
                if id(tensor) in self._made_of
                for origin in self._made_of[id(tensor)][1]
            }
            if behind and name in _PRODUCTS:
                for origin in behind:
                    self._met[origin] = True
                left = args[-2] if name.startswith("b") or name == "mm" else args[0]
                if name in ("addmm", "mm") and left.ndim == 2:  # heads are mixed by a weight
                    self._note(out, behind)
            elif behind and (name in _PASSING or (name == "add" and self._both(args))):
                for result in _tensors((out,)):
                    self._note(result, behind)
        return out

    def _both(self, args: tuple[Any, ...]) -> bool:
        """Whether two softmaxes are blended."""
        return all(id(tensor) in self._made_of for tensor in args[:2])

    def _note(self, tensor: Tensor, origins: set[int]) -> None:
        self._made_of[id(tensor)] = tensor, origins


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def count(run: Callable[[], object]) -> AttentionCounter:
    """Count the attention of what `run` runs; gradients are on, as fast paths are off then."""
    counter = AttentionCounter()
    with torch.enable_grad(), counter:
        run()
    return counter
