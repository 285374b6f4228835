"""Small trained models and pictures to try the package with, offline: for the command line, the
README, the tutorials and the tests.

They know garments on a canvas of two to four of them, so that one picture has several right answers
and the right place of each is known: a vision transformer names them, a CLIP compares them with
captions, a DETR finds their boxes. `benchmarks/` draws the canvases, trains the models and measures
them; Fashion-MNIST's licence is in `LICENSE.fashion-mnist`.
"""

from captum_generic_attn.demo.models import (
    LONGEST,
    VOCABULARY,
    load_clip,
    load_detr,
    load_model,
    tokenize,
)
from captum_generic_attn.demo.pictures import (
    CLASSES,
    MEAN,
    SIZE,
    STD,
    Canvas,
    Garment,
    canvases,
    preprocess,
)

__all__ = [
    "CLASSES",
    "LONGEST",
    "MEAN",
    "SIZE",
    "STD",
    "VOCABULARY",
    "Canvas",
    "Garment",
    "canvases",
    "load_clip",
    "load_detr",
    "load_model",
    "preprocess",
    "tokenize",
]
