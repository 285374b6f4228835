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
    feeding = [o for o in operands if o.shadow.data] or operands
    ancestors = ancestors_of(o.shadow for o in operands)
    calls = _calls(state, operands, shape)
    main = _main(state, feeding, shape)
    found = _joined(state, name, main, operands, feeding, shape)
    if _is_lost(found):
        return found._replace(ancestors=ancestors, data=feeding[0].shadow.data)
    # A parameter that is computed with is no longer a weight, but perhaps a token.
    role = Role.TOKENS if found.role is Role.PARAMETER else found.role
    found = found._replace(
        role=role, ancestors=ancestors, data=feeding[0].shadow.data, calls=calls, weighing=None
    )
    several = sum(o.shadow.calls is not None for o in operands) > 1
    return state.heads.noted(found) if several else found


def _is_lost(shadow: AbstractValue) -> bool:
    """Whether the tokens of a value were lost; of mixed logits, the channels are known."""
    return not shadow.planes and not shadow.mixed


def _joined(
    state: TrackingState, name: str, main: Operand, operands: Sequence[Operand],
    feeding: Sequence[Operand], shape: torch.Size,
) -> AbstractValue:  # fmt: skip
    """Role and token ids of a mixture: the main operand, joined by all others in turn."""
    if _is_lost(main.shadow):
        return main.shadow.without_tokens(name)
    try:
        found = _expanded(main.shadow, shape)
    except RuntimeError:  # an outer product, or another spelling of what cannot be broadcast
        return main.shadow.without_tokens(name)
    if (pairs := _with_learned(state.spaces, main, operands, shape)) is not None:
        return pairs
    if not main.shadow.data:
        return found
    found = _fold(state, name, main, feeding, shape)
    if not _is_lost(found) and _note_gates(main, feeding):
        found = found._replace(softmax=None)
    return found


def _main(state: TrackingState, feeding: Sequence[Operand], shape: torch.Size) -> Operand:
    """The operand whose tokens a mixture takes, if the others join it."""
    main = max(feeding, key=lambda o: _precedence(o, shape))
    if _is_lost(main.shadow):  # but perhaps only a statistic
        return next((o for o in feeding if is_statistic(state, main, o, shape)), main)
    return main


def _precedence(operand: Operand, shape: torch.Size) -> tuple[int, bool, bool]:
    """The higher role comes first, then what has the shape of the result.

    Probabilities that are broadcast over values gate them, and the values stay values.
    """
    whole = operand.shape == shape
    gates = operand.shadow.pairs and not whole
    role = Role.RAW if gates else operand.shadow.role
    return role.rank, whole, bool(operand.shadow.planes)


def _expanded(shadow: AbstractValue, shape: torch.Size) -> AbstractValue:
    """The value broadcast to a shape; the very same ids where they have it, which are cached."""
    if all(ids.shape == shape for ids in shadow.planes):
        return shadow
    return shadow.map(lambda ids: ids if ids.shape == shape else ids.expand(shape))


def _calls(state: TrackingState, operands: Sequence[Operand], shape: torch.Size) -> Tensor | None:
    """The attention call of each element of a mixture."""
    calls: Tensor | None = None
    for operand in operands:
        if operand.shadow.calls is not None:
            calls = state.heads.meet(calls, operand.shadow.calls, shape)
    return calls


def _fold(
    state: TrackingState, name: str, main: Operand, feeding: Sequence[Operand], shape: torch.Size
) -> AbstractValue:
    """The main operand after all others joined it, one after another."""
    found = main
    for other in feeding:
        if other.shadow is main.shadow:
            continue
        if found.shadow.pairs and not main.shadow.pairs:  # a third operand of what is crosswise
            return found.shadow.without_tokens(other.shadow.lost_at or name)
        found = found._replace(shadow=join(state, name, found, other, shape))
        if _is_lost(found.shadow):
            break
    return _expanded(found.shadow, shape)


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
    kept, shadow = _expanded(main.shadow, shape), other.shadow
    found: AbstractValue | None
    if kept.pairs:  # masks and biases move attention, not what it reads
        found = kept if not shadow.pairs or not _is_lost(shadow) else None
    elif _same(kept, shadow) or (main.differentiable and not other.differentiable):
        found = kept
    elif is_statistic(state, other, main, shape):
        state.spaces.approximate("statistics", name)
        state.note_global_context(shadow, main.shadow, kept.planes[0])
        found = kept._replace(guided=kept.guided or is_guide(state, other, main))
    else:
        found = _met(state, name, main, other, shape)
    return main.shadow.without_tokens(shadow.lost_at or name) if found is None else found


def _same(one: AbstractValue, other: AbstractValue) -> bool:
    """Whether two values have the very same tokens, as along a residual stream."""
    if one.role is not Role.TOKENS or other.role is not Role.TOKENS:
        return False
    return len(one.planes) == len(other.planes) == 1 and one.planes[0] is other.planes[0]


def _met(
    state: TrackingState, name: str, main: Operand, other: Operand, shape: torch.Size
) -> AbstractValue | None:
    """The value where tokens or elements meet others at each position; `None` if they are lost."""
    kept, shadow = _expanded(main.shadow, shape), other.shadow
    if not shadow.planes or shadow.pairs:
        return None
    if kept.role is not Role.TOKENS or shadow.role is Role.STATISTIC:
        return kept if _in_place(state.spaces, main, other, shape) else None
    if shadow.role is not Role.RAW and is_crosswise(state.spaces, main, other, shape):
        factors = main.shadow.ancestors, shadow.ancestors
        planes = kept.planes[0], other.plane.expand(shape)
        return kept._replace(role=Role.LOGITS, planes=planes, factors=factors)
    ids = _joined_ids(state, name, main, other, shape)
    return None if ids is None else kept._replace(planes=(ids,))


def _joined_ids(
    state: TrackingState, name: str, main: Operand, other: Operand, shape: torch.Size
) -> Tensor | None:
    """The ids of the main operand's tokens after other tokens or elements were added to them."""
    kept = main.plane.expand(shape) if main.plane.shape != shape else main.plane
    added: Tensor | None = None
    if other.shadow.role is not Role.RAW:
        added = other.plane.expand(shape)
    elif name in _SCALES and not state.spaces.token_axes(main.plane):
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
    if len(main.shadow.planes) != 1 or main.shadow.role is not Role.TOKENS:
        return None
    for other in operands:
        learned = other.shadow.role is Role.TOKENS and not other.shadow.data
        alone = learned and len(other.shadow.planes) == 1 and other is not main
        if alone and is_crosswise(spaces, main, other, shape):
            planes = other.plane.expand(shape), *_expanded(main.shadow, shape).planes
            factors = frozenset[int](), main.shadow.ancestors
            return main.shadow._replace(role=Role.LOGITS, planes=planes, factors=factors)
    return None


def _in_place(spaces: TokenSpaces, main: Operand, other: Operand, shape: torch.Size) -> bool:
    """Whether elements of inputs meet elements of the same place, or the statistic of their line.

    Notes which inputs are summed that way.
    """
    if not other.shadow.planes:
        return False
    ids, theirs = main.plane.expand(shape), other.plane.expand(shape)
    if other.shadow.role is Role.STATISTIC:
        small, little = squeeze_expanded_together(ids, theirs)
        for axis in range(small.ndim):
            if repeats(little, axis):
                small = first_along(small, axis)
        return same_ids(small.expand(shape), theirs) or spaces.same_places(small, little)
    if same_ids(ids, theirs):
        return True
    if not main.differentiable and not other.differentiable and spaces.same_rows(ids, theirs):
        return True  # integers of one row, such as the corners of a box
    return main.shadow.role is other.shadow.role and spaces.same_input(ids, theirs)


def _tokens_at(
    state: TrackingState, name: str, operand: Operand, tokens: Tensor, shape: torch.Size
) -> Tensor | None:
    """The elements of an input as tokens, one at each of the tokens that they meet."""
    if operand.tensor is not None and operand.shape == shape and varies(operand.plane, -1) and (
        not varies(tokens, -1)
    ):  # fmt: skip
        shadow = state.tokens_of(operand.tensor, name)  # features added to tokens
        return shadow.planes[0] if shadow.planes else None
    return rows.of_elements(state.spaces, operand.plane.expand(shape), tokens)


def _note_gates(main: Operand, feeding: Sequence[Operand]) -> bool:
    """Note softmaxes over tokens whose result multiplied tokens element by element, and say so."""
    found = False
    for gate in feeding if not main.shadow.pairs else ():
        softmax = gate.shadow.softmax
        if softmax is not None and softmax.over_tokens and _gated(feeding, gate):
            softmax.gates = found = True
    return found


def _gated(operands: Sequence[Operand], gate: Operand) -> bool:
    """Whether weights over tokens meet numbers that differ from token to token."""
    return any(
        o.shadow is not gate.shadow and o.shadow.softmax is None and o.differentiable
        and o.shadow.role is Role.TOKENS and o.shadow.planes and o.shape == gate.shape
        and same_ids(o.plane, gate.plane)
        for o in operands
    )  # fmt: skip
