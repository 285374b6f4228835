"""Text classifiers of Hugging Face with their tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from captum_generic_attn.errors import UnavailableWeightsError
from captum_generic_attn.evaluation.tables import nearest
from captum_generic_attn.models.checkpoints import from_hugging_face

_UNSET = 10**6  # tokenizers without a limit report an enormous one


@dataclass(frozen=True)
class TextClassifier:
    """A sequence classifier in evaluation mode with what is needed to feed it a text.

    Attributes:
        name: how to call it in a message.
        model: takes `input_ids` and what else the tokenizer makes; returns an output with `.logits`
            `[B, K]`.
        tokenizer: a fast one, which knows from where in the text each token is.
        classes: the K names.
        multi_label: whether each class is judged by itself (sigmoid).
    """

    name: str
    model: nn.Module
    tokenizer: Any
    classes: tuple[str, ...]
    multi_label: bool

    @property
    def longest(self) -> int | None:
        """The maximum number of tokens; `None` if neither model nor tokenizer has a limit."""
        if self.tokenizer.model_max_length < _UNSET:
            return int(self.tokenizer.model_max_length)
        config: Any = self.model.config
        places = getattr(config, "max_position_embeddings", None)
        if places is None:
            return None
        # RoBERTa-like models count positions from the padding index on.
        behind = [
            module.padding_idx + 1
            for name, module in self.model.named_modules()
            if name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ]
        return int(places) - max(behind, default=0)

    def index(self, label: object) -> int:
        """The index of a class given by its index or its name, whatever its case.

        Raises:
            ValueError: there is no such class; the message lists those that are alike.
        """
        count = len(self.classes)
        if type(label) is int:
            if 0 <= label < count:
                return label
            raise ValueError(f"label {label}: {self.name} has the classes 0 to {count - 1}")
        if not isinstance(label, str):
            raise ValueError(f"label {label!r}: the name or the index of a class is needed")  # noqa: TRY004 - of a file
        folded = [name.casefold() for name in self.classes]
        if folded.count(label.strip().casefold()) == 1:
            return folded.index(label.strip().casefold())
        listed = f"; there is {', '.join(self.classes)}" if count <= 20 else ""
        raise ValueError(
            f"label {label!r}: {self.name} has no such class among its {count}"
            f"{nearest(label, self.classes)}{listed}"
        )


def load_text_classifier(name: str) -> TextClassifier:
    """The sequence classifier of that name, on the CPU, float32, in evaluation mode.

    Args:
        name: a folder that `save_pretrained` wrote, of model and tokenizer, or a Hugging Face id.

    Raises:
        UnavailableWeightsError: there is none, it was never trained, or its tokenizer is not fast.
        ImportError: transformers is not installed.
    """
    model, tokenizer, what = from_hugging_face(
        name, "sequence classifier", "AutoModelForSequenceClassification",
        "tokenizer", "AutoTokenizer",
    )  # fmt: skip
    if not tokenizer.is_fast:
        raise UnavailableWeightsError(
            f"the tokenizer of {what} is a slow one, which does not tell from where in the text a "
            "token is: save one with a tokenizer.json"
        )
    count = model.config.num_labels
    if count < 2:
        raise UnavailableWeightsError(
            f"{what} gives one score for a text (regression): it names no classes"
        )
    return TextClassifier(
        name,
        model,
        tokenizer,
        tuple(model.config.id2label[i] for i in range(count)),
        model.config.problem_type == "multi_label_classification",
    )
