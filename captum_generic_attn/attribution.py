"""Attribution over attention calls as Captum classes, and `GenericAttention` among them.

The forward pass is captured (`capture`), each target is explained (`explanation`) by the `method`
of the class, and values per token go back to the shape of the inputs (`input_maps`). `base` does
what does not depend on attention.
"""

from __future__ import annotations

import functools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch

from captum_generic_attn.captum_api.base import (
    Attributed,
    ModelAttribution,
    Request,
    retried,
    undisturbed,
)
from captum_generic_attn.captum_api.batching import parts_of
from captum_generic_attn.captum_api.inputs import TargetType, TensorOrTupleOfTensorsGeneric
from captum_generic_attn.captum_api.targets import OutputChoice
from captum_generic_attn.capture import Capture, capture_forward, no_attention_message
from captum_generic_attn.capture.blocks import computing_dtype
from captum_generic_attn.errors import UnsupportedAttentionError
from captum_generic_attn.lrp.propagation import Propagated, Propagation
from captum_generic_attn.lrp.rule_sets import RuleSet, attention_rules
from captum_generic_attn.relevance import padding
from captum_generic_attn.relevance.backward import Again, Explanation, explain, narrowed
from captum_generic_attn.relevance.calls import Own, OwnEntry
from captum_generic_attn.relevance.explained_rows import (
    RowsOption,
    warn_of_no_gradient,
    warn_of_zero_scores,
)
from captum_generic_attn.relevance.input_maps import maps_of_inputs
from captum_generic_attn.relevance.method import Generic, Method, Rule
from captum_generic_attn.relevance.result import Relevance
from captum_generic_attn.relevance.selection import Layers, Options, selected

_INTERPOLATIONS = ("bilinear", "nearest")


@dataclass(frozen=True)
class AttentionOptions:
    """The options that all methods over attention calls share."""

    layers: Layers = None
    start_layer: int = 0
    rows: RowsOption = None
    own: OwnEntry = "zero"
    output: OutputChoice = None
    interpolation: str = "bilinear"
    strict: bool = True


class AttentionAttribution(ModelAttribution):
    """An attribution method that makes a map of each attention call and combines the maps."""

    _own: ClassVar[tuple[str, ...]] = ("zero", "keep")

    def __init__(self, forward_func: Callable[..., Any], options: AttentionOptions) -> None:
        super().__init__(forward_func, options.output)
        check_choice("interpolation", options.interpolation, _INTERPOLATIONS)
        check_choice("own", options.own, self._own)
        if not isinstance(options.start_layer, int) or isinstance(options.start_layer, bool):
            raise TypeError(f"start_layer must be an int, not {options.start_layer!r}")
        self.layers = options.layers
        self.start_layer = options.start_layer
        self.rows = options.rows
        self.own = options.own
        self.interpolation = options.interpolation
        self.strict = options.strict

    @property
    @abstractmethod
    def _method(self) -> Method:
        """What this class makes of a call and of all calls."""

    def relevance(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object = None,
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
        with undisturbed():
            ((_, explanation, zero),) = retried(
                lambda copies: self._explanations(
                    request, copies=copies, matrices=True, keep_calls=keep_calls
                )
            )
        warn_of_no_gradient(explanation.dark, len(tensors[0]))
        warn_of_zero_scores(zero, len(tensors[0]))
        if explanation.padded:
            warnings.warn(padding.message(explanation.padded), UserWarning, stacklevel=2)
        return cast(Relevance, explanation.relevance)

    # -- the way through ----------------------------------------------------------------------

    def _attributed(self, request: Request, *, return_input_shape: bool) -> Iterator[Attributed]:
        found = retried(lambda copies: self._explanations(request, copies=copies))
        interpolation = self.interpolation if return_input_shape else None
        for i, (capture, explanation, zero) in enumerate(found):
            maps = maps_of_inputs(
                capture, explanation.values, request.inputs, interpolation,
                warn=request.first and i == 0,
            )  # fmt: skip
            dtype = computing_dtype(capture.output)
            maps = [narrowed(m, dtype) for m in maps]
            yield Attributed(maps, explanation.dark, zero, explanation.padded)

    def _explanations(
        self, request: Request, *, copies: bool, matrices: bool = False, keep_calls: bool = False
    ) -> Iterator[tuple[Capture, Explanation, Sequence[int]]]:
        """Of each target, and the examples whose score leaves LRP nothing to share out."""
        model = self.forward_func, request.inputs, request.additional, self._choose
        method = self._method
        propagation = None
        if method.rules is not None:
            propagation = Propagation(*model, method.rules, copies=copies)
        capture = capture_forward(*model, copies=copies)
        options = Options(self.layers, self.start_layer, request.part.of_rows(self.rows), method)
        self._check_attention(capture, warn=request.first)
        self._check_output(capture.output, request)
        arguments = (*request.inputs, *request.additional)
        masks = padding.token_masks(arguments, len(request.inputs[0]))
        for i, target in enumerate(request.targets):
            last = i + 1 == len(request.targets)
            # Under the user's autocast, relevance would lose the digits that it is made for.
            with torch.autocast(capture.output.device.type, enabled=False):
                propagated = self._propagated(propagation, request, target, retain_graph=not last)
                explained = functools.partial(
                    explain, options=options, retain_graph=not last, matrices=matrices,
                    keep_calls=keep_calls, propagated=propagated.calls, masks=masks,
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
                        if last:  # the graph is spent
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
        listed = "".join(f"\n  {seen}" for seen in dict.fromkeys(map(str, refused)))
        if refused and self.strict:
            raise UnsupportedAttentionError(f"attention that cannot be explained:{listed}")
        if refused and warn:
            warnings.warn(
                f"attention calls that cannot be explained are skipped:{listed}",
                UserWarning,
                stacklevel=2,
            )
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


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """See that an option is one of those that there are.

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
        options = AttentionOptions(layers, start_layer, rows, own, output, interpolation, strict)
        super().__init__(forward_func, options)
        if rule is not None and not callable(rule):
            raise TypeError(f"rule must be a function of two tensors, not {rule!r}")
        self.normalize = normalize
        self.self_in_cross = self_in_cross
        self.aggregate = aggregate
        self.rule = rule
        self.lrp = lrp
        _ = self._method  # a wrong option is told of here

    @property
    def _method(self) -> Method:
        chosen = "chefer2021" if self.lrp is True else self.lrp
        rules = attention_rules(chosen) if chosen else None
        return Generic(
            self.normalize, self.self_in_cross, self.aggregate, self.rule, rules, own=self.own
        )
