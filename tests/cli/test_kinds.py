"""Which kind of model a name stands for."""

import json

import pytest
import transformers
from helpers import hugging_face_folders as folders

from captum_generic_attn.cli.kinds import brings_weights, kind_of
from captum_generic_attn.errors import UnavailableWeightsError
from captum_generic_attn.models.checkpoints import is_hugging_face


def save_vit(folder, name):
    getattr(transformers, name)(transformers.ViTConfig(**folders.VISION)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("save", "kind"),
    [
        (folders.clip, "a dual encoder of images and texts"),
        (lambda folder: folders.clip(folder, "CLIPForImageClassification"), "an image classifier"),
        (folders.siglip, "a dual encoder of images and texts"),
        (folders.detr, "a detector"),
        (lambda folder: save_vit(folder, "ViTForImageClassification"), "an image classifier"),
        # Without a head; that it was never trained is told when it is loaded.
        (lambda folder: save_vit(folder, "ViTModel"), "an image classifier"),
    ],
)
def test_a_configuration_says_what_the_model_does(save, kind, tmp_path):
    # The folder's name is no hint.
    save(tmp_path / "detr-clip-vit")
    assert kind_of(str(tmp_path / "detr-clip-vit")).name == kind


@pytest.mark.parametrize(
    ("save", "kind"),
    [(folders.clip, "a dual encoder of images and texts"), (folders.detr, "a detector")],
)
def test_a_configuration_that_names_no_class_goes_by_its_type(save, kind, tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kind_of(str(tmp_path)).name == kind


def test_a_model_of_texts_is_none_of_them(tmp_path):
    config = transformers.BertConfig(vocab_size=9, **folders.TINY)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    expected = r"is of type bert \(BertForSequenceClassification\): what is needed is an image"
    with pytest.raises(UnavailableWeightsError, match=expected):
        kind_of(str(tmp_path))


def test_a_folder_without_a_configuration_is_told(tmp_path):
    with pytest.raises(UnavailableWeightsError, match="no model can be loaded from the folder"):
        kind_of(str(tmp_path))


def test_names_of_hugging_face_and_of_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit_b_16").mkdir()
    assert [is_hugging_face(name) for name in ("vit_b_16", "owner/model")] == [True, True]
    others = "timm/test_vit", "torchvision/vit_b_32", "vit_b_32", "garments-clip"
    assert not any(is_hugging_face(name) for name in others)
    assert [brings_weights(name) for name in others] == [False, False, False, True]
    assert brings_weights(None)
