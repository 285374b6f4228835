"""Recognises attention: from the product of queries and keys over the softmax to the values.

Called by `mode` for products, softmaxes and fused kernels. What is attention goes to `recorder`
as a call to record; what looks like it but cannot be explained, as a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_generic_attn.capture.constants import Constants
from captum_generic_attn.capture.contraction import Contraction
from captum_generic_attn.capture.operations import argument
from captum_generic_attn.capture.planes import relabel, varies
from captum_generic_attn.capture.record import Explicit, Fused, sums_kept_by
from captum_generic_attn.capture.recorder import CHANNELS, Recorder
from captum_generic_attn.capture.scope import Scope
from captum_generic_attn.capture.shadow import Role, Shadow, Softmax
from captum_generic_attn.capture.transfer import Transfer

Args = Sequence[Any]
Kwargs = Mapping[str, Any]

_ROW_SUM_TOLERANCE = 1e-3


def leave_graph(tensor: Tensor) -> None:
    """Let the graph begin at a tensor if nothing before it needs a gradient."""
    if torch.is_grad_enabled() and not tensor.requires_grad:
        tensor.requires_grad_(True)


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
        self._transfer.shadows[result] = shadow._replace(role=role, softmax=softmax)

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
        logits = [side for side in (0, 1) if sides[side].role is Role.LOGITS and sides[side].data]
        if logits and sides[1 - logits[0]].data:
            return self._logits_times(name, func, args, kwargs, terms, logits[0])
        result: Tensor = self._run(func, args, kwargs)
        computed = [s.data or s.role >= Role.TOKENS for s in sides]
        if all(computed):
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
            planes.append(plane if carried is None else carried)
        return Shadow(
            Role.LOGITS,
            () if mixed else tuple(planes),
            shadows[0].ancestors | shadows[1].ancestors,
            factors=tuple(s.ancestors for s in shadows),
            data=any(s.data for s in shadows),
            mixed=mixed,
        )

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
        normalised = (
            len(axes) == 1
            and not shadow.mixed
            and bool((operand >= 0).all())
            and bool(((operand.sum(axes[0]) - 1).abs() < _ROW_SUM_TOLERANCE).all())
        )
        if normalised:
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

    def _passed_over(self, terms: Contraction, result: Tensor, name: str) -> Tensor:
        """The shadow behind a call that is no record: the ancestors of all that went in."""
        shadows = [self._transfer.of(t) for t in (terms.left, terms.right)]
        merged = frozenset[int]().union(*(s.ancestors for s in shadows))
        shadow = Shadow(ancestors=merged, data=True).without_tokens(name)
        self._transfer.shadows[result] = shadow._replace(role=Role.TOKENS)
        return result

    def _probabilities_times(
        self, name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs,
        terms: Contraction, side: int,
    ) -> Tensor:  # fmt: skip
        weights, values = (terms.left, terms.right)[:: 1 if side == 0 else -1]
        shadow, other = self._transfer.of(weights), self._transfer.of(values)
        labels = terms.labels(side)
        over_keys = [
            i for i, label in enumerate(labels)
            if label in terms.summed and (len(shadow.planes) < 2 or varies(shadow.planes[1], i))
        ]  # fmt: skip
        mixes_heads = shadow.role is Role.PROBABILITIES and not other.data and not over_keys
        if mixes_heads or (not shadow.planes and other.role <= Role.PARAMETER):
            result: Tensor = self._run(func, args, kwargs)
            self._transfer.shadows[result] = self._transfer.weighted(
                weights, labels, terms.out_labels, terms.summed, result, name
            )
            return result
        softmax = shadow.softmax
        assert softmax is not None  # noqa: S101 - the caller looked for it
        if shadow.role is not Role.PROBABILITIES:
            result = self._run(func, args, kwargs)
            if softmax.over_tokens or softmax.in_attention_module:
                softmax.products += 1
                self._recorder.refuse(
                    "a softmax that no product of queries and keys feeds meets values",
                    "the method needs probabilities of queries over keys",
                )
            return self._passed_over(terms, result, name)
        softmax.products += 1
        if not over_keys:  # a single key: the axis that is summed is the only candidate
            over_keys = [i for i, label in enumerate(labels) if label in terms.summed]
        if problem := self._problem(shadow, softmax, other, over_keys):
            self._recorder.refuse(*problem)
            return self._passed_over(terms, self._run(func, args, kwargs), name)
        leave_graph(weights)
        result = self._run(func, args, kwargs)
        outer = terms.labels(1 - side)
        rows = [
            i for i, label in enumerate(labels) if label in terms.out_labels and label not in outer
        ]
        rows = [i for i in rows if varies(shadow.planes[0], i)] or rows[-1:]
        lead = [i for i in range(weights.ndim) if i not in (*over_keys, *rows[-1:])]
        operands = self._recorder.operands(weights)
        of_result = tuple(labels.index(x) if x in labels else None for x in terms.out_labels)
        source = Explicit(operands, (*lead, *rows[-1:], over_keys[0]), not rows, of_result)
        queries, keys = (p.permute(*lead, *rows[-1:], over_keys[0]) for p in shadow.planes)
        if not rows:
            queries, keys = queries.unsqueeze(-2), keys.unsqueeze(-2)
        plane = relabel(shadow.planes[0], labels, terms.out_labels, result.shape)
        self._recorder.record(
            source, weights, result, plane,
            queries.amax(-1) if varies(queries, -1) else queries[..., 0],
            keys.amax(-2) if keys.stride(-2) else keys[..., 0, :],
            (shadow.factors[0], shadow.factors[1] | other.ancestors), softmax,
        )  # fmt: skip
        return result

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
        if len(over_keys) != 1 or len(shadow.planes) != 2:
            return (
                f"queries and keys could not be told apart ({shadow.lost or 'unknown layout'})",
                "rewrite the attention with F.scaled_dot_product_attention",
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
        if call.dropout > 0:
            self._recorder.in_training["dropout of fused attention"] = None
        tokens = self._transfer.spaces.memory(
            _tokens_of_call, self._plane(query, asking), self._plane(key, asked), result.shape,
            grouped=call.grouped,
        )  # fmt: skip
        if tokens is None:
            self._recorder.refuse(*CHANNELS)
            self._transfer.shadows[result] = Shadow(
                Role.TOKENS, (), asking.ancestors | asked.ancestors, data=True
            )
            return result
        queries, keys, plane = tokens
        kept = self._recorder.saved(*call.tensors)
        source = Fused(kept, call.causal, call.scale, call.grouped, sums_kept_by(result))
        factors = asking.ancestors, asked.ancestors | self._transfer.of(value).ancestors
        self._recorder.record(source, result, result, plane, queries, keys, factors, None)
        return result

    def _plane(self, tensor: Tensor, shadow: Shadow) -> Tensor:
        if shadow.planes:
            return shadow.planes[0]
        reason = shadow.lost or "a tensor that no input feeds"
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
