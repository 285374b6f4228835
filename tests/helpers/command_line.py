"""The command line as the tests call it."""

import re

from typer.testing import CliRunner

from captum_generic_attn import visualization
from captum_generic_attn.cli import app


def run(*arguments, code=0):
    """What a command prints, in one line and without boxes."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit | None)
    # Errors come in a box as wide as the terminal.
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def explain(*arguments, code=0):
    return run("explain", *arguments, code=code)


def recorded(monkeypatch, name):
    """What the command hands to the drawing of its figures, which goes on as usual."""
    calls = []
    draw = getattr(visualization, name)

    def record(*arguments, **options):
        calls.append((*arguments, options))
        return draw(*arguments, **options)

    monkeypatch.setattr(visualization, name, record)
    return calls
