"""Writes `docs/evidence.md` and its images from the stored tables, and a summary into the README.

This is the last step of `make evidence`.
"""

from __future__ import annotations

from pathlib import Path

import typer
from figures import draw_all
from garments import DEBIAN_FOLDER
from methods import OURS
from tables import BROKEN, RANDOM, STORED, Table, best_of, load, markdown

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ORDER = (
    *("vit", "vit_pointing", "lxmert", "lxmert_deciding", "visualbert", "visualbert_deciding"),
    *("clip", "detr", "reactions", "speech"),
)
QUESTIONS = (
    "Questions about a relation, a place and existence. Redder regions are more relevant; the "
    "deciding regions have a black frame; the model's answer is below"
)
FIGURES = {
    "vit": ("evidence_vit.png", "Perturbation curves of the vision transformer"),
    "lxmert": ("evidence_lxmert.png", "Perturbation curves of LXMERT"),
    "lxmert_deciding": ("evidence_questions.png", QUESTIONS),
    "visualbert": ("evidence_visualbert.png", "Perturbation curves of VisualBERT"),
    "clip": (
        "evidence_captions.png",
        "A canvas with captions: where in the image, and at which words, the score comes from",
    ),
    "detr": ("evidence_detections.png", "A canvas with all detections: box, class and map of each"),
}

# The rows of the table in the README: table, column, text.
BEGIN, END = "<!-- evidence -->", "<!-- end of evidence -->"
IN_README = (
    ("vit", "positive_ground", "ViT: area under the curve, most relevant pixels removed"),
    ("vit_pointing", "token", "ViT: highest token on the garment, %"),
    ("lxmert_deciding", "region_relation", "LXMERT: regions that decide ranked first, %"),
    ("visualbert_deciding", "region_relation", "VisualBERT: the same"),
    ("clip", "several_picture", "CLIP: highest token on a garment of the caption, %"),
    ("detr", "AP", "DETR: average precision of maps as masks"),
    ("reactions", "positive_accuracy", "BERT: area, most relevant tokens masked"),
    ("speech", "highest", "Whisper: highest frame near the word, %"),
)

HEAD = """# Evidence

Are the maps correct, and how good is the method? These tables answer on models that are small
enough to be measured here, with data in which the deciding evidence is known. `make evidence`
regenerates them (`make evidence DATA=folder` if Fashion-MNIST is not installed). The text above
each table describes its model, methods and metrics. `captum-generic-attn evaluate` computes the
same metrics on your own model.

↑: higher is better. ↓: lower is better. The number after ± is half of the 95 % interval
(bootstrap over examples). **Bold**: the best value of a column and all values whose interval
contains it. *Random* is the control at token resolution, *Random, pixels* at pixel resolution;
chance level depends on resolution. *Ours, broken* are variants of our method with one deliberate
mistake each. They show what a table can detect: if a broken variant is as good as the correct
one, the column says little about correctness.

## In short

| use | when |
| --- | --- |
| generic attention | you want one value per token, specific to the score, for about one backward \
pass: among the best at image tokens (ViT, CLIP), regions (LXMERT) and frames (Whisper) |
| LRP with `rules="frozen"` | you need signs, pixels or masks (ViT, DETR), or the words of a text \
(CLIP, BERT) |
| attention rollout | you ask which words of a question decide (LXMERT) |
| Kernel SHAP | many forward passes are affordable: ahead in most faithfulness columns of the ViT |

For each table, the list names the best method wherever it is not ours:

"""

LITERATURE = """## Results from the literature

These results of large models are for orientation. Data and models differ from those above, so only
the order of the methods can be compared.

| model, data | method | positive ↓ | negative ↑ | source |
| --- | --- | --: | --: | --- |
| ViT-B/16, ImageNet, predicted class | Transformer attribution | 17.03 | 54.16 | table 1 of \
Chefer, Gur, Wolf, CVPR 2021, as quoted in [1] |
| | – the same, reproduced by others | 16.61 | 55.20 | [1] |
| | Attention rollout | | 53.1 | the same table, as quoted in [2] |
| | – the same, reproduced by others | | 55.2 | [2] |
| | Grad-CAM | | 41.52 | the same table, as quoted in [2] |
| | – the same, reproduced by others | | 41.8 | [2] |

[1] [hila-chefer/Transformer-Explainability, issue 52]\
(https://github.com/hila-chefer/Transformer-Explainability/issues/52).
[2] [The same, issue 31](https://github.com/hila-chefer/Transformer-Explainability/issues/31). There
the first author explains how the area is computed: trapezoids, with the clean accuracy at 0, × 100.
We do the same.
"""


def verdict(table: Table) -> str:
    """In which columns our method is among the best, and which method is better in the others."""
    if OURS not in table.rows:
        raise ValueError(f"the table {table.name} has no row {OURS!r}")
    good, worse = [], []
    for column in table.columns:
        name, best = best_of(table, column)
        ours = table.rows[OURS].get(column.key)
        if ours is None:
            continue
        if ours.low <= best <= ours.high:
            good.append(column.title)
        else:
            theirs, mine = (f"{value:.{column.digits}f}" for value in (best, ours.value))
            worse.append(f"{column.title} ({name.replace('– ', 'ours ')} {theirs}, ours {mine})")
    among = "; ".join(good) or "no column"
    lines = [f"- **{table.title}**", f"  - Generic attention is among the best in: {among}."]
    if worse:
        lines.append(f"  - Another method or variant is better in: {'; '.join(worse)}.")
    return "\n".join(lines)


def document(tables: dict[str, Table]) -> str:
    """The whole page `docs/evidence.md`."""
    parts = [HEAD + "\n".join(verdict(table) for table in tables.values()) + "\n"]
    for name, table in tables.items():
        parts.append(markdown(table))
        if name in FIGURES:
            file, caption = FIGURES[name]
            parts.append(f"![{caption}]({file})\n\n*{caption}.*\n")
    return "\n".join([*parts, LITERATURE])


def in_short(tables: dict[str, Table]) -> str:
    """The table of the README: ours, the best other method, chance."""
    lines = ["| asked of | ours | best other method | chance |", "| --- | --: | --: | --: |"]
    for name, key, title in IN_README:
        table = tables[name]
        (column,) = (column for column in table.columns if column.key == key)
        others = {
            method: figures[key].value
            for method, figures in table.rows.items()
            if key in figures and not method.startswith((OURS, "– ", RANDOM, BROKEN))
        }
        pick = max if column.better == "more" else min
        best = pick(others, key=lambda method: others[method])
        figures = [table.rows[OURS][key].value, others[best], table.rows[RANDOM][key].value]
        mine, theirs, chance = (f"{value:.{column.digits}f}" for value in figures)
        arrow = "↑" if column.better == "more" else "↓"
        lines.append(f"| {title} {arrow} | {mine} | {theirs} ({best}) | {chance} |")
    return "\n".join(lines)


def main(
    data: Path = DEBIAN_FOLDER, folder: Path = DOCS, readme: Path = ROOT / "README.md"
) -> None:
    """Write the page, its images and the table of the README from all stored tables."""
    tables = {name: load(name) for name in ORDER if (STORED / f"{name}.json").is_file()}
    if missing := [name for name in ORDER if name not in tables]:
        print(f"Not stored, so left out: {', '.join(missing)}")
    (folder / "evidence.md").write_text(document(tables), "utf-8")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    readme.write_text(
        f"{before}{BEGIN}\n{in_short(tables)}\n{END}{rest.partition(END)[2]}", "utf-8"
    )
    draw_all(tables, data, folder)
    print(folder / "evidence.md")


if __name__ == "__main__":
    typer.run(main)
