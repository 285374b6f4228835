"""Evidence on pictures with captions: the shipped CLIP on garment canvases.

One table. Do the maps point at the garments and words that a caption is about; does the picture's
point at what alone decides between two captions, and the text's at what decides between two
pictures. Run by `make evidence`; alone, `python benchmarks/evidence/clip.py --data DIR`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from captum.attr import Attribution
from garments import (
    DEBIAN_FOLDER,
    Caption,
    Drawn,
    Mention,
    describe,
    distort,
    draw,
    inputs,
    load_split,
    meant,
)
from grids import of_tokens, touched
from methods import Methods, broken_clip, of_clip, some
from tables import Column, Table, percent, timed, versions
from torch import Tensor, nn
from torch.nn.functional import normalize
from vqa import among

from captum_generic_attn import demo, hf
from captum_generic_attn.comparison import run
from captum_generic_attn.metrics import Estimate, estimate, pointing

SEED = 2021
"""Of the canvases and captions, all of the test split."""
SAMPLES = 1000
SIDE = 8
"""So many tokens are along each side of a picture."""
CHUNK = 50
CHOICES = 10
"""Among so many captions the model is to find the right one."""
SMALL_WORDS = {"a", "and", "in", "the"}

COLUMNS = (
    Column("alone_picture", "one garment: image", "more"),
    Column("several_picture", "several: image", "more"),
    Column("several_word", "several: word", "more"),
    Column("garment_picture", "two captions, garment: image", "more"),
    Column("place_picture", "two captions, place: image", "more"),
    Column("erased_word", "two images: word", "more"),
)


@dataclass(frozen=True)
class Pair:
    """A canvas, by its place in the batch, with a true caption, and the mentions that maps are to
    point at. Where the score is compared: with that of another caption (`other`), or with that of
    the canvas when the garments of these mentions are `erased`.
    """

    canvas: int
    caption: Caption
    asked: tuple[Mention, ...]
    other: Caption | None = None
    erased: bool = False


@dataclass(frozen=True)
class Told:
    """Pairs as a model takes them: `inputs` (pictures, token ids, and what is compared if anything
    is: other ids or other pictures); the tokens of the picture `[B, 8, 8]` that show what is asked
    for; which token ids `[B, N]` are words, and which of these are about it.
    """

    inputs: tuple[Tensor, ...]
    right: Tensor
    words: Tensor
    about: Tensor


def told(pairs: Sequence[Pair], drawn: Drawn) -> Told:
    """Pairs of these canvases as a model takes them."""
    ids = demo.tokenize([str(pair.caption) for pair in pairs])
    words, about = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(2))
    boxes = torch.zeros(len(pairs), demo.SIZE, demo.SIZE, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        place = 1  # behind [START]
        for mention in pair.caption.mentions:
            for word in mention.words():
                words[row, place] = True
                about[row, place] = mention in pair.asked and word not in SMALL_WORDS
                place += 1
            words[row, place] = mention is not pair.caption.mentions[-1]  # "and"
            place += 1
        for mention in pair.asked:
            for left, top, right, bottom in drawn.boxes[
                pair.canvas, meant(drawn, pair.canvas, mention)
            ]:
                boxes[row, top:bottom, left:right] = True
    pictures = inputs(drawn)[[pair.canvas for pair in pairs]]
    compared = []
    if others := [str(pair.other) for pair in pairs if pair.other is not None]:
        compared = [demo.tokenize(others)]
    elif any(pair.erased for pair in pairs):
        compared = [erase(pictures, boxes)]
    return Told((pictures, ids, *compared), touched(boxes, SIDE), words, about)


def erase(pictures: Tensor, places: Tensor) -> Tensor:
    """Pictures with their ground, which is what is commonest in each channel, in these places
    `[B, 64, 64]`.
    """
    ground = pictures.flatten(2).mode(2).values
    return torch.where(places[:, None], ground[:, :, None, None], pictures)


@torch.no_grad()
def scores(model: nn.Module, drawn: Drawn, captions: Sequence[Sequence[Caption]]) -> list[Tensor]:
    """Of each canvas with each of its captions."""
    return [
        model(
            pixel_values=picture[None],
            input_ids=demo.tokenize([str(caption) for caption in its]),
        ).logits_per_image[0]
        for picture, its in zip(inputs(drawn), captions, strict=True)
    ]


def choices(captions: Sequence[Caption], drawn: Drawn) -> list[list[Caption]]:
    """Each canvas' caption, and behind it all that are false in one garment or place."""
    wrong = distort(captions, drawn, SEED, 0)
    return [[caption, *others] for caption, others in zip(captions, wrong, strict=True)]


def retrieval(found: Sequence[Tensor]) -> Estimate:
    """How often the first of `CHOICES` captions has the highest score, of the canvases that have
    so many.
    """
    enough = [values[:CHOICES] for values in found if len(values) >= CHOICES]
    return estimate([float(values[0] > values[1:].max()) for values in enough])


def pairs(model: nn.Module, drawn: Drawn) -> tuple[dict[str, list[Pair]], Estimate]:
    """What is asked, by the first part of the columns' keys, of what the model itself gets right;
    and its retrieval.
    """
    captions = describe(drawn, SEED, 0)
    alone = [Caption((Mention(caption.mentions[0].garment, None),)) for caption in captions]
    kinds = "alone", "several", "garment", "place", "erased"
    asked: dict[str, list[Pair]] = {kind: [] for kind in kinds}
    single = choices(alone, drawn)
    for canvas, values in enumerate(scores(model, drawn, single)):
        caption = single[canvas][0]
        if values[0] > values[1:].max():
            asked["alone"].append(Pair(canvas, caption, caption.mentions))
    several = choices(captions, drawn)
    found = scores(model, drawn, several)
    for canvas, values in enumerate(found):
        caption, *wrong = several[canvas]
        mentions = caption.mentions
        if len(mentions) == 1:
            continue
        shown = sum(meant(drawn, canvas, mention) for mention in mentions).astype(bool)
        unnamed = (drawn.classes[canvas] >= 0) & ~shown
        if unnamed.any() and values[0] > values[1:].max():
            asked["several"].append(Pair(canvas, caption, mentions))
        one = mentions[canvas % len(mentions)]
        asked["erased"].append(Pair(canvas, caption, (one,), erased=True))
        tried: set[str] = set()
        for other, value in zip(wrong, values[1:], strict=True):
            ((mine, changed),) = [
                both for both in zip(mentions, other.mentions, strict=True) if both[0] != both[1]
            ]
            kind = "place" if mine.garment == changed.garment else "garment"
            if kind not in tried and values[0] > value:
                asked[kind].append(Pair(canvas, caption, (mine,), other))
            tried.add(kind)
    asked["erased"] = [
        pair
        for pair, drop in zip(asked["erased"], drops(model, asked["erased"], drawn), strict=True)
        if drop > 0
    ]
    return asked, retrieval(found)


class Difference:
    """What a CLIP makes of pictures with their captions, less what it makes of the same with other
    captions (token ids) or other pictures in their place.

    The embedding of what is the same is made once, so that its gradient is that of the difference.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, pixel_values: Tensor, input_ids: Tensor, other: Tensor) -> Tensor:
        """`[B]`."""
        picture, text = self._of_pictures(pixel_values), self._of_texts(input_ids)
        if other.is_floating_point():
            found = (picture - self._of_pictures(other)) * text
        else:
            found = picture * (text - self._of_texts(other))
        difference: Tensor = self.model.logit_scale.exp() * found.sum(1)
        return difference

    def _of_pictures(self, pixels: Tensor) -> Tensor:
        return normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=1)

    def _of_texts(self, ids: Tensor) -> Tensor:
        return normalize(self.model.get_text_features(input_ids=ids).pooler_output, dim=1)


@torch.no_grad()
def drops(model: nn.Module, pairs: Sequence[Pair], drawn: Drawn) -> Tensor:
    """By how much the score falls when what is asked for is erased."""
    if not pairs:
        return torch.zeros(0)
    chunks = zip(*(tensor.split(CHUNK) for tensor in told(pairs, drawn).inputs), strict=True)
    return torch.cat([Difference(model)(*chunk) for chunk in chunks])


def attributions(method: Attribution, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Of the pictures' tokens `[B, 8, 8]` and of the captions' `[B, N]`."""
    pictures, texts = [], []
    for chunk, given in enumerate(zip(*(tensor.split(CHUNK) for tensor in inputs), strict=True)):
        rest = {"additional_forward_args": given[2:], "return_input_shape": False}
        picture, text = run(method, given[:2], None, rest, SEED + chunk)
        pictures.append(of_tokens(picture, given[0], SIDE))
        texts.append(text)
    return torch.cat(pictures), torch.cat(texts)


def pointed(data: Told, picture: Tensor, text: Tensor) -> tuple[Estimate, Estimate]:
    """How often the highest token of the picture shows what is asked for, and how often the
    highest word is about it, in percent.
    """
    return (
        percent(estimate(pointing(picture, data.right))),
        percent(estimate(pointing(among(text, data.words), data.about))),
    )


def every_method(model: Callable[..., Any]) -> Methods:
    """All methods, the control, and broken variants of ours."""
    return of_clip(model, (SIDE, SIDE)) | broken_clip(model, (SIDE, SIDE))


def experiment(
    data: Path = DEBIAN_FOLDER, samples: int = SAMPLES, names: Collection[str] | None = None
) -> Table:
    """The table, of the first `samples` canvases of the test split; of all methods, or these."""
    model = demo.load_clip()
    drawn = draw(load_split("test", data), SEED, 0, samples)
    asked, right = pairs(model, drawn)
    plain, difference = (
        some(every_method(of), names) for of in (hf.pairs(model), Difference(model))
    )
    rows: dict[str, dict[str, Estimate]] = {name: {} for name in plain}
    with timed(f"CLIP, {samples} canvases") as taken:
        for kind, of_kind in asked.items():
            seen = told(of_kind, drawn)
            for name, row in rows.items():
                with timed(f"  {kind}, {name}"):
                    method = (plain if len(seen.inputs) == 2 else difference)[name]
                    picture, word = pointed(seen, *attributions(method, seen.inputs))
                row |= {f"{kind}_picture": picture, f"{kind}_word": word}
    keys = {column.key for column in COLUMNS}
    rows = {name: {key: row[key] for key in row if key in keys} for name, row in rows.items()}
    settings = {
        "seed": SEED,
        "right caption of 10": f"{100 * right.value:.1f} % of {right.count}",
        "pairs": ", ".join(f"{len(its)} {kind}" for kind, its in asked.items()),
        "bootstrap": "2000 resamples, 95 %",
    }
    return Table(
        "clip", "CLIP, localisation: do the maps point at what the caption names?", _ABOUT, COLUMNS,
        rows, samples, settings, taken[0], versions(),
    )  # fmt: skip


_ABOUT = """The shipped CLIP, on canvases of two to four garments from the test split, with
captions that it tells from wrong ones. We explain its score of the pair, in both towers at
once. *One garment*: the caption is "a bag". We count how often the highest of the 64 image
tokens overlaps the box of a bag. *Several*: the caption names some of the garments, and the
places of some of them ("a boot and a bag in the upper left"). The highest token must overlap
the box of one of them; the highest word must be a garment or belong to a place. *Two captions*
(of several garments): we explain the score minus that of a caption in which one garment or one
place is replaced ("a sandal and a bag in the upper left"). It is known which garment alone
decides, and the highest token must overlap its box. *Two images*: we explain the score minus
that of the canvas without one of the named garments. The highest word must be this garment or
belong to its place. (A comparison changes the map of the other tower only: a second caption
leaves the text map as it is, and a second image leaves the image map as it is.) All values are
in percent."""


def main(data: Path = DEBIAN_FOLDER, samples: int = SAMPLES, threads: int = 1) -> None:
    """Make the table and store it."""
    torch.set_num_threads(threads)
    print(experiment(data, samples).store())


if __name__ == "__main__":
    typer.run(main)
