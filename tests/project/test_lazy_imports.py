"""What importing the package loads: its names are imported when they are first used."""

import ast
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import captum_generic_attn

PACKAGE = "captum_generic_attn"
NAMESPACES = {
    "baselines",
    "demo",
    "hf",
    "insights",
    "lrp",
    "metrics",
    "models",
    "visualization",
}


def printed(code, *arguments):
    """What code prints in a process of its own, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def loaded_by(statement):
    return set(printed(f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"))


@pytest.fixture(scope="module")
def loaded_by_captum():
    return loaded_by("import captum.attr")


def test_the_method_loads_what_captum_loads(loaded_by_captum):
    ours = loaded_by(f"from {PACKAGE} import GenericAttention\nassert GenericAttention")
    assert {name for name in ours - loaded_by_captum if name.split(".")[0] != PACKAGE} == set()
    heavy = ("timm", "torchvision", "transformers", "scipy", "typer", "safetensors")
    assert not ours & set(heavy)


def test_the_package_alone_loads_nothing():
    ours = loaded_by(f"import {PACKAGE}")
    assert {name for name in ours if name.split(".")[0] == PACKAGE} == {PACKAGE}
    assert "torch" not in ours


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_line_answers_without_torch(option):
    code = f"""
import contextlib, io, json, sys
from {PACKAGE}.cli import main
text = io.StringIO()
with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
    main()
print(json.dumps([text.getvalue(), "torch" in sys.modules]))
"""
    text, torch_is_loaded = printed(code, option)
    assert "captum-generic-attn" in text
    assert not torch_is_loaded


# The submodules of public functions, and the functions, in the orders in which users import them.
ORDERS = [
    "import captum_generic_attn as g",
    (
        "import captum_generic_attn.verification, captum_generic_attn.comparison\n"
        "import captum_generic_attn as g"
    ),
    (
        "from captum_generic_attn import verify, compare\n"
        "import captum_generic_attn.verification, captum_generic_attn.comparison\n"
        "import captum_generic_attn as g"
    ),
    (
        "from captum_generic_attn.comparison import compare\n"
        "from captum_generic_attn.verification import verify\n"
        "import captum_generic_attn as g"
    ),
]


@pytest.mark.parametrize("order", ORDERS)
def test_functions_stay_functions_whatever_was_imported_before(order):
    code = f"""{order}
import json
kinds = [type(g.verify).__name__, type(g.compare).__name__]
from captum_generic_attn import compare, verify
print(json.dumps([kinds, g.verify is verify, g.compare is compare]))
"""
    assert printed(code) == [["function", "function"], True, True]


def test_namespaces_are_attributes_after_a_plain_import():
    code = f"""
import json
import {PACKAGE} as g
names = {sorted(NAMESPACES)}
print(json.dumps([type(getattr(g, name)).__name__ for name in names]))
"""
    assert printed(code) == ["module"] * len(NAMESPACES)


def test_no_submodule_has_the_name_of_a_public_function_or_class():
    submodules = {module.name for module in pkgutil.iter_modules(captum_generic_attn.__path__)}
    assert submodules & set(captum_generic_attn.__all__) == NAMESPACES


def test_what_type_checkers_see_is_what_there_is():
    tree = ast.parse(Path(captum_generic_attn.__file__).read_text("utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        home = node.module.removeprefix(PACKAGE).removeprefix(".")
        seen.setdefault(home, set()).update(alias.name for alias in node.names)
    assert seen.pop("") == NAMESPACES == set(captum_generic_attn._NAMESPACES)
    assert seen == {home: set(names) for home, names in captum_generic_attn._HOMES.items()}
    public = NAMESPACES.union(*seen.values())
    assert public == set(captum_generic_attn.__all__)
    assert public <= set(dir(captum_generic_attn))


@pytest.mark.parametrize("name", captum_generic_attn.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert inspect.getdoc(getattr(captum_generic_attn, name))


def test_an_unknown_name_is_told_of():
    with pytest.raises(AttributeError, match="'captum_generic_attn' has no attribute 'nothing'"):
        captum_generic_attn.nothing  # noqa: B018
