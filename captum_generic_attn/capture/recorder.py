"""Keeps the records of one forward pass, and says which calls cannot be explained, and why.

`attention` recognises calls and hands them over; `forward` closes the book. Here a call's tokens
are sorted into examples and heads, its queries and keys are compared, and streams are joined.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from captum_generic_attn.capture.heads import Groups, Unreadable, group_heads
from captum_generic_attn.capture.record import (
    AttentionRecord,
    Explicit,
    Fused,
    Operands,
    Saved,
    Tap,
)
from captum_generic_attn.capture.scope import Scope
from captum_generic_attn.capture.tracking.head_calls import of_call
from captum_generic_attn.capture.tracking.shadow import Role, Shadow, Softmax
from captum_generic_attn.capture.tracking.transfer import Transfer
from captum_generic_attn.capture.witness import Witness
from captum_generic_attn.tokens.ids import compact
from captum_generic_attn.tokens.space import PADDING, STALE
from captum_generic_attn.tokens.streams import TokenStreams


@dataclass(frozen=True)
class Refusal:
    """An attention call that cannot be explained: where, what was seen, what to do."""

    index: int
    module: str
    module_type: str
    seen: str
    advice: str
    harmless: bool = False  # no token of an input takes part

    def __str__(self) -> str:
        where = f"{self.module or 'the forward function'} ({self.module_type})"
        return f"{where}: {self.seen}; {self.advice}"


CHANNELS = (
    "attention between channels, not between tokens",
    "leave the module out with layers=, or pass strict=False to skip such calls",
)
"""What was seen and what to do where an axis of tokens is summed in the product of q and k."""


def kernel_refusal(name: str) -> tuple[str, str]:
    """What was seen and what to do where a fused kernel other than PyTorch's own is called."""
    return (
        f"the kernel {name} keeps its probabilities to itself",
        'use the "sdpa" or "eager" implementation of attention',
    )


def _asked(plane: Tensor) -> Tensor:
    """The plane of tokens after they were queries: padding among them is no constant any more."""
    if not bool((compact(plane) == PADDING).any()):
        return plane
    return torch.where(plane == PADDING, STALE, plane)


class Recorder:
    """The attention calls of one forward pass, in execution order."""

    def __init__(
        self, transfer: Transfer, scope: Scope, examples: int, *, copies: bool = False,
        witness: Witness | None = None,
    ) -> None:  # fmt: skip
        self.records: list[AttentionRecord] = []
        self.refusals: list[Refusal] = []
        self.softmaxes: list[Softmax] = []
        self.streams = TokenStreams(transfer.spaces)
        self.in_training: dict[str, None] = {}
        self.witness = witness
        self._calls = 0
        self._met: dict[int, Softmax] = {}
        self._transfer = transfer
        self._scope = scope
        self._examples = examples
        self._copies = copies

    def operands(self, *tensors: Tensor) -> Operands:
        """The tensors of a call, to be read after the forward pass."""
        return Operands.of(*tensors, copies=self._copies)

    def saved(self, *tensors: Tensor) -> Operands | Saved:
        """The same, kept by autograd where it records."""
        if not torch.is_grad_enabled():
            return self.operands(*tensors)
        return Saved(*tensors, copies=self._copies)

    def refuse(self, seen: str, advice: str) -> None:
        """Note that the running module made a call that cannot be explained."""
        self.refusals.append(Refusal(self._next_index(), *self._scope.current(), seen, advice))

    def _next_index(self) -> int:
        self._calls += 1
        return self._calls - 1

    def refuse_kernel(self, name: str) -> None:
        """Note that a fused kernel other than PyTorch's own was called."""
        self.refuse(*kernel_refusal(name))

    def record(
        self, source: Explicit | Fused, at: Tensor, result: Tensor, plane: Tensor | None,
        queries: Tensor, keys: Tensor, factors: tuple[frozenset[int], ...],
        softmax: Softmax | None,
    ) -> int | None:  # fmt: skip
        """Make a record of a call whose result is `result` and whose gradient is taken `at`.

        Returns:
            Its index, or `None` if it cannot be explained.
        """
        if plane is not None:
            memory = self._transfer.spaces.memory
            plane = memory(_asked, plane)
            plane = memory.one(plane)  # the next layer does the same to the same tokens
        planes = () if plane is None else (plane,)
        lost = "" if planes else "attention"
        passed = Shadow(Role.TOKENS, planes, factors[0] | factors[1], data=True, lost=lost)
        self._transfer.shadows[result] = passed
        try:
            if not torch.is_grad_enabled():
                raise Unreadable(
                    "gradients are switched off here (reentrant checkpoint, custom "
                    "autograd.Function or inference_mode inside the model)",
                    "use torch.utils.checkpoint with use_reentrant=False, or torch.no_grad",
                )
            groups = self._transfer.spaces.memory.of(
                (queries, keys), "groups", lambda: self._groups(queries, keys)
            )
            if groups is None:
                place = self._scope.current()
                seen = "attention between tokens of an argument that all examples share"
                advice = "give every example its own if its tokens are to be explained"
                self.refusals.append(
                    Refusal(self._next_index(), *place, seen, advice, harmless=True)
                )
                return None
        except Unreadable as problem:
            self.refuse(problem.seen, problem.advice)
            return None
        index = self._next_index()
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - no use of it that a mode may count
            edge = get_gradient_edge(result)
        self.records.append(
            AttentionRecord(
                index, *self._scope.current(), source, get_gradient_edge(at),
                edge, Tap(at, source.operands), groups.query_tokens,
                groups.key_tokens, groups.examples, groups.pick, groups.plain, groups.padded,
                factors[0], factors[1],
            )
        )  # fmt: skip
        self._transfer.queried[index] = groups.query_tokens
        if softmax is not None:
            self._met[index] = softmax
        self._transfer.shadows[result] = passed._replace(
            ancestors=frozenset([index]), calls=of_call(index, result.shape)
        )
        return index

    def _groups(self, queries: Tensor, keys: Tensor) -> Groups | None:
        """The call's tokens, sorted into examples and heads; `None` if all examples share them.

        Notes that they were read and asked, which once is enough.

        Raises:
            Unreadable: if the call cannot be explained.
        """
        self._check_lost(queries)
        self._check_lost(keys)
        if self._shared(queries) and self._shared(keys):
            return None
        spaces = self._transfer.spaces
        groups = group_heads(queries, keys, spaces, self._examples)
        self._check_present(groups.query_tokens, groups.key_tokens)
        spaces.read(groups.query_tokens)
        spaces.read(groups.key_tokens)
        spaces.ask(groups.query_tokens)
        return groups

    def _check_lost(self, rows: Tensor) -> None:
        spaces = self._transfer.spaces
        found = spaces.indices(rows)
        lost = dict.fromkeys(spaces[i].name for i in found if spaces[i].kind == "unknown")
        if lost:
            raise Unreadable(
                f"its tokens could not be followed through {', '.join(lost)}",
                "write that step with operations that keep tokens apart, or leave the call out "
                "with layers=",
            )

    def _shared(self, rows: Tensor) -> bool:
        spaces = self._transfer.spaces
        found = spaces.indices(rows)
        return bool(found) and all(spaces[i].kind == "shared" for i in found)

    def _check_present(self, queries: Tensor, keys: Tensor) -> None:
        spaces = self._transfer.spaces
        for ids, which in ((queries, "queries"), (keys, "keys")):
            if not spaces.indices(ids):
                raise Unreadable(
                    f"its {which} are tokens of no input and no parameter, but constants",
                    "leave the call out with layers=, or pass strict=False to skip such calls",
                )

    def close(self) -> list[AttentionRecord]:
        """End of the forward pass: the readable records, with the names of their streams."""
        dropped = {i for i, softmax in self._met.items() if softmax.products > 1}
        for record in self.records:
            pool = self._transfer.pools.get(record.index)
            if pool is not None and pool.problem is not None:
                dropped.add(record.index)
                place = record.module, record.module_type
                self.refusals.append(Refusal(record.index, *place, *pool.problem))
        for softmax in self.softmaxes:
            if softmax.products:
                continue
            seen = ""
            if softmax.has_logits or (softmax.in_attention_module and softmax.over_tokens):
                seen = "a softmax over tokens never meets values in a product"
            elif softmax.gates:
                seen = "a softmax over tokens weighs them, and their sum is not taken next"
            elif softmax.in_attention_module and softmax.of_tokens:
                seen = (
                    "each token's softmax weighs values that are no product with it (deformable "
                    "attention)"
                )
            if seen:
                advice = "the method needs probabilities that multiply values"
                self.refusals.append(
                    Refusal(
                        self._next_index(), softmax.module, softmax.module_type, seen, advice
                    )
                )  # fmt: skip
        self.records = [r for r in self.records if r.index not in dropped]
        self.streams.trace([ids for r in self.records for ids in (r.key_tokens, r.query_tokens)])
        meetings = [self.streams.meet(r.query_tokens, r.key_tokens) for r in self.records]
        self.streams.close(
            [(r.module, ids) for r in self.records for ids in (r.key_tokens, r.query_tokens)]
        )
        layers = self._layers()
        heads = {r.index: r.heads for r in self.records}
        self.records = [
            replace(
                r,
                query_stream=self.streams.having(meeting.queries).name,
                key_stream="+".join(
                    dict.fromkeys(self.streams.having(keys).name for keys in meeting.keys)
                ),
                meeting=meeting,
                layer=min(layers[r.index]),
                share=r.heads / sum(heads[i] for i in layers[r.index]),
            )
            for r, meeting in zip(self.records, meetings, strict=True)
        ]
        return self.records

    def _layers(self) -> dict[int, tuple[int, ...]]:
        """The calls of each call's layer: itself, or all heads that are called one by one."""
        alike: dict[Hashable, list[int]] = {}
        for record in self.records:
            asking = tuple(torch.unique(record.query_tokens).tolist())
            alike.setdefault((asking, record.query_ancestors), []).append(record.index)
        return self._transfer.heads.layers(list(alike.values()))
