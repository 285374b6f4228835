"""Hugging Face models by position: what is unpacked, in which order, and that numbers stay."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import UserDict

import numpy as np
import pytest
import torch
from helpers import hugging_face_folders as folders
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo.laws import assert_same
from zoo.oracles import randomise

from captum_generic_attn import GenericAttention, hf

transformers = pytest.importorskip("transformers")

TEXT = dict(
    vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=16, max_position_embeddings=12,
)  # fmt: skip
VISION = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    image_size=16, patch_size=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))
    return randomise(model.double().eval())


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    config = transformers.CLIPConfig(
        text_config=TEXT | {"eos_token_id": 19}, vision_config=VISION, projection_dim=8
    )
    return randomise(transformers.CLIPModel(config).double().eval())


def sentences() -> dict[str, Tensor]:
    ids = torch.tensor([[3, 5, 7, 2, 19], [4, 6, 19, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def pictures(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=generator)


def test_a_tensor_and_the_rest(bert) -> None:
    encoding = sentences() | {"token_type_ids": torch.zeros(2, 5, dtype=torch.long)}
    forward, inputs, rest = hf.unpack(bert, encoding)
    assert inputs is encoding["input_ids"]
    assert [id(t) for t in rest] == [
        id(encoding[name]) for name in ("attention_mask", "token_type_ids")
    ]
    names = list(inspect.signature(forward).parameters)
    assert names == ["input_ids", "attention_mask", "token_type_ids"]
    ours = GenericAttention(forward).attribute(inputs, 1, rest)
    closure = lambda ids, mask: bert(input_ids=ids, attention_mask=mask).logits
    theirs = GenericAttention(closure).attribute(inputs, 1, encoding["attention_mask"])
    assert_same(ours, theirs)
    assert list(GenericAttention(forward).relevance(inputs, 1, rest).streams) == ["input_ids"]


def test_a_batch_encoding_and_what_is_no_tensor(bert) -> None:
    encoding = UserDict(sentences() | {"return_dict": False, "position_ids": None})
    forward, inputs, rest = hf.unpack(bert, encoding)
    assert forward.constants == {"return_dict": False, "position_ids": None}
    (logits,) = forward(inputs, *rest)
    assert torch.equal(logits, bert(**sentences()).logits)
    (ours,) = GenericAttention(forward, output=0).attribute((inputs,), 1, rest)
    assert_same(ours, GenericAttention(bert).attribute(inputs, 1, rest[0]))


def test_names_choose_and_order(bert) -> None:
    encoding = sentences() | {"token_type_ids": torch.zeros(2, 5, dtype=torch.long)}
    forward, inputs, rest = hf.unpack(bert, encoding, ["token_type_ids", "input_ids"])
    assert [id(t) for t in inputs] == [
        id(encoding[name]) for name in ("token_type_ids", "input_ids")
    ]
    assert rest[0] is encoding["attention_mask"]
    types, words = GenericAttention(forward).attribute(inputs, 1, rest)
    assert_same(types, words)  # they are summed into the same tokens
    _, alone, _ = hf.unpack(bert, encoding, "input_ids")
    assert alone is encoding["input_ids"]


def test_masks_are_not_explained_by_themselves() -> None:
    encoding = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "decoder_input_ids": torch.ones(2, 2, dtype=torch.long),
        "attention_mask": torch.ones(2, 3),
        "pixel_values": torch.ones(2, 3, 4, 4),
        "pixel_mask": torch.ones(2, 4, 4),
        "visual_feats": torch.ones(2, 4, 5),
        "visual_pos": torch.ones(2, 4, 4),
        "token_type_ids": torch.ones(2, 3, dtype=torch.long),
        "image_grid_thw": torch.ones(2, 3, dtype=torch.long),
    }
    forward, inputs, rest = hf.unpack(nn.Identity(), encoding)
    assert forward.names[: len(inputs)] == (
        "input_ids", "decoder_input_ids", "pixel_values", "visual_feats", "visual_pos",
    )  # fmt: skip
    assert len(rest) == 4


def test_a_mask_among_the_inputs_gets_zeros_and_a_warning(bert) -> None:
    encoding = sentences()
    forward, inputs, rest = hf.unpack(bert, encoding, ["input_ids", "attention_mask"])
    with pytest.warns(UserWarning, match="attention_mask reaches no attention") as caught:
        words, mask = GenericAttention(forward).attribute(inputs, 1, rest)
    assert len([w for w in caught if w.category is UserWarning]) == 1
    assert mask.shape == encoding["attention_mask"].shape
    assert not mask.any()
    forward, inputs, rest = hf.unpack(bert, encoding)
    assert_same(words, GenericAttention(forward).attribute(inputs, 1, rest))


def test_pictures_with_their_own_texts(clip) -> None:
    text = sentences()
    method = GenericAttention(hf.pairs(clip))
    together = method.attribute(
        (pictures(), text["input_ids"], text["attention_mask"].double())[:2]
    )
    assert [tuple(t.shape) for t in together] == [(2, 3, 16, 16), (2, 5)]
    for i in range(2):
        alone = method.attribute((pictures()[i : i + 1], text["input_ids"][i : i + 1]))
        for ours, theirs in zip(together, alone, strict=True):
            assert_same(ours[i : i + 1], theirs)


def test_pairs_and_unpack_together(clip) -> None:
    encoding = sentences() | {"pixel_values": pictures()}
    forward, inputs, rest = hf.unpack(hf.pairs(clip), encoding)
    assert forward.names == ("input_ids", "pixel_values", "attention_mask")
    scores = forward(*inputs, *rest)
    assert torch.equal(scores, clip(**encoding).logits_per_image.diagonal())
    words, picture = GenericAttention(forward).attribute(inputs, None, rest)
    order = (encoding["pixel_values"], encoding["input_ids"])
    other = GenericAttention(hf.pairs(clip)).attribute(order, None, encoding["attention_mask"])
    assert_same(picture, other[0])
    assert_same(words, other[1])
    streams = GenericAttention(forward).relevance(inputs, None, rest).streams
    assert set(streams) == {"input_ids", "pixel_values"}


def test_layers_have_the_model_s_own_names(clip) -> None:
    encoding = sentences() | {"pixel_values": pictures()}
    forward, inputs, rest = hf.unpack(hf.pairs(clip), encoding)
    relevance = GenericAttention(forward, layers="text_model").relevance(inputs, None, rest)
    used = [call.module for call in relevance.calls if call.used]
    assert used == [f"text_model.encoder.layers.{i}.self_attn" for i in range(2)]


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])  # noqa: S301
def test_copies_give_the_same(bert, copy_of) -> None:
    forward, inputs, rest = hf.unpack(bert, sentences() | {"return_dict": True})
    twin = copy_of(forward)
    assert list(inspect.signature(twin).parameters) == list(forward.names)
    ours = GenericAttention(twin).attribute(inputs, 1, rest)
    assert torch.equal(ours, GenericAttention(forward).attribute(inputs, 1, rest))


class Packed(nn.Module):
    """Takes the patches of all images one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        assert pixel_values.ndim == 2
        patches = self.embed(pixel_values).unflatten(0, (len(input_ids), -1))
        return {"logits": self.head(self.layer(patches)[:, 0])}


def test_packed_patches_are_unfolded() -> None:
    model = randomise(Packed().double().eval())
    pixels = torch.randn(8, 6, dtype=torch.float64)
    encoding = {"input_ids": torch.ones(2, 3, dtype=torch.long), "pixel_values": pixels}
    forward, (ids, patches), rest = hf.unpack(model, encoding)
    assert patches.shape == (2, 4, 6)
    assert torch.equal(forward(ids, patches, *rest)["logits"], model(**encoding)["logits"])
    with pytest.warns(UserWarning, match="input_ids reaches no attention"):
        _, ours = GenericAttention(forward).attribute((ids, patches), 1, rest)
    assert ours.shape == (2, 4, 6)
    assert ours.amax() > 0
    encoding["pixel_values"] = pixels[:7]
    with pytest.raises(ValueError, match="pixel_values holds 7 rows for 2 examples"):
        hf.unpack(model, encoding)


def test_errors_say_what_is_there(bert, clip) -> None:
    with pytest.raises(KeyError, match=r"names \['ids'\], but the encoding has \['input_ids'"):
        hf.unpack(bert, sentences(), "ids")
    with pytest.raises(TypeError, match=r"\['use_cache'\], which are no tensors"):
        hf.unpack(bert, sentences() | {"use_cache": False}, ["input_ids", "use_cache"])
    with pytest.raises(TypeError, match="encoding must map names to tensors, not be list"):
        hf.unpack(bert, [torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"none of \['attention_mask'\] carries tokens"):
        hf.unpack(bert, {"attention_mask": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"shape \(2, 1\): pass as many texts as images"):
        hf.pairs(clip)(pictures(), sentences()["input_ids"][:1])
    with pytest.raises(ValueError, match="returns logits_per_image; this one returns"):
        hf.pairs(bert, ["input_ids"])(sentences()["input_ids"])
    with pytest.raises(TypeError, match="4 arguments were given, but there are 3"):
        hf.pairs(clip)(1, 2, 3, 4)


# ---------------------------------------------------------------- words of tokens


def byte_level(marks=None):
    """As GPT-2's and RoBERTa's: a token may be a byte; a space is at the start of a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("t", "w"), ("tw", "o"), ("Ġ", "two")]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = marks or {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


def sentence_piece():
    """As Llama's and XLM-R's: a space is a token's "▁", unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    scores = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    scores += [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz.,!"]
    scores += [("▁cat", -2.0), ("▁two", -2.0)]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


def word_piece():
    """As BERT's: what continues a word begins with "##"; knows no spaces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "cat", "##s", ",", "猫", "好"]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=words[1]))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


TOKENIZERS = [
    byte_level, sentence_piece, word_piece,
    folders.bert_tokenizer, folders.clip_tokenizer, folders.siglip_tokenizer,
]  # fmt: skip


def pieces(words) -> list[list[str]]:
    return [[piece.text for piece in word] for word in words]


def places(words) -> list[int]:
    return [place for word in words for piece in word for place in piece.tokens]


def without_space(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (folders.bert_tokenizer, "Two cats, two", [["two"], ["cat", "s", ","], ["two"]]),
        (folders.bert_tokenizer, "two zebras", [["two"], ["[UNK]"]]),
        (folders.siglip_tokenizer, "cats  two", [["cat", "s"], ["two"]]),
        # Four and two tokens for the bytes of a character.
        (folders.clip_tokenizer, "🐈 two é", [["🐈"], ["two"], ["é"]]),
        (folders.clip_tokenizer, "$x$", [["$"], ["x"], ["$"]]),
        (word_piece, "two cats, [MASK] dogs", [["two"], ["cat", "s", ","], ["[MASK]"], ["[UNK]"]]),
        (word_piece, "好猫", [["好"], ["猫"]]),
        (byte_level, "two cats, cat\n\ntwo ", [["two"], ["cat", "s", ","], ["cat"], ["two"]]),
        (byte_level, "猫好。 cat猫", [["猫"], ["好", "。"], ["cat"], ["猫"]]),
        (byte_level, "ヒー 고양", [["ヒ", "ー"], ["고", "양"]]),
        (byte_level, "an e\u0301 👩\u200d👧", [["a", "n"], ["e\u0301"], ["👩\u200d👧"]]),
        (sentence_piece, "two cats, café ", [["two"], ["cat", "s", ","], ["c", "a", "f", "é"]]),
        (sentence_piece, "猫好🐈", [["猫"], ["好", "🐈"]]),
    ],
)
def test_words_are_put_together_from_tokens_of_any_tokenizer(tokenizer, text, expected) -> None:
    tokenizer = tokenizer()
    ids = tokenizer(text)["input_ids"]
    ids = [*ids, *[tokenizer.pad_token_id] * 3] if tokenizer.pad_token else ids
    words = hf.words(tokenizer, ids)
    assert pieces(words) == expected
    # Each token that is no mark belongs to one piece.
    marks = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    marks |= {tokenizer.cls_token_id, tokenizer.sep_token_id}
    assert places(words) == [place for place, token in enumerate(ids) if token not in marks]
    assert hf.words(tokenizer, torch.tensor(ids)) == words
    assert hf.words(tokenizer, np.array(ids)) == words


@pytest.mark.parametrize("make", TOKENIZERS)
def test_words_hold_all_that_is_decoded(make) -> None:
    tokenizer = make()
    marks = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    @settings(max_examples=60, deadline=None)
    @given(st.text("ab two,.'\n\t 猫好ーé\u0301🐈👩\u200d고다" + "cats", max_size=24))
    def law(text: str) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        words = hf.words(tokenizer, ids)
        kept = [token for token in ids if token not in marks]
        decoded = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        if decoded.strip() == "":
            assert words == ()
            return
        assert places(words) == [place for place, token in enumerate(ids) if token not in marks]
        found = "".join(piece.text for word in words for piece in word)
        assert without_space(found) == without_space(decoded)

    law()


@settings(max_examples=100, deadline=None)
@given(st.text("ab two,.'\n\t é\u0301🐈👩\u200d고다", max_size=40))
def test_words_are_what_white_space_divides(text) -> None:
    tokenizer = byte_level()
    words = hf.words(tokenizer, tokenizer(text)["input_ids"])
    assert ["".join(word) for word in pieces(words)] == text.split()


def test_a_word_ends_at_a_special_token() -> None:
    tokenizer = byte_level()
    ids = tokenizer("<s>two cat</s></s>cat two</s><pad>")["input_ids"]
    words = hf.words(tokenizer, ids)
    assert pieces(words) == [["two"], ["cat"], ["cat"], ["two"]]
    assert places(words) == [1, 2, 5, 6]
    words = hf.words(tokenizer, ids, special=True)
    expected = ["<s>", "two", "cat", "</s>", "</s>", "cat", "two", "</s>", "<pad>"]
    assert pieces(words) == [[text] for text in expected]
    assert places(words) == list(range(9))


def test_marks_that_have_no_name_are_special() -> None:
    from tokenizers import AddedToken

    tokenizer = byte_level({"unk_token": "<|end|>", "eos_token": "<|end|>"})
    tokenizer.add_tokens([AddedToken("<|user|>", special=True)], special_tokens=True)
    ids = tokenizer("<|user|>two cat<|end|>")["input_ids"]
    assert pieces(hf.words(tokenizer, ids)) == [["two"], ["cat"]]
    assert pieces(hf.words(tokenizer, ids, special=True))[0] == ["<|user|>"]


def test_part_of_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = byte_level()
    ids = tokenizer("cat 🐈")["input_ids"][:-1]
    assert pieces(hf.words(tokenizer, ids)) == [["cat"], ["\N{REPLACEMENT CHARACTER}"]]
    assert places(hf.words(tokenizer, ids)) == list(range(len(ids)))


def test_white_space_alone_is_no_word() -> None:
    tokenizer = byte_level()
    assert hf.words(tokenizer, []) == ()
    assert hf.words(tokenizer, tokenizer("<s> \n</s>")["input_ids"]) == ()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.long), r"of one text, \[N\], not int64 \[1, 4\]"),
        ([[1, 2], [3, 4]], r"not int64 \[2, 2\]"),
        (torch.rand(3), r"not float32 \[3\]"),
    ],
)
def test_words_are_of_one_text(ids, message) -> None:
    with pytest.raises(ValueError, match=message):
        hf.words(byte_level(), ids)


def test_one_picture_for_several_texts_says_what_to_do():
    encoding = {"input_ids": torch.ones(2, 3).long(), "pixel_values": torch.rand(1, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"1 rows for 2 examples.*repeat it, once for each"):
        hf.unpack(lambda **_: None, encoding)


def test_an_encoding_in_place_of_tensors_says_what_to_do():
    with pytest.raises(TypeError, match=r"not dict: hf\.unpack makes tensors of it"):
        GenericAttention(lambda x: x).attribute({"input_ids": torch.ones(1, 2).long()}, 0)
