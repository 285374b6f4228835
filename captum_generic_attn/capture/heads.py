"""Groups the leading axes of an attention call into examples (or windows) and heads.

Attention comes as `[B, H, N, N]`, `[B * H, N, N]`, `[B * windows, H, N, N]` and more. Which maps
belong together is read off the tokens: heads of one group read the same tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.tokens.ids import compact
from captum_generic_attn.tokens.space import FOREIGN, STALE
from captum_generic_attn.tokens.spaces import TokenSpaces


class Unreadable(Exception):  # noqa: N818 - it becomes a Refusal, never reaches the user
    """An attention call cannot be explained: what was seen, what to do."""

    def __init__(self, seen: str, advice: str) -> None:
        super().__init__(seen)
        self.seen = seen
        self.advice = advice


class Groups(NamedTuple):
    """`[G, Nq]`, `[G, Nk]` tokens, `[G]` examples, `[G, H]` places among the leading axes.

    The call is `plain` if these places are all, in order, and `padded` if some query is no token.
    """

    query_tokens: Tensor
    key_tokens: Tensor
    examples: Tensor
    pick: Tensor
    plain: bool
    padded: bool


def group_heads(queries: Tensor, keys: Tensor, spaces: TokenSpaces, examples: int) -> Groups:
    """Group the maps of one call.

    Args:
        queries: `[*lead, Nq]` token ids.
        keys: `[*lead, Nk]` token ids.
        spaces: the register of tokens.
        examples: the batch size.

    Raises:
        Unreadable: if a map reads tokens of several examples, or from outside the forward pass.
    """
    lead = queries.shape[:-1]
    places = torch.arange(queries[..., 0].numel()).view(lead)
    shared = [
        axis for axis in range(len(lead))
        if lead[axis] == 1 or queries.stride(axis) == keys.stride(axis) == 0
    ]  # fmt: skip
    apart = [axis for axis in range(len(lead)) if axis not in shared]
    places = places.permute((*apart, *shared)).reshape(-1, math.prod(lead[axis] for axis in shared))
    for axis in shared:
        queries, keys = queries.narrow(axis, 0, 1), keys.narrow(axis, 0, 1)
    queries, keys = queries.reshape(len(places), -1), keys.reshape(len(places), -1)
    if bool((queries == STALE).any()) or bool((keys == STALE).any()):
        raise Unreadable(
            "padding that went through attention before is attended to again",
            "pad with a parameter or an embedding, whose tokens can be followed",
        )
    if _repeats(queries):
        raise Unreadable(
            "one token stands in several places of the sequence",
            "relevance is not defined for copies of a token; these are rows of a table that no "
            "input chose: pass their ids as an input or among additional_forward_args"
            if spaces.fixed(queries)
            else "relevance is not defined for copies of a token: give each place a token of its "
            "own, or leave the call out with layers=",
        )
    if bool((keys == FOREIGN).any()) or bool((queries == FOREIGN).any()):
        raise Unreadable(
            "tokens come from a tensor that no input feeds (a filled key-value cache?)",
            "pass the whole sequence as input, without past_key_values",
        )
    owners = _owners(queries, keys, spaces)
    if bool((owners < 0).all()) and examples > 1:  # parameters alone: by place in the batch
        if places.numel() % examples:
            raise Unreadable(
                "attention between parameters that all examples share",
                "leave the call out with layers=, or explain one example at a time",
            )
        if len(places) == 1:
            places = places.view(-1).reshape(examples, -1)
            queries, keys = queries.expand(examples, -1), keys.expand(examples, -1)
        owners = torch.arange(len(places)) // (len(places) // examples)
    owners = owners.clamp(min=0)
    seen = len(set(owners.tolist()))
    if seen < examples:
        raise Unreadable(
            f"it reads tokens of {seen} of the {examples} examples",
            "give every example its own tokens",
        )
    rows = torch.cat([owners[:, None], queries.long(), keys.long()], 1)
    groups, member = torch.unique(rows, dim=0, return_inverse=True)
    if len(rows) % len(groups) or bool((member.bincount() != len(rows) // len(groups)).any()):
        raise Unreadable(
            "heads of one example read different tokens",
            "relevance averages heads, so each must see the same tokens",
        )
    order = torch.argsort(member, stable=True).view(len(groups), -1)
    first = order[:, 0]
    queries, keys, owners = queries[first], keys[first], owners[first]
    if _in_several(queries, owners):
        raise Unreadable(
            "one token asks in several sequences of an example",
            "pass each sequence as an example of its own"
            + (
                "; these are texts that forward_func holds fixed: leave them out with layers="
                if spaces.fixed(queries)
                else ", or leave the call out with layers="
            ),
        )
    pick = places[order].reshape(len(groups), -1)
    plain = torch.equal(pick.flatten(), torch.arange(math.prod(lead)))
    return Groups(queries, keys, owners, pick, plain, bool((queries < 0).any()))


def _repeats(rows: Tensor) -> bool:
    """Whether a row holds an id twice."""
    ranked = rows.sort(-1).values
    return bool(((ranked.diff(dim=-1) == 0) & (ranked[:, 1:] >= 0)).any())


def _in_several(queries: Tensor, owners: Tensor) -> bool:
    """Whether a token is a query of more than one group (a class token of all frames)."""
    asked = queries.long() + owners[:, None] * (queries.max().long() + 1)
    asked = asked[queries >= 0]
    return len(torch.unique(asked)) < len(asked)


def _owners(queries: Tensor, keys: Tensor, spaces: TokenSpaces) -> Tensor:
    """The example of each row, -1 for tokens that all examples share."""
    tokens = compact(torch.cat([queries, keys], 1))
    _, example, _ = spaces.locate(tokens)
    most = example.amax(1)
    if bool(((example >= 0) & (example != most[:, None])).any()):
        raise Unreadable(
            "attention between tokens of different examples",
            "tokens go along the last axis but one: nn.MultiheadAttention and nn.Transformer take "
            "[B, N, D] with batch_first=True alone. If the model means it, explain one example at "
            "a time",
        )
    return most.expand(len(queries))
