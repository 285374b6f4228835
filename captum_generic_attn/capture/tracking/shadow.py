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

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_generic_attn.capture.tracking.contraction import Contraction


class Role(IntEnum):
    """What a tensor is; when an element-wise operation meets several, the highest one stays."""

    NOTHING = 0
    PARAMETER = 1  # a parameter or buffer, perhaps reshaped
    STATISTIC = 2  # a number for each line of elements of an input, such as their mean
    RAW = 3  # elements of an input, before the model made tokens of them
    TOKENS = 4
    LOGITS = 5  # what is made of pairs of tokens, such as products of queries and keys
    PROBABILITIES = 6  # what a softmax made of them


@dataclass(eq=False)
class Softmax:
    """One softmax of the forward pass, and whether its result met values.

    `over_tokens` says whether it runs over tokens; `of_tokens` whether, without logits, each token
    has its own; `gates` whether its result multiplied tokens element by element.
    """

    module: str
    module_type: str
    has_logits: bool
    over_tokens: bool
    of_tokens: bool = False
    products: int = 0
    gates: bool = False

    @property
    def in_attention_module(self) -> bool:
        """Whether the name of the module's class says that it is attention."""
        return re.search("attn|attention", self.module_type, re.IGNORECASE) is not None


class Shadow(NamedTuple):
    """Ancestors, tokens and role of one tensor.

    `ancestors` are the attention calls that the tensor depends on without another attention call
    in between. `planes` are integer tensors of the tensor's own shape: one plane of token ids, or,
    for logits and probabilities, the ids of the first and of the second factor. Empty planes mean
    that tokens were lost, at the operation `lost`; `moved_by` is the last operation that laid them
    out anew, which is named where tokens are lost for the layout that it left.

    `calls` says of each element which attention call it came from, until a weight mixes features.
    """

    role: Role = Role.NOTHING
    planes: tuple[Tensor, ...] = ()
    ancestors: frozenset[int] = frozenset()
    factors: tuple[frozenset[int], ...] = ()  # of logits: the ancestors of either factor
    data: bool = False  # whether any of it comes from an input
    softmax: Softmax | None = None
    mixed: bool = False  # logits whose product summed over tokens (channel attention)
    lost: str = ""
    moved_by: str = ""
    calls: Tensor | None = None
    guided: bool = False  # whether a token of its own joined all of these, as a query would
    weighing: Contraction | None = None  # weights times tokens, of which a sum would be attention

    @property
    def pairs(self) -> bool:
        """Whether each element is of two tokens."""
        return self.role >= Role.LOGITS

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

    def irregular(self, operation: str) -> Shadow:
        """What is left when `operation` cannot make tokens of the layout that it finds."""
        at = f"{self.moved_by} before {operation}" if self.moved_by else operation
        return self.without_tokens(at)


NO_SHADOW = Shadow()


class Origin(NamedTuple):
    """Where the graph holds a tensor of the forward pass, and what was known of it there."""

    edge: GradientEdge
    shape: torch.Size
    shadow: Shadow


class Shadows:
    """The shadows of the living tensors of one forward pass.

    Keyed by the tensor object, never on the tensor; an entry counts as long as its tensor lives.
    What autograd recorded is known by its place in the graph too, also when its tensor is gone:
    by the number that autograd gave the node, which holds nothing alive.
    """

    def __init__(self) -> None:
        self._shadows: dict[int, tuple[ReferenceType[Tensor], Shadow]] = {}
        self._recorded: dict[tuple[int, int], tuple[torch.Size, Shadow]] = {}
        self._unrecorded: set[int] = set()

    def get(self, tensor: Tensor) -> Shadow | None:
        """The shadow of a tensor, if it has one."""
        known = self._shadows.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return None
        if self._unrecorded and id(tensor) in self._unrecorded and tensor.grad_fn is not None:
            return None  # it left an `autograd.Function`, whose inside is not all that it did
        return known[1]

    def inside(self, tensor: Tensor) -> Shadow:
        """What was known of a tensor before it left an `autograd.Function`."""
        known = self._shadows.get(id(tensor))
        return NO_SHADOW if known is None or known[0]() is not tensor else known[1]

    def __getitem__(self, tensor: Tensor) -> Shadow:
        return self.get(tensor) or NO_SHADOW

    def __setitem__(self, tensor: Tensor, shadow: Shadow) -> None:
        self._shadows[id(tensor)] = ref(tensor), shadow
        node = tensor.grad_fn
        if node is not None:
            self._recorded[node._sequence_nr(), tensor.output_nr] = tensor.shape, shadow  # noqa: SLF001
            self._unrecorded.discard(id(tensor))
        elif not torch.is_grad_enabled():
            self._unrecorded.add(id(tensor))

    def __contains__(self, tensor: Tensor) -> bool:
        return self.get(tensor) is not None

    def origins(
        self, tensor: Tensor, fits: Callable[[Shadow], bool] = lambda _: True
    ) -> list[Origin]:
        """The nearest tensors with shadows that fit which the graph of a tensor leads to."""
        found: list[Origin] = []
        seen: set[object] = {tensor.grad_fn}
        waiting = [tensor.grad_fn]
        while waiting:
            node = waiting.pop()
            for below, place in [] if node is None else node.next_functions:
                if below is None or (below, place) in seen:
                    continue
                seen.add((below, place))
                known = self._recorded.get((below._sequence_nr(), place))  # noqa: SLF001
                if known is not None and fits(known[1]):
                    found.append(Origin(GradientEdge(below, place), *known))
                elif below not in seen:
                    seen.add(below)
                    waiting.append(below)
        return found
