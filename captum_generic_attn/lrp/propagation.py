"""Propagates relevance through a model: the relevance of its inputs and attention probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.capture import Capture, capture_forward, name_of_input
from captum_generic_attn.capture.record import AttentionRecord
from captum_generic_attn.capture.tracking.abstract_value import Role
from captum_generic_attn.capture.tracking.tracker import TokenTracker
from captum_generic_attn.errors import UnsupportedOperationError
from captum_generic_attn.lrp.mode import RelevanceMode
from captum_generic_attn.lrp.rule_sets import RuleSet
from captum_generic_attn.lrp.rules import Examples
from captum_generic_attn.lrp.signs import lost_at
from captum_generic_attn.tokens.ids import squeeze_expanded


class _Tokens:
    """Answers the questions of `choice.Tokens` from the abstract values of a capture."""

    def __init__(self, tracker: TokenTracker, batch: int) -> None:
        self._abstract_values = tracker.abstract_values
        self._spaces = tracker.spaces
        self._batch = batch

    def is_data(self, tensor: Tensor) -> bool:
        return self._abstract_values[tensor].data

    def is_input(self, tensor: Tensor) -> bool:
        return self._abstract_values[tensor].role is Role.RAW

    def is_computed(self, tensor: Tensor) -> bool:
        return self._abstract_values[tensor].role.of_tokens

    def examples_of(self, tensor: Tensor) -> Examples:
        if self._batch == 1:
            return Examples()
        token_ids = self._abstract_values[tensor].token_ids
        if token_ids and token_ids[0].shape == tensor.shape:
            memory = self._spaces.cache
            found = memory.of((token_ids[0],), "examples", lambda: self._read(token_ids[0]))
            if found is not None:
                return found
        # The token ids were lost: take the one axis other than features that has the batch's size.
        shape = tensor.shape[: max(tensor.ndim - 1, 1)]
        alike = [axis for axis, n in enumerate(shape) if n == self._batch]
        fitting = [axis for axis, n in enumerate(shape) if n % self._batch == 0]
        if len(alike) == 1 or (not alike and fitting == [0]):
            axis = (alike or fitting)[0]
            repeated = torch.arange(self._batch).repeat_interleave(shape[axis] // self._batch)
            return Examples(axis - tensor.ndim, repeated)
        return Examples(known=False)

    def _read(self, ids: Tensor) -> Examples | None:
        """Find the axis along which the example changes, and the example at each position, by token
        id.
        """
        small = squeeze_expanded(ids)
        example = self._spaces.locate(small)[1]
        for axis in range(small.ndim):
            others = [a for a in range(small.ndim) if a != axis]
            owner = example.amax(others) if others else example
            if int(owner.min()) >= 0 and len(set(owner.tolist())) == self._batch:
                return Examples(axis - ids.ndim, owner)
        for axis in range(ids.ndim - 1):  # parameters are the same for each example
            others = [a for a in range(ids.ndim) if a != axis]
            line, places = ids.amax(others), torch.arange(self._batch)
            if len(line) % self._batch:
                continue
            turns, parts = line.view(-1, self._batch), line.view(self._batch, -1)
            if bool((turns == turns[:, :1]).all()):
                return Examples(axis - ids.ndim, places.repeat(len(turns)))
            if bool((parts == parts[:1]).all()):
                return Examples(axis - ids.ndim, places.repeat_interleave(parts.shape[1]))
        return None

    def is_logits(self, tensor: Tensor) -> bool:
        return self._abstract_values[tensor].role is Role.LOGITS

    def is_probabilities(self, tensor: Tensor) -> bool:
        return self._abstract_values[tensor].role is Role.PROBABILITIES


@dataclass(frozen=True, eq=False)
class Propagated:
    """The relevance of each input, in its shape, and of the probabilities of each call, by its
    index.

    Probabilities are `[G * H, Nq, Nk]`, in the order of an attention record. An integer input has
    the sum over the features of its embedding vectors. `silent` names the inputs that no relevance
    reaches. `zero` lists the examples whose score is 0 where relevance starts from the score.
    """

    inputs: tuple[Tensor, ...]
    calls: Mapping[int, Tensor]
    silent: tuple[str, ...] = ()
    zero: tuple[int, ...] = ()


class Propagation:
    """A forward pass under relevance rules, and backward passes from its scores."""

    def __init__(
        self, forward_func: Callable[..., Any], inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...], choose: Callable[[Any], Tensor], rules: RuleSet, *,
        copies: bool = False, leaks: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Run the model; `leaks` later collects, by operation, the relevance that is not
        propagated.
        """
        self._leaks = leaks
        self._inputs = inputs
        self._rules = rules
        self._mode: RelevanceMode | None = None
        self.capture: Capture = capture_forward(
            forward_func, inputs, additional, choose, copies=copies, inner_mode=self._inner_mode
        )

    @property
    def starts_from_score(self) -> bool:
        """Whether the relevance of an example starts from its score, or from 1."""
        return self._rules.start != "one"

    def _inner_mode(self, tracker: TokenTracker) -> RelevanceMode:
        self._mode = RelevanceMode(self._rules, _Tokens(tracker, len(self._inputs[0])), self._leaks)
        return self._mode

    def of(
        self, score: Tensor, *, retain_graph: bool, records: Sequence[AttentionRecord] = ()
    ) -> Propagated:
        """Propagate relevance from a score of each example.

        Args:
            score: `[B]`, part of the graph of `capture`.
            retain_graph: whether another score follows.
            records: the calls for whose probabilities relevance is computed.

        Raises:
            UnsupportedOperationError: if relevance starts from the score, and the score has lost
                the sign of what it was computed from: it is a probability or a log-probability.
        """
        capture = self.capture
        if self._rules.signed:
            _check_sign(score)
        calls: dict[int, Tensor] = {}
        start = (score * score.detach() if self._rules.signed else score).sum()
        roots = [edge for edge in capture.roots if edge is not None]
        edges = [*roots, *(edge for _, edge in capture.embedded)]
        edges += [record.edge for record in records]
        try:
            for record in records:
                record.tap.listener = _Keeper(record, calls)
            assert self._mode is not None  # noqa: S101
            with self._mode:
                found = (
                    capture.backward(start, edges, retain_graph=retain_graph)
                    if edges and start.requires_grad
                    else (None,) * len(edges)
                )
        finally:
            for record in records:
                record.tap.listener = None
        of_roots = iter(found)
        relevance = [
            torch.zeros_like(tensor) if edge is None else _or_zero(next(of_roots), tensor)
            for edge, tensor in zip(capture.roots, self._inputs, strict=True)
        ]
        of_vectors = found[len(roots) : len(roots) + len(capture.embedded)]
        for place, tensor in enumerate(self._inputs):
            if capture.roots[place] is None:
                relevance[place] = self._of_integers(place, tensor, score, of_vectors)
        silent = (
            name for name, r in zip(capture.input_names, relevance, strict=True) if not r.any()
        )
        zero = (score == 0).nonzero().flatten().tolist() if self._rules.signed else ()
        return Propagated(tuple(relevance), calls, tuple(silent), tuple(zero))

    def _of_integers(
        self, place: int, tensor: Tensor, score: Tensor, of_vectors: Sequence[Tensor | None]
    ) -> Tensor:
        """The relevance of an integer input: that of its embeddings, summed over features."""
        capture = self.capture
        name = name_of_input(capture, self._inputs, place)
        total = score.new_zeros(tensor.numel())
        for space in capture.spaces:
            if space.kind != "element" or space.name != name or space.shape is None:
                continue
            for (ids, _), vectors in zip(capture.embedded, of_vectors, strict=True):
                inside = (ids >= space.base) & (ids < space.stop)
                if vectors is not None and bool(inside.any()):
                    index = (ids[inside].long() - space.base).to(total.device)
                    total.index_add_(0, index, vectors.sum(-1)[inside.to(vectors.device)].to(total))
        return total.view(tensor.shape)


def _check_sign(score: Tensor) -> None:
    name = lost_at(score)
    if name is None:
        return
    if name in ("add", "sub", "subtract"):
        advice = "a constant is added: leave it out, or make it the bias of the last layer"
    else:
        advice = f"explain the logit, what goes into {name}"
    raise UnsupportedOperationError(
        f"the score comes out of {name} and need not have the sign of what went in, as a "
        "probability and its logarithm have not. Relevance that starts from it would show what "
        f"speaks for it as speaking against it: {advice}"
    )


class _Keeper:
    """Stores the relevance of a call's probabilities."""

    def __init__(self, record: AttentionRecord, calls: dict[int, Tensor]) -> None:
        self._record = record
        self._calls = calls

    def __call__(self, operands: Sequence[Tensor], relevance: Tensor) -> None:
        self._calls[self._record.index] = self._record.blocks(operands, relevance).gradient()


def _or_zero(relevance: Tensor | None, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if relevance is None else relevance
