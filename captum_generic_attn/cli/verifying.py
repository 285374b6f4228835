"""`verify` of a model for pictures: is its explanation right?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import Tensor

from captum_generic_attn.cli.choices import Choices
from captum_generic_attn.cli.terminal import fail, loaded, told, wrong


def verify_model(choices: Choices, kind: str) -> None:
    """Prints the report of `verify`; a failed check is an error."""
    from captum_generic_attn.attribution import GenericAttention
    from captum_generic_attn.verification import verify

    name, forward, inputs, target, more = _GIVEN[kind](choices)
    typer.echo(f"Checking {name} (eight checks, some dozen passes through the model) ...")
    with told(name):
        report = verify(GenericAttention(forward), inputs, target, more)
    for check in report.checks:
        typer.echo(str(check))
    if not report.passed:
        fail(f"{name}: do not trust its maps; a report of this is welcome")
    typer.echo("Nothing is wrong.")


_Given = tuple[str, Callable[..., Any], Any, Any, Any]


def _twice(pixels: Tensor) -> Tensor:
    """A picture and its mirror image: a batch, so that examples can be told apart."""
    return torch.stack([pixels, pixels.flip(-1)])


def _of_classifier(choices: Choices) -> _Given:
    from captum_generic_attn.models.classifiers import load_classifier

    classifier = loaded(lambda: load_classifier(choices.model, choices.weights))
    try:
        targets = [classifier.index(name) for name in choices.targets]
    except ValueError as error:
        wrong("--target", str(error))
    pixels = choices.seen(classifier).pixels
    target = (targets or [int(classifier.probabilities(pixels[None])[0].argmax())])[0]
    return classifier.name, classifier.model, _twice(pixels), target, None


def _of_dual_encoder(choices: Choices) -> _Given:
    from captum_generic_attn.models.dual_encoders import load_dual_encoder

    if not choices.texts:
        wrong("--text", f"{choices.model} compares the picture with texts: give two")
    encoder = loaded(lambda: load_dual_encoder(str(choices.model)))
    try:
        texts = encoder.encode(list(dict.fromkeys(choices.texts)))
    except ValueError as error:
        wrong("--text", str(error))
    forward, inputs, rest = encoder.pairs(choices.seen(encoder).pixels, texts)
    return encoder.name, forward, inputs, None, rest


def _of_detector(choices: Choices) -> _Given:
    from captum_generic_attn.models.detectors import load_detector

    detector = loaded(lambda: load_detector(str(choices.model)))
    pixels = choices.seen(detector).pixels
    with told(detector.name):
        best = detector.detections(pixels, threshold=0)[0]
    return detector.name, detector.model, _twice(pixels), (best.query, best.target), None


_GIVEN: dict[str, Callable[[Choices], _Given]] = {
    "image classifier": _of_classifier,
    "dual encoder": _of_dual_encoder,
    "detector": _of_detector,
}
