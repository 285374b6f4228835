"""A cache of answers about tensors, keyed by the identity of the tensors.

The layers of a model do the same to the same tokens, so most questions about token ids are asked
again in each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from captum_generic_attn.tokens.ids import fingerprint

P = ParamSpec("P")
T = TypeVar("T")


class IdentityCache:
    """Answers about token ids within one forward pass.

    Token ids are never written to, and the cache holds them together with the answer. So the `id`
    of a tensor is not used again, and no answer goes stale.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[object, Any]] = {}
        self._ids: dict[Hashable, Tensor] = {}

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args, **kwargs)`, a pure function; arguments are tensors or can be hashed."""
        named = [id(value) if isinstance(value, Tensor) else value for value in args]
        key = function, *named, *kwargs.items()
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = args, function(*args, **kwargs)
        found: T = known[1]
        return found

    def of(self, token_ids: tuple[Tensor, ...], question: Hashable, answer: Callable[[], T]) -> T:
        """The value of `answer()`, kept under the question and the identity of the tensors."""
        key = question, *map(id, token_ids)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = token_ids, answer()
        found: T = known[1]
        return found

    def one(self, ids: Tensor) -> Tensor:
        """The first tensor that was given here with these ids, about which answers are known."""
        return self._ids.setdefault(fingerprint(ids), ids)


def hashable(value: object) -> Hashable:
    """Arguments of an operation as a question for `IdentityCache`.

    Raises:
        TypeError: if a tensor is among them, which may hold something else the next time.
    """
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(hashable, value)
    if isinstance(value, Mapping):
        return tuple((key, hashable(item)) for key, item in value.items())
    if isinstance(value, slice):
        return "slice", value.start, value.stop, value.step
    if isinstance(value, Tensor):
        raise TypeError("a tensor is no question")
    hash(value)
    return value
