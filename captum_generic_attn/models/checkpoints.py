"""Weights of models: read from files safely, or found to be out of reach without a long wait."""

from __future__ import annotations

import socket
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from torch import Tensor

from captum_generic_attn.errors import UnavailableWeightsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_ADVICE = "Give a file of weights with --weights FILE (safetensors or torch.save)."


@contextmanager
def pretrained_weights(name: str) -> Iterator[None]:
    """Turn any error of a library that fetches the weights of `name` into a clear one."""
    try:
        yield
    # Downloads fail with the exceptions of whichever HTTP client is underneath: no list of them
    # would stay right.
    except Exception as error:
        raise UnavailableWeightsError(
            f"no pretrained weights for {name}: {first_line(error)}. {_ADVICE}"
        ) from error


def cached_file(repository: str, file: str | None = None) -> str | None:
    """The weights of a timm repository if they are on disk, `None` if they can be downloaded.

    The hub's client tries for the better part of a minute before it gives up on a host that does
    not answer: with no connection, the answer should come at once.

    Raises:
        UnavailableWeightsError: they are neither.
    """
    if host_answers(hub_endpoint()):
        return None
    from huggingface_hub import try_to_load_from_cache

    for name in [file] if file else ["model.safetensors", "pytorch_model.bin"]:
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return path
    raise UnavailableWeightsError(
        f"no pretrained weights: {repository} is not on this machine, and the Hugging Face hub "
        f"cannot be reached. {_ADVICE}"
    )


def hub_endpoint() -> str:
    """The address from which Hugging Face's client downloads."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def host_answers(url: str, seconds: float = 5.0) -> bool:
    """Whether the host of `url` accepts a connection; assumed behind a proxy."""
    parts = urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return True
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        socket.create_connection((str(parts.hostname), port), timeout=seconds).close()
    except OSError:
        return False
    return True


def from_hugging_face(
    name: str, kind: str, model_class: str, beside: str, beside_class: str
) -> tuple[Any, Any, str]:
    """A trained transformers model and its processor, from a folder or from the hub.

    Args:
        name: a folder that `save_pretrained` wrote, or the id of the hub.
        kind: what the model is, for messages.
        model_class: the name of the class of transformers that loads it.
        beside: what belongs to it, for messages.
        beside_class: the name of the class that loads that.

    Returns:
        The model, in float32 and evaluation mode; what belongs to it; and where they are from, in
        words.

    Raises:
        UnavailableWeightsError: they cannot be loaded, or the model was never trained.
        ImportError: transformers is not installed.
    """
    with _library(name, f"{kind} with its {beside}") as (transformers, options, what):
        model, report = getattr(transformers, model_class).from_pretrained(
            name, output_loading_info=True, **options
        )
        companion = getattr(transformers, beside_class).from_pretrained(name, **options)
    if report["missing_keys"]:
        # transformers fills them at random: a model that was never trained.
        raise UnavailableWeightsError(
            f"{what} holds no trained {kind}: weights are missing for "
            f"{', '.join(sorted(report['missing_keys'])[:5])}"
        )
    return model.float().eval(), companion, what


def is_hugging_face(name: str) -> bool:
    """Whether a name is that of a folder or of a model of the hub (`owner/model`).

    Example:
        >>> is_hugging_face("openai/clip-vit-base-patch32"), is_hugging_face("timm/test_vit")
        (True, False)
    """
    owner, slash, _ = name.partition("/")
    return Path(name).is_dir() or (bool(slash) and owner not in {"timm", "torchvision"})


def hugging_face_config(name: str) -> Any:
    """The configuration of a model of transformers, from a folder or from the hub.

    Raises:
        UnavailableWeightsError: there is none.
        ImportError: transformers is not installed.
    """
    with _library(name, "model") as (transformers, options, _):
        return transformers.AutoConfig.from_pretrained(name, **options)


def hugging_face_classes(table: str, config: Any) -> set[str]:
    """The classes for a type of model in one of transformers' own tables of which class does what.

    Args:
        table: its name in `transformers.models.auto.modeling_auto`.
        config: of a model, from `hugging_face_config`.
    """
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, table).get(config.model_type, ())
    return {found} if isinstance(found, str) else set(found)


@contextmanager
def _library(name: str, wanted: str) -> Iterator[tuple[Any, dict[str, bool], str]]:
    """transformers, how its `from_pretrained` is to look for `name`, and where that is, in words;
    what goes wrong meanwhile becomes an error about what is `wanted`.
    """
    transformers = require_transformers(f"{name!r} is looked for on the Hugging Face hub, which")
    folder = Path(name).is_dir()
    options = {"local_files_only": not folder and not host_answers(hub_endpoint())}
    what = f"the folder {name!r}" if folder else f"{name!r} of the Hugging Face hub"
    advice = "" if folder else "; a folder that save_pretrained wrote can be given in its place"
    try:
        yield transformers, options, what
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UnavailableWeightsError(
            f"no {wanted} can be loaded from {what}{advice}. "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def require_transformers(what: str) -> Any:
    """The library, or an `ImportError` that says how `what` gets the transformers that it needs."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{what} needs transformers: pip install 'captum-generic-attn[hf]'"
        ) from error
    return transformers


def require_host(url: str) -> None:
    """Raises `ConnectionError` if the host of `url` takes no connection."""
    if not host_answers(url):
        raise ConnectionError(f"{urlsplit(url).hostname} cannot be reached")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the wrapping that training scripts add."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Torch's reader stumbles over damaged files in every way. The libraries' own words are left
    # out: torch's advise to switch its safety off.
    except Exception as error:
        raise UnavailableWeightsError(
            f"{str(path)!r} holds no weights that can be read safely: safetensors, or what "
            "torch.save makes of model.state_dict(), is needed"
        ) from error
    for wrapping in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapping), dict):
            state = state[wrapping]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UnavailableWeightsError(
            f"{str(path)!r} holds no state dict, but {type(state).__name__}: "
            "save model.state_dict()"
        )
    return {name.removeprefix("module."): value for name, value in state.items()}


def fill(model: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    """Load the tensors of the file `path` into the model called `name`; all must fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        details = str(error).partition("\n")[2].strip()
        raise UnavailableWeightsError(
            f"the weights in {str(path)!r} do not fit {name}: {_shortened(details)}"
        ) from error


def first_line(error: BaseException) -> str:
    """An error's first line, at most 300 characters of it."""
    return _shortened(str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__)


def _shortened(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[: length - 2] + " …"
