"""The libraries that metrics are computed with; they come with the extra `metrics`."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str) -> Any:
    """Import a module of an optional library.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.partition('.')[0]} is needed here: pip install 'captum-generic-attn[metrics]'"
        ) from error
