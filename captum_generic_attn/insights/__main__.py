"""`python -m captum_generic_attn.insights`: Captum Insights on the models of the package."""

from __future__ import annotations

from typing import Annotated

import typer

from captum_generic_attn.cli.terminal import fail, wrong
from captum_generic_attn.insights.server import serve
from captum_generic_attn.insights.visualizers import caption_visualizer, image_visualizer

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def show(
    port: Annotated[
        int,
        typer.Option(metavar="PORT", min=0, max=65535, help="Where the page is; 0: a free one."),
    ] = 0,
    multimodal: Annotated[
        bool,
        typer.Option(
            "--multimodal",
            help="The CLIP that comes with the package, on images and captions, in place of its "
            "image classifier.",
        ),
    ] = False,
) -> None:
    """Explain the models that come with the package on Captum Insights' page.

    Prints the page's address, and serves it to browsers on this machine until
    Ctrl-C. Captum 0.8 is needed, the last release that has Insights.
    """
    try:
        visualizer = caption_visualizer() if multimodal else image_visualizer()
    except ImportError as error:
        fail(str(error))
    try:
        serve(visualizer, port)
    except OSError as error:
        wrong("--port", f"{port} cannot be used: {error.strerror or error}")


if __name__ == "__main__":
    app(prog_name="python -m captum_generic_attn.insights")
