"""The command `captum-generic-attn`: which parts of an image, and which words, made a model give a
score, and whether what explains it is right.

Here are the commands and their options; `kinds` has what differs between kinds of models. What a
command alone needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from captum_generic_attn.cli.choices import Choices
from captum_generic_attn.cli.comparing import chosen_methods
from captum_generic_attn.cli.options import ImageFile, ModelName, Texts, WeightsFile
from captum_generic_attn.cli.terminal import fail, loaded, warn, wrong

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
    image: ImageFile = None,
    model: ModelName = None,
    weights: WeightsFile = None,
    text: Texts = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS|INDEX",
            help="A class to explain, by name or index; of a detector, the detections of this "
            "class. May be repeated. Without it, the --top most probable ones.",
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
        int | None,
        typer.Option(
            metavar="K",
            min=1,
            help="How many of the most probable classes to print (3 if not given); of a detector, "
            "how many of its detections to explain (8 if not given).",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="generic|all|NAME,...",
            help="Which methods explain: generic, the method of this package; all, which draws "
            "them side by side for one class, text or detection; or some of these by name.",
        ),
    ] = "generic",
) -> None:
    """Explain what a transformer sees in an image.

    Prints what the model says of the image, and writes a figure: the image,
    and a heat map for each explained score. What lies outside of the part that
    the model saw is paler, and without colours. An image that is transparent
    in places is laid on white.

    An image classifier gives the scores of its classes. A dual encoder gives
    that of the image with each --text, and the words are coloured as well.
    A detector gives those of its detections, the queries whose most probable
    class has a probability above 0.5, and their boxes are drawn.
    """
    from captum_generic_attn.cli.explaining import explain_image
    from captum_generic_attn.cli.kinds import kind_of

    _check_output(output, image)
    _check_weights(weights, model)
    choices = Choices(
        image, model, weights, tuple(text or ()), tuple(target or ()), top, output, start_layer,
        chosen_methods(methods, start_layer),
    )  # fmt: skip
    kind = loaded(lambda: kind_of(model))
    explain_image(kind(choices))
    typer.echo(f"Wrote {output}")


@app.command()
def verify(
    image: ImageFile = None,
    model: ModelName = None,
    weights: WeightsFile = None,
    text: Texts = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS|INDEX",
            help="The class that is explained; of a detector, by the most probable detection of "
            "it. Without it, the most probable class or detection.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check that the maps of a model are what they should be.

    Compares what was captured of the model with its own derivatives: attention,
    tokens, explained rows, what was read of the image, examples, heads, and
    that nothing is left behind. Prints a line for each check, and leaves with
    code 1 if one fails.
    """
    from captum_generic_attn.cli.explaining import verify_model
    from captum_generic_attn.cli.kinds import kind_of

    _check_weights(weights, model)
    choices = Choices(image, model, weights, tuple(text or ()), (target,) if target else ())
    kind = loaded(lambda: kind_of(model))
    verify_model(kind(choices))


@app.command()
def evaluate(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.toml",
            help="What to evaluate: the model, the images or texts, methods and metrics.",
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
    """Measure on many images or texts whether explanations are right.

    Prints what each method comes to by each metric, beside a random control.
    The file says which model, data, methods and metrics; all but the data may
    be left out, and docs/evaluate.toml in the sources shows every key.
    """
    from captum_generic_attn.errors import DataError, PlanError, UnavailableWeightsError
    from captum_generic_attn.evaluation import evaluate as run
    from captum_generic_attn.evaluation import read_plan
    from captum_generic_attn.evaluation.report import FORMATS
    from captum_generic_attn.evaluation.terminal import print_report

    if output is not None:
        if output.suffix.lower() not in FORMATS:
            wrong("--output", f"{output.name!r} must end with one of {', '.join(FORMATS)}")
        if output.is_dir() or not output.parent.is_dir():
            wrong("--output", f"{str(output)!r} is no file in an existing folder")
    try:
        report = run(read_plan(config), show_progress=True)
    except PlanError as error:
        wrong("CONFIG.toml", str(error))
    except (DataError, UnavailableWeightsError, ImportError) as error:
        fail(str(error))
    for name, reason in report.refused.items():
        warn(f"{name} is refused: {reason}")
    if set(report.figures) <= set(report.controls):
        fail(f"{report.about['model']}: no method could explain it")
    print_report(report)
    if output is not None:
        try:
            report.save(output)
        except OSError as error:
            fail(f"{str(output)!r} cannot be written: {error.strerror or error}")
        typer.echo(f"Wrote {output}")


def _check_weights(weights: Path | None, model: str | None) -> None:
    """Complain about weights of a model that is not named, or that has its own."""
    if weights is None:
        return
    from captum_generic_attn.cli.kinds import brings_weights

    if model is None:
        wrong("--weights", "give the model that they belong to as well: --model NAME")
    if brings_weights(model):
        wrong(
            "--weights",
            f"{model} brings its own weights: leave them out, or give a timm or torchvision name",
        )


def _check_output(output: Path, image: Path | None) -> None:
    """Complain about an unusable place before minutes of work, not after."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        wrong("--output", f"{output.name!r} ends with no image format: {', '.join(formats)}")
    if output.is_dir() or not output.parent.is_dir():
        wrong("--output", f"{str(output)!r} is no file in an existing folder")
    if image is not None and output.exists() and output.samefile(image):
        wrong("--output", f"{str(output)!r} is the image to explain: it would be overwritten")
