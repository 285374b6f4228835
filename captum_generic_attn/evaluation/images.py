"""A folder of images, with the classifier that is explained on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from captum_generic_attn.captum_api.targets import choose_output
from captum_generic_attn.errors import (
    DataError,
    PlanError,
    UnavailableWeightsError,
    UnknownModelError,
    UnreadableImageError,
)
from captum_generic_attn.evaluation.batch import Batch, Examples, drawn
from captum_generic_attn.evaluation.plan import ImageData, Plan
from captum_generic_attn.evaluation.scores import names_of
from captum_generic_attn.files.images import image_endings, open_image, open_rgb
from captum_generic_attn.metrics import PIXELS, Pixels, Removal, blurred
from captum_generic_attn.models.classifiers import ImageClassifier, load_classifier


class ImageSet(Examples):
    """The images of a plan; files are read batch by batch.

    Args:
        plan: a plan with images as data.

    Raises:
        PlanError: if the plan does not fit the images or the model.
        DataError: if there are no images, or masks or classes are missing for some.
        UnavailableWeightsError: if the model's weights are not available.
        ImportError: if a library that the model needs is not installed.
    """

    def __init__(self, plan: Plan) -> None:
        assert isinstance(plan.data, ImageData)  # noqa: S101 - `run` chooses by it
        self._plan = plan
        self._folder = plan.data.images
        self._masks = plan.data.masks
        found, others = _listed(self._folder)
        self._files = [found[i] for i in drawn(len(found), plan.limit, plan.seed)]
        self._check_masks()
        self.classifier = _load(plan)
        self.classifier.model.to(plan.device)
        if len(self.classifier.classes) < 2 and not self.classifier.multi_label:
            raise DataError(
                f"{self.classifier.name} has one class: whether it comes first says nothing, and "
                "its probability is always 1"
            )
        self._labels = None if plan.explain == "prediction" else self._named_by_folders()
        self._folder_note = (
            (f"{others} files in the folder are no images by their ending: not read",)
            if others
            else ()
        )
        self.notes = self._folder_note
        self._remarks: dict[str, None] = {}
        size = self._pixels(self._files[0]).shape[-2:]
        if plan.patch is not None and (size[0] % plan.patch or size[1] % plan.patch):
            raise PlanError(
                f"{plan.file}, [evaluation] patch = {plan.patch}: the model's images are "
                f"{size[0]} × {size[1]} pixels, and patches must tile them"
            )
        self.metrics = plan.metrics or names_of(*(["masks"] if self._masks else []))
        self.multi_label = self.classifier.multi_label
        self.batch_size = plan.batch_size
        self.fractions = PIXELS
        self.ks = ()
        self.about = {
            "model": self.classifier.name,
            "kind": "images",
            "available": len(found),
            "evaluated": len(self._files),
            "pixels": list(size),
            "multi_label": self.multi_label,
        }

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, places: range) -> Batch:
        """Read and preprocess the images at these indices.

        Raises:
            DataError: if one cannot be read, or their sizes differ after preprocessing.
        """
        files = [self._files[place] for place in places]
        tensors = [self._pixels(file) for file in files]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise DataError(
                f"{self.classifier.name} preprocesses images to different sizes: "
                f"{sorted(shapes)}; give images of one size"
            )
        pixels = torch.stack(tensors).to(self._plan.device)
        if self._labels is None:
            targets = self.classifier.probabilities(pixels).argmax(-1)
        else:
            targets = torch.tensor([self._labels[p] for p in places], device=pixels.device)
        model = self.classifier.model
        return Batch(
            first=places.start,
            # Captum's methods need a tensor; some models return more.
            forward=lambda *inputs: choose_output(model(*inputs)),
            inputs=pixels,
            rest=(),
            targets=targets,
            removal=lambda metric: self._removal(pixels, self._plan.removed_in(metric)),
            right=self._right(files) if self._masks is not None else None,
        )

    def _removal(self, pixels: Tensor, removed: str) -> Removal:
        if removed == "blur":
            baseline = blurred(pixels)
        elif removed == "mean":
            baseline = pixels.mean((2, 3), keepdim=True)
        else:
            # Black before the model's normalisation.
            mean, std = torch.tensor(self.classifier.mean), torch.tensor(self.classifier.std)
            baseline = (-mean / std).view(-1, 1, 1)
        return Pixels(pixels, baseline, patch=self._plan.patch)

    def _pixels(self, file: Path) -> Tensor:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            image = _read(open_rgb, file)
        self._remarks |= dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning)
        if self._remarks:
            first, *others = self._remarks
            more = f" (and {len(others)} other remarks on images)" if others else ""
            self.notes = (*self._folder_note, first + more)
        return self.classifier.preprocess(image)

    def _right(self, files: Sequence[Path]) -> Tensor:
        return torch.stack([self._mask(file) for file in files])

    def _mask(self, file: Path) -> Tensor:
        mask, image = (_read(open_image, path) for path in (self._mask_of(file), file))
        if mask.size != image.size:
            raise DataError(
                f"{str(self._mask_of(file))!r} has {mask.width} × {mask.height} pixels, its "
                f"image {image.width} × {image.height}"
            )
        # Only the model's own preprocessing knows how it crops and scales, so the mask goes through
        # it as a black and white image. Smoothed edges are true above one half.
        white = Image.fromarray(_marked(mask).astype(np.uint8) * 255).convert("RGB")
        shown = self.classifier.image(self.classifier.preprocess(white))
        return torch.from_numpy(shown.mean(2) > 0.5)

    def _mask_of(self, file: Path) -> Path:
        assert self._masks is not None  # noqa: S101 - only called if there are masks
        return self._masks / file.relative_to(self._folder).with_suffix(".png")

    def _check_masks(self) -> None:
        if self._masks is None:
            return
        missing = [file for file in self._files if not self._mask_of(file).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self._files)} images have no mask: "
                f"{str(missing[0])!r} needs {str(self._mask_of(missing[0]))!r}"
            )

    def _named_by_folders(self) -> list[int]:
        labels = []
        for file in self._files:
            name, *inside = file.relative_to(self._folder).parts
            if not inside:
                self._no_label(f"{str(file)!r} lies in no sub-folder that would name its class")
            try:
                labels.append(self.classifier.index(name))
            except ValueError as error:
                self._no_label(f"sub-folders must be named like classes: {error}")
        return labels

    def _no_label(self, reason: str) -> NoReturn:
        raise DataError(f'{self._plan.file}, [evaluation] explain = "label": {reason}')


def _listed(folder: Path) -> tuple[list[Path], int]:
    """The images in a folder and its sub-folders, sorted, and the number of other files."""
    endings = image_endings()
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    images = [path for path in files if path.suffix.lower() in endings]
    if not images:
        raise DataError(f"there is no image in {str(folder)!r}, nor in its sub-folders")
    return images, len(files) - len(images)


def _load(plan: Plan) -> ImageClassifier:
    try:
        return load_classifier(plan.model, plan.weights)
    except UnknownModelError as error:
        raise PlanError(f"{plan.file}, [model] name = {plan.model!r}: {error}") from error
    except UnavailableWeightsError as error:
        # The loader's message is for the command line.
        here = (
            f" In {plan.file} that is weights under [model]." if "--weights" in str(error) else ""
        )
        raise UnavailableWeightsError(f"{error}{here}") from error


def _read(reader: Callable[[Path], Image.Image], file: Path) -> Image.Image:
    try:
        return reader(file)
    except UnreadableImageError as error:
        raise DataError(str(error)) from error


def _marked(mask: Image.Image) -> NDArray[np.bool_]:
    """Where a mask is nonzero; for a palette image, by its indices, regardless of opacity."""
    if mask.mode in {"RGBA", "LA"}:
        mask = mask.convert("RGB" if mask.mode == "RGBA" else "L")
    values = np.asarray(mask)
    marked: NDArray[np.bool_] = (values.reshape(*values.shape[:2], -1) != 0).any(-1)
    return marked
