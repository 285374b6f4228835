"""The garments' canvases and questions, from the folder of scripts that makes them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "garments"))

from canvases import (
    DEBIAN_FOLDER,
    Drawn,
    Split,
    draw,
    inputs,
    load_split,
    right_places,
)
from captions import Caption, Mention, describe, distort, meant
from questions import (
    ANSWERS,
    CLS,
    EXTENT,
    GARMENTS,
    KINDS,
    SEP,
    VOCABULARY,
    Batch,
    Question,
    ask,
    collate,
    picture,
)

__all__ = [
    "ANSWERS",
    "CLS",
    "DEBIAN_FOLDER",
    "EXTENT",
    "GARMENTS",
    "KINDS",
    "SEP",
    "VOCABULARY",
    "Batch",
    "Caption",
    "Drawn",
    "Mention",
    "Question",
    "Split",
    "ask",
    "collate",
    "describe",
    "distort",
    "draw",
    "inputs",
    "load_split",
    "meant",
    "picture",
    "right_places",
]
