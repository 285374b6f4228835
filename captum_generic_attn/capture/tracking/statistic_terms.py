"""Statistics and gates: operands that are constant along the tokens of the other operand.

They do not change which token a position holds. That is one of the two approximations that the
documentation lists: the mean and deviation of a norm, squeeze-and-excitation, scaling by the mean
of a time series.
"""

from __future__ import annotations

import torch

from captum_generic_attn.capture.tracking import probe
from captum_generic_attn.capture.tracking.abstract_value import Role
from captum_generic_attn.capture.tracking.operand import Operand
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.tokens.ids import squeeze_expanded_together


def is_statistic(state: TrackingState, term: Operand, main: Operand, shape: torch.Size) -> bool:
    """Whether a term is constant along the tokens of the main operand, which keeps its tokens.

    Each number of the term must be of one example: a statistic of the batch would mix examples.
    """
    if not _may_be_statistic(term, main, shape):
        return False
    axes = main.token_axes(state.spaces, shape)
    if not axes:  # each example has one token: no axis is an axis of tokens
        return False
    known = bool(term.abstract.token_ids) and not term.abstract.pairs
    if known and term.token_axes(state.spaces, shape):
        return False
    sizes = term.sizes(shape)
    if any(sizes[axis] > 1 and not _constant(term, axis - len(shape), seen=known) for axis in axes):
        return False
    if known:
        return _of_the_same_examples(state, term, main, shape)
    if any(n > 1 and m == 1 for n, m in zip(sizes, main.sizes(shape), strict=True)):
        return False  # perhaps tokens along an axis that the main operand does not have
    return _of_each_example(state, term, main, shape)


def _may_be_statistic(term: Operand, main: Operand, shape: torch.Size) -> bool:
    """Whether the roles and shapes of two operands allow one to be a statistic for the other."""
    if term is main or not main.abstract.token_ids or main.abstract.pairs:
        return False
    return term.abstract.role is not Role.STATISTIC and len(term.shape) <= len(shape)


def is_guide(state: TrackingState, term: Operand, main: Operand) -> bool:
    """Whether a statistic is a token of its own, which was not made of the main operand's tokens.

    An example is a single query, where logits are computed by broadcasting instead of a product.
    """
    if main.abstract.role is not Role.TOKENS:
        return False
    if term.abstract.guided:
        return True
    if term.abstract.role is not Role.TOKENS or not term.abstract.token_ids:
        return term.abstract.role is Role.TOKENS
    spaces = state.spaces
    merged_from = {i for k in spaces.indices(term.ids) for i in spaces.made_of(k)}
    return merged_from.isdisjoint(spaces.indices(main.ids))


def _constant(operand: Operand, axis: int, *, seen: bool) -> bool:
    """Whether the numbers of an operand are the same along an axis.

    They are if one number is stored and repeated. With `seen`, stored numbers that are equal also
    count: they are copies of the numbers of one token. Numbers of lost tokens do not count, as they
    may be equal by chance.
    """
    tensor = operand.tensor
    if tensor is None:
        return False
    if tensor.stride(axis) == 0:
        return True
    return seen and bool((tensor == tensor.narrow(axis, 0, 1)).all())


def _of_the_same_examples(
    state: TrackingState, term: Operand, main: Operand, shape: torch.Size
) -> bool:
    """Whether a term with known tokens meets only elements of its own example."""
    one, other = squeeze_expanded_together(main.ids.expand(shape), term.ids.expand(shape))
    examples, others = state.spaces.locate(one)[1], state.spaces.locate(other)[1]
    return not bool(((examples >= 0) & (others >= 0) & (examples != others)).any())


def _of_each_example(state: TrackingState, term: Operand, main: Operand, shape: torch.Size) -> bool:
    """Whether each number of a term with lost tokens depends on one example alone.

    It must be the example of the elements that it meets. Gradients of the term tell.
    """
    spaces = state.spaces
    missing = len(shape) - main.ids.ndim
    along = [axis + missing for axis in spaces.example_axes(main.ids)]
    sizes = term.sizes(shape)
    if not along:
        return True
    if term.tensor is None or any(sizes[axis] == 1 for axis in along):
        return False
    owner = spaces.locate(main.ids)[1]
    owner = owner.view([1] * missing + list(owner.shape))
    for axis in range(len(shape)):
        if axis not in along:
            owner = owner.amax(axis, keepdim=True)
    owner = owner.view(owner.shape[len(shape) - len(term.shape) :])
    origins = state.abstract_values.origins(
        term.tensor,
        lambda s: (
            not s.data or (bool(s.token_ids) and not any(spaces.lost(p).any() for p in s.token_ids))
        ),
    )
    sources = [
        (o.edge, spaces.locate(o.abstract.token_ids[0])[1]) for o in origins if o.abstract.data
    ]
    return probe.keeps_examples(term.tensor, owner, sources, state.hooks)
