"""What the command line needs to know of a kind of model. `kinds` has one class for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from captum_generic_attn.attribution import GenericAttention
from captum_generic_attn.cli.terminal import loaded, wrong

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from captum_generic_attn.cli.choices import Choices
    from captum_generic_attn.cli.seen import Seen
    from captum_generic_attn.files.images import Box
    from captum_generic_attn.models.classifiers import ImageClassifier
    from captum_generic_attn.models.detectors import Detector
    from captum_generic_attn.models.preprocessing import ImageModel


@dataclass(frozen=True)
class Findings:
    """The predictions of a model for an image, and the scores that are explained.

    Attributes:
        heading: the line above the table.
        columns: the cells of the table by the titles of its columns.
        left: titles of columns that hold words, not numbers.
        labels: a title for each panel of the figure.
        title: of the first explained score, where several methods explain it.
        targets: the explained scores of one image; empty where each text is a score.
        boxes: of a detector's panels, in pixels of what the model got.
    """

    heading: str
    columns: Mapping[str, Sequence[str]]
    left: Sequence[str]
    labels: Sequence[str]
    title: str
    targets: Sequence[Any] = ()
    boxes: Sequence[Box] = ()


@dataclass(frozen=True)
class Score:
    """The arguments of an attribution method: `method(forward).attribute(inputs, target, rest)`."""

    forward: Callable[..., Any]
    inputs: Tensor | tuple[Tensor, ...]
    target: Any = None
    rest: tuple[Tensor, ...] = ()


class Kind(ABC):
    """A model of one kind, loaded as the user chose it.

    Args:
        choices: the options of the command. A wrong one ends the command with code 2, and a model
            that cannot be loaded with code 1.
    """

    name: ClassVar[str]
    """The kind in words, with an article."""
    shipped: ClassVar[str]
    """The model of this kind that comes with the package."""
    table: ClassVar[str]
    """transformers' own table of the classes of this kind, in `models.auto.modeling_auto`."""

    model: ImageModel

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.refuse_options()
        self.model = loaded(self.load)
        self.read_options()

    @abstractmethod
    def refuse_options(self) -> None:
        """End the command if an option is of no use for this kind, or one is missing."""

    @abstractmethod
    def load(self) -> ImageModel:
        """The model of the user's choice."""

    @abstractmethod
    def read_options(self) -> None:
        """Read the options that depend on the model, or end the command."""

    @abstractmethod
    def look(self, seen: Seen) -> Findings:
        """What the model says of an image, and what of it is explained."""

    @abstractmethod
    def explain(self, seen: Seen, findings: Findings) -> Any:
        """The maps of the explained scores by `GenericAttention`, as `draw` takes them."""

    @abstractmethod
    def draw(self, seen: Seen, findings: Findings, maps: Any) -> Figure:
        """The figure of the image and of the maps."""

    @abstractmethod
    def first_score(self, seen: Seen, findings: Findings) -> Score:
        """The first explained score alone, for several methods."""

    @abstractmethod
    def checked_score(self, seen: Seen) -> Score:
        """What `verify` explains: two examples, so that they can be told apart."""


class KindWithClasses(Kind):
    """A kind whose models name classes: each score has an index, and texts are of no use."""

    model: ImageClassifier | Detector

    def refuse_options(self) -> None:  # noqa: D102
        if self.choices.texts:
            wrong(
                "--text",
                f"{self.name} takes no text: leave it out, or give a dual encoder, such as --model "
                "garments-clip",
            )

    def read_options(self) -> None:  # noqa: D102
        try:
            self.classes = [self.model.index(name) for name in self.choices.targets]
        except ValueError as error:
            wrong("--target", str(error))

    def explain(self, seen: Seen, findings: Findings) -> Any:  # noqa: D102
        method = GenericAttention(self.model.model, start_layer=self.choices.start_layer)
        maps = method.attribute_targets(seen.pixels[None], findings.targets)
        # The map is the same in every colour channel.
        return maps[:, 0, 0].numpy()

    def first_score(self, seen: Seen, findings: Findings) -> Score:  # noqa: D102
        return Score(self.model.logits, seen.pixels[None], findings.targets[0])

    def checked_score(self, seen: Seen) -> Score:  # noqa: D102
        both = torch.stack([seen.pixels, seen.pixels.flip(-1)])
        return Score(self.model.model, both, self.checked_target(seen.pixels))

    @abstractmethod
    def checked_target(self, pixels: Tensor) -> Any:
        """The score that `verify` explains."""
