"""The join of abstract values: what an element-wise mixture of tensors is.

Sums, products and all else that acts on each element by itself. The join goes part by part:
ancestors are united, data joins data, attention calls meet, the higher role wins. Token ids are
joined by `join`, two operands at a time:

- A lost operand makes the result lost, unless it is a statistic or a gate.
- The same tokens stay themselves, as along a residual stream.
- Two tokens that meet at one position make a token that was merged from both, or live on as one
  (word and position).
- A statistic or a gate leaves each position its token (`statistic_terms`).
- Integers, masks and biases of attention logits leave the other operand its tokens.
- Tokens that meet crosswise, each along an axis of its own, make logits of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking.abstract_value import (
    CONSTANT,
    AbstractValue,
    Role,
    ancestors_of,
)
from captum_generic_attn.capture.tracking.operand import Operand, is_crosswise
from captum_generic_attn.capture.tracking.state import TrackingState
from captum_generic_attn.capture.tracking.statistic_terms import is_guide, is_statistic
from captum_generic_attn.capture.tracking.token_creation import rows
from captum_generic_attn.tokens.ids import (
    first_along,
    repeats,
    same_ids,
    squeeze_expanded_together,
    varies,
)
from captum_generic_attn.tokens.spaces import TokenSpaces

_SCALES = {"mul", "multiply", "div", "divide", "true_divide"}


def mixture(
    state: TrackingState, name: str, operands: Sequence[Operand], shape: torch.Size
) -> AbstractValue:
    """The value of the mixture of some operands, of `shape`, to which they broadcast."""
    if not operands:
        return CONSTANT
    feeding = [o for o in operands if o.abstract.data] or operands
    ancestors = ancestors_of(o.abstract for o in operands)
    calls = _calls(state, operands, shape)
    main = _main(state, feeding, shape)
    found = _joined(state, name, main, operands, feeding, shape)
    if _is_lost(found):
        return found._replace(ancestors=ancestors, data=feeding[0].abstract.data)
    # A parameter that is computed with is no longer a weight, but perhaps a token.
    role = Role.TOKENS if found.role is Role.PARAMETER else found.role
    found = found._replace(
        role=role, ancestors=ancestors, data=feeding[0].abstract.data, calls=calls, weighing=None
    )
    several = sum(o.abstract.calls is not None for o in operands) > 1
    return state.heads.noted(found) if several else found


def _is_lost(abstract: AbstractValue) -> bool:
    """Whether the tokens of a value were lost; of mixed logits, the channels are known."""
    return not abstract.token_ids and not abstract.mixed


def _joined(
    state: TrackingState, name: str, main: Operand, operands: Sequence[Operand],
    feeding: Sequence[Operand], shape: torch.Size,
) -> AbstractValue:  # fmt: skip
    """Role and token ids of a mixture: the main operand, joined by all others in turn."""
    if _is_lost(main.abstract):
        return main.abstract.without_tokens(name)
    try:
        found = _expanded(main.abstract, shape)
    except RuntimeError:  # an outer product, or another spelling of what cannot be broadcast
        return main.abstract.without_tokens(name)
    if (pairs := _with_learned(state.spaces, main, operands, shape)) is not None:
        return pairs
    if not main.abstract.data:
        return found
    found = _fold(state, name, main, feeding, shape)
    if not _is_lost(found) and _note_gates(main, feeding):
        found = found._replace(softmax=None)
    return found


def _main(state: TrackingState, feeding: Sequence[Operand], shape: torch.Size) -> Operand:
    """The operand whose tokens a mixture takes, if the others join it."""
    main = max(feeding, key=lambda o: _precedence(o, shape))
    if _is_lost(main.abstract):  # but perhaps only a statistic
        return next((o for o in feeding if is_statistic(state, main, o, shape)), main)
    return main


def _precedence(operand: Operand, shape: torch.Size) -> tuple[int, bool, bool]:
    """The higher role comes first, then what has the shape of the result.

    Probabilities that are broadcast over values gate them, and the values stay values.
    """
    whole = operand.shape == shape
    gates = operand.abstract.pairs and not whole
    role = Role.RAW if gates else operand.abstract.role
    return role.rank, whole, bool(operand.abstract.token_ids)


def _expanded(abstract: AbstractValue, shape: torch.Size) -> AbstractValue:
    """The value broadcast to a shape; the very same ids where they have it, which are cached."""
    if all(ids.shape == shape for ids in abstract.token_ids):
        return abstract
    return abstract.map(lambda ids: ids if ids.shape == shape else ids.expand(shape))


def _calls(state: TrackingState, operands: Sequence[Operand], shape: torch.Size) -> Tensor | None:
    """The attention call of each element of a mixture."""
    calls: Tensor | None = None
    for operand in operands:
        if operand.abstract.calls is not None:
            calls = state.heads.meet(calls, operand.abstract.calls, shape)
    return calls


def _fold(
    state: TrackingState, name: str, main: Operand, feeding: Sequence[Operand], shape: torch.Size
) -> AbstractValue:
    """The main operand after all others joined it, one after another."""
    found = main
    for other in feeding:
        if other.abstract is main.abstract:
            continue
        if found.abstract.pairs and not main.abstract.pairs:  # a third operand of what is crosswise
            return found.abstract.without_tokens(other.abstract.lost_at or name)
        found = found._replace(abstract=join(state, name, found, other, shape))
        if _is_lost(found.abstract):
            break
    return _expanded(found.abstract, shape)


def join(
    state: TrackingState, name: str, main: Operand, other: Operand, shape: torch.Size
) -> AbstractValue:
    """The value of the main operand after another joined it.

    Args:
        state: what is known of the forward pass.
        name: the operation.
        main: the operand of higher precedence.
        other: another one, which depends on an input as well.
        shape: that of the result.
    """
    kept, abstract = _expanded(main.abstract, shape), other.abstract
    found: AbstractValue | None
    if kept.pairs:  # masks and biases move attention, not what it reads
        found = kept if not abstract.pairs or not _is_lost(abstract) else None
    elif _same(kept, abstract) or (main.differentiable and not other.differentiable):
        found = kept
    elif is_statistic(state, other, main, shape):
        state.spaces.approximate("statistics", name)
        state.note_global_context(abstract, main.abstract, kept.token_ids[0])
        found = kept._replace(guided=kept.guided or is_guide(state, other, main))
    else:
        found = _met(state, name, main, other, shape)
    return main.abstract.without_tokens(abstract.lost_at or name) if found is None else found


def _same(one: AbstractValue, other: AbstractValue) -> bool:
    """Whether two values have the very same tokens, as along a residual stream."""
    if one.role is not Role.TOKENS or other.role is not Role.TOKENS:
        return False
    return (
        len(one.token_ids) == len(other.token_ids) == 1 and one.token_ids[0] is other.token_ids[0]
    )


def _met(
    state: TrackingState, name: str, main: Operand, other: Operand, shape: torch.Size
) -> AbstractValue | None:
    """The value where tokens or elements meet others at each position; `None` if they are lost."""
    kept, abstract = _expanded(main.abstract, shape), other.abstract
    if not abstract.token_ids or abstract.pairs:
        return None
    if kept.role is not Role.TOKENS or abstract.role is Role.STATISTIC:
        return kept if _in_place(state.spaces, main, other, shape) else None
    if abstract.role is not Role.RAW and is_crosswise(state.spaces, main, other, shape):
        factors = main.abstract.ancestors, abstract.ancestors
        token_ids = kept.token_ids[0], other.ids.expand(shape)
        return kept._replace(role=Role.LOGITS, token_ids=token_ids, factors=factors)
    ids = _joined_ids(state, name, main, other, shape)
    return None if ids is None else kept._replace(token_ids=(ids,))


def _joined_ids(
    state: TrackingState, name: str, main: Operand, other: Operand, shape: torch.Size
) -> Tensor | None:
    """The ids of the main operand's tokens after other tokens or elements were added to them."""
    kept = main.ids.expand(shape) if main.ids.shape != shape else main.ids
    added: Tensor | None = None
    if other.abstract.role is not Role.RAW:
        added = other.ids.expand(shape)
    elif name in _SCALES and not state.spaces.token_axes(main.ids):
        return kept  # a gate of the only token
    else:
        added = _tokens_at(state, name, other, kept, shape)
    return None if added is None else merged(state.spaces, kept, added)


def merged(spaces: TokenSpaces, kept: Tensor, absorbed: Tensor) -> Tensor | None:
    """The ids of tokens whose features are added or joined, position by position.

    Padding (a constant) takes the token of the other, and a lost token makes the other lost. `None`
    if no token can be made of the two.
    """
    if same_ids(kept, absorbed):
        return kept
    one, other = squeeze_expanded_together(kept, absorbed)
    lost, gone = spaces.lost(one), spaces.lost(other)
    stays = lost | ((other < 0) & ~gone)
    yields = ~stays & (gone | (one < 0))
    if bool(((stays | yields) & (one != other)).any()):
        kept = torch.where(yields, other, one).expand(kept.shape)
        absorbed = torch.where(stays, one, other).expand(kept.shape)
        return merged(spaces, kept, absorbed)
    differ = one != other
    if spaces.is_subsumed(other[differ], one[differ]) and spaces.identify(kept, absorbed):
        return kept
    if spaces.is_subsumed(one[differ], other[differ]) and spaces.identify(absorbed, kept):
        return absorbed
    return rows.of_sums(spaces, kept, absorbed)


def _with_learned(
    spaces: TokenSpaces, main: Operand, operands: Sequence[Operand], shape: torch.Size
) -> AbstractValue | None:
    """A mixture with computed parameters: pairs, where each operand has tokens along its own axis.

    The parameters come first, as queries do. `None` if there are none.
    """
    if len(main.abstract.token_ids) != 1 or main.abstract.role is not Role.TOKENS:
        return None
    for other in operands:
        learned = other.abstract.role is Role.TOKENS and not other.abstract.data
        alone = learned and len(other.abstract.token_ids) == 1 and other is not main
        if alone and is_crosswise(spaces, main, other, shape):
            token_ids = other.ids.expand(shape), *_expanded(main.abstract, shape).token_ids
            factors = frozenset[int](), main.abstract.ancestors
            return main.abstract._replace(role=Role.LOGITS, token_ids=token_ids, factors=factors)
    return None


def _in_place(spaces: TokenSpaces, main: Operand, other: Operand, shape: torch.Size) -> bool:
    """Whether elements of inputs meet elements of the same place, or the statistic of their line.

    Notes which inputs are summed that way.
    """
    if not other.abstract.token_ids:
        return False
    ids, theirs = main.ids.expand(shape), other.ids.expand(shape)
    if other.abstract.role is Role.STATISTIC:
        small, little = squeeze_expanded_together(ids, theirs)
        for axis in range(small.ndim):
            if repeats(little, axis):
                small = first_along(small, axis)
        return same_ids(small.expand(shape), theirs) or spaces.same_places(small, little)
    if same_ids(ids, theirs):
        return True
    if not main.differentiable and not other.differentiable and spaces.same_rows(ids, theirs):
        return True  # integers of one row, such as the corners of a box
    return main.abstract.role is other.abstract.role and spaces.same_input(ids, theirs)


def _tokens_at(
    state: TrackingState, name: str, operand: Operand, tokens: Tensor, shape: torch.Size
) -> Tensor | None:
    """The elements of an input as tokens, one at each of the tokens that they meet."""
    if operand.tensor is not None and operand.shape == shape and varies(operand.ids, -1) and (
        not varies(tokens, -1)
    ):  # fmt: skip
        abstract = state.tokens_of(operand.tensor, name)  # features added to tokens
        return abstract.token_ids[0] if abstract.token_ids else None
    return rows.of_elements(state.spaces, operand.ids.expand(shape), tokens)


def _note_gates(main: Operand, feeding: Sequence[Operand]) -> bool:
    """Note softmaxes over tokens whose result multiplied tokens element by element, and say so."""
    found = False
    for gate in feeding if not main.abstract.pairs else ():
        softmax = gate.abstract.softmax
        if softmax is not None and softmax.over_tokens and _gated(feeding, gate):
            softmax.gates = found = True
    return found


def _gated(operands: Sequence[Operand], gate: Operand) -> bool:
    """Whether weights over tokens meet numbers that differ from token to token."""
    return any(
        o.abstract is not gate.abstract and o.abstract.softmax is None and o.differentiable
        and o.abstract.role is Role.TOKENS and o.abstract.token_ids and o.shape == gate.shape
        and same_ids(o.ids, gate.ids)
        for o in operands
    )  # fmt: skip
