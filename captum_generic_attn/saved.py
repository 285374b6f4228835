"""Results in files: tensors under structured keys, and beside them what is no tensor, as JSON.

`relevance` and `compare` write their objects with it, in safetensors' format: nothing in a file is
ever run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

Key = tuple[Any, ...]


def write(
    path: str | PathLike[str], entry: str, plain: object, tensors: Mapping[Any, Tensor]
) -> None:
    """Write tensors, and the rest as one entry of metadata: equal objects make equal files.

    Args:
        path: where to; an existing file is replaced.
        entry: what kind of object it is.
        plain: what is no tensor.
        tensors: by tuples of numbers, words and truth values.
    """
    from safetensors.torch import save_file

    contiguous = {
        json.dumps(list(key)): tensor.clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    save_file(contiguous, path, {entry: json.dumps(plain)})


def read(path: str | PathLike[str], entry: str) -> tuple[Any, dict[Key, Tensor]]:
    """What `write` wrote: the plain part, and tensors on the CPU.

    Args:
        path: the file.
        entry: what kind of object it must hold.

    Raises:
        ValueError: if it holds none.
    """
    from safetensors import SafetensorError, safe_open

    name = entry.capitalize()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if entry not in metadata:
                raise ValueError(f"{path} holds no saved {name}: its metadata has {[*metadata]}")
            plain = json.loads(metadata[entry])
            tensors = {
                tuple(json.loads(key)): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 - no mapping
            }
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no saved {name}: {error}") from error
    return plain, tensors
