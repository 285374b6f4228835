"""A warning where the explained token is padding, and none where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import sentences, tiny_text
from torch import Tensor, nn

from captum_generic_attn import (
    AttentionGradCam,
    AttentionRollout,
    GenericAttention,
    TransformerAttribution,
    hf,
)

LENGTHS = torch.tensor([6, 4, 3])
RIGHT = torch.arange(6) < LENGTHS[:, None]
LEFT = RIGHT.flip(1)


class Masked(nn.Module):
    """A text model whose attention a mask over tokens (True: a token) is given to.

    `form`: fused with a mask, fused and causal with a mask, written out, or without the mask.
    """

    def __init__(self, form: str = "fused") -> None:
        super().__init__()
        self.text = tiny_text("tokens", depth=3)
        self.form = form

    def states(self, x: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` `[B, N, N]` False where a query may not look."""
        allowed = hidden[:, None]
        if self.form == "causal":
            allowed = allowed & torch.ones(x.shape[1], x.shape[1]).tril().bool()
        for block in self.text.blocks:
            q, k, v = block.qkv(block.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            if self.form == "eager":
                logits = (q @ k.mT * 8**-0.5).masked_fill(~allowed, torch.finfo(x.dtype).min)
                mixed = logits.softmax(-1) @ v
            elif self.form == "blind":
                mixed = F.scaled_dot_product_attention(q, k, v)
            else:
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
            x = x + block.proj(mixed.transpose(1, 2).flatten(2))
        return x

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        x = self.text.words(input_ids)
        hidden = mask.bool()[:, None].expand(-1, x.shape[1], -1)
        return self.text.head(self.states(x, hidden))


def seen(call: Callable[[], object]) -> list[str]:
    """The warnings of padding, of a call that gives no other."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    found = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert all("explained token is padding" in text for text in found), found
    return found


def attributed(model, mask: Tensor | None, target=(-1, 1), **options) -> list[str]:
    rest = () if mask is None else (mask,)
    return seen(lambda: GenericAttention(model, **options).attribute(sentences(), target, rest))


FORMS = pytest.mark.parametrize("form", ["fused", "eager", "causal"])


# --- padding


@FORMS
@pytest.mark.parametrize("kind", ["bool", "long", "double"])
def test_a_position_from_the_end_of_texts_padded_on_the_right(form: str, kind: str) -> None:
    (message,) = attributed(Masked(form), getattr(RIGHT, kind)())
    assert message == (
        "the explained token is padding, as a mask among the arguments says: example [1, 2] in "
        "stream 'input_ids'. A position that counts from the end, as in target=(-1, class) or "
        "rows=-1, is one of padding where texts are padded on the right: name the last token of "
        "each text, target=[(length - 1, class), ...] or rows=lengths - 1, or pad on the left"
    )


@FORMS
def test_what_the_message_advises_is_not_warned_of(form: str) -> None:
    assert not attributed(Masked(form), RIGHT, [(int(n) - 1, 1) for n in LENGTHS])
    assert not attributed(Masked(form), RIGHT, (0, 1), rows=LENGTHS - 1)
    assert not attributed(Masked(form), LEFT.long())


@FORMS
def test_rows_of_the_user(form: str) -> None:
    (message,) = attributed(Masked(form), RIGHT, (0, 1), rows=4)
    assert "example [1, 2] in stream 'input_ids'" in message
    (message,) = attributed(Masked(form), RIGHT, (0, 1), rows=[4, 5])
    assert "example [1, 2] in stream 'input_ids'" in message
    assert not attributed(Masked(form), RIGHT, (0, 1), rows=[0, 5]), "not all of it is padding"


def test_the_mask_may_be_an_input() -> None:
    method = GenericAttention(Masked())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mask reaches no attention")
        with pytest.warns(UserWarning, match=r"padding, .* example \[1, 2\]"):
            method.attribute((sentences(), RIGHT.long()), (-1, 1))


def test_each_way_of_calling_warns_once_of_all_examples() -> None:
    method = GenericAttention(Masked())
    ids, rest = sentences(), (RIGHT,)
    for call in (
        lambda: method.attribute(ids, (-1, 1), rest, internal_batch_size=2),
        lambda: method.attribute(ids, (-1, 1), rest, internal_batch_size=1),
        lambda: method.attribute_targets(ids, [(0, 1), (-1, 1), (-1, 2)], rest),
        lambda: method.relevance(ids, (-1, 1), rest),
    ):
        (message,) = seen(call)
        assert "example [1, 2] in stream 'input_ids'." in message


@pytest.mark.parametrize("method", [AttentionGradCam, AttentionRollout, TransformerAttribution])
def test_baselines_warn_too(method) -> None:
    for mask, warned in ((RIGHT, 1), (LEFT, 0)):
        method_ = method(Masked())
        call = lambda mask=mask, method_=method_: method_.attribute(sentences(), (-1, 1), (mask,))
        assert len(seen(call)) == warned


def test_a_mask_whose_ones_are_padding() -> None:
    """`key_padding_mask` of PyTorch: attention says which of the two values is padding."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    def forward(x: Tensor, padding: Tensor) -> Tensor:
        return encoder(x, src_key_padding_mask=padding.bool())

    method = GenericAttention(forward)
    features = torch.randn(3, 6, 16, dtype=torch.float64)
    for last, first, mask in ((1, 0, ~RIGHT), (0, 1, ~LEFT)):
        assert len(seen(lambda m=mask: method.attribute(features, (-1, 3), m))) == last
        assert len(seen(lambda m=mask: method.attribute(features, (0, 3), m.long()))) == first


def test_a_token_of_the_model_s_own_stands_in_front() -> None:
    """Places of the mask are those of the words, not those of the stream."""
    model = Masked()
    start = nn.Parameter(torch.randn(1, 1, 16, dtype=torch.float64))

    def forward(input_ids: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat([start.expand(len(input_ids), -1, -1), model.text.words(input_ids)], 1)
        mask = F.pad(mask, (1, 0), value=True)
        return model.text.head(model.states(x, mask[:, None].expand(-1, 7, -1)))

    (message,) = attributed(forward, RIGHT)
    assert "example [1, 2] in stream" in message
    assert not attributed(forward, RIGHT, (0, 1)), "the model's own token"
    assert not attributed(forward, RIGHT, (3, 1)), "the third word, which all texts have"
    (message,) = attributed(forward, RIGHT, (4, 1))
    assert "example [2] in stream" in message


TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


class TestHuggingFace:
    """Tiny models with random weights, masks as tokenizers make them."""

    def encoding(self, mask: Tensor, **more: Tensor) -> dict[str, Tensor]:
        return {"input_ids": sentences(), "attention_mask": mask.long(), **more}

    def seen(self, model: nn.Module, encoding: dict[str, Tensor], target) -> list[str]:
        forward, ids, rest = hf.unpack(model.eval(), encoding)
        return seen(lambda: GenericAttention(forward).attribute(ids, target, rest))

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_language_models(self, attention: str) -> None:
        transformers = pytest.importorskip("transformers")
        for name in ("GPT2", "Llama"):
            kind = f"{name}ForCausalLM" if name == "Llama" else f"{name}LMHeadModel"
            config = getattr(transformers, f"{name}Config")(
                vocab_size=20, attn_implementation=attention, max_position_embeddings=8,
                num_key_value_heads=2, **TINY,
            )  # fmt: skip
            model = getattr(transformers, kind)(config)
            (message,) = self.seen(model, self.encoding(RIGHT), (-1, 7))
            assert "example [1, 2] in stream 'input_ids'" in message
            assert not self.seen(model, self.encoding(LEFT), (-1, 7))
            assert not self.seen(model, self.encoding(RIGHT | True), (-1, 7))

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_bert_and_its_token_types(self, attention: str) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(vocab_size=20, attn_implementation=attention, **TINY)
        types = (torch.arange(6) > 2).long().expand(3, -1).contiguous()
        classes = transformers.BertForSequenceClassification(config)
        words = transformers.BertForTokenClassification(config)
        for mask in (RIGHT, RIGHT | True):
            encoding = self.encoding(mask, token_type_ids=types)
            assert not self.seen(classes, encoding, 1)
            assert not self.seen(words, encoding, (1, 1))
        (message,) = self.seen(words, self.encoding(RIGHT, token_type_ids=types), (-1, 1))
        assert "example [1, 2] in stream 'input_ids'" in message


# --- no padding


@FORMS
def test_masks_of_ones_and_none(form: str) -> None:
    model = Masked(form)
    assert not attributed(model, torch.ones(3, 6))
    assert not attributed(lambda ids: model(ids, torch.ones(3, 6)), None)


@FORMS
@pytest.mark.parametrize("position", [0, -1])
def test_token_types_are_no_mask(form: str, position: int) -> None:
    """Tokens of both types attend to tokens of both."""
    model, kinds = Masked(form), nn.Embedding(2, 16).double()

    def forward(input_ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        x = model.text.words(input_ids) + kinds(types)
        return model.text.head(model.states(x, mask[:, None].expand(-1, 6, -1)))

    for types in (~RIGHT, RIGHT):
        call = lambda types=types: GenericAttention(forward).attribute(
            sentences(), (position, 1), (torch.ones(3, 6).bool(), types.long())
        )
        assert not seen(call)


@pytest.mark.parametrize("position", [0, 3, -1])
def test_texts_that_are_packed_into_one_row(position: int) -> None:
    """Tokens of a segment attend to their own segment alone: none of them is padding."""
    model = Masked()

    def forward(input_ids: Tensor, segments: Tensor) -> Tensor:
        same = segments[:, :, None] == segments[:, None]
        return model.text.head(model.states(model.text.words(input_ids), same))

    assert not attributed(forward, RIGHT.long(), (position, 1))


def test_a_causal_mask_of_as_many_tokens_as_examples() -> None:
    model, ids = Masked(), sentences(6)

    def forward(input_ids: Tensor, causal: Tensor) -> Tensor:
        return model.text.head(model.states(model.text.words(input_ids), causal.expand(6, -1, -1)))

    causal = torch.ones(6, 6).tril().bool()
    for position in (0, 3, -1):
        call = lambda position=position: GenericAttention(forward).attribute(
            ids, (position, 1), (causal,)
        )
        assert not seen(call)


def test_a_mask_that_attention_does_not_know() -> None:
    assert not attributed(Masked("blind"), RIGHT)


def test_masks_of_another_shape() -> None:
    model = Masked()
    lambda_ = lambda input_ids, mask: model(input_ids, mask[:, 0])
    assert not attributed(lambda_, RIGHT[:, None])
    labels = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    for other in (labels, torch.tensor([0, 1, 1]), RIGHT.long() * 2):
        call = lambda other=other: GenericAttention(
            lambda ids, mask, other: model(ids, mask)
        ).attribute(sentences(), (-1, 1), (RIGHT | True, other))
        assert not seen(call)


def test_mean_pooling_over_texts_and_their_padding() -> None:
    """The model reads padding among other tokens: that is how it works, and no slip of the user."""
    for pooled in (
        lambda scores, mask: scores.mean(1),
        lambda scores, mask: (scores * mask.unsqueeze(-1)).sum(1),
    ):
        model = Masked()
        forward = lambda ids, mask, model=model, pooled=pooled: pooled(model(ids, mask), mask)
        assert not attributed(forward, RIGHT, 1)


def test_no_more_than_one_row_of_one_call_is_asked(monkeypatch) -> None:
    """Where the first call clears all examples; and nothing at all where no mask tells."""
    from captum_generic_attn.capture.blocks import FusedBlocks

    asked: list[tuple[int, int]] = []
    ask = FusedBlocks.probabilities

    def counted(self):
        asked.append((self.count, self.queries))
        return ask(self)

    monkeypatch.setattr(FusedBlocks, "probabilities", counted)
    assert not attributed(Masked(), RIGHT, (0, 1))
    assert asked == [(6, 1)]
    asked.clear()
    assert not attributed(Masked(), RIGHT | True, (-1, 1))
    assert not asked
