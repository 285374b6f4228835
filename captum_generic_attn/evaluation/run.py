"""Runs an evaluation, from its plan to its report, by batch, method and metric."""

from __future__ import annotations

import platform
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from captum.attr import Attribution, KernelShap
from torch import Tensor

from captum_generic_attn.baselines import Lrp
from captum_generic_attn.captum_api.base import ModelAttribution
from captum_generic_attn.comparison import all_methods, compare, patch_mask
from captum_generic_attn.evaluation.batch import Batch, Examples
from captum_generic_attn.evaluation.images import ImageSet
from captum_generic_attn.evaluation.plan import ImageData, Plan
from captum_generic_attn.evaluation.report import Report
from captum_generic_attn.evaluation.scores import METRICS, figures
from captum_generic_attn.evaluation.texts import TextSet
from captum_generic_attn.extras import needed
from captum_generic_attn.metrics import Curve, Estimate, RandomAttribution, joined
from captum_generic_attn.progress import bar

Grid = tuple[int, int] | None
_LIBRARIES = ("captum-generic-attn", "captum", "torch", "torchvision", "timm", "scipy")


def evaluate(plan: Plan, *, show_progress: bool = False) -> Report:
    """Run the methods and the metrics of a plan.

    Only one batch is in memory at a time; for previous batches, one value per example is kept. The
    same plan gives the same report.

    Args:
        plan: a plan from `read_plan`.
        show_progress: whether to show a progress bar over batches and methods on stderr.

    Returns:
        A `Report`. A method that cannot explain some example is listed in `refused` with its
        reason, and has no results.

    Raises:
        PlanError: if the plan does not fit the data or the model.
        DataError: if an example cannot be evaluated.
        UnavailableWeightsError: if the model is not available.
        ImportError: if a library is missing.
    """
    # Fail now rather than at the end of the run.
    needed("scipy.stats")
    examples: Examples = ImageSet(plan) if isinstance(plan.data, ImageData) else TextSet(plan)
    for library in _libraries(examples):
        needed(library)
    controls, notes = _controls(plan, examples)
    found = _scored(plan, examples, controls, show_progress=show_progress)
    done = [name for name in (*plan.methods, *controls) if name not in found.refused]
    return Report(
        about={**examples.about, "explained": plan.explain},
        settings=_settings(plan, examples),
        versions=_versions(examples),
        figures={name: _figures(found.parts[name], examples, plan.seed) for name in done},
        curves={name: _curves(found.parts[name]) for name in done},
        controls=tuple(controls),
        refused=found.refused,
        left_out=plan.left_out,
        notes=(*examples.notes, *notes, *_placeless(found, examples), *_told(found.warned)),
    )


@dataclass(frozen=True, eq=False)
class _Scored:
    """The scores of all batches.

    `parts` holds the values of each batch, by method and metric. `refused` holds the reasons of
    methods that could not explain an example, and `warned` the warnings of methods. `placeless`
    counts the masks that mark nothing.
    """

    parts: Mapping[str, dict[str, list[Any]]]
    refused: Mapping[str, str]
    warned: Mapping[str, list[str]]
    placeless: int


def _scored(
    plan: Plan, examples: Examples, controls: Mapping[str, Grid], *, show_progress: bool
) -> _Scored:
    """Run each method on each batch, and compute each metric of its attributions."""
    names = (*plan.methods, *controls)
    parts: dict[str, dict[str, list[Any]]] = {
        name: {metric: [] for metric in examples.metrics} for name in names
    }
    refused: dict[str, str] = {}
    warned: dict[str, list[str]] = defaultdict(list)
    placeless = 0
    starts = range(0, len(examples), examples.batch_size)
    with bar("evaluating", len(starts) * len(names), show=show_progress) as advance:
        for start in starts:
            batch = examples.batch(range(start, min(start + examples.batch_size, len(examples))))
            if batch.right is not None:
                placeless += int((~batch.right.flatten(1).any(1)).sum())
            for name in names:
                if name not in refused:
                    found = _explained(name, batch, controls, plan.seed, warned[name])
                    if isinstance(found, str):
                        refused[name] = found
                    else:
                        _score(parts[name], examples, batch, found)
                advance()
    return _Scored(parts, refused, warned, placeless)


def _score(
    parts: Mapping[str, list[Any]], examples: Examples, batch: Batch, attributions: Tensor
) -> None:
    """Add the values of each metric for one batch."""
    for metric, found in parts.items():
        part = METRICS[metric].score(examples, batch, attributions)
        if part is not None:
            found.append(part)


def _figures(parts: Mapping[str, list[Any]], examples: Examples, seed: int) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for metric, of_batches in parts.items():
        found |= figures(metric, of_batches, examples.ks, seed)
    return found


def _curves(parts: Mapping[str, list[Any]]) -> dict[str, Curve]:
    """The mean curve of each metric that has curves."""
    whole = {
        metric: joined(found)
        for metric, found in parts.items()
        if found and isinstance(found[0], Curve)
    }
    return {metric: Curve(curve.fractions, curve.means[:, None]) for metric, curve in whole.items()}


def _placeless(found: _Scored, examples: Examples) -> list[str]:
    """A note on the number of masks that mark nothing, if a metric needs masks."""
    of_masks = [name for name, metric in METRICS.items() if metric.needs == "masks"]
    if not found.placeless or not set(of_masks) & set(examples.metrics):
        return []
    of = f"{found.placeless} of {len(examples)} masks mark nothing in what the model is shown"
    return [f"{of}: left out of {' and '.join(of_masks)}"]


def _libraries(examples: Examples) -> list[str]:
    """The modules that the metrics need in addition to the package's requirements."""
    needs = (METRICS[metric].library for metric in examples.metrics)
    return [library for library in needs if library is not None]


def _explained(
    name: str, batch: Batch, controls: Mapping[str, Grid], seed: int, warned: list[str]
) -> Tensor | str:
    """The attributions of a method, or the reason why there are none."""
    if name in controls:
        return _random(batch, controls[name], seed)
    method = all_methods(batch.forward)[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = compare(
            {name: method},
            batch.inputs,
            batch.targets,
            batch.rest or None,
            seed=seed + batch.first,
            strict=False,
        )
    if name in found.refused:
        return found.refused[name]
    warned += [str(w.message).partition("\n")[0] for w in caught if w.category is UserWarning]
    attributions = found[name]
    assert isinstance(attributions, Tensor)  # noqa: S101 - one tensor in, one out
    if not attributions.isfinite().all():
        return "some of its attributions are NaN or infinite"
    return attributions


def _random(batch: Batch, grid: Grid, seed: int) -> Tensor:
    """Random attributions, with one seed per example, so that batches do not repeat numbers."""
    controls = (
        RandomAttribution(batch.forward, grid=grid, seed=seed + batch.first + i)
        for i in range(len(batch.inputs))
    )
    return torch.cat(
        [c.attribute(batch.inputs[i : i + 1]) for i, c in enumerate(controls)]
    )  # fmt: skip


def _controls(plan: Plan, examples: Examples) -> tuple[dict[str, Grid], list[str]]:
    """The random controls, one for each resolution of the evaluated methods.

    Maps over tokens are smooth, those of gradients are not, and the chance level depends on that.
    """
    if not isinstance(plan.data, ImageData):
        return {"Random": None}, []
    batch = examples.batch(range(1))
    methods = {name: all_methods(batch.forward)[name] for name in plan.methods}
    fine = [name for name, method in methods.items() if _by_pixels(method)]
    coarse = [method for name, method in methods.items() if name not in fine]
    controls: dict[str, Grid] = {}
    notes = []
    if coarse:
        # A hierarchical model has several grids, and its methods may return maps on different ones.
        for grid in _grids(coarse, batch):
            controls[f"Random, {grid[0]} × {grid[1]}"] = grid
        if not controls:
            notes.append(
                "no method tells a grid of tokens for this model: the random control is one of "
                "single pixels"
            )
    if fine or not controls:
        controls["Random, pixels"] = None
    return controls, notes


def _by_pixels(method: Attribution) -> bool:
    """Whether a method's maps have pixel resolution, unlike those over tokens or patches."""
    return not isinstance(method, (ModelAttribution, KernelShap)) or isinstance(method, Lrp)


def _grids(methods: list[Attribution], batch: Batch) -> Iterator[tuple[int, int]]:
    """The token grid of an image (rows, columns) in each method that has one."""
    for method in methods:
        if isinstance(method, KernelShap):
            patches = patch_mask(batch.inputs.shape)[0, 0]
            yield len(set(patches[:, 0].tolist())), len(set(patches[0].tolist()))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # reported when all examples are explained
            try:
                values = method.attribute(batch.inputs, batch.targets, return_input_shape=False)
            except (ValueError, TypeError, RuntimeError, NotImplementedError):
                continue  # refused with its reason when all examples are explained
        if values.ndim == 3:
            yield values.shape[1], values.shape[2]


def _settings(plan: Plan, examples: Examples) -> dict[str, object]:
    settings: dict[str, object] = {
        "methods": list(plan.methods),
        "metrics": list(examples.metrics),
        "explain": plan.explain,
        "limit": plan.limit,
        "batch_size": examples.batch_size,
        "device": plan.device,
        "seed": plan.seed,
    }
    if isinstance(plan.data, ImageData):
        settings["removed"] = {
            metric: plan.removed_in(metric)
            for metric in examples.metrics
            if METRICS[metric].removed
        }
        settings["patch"] = plan.patch
    else:
        settings["token_f1_words"] = list(examples.ks)
    return settings


def _versions(examples: Examples) -> dict[str, str]:
    libraries = list(_LIBRARIES)
    libraries += dict.fromkeys(name.partition(".")[0] for name in _libraries(examples))
    if isinstance(examples, TextSet):
        libraries.append("transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def _told(warned: Mapping[str, list[str]]) -> list[str]:
    """The first warning of each method, and how many more there were."""
    notes = []
    for name, messages in warned.items():
        if not messages:
            continue
        first, *others = dict.fromkeys(messages)
        more = f" (and {len(others)} other warnings)" if others else ""
        notes.append(f"{name} warned: {first.rstrip('.')}{more}")
    return notes
