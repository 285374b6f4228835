"""Adapters for Hugging Face models: keyword arguments become tensors by position.

`unpack` turns a model and what a processor returned into the three arguments of
`GenericAttention`; `pairs` makes a dual encoder score each image with its own text; `words` says
which tokens make up which word. Nothing here imports transformers: any module whose `forward` takes
keywords will do.
"""

from __future__ import annotations

import inspect
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

__all__ = ["Keywords", "Piece", "Words", "pairs", "unpack", "words"]

_PAIRED = ("pixel_values", "input_ids", "attention_mask")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are only part of a character
_JOINER = "\N{ZERO WIDTH JOINER}"  # between the parts of one emoji


class Piece(NamedTuple):
    """A word or a part of one, and the places of its tokens among those of its text."""

    text: str
    tokens: tuple[int, ...]


Words = tuple[tuple[Piece, ...], ...]
"""The words of a text, each of one or several pieces."""


class Keywords:
    """A model that takes its keyword arguments by position.

    Made by `unpack` and `pairs`. Can be pickled and copied; its signature has the model's names, so
    streams are called `input_ids` and `pixel_values`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        names: Sequence[str],
        constants: Mapping[str, Any] | None = None,
        *,
        folded: Sequence[str] = (),
        paired: bool = False,
    ) -> None:
        self.model = model
        self.names = tuple(names)
        self.constants = dict(constants or {})
        self.folded = tuple(folded)
        self.paired = paired

    @property
    def __signature__(self) -> inspect.Signature:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(name, kind) for name in self.names])

    def __call__(self, *values: Any) -> Any:
        """The model's output; of a paired model `[B]`, one score for each image and its text."""
        if len(values) > len(self.names):
            raise TypeError(
                f"{len(values)} arguments were given, but there are {len(self.names)}: "
                f"{', '.join(self.names)}"
            )
        keywords = dict(zip(self.names, values, strict=False))
        for name in self.folded:
            keywords[name] = keywords[name].flatten(0, 1)
        output = self.model(**keywords, **self.constants)
        return _diagonal(output) if self.paired else output


def _diagonal(output: Any) -> Tensor:
    if "logits_per_image" not in output:
        raise ValueError(
            f"pairs needs a model that returns logits_per_image; this one returns {list(output)}"
        )
    logits: Tensor = output["logits_per_image"]
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(
            f"logits_per_image has shape {tuple(logits.shape)}: pass as many texts as images, "
            "the text of an image at its place"
        )
    return logits.diagonal()


def pairs(model: Callable[..., Any], names: Sequence[str] = _PAIRED) -> Keywords:
    """A dual encoder (CLIP, SigLIP, ...) that scores each image with its own text.

    Dual encoders score all images with all texts, `[B, B]`: the scores of an example would depend
    on the others. This is the diagonal, `[B]`, to be explained with `target=None`.

    Args:
        model: takes keywords, and returns `logits_per_image`.
        names: the keywords in the order in which tensors are passed; the last ones may be left out.

    Returns:
        A function for `GenericAttention`, or for `unpack`.

    Raises:
        ValueError: when it is called, if the model returns no `logits_per_image`, or there are not
            as many texts as images.

    Example:
        >>> import torch, transformers
        >>> from captum_generic_attn import GenericAttention, hf
        >>> tiny = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...             intermediate_size=16)
        >>> model = transformers.CLIPModel(transformers.CLIPConfig(
        ...     text_config=tiny | dict(vocab_size=9, max_position_embeddings=4, eos_token_id=8),
        ...     vision_config=tiny | dict(image_size=16, patch_size=8))).eval()
        >>> images, ids = torch.rand(2, 3, 16, 16), torch.tensor([[1, 2, 8], [3, 8, 0]])
        >>> maps = GenericAttention(hf.pairs(model)).attribute((images, ids))
        >>> [tuple(m.shape) for m in maps]
        [(2, 3, 16, 16), (2, 3)]
    """
    return Keywords(model, names, paired=True)


def unpack(
    model: Callable[..., Any],
    encoding: Mapping[str, Any],
    inputs: str | Sequence[str] | None = None,
) -> tuple[Keywords, Tensor | tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The arguments of `GenericAttention` from a model and what its processor returned.

    Args:
        model: a module that takes keywords, or what `pairs` made of one.
        encoding: keyword arguments of the model: a `BatchEncoding`, or any mapping.
        inputs: name or names of what to explain. `None` takes all that carries tokens: integers
            named `input_ids` (`decoder_input_ids`, ...), and floating tensors (images, audio,
            region features and boxes), but for those with "mask" in their name.

    Returns:
        `forward, inputs, rest`, for `GenericAttention(forward).attribute(inputs, target, rest)`:
        a function; a tensor, or a tuple of several; a tuple of all other tensors. What is no tensor
        is fixed in the function. Tensors to explain that hold the examples one behind the other
        (the patches of all images, `[B n, ...]`) are unfolded to `[B, n, ...]`.

    Raises:
        KeyError: if `inputs` names what is not there; the message lists what is.
        TypeError: if `inputs` names what is no tensor, or `encoding` is no mapping.
        ValueError: if nothing in `encoding` carries tokens.

    Example:
        >>> import torch, transformers
        >>> from captum_generic_attn import GenericAttention, hf
        >>> model = transformers.BertForSequenceClassification(transformers.BertConfig(
        ...     vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...     intermediate_size=16)).eval()
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
        >>> encoding = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        >>> forward, inputs, rest = hf.unpack(model, encoding)
        >>> GenericAttention(forward).attribute(inputs, 1, rest).shape
        torch.Size([2, 3])
    """
    if not hasattr(encoding, "items"):
        raise TypeError(f"encoding must map names to tensors, not be {type(encoding).__name__}")
    given = dict(encoding.items())
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    names = _carriers(given, tensors) if inputs is None else _chosen(given, tensors, inputs)
    explained, folded = _unfolded({name: tensors[name] for name in names})
    others = [name for name in tensors if name not in names]
    forward = Keywords(
        model.model if isinstance(model, Keywords) else model,
        [*names, *others],
        {name: value for name, value in given.items() if name not in tensors},
        folded=folded,
        paired=isinstance(model, Keywords) and model.paired,
    )
    rest = tuple(tensors[name] for name in others)
    return forward, explained[0] if len(explained) == 1 else explained, rest


def _carriers(given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the arguments that carry tokens."""
    names = [name for name, value in tensors.items() if _carries_tokens(name, value)]
    if not names:
        raise ValueError(
            f"none of {list(given)} carries tokens (no input_ids, no floating tensor); name them "
            "with inputs="
        )
    return names


def _chosen(
    given: Mapping[str, Any], tensors: Mapping[str, Tensor], inputs: str | Sequence[str]
) -> list[str]:
    """The names that the user gave, all of them of tensors."""
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    if missing := [name for name in names if name not in given]:
        raise KeyError(f"inputs= names {missing}, but the encoding has {list(given)}")
    if other := [name for name in names if name not in tensors]:
        raise TypeError(f"inputs= names {other}, which are no tensors")
    return names


def _unfolded(tensors: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], list[str]]:
    """The tensors with the examples along their first axis, and the names of those that held them
    one behind the other, `[B n, ...]`, which are `[B, n, ...]` now.
    """
    examples = _examples(tensors)
    folded = [name for name, value in tensors.items() if len(value) != examples]
    for name in folded:
        if len(tensors[name]) % examples:
            raise ValueError(
                f"{name} holds {len(tensors[name])} rows for {examples} examples: as it is, what "
                "belongs to which example cannot be told. One image for several texts: repeat "
                "it, once for each"
            )
    explained = tuple(
        value.reshape(examples, -1, *value.shape[1:]) if name in folded else value
        for name, value in tensors.items()
    )
    return explained, folded


def _carries_tokens(name: str, tensor: Tensor) -> bool:
    if "mask" in name or tensor.ndim == 0:
        return False
    return tensor.is_floating_point() or name.endswith("input_ids")


def _examples(tensors: Mapping[str, Tensor]) -> int:
    """The batch size: that of the ids, or the smallest there is."""
    of_ids = [len(value) for name, value in tensors.items() if name.endswith("input_ids")]
    return min(of_ids or [len(value) for value in tensors.values()])


def words(tokenizer: Any, ids: Sequence[int] | Tensor, *, special: bool = False) -> Words:
    """The words of a text by their tokens.

    A word is what white space divides in the decoded text, with its punctuation; Chinese and
    Japanese, written without spaces, are divided between pieces. Decoding is what tokenizers of all
    kinds have in common: each marks the starts or the ends of words in a way of its own.

    Args:
        tokenizer: of Hugging Face, of any kind.
        ids: `[N]`, of one text.
        special: whether special tokens (`[CLS]`, end, padding, ...) are words of their own. By
            default they are in no word. Tokens for unknown words and masks are always words.

    Returns:
        Words of one or several pieces. A piece is what a token adds to the text; tokens that add
        nothing to be seen by themselves, such as the bytes of a character, white space and accents,
        make one piece with their neighbours. Every token that is not special is in one piece,
        unless there is nothing but white space between special ones.

    Raises:
        ValueError: if `ids` are not of one text.

    Example:
        >>> from tokenizers import Tokenizer, decoders, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> vocabulary = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "two": 3, "cat": 4, "##s": 5}
        >>> backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        >>> backend.decoder = decoders.WordPiece()
        >>> tokenizer = PreTrainedTokenizerFast(
        ...     tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
        >>> for word in words(tokenizer, [0, 3, 4, 5, 1]):
        ...     print(word)
        (Piece(text='two', tokens=(1,)),)
        (Piece(text='cat', tokens=(2,)), Piece(text='s', tokens=(3,)))
    """
    given = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(
            f"ids are the whole numbers of one text, [N], not {given.dtype} {list(given.shape)}"
        )
    listed: list[int] = given.tolist()
    marks = _special_ids(tokenizer)
    found: list[tuple[Piece, ...]] = []
    start = 0
    for place, token in enumerate([*listed, None]):
        if token is None or token in marks:
            # What stands on both sides of a special token is never one word.
            found += _words_between(tokenizer, listed[start:place], start)
            if token is not None and special:
                found.append((Piece(tokenizer.convert_ids_to_tokens(token), (place,)),))
            start = place + 1
    return tuple(found)


def _special_ids(tokenizer: Any) -> set[int]:
    """The ids of tokens that stand for no text; some tokenizers have no name for most of theirs."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    marks -= {tokenizer.unk_token_id, tokenizer.mask_token_id}
    # GPT-2 has one token for the end of a text and for what is unknown.
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
    return (marks | {getattr(tokenizer, name) for name in names}) - {None}


def _words_between(tokenizer: Any, ids: list[int], first: int) -> list[tuple[Piece, ...]]:
    """The words of tokens without special ones among them; the first of them is at `first`."""
    found: list[list[Piece]] = []
    context: list[int] = []  # what is decoded: the tokens since the word's first
    tokens: list[int] = []  # the places of those that are in no piece yet
    before = ""
    for place, token in enumerate(ids, first):
        context.append(token)
        tokens.append(place)
        text = tokenizer.decode(context, clean_up_tokenization_spaces=False)
        added = text[len(before) :]
        unseen = not added.strip()
        if place + 1 < first + len(ids) and (unseen or added.endswith(_UNFINISHED)):
            continue
        if unseen:  # white space at the end
            if found:
                last = found[-1].pop()
                found[-1].append(Piece(last.text, (*last.tokens, *tokens)))
            break
        piece = Piece(added.strip(), tuple(tokens))
        if not before or _divided(before[-1], added[0]):
            found.append([piece])
            # Long texts are not decoded from their start again and again.
            context = context[-len(tokens) :]
            text = tokenizer.decode(context, clean_up_tokenization_spaces=False)
        elif _one_character(before[-1], added[0]):
            last = found[-1].pop()
            found[-1].append(Piece(last.text + piece.text, last.tokens + piece.tokens))
        else:
            found[-1].append(piece)
        before, tokens = text, []
    return [tuple(word) for word in found]


def _divided(left: str, right: str) -> bool:
    """Whether a word boundary lies between two characters."""
    if left.isspace() or right.isspace() or _needs_no_space(right):
        return True
    return _needs_no_space(left) and right.isalnum() and unicodedata.category(right) != "Lm"


def _needs_no_space(character: str) -> bool:
    """Chinese characters and Japanese syllables; Korean is as wide, but has spaces."""
    return (
        unicodedata.category(character) == "Lo"
        and unicodedata.east_asian_width(character) == "W"
        and not unicodedata.name(character, "").startswith("HANGUL")
    )


def _one_character(left: str, right: str) -> bool:
    """Whether the second only changes how the first one looks."""
    return _JOINER in {left, right} or unicodedata.category(right).startswith("M")
