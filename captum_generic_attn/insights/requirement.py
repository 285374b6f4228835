"""Captum Insights, or an error that says how to get it: for all of `insights` that needs it."""

from __future__ import annotations

import importlib

import captum


def require_insights() -> None:
    """Check that Captum Insights can be imported.

    Raises:
        ImportError: if it cannot; the message names both ways to have it.
    """
    try:
        importlib.import_module("captum.insights.attr_vis.server")
    except ImportError as error:
        raise ImportError(
            f"Captum Insights cannot be imported: {error}. Captum 0.8 is the last release that has "
            f"it, and this is Captum {captum.__version__}. Either make an environment with\n"
            "  pip install 'captum-generic-attn[insights]'\n"
            "which is captum<0.9, flask and flask-compress; or, to keep a newer Captum and NumPy "
            "installed, lay Captum 0.8.0 over it for one process:\n"
            "  pip install flask flask-compress\n"
            "  pip install --no-deps --target DIR captum==0.8.0\n"
            "  PYTHONPATH=DIR python ..."
        ) from error
