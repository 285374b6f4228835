"""Pictures as their tokens: what the experiments on CLIP and DETR compare maps with."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from captum_generic_attn import demo
from captum_generic_attn.metrics import Pixels


def of_tokens(found: Tensor, pictures: Tensor, side: int) -> Tensor:
    """A method's maps of pictures as one value for each of `side` × `side` tokens: as they are,
    where the method knows tokens; else the means of the pixels of each.
    """
    if found.ndim == 4:
        found = Pixels(pictures).features(found).unflatten(1, pictures.shape[2:])
    return avg_pool2d(found[:, None], found.shape[-1] // side)[:, 0]


def touched(pixels: Tensor, side: int) -> Tensor:
    """The tokens that reach into a place given by its pixels, bool `[B, 64, 64]`."""
    return max_pool2d(pixels[:, None].float(), demo.SIZE // side)[:, 0] > 0
