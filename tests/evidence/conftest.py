"""The scripts of `benchmarks/evidence`, which lie beside the package, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FOLDERS = BENCHMARKS / "evidence", BENCHMARKS / "garments"
SCRIPTS = (
    "clip", "detr", "document", "figures", "lxmert", "methods", "tables", "visualbert", "vit",
    "vqa",
)  # fmt: skip


@pytest.fixture(scope="session")
def sample() -> Path:
    """The part of Fashion-MNIST's test split that lies in the repository."""
    return BENCHMARKS / "garments" / "sample"


@pytest.fixture(scope="module")
def evidence():
    for needed in ("pycocotools", "scipy", "sklearn", "torchmetrics", "tqdm", "transformers"):
        pytest.importorskip(needed)
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for folder in FOLDERS:
            patch.syspath_prepend(folder)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).parent in FOLDERS:
                sys.modules.pop(name)
