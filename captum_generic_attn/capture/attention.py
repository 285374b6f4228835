"""Recognises attention: from the product of queries and keys over the softmax to the values.

Called by `mode` for products, softmaxes and fused kernels. What is attention goes to `recorder`
as a call to record; what looks like it but cannot be explained, as a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.capture.constants import Constants
from captum_generic_attn.capture.record import Explicit, Fused, sums_kept_by
from captum_generic_attn.capture.recorder import CHANNELS, Recorder
from captum_generic_attn.capture.scope import Scope
from captum_generic_attn.capture.tracking.contraction import Contraction, elementwise, relabel
from captum_generic_attn.capture.tracking.operations import argument
from captum_generic_attn.capture.tracking.shadow import Role, Shadow, Softmax
from captum_generic_attn.capture.tracking.state import WITHOUT_SOFTMAX, Pool
from captum_generic_attn.capture.tracking.transfer import Transfer
from captum_generic_attn.tokens.ids import compact, varies

Args = Sequence[Any]
Kwargs = Mapping[str, Any]

_ROW_SUM_TOLERANCE = 1e-3
OTHER_VALUES = (
    "keys and values at one place are tokens of different inputs or positions",
    "make both of the same tokens, since relevance belongs to one, or leave it out with layers=",
)
"""What was seen and what to do where a value is of another token than its key."""


def weights_lost(shadow: Shadow) -> tuple[str, str]:
    """What was seen and what to do where a softmax of what was lost weighs tokens."""
    advice = "write that step with operations that keep tokens apart, or leave it out with layers="
    reason = shadow.lost or "an operation that is not known"
    return f"the tokens of its weights could not be followed through {reason}", advice


def values_lost(shadow: Shadow) -> tuple[str, str]:
    """What was seen and what to do where the tokens of values were lost."""
    reason = "pairs of tokens" if shadow.pairs else shadow.lost or "an operation that is not known"
    advice = "write that step with operations that keep tokens apart, or leave it out with layers="
    return f"the tokens of its values could not be followed through {reason}", advice


def leave_graph(tensor: Tensor) -> None:
    """Let the graph begin at a tensor if nothing before it needs a gradient."""
    if torch.is_grad_enabled() and not tensor.requires_grad:
        tensor.requires_grad_(True)


def _normalised(weights: Tensor, axis: int) -> bool:
    """Whether numbers are weights: none negative, and their sum along an axis is 1."""
    sums = weights.sum(axis)
    return bool((weights >= 0).all()) and bool(((sums - 1).abs() < _ROW_SUM_TOLERANCE).all())


class Weighing(NamedTuple):
    """Weights times values: the axes of both, and of the result, by label."""

    weights: Tensor
    values: Tensor
    labels: tuple[str, ...]
    value_labels: tuple[str, ...]
    out_labels: tuple[str, ...]

    @property
    def rows(self) -> list[int]:
        """The axes of the weights that the values do not have and the result has: queries."""
        return [
            i for i, label in enumerate(self.labels)
            if label in self.out_labels and label not in self.value_labels
        ]  # fmt: skip


class FusedOperands(NamedTuple):
    """The arguments of `scaled_dot_product_attention`; a mask is the last of the tensors."""

    tensors: tuple[Tensor, ...]
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool


def fused_operands(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> FusedOperands:  # fmt: skip
    """The arguments of a call of `scaled_dot_product_attention`, sorted."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    return FusedOperands(tensors, dropout_p, is_causal, scale, enable_gqa)


class Attention:
    """Recognises the attention calls of one forward pass and hands them to a `Recorder`."""

    def __init__(
        self, transfer: Transfer, recorder: Recorder, scope: Scope, constants: Constants
    ) -> None:
        self._run = constants.run
        self._transfer = transfer
        self._recorder = recorder
        self._scope = scope

    # -- softmax ------------------------------------------------------------------------------

    def softmax(self, args: Args, kwargs: Kwargs, result: Tensor) -> None:
        """What a softmax makes of logits: probabilities, keys along the softmax axis."""
        operand = argument(args, kwargs, 0, "input")
        axis = argument(args, kwargs, 1, "dim", -1)
        shadow = self._transfer.of(operand)
        logits = shadow.role is Role.LOGITS
        along = [varies(plane, axis) for plane in shadow.planes]
        several = self._transfer.spaces.several
        apart = not logits and any(several(plane) for plane in shadow.planes)
        softmax = Softmax(*self._scope.current(), logits, any(along), apart)
        self._recorder.softmaxes.append(softmax)
        if logits and shadow.planes:
            if along == [True, False]:  # keys were the first factor
                shadow = shadow._replace(planes=shadow.planes[::-1], factors=shadow.factors[::-1])
            elif all(along) or (not any(along) and operand.shape[axis] > 1):
                shadow = shadow._replace(planes=(), lost="softmax over neither queries nor keys")
        role = Role.PROBABILITIES if logits else shadow.role
        self._transfer.shadows[result] = shadow._replace(
            role=role, softmax=softmax, calls=None, weighing=None
        )

    # -- products -----------------------------------------------------------------------------

    def product(
        self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs, terms: Contraction
    ) -> Tensor:
        """Run a product of two tensors and give its result a shadow."""
        first, second = self._transfer.of(terms.left), self._transfer.of(terms.right)
        sides = (first, second)
        for side in (0, 1):
            if sides[side].role is Role.PROBABILITIES or sides[side].softmax is not None:
                return self._probabilities_times(name, func, args, kwargs, terms, side)
        for side in (0, 1):
            if sides[side].role is Role.LOGITS and self._may_be_weights(terms, side):
                return self._logits_times(name, func, args, kwargs, terms, side)
        result: Tensor = self._run(func, args, kwargs)
        if torch.is_grad_enabled() and not result.requires_grad and first.data != second.data:
            result = result.requires_grad_().clone()  # one-hot rows times a table: no leaf
        computed = [s.data or s.role.of_tokens for s in sides]
        if all(computed):
            for side in (0, 1):
                if self._weighs_by_hand(terms, side):
                    return self._probabilities_times(name, func, args, kwargs, terms, side)
            shadow = self._logits(terms, result, name)
        else:
            side = 0 if first.data or not second.data else 1
            shadow = self._transfer.weighted(
                (terms.left, terms.right)[side], terms.labels(side), terms.out_labels,
                terms.summed, result, name,
            )  # fmt: skip
        if terms.bias is not None:
            self._transfer.shadows[result] = shadow
            shadow = self._transfer.summed(name, [result, terms.bias], result)
        self._transfer.shadows[result] = shadow
        return result

    def _logits(self, terms: Contraction, result: Tensor, name: str) -> Shadow:
        planes: list[Tensor] = []
        shadows: list[Shadow] = []
        mixed = False
        for side, tensor in enumerate((terms.left, terms.right)):
            labels = terms.labels(side)
            summed_last = labels[-1] in terms.summed
            shadow = self._transfer.tokens_of(tensor, name) if summed_last else (
                self._transfer.of(tensor)
            )  # fmt: skip
            shadows.append(shadow)
            plane = shadow.planes[0] if shadow.planes else self._lost_tokens(tensor, terms, side)
            carried = relabel(plane, labels, terms.out_labels, result.shape)
            mixed |= carried is None
            if carried is None:
                self._check_pooled(shadow, plane)
            planes.append(plane if carried is None else carried)
        return Shadow(
            Role.LOGITS,
            () if mixed else tuple(planes),
            shadows[0].ancestors | shadows[1].ancestors,
            factors=tuple(s.ancestors for s in shadows),
            data=any(s.data for s in shadows),
            mixed=mixed,
        )

    def _check_pooled(self, shadow: Shadow, plane: Tensor) -> None:
        """Note pooled tokens that are summed over in a product with tokens: no softmax is there."""
        pools = self._transfer.pools
        for call in shadow.ancestors & pools.keys():
            if pools[call].queries & set(self._transfer.spaces.indices(plane)):
                pools[call].problem = WITHOUT_SOFTMAX

    def _lost_tokens(self, tensor: Tensor, terms: Contraction, side: int) -> Tensor:
        reason = self._transfer.of(tensor).lost or "an operation that is not known"
        shape = torch.Size(
            1 if label in terms.summed else n
            for label, n in zip(terms.labels(side), tensor.shape, strict=True)
        )
        return self._transfer.spaces.unknown(shape, reason).expand(tensor.shape)

    def _logits_times(
        self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        terms: Contraction, side: int,
    ) -> Tensor:  # fmt: skip
        """Logits meet values without a softmax: accepted if they were normalised by hand."""
        operand = (terms.left, terms.right)[side]
        shadow = self._transfer.of(operand)
        axes = [i for i, label in enumerate(terms.labels(side)) if label in terms.summed]
        if len(axes) == 1 and not shadow.mixed and _normalised(operand, axes[0]):
            softmax = Softmax(*self._scope.current(), has_logits=True, over_tokens=True)
            along = [varies(plane, axes[0]) for plane in shadow.planes]
            planes = shadow.planes[::-1] if along == [True, False] else shadow.planes
            factors = shadow.factors[::-1] if along == [True, False] else shadow.factors
            self._transfer.shadows[operand] = shadow._replace(
                role=Role.PROBABILITIES, softmax=softmax, planes=planes, factors=factors
            )
            return self._probabilities_times(name, func, args, kwargs, terms, side)
        result: Tensor = self._run(func, args, kwargs)
        self._recorder.refuse(
            "queries, keys and values are multiplied without a softmax (linear or sigmoid "
            "attention)",
            "the method needs attention probabilities",
        )
        return self._passed_over(terms, result, name)

    def _may_be_weights(self, terms: Contraction, side: int) -> bool:
        """Whether logits that meet others without a softmax are data, or weights of parameters."""
        shadow, other = (self._transfer.of(t) for t in (terms.left, terms.right)[:: 1 - 2 * side])
        if shadow.data:
            return other.data
        axes = [i for i, label in enumerate(terms.labels(side)) if label in terms.summed]
        operand = (terms.left, terms.right)[side]
        alone = len(axes) == 1 and len(shadow.planes) == 2 and other.role.of_tokens
        return alone and _normalised(operand, axes[0])

    def _weighs_by_hand(self, terms: Contraction, side: int) -> bool:
        """Whether a factor holds weights over tokens that were normalised by hand; notes it."""
        operand = (terms.left, terms.right)[side]
        shadow = self._transfer.of(operand)
        if shadow.role is not Role.TOKENS or not shadow.data or len(shadow.planes) != 1:
            return False
        axes = [i for i, label in enumerate(terms.labels(side)) if label in terms.summed]
        if len(axes) != 1 or not varies(shadow.planes[0], axes[0]):
            return False
        if not _normalised(operand, axes[0]):
            return False
        softmax = Softmax(*self._scope.current(), has_logits=False, over_tokens=True)
        self._transfer.shadows[operand] = shadow._replace(softmax=softmax)
        return True

    def _passed_over(self, terms: Contraction, result: Tensor, name: str) -> Tensor:
        """The shadow behind a call that is no record: its queries' tokens go on, at their places.

        What was refused is used on the user's word alone (`strict=False`, `layers=`). Tokens that
        the result has no places for are lost.
        """
        shadows = [self._transfer.of(t) for t in (terms.left, terms.right)]
        ancestors = frozenset[int]().union(*(s.ancestors for s in shadows))
        passed = Shadow(Role.TOKENS, ancestors=ancestors, data=True)
        found = passed.without_tokens(next((s.lost for s in shadows if s.lost), name))
        for side in sorted((0, 1), key=lambda side: not shadows[side].pairs):
            if not shadows[side].planes:
                continue
            labels = terms.labels(side)
            plane = relabel(shadows[side].planes[0], labels, terms.out_labels, result.shape)
            if plane is not None:
                found = passed._replace(planes=(plane,))
                break
        self._transfer.shadows[result] = found
        return result

    def _probabilities_times(
        self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        terms: Contraction, side: int,
    ) -> Tensor:  # fmt: skip
        weights, values = (terms.left, terms.right)[:: 1 if side == 0 else -1]
        shadow, other = self._transfer.of(weights), self._transfer.of(values)
        softmax = shadow.softmax
        assert softmax is not None  # noqa: S101 - the caller looked for it
        labels = terms.labels(side)
        summed = [i for i, label in enumerate(labels) if label in terms.summed]
        over_keys = [
            i for i in summed if not shadow.planes or varies(shadow.planes[-1], i)
        ]  # fmt: skip
        weighs = shadow.role is Role.PROBABILITIES or (softmax.over_tokens and shadow.data)
        pairs = shadow.role is Role.PROBABILITIES
        mixes_heads = weighs and not other.data and not (pairs and over_keys)
        if mixes_heads or (not shadow.planes and other.role.is_weight):
            result: Tensor = self._run(func, args, kwargs)
            self._transfer.shadows[result] = self._transfer.weighted(
                weights, labels, terms.out_labels, terms.summed, result, name
            )
            return result
        if not shadow.data and other.planes and len(summed) == 1:  # learned weights over positions
            weighs = varies(other.planes[0], terms.labels(1 - side).index(labels[summed[0]]))
        lost = shadow.data and not shadow.planes and not shadow.mixed and other.data
        if lost and shadow.role is not Role.PROBABILITIES:
            softmax.products += 1
            self._recorder.refuse(*weights_lost(shadow))
            return self._passed_over(terms, self._run(func, args, kwargs), name)
        if not weighs:
            result = self._run(func, args, kwargs)
            if softmax.over_tokens or softmax.in_attention_module:
                softmax.products += 1
                self._recorder.refuse(
                    "a softmax that no product of queries and keys feeds meets values",
                    "the method needs probabilities of queries over keys",
                )
            return self._passed_over(terms, result, name)
        softmax.products += 1
        if not over_keys or not shadow.data:  # the axis that is summed is the only candidate
            over_keys = summed
        call = Weighing(weights, values, labels, terms.labels(1 - side), terms.out_labels)
        problem = self._problem(shadow, softmax, other, over_keys)
        if problem is None:
            problem = self._problem_of_values(call, shadow, other)
        if problem is None and shadow.role is not Role.PROBABILITIES:
            problem = self._problem_of_pool(call, shadow, over_keys[0])
        if problem is not None:
            self._recorder.refuse(*problem)
            return self._passed_over(terms, self._run(func, args, kwargs), name)
        leave_graph(weights)
        result = self._run(func, args, kwargs)
        self._record(call, shadow, other, over_keys[0], result, softmax)
        return result

    def _record(
        self, call: Weighing, shadow: Shadow, other: Shadow, key: int, result: Tensor,
        softmax: Softmax,
    ) -> None:  # fmt: skip
        """Record a call whose weights run over keys along the axis `key`."""
        weights, labels = call.weights, call.labels
        rows = call.rows
        if shadow.role is Role.PROBABILITIES:
            asking, asked = shadow.planes
            asked = self._keys_or_values(call, asked, other)
            rows = [i for i in rows if varies(asking, i)] or rows[-1:]
            factors = shadow.factors[0], shadow.factors[1] | other.ancestors
        else:
            asked = shadow.planes[0] if shadow.data else self._tokens_of_values(call, other)
            asking = self._pooled_tokens(call, asked, key)
            factors = frozenset(), shadow.ancestors | other.ancestors
        lead = [i for i in range(weights.ndim) if i not in (key, *rows[-1:])]
        order = (*lead, *rows[-1:], key)
        of_result = tuple(labels.index(x) if x in labels else None for x in call.out_labels)
        source = Explicit(self._recorder.operands(weights), order, not rows, of_result)
        queries, keys = (p.permute(order) for p in (asking, asked))
        if not rows:
            queries, keys = queries.unsqueeze(-2), keys.unsqueeze(-2)
        plane = relabel(asking, labels, call.out_labels, result.shape)
        index = self._recorder.record(
            source, weights, result, plane,
            queries.amax(-1) if queries.stride(-1) else queries[..., 0],
            keys.amax(-2) if keys.stride(-2) else keys[..., 0, :],
            factors, softmax,
        )  # fmt: skip
        witness = self._recorder.witness
        if witness is not None and index is not None and plane is not None:
            logits = shadow.planes if shadow.role is Role.PROBABILITIES else ()
            witness.see(
                index, result, plane, logits=(weights, logits), values=(call.values, other.planes)
            )
        if index is not None and shadow.role is not Role.PROBABILITIES:
            spaces = self._transfer.spaces
            pooled, pooled_from = (frozenset(spaces.indices(p)) for p in (asking, asked))
            self._transfer.pools[index] = Pool(pooled, pooled_from)

    def _keys_or_values(self, call: Weighing, asked: Tensor, other: Shadow) -> Tensor:
        """The tokens of keys; keys that are constants (no key was there) have their values'."""
        if not other.planes or bool((compact(asked) >= 0).all()):
            return asked
        values = relabel(other.planes[0], call.value_labels, call.labels, asked.shape)
        return asked if values is None else torch.where(asked < 0, values, asked)

    def _tokens_of_values(self, call: Weighing, other: Shadow) -> Tensor:
        """The tokens that learned weights run over, in the shape of the weights."""
        plane = relabel(other.planes[0], call.value_labels, call.labels, call.weights.shape)
        assert plane is not None  # noqa: S101 - values with several tokens in a row are refused
        return plane

    def _pooled_tokens(self, call: Weighing, asked: Tensor, key: int) -> Tensor:
        """A token for each query that no token asks: one for each row of weights and each window.

        They are learned, as a parameter is, and the same for all examples.
        """
        spaces = self._transfer.spaces
        apart = set(call.rows) | (spaces.token_axes(asked) - {key})
        shape = [n if i in apart else 1 for i, n in enumerate(call.weights.shape)]
        name = self._scope.current()[0] or "pooled"
        ids = spaces.of_parameter(name, torch.Size([*shape, 1])).squeeze(-1)
        return ids.expand(call.weights.shape)

    # -- weights times tokens, then a sum ------------------------------------------------------

    def weighs(self, args: Args, kwargs: Kwargs) -> Contraction | None:
        """The product of weights and tokens, element by element, that a sum would make attention.

        Weights are broadcast over the features of what they weigh.
        """
        if len(args) != 2 or kwargs or not all(isinstance(value, Tensor) for value in args):
            return None
        for side in (0, 1):
            weights, values = args[side], args[1 - side]
            shadow = self._transfer.shadows.get(weights)
            if shadow is None or weights.ndim == 0 or values.ndim == 0:
                continue
            other = self._transfer.of(values)
            if other.pairs or other.softmax is not None:
                continue
            if not self._may_weigh(shadow) or not (other.data or shadow.pairs):
                continue
            terms = elementwise(*args)
            labels = terms.labels(side)
            if any(
                n > 1 and label not in labels
                for n, label in zip(values.shape, terms.labels(1 - side), strict=True)
            ):
                if shadow.softmax is not None:
                    shadow.softmax.gates |= shadow.data and bool(shadow.planes)
                if shadow.softmax is not None or shadow.pairs:
                    leave_graph(weights)
                return terms
        return None

    def _may_weigh(self, shadow: Shadow) -> bool:
        """Whether a factor may hold weights over tokens: by a softmax, learned, or made by hand."""
        if shadow.pairs:
            return bool(shadow.planes)
        if shadow.softmax is not None:
            return not shadow.data or shadow.softmax.over_tokens or not shadow.planes
        one = shadow.role is Role.TOKENS and shadow.data and len(shadow.planes) == 1
        return one and bool(self._transfer.spaces.token_axes(shadow.planes[0]))

    def summed(
        self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs, terms: Contraction
    ) -> Tensor | None:
        """Run the sum that makes attention of weights times tokens; `None` if it does not."""
        product: Tensor = args[0]
        axes = argument(args, kwargs, 1, "dim", kwargs.get("axis"))
        axes = [axes] if isinstance(axes, int) else axes
        self._transfer.shadows[product] = self._transfer.of(product)._replace(weighing=None)
        if not isinstance(axes, (list, tuple)):
            return None
        gone = {terms.out_labels[axis] for axis in axes}
        keep = bool(argument(args, kwargs, 2, "keepdim", default=False))
        out = [
            f"kept {label}" if label in gone else label
            for label in terms.out_labels if keep or label not in gone
        ]  # fmt: skip
        terms = replace(terms, out_labels=tuple(out))
        for side in (0, 1):
            shadow = self._transfer.of((terms.left, terms.right)[side])
            over_tokens = any(
                label in terms.summed and (not shadow.data or varies(plane, i))
                for plane in shadow.planes[0 if shadow.softmax is None else -1 :]
                for i, label in enumerate(terms.labels(side))
            )
            lost = shadow.data and not shadow.planes and shadow.softmax is not None
            if not over_tokens and not (lost and terms.summed):
                continue
            if shadow.softmax is not None or self._weighs_by_hand(terms, side):
                return self._probabilities_times(name, func, args, kwargs, terms, side)
            if shadow.pairs and self._may_be_weights(terms, side):
                return self._logits_times(name, func, args, kwargs, terms, side)
        return None

    # -- what cannot be explained --------------------------------------------------------------

    def _problem(
        self, shadow: Shadow, softmax: Softmax, other: Shadow, over_keys: list[int]
    ) -> tuple[str, str] | None:
        if shadow.mixed:
            return CHANNELS
        if other.role is Role.PROBABILITIES:
            return (
                "attention probabilities are multiplied with each other (Nyström attention)",
                "relevance is not defined for such a product",
            )
        if softmax.products > 1:
            return (
                "the same probabilities enter more than one product",
                "relevance is not defined where attention is split over products (Longformer, LED)",
            )
        count = 2 if shadow.role is Role.PROBABILITIES else 1
        if len(over_keys) != 1 or (shadow.data and len(shadow.planes) != count):
            return (
                f"queries and keys could not be told apart ({shadow.lost or 'unknown layout'})",
                "rewrite the attention with F.scaled_dot_product_attention",
            )
        return None

    def _problem_of_values(
        self, call: Weighing, shadow: Shadow, other: Shadow
    ) -> tuple[str, str] | None:
        """Whether values are of other tokens than the keys at their places."""
        if not other.data:
            return None
        if not other.planes or other.pairs:
            return values_lost(other)
        if not shadow.data:  # the keys are what is weighed
            return None
        plane, asked = other.planes[0], shadow.planes[-1]

        def differ() -> bool:
            common = [label for label in call.labels if label in call.value_labels]
            sizes = [
                max(call.weights.shape[call.labels.index(label)],
                    call.values.shape[call.value_labels.index(label)])
                for label in common
            ]  # fmt: skip
            shape = torch.Size(sizes)
            keys = relabel(asked, call.labels, common, shape)
            values = relabel(plane, call.value_labels, common, shape)
            if keys is None or values is None:
                return True
            return not self._transfer.spaces.belong(keys, values)

        question = "values", call.labels, call.value_labels
        if self._transfer.spaces.memory.of((asked, plane), question, differ):
            return OTHER_VALUES
        return None

    def _problem_of_pool(self, call: Weighing, shadow: Shadow, key: int) -> tuple[str, str] | None:
        """Whether weights that no token asks for differ along what is no axis of queries or heads.

        Each feature of a token has weights of its own where no axis of the values is their own.
        """
        own = any(
            n > 1 and label in call.out_labels and label not in call.labels
            for n, label in zip(call.values.shape, call.value_labels, strict=True)
        )
        axes = self._transfer.spaces.token_axes(shadow.planes[0]) if shadow.planes else frozenset()
        examples = (
            self._transfer.spaces.example_axes(shadow.planes[0]) if shadow.data else frozenset({0})
        )
        heads = [
            i for i, n in enumerate(call.weights.shape)
            if n > 1 and i not in (key, *call.rows, *axes, *examples)
        ]  # fmt: skip
        if heads and not own:
            return CHANNELS
        if shadow.guided:
            return (
                "the query of its weights could not be told: a token was broadcast over the keys",
                "rewrite the logits as a product of queries and keys",
            )
        if not shadow.data and any(call.weights.shape[i] > 1 for i in call.rows):
            return (
                "learned weights over positions: its queries have no tokens",
                "leave the module out with layers=, or pass strict=False to skip such calls",
            )
        return None

    # -- fused kernel -------------------------------------------------------------------------

    def fused(self, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Tensor:
        """Run `scaled_dot_product_attention` and record it."""
        call = fused_operands(*args, **kwargs)
        query, key, value, *_ = call.tensors
        asking = self._transfer.tokens_of(query, "attention")
        asked = self._transfer.tokens_of(key, "attention")
        result: Tensor = self._run(func, args, kwargs)
        leave_graph(result)
        if call.dropout > 0 and (asking.data or asked.data or self._transfer.of(value).data):
            self._recorder.in_training["dropout of fused attention"] = None
        tokens = self._transfer.spaces.memory(
            _tokens_of_call, self._plane(query, asking), self._plane(key, asked), result.shape,
            grouped=call.grouped,
        )  # fmt: skip
        weighed = self._transfer.of(value)
        if weighed.role is Role.RAW:
            weighed = self._transfer.tokens_of(value, "attention")
        problem = CHANNELS if tokens is None else self._problem_of_fused(asked, weighed)
        if problem is not None:
            self._recorder.refuse(*problem)
            passed = Shadow(Role.TOKENS, (), asking.ancestors | asked.ancestors, data=True)
            plane = asking.planes[0] if asking.planes else None
            plane = plane if tokens is None else tokens[2]
            fits = plane is not None and plane.shape == result.shape and not asking.pairs
            self._transfer.shadows[result] = (
                passed._replace(planes=(plane,)) if fits and plane is not None
                else passed.without_tokens("attention")
            )  # fmt: skip
            return result
        assert tokens is not None  # noqa: S101 - else it is attention between channels
        queries, keys, plane = tokens
        if weighed.planes and not call.grouped and bool((keys < 0).any()):  # constants
            values = weighed.planes[0][..., 0]
            keys = torch.where(keys < 0, values.expand(keys.shape), keys)
        kept = self._recorder.saved(*call.tensors)
        source = Fused(kept, call.causal, call.scale, call.grouped, sums_kept_by(result))
        factors = asking.ancestors, asked.ancestors | self._transfer.of(value).ancestors
        index = self._recorder.record(source, result, result, plane, queries, keys, factors, None)
        if self._recorder.witness is not None and index is not None:
            self._recorder.witness.see(
                index, result, plane, queries=(query, asking.planes), keys=(key, asked.planes),
                values=(value, weighed.planes),
            )  # fmt: skip
        return result

    def _problem_of_fused(self, asked: Shadow, weighed: Shadow) -> tuple[str, str] | None:
        """Whether values are of other tokens than the keys at their places."""
        if not weighed.data:
            return None
        if not weighed.planes or weighed.pairs or not asked.planes:
            return values_lost(weighed) if not weighed.planes or weighed.pairs else None
        keys, values = asked.planes[0], weighed.planes[0]
        spaces = self._transfer.spaces

        def differ() -> bool:
            if varies(values, -1):
                return True
            one, other = keys[..., 0], values[..., 0]
            shape = torch.Size(map(max, one.shape, other.shape))
            return not spaces.belong(one.expand(shape), other.expand(shape))

        return OTHER_VALUES if spaces.memory.of((keys, values), "values", differ) else None

    def _plane(self, tensor: Tensor, shadow: Shadow) -> Tensor:
        if shadow.planes and not shadow.pairs:
            return shadow.planes[0]
        reason = shadow.lost or "a tensor that no input feeds"
        reason = "pairs of tokens" if shadow.pairs else reason
        return self._transfer.spaces.unknown(tensor.shape[:-1], reason).unsqueeze(-1)


def _tokens_of_call(
    query: Tensor, key: Tensor, shape: torch.Size, *, grouped: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Queries and keys for each map of a fused call, `[*lead, N]`, and the plane of its result.

    `None` if the axis that the kernel takes for features holds tokens.
    """
    if varies(query, -1) or varies(key, -1):
        return None
    queries = _of_heads(query[..., 0], shape[:-2], grouped=False)
    keys = _of_heads(key[..., 0], shape[:-2], grouped=grouped)
    return queries, keys, queries.unsqueeze(-1).expand(shape)


def _of_heads(tokens: Tensor, lead: torch.Size, *, grouped: bool) -> Tensor:
    """The plane `[..., N]` of queries or keys for each map of a call, `[*lead, N]`."""
    if grouped:
        tokens = tokens.repeat_interleave(lead[-1] // tokens.shape[-2], -2)
    return tokens if tokens.shape[:-1] == lead else tokens.expand(*lead, tokens.shape[-1])
