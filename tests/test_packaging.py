"""What is installed: metadata, data files, and dependencies that are all declared."""

import ast
import configparser
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Where the name of the import is not that of the distribution.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "open_clip": "open_clip_torch",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


@pytest.fixture(scope="module")
def setup():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def names(requirements):
    """Normalised names of the packages in a block of requirements."""
    found = re.findall(r"^\s*([A-Za-z][\w.-]*)", requirements, flags=re.MULTILINE)
    return {name.lower().replace("_", "-") for name in found}


def imported(folder):
    """The top-level modules that the Python files of a folder import, wherever they do."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.partition(".")[0]


def distributions(folder):
    own = {"captum_generic_attn", *(path.stem for path in folder.glob("*"))}
    outside = set(imported(folder)) - set(sys.stdlib_module_names) - own
    return {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in outside}


def test_the_package_declares_just_what_it_imports(setup):
    required = names(setup["options"]["install_requires"])
    optional = names(setup["options.extras_require"]["hf"])
    used = distributions(ROOT / "captum_generic_attn")
    # huggingface_hub is only asked about transformers' and timm's downloads; both bring it along.
    assert used - {"huggingface-hub"} == required | optional


def test_the_extra_metrics_is_what_metrics_are_computed_with(setup):
    sources = [path.read_text("utf-8") for path in (ROOT / "captum_generic_attn").rglob("*.py")]
    asked = r'needed\((?:"tomllib" if .+ else )?"([a-z]+)'
    used = {DISTRIBUTIONS.get(name, name) for text in sources for name in re.findall(asked, text)}
    assert used == names(setup["options.extras_require"]["metrics"])


def test_development_declares_what_the_tests_and_benchmarks_import(setup):
    declared = names(setup["options"]["install_requires"]) | names(
        setup["options.extras_require"]["dev"]
    )
    optional = {"rxnmapper", "rxnfp", "tokenizers", "huggingface-hub"}
    folders = [ROOT / "tests", ROOT / "benchmarks"]
    # Both import modules of their own by name.
    inside = {path for folder in (*folders, ROOT / "docs") for path in (folder, *folder.rglob("*"))}
    own = {path.stem.replace("_", "-") for path in inside if path.is_dir() or path.suffix == ".py"}
    for folder in folders:
        assert distributions(folder) - own - declared - optional == set(), folder.name


def test_every_direct_dependency_is_pinned_for_development(setup):
    pinned = names(
        "\n".join(
            line
            for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
            if "==" in line and not line.startswith("#")
        )
    )
    extras = "\n".join(setup["options.extras_require"].values())
    direct = names(setup["options"]["install_requires"] + "\n" + extras)
    assert direct - pinned == set()


def test_metadata(setup):
    installed = metadata.metadata("captum-generic-attn")
    assert installed["Version"] == setup["metadata"]["version"]
    assert installed["Requires-Python"] == ">=3.10"
    (command,) = metadata.distribution("captum-generic-attn").entry_points
    assert command.value == "captum_generic_attn.cli:main"
    assert callable(command.load())


def test_data_files_are_beside_the_code():
    package = files("captum_generic_attn")
    assert package.joinpath("py.typed").is_file()
    assert "Zalando" in package.joinpath("demo/LICENSE.fashion-mnist").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.ci_sample
def test_the_wheel_holds_what_the_package_needs_and_nothing_else(tmp_path):
    # A copy: a build in place would leave its folders in the checkout.
    listed = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        tracked = subprocess.run(listed, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            copy = tmp_path / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    folders = ["--wheel-dir", str(tmp_path), str(tmp_path / "source")]
    subprocess.run([*build, *folders], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {info.filename: info.file_size for info in archive.infolist()}
    package = {name for name in inside if name.startswith("captum_generic_attn/")}
    information = {name.partition("/")[2] for name in inside if name not in package}

    sources = (tmp_path / "source" / "captum_generic_attn").rglob("*")
    assert package == {
        path.relative_to(tmp_path / "source").as_posix() for path in sources if path.is_file()
    }
    assert {"captum_generic_attn/py.typed", "captum_generic_attn/demo/vit.safetensors"} <= package
    assert sum(name.endswith(".png") for name in package) == 24
    assert inside["captum_generic_attn/demo/vit.safetensors"] <= 1_000_000
    assert {"licenses/LICENSE", "licenses/THIRD_PARTY.md", "entry_points.txt"} <= information
