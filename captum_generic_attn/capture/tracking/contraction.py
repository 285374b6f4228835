"""Products of two tensors in the notation of einsum: a label for each axis of factors and result.

The labels carry token ids through matmul, bmm, einsum and the like. They tell attention
(probabilities times values, summed over keys) from a product that mixes heads.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from captum_generic_attn.tokens.ids import first_along, varies

Label = str


@dataclass(frozen=True, eq=False)
class Contraction:
    """Two factors and the labels of their axes and of the result's."""

    left: Tensor
    right: Tensor
    left_labels: tuple[Label, ...]
    right_labels: tuple[Label, ...]
    out_labels: tuple[Label, ...]
    bias: Tensor | None = None

    @property
    def summed(self) -> set[Label]:
        """Labels that both factors have and the result has not."""
        return (set(self.left_labels) & set(self.right_labels)) - set(self.out_labels)

    def labels(self, side: int) -> tuple[Label, ...]:
        """Labels of the left (0) or right (1) factor."""
        return (self.left_labels, self.right_labels)[side]


def elementwise(left: Tensor, right: Tensor) -> Contraction:
    """A product element by element: each axis of the result has a label, and nothing is summed.

    An axis that is broadcast has a label of its own.
    """
    depth = max(left.ndim, right.ndim)

    def labels(tensor: Tensor, side: str) -> tuple[Label, ...]:
        missing = depth - tensor.ndim
        return tuple(
            f"axis{missing + i}" if n > 1 or _size(other, i - tensor.ndim) == 1 else f"{side}{i}"
            for i, n in enumerate(tensor.shape)
            for other in [right if tensor is left else left]
        )

    out = tuple(f"axis{i}" for i in range(depth))
    return Contraction(left, right, labels(left, "left"), labels(right, "right"), out)


def _size(tensor: Tensor, axis: int) -> int:
    """The size along an axis counted from the end; 1 where the tensor has none."""
    return tensor.shape[axis] if -axis <= tensor.ndim else 1


def read(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Contraction | None:
    """The contraction that a call computes; `None` if it has not exactly two factors."""
    if name == "einsum":
        return _einsum(args, kwargs)
    if name == "tensordot":
        return _tensordot(args, kwargs)
    factors = _factors(name, [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)])
    if factors is None:
        return None
    left, right, bias = factors
    if name in ("linear", "inner"):
        return _along_the_last(left, right, bias)
    if name == "linalg_vecdot":
        return _dot(left, right, operator.index(kwargs.get("dim", -1)))  # type: ignore[arg-type]
    return _of_matrices(left, right, bias, by_rows=name == "cdist")


def _factors(name: str, tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The left factor, the right factor and the bias among the arguments of a product."""
    bias = None
    if name in ("baddbmm", "addmm", "addmv") and len(tensors) == 3:
        bias, *tensors = tensors
    if name == "linear" and len(tensors) == 3:
        *tensors, bias = tensors
    if len(tensors) != 2 or name == "addbmm":
        return None
    left, right = tensors[::-1] if name == "rmatmul" else tensors
    return None if left.ndim == 0 or right.ndim == 0 else (left, right, bias)


def _of_matrices(left: Tensor, right: Tensor, bias: Tensor | None, *, by_rows: bool) -> Contraction:
    """A product of matrices or vectors, with leading axes that broadcast.

    The sum runs over the rows of the right factor, or with `by_rows` over its columns, as `cdist`
    compares rows.
    """
    depth = max(left.ndim, right.ndim, 2) - 2
    lead = [f"lead{i}" for i in range(depth)]
    row = ["row"] if left.ndim > 1 else []
    column = ["column"] if right.ndim > 1 else []
    return Contraction(
        left,
        right,
        (*lead[depth - max(left.ndim - 2, 0) :], *row, "sum"),
        (
            *lead[depth - max(right.ndim - 2, 0) :],
            *((*column, "sum") if by_rows else ("sum", *column)),
        ),
        (*lead, *row, *column),
        bias,
    )


def _dot(left: Tensor, right: Tensor, axis: int) -> Contraction:
    """The dot products of two tensors along an axis."""
    terms = elementwise(left, right)
    summed = terms.out_labels[axis]
    return replace(terms, out_labels=tuple(n for n in terms.out_labels if n != summed))


def _along_the_last(left: Tensor, right: Tensor, bias: Tensor | None) -> Contraction:
    """`inner`, and `linear` whose weight is data: the last axes of both are summed."""
    rows = tuple(f"row{i}" for i in range(left.ndim - 1))
    columns = tuple(f"column{i}" for i in range(right.ndim - 1))
    return Contraction(left, right, (*rows, "sum"), (*columns, "sum"), (*rows, *columns), bias)


def _tensordot(args: Sequence[object], kwargs: Mapping[str, object]) -> Contraction | None:
    """`tensordot`, whose summed axes are given by their number or as two lists."""
    left, right = (*args, *(kwargs[key] for key in ("a", "b") if key in kwargs))[:2]
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    dims = args[2] if len(args) > 2 else kwargs.get("dims", 2)
    pairs = _summed_pairs(dims, left.ndim, right.ndim)
    if pairs is None:
        return None
    labels = [f"left{i}" for i in range(left.ndim)], [f"right{i}" for i in range(right.ndim)]
    for number, (i, j) in enumerate(pairs):
        labels[0][i] = labels[1][j] = f"sum{number}"
    out = [label for label in (*labels[0], *labels[1]) if not label.startswith("sum")]
    return Contraction(left, right, tuple(labels[0]), tuple(labels[1]), tuple(out))


def _summed_pairs(dims: object, left: int, right: int) -> list[tuple[int, int]] | None:
    """The axes that `tensordot` sums, of factors with `left` and `right` axes."""
    if isinstance(dims, int):
        return [(left - dims + i, i) for i in range(dims)]
    if isinstance(dims, (list, tuple)) and len(dims) == 2:
        one, other = ([d] if isinstance(d, int) else list(d) for d in dims)
        return [(i % left, j % right) for i, j in zip(one, other, strict=True)]
    return None


def _einsum(args: Sequence[object], kwargs: Mapping[str, object]) -> Contraction | None:
    """`einsum` of two operands."""
    given = _equation_and_operands(args, kwargs)
    if given is None:
        return None
    equation, left, right = given
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    first, second = inputs.split(",")
    if not arrow:
        result = _implied_result(first, second)
    hidden = [  # axes behind the dots of each operand
        tensor.ndim - len(term.replace("...", ""))
        for tensor, term in ((left, first), (right, second))
    ]
    most = max(
        (n for n, term in zip(hidden, (first, second), strict=True) if "..." in term), default=0
    )

    def labels(term: str, depth: int) -> tuple[Label, ...]:
        before, dots, after = term.partition("...")
        middle = [f"dots{i}" for i in range(most - depth, most)] if dots else []
        return (*before, *middle, *after)

    return Contraction(
        left, right, labels(first, hidden[0]), labels(second, hidden[1]), labels(result, most)
    )


def _equation_and_operands(
    args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[str, Tensor, Tensor] | None:
    """The arguments of `einsum`; `None` if it has not two operands, or no equation in letters."""
    equation = kwargs.get("equation", args[0] if args else None)
    operands: list[object] = list(args[1:]) if "equation" not in kwargs else list(args)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    left, right = operands
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    return equation, left, right


def _implied_result(first: str, second: str) -> str:
    """The result of an einsum without an arrow: letters that occur once, in alphabetical order."""
    letters = first.replace("...", "") + second.replace("...", "")
    once = sorted(c for c in set(letters) if letters.count(c) == 1)
    return "..." * ("..." in first + second) + "".join(once)


def relabel(
    ids: Tensor, labels: Sequence[str], out_labels: Sequence[str], shape: torch.Size
) -> Tensor | None:
    """The token ids of a factor, carried to the product; `None` if a summed axis mixes tokens."""
    kept = []
    for axis, label in enumerate(labels):
        if label in out_labels:
            kept.append(label)
            continue
        if varies(ids, axis):
            return None
        ids = first_along(ids, axis)
    ids = ids.reshape([n for n, label in zip(ids.shape, labels, strict=True) if label in kept])
    ranked = sorted(range(len(kept)), key=lambda i: out_labels.index(kept[i]))
    ids = ids.permute(ranked)
    for position, label in enumerate(out_labels):
        if label not in kept:
            ids = ids.unsqueeze(position)
    return ids.expand(shape)
