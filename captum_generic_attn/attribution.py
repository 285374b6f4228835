"""Attribution methods over attention as Captum classes, and `GenericAttention` among them.

`attribute` captures the forward pass (`capture`), explains each target with the method of the class
(`relevance`), and maps values per token back to the shape of the inputs. `captum_api` does what
does not depend on attention.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, TypedDict, cast

import torch
from torch import Tensor

from captum_generic_attn.captum_api.base import (
    Attributed,
    ModelAttribution,
    Request,
    autograd_enabled,
    retry_with_copies,
)
from captum_generic_attn.captum_api.batching import parts_of
from captum_generic_attn.captum_api.inputs import TargetType, TensorOrTupleOfTensorsGeneric
from captum_generic_attn.captum_api.options import complete
from captum_generic_attn.captum_api.targets import OutputChoice
from captum_generic_attn.capture import (
    AttentionRecord,
    Capture,
    capture_forward,
    no_attention_message,
)
from captum_generic_attn.capture.blocks import computing_dtype
from captum_generic_attn.errors import UnsupportedAttentionError
from captum_generic_attn.lrp.propagation import Propagated, Propagation
from captum_generic_attn.lrp.rule_sets import RuleSet, attention_rules
from captum_generic_attn.relevance import padding
from captum_generic_attn.relevance.aggregator import (
    Aggregator,
    Own,
    OwnEntry,
    PropagationOptions,
)
from captum_generic_attn.relevance.attention_maps import AttentionMap, ElementwiseRule
from captum_generic_attn.relevance.backward import Again, Explanation, explain, narrowed
from captum_generic_attn.relevance.calls import IndexedCall, TokenIndexing
from captum_generic_attn.relevance.equations import positive_contribution
from captum_generic_attn.relevance.explained_rows import (
    RowsOption,
    warn_of_no_gradient,
    warn_of_zero_scores,
)
from captum_generic_attn.relevance.full_propagation import FullPropagation
from captum_generic_attn.relevance.input_maps import maps_of_inputs
from captum_generic_attn.relevance.last_update import LastUpdatePropagation
from captum_generic_attn.relevance.method import CallGradients, Layers, Method
from captum_generic_attn.relevance.result import Relevance
from captum_generic_attn.relevance.row_propagation import row_propagation
from captum_generic_attn.relevance.selection import selected

_INTERPOLATIONS = ("bilinear", "nearest")

Rule = Callable[[Tensor, Tensor], Tensor]
"""From probabilities and their gradient, `[G, H, Nq, Nk]`, to the map of a call, `[G, Nq, Nk]`."""


class CommonOptions(TypedDict, total=False):
    """The options of every method over attention.

    Their defaults stand in `AttentionAttribution`, what they do in `GenericAttention`.
    """

    layers: Layers
    own: OwnEntry
    output: OutputChoice
    interpolation: str
    strict: bool


class AttentionOptions(CommonOptions, total=False):
    """The options of every method that reads explained rows."""

    rows: RowsOption


class AttentionAttribution(ModelAttribution, Method):
    """Base of all methods that make a map of each attention call and combine the maps.

    A subclass defines `aggregator` and, for its maps, `elementwise_rule`, `head_maps` or `call_map`
    (see `Method`). It passes the options that it shares with the others as
    `**options: Unpack[AttentionOptions]`.
    """

    _own_choices: ClassVar[tuple[str, ...]] = ("zero", "keep")

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        layers: Layers = None,
        start_layer: int = 0,
        rows: RowsOption = None,
        own: OwnEntry = "zero",
        output: OutputChoice = None,
        interpolation: str = "bilinear",
        strict: bool = True,
    ) -> None:
        super().__init__(forward_func, output)
        check_choice("interpolation", interpolation, _INTERPOLATIONS)
        check_choice("own", own, self._own_choices)
        if not isinstance(start_layer, int) or isinstance(start_layer, bool):
            raise TypeError(f"start_layer must be an int, not {start_layer!r}")
        self.layers = layers
        self.start_layer = start_layer
        self.rows = rows
        self.own = own
        self.interpolation = interpolation
        self.strict = strict

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        complete(cls, AttentionAttribution.__init__, lambda: GenericAttention.__doc__ or "")

    def relevance(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        keep_calls: bool = False,
    ) -> Relevance:
        """Token-to-token relevance maps, streams and attention calls.

        Args:
            inputs: as in `attribute`.
            target: as in `attribute`.
            additional_forward_args: as in `attribute`.
            keep_calls: keep the maps of every call too.

        Returns:
            A frozen `Relevance`; `.matrix(query, key)` is `[B, Nq, Nk]`, R of the paper.

        Raises:
            ValueError: as `attribute`.
            TypeError: as `attribute`.

        Example:
            >>> import torch, timm
            >>> from captum_generic_attn import GenericAttention
            >>> model = timm.create_model("test_vit", num_classes=5).eval()
            >>> relevance = GenericAttention(model).relevance(torch.rand(1, 3, 160, 160), target=1)
            >>> relevance.matrix("x", "x").shape
            torch.Size([1, 101, 101])
            >>> list(relevance.streams["x"].parts)
            ['cls_token', 'x']
        """
        tensors = self._check_inputs(inputs)
        (part,) = parts_of(len(tensors[0]), None)
        request = self._request(tensors, [target], additional_forward_args, part)
        with autograd_enabled():
            ((_, explanation, zero),) = retry_with_copies(
                lambda copies: self._explanations(
                    request, copies=copies, matrices=True, keep_calls=keep_calls
                )
            )
        warn_of_no_gradient(explanation.without_gradient, len(tensors[0]))
        warn_of_zero_scores(zero, len(tensors[0]))
        if explanation.padded:
            warnings.warn(padding.message(explanation.padded), UserWarning, stacklevel=2)
        return cast(Relevance, explanation.relevance)

    # -- the way through ----------------------------------------------------------------------

    def _attributed(self, request: Request, *, return_input_shape: bool) -> Iterator[Attributed]:
        found = retry_with_copies(lambda copies: self._explanations(request, copies=copies))
        interpolation = self.interpolation if return_input_shape else None
        for i, (capture, explanation, zero) in enumerate(found):
            maps = maps_of_inputs(
                capture, explanation.values, request.inputs, interpolation,
                warn=request.first and i == 0,
            )  # fmt: skip
            dtype = computing_dtype(capture.output)
            maps = [narrowed(m, dtype) for m in maps]
            yield Attributed(maps, explanation.without_gradient, zero, explanation.padded)

    def _explanations(
        self, request: Request, *, copies: bool, matrices: bool = False, keep_calls: bool = False
    ) -> Iterator[tuple[Capture, Explanation, Sequence[int]]]:
        """For each target its explanation, and the examples whose score of 0 leaves LRP nothing."""
        model = self.forward_func, request.inputs, request.additional, self._choose
        rules = self.lrp_rules
        propagation = None if rules is None else Propagation(*model, rules, copies=copies)
        capture = capture_forward(*model, copies=copies)
        self._check_attention(capture, warn=request.first)
        self._check_output(capture.output, request)
        masks = padding.token_masks((*request.inputs, *request.additional), len(request.inputs[0]))
        for i, target in enumerate(request.targets):
            last = i + 1 == len(request.targets)
            # Under the user's autocast relevance would lose precision.
            with torch.autocast(capture.output.device.type, enabled=False):
                propagated = self._propagated(propagation, request, target, retain_graph=not last)
                explained = functools.partial(
                    explain, method=self, rows=request.part.of_rows(self.rows),
                    retain_graph=not last, matrices=matrices, keep_calls=keep_calls,
                    propagated=propagated.calls, masks=masks,
                )  # fmt: skip
                asked = set[str]()
                explanation: Explanation | None = None
                while explanation is None:
                    score = self._score(capture.output, request, target)
                    try:
                        explanation = explained(
                            capture, score, earlier="earlier" in asked, exact="exact" in asked
                        )
                    except Again as again:
                        asked.add(again.option)
                        if last:  # the graph is freed
                            capture = capture_forward(*model, copies=copies)
            yield capture, explanation, propagated.zero

    def _propagated(
        self, propagation: Propagation | None, request: Request, target: TargetType, *,
        retain_graph: bool,
    ) -> Propagated:  # fmt: skip
        """The relevance of the probabilities of each call, if the method needs it."""
        if propagation is None:
            return Propagated((), {})
        capture = propagation.capture
        modules = selected(capture, self.layers)
        records = [r for r in capture.records if r.module in modules]
        score = self._score(capture.output, request, target)
        return propagation.of(score, retain_graph=retain_graph, records=records)

    def _check_attention(self, capture: Capture, *, warn: bool) -> None:
        if not capture.records and not capture.refusals:
            raise UnsupportedAttentionError(no_attention_message(capture))
        modules = selected(capture, self.layers)
        refused = [r for r in capture.refusals if r.module in modules and not r.harmless]
        if refused:
            self._report(dict.fromkeys(map(str, refused)), warn=warn)
        if not any(r.module in modules for r in capture.records):
            raise UnsupportedAttentionError(no_attention_message(capture))
        if capture.in_training and warn:
            warnings.warn(
                f"the model ran in training mode ({', '.join(capture.in_training)}): relevance is "
                "that of one random pass, in fused attention of the probabilities before dropout, "
                "and running statistics went on. Call model.eval() first",
                UserWarning,
                stacklevel=2,
            )

    def _report(self, refused: Iterable[str], *, warn: bool) -> None:
        """Raise for the calls that cannot be explained; without `strict`, warn of them."""
        listed = "".join(f"\n  {seen}" for seen in refused)
        if self.strict:
            raise UnsupportedAttentionError(f"attention that cannot be explained:{listed}")
        if warn:
            warnings.warn(
                f"attention calls that cannot be explained are skipped:{listed}",
                UserWarning,
                stacklevel=2,
            )


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Check that an option is one of its choices.

    Raises:
        ValueError: if it is not.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is none of {allowed}")


class GenericAttention(AttentionAttribution):
    """Generic attention explainability (Chefer et al., ICCV 2021) for any transformer.

    Which tokens made the model give this score: attention maps, weighted by their gradients,
    averaged over heads and multiplied up through the layers (eq. 5 to 11). The model is used as it
    is: fused attention stays fused, and nothing of the capture is left behind.

    Args:
        forward_func: a module, a bound method, a `functools.partial`, or a closure round modules.
        layers: names, name prefixes or modules whose attention counts; `None`: all.
        start_layer: leave out the first `start_layer` calls of each (query stream, key stream)
            pair among those that `layers` selects and the score reaches; -1 keeps the last. Merged
            tokens count with the stream that they were merged from.
        rows: which rows are explained; `None`: those that the score is computed from. Else an int
            (negative from the end), a list of ints, `[B]` or `[B, k]` indices, `[B, N]` weights,
            or a mapping from stream names to one of these.
        own: what the token of an example's only explained row gets, its own entry of that row.
            `"zero"`: 0, as the authors have it, for class tokens, which are no part of the input.
            `"keep"`: its value, for a row that is a token of the input: the last token of a prompt,
            the last item of a recommender, the word that is classified. With several explained
            rows nothing is zeroed.
        normalize: eq. 8 and 9, in attention between streams (object queries and image).
        self_in_cross: the two `R̄` factors of eq. 10, in attention between streams.
        aggregate: `False` is the authors' ablation "no aggregation": each `+=` becomes `=`.
        rule: in place of eq. 5, a function from probabilities and their gradient, `[G, H, Nq, Nk]`
            both, to the map of a call, `[G, Nq, Nk]`; `G` are examples or their windows. Eq. 8
            divides by sums of rows, so its values should not be negative.
        lrp: the authors' `use_lrp`: relevance of the probabilities by LRP takes their place in
            eq. 5. `True` takes the rules of their LXMERT (`"chefer2021"`); else a rule set or its
            name. With signed rules the product is positive also where both factors speak against
            the score, and a score that is a probability is refused (docs/baselines.md).
        output: field name, index or function that picks the output to explain; see
            `captum_generic_attn.choose_output`.
        interpolation: `"bilinear"` (the authors' pictures) or `"nearest"` (each element has the
            value of its token).
        strict: whether attention calls that cannot be explained raise, or are skipped with one
            warning.

    Raises:
        ValueError: if `interpolation` or `own` is none of its choices.
        TypeError: if `start_layer` is no int, or `forward_func` cannot be called.

    Source: arXiv 2103.15679. With several explained rows (mean pooling) each has equal weight, a
    case that the paper does not cover.

    Example:
        >>> import torch, timm
        >>> from captum_generic_attn import GenericAttention
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> images = torch.rand(2, 3, 160, 160)
        >>> heatmap = GenericAttention(model).attribute(images, target=1)
        >>> heatmap.shape
        torch.Size([2, 3, 160, 160])
        >>> GenericAttention(model).attribute(images, target=1, return_input_shape=False).shape
        torch.Size([2, 10, 10])

        The next word, or the next item, is read at the last one, whose own value may be the answer:

        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> next_item = lambda items: layer(items)[:, -1]
        >>> items = torch.rand(1, 4, 8)
        >>> GenericAttention(next_item).attribute(items, 2, return_input_shape=False)[0, -1]
        tensor(0.)
        >>> keeping = GenericAttention(next_item, own="keep")
        >>> bool(keeping.attribute(items, 2, return_input_shape=False)[0, -1] > 0)
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        layers: Layers = None,
        start_layer: int = 0,
        rows: RowsOption = None,
        own: Own = "zero",
        normalize: bool = True,
        self_in_cross: bool = True,
        aggregate: bool = True,
        rule: Rule | None = None,
        lrp: bool | str | RuleSet = False,
        output: OutputChoice = None,
        interpolation: str = "bilinear",
        strict: bool = True,
    ) -> None:
        super().__init__(
            forward_func, layers=layers, start_layer=start_layer, rows=rows, own=own,
            output=output, interpolation=interpolation, strict=strict,
        )  # fmt: skip
        if rule is not None and not callable(rule):
            raise TypeError(f"rule must be a function of two tensors, not {rule!r}")
        self.normalize = normalize
        self.self_in_cross = self_in_cross
        self.aggregate = aggregate
        self.rule = rule
        self.lrp = lrp
        _ = self.lrp_rules  # validates `lrp` now

    @property
    def lrp_rules(self) -> RuleSet | None:
        """The rules of LRP, if its relevance takes the place of the probabilities in eq. 5."""
        chosen = "chefer2021" if self.lrp is True else self.lrp
        return attention_rules(chosen) if chosen else None

    @property
    def needs_all_heads(self) -> bool:
        """True with `rule`, which may combine heads in any way."""
        return self.rule is not None

    @property
    def elementwise_rule(self) -> ElementwiseRule | None:
        """Eq. 5 before its mean over heads, unless `rule` or `lrp` replaces it."""
        return positive_contribution if self.rule is None and not self.lrp else None

    def head_maps(self, call: CallGradients) -> Tensor | None:
        """Eq. 5 for each head, `[G, H, Nq, Nk]`; `None` with `rule`."""
        if self.rule is not None:
            return None
        return positive_contribution(self._attention(call), call.gradient())

    def call_map(self, call: CallGradients) -> AttentionMap:
        """Eq. 5, or `rule` in its place."""
        if self.rule is None:
            return super().call_map(call)
        attention = self._attention(call)
        found = self.rule(attention, call.gradient())
        _check_map(found, attention, call.record)
        return call.dense_map(found.detach())

    def _attention(self, call: CallGradients) -> Tensor:
        return call.propagated() if self.lrp else call.attention()

    def aggregator(
        self, calls: Sequence[IndexedCall], output_streams: Sequence[str], indexing: TokenIndexing,
        cross_pairs: frozenset[tuple[str, str]], *, matrices: bool,
    ) -> Aggregator:  # fmt: skip
        """Eq. 6 to 11: row propagation where rows suffice, else whole matrices."""
        options = PropagationOptions(self.normalize, self.self_in_cross, cross_pairs, own=self.own)
        if not self.aggregate:
            return LastUpdatePropagation(calls, indexing, options)
        rows = None if matrices else row_propagation(calls, output_streams, indexing, options)
        return FullPropagation(calls, indexing, options) if rows is None else rows


def _check_map(found: object, attention: Tensor, record: AttentionRecord) -> None:
    place = record.module or "the forward function"
    expected = attention.shape[0], *attention.shape[2:]
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != expected:
        raise ValueError(
            f"rule= must make of {tuple(attention.shape)} probabilities and gradients a map "
            f"{expected}, without the axis of heads; at {place} it made {shape}"
        )
    if isinstance(found, Tensor) and not bool(torch.isfinite(found).all()):
        raise ValueError(f"rule= made numbers that are not finite at {place}")
