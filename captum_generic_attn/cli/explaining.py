"""The commands `explain` and `verify`, whatever kind of model they are about."""

from __future__ import annotations

import typer

from captum_generic_attn import verification
from captum_generic_attn.attribution import GenericAttention
from captum_generic_attn.cli.comparing import compare_methods
from captum_generic_attn.cli.kind import Kind
from captum_generic_attn.cli.terminal import fail, print_table, save, told


def explain_image(kind: Kind) -> None:
    """Print what the model predicts for the image, and write the figure."""
    choices, name = kind.choices, kind.model.name
    seen = choices.seen(kind.model)
    with told(name):
        findings = kind.look(seen)
    typer.echo(findings.heading)
    rows = list(zip(*findings.columns.values(), strict=True))
    print_table(list(findings.columns), rows, left=findings.left)
    if choices.several_methods:
        score = kind.first_score(seen, findings)
        compare_methods(choices, name, seen, score, title=findings.title)
        return
    with told(name):
        maps = kind.explain(seen, findings)
    drawn = seen.drawn()
    with told(name):
        save(kind.draw(drawn, findings, maps), choices.output)


def verify_model(kind: Kind) -> None:
    """Print the report of `verify`; a failed check is an error."""
    name = kind.model.name
    seen = kind.choices.seen(kind.model)
    with told(name):
        score = kind.checked_score(seen)
    typer.echo(f"Checking {name} (eight checks, some dozen passes through the model) ...")
    with told(name):
        report = verification.verify(
            GenericAttention(score.forward), score.inputs, score.target, score.rest or None
        )
    for check in report.checks:
        typer.echo(str(check))
    if not report.passed:
        fail(f"{name}: do not trust its maps; a report of this is welcome")
    typer.echo("Nothing is wrong.")
