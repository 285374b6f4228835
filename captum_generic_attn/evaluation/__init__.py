r"""Evaluation of explanations from a TOML file, for `captum-generic-attn evaluate` and for Python.

`plan` parses the file. `images` and `texts` are the data sets with their models. `run` processes
them batch by batch, `scores` computes one metric on one batch, and `report` holds the results.

Example:
    >>> import tempfile
    >>> from pathlib import Path
    >>> from captum_generic_attn import demo
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     demo.canvases()[0].image().save(Path(folder, "canvas.png"))
    ...     file = Path(folder, "plan.toml")
    ...     _ = file.write_text('[data]\nimages = "."\n[evaluation]\nmetrics = ["deletion"]')
    ...     report = evaluate(read_plan(file))
    >>> list(report.figures)
    ['Generic attention', 'Random, 8 × 8']
    >>> report.figures["Generic attention"]["deletion"].count
    1
"""

from captum_generic_attn.evaluation.plan import Plan, read_plan
from captum_generic_attn.evaluation.report import Report
from captum_generic_attn.evaluation.run import evaluate

__all__ = ["Plan", "Report", "evaluate", "read_plan"]
