"""Sorts the leading axes of an attention call into examples (or windows) and heads.

Models lay attention out as `[B, H, Nq, Nk]`, `[B * H, Nq, Nk]`, `[B * windows, H, Nq, Nk]` and
more. The tokens tell which maps belong together: the heads of one example read the same tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.capture.unsupported import UnsupportedCallError
from captum_generic_attn.tokens.ids import repeats, squeeze_expanded
from captum_generic_attn.tokens.space import EXTERNAL, OVERWRITTEN
from captum_generic_attn.tokens.spaces import TokenSpaces


class Groups(NamedTuple):
    """The maps of one call in groups; a group is an example of the batch, or a window of one.

    Attributes:
        query_tokens: `[G, Nq]` token ids.
        key_tokens: `[G, Nk]` token ids.
        examples: `[G]` the example of each group.
        head_index: `[G, H]` the heads of each group, as places among the flattened leading axes.
        in_order: whether `head_index` takes all places in order.
        has_padding_queries: whether some query is no token.
    """

    query_tokens: Tensor
    key_tokens: Tensor
    examples: Tensor
    head_index: Tensor
    in_order: bool
    has_padding_queries: bool


class _Rows(NamedTuple):
    """Maps that surely read the same tokens, in one row.

    `places` `[R, n]` among the flattened leading axes; `queries` `[R, Nq]` and `keys` `[R, Nk]`.
    """

    places: Tensor
    queries: Tensor
    keys: Tensor


def group_heads(queries: Tensor, keys: Tensor, spaces: TokenSpaces, examples: int) -> Groups:
    """Group the maps of one call.

    Args:
        queries: `[*lead, Nq]` token ids.
        keys: `[*lead, Nk]` token ids.
        spaces: the register of tokens.
        examples: the batch size.

    Raises:
        UnsupportedCallError: if a map reads tokens of several examples, or from outside the
            forward pass.
    """
    maps = math.prod(queries.shape[:-1])
    rows = _fold_shared_axes(queries, keys)
    _check_tokens(rows, spaces)
    owners = _owners(rows, spaces)
    if examples > 1 and bool((owners < 0).all()):
        rows, owners = _by_place(rows, examples)
    owners = owners.clamp(min=0)
    seen = len(set(owners.tolist()))
    if seen < examples:
        raise UnsupportedCallError(
            f"it reads tokens of {seen} of the {examples} examples",
            "give every example its own tokens",
        )
    order = _alike(torch.cat([owners[:, None], rows.queries.long(), rows.keys.long()], 1))
    first = order[:, 0]
    queries, keys, owners = rows.queries[first], rows.keys[first], owners[first]
    _check_queries_once(queries, owners, spaces)
    head_index = rows.places[order].reshape(len(order), -1)
    in_order = torch.equal(head_index.flatten(), torch.arange(maps))
    return Groups(queries, keys, owners, head_index, in_order, bool((queries < 0).any()))


def _fold_shared_axes(queries: Tensor, keys: Tensor) -> _Rows:
    """Join the maps along axes on which the ids do not depend, as heads mostly are."""
    lead = queries.shape[:-1]
    places = torch.arange(math.prod(lead)).view(lead)
    shared = [i for i in range(len(lead)) if repeats(queries, i) and repeats(keys, i)]
    apart = [axis for axis in range(len(lead)) if axis not in shared]
    places = places.permute((*apart, *shared)).reshape(-1, math.prod(lead[axis] for axis in shared))
    for axis in shared:
        queries, keys = queries.narrow(axis, 0, 1), keys.narrow(axis, 0, 1)
    return _Rows(places, queries.reshape(len(places), -1), keys.reshape(len(places), -1))


def _check_tokens(rows: _Rows, spaces: TokenSpaces) -> None:
    """See that each query is one token, and that all tokens are known."""
    both = rows.queries, rows.keys
    if any(bool((ids == OVERWRITTEN).any()) for ids in both):
        raise UnsupportedCallError(
            "padding that went through attention before is attended to again",
            "pad with a parameter or an embedding, whose tokens can be followed",
        )
    if _repeats(rows.queries):
        raise UnsupportedCallError(
            "one token stands in several places of the sequence",
            "relevance is not defined for copies of a token; these are rows of a table that no "
            "input chose: pass their ids as an input or among additional_forward_args"
            if spaces.fixed(rows.queries)
            else "relevance is not defined for copies of a token: give each place a token of its "
            "own, or leave the call out with layers=",
        )
    if any(bool((ids == EXTERNAL).any()) for ids in both):
        raise UnsupportedCallError(
            "tokens come from a tensor that no input feeds (a filled key-value cache?)",
            "pass the whole sequence as input, without past_key_values",
        )


def _repeats(rows: Tensor) -> bool:
    """Whether a row holds an id twice."""
    ranked = rows.sort(-1).values
    return bool(((ranked.diff(dim=-1) == 0) & (ranked[:, 1:] >= 0)).any())


def _owners(rows: _Rows, spaces: TokenSpaces) -> Tensor:
    """The example of each row, `[R]`; -1 for tokens that all examples share."""
    tokens = squeeze_expanded(torch.cat([rows.queries, rows.keys], 1))
    _, example, _ = spaces.locate(tokens)
    most = example.amax(1)
    if bool(((example >= 0) & (example != most[:, None])).any()):
        raise UnsupportedCallError(
            "attention between tokens of different examples",
            "tokens go along the last axis but one: nn.MultiheadAttention and nn.Transformer take "
            "[B, N, D] with batch_first=True alone. If the model means it, explain one example at "
            "a time",
        )
    return most.expand(len(rows.queries))


def _by_place(rows: _Rows, examples: int) -> tuple[_Rows, Tensor]:
    """Rows of parameters alone, which all examples share: the batch comes first among the axes."""
    places, queries, keys = rows
    if places.numel() % examples:
        raise UnsupportedCallError(
            "attention between parameters that all examples share",
            "leave the call out with layers=, or explain one example at a time",
        )
    if len(places) == 1:
        places = places.view(-1).reshape(examples, -1)
        queries, keys = queries.expand(examples, -1), keys.expand(examples, -1)
    owners = torch.arange(len(places)) // (len(places) // examples)
    return _Rows(places, queries, keys), owners


def _alike(rows: Tensor) -> Tensor:
    """Which rows are equal: `[G, n]` their numbers, for each of `G` different rows."""
    groups, member = torch.unique(rows, dim=0, return_inverse=True)
    if len(rows) % len(groups) or bool((member.bincount() != len(rows) // len(groups)).any()):
        raise UnsupportedCallError(
            "heads of one example read different tokens",
            "relevance averages heads, so each must see the same tokens",
        )
    return torch.argsort(member, stable=True).view(len(groups), -1)


def _check_queries_once(queries: Tensor, owners: Tensor, spaces: TokenSpaces) -> None:
    """See that no token is a query of more than one group, as a class token of all frames is."""
    asked = queries.long() + owners[:, None] * (queries.max().long() + 1)
    asked = asked[queries >= 0]
    if len(torch.unique(asked)) == len(asked):
        return
    raise UnsupportedCallError(
        "one token is a query in several sequences of the same example",
        "pass each sequence as an example of its own"
        + (
            "; these are texts that forward_func holds fixed: leave them out with layers="
            if spaces.fixed(queries)
            else ", or leave the call out with layers="
        ),
    )
