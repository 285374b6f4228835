"""Small trained models and images for trying the package offline.

The command line, the README, the tutorials and the tests use them. The images are canvases with two
to four garments, so that one image has several correct answers whose places are known. A vision
transformer classifies the garments, a CLIP compares canvases with captions, and a DETR detects the
boxes. The scripts in `benchmarks/` draw the canvases, and train and measure the models. The licence
of Fashion-MNIST is in `LICENSE.fashion-mnist`.
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
