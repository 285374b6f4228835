"""`explain` of an image classifier: its classes, and where in the picture it sees them."""

from __future__ import annotations

import typer

from captum_generic_attn.cli.choices import Choices
from captum_generic_attn.cli.comparing import compare_methods
from captum_generic_attn.cli.terminal import loaded, print_table, save, short, told, wrong

_TOP = 3


def explain_classes(choices: Choices) -> None:
    """Prints the most probable classes, and writes a figure of the explained ones."""
    from captum_generic_attn.attribution import GenericAttention
    from captum_generic_attn.models.classifiers import load_classifier
    from captum_generic_attn.visualization import heatmap_figure

    if choices.texts:
        wrong(
            "--text",
            "an image classifier takes no text: leave it out, or give a dual encoder, such as "
            "--model garments-clip",
        )
    classifier = loaded(lambda: load_classifier(choices.model, choices.weights))
    try:
        targets = [classifier.index(name) for name in choices.targets]
    except ValueError as error:
        wrong("--target", str(error))
    if choices.several_methods and len(targets) > 1:
        wrong("--target", "several methods explain one class: give one --target")

    seen = choices.seen(classifier)
    pixels = seen.pixels
    probabilities = classifier.probabilities(pixels[None])[0]
    count = min(choices.top or _TOP, len(classifier.classes))
    best = probabilities.topk(count).indices.tolist()
    explained = list(dict.fromkeys(targets or best))
    if choices.several_methods:
        explained = explained[:1]
    kind = "sigmoid" if classifier.multi_label else "softmax"
    typer.echo(
        f"What {classifier.name} sees ({len(classifier.classes)} classes, probabilities by {kind}):"
    )
    rows = [
        (str(i), classifier.classes[i], f"{probabilities[i]:.3f}", "explained" * (i in explained))
        for i in dict.fromkeys([*best, *targets])
    ]
    print_table(["index", "class", "probability", ""], rows, left=["class", ""])

    if choices.several_methods:
        (target,) = explained
        title = classifier.classes[target]
        compare_methods(
            choices, classifier.name, seen, classifier.logits, pixels[None], target, title=title
        )
        return
    with told(classifier.name):
        method = GenericAttention(classifier.model, start_layer=choices.start_layer)
        maps = method.attribute_targets(pixels[None], explained)
    titles = [f"{short(classifier.classes[i])}  {probabilities[i]:.2f}" for i in explained]
    drawn = seen.drawn()
    # The map is the same in every colour channel.
    heatmaps = maps[:, 0, 0].numpy()
    with told(classifier.name):
        figure = heatmap_figure(
            drawn.picture, heatmaps, titles, title=choices.title, area=drawn.area
        )
        save(figure, choices.output)
