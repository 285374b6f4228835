"""`explain` of a dual encoder: how well texts fit the picture, and what in both makes them fit."""

from __future__ import annotations

import typer

from captum_generic_attn.cli.choices import Choices
from captum_generic_attn.cli.comparing import compare_methods
from captum_generic_attn.cli.terminal import loaded, print_table, save, told, wrong


def explain_texts(choices: Choices) -> None:
    """Prints the scores of the texts, and writes a figure of picture and words for each."""
    from captum_generic_attn.attribution import GenericAttention
    from captum_generic_attn.models.dual_encoders import load_dual_encoder
    from captum_generic_attn.visualization import pairs_figure, word_relevance

    model = str(choices.model)
    if choices.targets:
        wrong("--target", f"{model} scores texts, not classes: give --text in its place")
    if choices.top is not None:
        wrong("--top", f"{model} scores the texts that it is given, all of which are explained")
    if not choices.texts:
        wrong(
            "--text",
            f"{model} compares the picture with texts: give at least one, such as "
            '--text "a bag and a boot"',
        )
    encoder = loaded(lambda: load_dual_encoder(model))
    given = list(dict.fromkeys(choices.texts))
    try:
        texts = encoder.encode(given)
    except ValueError as error:
        wrong("--text", str(error))

    seen = choices.seen(encoder)
    pixels = seen.pixels
    with told(encoder.name):
        scores = encoder.scores(pixels, texts)
    typer.echo(f"How well {encoder.name} finds that texts fit the picture:")
    explained = given[:1] if choices.several_methods else given
    columns = {
        "text": given,
        "cosine": [f"{cosine:.3f}" for cosine in scores.cosines],
        "logit": [f"{logit:.2f}" for logit in scores.logits],
    }
    titles = [f"logit {logit:.2f}" for logit in scores.logits]
    if encoder.multi_label or len(given) > 1:
        kind = "sigmoid" if encoder.multi_label else "softmax"
        shares = scores.logits.sigmoid() if encoder.multi_label else scores.logits.softmax(0)
        columns[kind] = [f"{share:.3f}" for share in shares]
        titles = [f"{name}, {kind} {p:.2f}" for name, p in zip(titles, shares, strict=True)]
    columns[""] = ["explained" if text in explained else "" for text in given]
    print_table(list(columns), list(zip(*columns.values(), strict=True)), left=["text", ""])

    forward, inputs, rest = encoder.pairs(pixels, texts)
    if choices.several_methods:
        first = tuple(tensor[:1] for tensor in inputs)
        others = tuple(tensor[:1] for tensor in rest)
        compare_methods(choices, encoder.name, seen, forward, first, None, others, title=given[0])
        return
    with told(encoder.name):
        method = GenericAttention(forward, start_layer=choices.start_layer)
        in_picture, in_texts = method.attribute(inputs, None, rest)
    words = [
        word_relevance(text, values) for text, values in zip(texts.words, in_texts, strict=True)
    ]
    drawn = seen.drawn()
    # The map is the same in every colour channel.
    heatmaps = in_picture[:, 0].numpy()
    with told(encoder.name):
        figure = pairs_figure(
            drawn.picture, heatmaps, words, titles, title=choices.title, area=drawn.area
        )
        save(figure, choices.output)
