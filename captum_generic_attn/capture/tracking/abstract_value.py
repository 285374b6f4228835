"""The abstract value of a tensor: which token each element is of, its role, its attention calls.

The capture is an abstract interpretation. Each tensor of the forward pass has an abstract value
(`AbstractValue`), and each operation a transfer function from those of its operands to its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_generic_attn.capture.tracking.contraction import Contraction


class Role(Enum):
    """What the elements of a tensor are. A mixture of several has the role of the highest rank."""

    NOTHING = 0  # constants, and what is not followed
    PARAMETER = 1  # a parameter or buffer, perhaps reshaped
    STATISTIC = 2  # a number for each line of elements of an input, such as their mean
    RAW = 3  # elements of an input, before the model made tokens of them
    TOKENS = 4  # features of tokens
    LOGITS = 5  # a number for each pair of tokens, such as products of queries and keys
    PROBABILITIES = 6  # what a softmax made of logits

    @property
    def rank(self) -> int:
        """The place in the order in which roles win in a mixture."""
        found: int = self.value
        return found

    @property
    def is_weight(self) -> bool:
        """Whether nothing was computed from tokens or inputs: a parameter, or a constant."""
        return self is Role.NOTHING or self is Role.PARAMETER

    @property
    def is_pairs(self) -> bool:
        """Whether each element is of two tokens."""
        return self is Role.LOGITS or self is Role.PROBABILITIES

    @property
    def of_tokens(self) -> bool:
        """Whether each element is of one token or of two."""
        return self is Role.TOKENS or self.is_pairs


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


class AbstractValue(NamedTuple):
    """Role, token ids and ancestors of one tensor.

    `token_ids` are integer tensors of the tensor's own shape: one, or two for logits and
    probabilities, the ids of the first and of the second factor. No token ids: the tokens were lost
    at the operation `lost_at`. `ancestors` are the attention calls that the tensor depends on with
    no other attention call in between.

    `moved_by` is the last operation that gave tokens another layout. A message names it where
    tokens are lost because of that layout. `calls` says of each element which attention call it
    came from, until a weight mixes features.
    """

    role: Role = Role.NOTHING
    token_ids: tuple[Tensor, ...] = ()
    ancestors: frozenset[int] = frozenset()
    factors: tuple[frozenset[int], ...] = ()  # of logits: the ancestors of each factor
    data: bool = False  # whether it depends on an input
    softmax: Softmax | None = None
    mixed: bool = False  # logits whose product summed over tokens (channel attention)
    lost_at: str = ""
    moved_by: str = ""
    calls: Tensor | None = None
    guided: bool = False  # whether one other token was added to all of these, as a query is
    weighing: Contraction | None = None  # weights times tokens, whose sum would be attention

    @property
    def pairs(self) -> bool:
        """Whether each element is of two tokens."""
        return self.role.is_pairs

    def map(self, change: Callable[[Tensor], Tensor]) -> AbstractValue:
        """The same value with all token ids changed."""
        return self._replace(token_ids=tuple(map(change, self.token_ids)))

    def without_tokens(self, operation: str) -> AbstractValue:
        """What is left when an operation mixes tokens or is not known: tokens are lost there."""
        return AbstractValue(
            Role.TOKENS if self.role.of_tokens else Role.NOTHING,
            ancestors=self.ancestors,
            data=self.data,
            lost_at=self.lost_at or operation,
        )

    def irregular(self, operation: str) -> AbstractValue:
        """What is left when `operation` cannot make tokens of the layout that it gets."""
        at = f"{self.moved_by} before {operation}" if self.moved_by else operation
        return self.without_tokens(at)


CONSTANT = AbstractValue()
"""The value of a constant."""


def ancestors_of(abstract_values: Iterable[AbstractValue]) -> frozenset[int]:
    """The attention calls that some of these depend on."""
    return frozenset[int]().union(*(abstract.ancestors for abstract in abstract_values))


def leading(abstract_values: Iterable[AbstractValue]) -> AbstractValue:
    """Whose tokens a result has that holds elements of several: of data, then of highest rank."""
    return max(abstract_values, key=lambda abstract: (abstract.data, abstract.role.rank))


class Origin(NamedTuple):
    """The place of a tensor in autograd's graph, and its abstract value there."""

    edge: GradientEdge
    shape: torch.Size
    abstract: AbstractValue


class AbstractValues:
    """The abstract values of the tensors of one forward pass.

    They are kept in a dictionary by tensor object, never on the tensor. An entry counts as long as
    its tensor lives. Values that autograd recorded are also kept by their place in the graph, the
    sequence number of the node, so that they are found when the tensor is gone.
    """

    def __init__(self) -> None:
        self._abstract_values: dict[int, tuple[ReferenceType[Tensor], AbstractValue]] = {}
        self._recorded: dict[tuple[int, int], tuple[torch.Size, AbstractValue]] = {}
        self._unrecorded: set[int] = set()

    def get(self, tensor: Tensor) -> AbstractValue | None:
        """The value of a tensor, if it has one."""
        known = self._abstract_values.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return None
        if self._unrecorded and id(tensor) in self._unrecorded and tensor.grad_fn is not None:
            return None  # it left an `autograd.Function`, whose inside is not all that it did
        return known[1]

    def inside(self, tensor: Tensor) -> AbstractValue:
        """The value that a tensor had inside the `autograd.Function` that returned it."""
        known = self._abstract_values.get(id(tensor))
        return CONSTANT if known is None or known[0]() is not tensor else known[1]

    def __getitem__(self, tensor: Tensor) -> AbstractValue:
        return self.get(tensor) or CONSTANT

    def __setitem__(self, tensor: Tensor, abstract: AbstractValue) -> None:
        self._abstract_values[id(tensor)] = ref(tensor), abstract
        node = tensor.grad_fn
        if node is not None:
            self._recorded[node._sequence_nr(), tensor.output_nr] = tensor.shape, abstract  # noqa: SLF001
            self._unrecorded.discard(id(tensor))
        elif not torch.is_grad_enabled():
            self._unrecorded.add(id(tensor))

    def __contains__(self, tensor: Tensor) -> bool:
        return self.get(tensor) is not None

    def origins(
        self, tensor: Tensor, fits: Callable[[AbstractValue], bool] = lambda _: True
    ) -> list[Origin]:
        """The nearest tensors above in the graph whose values fit."""
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
