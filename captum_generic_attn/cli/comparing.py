"""`--methods`: one score by several methods, whatever kind of model gives it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import typer

from captum_generic_attn.cli.choices import Choices
from captum_generic_attn.cli.terminal import fail, save, short, told, warn, wrong

if TYPE_CHECKING:
    from captum_generic_attn.cli.kind import Score
    from captum_generic_attn.cli.seen import Seen


def chosen_methods(given: str, start_layer: int) -> tuple[str, ...]:
    """The names of the methods that `--methods` compares, empty for `GenericAttention` alone.

    A wrong choice ends the command before a model is loaded.
    """
    if given == "generic":
        return ()
    from torch import nn

    from captum_generic_attn.comparison import all_methods

    if start_layer != 0:
        wrong("--start-layer", "it is an option of generic attention alone: leave --methods out")
    names = tuple(all_methods(nn.Identity()))
    if given == "all":
        return names
    known = {("generic",): names[0]} | {tuple(name.split(", ")): name for name in names}
    chosen, rest = [], [part.strip() for part in given.split(",")]
    while rest:
        # Names may hold a comma ("LRP, frozen"): the longest that fits is meant.
        fitting = [parts for parts in known if tuple(rest[: len(parts)]) == parts]
        if not fitting:
            wrong("--methods", f"{rest[0]!r}: there are all; generic; {'; '.join(names)}")
        parts = max(fitting, key=len)
        chosen.append(known[parts])
        rest = rest[len(parts) :]
    return tuple(dict.fromkeys(chosen))


def compare_methods(
    choices: Choices,
    name: str,
    seen: Seen,
    score: Score,
    *,
    title: str,
) -> None:
    """Print the time of each method, and write a figure of their maps.

    Args:
        choices: which methods, and where the figure goes.
        name: of the model whose scores are explained.
        seen: the image, and what the model saw of it.
        score: of one example; its `forward` returns a tensor.
        title: what is explained, in words.
    """
    from captum_generic_attn.comparison import all_methods, compare
    from captum_generic_attn.visualization import comparison_figure

    every = all_methods(score.forward)
    methods = {method: every[method] for method in choices.methods}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("default", UserWarning)  # those of left out methods are printed below
        found = compare(
            methods, score.inputs, score.target, score.rest, strict=False, show_progress=True
        )
    for method, seconds in found.seconds.items():
        typer.echo(f"{method:24} {seconds:8.2f} s")
    for method, reason in found.refused.items():
        warn(f"{method} is left out: {reason}")
    if not found.attributions:
        fail(f"{name}: no method could explain it")
    drawn = seen.drawn()
    with told(name):
        figure = comparison_figure(drawn.image, found, title=short(title), crop_box=drawn.crop_box)
        save(figure, choices.output)
