"""What is public: the names in the `__all__` of the package and of its namespaces."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

import captum_generic_attn

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "captum_generic_attn"
NAMESPACES = [f"{PACKAGE}.{name}" for name in captum_generic_attn._NAMESPACES]
PUBLIC = {name: set(importlib.import_module(name).__all__) for name in (PACKAGE, *NAMESPACES)}


def snippets(path):
    """The Python code of a notebook, or of a Markdown file."""
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
        # Lines for IPython alone are no Python.
        return [re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE) for source in sources]
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def names_used(code):
    """The names of the package that code imports, and attributes of its namespaces."""
    tree = ast.parse(code)
    spaces = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                yield node.module, alias.name
                spaces[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith(f"{PACKAGE}.") for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            space = spaces.get(node.value.id)
            if space in NAMESPACES:
                yield space, node.attr


DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("tutorials/*.ipynb")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_users_are_shown_public_names_alone(path):
    used = {pair for code in snippets(path) for pair in names_used(code)}
    assert {(home, name) for home, name in used if name not in PUBLIC.get(home, ())} == set()


@pytest.mark.parametrize("home", PUBLIC)
def test_public_names_are_there_and_none_stands_twice(home):
    module = importlib.import_module(home)
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(module.__all__) == len(PUBLIC[home])


def test_what_a_module_of_users_defines_is_public_or_underscored():
    """Of `hf`, the only namespace that is one file."""
    path = ROOT / PACKAGE / "hf.py"
    defined = {
        node.name
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    assert {name for name in defined if not name.startswith("_")} <= PUBLIC[f"{PACKAGE}.hf"]
