"""Conditions under which every test runs: seeded, on one thread, off line, without a display."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_conditions():
    """Equal numbers need equal seeds and an equal number of threads."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
