"""The notebooks of `tutorials/`: each runs from top to bottom, and what is stored in it is what
running it gives.

All are run by `make tutorials`, a bounded part of them in CI. `TUTORIALS=write` in the environment
stores the outputs anew: `make tutorials-write`.
"""

import ast
import base64
import io
import os
import re
from pathlib import Path

import pytest
from helpers.image_distance import LIMIT, distance
from PIL import Image

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tutorials"
NAMES = (
    "1_vision_transformers",
    "2_text_classification",
    "3_clip",
    "4_visual_question_answering",
    "5_detr",
    "6_side_by_side",
    "7_captum_insights",
    "8_your_own_transformer",
)
# The others take a minute or more, or start a browser.
IN_CI = {"1_vision_transformers", "3_clip", "8_your_own_transformer"}
WRITE = os.environ.get("TUTORIALS") == "write"
NOTEBOOKS = [
    pytest.param(name, marks=[pytest.mark.slow] + [pytest.mark.ci_sample] * (name in IN_CI))
    for name in NAMES
]


def stored(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """What a cell printed and returned, as text; a figure's own text says nothing."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        elif "image/png" not in output.get("data", {}):
            yield from (
                output.get("data", {}).get(kind, "") for kind in ("text/plain", "text/html")
            )


def pictures(cell):
    for output in cell.outputs:
        if encoded := output.get("data", {}).get("image/png"):
            with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
                yield image.convert("RGB")


NUMBER = re.compile(r"(?<![\w.])[-−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\d)(\s*(?:s|ms)\b)?")


def split(text):
    """Words, and the numbers that must be the same: not times, and neither the last digits of
    colours nor rounding errors, which differ from machine to machine.
    """
    text = re.sub(r"#[0-9a-f]{6}", "", text)
    numbers = [
        float(found.group().replace("−", "-")) for found in NUMBER.finditer(text) if not found[1]
    ]
    return NUMBER.sub(" ", text).split(), [0.0 if abs(n) < 1e-4 else n for n in numbers]


def limit_of(picture):
    """An empty page must be above it, however little is on this one."""
    return min(LIMIT, 0.4 * distance(picture, Image.new("RGB", picture.size, "white")))


def tidy(notebook):
    """As it is stored: nothing in it differs from run to run but what it says."""
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place:02}"
        cell.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def test_what_must_be_the_same_of_a_text():
    """Words and figures; not times, colours and rounding errors."""
    text = "area 31.4 ± 2.0 in 0.35 s, [−1, 1e-7], #f8c0ab ViT16 x2"
    words, numbers = split(text)
    assert words == ["area", "±", "in", ",", "[", ",", "],", "ViT16", "x2"]
    assert numbers == [31.4, 2.0, -1.0, 0.0]


def test_there_is_no_other_notebook():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_complete(name):
    notebook = stored(name)
    nbformat.validate(notebook)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(1 for cell in cells for _ in pictures(cell)) >= 2
    assert sum("PRETRAINED = False" in cell.source for cell in cells) == 1
    for cell in cells:
        ast.parse(cell.source.replace("%", "#"))
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.text
    # Nothing of the machine that it was run on.
    everything = (FOLDER / f"{name}.ipynb").read_text("utf-8")
    said = "".join(text for cell in cells for text in texts(cell))
    assert not re.search(r"/(root|home|tmp|work|usr)/|site-packages", said)
    assert len(everything) < 2_000_000


@pytest.mark.parametrize("name", NAMES)
def test_prose_has_no_code_that_nobody_runs(name):
    prose = [cell.source for cell in stored(name).cells if cell.cell_type == "markdown"]
    assert not [text for text in prose if re.search(r"```(python|py|sh)", text)]
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", "\n".join(prose)):
        assert (FOLDER / link).is_file(), link


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_and_gives_what_is_stored(name):
    notebook = stored(name)
    before = [(list(texts(cell)), list(pictures(cell))) for cell in code_cells(notebook)]
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()
    if WRITE:
        nbformat.write(tidy(notebook), FOLDER / f"{name}.ipynb")
        return
    for (said, shown), cell in zip(before, code_cells(notebook), strict=True):
        (words, numbers), (old_words, old_numbers) = (
            split("".join(texts(cell))),
            split("".join(said)),
        )
        assert words == old_words, cell.source
        assert numbers == pytest.approx(old_numbers, rel=0.02, abs=0.02), cell.source
        found = list(pictures(cell))
        assert len(found) == len(shown), cell.source
        for new, old in zip(found, shown, strict=True):
            assert distance(new, old) < limit_of(old), cell.source
