"""A file of texts, with the sequence classifier that is explained on them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn import hf
from captum_generic_attn.captum_api.targets import choose_output
from captum_generic_attn.errors import DataError, PlanError
from captum_generic_attn.evaluation.batch import Batch, Examples, Rationale, drawn
from captum_generic_attn.evaluation.plan import Plan, TextData
from captum_generic_attn.evaluation.scores import METRICS, names_of
from captum_generic_attn.evaluation.text_classifier import TextClassifier, load_text_classifier
from captum_generic_attn.metrics import TOKENS, Tokens
from captum_generic_attn.metrics.rationales import WORD_COUNTS


@dataclass(frozen=True)
class Line:
    """One text of a file, as it stands there.

    `place` names file and line; `rationale` holds the places of marked words, words being what
    white space separates; `label` is an index or a name.
    """

    place: str
    text: str
    rationale: tuple[int, ...] | None
    label: object


def read_texts(file: Path) -> list[Line]:
    """The texts of a JSONL file.

    Args:
        file: with one `{"text": ..., "rationale": [...], "label": ...}` a line; the last two may be
            left out, and other keys are not read.

    Raises:
        DataError: if a line is something else, or there is none; the message names the line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "texts.jsonl")
        ...     _ = file.write_text('{"text": "a good film", "rationale": [1]}')
        ...     read_texts(file)[0].rationale
        (1,)
    """
    try:
        # Not splitlines(): JSON strings may contain other line separators.
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(file)!r} cannot be read as text in UTF-8: {error}") from error
    found = [
        _line(line, f"{file}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{str(file)!r} holds no text")
    return found


def words_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """The index of each token's word, where words are separated by white space.

    Annotators mark words without a tokenizer. A tokenizer that splits "well-made" in three must not
    shift the indices of later words, so its own word count is not used.

    Args:
        text: the tokenized text.
        offsets: start and end of each token in the text; an empty range is a special token.

    Example:
        >>> words_of_tokens("a well-made film", [(0, 0), (0, 1), (2, 6), (6, 7), (7, 11), (11, 16)])
        [None, 0, 1, 1, 1, 2]
    """
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    # Some tokenizers include the space before a word, so the last character decides.
    return [
        None
        if start == end or text[start:end].isspace()
        else sum(place < start + len(text[start:end].rstrip()) for place in ends)
        for start, end in offsets
    ]


class TextSet(Examples):
    """The texts of a plan, tokenized.

    Args:
        plan: whose data are texts.

    Raises:
        PlanError: if the plan does not fit the texts or the model.
        DataError: if a text cannot be evaluated.
        UnavailableWeightsError: if the model is not to be had.
        ImportError: if transformers is not installed.
    """

    def __init__(self, plan: Plan) -> None:
        assert isinstance(plan.data, TextData)  # noqa: S101 - `run` chooses by it
        assert plan.model is not None  # noqa: S101 - the plan asks for a name
        found = read_texts(plan.data.texts)
        lines = [found[i] for i in drawn(len(found), plan.limit, plan.seed)]
        self.classifier = load_text_classifier(plan.model)
        self._device = plan.device
        self.classifier.model.to(plan.device)
        self._tokenizer = self.classifier.tokenizer
        self._labels = None if plan.explain == "prediction" else _labels(lines, self.classifier)
        self._encoded = [self._encode(line) for line in lines]
        self._check_vocabulary()
        self._rationales = [
            self._rationale(line, encoded)
            for line, encoded in zip(lines, self._encoded, strict=True)
        ]
        self.metrics = self._metrics(plan)
        self.multi_label = self.classifier.multi_label
        # A model that cannot pad takes its texts one by one.
        self.batch_size = plan.batch_size if self._tokenizer.pad_token is not None else 1
        self.fractions = TOKENS
        longest = max((len(r.marked) for r in self._rationales if r is not None), default=0)
        # For more words than the longest text has, all its words are selected again.
        self.ks = tuple(k for k in WORD_COUNTS if k < longest + WORD_COUNTS[0])
        self.notes = self._told(lines, plan)
        self.about = {
            "model": self.classifier.name,
            "kind": "texts",
            "available": len(found),
            "evaluated": len(lines),
            "with_rationale": sum(r is not None for r in self._rationales),
            "multi_label": self.multi_label,
        }

    def __len__(self) -> int:
        return len(self._encoded)

    def batch(self, places: range) -> Batch:
        """The texts at these places, padded to the longest."""
        names = [*self._tokenizer.model_input_names, "special_tokens_mask"]
        rows = [self._encoded[place] for place in places]
        given = {name: [row[name] for row in rows] for name in names if name in rows[0]}
        if self._tokenizer.pad_token is None:
            padded: Mapping[str, Tensor] = {n: torch.tensor(v) for n, v in given.items()}
        else:
            padded = self._tokenizer.pad(given, return_tensors="pt")
        padded = {name: tensor.to(self._device) for name, tensor in padded.items()}
        encoding = {n: t for n, t in padded.items() if n != "special_tokens_mask"}
        special = padded["special_tokens_mask"].bool()
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        order = torch.arange(special.shape[1])
        if self._tokenizer.padding_side == "left":
            order = order.flip(0)
        present = (order < lengths[:, None]).to(self._device)
        model, ids, rest = hf.unpack(self.classifier.model, encoding, "input_ids")

        def forward(*inputs: Tensor) -> Tensor:
            return choose_output(model(*inputs), "logits")

        if self._labels is None:
            with torch.no_grad():
                targets = forward(ids, *rest).argmax(-1)  # type: ignore[arg-type]
        else:
            targets = torch.tensor([self._labels[p] for p in places], device=self._device)
        assert isinstance(ids, Tensor)  # noqa: S101 - one name, one tensor
        arguments = (ids, *rest)
        removal = Tokens(
            arguments, dropped=range(len(arguments)), present=present, protected=special
        )
        return Batch(
            first=places.start,
            forward=forward,
            inputs=ids,
            rest=rest,
            targets=targets,
            removal=lambda _: removal,
            present=present,
            rationales=[self._rationales[place] for place in places],
        )

    def _encode(self, line: Line) -> dict[str, Any]:
        encoded = self._tokenizer(
            line.text,
            truncation=self.classifier.longest is not None,
            max_length=self.classifier.longest,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        row = dict(encoded.items())
        row["cut"] = bool(encoded.encodings[0].overflowing)
        row["words"] = words_of_tokens(line.text, row.pop("offset_mapping"))
        if all(word is None for word in row["words"]):
            raise DataError(f"{line.place}: the tokenizer makes no token of the text")
        return row

    def _check_vocabulary(self) -> None:
        """Check that the tokenizer knows words; one from a folder without its files does not."""
        known = {
            token
            for row in self._encoded
            for token, word in zip(row["input_ids"], row["words"], strict=True)
            if word is not None
        }
        if known == {self._tokenizer.unk_token_id}:
            raise DataError(
                f"the tokenizer of {self.classifier.name} knows no word of the texts: was it saved "
                "beside the model?"
            )

    def _rationale(self, line: Line, encoded: Mapping[str, Any]) -> Rationale | None:
        if line.rationale is None:
            return None
        words = encoded["words"]
        known = {word for word in words if word is not None}
        count = max(known) + 1
        lost = sorted(set(range(count)) - known)
        if lost:
            raise DataError(
                f"{line.place}: the tokenizer makes no token of word {lost[0]} "
                f"({line.text.split()[lost[0]]!r}): take it out of text and rationale"
            )
        marked = torch.zeros(count, dtype=torch.bool)
        marked[[word for word in line.rationale if word < count]] = True
        return Rationale(words, marked) if marked.any() else None

    def _metrics(self, plan: Plan) -> tuple[str, ...]:
        has = any(rationale is not None for rationale in self._rationales)
        if "token_f1" in (plan.metrics or ()) and not has:
            raise PlanError(
                f"{plan.file}, [evaluation] metrics: 'token_f1' needs texts with marked words: "
                'none has a "rationale" that marks a word'
            )
        metrics = plan.metrics or names_of(*(["rationales"] if has else []))
        bare = next((e for e in self._encoded if not any(e["special_tokens_mask"])), None)
        if bare is not None and any(METRICS[metric].removed for metric in metrics):
            raise PlanError(
                f"{plan.file}, [evaluation] metrics: the tokenizer of {self.classifier.name} adds "
                "no special token, so that nothing is left of a text whose words are all dropped; "
                "only 'token_f1' can be computed"
            )
        return metrics

    def _told(self, lines: Sequence[Line], plan: Plan) -> tuple[str, ...]:
        cut = sum(encoded["cut"] for encoded in self._encoded)
        notes = []
        if cut:
            notes.append(
                f"{cut} of {len(lines)} texts were cut to the {self.classifier.longest} tokens "
                "that the model takes, their rationales alike"
            )
        without = sum(rationale is None for rationale in self._rationales)
        if "token_f1" in self.metrics and without:
            notes.append(f"{without} of {len(lines)} texts mark no word: left out of token F1")
        if "token_f1" not in self.metrics and plan.metrics is None:
            notes.append("token F1 is not computed: no text has a rationale")
        return tuple(notes)


def _line(line: str, place: str) -> Line:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:  # nested too deeply
        raise DataError(f"{place} is no JSON that can be read: {error}") from error
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{place}: an object with "text": "..." is needed, not {line[:60]}')
    rationale = found.get("rationale")
    if rationale is None:
        return Line(place, text, None, found.get("label"))
    count = len(text.split())
    if not isinstance(rationale, list) or not all(
        type(word) is int and 0 <= word < count for word in rationale
    ):
        raise DataError(
            f'{place}: "rationale" lists places of words, from 0 to {count - 1} in this text '
            f"(words are what white space separates), not {json.dumps(rationale)[:60]}"
        )
    return Line(place, text, tuple(rationale), found.get("label"))


def _labels(lines: Sequence[Line], classifier: TextClassifier) -> list[int]:
    labels = []
    for line in lines:
        if line.label is None:
            raise DataError(f'{line.place}: explain = "label" needs a "label" in each line')
        try:
            labels.append(classifier.index(line.label))
        except ValueError as error:
            raise DataError(f"{line.place}: {error}") from error
    return labels
