"""How far two images of figures are from each other: for golden images and for notebooks."""

import numpy as np
from PIL import Image, ImageFilter

# Measured with the golden images: up to 0.24 where a figure is drawn again (the files have 256
# colours), up to 0.35 with other letters at another resolution; mistakes from 0.88 on (a DETR's
# tokens shifted by one), most above 2.
LIMIT = 0.6


def distance(one, other):
    """The mean difference of the colours of two PIL images, their greys taken away, both made
    small and blurred: in 0 … 255, though most of a page is white in both.
    """
    colours = []
    for picture in (one, other):
        small = picture.convert("RGB").resize((96, 48), Image.Resampling.BOX)
        values = np.asarray(small.filter(ImageFilter.GaussianBlur(1.5)), dtype=float)
        colours.append(values - values.mean(axis=2, keepdims=True))
    return float(np.abs(colours[0] - colours[1]).mean())
