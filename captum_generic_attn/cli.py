"""The command `captum-generic-attn`: which parts of a picture made a classifier name a class, and
whether what explains it is right.

Everything heavy is imported once a command runs.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

    from captum_generic_attn.classifiers import ImageClassifier

__all__ = ["main"]

_COMMAND = "captum-generic-attn"

app = typer.Typer(
    name=_COMMAND,
    help="Generic attention explainability (Chefer, Gur, Wolf, ICCV 2021) for transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    """Run the command line; leaves by `SystemExit`: 0, 1 for a failure, 2 for wrong arguments."""
    app(prog_name=_COMMAND)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"{_COMMAND} {version(_COMMAND)}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def explain(
    image: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGE",
            help="The picture to explain; without it, one that comes with the package.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A timm or torchvision name (vit_tiny_patch16_224, vit_b_16), a Hugging Face id "
            "(owner/model) or folder; without it, the small model that comes with the package.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A state dict for the timm or torchvision model (safetensors or torch.save), in "
            "place of its pretrained weights.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS|INDEX",
            help="A class to explain, by name or index; may be repeated. Without it, the --top "
            "most probable ones.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Where the figure goes; the ending says the format."),
    ] = Path("explanation.png"),
    start_layer: Annotated[
        int,
        typer.Option(
            metavar="K", help="Leave out the first K attention layers; -1 keeps only the last."
        ),
    ] = 0,
    top: Annotated[
        int,
        typer.Option(metavar="K", min=1, help="How many of the most probable classes to print."),
    ] = 3,
    methods: Annotated[
        str,
        typer.Option(
            metavar="ours|all|NAME,...",
            help="Which methods explain: ours; all, which draws them side by side for one class; "
            "or some of these by name.",
        ),
    ] = "ours",
) -> None:
    """Explain what a vision transformer sees in a picture.

    Prints the most probable classes, and writes a figure: the picture as the
    model gets it, and a heat map for each explained class.
    """
    _check_output(output, image)
    if weights is not None and model is None:
        _wrong("--weights", "give the model that they belong to as well: --model NAME")
    classifier = _load(model, weights)
    targets = [_index(classifier, name) for name in target or []]

    pixels = _pixels(classifier, image)
    probabilities = classifier.probabilities(pixels[None])[0]
    best = probabilities.topk(min(top, len(classifier.classes))).indices.tolist()
    explained = list(dict.fromkeys(targets or best))
    if methods != "ours":
        explained = explained[:1]
        if len(targets) > 1:
            _wrong("--target", "several methods explain one class: give one --target")
    _print_classes(classifier, probabilities, list(dict.fromkeys([*best, *targets])), explained)
    if methods != "ours":
        _compare(classifier, pixels, explained[0], methods, start_layer, output)
        typer.echo(f"Wrote {output}")
        return

    maps = _attribute(classifier, pixels, explained, start_layer)
    _draw(classifier, pixels, maps, probabilities, explained, image, output)
    typer.echo(f"Wrote {output}")


@app.command()
def evaluate(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.toml",
            help="What to evaluate: the model, the pictures or texts, methods and metrics.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the report goes as well: .json with every number, or .md.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure on many pictures or texts whether explanations are right.

    Prints what each method comes to by each metric, beside a random control.
    The file says which model, data, methods and metrics; all but the data may
    be left out, and docs/evaluate.toml in the sources shows every key.
    """
    from captum_generic_attn.checkpoints import UnavailableWeightsError
    from captum_generic_attn.evaluation import DataError, PlanError, read_plan
    from captum_generic_attn.evaluation import evaluate as run
    from captum_generic_attn.evaluation.report import FORMATS
    from captum_generic_attn.evaluation.terminal import print_report

    if output is not None:
        if output.suffix.lower() not in FORMATS:
            _wrong("--output", f"{output.name!r} must end with one of {', '.join(FORMATS)}")
        if output.is_dir() or not output.parent.is_dir():
            _wrong("--output", f"{str(output)!r} is no file in an existing folder")
    try:
        report = run(read_plan(config), show_progress=True)
    except PlanError as error:
        _wrong("CONFIG.toml", str(error))
    except (DataError, UnavailableWeightsError, ImportError) as error:
        _fail(str(error))
    for name, reason in report.refused.items():
        typer.secho(f"Warning: {name} is refused: {reason}", err=True, fg="yellow")
    if set(report.figures) <= set(report.controls):
        _fail(f"{report.about['model']}: no method could explain it")
    print_report(report)
    if output is not None:
        try:
            report.save(output)
        except OSError as error:
            _fail(f"{str(output)!r} cannot be written: {error.strerror or error}")
        typer.echo(f"Wrote {output}")


def _check_output(output: Path, image: Path | None) -> None:
    """Complain about an unusable place before minutes of work, not after."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        _wrong("--output", f"{output.name!r} ends with no picture format: {', '.join(formats)}")
    if output.is_dir() or not output.parent.is_dir():
        _wrong("--output", f"{str(output)!r} is no file in an existing folder")
    if image is not None and output.exists() and output.samefile(image):
        _wrong("--output", f"{str(output)!r} is the picture to explain: it would be overwritten")


def _load(model: str | None, weights: Path | None) -> ImageClassifier:
    from captum_generic_attn.checkpoints import UnavailableWeightsError
    from captum_generic_attn.classifiers import UnknownModelError, load_classifier

    try:
        return load_classifier(model, weights)
    except UnknownModelError as error:
        _wrong("--model", str(error))
    except (UnavailableWeightsError, ImportError) as error:
        _fail(str(error))


def _index(classifier: ImageClassifier, target: str) -> int:
    try:
        return classifier.index(target)
    except ValueError as error:
        _wrong("--target", str(error))


def _pixels(classifier: ImageClassifier, image: Path | None) -> Tensor:
    from captum_generic_attn.picture_files import UnreadablePictureError, open_picture

    if image is None:
        from captum_generic_attn import demo

        return classifier.preprocess(demo.canvases()[0].image())
    try:
        return classifier.preprocess(open_picture(image).convert("RGB"))
    except UnreadablePictureError as error:
        _fail(str(error))


def _print_classes(
    classifier: ImageClassifier, probabilities: Tensor, shown: list[int], explained: list[int]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    kind = "sigmoid" if classifier.multi_label else "softmax"
    typer.echo(
        f"What {classifier.name} sees ({len(classifier.classes)} classes, probabilities by {kind}):"
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("index", justify="right", style="dim")
    table.add_column("class")
    table.add_column("probability", justify="right")
    table.add_column("")
    for index in shown:
        share = float(probabilities[index])
        mark = "explained" if index in explained else ""
        table.add_row(str(index), classifier.classes[index], f"{share:.3f}", mark)
    Console().print(table)


def _attribute(
    classifier: ImageClassifier, pixels: Tensor, explained: list[int], start_layer: int
) -> NDArray[np.floating[Any]]:
    """The heat maps `[T, H, W]`; the method's warnings are passed on as lines on standard error."""
    from captum_generic_attn import GenericAttention

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        try:
            method = GenericAttention(classifier.model, start_layer=start_layer)
            maps = method.attribute_targets(pixels[None], explained)
        except ValueError as error:
            _fail(f"{classifier.name}: {error}")
    for warning in caught:
        typer.secho(f"Warning: {warning.message}", err=True, fg="yellow")
    # The map is the same in every colour channel.
    heatmaps: NDArray[np.floating[Any]] = maps[:, 0, 0].numpy()
    return heatmaps


def _compare(
    classifier: ImageClassifier, pixels: Tensor, target: int, methods: str, start_layer: int,
    output: Path,
) -> None:  # fmt: skip
    """One class by several methods: a table of how long they took, and a figure."""
    from captum_generic_attn.compare import all_methods, compare
    from captum_generic_attn.visualization import comparison_figure

    known = all_methods(classifier.model)
    if methods != "all":
        wanted = [name.strip() for name in methods.split(",")]
        if unknown := [name for name in wanted if name not in known]:
            _wrong("--methods", f"{', '.join(unknown)}: there are ours, all, {', '.join(known)}")
        known = {name: known[name] for name in wanted}
    if start_layer != 0:
        _wrong("--start-layer", "it is an option of our method alone: leave --methods out")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("default", UserWarning)  # those of left out methods are printed below
        found = compare(known, pixels[None], target, strict=False, show_progress=True)
    for name, seconds in found.seconds.items():
        typer.echo(f"{name:24} {seconds:8.2f} s")
    for name, reason in found.refused.items():
        typer.secho(f"Warning: {name} is left out: {reason}", err=True, fg="yellow")
    if not found.attributions:
        _fail(f"{classifier.name}: no method could explain it")
    figure = comparison_figure(
        classifier.picture(pixels), found, title=_short(classifier.classes[target])
    )
    _save(figure, output)


def _draw(
    classifier: ImageClassifier,
    pixels: Tensor,
    maps: NDArray[np.floating[Any]],
    probabilities: Tensor,
    explained: list[int],
    image: Path | None,
    output: Path,
) -> None:
    from captum_generic_attn.visualization import heatmap_figure

    titles = [f"{_short(classifier.classes[i])}  {probabilities[i]:.2f}" for i in explained]
    name = "picture" if image is None else image.name
    figure = heatmap_figure(classifier.picture(pixels), maps, titles, title=_short(name))
    _save(figure, output)


def _save(figure: Figure, output: Path) -> None:
    try:
        figure.savefig(output, dpi=150)
    except OSError as error:
        _fail(f"{str(output)!r} cannot be written: {error.strerror or error}")


def _short(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _wrong(option: str, message: str) -> NoReturn:
    raise typer.BadParameter(message, param_hint=option)


def _fail(message: str) -> NoReturn:
    typer.secho(f"Error: {message}", err=True, fg="red")
    raise typer.Exit(1)
