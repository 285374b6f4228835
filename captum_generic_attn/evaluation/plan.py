"""The plan of an evaluation, parsed from a TOML file.

`read_plan` converts the file to frozen records. It reports all errors that can be found without the
model or the data, before minutes of work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from captum_generic_attn.errors import PlanError
from captum_generic_attn.evaluation.scores import METRICS, names_of
from captum_generic_attn.evaluation.tables import Table, read_tables

GENERIC = "generic"
"""The short name of this package's method, as on the command line."""
REMOVED = ("black", "mean", "blur")
"""Baselines of removed pixels: black, the image's mean colour, or the blurred image."""
_ON_IDS = "made for continuous inputs, while token ids are whole numbers"
_KEYS = {
    "model": ("name", "weights", "device"),
    "data": ("images", "masks", "texts", "limit"),
    "evaluation": (
        "methods", "metrics", "explain", "removed", "patch", "batch_size", "seed",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ImageData:
    """A folder of images, and optionally a folder of masks of the annotated places."""

    images: Path
    masks: Path | None


@dataclass(frozen=True)
class TextData:
    """A file of texts, one JSON object per line."""

    texts: Path


@dataclass(frozen=True)
class Plan:
    """The plan of an evaluation.

    Attributes:
        file: the TOML file.
        model: name of the model; `None` for the shipped one.
        weights: file of its weights; `None` for those of its library.
        device: PyTorch's name of the device.
        data: images or texts.
        limit: maximum number of examples, drawn at random; `None`: all.
        methods: names as in `comparison.all_methods`.
        left_out: methods that "all" does not include here, with the reasons.
        metrics: names in `scores.METRICS`; `None`: all that the data allow.
        explain: the explained class: the predicted one, or the label in the data.
        removed: one of `REMOVED` for all metrics; `None`: the baseline of each metric's paper.
        patch: side in pixels of patches that are removed as a whole; `None`: single pixels.
        batch_size: the maximum number of examples per forward pass.
        seed: seed of all random numbers.
    """

    file: Path
    model: str | None
    weights: Path | None
    device: str
    data: ImageData | TextData
    limit: int | None
    methods: tuple[str, ...]
    left_out: Mapping[str, str]
    metrics: tuple[str, ...] | None
    explain: Literal["prediction", "label"]
    removed: str | None
    patch: int | None
    batch_size: int
    seed: int

    def removed_in(self, metric: str) -> str:
        """The baseline of removed pixels in a metric."""
        return self.removed or str(METRICS[metric].removed)


def read_plan(file: Path) -> Plan:
    r"""Parse the TOML file of an evaluation.

    Args:
        file: a file with the tables `[model]`, `[data]` and `[evaluation]`; the comments of
            `docs/evaluate.toml` explain each key.

    Raises:
        PlanError: if a setting is not possible; the message names table and key, what was found and
            what is allowed.
        ImportError: if `tomli` is not installed, on Python 3.10.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "plan.toml")
        ...     _ = file.write_text('[data]\nimages = "."\n[evaluation]\nmethods = ["generic"]')
        ...     read_plan(file).methods
        ('Generic attention',)
    """
    tables = read_tables(file, _KEYS)
    model, data, chosen = tables["model"], tables["data"], tables["evaluation"]
    source = _source(data)
    texts = isinstance(source, TextData)
    name, weights = _model(model, texts=texts)
    methods, left_out = _methods(chosen, texts=texts)
    if texts:
        for key in ("removed", "patch"):
            if key in chosen:
                chosen.wrong(key, "it is about pixels; words are dropped: leave it out")
    return Plan(
        file=file,
        model=name,
        weights=weights,
        device=_device(model),
        data=source,
        limit=data.whole("limit", least=1),
        methods=methods,
        left_out=left_out,
        metrics=_metrics(chosen, source),
        explain="label" if chosen.one_of("explain", ("prediction", "label")) == "label"
        else "prediction",
        removed=chosen.one_of("removed", REMOVED),
        patch=chosen.whole("patch", least=1),
        batch_size=chosen.whole("batch_size", least=1) or 16,
        # NumPy's seeds have 32 bits, and each batch adds its index to the seed.
        seed=chosen.whole("seed", least=0, most=2**31) or 0,
    )  # fmt: skip


def _source(data: Table) -> ImageData | TextData:
    if ("images" in data) == ("texts" in data):
        raise PlanError(
            f"{data.file}, [data]: either images = FOLDER or texts = FILE is needed"
            + (", not both" if "images" in data else "")
        )
    images, texts = data.folder("images"), data.existing_file("texts")
    if images is not None:
        return ImageData(images, data.folder("masks"))
    if "masks" in data:
        data.wrong("masks", "they belong to images; texts have a rationale in each line")
    assert texts is not None  # noqa: S101 - one of the two is there
    return TextData(texts)


def _model(model: Table, *, texts: bool) -> tuple[str | None, Path | None]:
    name, weights = model.text("name"), model.existing_file("weights")
    if texts and name is None:
        model.wrong(
            "name",
            "for texts, the Hugging Face id or the folder of a sequence classifier is needed",
        )
    if weights is not None and name is None:
        model.wrong("weights", "give the name of the model that they belong to as well")
    beside = None if name is None else model.path("name")
    folder = beside is not None and beside.is_dir()
    if weights is not None and (texts or folder):
        model.wrong("weights", "a Hugging Face model brings its own weights: leave them out")
    return str(beside) if folder else name, weights


def _device(model: Table) -> str:
    import torch

    name = model.text("device") or "cpu"
    try:
        usable = torch.empty(0, device=name).device.type != "meta"
        reason = "it holds no numbers"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        usable, reason = False, str(error).partition("\n")[0]
    if not usable:
        model.wrong("device", f"PyTorch cannot compute on it here: {reason}")
    return name


def _methods(chosen: Table, *, texts: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    """The names of the methods, and the methods that "all" leaves out."""
    from torch.nn import Identity

    from captum_generic_attn.captum_api.base import ModelAttribution
    from captum_generic_attn.comparison import all_methods

    known = all_methods(Identity())
    unfit = {
        name: _ON_IDS
        for name, method in known.items()
        if texts and not isinstance(method, ModelAttribution)
    }
    generic = next(iter(known))
    if chosen.values.get("methods", [GENERIC]) == "all":
        return tuple(name for name in known if name not in unfit), unfit
    if isinstance(chosen.values.get("methods"), str):
        chosen.wrong("methods", '"all", or a list of names is needed, such as ["generic", "LRP"]')
    given = chosen.some_of("methods", [GENERIC, *known]) or (GENERIC,)
    names = tuple(generic if name == GENERIC else name for name in given)
    if len(set(names)) < len(names):
        chosen.wrong("methods", f"{GENERIC!r} and {generic!r} are the same method")
    for name in names:
        if name in unfit:
            fit = [one for one in known if one not in unfit]
            chosen.wrong("methods", f"{name!r} cannot explain texts: {unfit[name]}. There is {fit}")
    return names, {}


def _metrics(chosen: Table, source: ImageData | TextData) -> tuple[str, ...] | None:
    metrics = chosen.some_of("metrics", tuple(METRICS))
    texts = isinstance(source, TextData)
    for metric in metrics or ():
        if texts and metric not in names_of("rationales"):
            chosen.wrong("metrics", f"{metric!r} is a metric of images, not of texts")
        if not texts and metric not in names_of("masks"):
            chosen.wrong("metrics", f"{metric!r} is a metric of texts, not of images")
        if isinstance(source, ImageData) and source.masks is None and metric not in names_of():
            chosen.wrong("metrics", f"{metric!r} needs masks = FOLDER under [data]")
    return metrics
