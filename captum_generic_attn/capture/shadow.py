"""Shadows: what the capture knows of a tensor of the forward pass.

The capture is an abstract interpretation: beside every tensor runs its shadow, and every operation
has a transfer that says what becomes of shadows (`transfer`). Shadows live in a dictionary keyed
by the tensor object, never on the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple
from weakref import ReferenceType, ref

from torch import Tensor


class Role(IntEnum):
    """What a tensor is; when an element-wise operation meets several, the highest one stays."""

    NOTHING = 0
    PARAMETER = 1  # a parameter or buffer, perhaps reshaped
    RAW = 2  # elements of an input, before the model made tokens of them
    TOKENS = 3
    LOGITS = 4  # products of queries and keys
    PROBABILITIES = 5  # what a softmax made of them


@dataclass(eq=False)
class Softmax:
    """One softmax of the forward pass, and whether its result met values.

    `over_tokens` says whether it runs over tokens; `of_tokens` whether, without logits, each token
    has its own.
    """

    module: str
    module_type: str
    has_logits: bool
    over_tokens: bool
    of_tokens: bool = False
    products: int = 0

    @property
    def in_attention_module(self) -> bool:
        """Whether the name of the module's class says that it is attention."""
        return re.search("attn|attention", self.module_type, re.IGNORECASE) is not None


class Shadow(NamedTuple):
    """Ancestors, tokens and role of one tensor.

    `ancestors` are the attention calls that the tensor depends on without another attention call
    in between. `planes` are integer tensors of the tensor's own shape: one plane of token ids, or,
    for logits and probabilities, the ids of the first and of the second factor. Empty planes mean
    that tokens were lost, at the operation `lost`.
    """

    role: Role = Role.NOTHING
    planes: tuple[Tensor, ...] = ()
    ancestors: frozenset[int] = frozenset()
    factors: tuple[frozenset[int], ...] = ()  # of logits: the ancestors of either factor
    data: bool = False  # whether any of it comes from an input
    softmax: Softmax | None = None
    mixed: bool = False  # logits whose product summed over tokens (channel attention)
    lost: str = ""

    def map(self, change: Callable[[Tensor], Tensor]) -> Shadow:
        """The same shadow with every plane changed."""
        return self._replace(planes=tuple(map(change, self.planes)))

    def without_tokens(self, operation: str) -> Shadow:
        """What is left when an operation mixes tokens or is not known: the ancestors."""
        return Shadow(
            Role.NOTHING if self.role < Role.TOKENS else Role.TOKENS,
            ancestors=self.ancestors,
            data=self.data,
            lost=self.lost or operation,
        )


NO_SHADOW = Shadow()


class Shadows:
    """The shadows of the living tensors of one forward pass.

    Keyed by the tensor object, never on the tensor; an entry counts as long as its tensor lives.
    """

    def __init__(self) -> None:
        self._shadows: dict[int, tuple[ReferenceType[Tensor], Shadow]] = {}

    def get(self, tensor: Tensor) -> Shadow | None:
        """The shadow of a tensor, if it has one."""
        known = self._shadows.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def __getitem__(self, tensor: Tensor) -> Shadow:
        return self.get(tensor) or NO_SHADOW

    def __setitem__(self, tensor: Tensor, shadow: Shadow) -> None:
        self._shadows[id(tensor)] = ref(tensor), shadow

    def __contains__(self, tensor: Tensor) -> bool:
        return self.get(tensor) is not None
