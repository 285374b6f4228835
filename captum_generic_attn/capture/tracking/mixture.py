"""Element-wise mixtures: sums, products and all else that acts on each element by itself.

The join is monotone: what is known meets what was lost, and is lost. Two tokens that meet at one
position make a token that was merged from both, or live on as one (word and position). One
approximation is made here, and listed in the docs: a statistic or a gate, a term that is constant
along the tokens of its example (a mean, a deviation, squeeze-and-excitation), leaves each position
its token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.capture.tracking import births, probe
from captum_generic_attn.capture.tracking.planes import first_along, same_plane, varies
from captum_generic_attn.capture.tracking.shadow import NO_SHADOW, Role, Shadow
from captum_generic_attn.tokens.ids import compact_together
from captum_generic_attn.tokens.spaces import TokenSpaces

if TYPE_CHECKING:
    from captum_generic_attn.capture.tracking.transfer import Transfer


_SCALES = {"mul", "multiply", "div", "divide", "true_divide"}


class Operand(NamedTuple):
    """What is known of a tensor that enters a mixture; `tensor` is gone where the graph told."""

    tensor: Tensor | None
    shape: torch.Size
    shadow: Shadow

    @property
    def plane(self) -> Tensor:
        """The plane of its tokens, of those of its first factor if it has two."""
        return self.shadow.planes[0]

    @property
    def differentiable(self) -> bool:
        """Whether a derivative with respect to it exists: not of integers, such as masks."""
        return self.tensor is None or is_value(self.tensor)


def is_value(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that a gradient may lead to."""
    return tensor.is_floating_point() or tensor.is_complex()


def mixture(
    transfer: Transfer, name: str, operands: Sequence[Operand], shape: torch.Size
) -> Shadow:
    """The shadow of the mixture of some operands, of `shape`, to which they broadcast."""
    if not operands:
        return NO_SHADOW
    feeding = [o for o in operands if o.shadow.data] or operands
    main = max(feeding, key=lambda o: _precedence(o, shape))
    if not main.shadow.planes and not main.shadow.mixed:  # lost, but perhaps only a statistic
        main = next((o for o in feeding if _is_statistic(transfer, main, o, shape)), main)
    together = main.shadow._replace(
        ancestors=frozenset[int]().union(*(o.shadow.ancestors for o in operands)),
        data=any(o.shadow.data for o in operands),
        calls=_calls(transfer, operands, shape),
        weighing=None,
    )
    if not main.shadow.planes and not main.shadow.mixed:
        return together.without_tokens(name)
    try:
        # The very same plane again, so that what was asked of it is remembered.
        planes = tuple(p if p.shape == shape else p.expand(shape) for p in main.shadow.planes)
    except RuntimeError:  # an outer product, or another spelling of what cannot be broadcast
        return together.without_tokens(name)
    planes = _with_learned(transfer.spaces, main, planes, operands, shape)
    if len(planes) > len(main.shadow.planes):
        factors = frozenset[int](), main.shadow.ancestors
        together = together._replace(role=Role.LOGITS, factors=factors)
    elif main.shadow.data:
        for other in feeding:
            if other.shadow is main.shadow:
                continue
            joined = _join(transfer, name, main, planes, other, shape)
            if isinstance(joined, str):
                return together.without_tokens(joined)
            if len(joined) > len(planes):
                factors = main.shadow.ancestors, other.shadow.ancestors
                together = together._replace(role=Role.LOGITS, factors=factors)
            planes = joined
        if any(_guides(transfer, o, main, shape) for o in feeding if o is not main):
            together = together._replace(guided=True)
        for gate in feeding if not main.shadow.pairs else ():
            softmax = gate.shadow.softmax
            if softmax is not None and softmax.over_tokens and _gated(feeding, gate):
                softmax.gates = True
                together = together._replace(softmax=None)
    # A parameter that is computed with is no longer a weight, but perhaps a token.
    role = Role.TOKENS if together.role is Role.PARAMETER else together.role
    together = together._replace(role=role, planes=planes)
    several = sum(o.shadow.calls is not None for o in operands) > 1
    return transfer.heads.noted(together) if several else together


def _join(
    transfer: Transfer, name: str, main: Operand, planes: tuple[Tensor, ...], other: Operand,
    shape: torch.Size,
) -> tuple[Tensor, ...] | str:  # fmt: skip
    """The planes of the main operand after another joined it; the operation if tokens are lost."""
    shadow = other.shadow
    lost = shadow.lost or name
    if len(planes) == 2 and not main.shadow.pairs:
        return lost  # a third operand of what is crosswise
    tokens = shadow.role is main.shadow.role is Role.TOKENS
    if tokens and len(planes) == len(shadow.planes) == 1 and shadow.planes[0] is planes[0]:
        return planes  # as along a residual stream
    if main.shadow.pairs:  # masks and biases move attention, not what it reads
        return planes if not shadow.pairs or shadow.planes or shadow.mixed else lost
    if not other.differentiable and main.differentiable:
        return planes
    if _is_statistic(transfer, other, main, shape):
        transfer.spaces.approximate("statistics", name)
        transfer.hand_back(other.shadow, main.shadow, planes[0])
        return planes
    if not shadow.planes or shadow.pairs:
        return lost
    if main.shadow.role is not Role.TOKENS or shadow.role is Role.STATISTIC:
        return planes if _in_place(transfer.spaces, main, other, planes[0], shape) else lost
    if shadow.role is Role.RAW:
        if name in _SCALES and not transfer.spaces.token_axes(main.plane):
            return planes  # a gate of the only token
        plane = _tokens_at(transfer, name, other, planes[0], shape)
    elif _crosswise(transfer.spaces, main, other, shape):
        return planes[0], other.plane.expand(shape)
    else:
        plane = other.plane.expand(shape)
    together = None if plane is None else added(transfer.spaces, planes[0], plane)
    return lost if together is None else (together,)


def _with_learned(
    spaces: TokenSpaces, main: Operand, planes: tuple[Tensor, ...], operands: Sequence[Operand],
    shape: torch.Size,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The planes of a mixture with computed parameters: pairs where each has rows of its own.

    The parameters come first, as queries do.
    """
    if len(planes) != 1 or main.shadow.role is not Role.TOKENS:
        return planes
    for other in operands:
        learned = other.shadow.role is Role.TOKENS and not other.shadow.data
        alone = learned and len(other.shadow.planes) == 1 and other is not main
        if alone and _crosswise(spaces, main, other, shape):
            return other.plane.expand(shape), planes[0]
    return planes


def added(spaces: TokenSpaces, kept: Tensor, absorbed: Tensor) -> Tensor | None:
    """The plane of two planes of tokens whose features are added or joined.

    A constant (padding) takes the other's token, and a token the loss of the other. `None` if no
    token can be made of the two.
    """
    if same_plane(kept, absorbed):
        return kept
    one, other = compact_together(kept, absorbed)
    lost, gone = spaces.lost(one), spaces.lost(other)
    stays = lost | ((other < 0) & ~gone)
    yields = ~stays & (gone | (one < 0))
    if bool(((stays | yields) & (one != other)).any()):
        kept = torch.where(yields, other, one).expand(kept.shape)
        absorbed = torch.where(stays, one, other).expand(kept.shape)
        return added(spaces, kept, absorbed)
    differ = one != other
    if spaces.nothing_new(other[differ], one[differ]) and spaces.same(kept, absorbed):
        return kept
    if spaces.nothing_new(one[differ], other[differ]) and spaces.same(absorbed, kept):
        return absorbed
    return births.of_sums(spaces, kept, absorbed)


def _precedence(operand: Operand, shape: torch.Size) -> tuple[int, bool, bool]:
    """Whose shadow a mixture takes: the higher role, then what has the shape of the result.

    Probabilities that are broadcast over values gate them, and the values stay values.
    """
    whole = operand.shape == shape
    gates = operand.shadow.pairs and not whole
    role = Role.RAW if gates else operand.shadow.role
    return role, whole, bool(operand.shadow.planes)


def _calls(transfer: Transfer, operands: Sequence[Operand], shape: torch.Size) -> Tensor | None:
    """The plane of calls of a mixture; an operand whose elements all are of one broadcasts."""
    calls: Tensor | None = None
    for operand in operands:
        if operand.shadow.calls is not None:
            calls = transfer.heads.meet(calls, operand.shadow.calls, shape)
    return calls


def _sizes(operand: Operand, shape: torch.Size) -> list[int]:
    """The operand's shape as it broadcasts to `shape`."""
    return [1] * (len(shape) - len(operand.shape)) + list(operand.shape)


def _axes(spaces: TokenSpaces, operand: Operand, shape: torch.Size) -> frozenset[int]:
    """The axes of `shape` along which the operand's tokens differ within an example."""
    missing = len(shape) - len(operand.shape)
    return frozenset(axis + missing for axis in spaces.token_axes(operand.plane))


def _is_statistic(transfer: Transfer, term: Operand, main: Operand, shape: torch.Size) -> bool:
    """Whether a term is constant along the tokens of the main operand, which stay what they are.

    It is of each example by itself: a statistic of a batch would join its examples.
    """
    spaces = transfer.spaces
    if term is main or not main.shadow.planes or main.shadow.pairs:
        return False
    if term.shadow.role is Role.STATISTIC or len(term.shape) > len(shape):
        return False
    axes = _axes(spaces, main, shape)
    sizes = _sizes(term, shape)
    if not axes:  # one token to an example: no axis is theirs
        return False
    known = bool(term.shadow.planes) and not term.shadow.pairs
    if known and _axes(spaces, term, shape):
        return False
    if any(sizes[axis] > 1 and not _constant(term, axis - len(shape), seen=known) for axis in axes):
        return False
    if not known:
        theirs = _sizes(main, shape)
        if any(n > 1 and theirs[axis] == 1 for axis, n in enumerate(sizes)):
            return False  # perhaps tokens along an axis that the main operand does not have
        return _of_each_example(transfer, term, main, shape)
    one, other = compact_together(main.plane.expand(shape), term.plane.expand(shape))
    examples, others = spaces.locate(one)[1], spaces.locate(other)[1]
    return not bool(((examples >= 0) & (others >= 0) & (examples != others)).any())


def _guides(transfer: Transfer, term: Operand, main: Operand, shape: torch.Size) -> bool:
    """Whether a statistic is no statistic of the main operand's tokens, but a token of its own.

    Such as the only query, where logits are added or multiplied up by broadcasting.
    """
    if main.shadow.role is not Role.TOKENS or not _is_statistic(transfer, term, main, shape):
        return False
    if term.shadow.guided:
        return True
    if term.shadow.role is not Role.TOKENS or not term.shadow.planes:
        return term.shadow.role is Role.TOKENS
    spaces = transfer.spaces
    merged_from = {i for k in spaces.indices(term.plane) for i in spaces.made_of(k)}
    return merged_from.isdisjoint(spaces.indices(main.plane))


def _of_each_example(transfer: Transfer, term: Operand, main: Operand, shape: torch.Size) -> bool:
    """Whether a term whose tokens were lost depends, in each example, on that example alone."""
    spaces = transfer.spaces
    missing = len(shape) - len(main.shape)
    along = [axis + missing for axis in spaces.example_axes(main.plane)]
    sizes = _sizes(term, shape)
    if not along:
        return True
    if term.tensor is None or any(sizes[axis] == 1 for axis in along):
        return False
    owner = spaces.locate(main.plane)[1]
    owner = owner.view([1] * missing + list(owner.shape))
    for axis in range(len(shape)):
        if axis not in along:
            owner = owner.amax(axis, keepdim=True)
    owner = owner.view(owner.shape[len(shape) - len(term.shape) :])
    origins = transfer.shadows.origins(
        term.tensor,
        lambda s: (
            not s.data or (bool(s.planes) and not any(spaces.lost(p).any() for p in s.planes))
        ),
    )
    sources = [(o.edge, spaces.locate(o.shadow.planes[0])[1]) for o in origins if o.shadow.data]
    return probe.keeps_examples(term.tensor, owner, sources, transfer.hooks)


def _constant(operand: Operand, axis: int, *, seen: bool) -> bool:
    """Whether the numbers of an operand are the same along an axis.

    They are if one number is repeated. With `seen`, equal numbers will do: those of one token,
    which was written out. Those of tokens that were lost may be equal by chance.
    """
    tensor = operand.tensor
    if tensor is None:
        return False
    if tensor.stride(axis) == 0:
        return True
    return seen and bool((tensor == tensor.narrow(axis, 0, 1)).all())


def _crosswise(spaces: TokenSpaces, main: Operand, other: Operand, shape: torch.Size) -> bool:
    """Whether each of two operands has tokens along an axis that the other is broadcast over."""
    sizes = _sizes(main, shape), _sizes(other, shape)
    return any(sizes[1][axis] == 1 for axis in _axes(spaces, main, shape)) and any(
        sizes[0][axis] == 1 for axis in _axes(spaces, other, shape)
    )


def _in_place(
    spaces: TokenSpaces, main: Operand, other: Operand, plane: Tensor, shape: torch.Size
) -> bool:
    """Whether elements of inputs meet elements of the same place, or the statistic of their line.

    Notes which inputs are summed that way.
    """
    if not other.shadow.planes:
        return False
    theirs = other.plane.expand(shape)
    if other.shadow.role is Role.STATISTIC:
        small, little = compact_together(plane, theirs)
        for axis in range(small.ndim):
            if little.stride(axis) == 0 or little.shape[axis] == 1:
                small = first_along(small, axis)
        return same_plane(small.expand(shape), theirs) or spaces.same_places(small, little)
    if same_plane(plane, theirs):
        return True
    if not main.differentiable and not other.differentiable and spaces.same_rows(plane, theirs):
        return True  # integers of one row, such as the corners of a box
    return main.shadow.role is other.shadow.role and spaces.same_input(plane, theirs)


def _tokens_at(
    transfer: Transfer, name: str, operand: Operand, tokens: Tensor, shape: torch.Size
) -> Tensor | None:
    """The plane of an input's elements as tokens, one at each of the tokens that they meet."""
    if operand.tensor is not None and operand.shape == shape and varies(operand.plane, -1) and (
        not varies(tokens, -1)
    ):  # fmt: skip
        shadow = transfer.tokens_of(operand.tensor, name)  # features added to tokens
        return shadow.planes[0] if shadow.planes else None
    return births.of_elements(transfer.spaces, operand.plane.expand(shape), tokens)


def _gated(operands: Sequence[Operand], main: Operand) -> bool:
    """Whether weights over tokens meet numbers that differ from token to token."""
    return any(
        o.shadow is not main.shadow and o.shadow.softmax is None and o.differentiable
        and o.shadow.role is Role.TOKENS and o.shadow.planes and o.shape == main.shape
        and same_plane(o.plane, main.plane)
        for o in operands
    )  # fmt: skip
