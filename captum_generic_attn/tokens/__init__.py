"""Tokens: where they are born, which of them an attention call reads, where they lie in an input.

`spaces` numbers tokens as the model creates them, `streams` groups the tokens that attend to each
other, `grid` maps a value per token back to the shape of the input that it came from.
"""

from captum_generic_attn.tokens.extent import Extent
from captum_generic_attn.tokens.grid import Grid, elements_of, fit_grid
from captum_generic_attn.tokens.space import EXTERNAL, OVERWRITTEN, PADDING, Space
from captum_generic_attn.tokens.spaces import TokenSpaces
from captum_generic_attn.tokens.streams import UNRESOLVED, StreamPair, TokenStream, TokenStreams

__all__ = [
    "EXTERNAL",
    "OVERWRITTEN",
    "PADDING",
    "UNRESOLVED",
    "Extent",
    "Grid",
    "Space",
    "StreamPair",
    "TokenSpaces",
    "TokenStream",
    "TokenStreams",
    "elements_of",
    "fit_grid",
]
