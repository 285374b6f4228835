"""The models of the census: lists fixed by rules that stand in the first lines of each module.

`census.py` examines every entry; `test_census.py` says what must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Built:
    """A model ready to be explained: `forward(*inputs, *additional)`, and which score.

    `fused_off` switches the model to attention that is written out, where it can; the model
    examined before that has fused attention.
    """

    forward: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    additional: tuple[Any, ...] = ()
    target: Any = 1
    output: Any = None
    fused_off: Callable[[], None] | None = None


@dataclass(frozen=True)
class Entry:
    """One model of the census.

    `refusal` is a part of the message that refuses it, empty where it must give maps. `why` says
    why its attention is not, or not throughout, softmax attention between tokens: what is refused
    without such a reason counts against us. `streams` are the names to be expected, in any order.
    `blends`: the probabilities of a call are a mixture of several softmaxes. `tolerance` is that of
    fused against written-out attention, relative to the maximum, in float64.
    """

    library: str
    name: str
    build: Callable[[], Built]
    refusal: str = ""
    why: str = ""
    streams: tuple[str, ...] = ()
    crosses: bool = False
    blends: bool = False
    tolerance: float = 1e-6
    heavy: bool = False

    @property
    def label(self) -> str:
        """Library and name."""
        return f"{self.library}: {self.name}"


def pictures(size: int, count: int = 2, channels: int = 3) -> Tensor:
    """Pictures of different content."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(count, channels, size, size, generator=generator)


def ids(length: int = 8, count: int = 2, highest: int = 60) -> Tensor:
    """Token ids of different content, none of them special."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(5, highest, (count, length), generator=generator)


def mask(length: int = 8, count: int = 2, padded: int = 2) -> Tensor:
    """1 for tokens, 0 for the padding at the end of the last example."""
    kept = torch.ones(count, length, dtype=torch.long)
    kept[-1, length - padded :] = 0
    return kept


def entries() -> list[Entry]:
    """All of them."""
    from zoo.models import (
        huggingface,
        huggingface_by_hand,
        huggingface_joint,
        timm_models,
        vision,
    )

    lists = (timm_models, vision, huggingface, huggingface_by_hand, huggingface_joint)
    return [entry for module in lists for entry in module.ENTRIES]
