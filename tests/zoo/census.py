"""Examines one model of the zoo: what is seen, what is given, what is left behind.

`test_census.py` asserts over what `examine` found, and `docs/models_table.py` writes it down.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_generic_attn import GenericAttention, Relevance, UnsupportedAttentionError
from captum_generic_attn.captum_api.targets import choose_output
from captum_generic_attn.capture import capture_forward
from captum_generic_attn.capture.scope import modules_of
from zoo.aten import count
from zoo.models import Built, Entry


@dataclass
class Finding:
    """What the census found of one model; numbers that were not reached are -1."""

    label: str
    library: str
    name: str
    why: str
    aten: int = -1
    aten_others: int = -1
    used: int = 0
    unused: int = 0
    refused: int = 0
    ignored: int = 0
    streams: dict[str, int] = field(default_factory=dict)
    crosses: bool = False
    merges: bool = False
    message: str = ""
    double: bool = False
    output_moved: float = -1.0
    fused_apart: float = -1.0
    left_behind: str = ""
    shapes_fit: bool = False
    finite: bool = False
    greatest: float = 0.0

    @property
    def gives_maps(self) -> bool:
        """Whether every input got a finite map of its shape, and not all is zero."""
        return not self.message and self.shapes_fit and self.finite and self.greatest > 0


def wake(model: nn.Module) -> None:
    """Give parameters that are all alike values that let gradients through, and sharpen the rest.

    Zero heads, gates and layer scales would make every map zero.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if not bool(parameter.any()):
                parameter.add_(0.2 * noise)
            elif float(parameter.abs().max()) < 1e-2:  # layer scales of 1e-5
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim in (2, 3) and float(parameter.std()) < 0.05:
                parameter.mul_(2)


def examine(entry: Entry) -> Finding:
    """Build a model, explain it, and see what happened."""
    finding = Finding(entry.label, entry.library, entry.name, entry.why)
    torch.manual_seed(0)
    built = entry.build()
    models = list(modules_of(built.forward).values())
    for model in models:
        wake(model)
    _settle(built, models)
    built = _in_double(built, models)

    def run() -> Tensor:
        return choose_output(built.forward(*built.inputs, *built.additional), built.output)

    counter = count(run)
    finding.aten, finding.aten_others = counter.attention, counter.others
    with torch.no_grad():
        plain = run()
    finding.double = plain.dtype == torch.float64
    before = [_state(model) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _capture(built, plain, finding)
        method = GenericAttention(built.forward, output=built.output)
        inputs: Any = built.inputs if len(built.inputs) > 1 else built.inputs[0]
        try:
            relevance = method.relevance(inputs, built.target, built.additional)
            _describe(relevance, finding)
            maps = _maps(method, built)
        except UnsupportedAttentionError as error:
            finding.message = str(error)
        else:
            finding.shapes_fit = all(
                m.shape == x.shape for m, x in zip(maps, built.inputs, strict=True)
            )
            finding.finite = all(bool(m.isfinite().all()) for m in maps)
            finding.greatest = max(float(m.max()) for m in maps)
            if built.fused_off is not None:
                _compare_with_eager(method, built, maps, finding)
                before = [_state(model) for model in models]
    for model, known in zip(models, before, strict=True):
        finding.left_behind += _difference(known, _state(model))
    return finding


def _settle(built: Built, models: list[nn.Module]) -> None:
    """Give batch normalisation the statistics of its input, or activations grow without bounds."""
    norms = [
        module for model in models for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]  # fmt: skip
    momentums = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.training = True
    with torch.no_grad(), contextlib.suppress(ValueError):  # one value to a channel
        built.forward(*built.inputs, *built.additional)
    for norm, momentum in zip(norms, momentums, strict=True):
        norm.momentum = momentum
        norm.training = False


def _in_double(built: Built, models: list[nn.Module]) -> Built:
    """The model and its inputs in float64, unless parts of it compute in float32 anyway."""

    def double(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            v.double() if isinstance(v, Tensor) and v.dtype == torch.float32 else v for v in values
        )

    held = [copy.deepcopy(model.state_dict()) for model in models]
    doubled = replace(built, inputs=double(built.inputs), additional=double(built.additional))
    for model in models:
        model.double()
    try:
        output = choose_output(doubled.forward(*doubled.inputs, *doubled.additional), built.output)
        if output.dtype == torch.float64 and bool(output.isfinite().all()):
            return doubled
    except RuntimeError:
        pass  # a constant of float32 meets float64
    for model, state in zip(models, held, strict=True):
        model.float().load_state_dict(state)
    return built


def _maps(method: GenericAttention, built: Built) -> list[Tensor]:
    return list(method.attribute(built.inputs, built.target, built.additional))


def _capture(built: Built, plain: Tensor, finding: Finding) -> None:
    """What the package sees of the forward pass, and whether the output stays what it is."""
    capture = capture_forward(
        built.forward, built.inputs, built.additional,
        lambda returned: choose_output(returned, built.output),
    )  # fmt: skip
    finding.refused, finding.ignored = len(capture.refusals), len(capture.ignored)
    finding.used = len(capture.records)
    moved = (capture.output.detach() - plain).abs().max() / plain.abs().max().clamp(min=1e-30)
    finding.output_moved = float(moved)


def _describe(relevance: Relevance, finding: Finding) -> None:
    finding.streams = {name: stream.tokens for name, stream in relevance.streams.items()}
    finding.used = sum(call.used for call in relevance.calls)
    finding.unused = sum(not call.used for call in relevance.calls) - finding.refused
    finding.crosses = any(
        call.query_stream and call.query_stream not in call.key_stream.split("+")
        and call.query_stream != call.key_stream
        for call in relevance.calls
    )  # fmt: skip
    finding.merges = any(  # merged tokens have rows, but no columns
        relevance.matrices[name, name].shape[-1] < stream.tokens
        for name, stream in relevance.streams.items()
    )


def _compare_with_eager(
    method: GenericAttention, built: Built, maps: list[Tensor], finding: Finding
) -> None:
    assert built.fused_off is not None
    built.fused_off()
    apart = [
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(maps, _maps(method, built), strict=True)
        if float(theirs.abs().max()) > 0
    ]
    finding.fused_apart = max(apart, default=math.nan)


def _state(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": sum(len(getattr(m, h)) for m in model.modules() for h in hooks),
        "gradients": [p.grad is None for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "sum": sum(float(p.detach().double().nansum()) for p in model.parameters()),
    }


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    return " ".join(key for key in before if before[key] != after[key])


def write_down(finding: Finding) -> None:
    """Keep a finding for the table, if a folder for it is named by `ZOO_FINDINGS`."""
    if folder := os.environ.get("ZOO_FINDINGS"):
        name = re.sub(r"\W+", "_", finding.label)
        path = Path(folder) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(finding), indent=1))
