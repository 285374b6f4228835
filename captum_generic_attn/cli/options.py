"""The arguments and options that commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ImageFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="IMAGE",
        help="The image, of at most 89 million pixels; without it, one that comes with the "
        "package.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]

ModelName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A timm or torchvision name (vit_tiny_patch16_224, vit_b_16); the Hugging Face id "
        "(owner/model) or folder of an image classifier, a dual encoder (CLIP, SigLIP) or a "
        "detector (DETR); or one of the small models that come with the package: garments-vit "
        "(the default), garments-clip, garments-detr.",
        show_default=False,
    ),
]

WeightsFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A state dict for the timm or torchvision model (safetensors or torch.save), in "
        "place of its pretrained weights.",
        exists=True,
        dir_okay=False,
        readable=True,
    ),
]

Texts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="For a dual encoder: a text to compare the image with; may be repeated.",
        show_default=False,
    ),
]
