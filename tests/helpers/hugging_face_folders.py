"""Folders as Hugging Face's `save_pretrained` writes them: tiny random models and what belongs to
them. Where transformers is not installed, the tests that import this are skipped.
"""

import pytest
import torch

T = pytest.importorskip("transformers")

TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
VISION = TINY | dict(image_size=32, patch_size=8)
CLASSES = ("cat", "dog", "house", "tree")


def clip_tokenizer():
    """Knows "two", "ca", "ts" and "and"; all other words are letters to it."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    merges = [("t", "w"), ("tw", "o</w>"), ("c", "a"), ("t", "s</w>"), ("a", "n"), ("an", "d</w>")]
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return T.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=20)


def siglip_tokenizer():
    """Knows "two" and "cat"; fills up on the left."""
    merges = [("c", "a"), ("ca", "t"), ("t", "w"), ("tw", "o"), ("▁", "cat")]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁abcdefghijklmnopqrstuvwxyz"]
    words += map("".join, merges)
    vocabulary = {word: index for index, word in enumerate(words)}
    return T.Siglip2Tokenizer(vocab=vocabulary, merges=merges)


def bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "cat", "##s", "and", ","]
    return T.BertTokenizer(vocab={word: index for index, word in enumerate(words)})


def clip(folder, name="CLIPModel", **options):
    """A CLIP with its processor; `name` may be another class of its configuration."""
    tokenizer = clip_tokenizer()
    marks = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = TINY | marks | dict(vocab_size=len(tokenizer), max_position_embeddings=20)
    config = T.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8, **options)
    model = getattr(T, name)(config).eval()
    model.save_pretrained(folder)
    images = T.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    T.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return model


def siglip(folder, longest=64):
    tokenizer = siglip_tokenizer()
    marks = dict(bos_token_id=2, eos_token_id=1, pad_token_id=0)
    text = TINY | marks | dict(vocab_size=len(tokenizer), max_position_embeddings=longest)
    model = T.SiglipModel(T.SiglipConfig(text_config=text, vision_config=VISION)).eval()
    model.save_pretrained(folder)
    images = T.SiglipImageProcessor(size={"height": 32, "width": 32})
    T.SiglipProcessor(images, tokenizer).save_pretrained(folder)
    return model


def detr(folder, kind="Detr", decided=8.0, **processing):
    """A DETR that finds several things in any image; the higher `decided`, the surer it is."""
    backbone = T.ConvNextConfig(
        num_stages=2, depths=[1, 1], hidden_sizes=[8, 16], out_features=["stage2"]
    )
    config = getattr(T, f"{kind}Config")(
        backbone_config=backbone, d_model=16, encoder_layers=1, encoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=16, decoder_attention_heads=2,
        num_queries=12, id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
    )  # fmt: skip
    model = getattr(T, f"{kind}ForObjectDetection")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.class_labels_classifier.weight.mul_(decided)
        # The queries differ, so that each class is some query's.
        model.model.query_position_embeddings.weight.mul_(30)
        model.class_labels_classifier.bias.zero_()
        usual = model(torch.randn(1, 3, 48, 72)).logits.mean((0, 1))
        model.class_labels_classifier.bias.sub_(usual)
    model.save_pretrained(folder)
    sizes = dict(size={"shortest_edge": 48, "longest_edge": 80}) | processing
    T.DetrImageProcessor(**sizes).save_pretrained(folder)
    return model
