"""Draws the canvases that the package ships: `captum_generic_attn/demo/canvases/`.

Run by hand, once: `python benchmarks/garments/ship_canvases.py --data DIR`. They are the first 24
canvases of the test split under the seed of the report, whatever the model says about them.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer
from canvases import DEBIAN_FOLDER, TEST_SEED, draw, load_split
from PIL import Image

from captum_generic_attn.demo import CLASSES

SHIPPED = 24
FOLDER = Path(__file__).resolve().parents[2] / "captum_generic_attn" / "demo" / "canvases"


def main(data: Path = DEBIAN_FOLDER, folder: Path = FOLDER) -> None:
    """Write the PNG files and canvases.json, which says what is where on them."""
    drawn = draw(load_split("test", data), TEST_SEED, 0, SHIPPED)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, picture in enumerate(drawn.pictures):
        file = f"{index:02}.png"
        Image.fromarray(picture).save(folder / file, optimize=True)
        garments = [
            {"name": CLASSES[kind], "box": box}
            for kind, box in zip(
                drawn.classes[index].tolist(), drawn.boxes[index].tolist(), strict=True
            )
            if kind >= 0
        ]
        entries.append({"file": file, "garments": garments})
    # One canvas per line keeps later changes readable.
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (folder / "canvases.json").write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
