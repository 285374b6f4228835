"""`explain` of a detector: what it finds in the picture, and where each finding comes from."""

from __future__ import annotations

import typer

from captum_generic_attn.cli.choices import Choices
from captum_generic_attn.cli.comparing import compare_methods
from captum_generic_attn.cli.terminal import fail, loaded, print_table, save, short, told, wrong

_TOP = 8
_THRESHOLD = 0.5


def explain_detections(choices: Choices) -> None:
    """Prints the detections, and writes a figure of their boxes and of the explained ones."""
    from captum_generic_attn.attribution import GenericAttention
    from captum_generic_attn.models.detectors import load_detector
    from captum_generic_attn.visualization import detections_figure

    model = str(choices.model)
    if choices.texts:
        wrong(
            "--text",
            f"{model} is a detector, which takes no text: leave it out, or give a dual encoder, "
            "such as --model garments-clip",
        )
    detector = loaded(lambda: load_detector(model))
    try:
        targets = [detector.index(name) for name in choices.targets]
    except ValueError as error:
        wrong("--target", str(error))

    seen = choices.seen(detector)
    pixels = seen.pixels
    with told(detector.name):
        everything = detector.detections(pixels, threshold=0)
    found = [detection for detection in everything if detection.probability > _THRESHOLD]
    if not found:
        nearest = "".join(
            f"; the nearest to it is {detection.name} with {detection.probability:.3f}"
            for detection in everything[:1]
        )
        fail(
            f"{detector.name} detects nothing in the picture: no query has a class with a "
            f"probability above {_THRESHOLD}{nearest}"
        )
    if targets:
        detected = dict.fromkeys(detection.name for detection in found)
        found = [detection for detection in found if detection.target in targets]
        if not found:
            wanted = " or ".join(detector.classes[target] for target in targets)
            wrong(
                "--target",
                f"{detector.name} detects no {wanted} in the picture; it detects: "
                f"{', '.join(detected)}",
            )
    explained = found[: 1 if choices.several_methods else choices.top or _TOP]
    which = "picture" if seen.own else "picture as the model gets it"
    typer.echo(
        f"What {detector.name} detects with a probability above {_THRESHOLD} (boxes in pixels of "
        f"the {which}, {seen.picture.width} wide and {seen.picture.height} high):"
    )
    columns = ["query", "class", "probability", "left", "top", "right", "bottom", ""]
    rows = [
        (
            str(detection.query),
            detection.name,
            f"{detection.probability:.3f}",
            *(f"{edge:.0f}" for edge in seen.on_picture(detection.box)),
            "explained" if detection in explained else "",
        )
        for detection in found
    ]
    print_table(columns, rows, left=["class", ""])

    scores = [(detection.query, detection.target) for detection in explained]
    if choices.several_methods:
        (score,), title = scores, explained[0].name
        compare_methods(
            choices, detector.name, seen, detector.logits, pixels[None], score, title=title
        )
        return
    with told(detector.name):
        method = GenericAttention(detector.model, start_layer=choices.start_layer)
        maps = method.attribute_targets(pixels[None], scores)
    labels = [f"{short(detection.name)}  {detection.probability:.2f}" for detection in found]
    drawn = seen.drawn()
    boxes = [drawn.on_picture(detection.box) for detection in found]
    # The map is the same in every colour channel.
    heatmaps = maps[:, 0, 0].numpy()
    with told(detector.name):
        figure = detections_figure(
            drawn.picture, boxes, labels, heatmaps, title=choices.title, area=drawn.area
        )
        save(figure, choices.output)
