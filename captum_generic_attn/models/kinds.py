"""Which kind of model a name stands for, told before its weights are loaded. The command line asks,
to explain each kind in its own way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from captum_generic_attn.errors import UnavailableWeightsError
from captum_generic_attn.models.checkpoints import hugging_face_config

SHIPPED_VIT, SHIPPED_CLIP, SHIPPED_DETR = "garments-vit", "garments-clip", "garments-detr"
"""Names of the models that come with the package."""

Kind = Literal["image classifier", "dual encoder", "detector"]

_SHIPPED: dict[str, Kind] = {
    SHIPPED_VIT: "image classifier",
    SHIPPED_CLIP: "dual encoder",
    SHIPPED_DETR: "detector",
}
# transformers' own tables of which classes do what. CLIP's configuration belongs to a dual encoder
# and to a classifier: where it does not say which was saved, it was most likely the first.
_TABLES: dict[Kind, str] = {
    "detector": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "dual encoder": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "image classifier": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


def is_hugging_face(name: str) -> bool:
    """Whether a name is that of a folder or of a model of the hub (`owner/model`).

    Example:
        >>> is_hugging_face("openai/clip-vit-base-patch32"), is_hugging_face("timm/test_vit")
        (True, False)
    """
    owner, slash, _ = name.partition("/")
    return Path(name).is_dir() or (bool(slash) and owner not in {"timm", "torchvision"})


def brings_weights(name: str | None) -> bool:
    """Whether weights belong to that name: others may be given to timm's and torchvision's models.

    Example:
        >>> brings_weights("garments-clip"), brings_weights("vit_b_16")
        (True, False)
    """
    return name is None or name in _SHIPPED or is_hugging_face(name)


def kind_of(name: str | None) -> Kind:
    """What a model does, by its name; of a Hugging Face model, by its configuration.

    Args:
        name: as `load_classifier`, `load_dual_encoder` and `load_detector` take it.

    Raises:
        UnavailableWeightsError: a Hugging Face model is of another kind, or has no configuration.
        ImportError: a Hugging Face model without transformers installed.

    Example:
        >>> kind_of(None), kind_of("vit_b_16"), kind_of("garments-detr")
        ('image classifier', 'image classifier', 'detector')
    """
    if name in _SHIPPED:
        return _SHIPPED[name]
    if name is None or not is_hugging_face(name):
        return "image classifier"
    config = hugging_face_config(name)
    saved = set(config.architectures or ())
    classes = {kind: _classes(table, config) for kind, table in _TABLES.items()}
    kinds = [kind for kind, known in classes.items() if known & saved]
    # A class of the same type without the head that does it: what loads the model tells what lacks.
    kinds += [kind for kind, known in classes.items() if known]
    if not kinds:
        raise UnavailableWeightsError(
            f"{name!r} is of type {config.model_type} ({', '.join(saved) or 'no architecture'}): "
            "an image classifier, a dual encoder of pictures and texts, or a detector is needed"
        )
    return kinds[0]


def _classes(table: str, config: Any) -> set[str]:
    """The classes of transformers that one of its tables has for a type of model."""
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, table).get(config.model_type, ())
    return {found} if isinstance(found, str) else set(found)
