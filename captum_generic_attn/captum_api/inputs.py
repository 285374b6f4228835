"""What Captum's methods take and return: types for annotations, and one tensor or a tuple of them.

Captum keeps these names in private modules; the rest of the package imports them from here.
"""

from __future__ import annotations

from collections.abc import Sequence

from captum._utils.common import _format_output, _is_tuple
from captum._utils.typing import TargetType, TensorOrTupleOfTensorsGeneric
from torch import Tensor

__all__ = ["TargetType", "TensorOrTupleOfTensorsGeneric", "shaped_like"]


def shaped_like(
    inputs: TensorOrTupleOfTensorsGeneric, results: Sequence[Tensor]
) -> TensorOrTupleOfTensorsGeneric:
    """The results as a tuple if the inputs are one, else the only result itself.

    Args:
        inputs: what a method was given, a tensor or a tuple of tensors.
        results: one for each input.

    Example:
        >>> import torch
        >>> one = torch.zeros(1)
        >>> shaped_like(one, [one]) is one, shaped_like((one,), [one]) == (one,)
        (True, True)
    """
    formatted: TensorOrTupleOfTensorsGeneric = _format_output(_is_tuple(inputs), tuple(results))
    return formatted
