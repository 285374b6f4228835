"""What is installed: metadata, data files, and dependencies that are all declared."""

import ast
import configparser
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest

import captum_generic_attn

ROOT = Path(__file__).resolve().parents[2]
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
    assert installed["Version"] == captum_generic_attn.__version__
    assert setup["metadata"]["version"] == "attr: captum_generic_attn.__version__"
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"\n## {captum_generic_attn.__version__}" in changes
    assert installed["Requires-Python"] == ">=3.10"
    (command,) = metadata.distribution("captum-generic-attn").entry_points
    assert command.value == "captum_generic_attn.cli:main"
    assert callable(command.load())


def test_data_files_are_beside_the_code():
    package = files("captum_generic_attn")
    assert package.joinpath("py.typed").is_file()
    assert "Zalando" in package.joinpath("demo/LICENSE.fashion-mnist").read_text("utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the source distribution and the wheel made of it, and the sources' own."""
    folder = tmp_path_factory.mktemp("built")
    # A copy: a build in place would leave its folders in the checkout.
    listed = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        tracked = subprocess.run(listed, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(folder / "source")], check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.ci_sample
class TestBuilt:
    def test_the_wheel_holds_what_the_package_needs_and_nothing_else(self, built):
        (wheel,) = built.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            inside = {info.filename: info.file_size for info in archive.infolist()}
        package = {name for name in inside if name.startswith("captum_generic_attn/")}
        information = {name.partition("/")[2] for name in inside if name not in package}

        sources = (built / "source" / "captum_generic_attn").rglob("*")
        assert package == {
            path.relative_to(built / "source").as_posix() for path in sources if path.is_file()
        }
        demo = "captum_generic_attn/demo/vit.safetensors"
        assert {"captum_generic_attn/py.typed", demo} <= package
        assert sum(name.endswith(".png") for name in package) == 24
        assert inside[demo] <= 1_000_000
        assert {"licenses/LICENSE", "licenses/THIRD_PARTY.md", "entry_points.txt"} <= information
        assert wheel.stat().st_size <= 3_000_000

    @pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
    def test_what_is_built_installs_and_explains_far_from_the_checkout(self, built, tmp_path, kind):
        (archive,) = built.glob(kind)
        place = tmp_path / "installed"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run(
            [*install, "--no-build-isolation", "--target", str(place), str(archive)], check=True
        )
        # Of what is installed beside it, this package is hidden.
        code = (
            "import captum_generic_attn as package; print(package.__file__, flush=True);"
            "from captum_generic_attn.cli import main; main()"
        )
        found = subprocess.run(
            [sys.executable, "-c", code, "explain"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(place)},
            check=True,
            capture_output=True,
            text=True,
        )
        assert found.stdout.split("\n")[0] == str(place / "captum_generic_attn" / "__init__.py")
        assert "sandal" in found.stdout
        assert (tmp_path / "explanation.png").stat().st_size > 10_000
