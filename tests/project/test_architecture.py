"""Which part of the package may import which: the drawing in CONTRIBUTING, as laws.

A room is a folder of the package, or a module that stands beside the folders. All imports count,
those in functions and for type checkers too.
"""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import captum_generic_attn

PACKAGE = "captum_generic_attn"
ROOT = Path(captum_generic_attn.__file__).parent


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGE, *(part for part in parts if part != "__init__")))


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def room_of(module):
    """`relevance` of `captum_generic_attn.relevance.result`; of the package itself, its name."""
    return module.split(".")[1] if "." in module else module


def imports(tree):
    """The full names that a module imports, names of its imports from others among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name):
    """The longest beginning of a full name that is a module of the package."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@functools.cache
def imported():
    """For each module of the package, those of the package that it imports, and all full names."""
    found = {}
    for module, path in MODULES.items():
        names = set(imports(ast.parse(path.read_text("utf-8"))))
        own = {module_of(name) for name in names if name.split(".")[0] == PACKAGE}
        found[module] = own - {module}, names
    return found


def arrows(room):
    """The imports of a room from others, as (importing module, imported module)."""
    return {
        (module, other)
        for module, (others, _) in imported().items()
        if room_of(module) == room
        for other in others
        if room_of(other) != room
    }


def rooms():
    return {room_of(module) for module in MODULES}


def assert_no_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None


def test_no_circle_between_files():
    assert_no_circle({module: others for module, (others, _) in imported().items()})


def test_no_circle_between_rooms():
    assert_no_circle({room: {room_of(other) for _, other in arrows(room)} for room in rooms()})


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("errors", set()),
        ("progress", set()),
        ("extras", set()),
        ("tokens", set()),
        ("files", {"errors"}),
        ("capture", {"errors", "tokens"}),
        ("lrp", {"capture", "errors", "tokens"}),
        ("relevance", {"capture", "errors", "files", "lrp", "tokens"}),
        ("captum_api", {"progress", "relevance"}),
        ("attribution", {"captum_api", "capture", "errors", "lrp", "relevance"}),
    ],
)
def test_the_engine_imports_downwards_alone(room, allowed):
    beyond = {arrow for arrow in arrows(room) if room_of(arrow[1]) not in allowed}
    assert beyond == set()


def test_equations_know_nothing_of_the_package():
    others, _ = imported()[f"{PACKAGE}.relevance.equations"]
    assert others == set()


def test_tracking_knows_only_tokens():
    tracking = f"{PACKAGE}.capture.tracking"
    beyond = {
        (module, other)
        for module, (others, _) in imported().items()
        if module.startswith(tracking)
        for other in others
        if not other.startswith(tracking) and room_of(other) != "tokens"
    }
    assert beyond == set()


def test_metrics_take_any_attribution_of_captum():
    """They know what a model and a target are, but no method of this package."""
    assert {room_of(other) for _, other in arrows("metrics")} <= {
        "captum_api",
        "extras",
        "progress",
    }


@pytest.mark.parametrize("room", ["attribution", "baselines"])
def test_methods_know_nothing_of_what_is_made_of_their_maps(room):
    users = {"cli", "comparison", "evaluation", "insights", "metrics", "models", "visualization"}
    assert users.isdisjoint(room_of(other) for _, other in arrows(room))


def test_only_commands_import_the_command_line():
    importing = {module for room in rooms() - {"cli"} for module, other in arrows(room)
                 if room_of(other) == "cli"}  # fmt: skip
    assert all(module.endswith("__main__") for module in importing)


def test_nothing_goes_through_the_front_door():
    """A module imports a name from where it is defined, not from the package, which is lazy."""
    importing = {module for module, (others, _) in imported().items() if PACKAGE in others}
    assert importing == set()


def test_only_one_room_imports_private_modules_of_captum():
    importing = {
        module
        for module, (_, names) in imported().items()
        for name in names
        if name.startswith("captum.") and any(p.startswith("_") for p in name.split("."))
    }
    assert {room_of(module) for module in importing} == {"captum_api"}
