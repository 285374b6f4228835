"""Pauses `torch.compile`, which cannot trace a capture."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

import torch


class _Pause:
    """Lets compiled modules run uncompiled while captures run.

    The stance of the compiler belongs to the whole process. Captures in several threads share one
    pause: the first sets the stance, the last restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._undo.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._undo.close()


_pause = _Pause()


def paused_compiler() -> contextlib.AbstractContextManager[None]:
    """A context in which compiled modules run uncompiled; without Dynamo loaded there are none."""
    return _pause() if "torch._dynamo" in sys.modules else contextlib.nullcontext()
