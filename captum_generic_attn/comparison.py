"""Several attribution methods on the same inputs: ours and Captum's, side by side.

`compare` runs what it is given, each method with the arguments that it needs, and returns a
`Comparison`: named results with their seconds, which `visualization.comparison_figure` draws and
which can be saved. `all_methods` makes the usual ones for a model.
"""

from __future__ import annotations

import contextlib
import inspect
import reprlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from captum.attr import (
    Attribution,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LimeBase,
    Saliency,
)
from torch import Tensor

from captum_generic_attn.baselines import METHODS
from captum_generic_attn.extras import needed
from captum_generic_attn.files import tensors as saved
from captum_generic_attn.progress import bar

Attributions = Tensor | tuple[Tensor, ...]
_ENTRY = "comparison"  # of a saved file


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """The attributions of several methods for the same inputs, from `compare`.

    `attributions` maps the names of the methods to what they returned, `seconds` to how long they
    took, `refused` those that could not be run to the reason; `settings` says what some of them
    were given besides inputs and target.

    Example:
        >>> import timm
        >>> from captum.attr import Saliency
        >>> from captum_generic_attn import GenericAttention, compare
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> methods = {"ours": GenericAttention(model), "Saliency": Saliency(model)}
        >>> found = compare(methods, torch.rand(1, 3, 160, 160), target=1)
        >>> found["ours"].shape, list(found.attributions)
        (torch.Size([1, 3, 160, 160]), ['ours', 'Saliency'])
    """

    attributions: Mapping[str, Attributions]
    seconds: Mapping[str, float]
    refused: Mapping[str, str]
    settings: Mapping[str, str]

    def __getitem__(self, name: str) -> Attributions:
        if name in self.attributions:
            return self.attributions[name]
        if name in self.refused:
            raise KeyError(f"{name} was refused: {self.refused[name]}")
        raise KeyError(f"no method is named {name!r}; there are: {', '.join(self.attributions)}")

    def __repr__(self) -> str:
        width = max(map(len, [*self.attributions, *self.refused]), default=0)
        took = {name: f"{seconds:.3g} s" for name, seconds in self.seconds.items()}
        lines = [f"  {name:{width}}  {took.get(name, 'not timed')}" for name in self.attributions]
        lines += [f"  {name:{width}}  refused: {why}" for name, why in self.refused.items()]
        return "\n".join([f"Comparison of {len(self.attributions)} methods", *lines])

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles: read-only mappings know neither."""
        return _rebuilt, tuple(
            dict(part) for part in (self.attributions, self.seconds, self.refused, self.settings)
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a safetensors file.

        Args:
            path: where to; an existing file is replaced.
        """
        tensors: dict[saved.Key, Tensor] = {
            ("attribution", name, part): tensor.detach().cpu()
            for name, found in self.attributions.items()
            for part, tensor in enumerate(found if isinstance(found, tuple) else (found,))
        }
        plain = {
            "inputs": {
                name: len(found) if isinstance(found, tuple) else None
                for name, found in self.attributions.items()
            },
            "seconds": dict(self.seconds),
            "refused": dict(self.refused),
            "settings": dict(self.settings),
        }
        saved.write(path, _ENTRY, plain, tensors)

    @staticmethod
    def load(path: str | PathLike[str]) -> Comparison:
        """Read what `save` wrote.

        Args:
            path: a file written by `save`.

        Returns:
            An equal `Comparison`, on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is no saved `Comparison`, or one of a newer format; the message
                says what was seen in it, and what was expected.
        """
        with saved.opened(path, _ENTRY) as file:
            inputs, seconds, refused, settings = file.plain.fields(
                "inputs", "seconds", "refused", "settings"
            )
            attributions: dict[str, Attributions] = {}
            for name, number in inputs.items().items():
                count = 1 if number.value is None else number.whole(0)
                found = tuple(
                    file.tensor(("attribution", name, i), saved.NUMBERS) for i in range(count)
                )
                attributions[name] = found[0] if number.value is None else found
            if not attributions.keys() >= seconds.items().keys():
                raise seconds.wrong(f"seconds of {reprlib.repr([*attributions])}")
            return _rebuilt(
                attributions,
                {name: value.seconds() for name, value in seconds.items().items()},
                {name: value.text() for name, value in refused.items().items()},
                {name: value.text() for name, value in settings.items().items()},
            )


def _rebuilt(
    attributions: dict[str, Attributions], seconds: dict[str, float], refused: dict[str, str],
    settings: dict[str, str],
) -> Comparison:  # fmt: skip
    return Comparison(
        MappingProxyType(attributions),
        MappingProxyType(seconds),
        MappingProxyType(refused),
        MappingProxyType(settings),
    )


def all_methods(forward_func: Callable[..., Any]) -> dict[str, Attribution]:
    """All methods of this package and the usual ones of Captum for a model, by name.

    Args:
        forward_func: a module, or a function that calls one.

    Example:
        >>> import torch
        >>> list(all_methods(torch.nn.Linear(2, 2)))[:3]
        ['Generic attention', 'Raw attention', 'Attention rollout']
    """
    return {name: method(forward_func) for name, method in METHODS.items()} | {
        "Saliency": Saliency(forward_func),
        "Input × gradient": InputXGradient(forward_func),
        "Integrated gradients": IntegratedGradients(forward_func),
        "Gradient SHAP": GradientShap(forward_func),
        "Kernel SHAP": KernelShap(forward_func),
    }


def compare(
    methods: Mapping[str, Attribution] | Sequence[Attribution],
    inputs: Tensor | tuple[Tensor, ...],
    target: Any = None,
    additional_forward_args: object = None,
    *,
    baselines: Any = None,
    feature_mask: Any = None,
    n_steps: int = 50,
    n_samples: int = 300,
    seed: int = 0,
    strict: bool = True,
    show_progress: bool = False,
) -> Comparison:
    """Run several attribution methods on the same inputs, each with the arguments that it needs.

    Args:
        methods: attribution objects, ours and Captum's, by name; or a sequence, whose names are
            those that Captum gives them.
        inputs: a tensor or a tuple of tensors, batch first.
        target: the explained score, as in `GenericAttention.attribute`.
        additional_forward_args: further arguments of the model.
        baselines: what an absent feature is for methods that compare with one (integrated
            gradients, SHAP); `None`: zeros.
        feature_mask: for methods that leave features out: which elements are one feature, in the
            shape of one example or of `inputs`; `None`: patches for images (`patch_mask`), all
            features of a token or region together.
        n_steps: of integrated gradients.
        n_samples: evaluations of SHAP by sampling; gradient SHAP takes a tenth of them.
        seed: of PyTorch's and NumPy's random numbers for each method; both are restored afterwards.
        strict: whether a method that fails raises, or is listed in `refused` with a warning.
        show_progress: whether a bar on stderr counts the methods.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: if there are no methods, or two of one name.
        TypeError: if one of them is no Captum attribution.
        ImportError: if scikit-learn is missing, by which Captum fits LIME and kernel SHAP.

    Example:
        >>> from captum_generic_attn import GenericAttention, RawAttention, compare
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> model = lambda tokens: layer(tokens)[:, 0]
        >>> found = compare([GenericAttention(model), RawAttention(model)], torch.rand(1, 4, 8), 3)
        >>> list(found.attributions)
        ['Generic Attention', 'Raw Attention']
    """
    named = _named(methods)
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    alone = not isinstance(inputs, tuple)
    given = {
        "baselines": _zeros(inputs) if baselines is None else baselines,
        "feature_mask": feature_mask,
        "n_steps": n_steps,
        "additional_forward_args": additional_forward_args,
    }
    if feature_mask is None:
        masks = _feature_masks(tensors)
        given["feature_mask"] = masks[0] if alone else masks
    if strict:
        for method in named.values():
            _check_libraries(method)
    attributions: dict[str, Attributions] = {}
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    with bar("comparing", len(named), show=show_progress) as advance:
        for name, method in named.items():
            start = time.perf_counter()
            try:
                _check_libraries(method)
                found = run(method, inputs, target, {**given, **_samples(method, n_samples)}, seed)
            except (
                ImportError,
                ValueError,
                TypeError,
                RuntimeError,
                AssertionError,
                NotImplementedError,
            ) as error:
                if strict:
                    raise
                refused[name] = str(error).split("\n")[0] or type(error).__name__
                warnings.warn(f"{name} is left out: {error}", UserWarning, stacklevel=2)
            else:
                attributions[name] = found
                seconds[name] = time.perf_counter() - start
            advance()
    settings = {
        "baselines": "zeros" if baselines is None else "given",
        "feature_mask": "patches and tokens" if feature_mask is None else "given",
        "n_steps": str(n_steps),
        "n_samples": str(n_samples),
        "seed": str(seed),
    }
    return _rebuilt(attributions, seconds, refused, settings)


def patch_mask(shape: Sequence[int], patches: int = 8) -> Tensor:
    """Which patch each pixel belongs to, for methods that leave whole patches out.

    Args:
        shape: `[..., H, W]`.
        patches: how many stand along the shorter side.

    Returns:
        `[1, 1, H, W]` integers, one for each patch.

    Example:
        >>> patch_mask((3, 4, 4), 2)[0, 0]
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1],
                [2, 2, 3, 3],
                [2, 2, 3, 3]])
    """
    height, width = shape[-2:]
    side = max(1, -(-min(height, width) // patches))
    rows = torch.arange(height) // side
    columns = torch.arange(width) // side
    return (rows[:, None] * (int(columns[-1]) + 1) + columns)[None, None]


def _named(methods: Mapping[str, Attribution] | Sequence[Attribution]) -> dict[str, Attribution]:
    if isinstance(methods, Mapping):
        named = dict(methods)
    else:
        named = {}
        for method in methods:
            name = method.get_name() if isinstance(method, Attribution) else ""
            if name in named:
                raise ValueError(
                    f"two methods are named {name!r}: pass a mapping from names to methods"
                )
            named[name] = method
    if not named:
        raise ValueError("there is no method to run")
    for name, method in named.items():
        if not isinstance(method, Attribution):
            raise TypeError(f"{name or 'a method'} is no Captum attribution but {type(method)}")
    return named


def _check_libraries(method: Attribution) -> None:
    """Check for scikit-learn first: linear models would fail only after they have sampled."""
    if isinstance(method, LimeBase):
        needed("sklearn")


def run(
    method: Attribution, inputs: Tensor | tuple[Tensor, ...], target: Any,
    given: Mapping[str, Any], seed: int,
) -> Attributions:  # fmt: skip
    """Run one method with those of the given arguments that it takes.

    Args:
        method: ours or Captum's.
        inputs: a tensor or a tuple of tensors; the method gets copies.
        target: the explained score.
        given: arguments of `attribute` by name; those that the method does not know are left out.
        seed: of PyTorch's and NumPy's random numbers, which are afterwards as they were.

    Returns:
        What the method returned, detached.

    Example:
        >>> from captum.attr import InputXGradient
        >>> square = InputXGradient(lambda x: (x**2).sum(1))
        >>> run(square, torch.tensor([[3.0]]), None, {"n_steps": 9}, seed=0)
        tensor([[18.]])
    """
    known = inspect.signature(method.attribute).parameters
    arguments = {key: value for key, value in given.items() if key in known}
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):  # handed on, as by NoiseTunnel
        arguments["additional_forward_args"] = given["additional_forward_args"]
    several = inputs if isinstance(inputs, tuple) else (inputs,)
    fresh = tuple(tensor.detach().clone() for tensor in several)
    with _seeded(seed, fresh), warnings.catch_warnings():
        # Captum tells of gradients that it turns on for the inputs: these are copies.
        warnings.filterwarnings("ignore", message="Input Tensor .* did not already require")
        found: object = method.attribute(
            fresh if isinstance(inputs, tuple) else fresh[0], target=target, **arguments
        )
    if isinstance(found, tuple):
        return tuple(part.detach() for part in found)
    return cast(Tensor, found).detach()


@contextlib.contextmanager
def _seeded(seed: int, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Seed the random numbers of PyTorch and NumPy; Captum draws from both."""
    numpys = np.random.get_state()  # noqa: NPY002 - what Captum uses
    with torch.random.fork_rng([t.device for t in tensors if t.is_cuda]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(numpys)  # noqa: NPY002


def _samples(method: Attribution, n_samples: int) -> dict[str, int]:
    if isinstance(method, GradientShap):  # a gradient each
        return {"n_samples": max(1, n_samples // 10)}
    return {"n_samples": n_samples}


def _zeros(inputs: Tensor | tuple[Tensor, ...]) -> Any:
    if isinstance(inputs, tuple):
        return tuple(torch.zeros_like(t) for t in inputs)
    return torch.zeros_like(inputs)


def _feature_masks(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A mask for each input; features of different inputs have different numbers."""
    masks: list[Tensor] = []
    for tensor in tensors:
        first = int(masks[-1].max()) + 1 if masks else 0
        masks.append(_feature_mask(tensor) + first)
    return tuple(masks)


def _feature_mask(tensor: Tensor) -> Tensor:
    """Patches for images; for other inputs the entries of the axis behind the batch."""
    if tensor.ndim == 4:
        return patch_mask(tensor.shape).to(tensor.device)
    places = torch.arange(tensor.shape[1] if tensor.ndim > 1 else 1, device=tensor.device)
    return places.view(1, -1, *[1] * (tensor.ndim - 2)) if tensor.ndim > 1 else places
