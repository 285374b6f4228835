"""The state of one forward pass that transfer functions read and write.

It holds the abstract value of each tensor, the register of tokens, and what was noted about
attention calls on the way.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.weak import WeakIdKeyDictionary

from captum_generic_attn.capture.tracking.abstract_value import (
    CONSTANT,
    AbstractValue,
    AbstractValues,
    Origin,
    Role,
    ancestors_of,
)
from captum_generic_attn.capture.tracking.contraction import Contraction
from captum_generic_attn.capture.tracking.head_calls import Heads
from captum_generic_attn.capture.tracking.probe import Hooks
from captum_generic_attn.capture.tracking.token_creation import rows
from captum_generic_attn.capture.tracking.views import seen_from_base, seen_through_view
from captum_generic_attn.tokens.ids import squeeze_expanded
from captum_generic_attn.tokens.spaces import TokenSpaces


@dataclass(eq=False)
class Pool:
    """A call that pools tokens by weights without a query token: the token spaces of both sides.

    `problem` is what was seen later that makes it no attention.
    """

    queries: frozenset[int]
    keys: frozenset[int]
    problem: tuple[str, str] | None = None


GLOBAL_CONTEXT = (
    "tokens are pooled into one, which is handed back to all of them (global context)",
    "leave the module out with layers=, or pass strict=False to skip such calls",
)
"""What was seen and what to do where a pooled token is added to the tokens that it is of."""
WITHOUT_SOFTMAX = (
    "what a softmax over tokens pooled meets queries without a softmax (factorised attention)",
    "the method needs attention probabilities",
)
"""What was seen and what to do where a pooled token is multiplied with queries."""


class TrackingState(ABC):
    """What is known of the tensors of one forward pass.

    `pools` and `queried` are of attention calls by index: those that pool tokens, and the query
    tokens of each call. `embedded` are looked-up vectors, noted if `notes_embeddings` is set: the
    token ids of the integers, and where the graph begins for the vectors.
    """

    def __init__(self, spaces: TokenSpaces, parameters: Mapping[int, str]) -> None:
        """Start with an empty forward pass; `parameters` are names by the `id` of the tensor."""
        self.spaces = spaces
        self.parameters = parameters
        self.abstract_values = AbstractValues()
        self.heads = Heads()
        self.hooks = Hooks()
        self.pools: dict[int, Pool] = {}
        self.queried: dict[int, Tensor] = {}
        self.notes_embeddings = False
        self.embedded: list[tuple[Tensor, GradientEdge]] = []
        self._written: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @abstractmethod
    def behind(
        self, tensor: Tensor, origins: Sequence[Origin], inside: AbstractValue
    ) -> AbstractValue:
        """The value of a tensor that an unseen function made of the tensors at `origins`.

        `inside` is what the operations inside that function said.
        """

    # -- values of tensors ---------------------------------------------------------------------

    def of(self, tensor: Tensor) -> AbstractValue:
        """The value of a tensor; a parameter gets one when it is first asked for."""
        abstract = self.abstract_values.get(tensor)
        if abstract is not None:
            base = tensor._base if self._written else None  # noqa: SLF001
            if base is not None and base in self._written and base in self.abstract_values:
                # perhaps written to through another view
                return seen_through_view(self.abstract_values[base], base, abstract, tensor)
            return abstract
        if not self.knows(tensor) or tensor.ndim == 0:
            return CONSTANT
        origins = [] if id(tensor) in self.parameters else self.abstract_values.origins(tensor)
        if origins:
            self.abstract_values[tensor] = self.behind(
                tensor, origins, self.abstract_values.inside(tensor)
            )
            return self.abstract_values[tensor]
        name = self.parameters.get(id(tensor), "a parameter")
        token_ids = (self.spaces.of_parameter(name, tensor.shape),)
        self.abstract_values[tensor] = AbstractValue(Role.PARAMETER, token_ids)
        return self.abstract_values[tensor]

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor has a value, or would get one."""
        if tensor in self.abstract_values:
            return True
        return tensor.is_floating_point() and (
            id(tensor) in self.parameters
            or tensor.requires_grad
            or isinstance(tensor, nn.Parameter)
        )

    def tokens_of(self, tensor: Tensor, name: str) -> AbstractValue:
        """The value of a tensor that is about to be read as tokens, its last axis as features."""
        abstract = self.of(tensor)
        if abstract.role is Role.STATISTIC:
            return abstract.without_tokens(name)
        if abstract.role is Role.LOGITS and not abstract.data:  # a product of parameters, no more
            return abstract._replace(role=Role.TOKENS, token_ids=abstract.token_ids[:1])
        if abstract.role is not Role.RAW or not abstract.token_ids or tensor.ndim == 1:
            return abstract
        # What is added to this very tensor later must find the same tokens.
        self.abstract_values[tensor] = rows.of_rows(self.spaces, abstract, tensor.shape, name)
        return self.abstract_values[tensor]

    def weighing(self, tensor: Tensor) -> Contraction | None:
        """The product of weights and tokens that a tensor is, if a sum would make it attention."""
        abstract = self.abstract_values.get(tensor)
        return None if abstract is None else abstract.weighing

    # -- writes in place -----------------------------------------------------------------------

    @property
    def wrote(self) -> bool:
        """Whether an operation wrote into a tensor that is still alive."""
        return bool(self._written)

    def settle(self, tensor: Tensor) -> None:
        """Note the value of a tensor before it is written to: afterwards its graph is another."""
        base = tensor._base  # noqa: SLF001
        unseen = (
            base is not None and base not in self.abstract_values and tensor in self.abstract_values
        )
        if unseen and base is not None and tensor.numel() == base.numel():
            part = self.abstract_values[tensor]  # an operation returned a view of what nobody saw
            self.abstract_values[base] = seen_from_base(
                self.heads, CONSTANT, base, part, tensor, part.lost_at
            )
        for one in (tensor,) if base is None else (tensor, base):
            if self.knows(one):
                self.of(one)
            else:
                self.abstract_values[one] = CONSTANT

    def note_write(self, result: Tensor, name: str) -> None:
        """Note that `result` was written to. What stands in a view stands in its base as well."""
        base = result._base  # noqa: SLF001
        if base is not None and result in self.abstract_values:
            part = self.abstract_values[result]
            self.abstract_values[base] = seen_from_base(
                self.heads, self.of(base), base, part, result, name
            )
        self._written[result if base is None else base] = True

    # -- attention calls -----------------------------------------------------------------------

    def replaced(self, abstract_values: Sequence[AbstractValue]) -> bool:
        """Whether a call that some of these depend on had tokens of the others as queries.

        Without a residual path, the result of a call takes the place of the tokens' state before.
        A sequence of which some tokens were replaced and others were not has no one state.
        """
        together = ancestors_of(abstract_values)
        for abstract in abstract_values:
            missing = together - abstract.ancestors
            if not missing or not abstract.data or len(abstract.token_ids) != 1:
                continue
            mine = self.spaces.cache.of(
                (abstract.token_ids[0],),
                "tokens",
                functools.partial(_tokens_in, abstract.token_ids[0]),
            )
            if any(
                i in self.queried and bool(torch.isin(mine, self.queried[i]).any()) for i in missing
            ):
                return True
        return False

    def note_global_context(self, term: AbstractValue, main: AbstractValue, ids: Tensor) -> None:
        """Note calls whose pooled token is added to all tokens that it was pooled from."""
        if not self.pools:
            return
        for call in term.ancestors - main.ancestors:
            pool = self.pools.get(call)
            if pool and pool.keys & set(self.spaces.indices(ids)):
                pool.problem = GLOBAL_CONTEXT


def _tokens_in(ids: Tensor) -> Tensor:
    """The tokens in ids, each once."""
    found: Tensor = torch.unique(squeeze_expanded(ids))
    return found[found >= 0]
