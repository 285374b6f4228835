"""Finds explained tokens that are padding, from the masks among the arguments and the attention.

A tensor of zeros and ones may be an attention mask, of either meaning, or token types, or anything
else. Attention decides: no token attends to padding, not even padding itself. So a token is padding
if in every call it attends only to tokens that have the other value of the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_generic_attn.capture import AttentionRecord, Capture
from captum_generic_attn.capture.blocks import Blocks
from captum_generic_attn.capture.tracking.operations import tensors_in


def token_masks(arguments: object, examples: int) -> list[Tensor]:
    """The arguments of a model that may be masks over tokens, `[B, N]`, True for ones.

    Example:
        >>> ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])
        >>> token_masks((ids, mask), 1)
        [tensor([[ True,  True, False]])]
    """
    found = []
    for tensor in tensors_in(arguments):
        if tensor.ndim != 2 or len(tensor) != examples or tensor.is_complex():
            continue
        ones = tensor == 1
        if bool((ones | (tensor == 0)).all()) and bool((ones.any(1) & ~ones.all(1)).any()):
            found.append(ones.cpu())
    return found


@dataclass(eq=False)
class _Doubt:
    """Examples whose explained tokens may be padding according to one mask.

    `row` `[B]` is the position of an explained token in its stream; `alike` and `others`
    `[B, size]` are True for the tokens with the same value of the mask, and with the other. `left`
    `[B]` is True for the examples that no call has cleared, `seen` for those that some call covers.
    """

    row: Tensor
    alike: Tensor
    others: Tensor
    left: Tensor
    seen: Tensor


class Padding:
    """Finds the examples whose explained tokens are all padding.

    `explain` sets the rows of a stream, `see` takes the calls in the order of the backward pass;
    calls of a stream that come before its rows are not used.
    """

    def __init__(self, capture: Capture, masks: Sequence[Tensor]) -> None:
        self._capture = capture
        self._masks = masks
        self._doubts: dict[str, list[_Doubt]] = {}

    def explain(self, stream: str, rows: Tensor) -> None:
        """Set the weights `[B, size]` of the explained rows of a stream."""
        if self._masks:
            self._doubts[stream] = list(self._doubted(stream, rows.cpu() != 0))

    def _doubted(self, name: str, explained: Tensor) -> Iterator[_Doubt]:
        """The masks in which all explained tokens of an example have one value, some token not."""
        spaces = self._capture.spaces
        (stream,) = (s for s in self._capture.streams if s.name == name)
        for mask in self._masks:
            value = torch.full(explained.shape, -1)
            for index, places in stream.places.items():
                space = spaces[index]
                if space.kind == "token" and (space.examples, space.size) == mask.shape:
                    there = places >= 0
                    value[:, places[there]] = mask[:, there].long()
            row = explained.long().argmax(1)
            own = value.gather(1, row[:, None])
            alike, others = value == own, value == 1 - own
            left = explained.any(1) & (own[:, 0] >= 0) & (alike | ~explained).all(1) & others.any(1)
            if bool(left.any()):
                yield _Doubt(row, alike, others, left, torch.zeros_like(left))

    def see(self, record: AttentionRecord, blocks: Blocks) -> None:
        """Look up which tokens the explained token attends to in a call."""
        doubts = [d for d in self._doubts.get(record.query_stream, ()) if bool(d.left.any())]
        if not doubts or record.stream_pair.is_cross_attention:
            return
        positions, owner = self._capture.streams.positions, record.examples
        queries, keys = positions(record.query_tokens), positions(record.key_tokens)
        for doubt in doubts:
            row = doubt.row[owner][:, None]
            asking = queries == row
            there = asking.any(1) & (keys == row).any(1)
            if not bool(there.any()):
                continue
            place = asking.long().argmax(1).repeat_interleave(record.heads)[:, None]
            attention = blocks.select(place).probabilities()
            attended = (attention > 0).view(*record.head_index.shape, -1).any(1).cpu()
            alike, others = (
                (attended & (keys >= 0) & side[owner].gather(1, keys.clamp(min=0))).any(1)
                for side in (doubt.alike, doubt.others)
            )
            doubt.seen[owner[there]] = True
            doubt.left[owner[there & (alike | ~others)]] = False

    def found(self) -> dict[str, list[int]]:
        """The examples whose explained tokens are padding, by stream."""
        found: dict[str, list[int]] = {}
        for stream, doubts in self._doubts.items():
            examples = torch.zeros(0, dtype=torch.long)
            for doubt in doubts:
                examples = torch.cat([examples, (doubt.left & doubt.seen).nonzero().flatten()])
            if len(examples):
                found[stream] = sorted(set(examples.tolist()))
        return found


def message(padded: Mapping[str, Sequence[int]]) -> str:
    """The warning about examples whose explained tokens are padding, by stream.

    Example:
        >>> print(message({"input_ids": [1]}).split(": ")[1].split(".")[0])
        example [1] in stream 'input_ids'
    """
    listed = ", ".join(f"example {[*of]} in stream {name!r}" for name, of in padded.items())
    return (
        f"the explained token is padding, as a mask among the arguments says: {listed}. A position "
        "that counts from the end, as in target=(-1, class) or rows=-1, is one of padding where "
        "texts are padded on the right: name the last token of each text, target=[(length - 1, "
        "class), ...] or rows=lengths - 1, or pad on the left"
    )
