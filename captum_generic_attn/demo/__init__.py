"""Small trained models and images to try the package with, offline: for the command line, the
README, the tutorials and the tests.

They know garments on a canvas of two to four of them, so that one image has several right answers
and the right place of each is known: a vision transformer names them, a CLIP compares them with
captions, a DETR finds their boxes. `benchmarks/` draws the canvases, trains the models and measures
them; Fashion-MNIST's licence is in `LICENSE.fashion-mnist`.
"""

from captum_generic_attn.demo.images import (
    CLASSES,
    MEAN,
    SIZE,
    STD,
    Canvas,
    Garment,
    canvases,
    preprocess,
)
from captum_generic_attn.demo.models import (
    CLIP,
    DETR,
    LONGEST,
    VIT,
    VOCABULARY,
    filled,
    load_clip,
    load_detr,
    load_model,
    read_weights,
    tokenize,
)

__all__ = [
    "CLASSES",
    "CLIP",
    "DETR",
    "LONGEST",
    "MEAN",
    "SIZE",
    "STD",
    "VIT",
    "VOCABULARY",
    "Canvas",
    "Garment",
    "canvases",
    "filled",
    "load_clip",
    "load_detr",
    "load_model",
    "preprocess",
    "read_weights",
    "tokenize",
]
