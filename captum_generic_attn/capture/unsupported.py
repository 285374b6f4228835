"""Attention calls that cannot be explained: where they are, what was seen and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from captum_generic_attn.capture.tracking.abstract_value import AbstractValue, Softmax


class Reason(NamedTuple):
    """Why a call cannot be explained: what was seen, and what the user can do."""

    seen: str
    advice: str


@dataclass(frozen=True)
class UnsupportedCall:
    """An attention call that cannot be explained.

    `index` counts the calls of the forward pass, with those that are explained. A call is
    `harmless` if it reads tokens of no input, so that maps are right without it.
    """

    index: int
    module: str
    module_type: str
    seen: str
    advice: str
    harmless: bool = False

    def __str__(self) -> str:
        where = f"{self.module or 'the forward function'} ({self.module_type})"
        return f"{where}: {self.seen}; {self.advice}"


class UnsupportedCallError(Exception):
    """An attention call cannot be explained. The recorder makes a `UnsupportedCall` of it."""

    def __init__(self, seen: str, advice: str) -> None:
        super().__init__(seen)
        self.reason = Reason(seen, advice)


_LEAVE_OUT = "leave the module out with layers=, or pass strict=False to skip such calls"
_KEEP_APART = "write that step with operations that keep tokens apart, or leave it out with layers="

CHANNELS = Reason("attention between channels, not between tokens", _LEAVE_OUT)
"""The product of queries and keys sums over tokens."""
OTHER_VALUES = Reason(
    "keys and values at one place are tokens of different inputs or positions",
    "make both of the same tokens, since relevance belongs to one, or leave it out with layers=",
)
"""A value is of another token than its key."""
NO_SOFTMAX = Reason(
    "queries, keys and values are multiplied without a softmax (linear or sigmoid attention)",
    "the method needs attention probabilities",
)
"""Logits are multiplied with values."""
NO_QUERIES_AND_KEYS = Reason(
    "a softmax that no product of queries and keys feeds meets values",
    "the method needs probabilities of queries over keys",
)
"""A softmax over other things than tokens is multiplied with values."""
PROBABILITIES_TWICE = Reason(
    "attention probabilities are multiplied with each other (Nyström attention)",
    "relevance is not defined for such a product",
)
"""Both factors are probabilities."""
SPLIT_PRODUCT = Reason(
    "the same probabilities enter more than one product",
    "relevance is not defined where attention is split over products (Longformer, LED)",
)
"""A second product takes the probabilities of a first one."""
BROADCAST_QUERY = Reason(
    "the query of its weights could not be told: a token was broadcast over the keys",
    "rewrite the logits as a product of queries and keys",
)
"""Weights of pooled tokens depend on one more token, which no axis of queries shows."""
LEARNED_WEIGHTS = Reason(
    "learned weights over positions: its queries have no tokens",
    _LEAVE_OUT,
)
"""Weights are parameters, and several rows of them take several sums."""
SHARED_TOKENS = Reason(
    "attention between tokens of an argument that all examples share",
    "give every example its own if its tokens are to be explained",
)
"""No token of the call belongs to an example."""
NO_GRADIENTS = Reason(
    "gradients are switched off here (reentrant checkpoint, custom autograd.Function or "
    "inference_mode inside the model)",
    "use torch.utils.checkpoint with use_reentrant=False, or torch.no_grad",
)
"""Autograd records nothing where the call is made."""


def unknown_layout(abstract: AbstractValue) -> Reason:
    """The axes of weights cannot be sorted into queries and keys."""
    return Reason(
        f"queries and keys could not be told apart ({abstract.lost_at or 'unknown layout'})",
        "rewrite the attention with F.scaled_dot_product_attention",
    )


def weights_lost(abstract: AbstractValue) -> Reason:
    """A softmax of what has lost its tokens weighs tokens."""
    reason = abstract.lost_at or "an operation that is not known"
    seen = f"the tokens of its weights could not be followed through {reason}"
    return Reason(seen, _KEEP_APART)


def values_lost(abstract: AbstractValue) -> Reason:
    """The tokens of values were lost."""
    reason = (
        "pairs of tokens"
        if abstract.pairs
        else abstract.lost_at or "an operation that is not known"
    )
    seen = f"the tokens of its values could not be followed through {reason}"
    return Reason(seen, _KEEP_APART)


def many_factors(name: str) -> Reason:
    """Probabilities enter a product of one tensor, or of three and more."""
    return Reason(
        f"attention probabilities enter {name} with other than one other tensor",
        "write the product with values as a matmul or an einsum of two tensors",
    )


def foreign_kernel(name: str) -> Reason:
    """A fused kernel computes the call, and no entry of the table of kernels knows it."""
    return Reason(
        f"the kernel {name} keeps its probabilities to itself",
        'use the "sdpa" or "eager" implementation of attention',
    )


def unused_softmax(softmax: Softmax) -> Reason | None:
    """A softmax over tokens whose probabilities never entered a product; `None` for others."""
    if softmax.has_logits or (softmax.in_attention_module and softmax.over_tokens):
        seen = "a softmax over tokens never meets values in a product"
    elif softmax.gates:
        seen = "a softmax over tokens weighs them, and their sum is not taken next"
    elif softmax.in_attention_module and softmax.of_tokens:
        seen = (
            "each token's softmax weighs values that are no product with it (deformable attention)"
        )
    else:
        return None
    return Reason(seen, "the method needs probabilities that multiply values")
