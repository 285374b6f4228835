"""Evaluations from a TOML file: what they compute, what they say of it, and how they refuse."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from captum_generic_attn import GenericAttention, RawAttention, demo, hf
from captum_generic_attn.cli import app
from captum_generic_attn.errors import DataError, PlanError, UnreadableImageError
from captum_generic_attn.evaluation import evaluate, read_plan
from captum_generic_attn.evaluation.batch import drawn
from captum_generic_attn.evaluation.text_classifier import TextClassifier
from captum_generic_attn.evaluation.texts import read_texts, words_of_tokens
from captum_generic_attn.files.images import open_image
from captum_generic_attn.metrics import (
    TOKENS,
    Pixels,
    Tokens,
    accuracy,
    blurred,
    deletion,
    detected,
    estimate,
    insertion,
    perturbation,
    probability,
    saco,
)
from captum_generic_attn.metrics.localization import pointing, segment
from captum_generic_attn.metrics.rationales import token_f1

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "evaluate.toml"
COUNT = 5


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Some shipped canvases with masks of their garments."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for canvas in demo.canvases()[:COUNT]:
        shutil.copy(canvas.path, folder / "images")
        mask = np.zeros((64, 64), dtype=np.uint8)
        for garment in canvas.garments:
            left, top, right, bottom = garment.box
            mask[top:bottom, left:right] = 1  # not 0 is enough
        Image.fromarray(mask).save(folder / "masks" / canvas.path.name)
    return folder


@pytest.fixture(scope="module")
def by_hand():
    """Pixels, predicted classes, masks and the maps of our method, by hand."""
    canvases = demo.canvases()[:COUNT]
    pixels = torch.stack([demo.preprocess(canvas.image()) for canvas in canvases])
    model = demo.load_model()
    with torch.no_grad():
        targets = model(pixels).argmax(-1)
    right = torch.zeros(COUNT, 64, 64, dtype=torch.bool)
    for i, canvas in enumerate(canvases):
        for left, top, after, below in (garment.box for garment in canvas.garments):
            right[i, top:below, left:after] = True
    return model, pixels, targets, right, GenericAttention(model).attribute(pixels, targets)


def plan_file(folder, text, name="plan.toml"):
    file = folder / name
    file.write_text(text, "utf-8")
    return file


def report_of(folder, text):
    return evaluate(read_plan(plan_file(folder, text)))


def run(*arguments, code=0):
    """Output of the command, without the boxes that errors come in."""
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "100"})
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit | None)
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


# ---------------------------------------------------------------- images


@pytest.fixture(scope="module")
def report(images):
    return report_of(
        images,
        '[data]\nimages = "images"\nmasks = "masks"\n'
        '[evaluation]\nmethods = ["generic", "Saliency"]\nbatch_size = 2',
    )


def test_figures_are_those_of_the_metrics(report, by_hand):
    model, pixels, targets, right, maps = by_hand
    black = (torch.zeros(3, 1, 1) - demo.MEAN) / demo.STD
    removal, named = Pixels(pixels, black), detected(targets)
    chance = probability(targets, multi_label=True)
    blur, mean = Pixels(pixels, blurred(pixels)), Pixels(pixels, pixels.mean((2, 3), keepdim=True))
    found = segment(maps[:, 0], right)
    expected = {
        "positive": perturbation(model, removal, maps, named).auc(),
        "negative": perturbation(model, removal, maps, named, most_relevant_first=False).auc(),
        "deletion": deletion(model, removal, maps, chance).auc(),
        "insertion": insertion(model, blur, maps, chance).auc(),
        "saco": estimate(saco(model, mean, maps, chance)),
        "pointing": estimate(pointing(maps[:, 0], right)),
        "pixel_accuracy": found.pixel_accuracy(),
        "mean_iou": found.mean_iou(),
        "mean_average_precision": found.mean_average_precision(),
    }
    figures = report.figures["Generic attention"]
    assert list(figures) == list(expected)
    for name, figure in expected.items():
        for part in ("value", "low", "high", "count"):
            found = getattr(figures[name], part)
            assert found == pytest.approx(getattr(figure, part), rel=1e-4, abs=1e-6), (name, part)
    curve = report.curves["Generic attention"]["deletion"]
    assert curve.means == pytest.approx(deletion(model, removal, maps, chance).means, abs=1e-5)


def test_each_grain_has_its_random_control(report):
    assert report.controls == ("Random, 8 × 8", "Random, pixels")
    assert list(report.figures) == ["Generic attention", "Saliency", *report.controls]
    ours, chance = report.figures["Generic attention"], report.figures["Random, 8 × 8"]
    assert ours["saco"].low > chance["saco"].high
    assert ours["positive"].value < chance["positive"].value


def test_the_random_control_differs_from_picture_to_picture(images):
    same = images / "same"
    same.mkdir()
    for name in "abcd":
        shutil.copy(demo.canvases()[0].path, same / f"{name}.png")
    found = report_of(images, '[data]\nimages = "same"\n[evaluation]\nmetrics = ["saco"]')
    ours, chance = (found.figures[name]["saco"] for name in found.figures)
    assert ours.low == pytest.approx(ours.high, abs=1e-6)
    assert chance.high - chance.low > 0.01


def test_the_same_plan_gives_the_same_report(report, images):
    text = (
        '[data]\nimages = "images"\nmasks = "masks"\n'
        '[evaluation]\nmethods = ["generic", "Saliency"]\nbatch_size = 2'
    )
    again = report_of(images, text)
    assert again.as_json() == report.as_json()
    other = report_of(images, f'{text}\nmetrics = ["saco"]\nseed = 5')
    name = "Random, pixels"
    assert other.figures[name]["saco"].value != report.figures[name]["saco"].value
    ours = "Generic attention"
    assert other.figures[ours]["saco"].value == report.figures[ours]["saco"].value


@pytest.mark.parametrize("removed", ["black", "mean", "blur"])
def test_removed_and_patch_are_what_the_plan_says(removed, images, by_hand):
    model, pixels, targets, _, maps = by_hand
    baseline = {
        "black": torch.full((1, 1, 1), -demo.MEAN / demo.STD),
        "mean": pixels.mean((2, 3), keepdim=True),
        "blur": blurred(pixels),
    }[removed]
    expected = saco(
        model, Pixels(pixels, baseline, patch=8), maps, probability(targets, multi_label=True)
    )
    found = report_of(
        images,
        '[data]\nimages = "images"\n'
        f'[evaluation]\nmetrics = ["saco"]\nremoved = "{removed}"\npatch = 8',
    )
    figure = found.figures["Generic attention"]["saco"]
    assert figure.value == pytest.approx(float(expected.mean()), abs=1e-6)
    assert any("Removed patches of 8 × 8 pixels become" in line for line in found.legend())


def test_labels_are_the_names_of_sub_folders(tmp_path, by_hand):
    model, pixels, _, _, _ = by_hand
    canvases = demo.canvases()[:2]
    names = [canvas.garments[0].name for canvas in canvases]
    for canvas, name in zip(canvases, names, strict=True):
        (tmp_path / "images" / name / "deep").mkdir(parents=True, exist_ok=True)
        shutil.copy(canvas.path, tmp_path / "images" / name / "deep")
    found = report_of(
        tmp_path,
        '[data]\nimages = "images"\n'
        '[evaluation]\nmethods = ["Raw attention"]\nmetrics = ["deletion"]\nexplain = "label"',
    )
    targets = torch.tensor([demo.CLASSES.index(name) for name in names])
    curve = deletion(
        model,
        Pixels(pixels[:2], -demo.MEAN / demo.STD),
        RawAttention(model).attribute(pixels[:2], targets),
        probability(targets, multi_label=True),
    )
    figure = found.figures["Raw attention"]["deletion"]
    assert figure.value == pytest.approx(curve.auc().value, abs=1e-4)
    assert found.about["explained"] == "label"


def test_a_model_of_exclusive_classes_is_asked_what_it_puts_first(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png"):
        noise = rng.integers(0, 256, (200, 180, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
        # A frame that the model's preprocessing cuts off, and a right half.
        mask = np.zeros((200, 180, 3), dtype=np.uint8)
        mask[:, 90:] = (0, 0, 7)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name[0]}.png")
    (tmp_path / "notes.txt").write_text("no image")
    plan = (
        '[model]\nname = "test_vit"\nweights = "vit.safetensors"\n'
        '[data]\nimages = "."\n[evaluation]\nmetrics = ["positive"]\nbatch_size = 2'
    )
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "masks", tmp_path / "elsewhere" / "masks")
    with pytest.raises(DataError, match="no mask"):
        report_of(tmp_path, plan.replace('"."\n', '"."\nmasks = "elsewhere/masks"\n'))
    shutil.move(tmp_path / "elsewhere" / "masks", tmp_path.parent / f"{tmp_path.name}-masks")
    found = report_of(
        tmp_path,
        plan.replace('"."\n', f'"."\nmasks = "../{tmp_path.name}-masks"\n').replace(
            '["positive"]', '["positive", "pointing"]'
        ),
    )

    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data, is_training=False)
    pixels = torch.stack(
        [transform(Image.open(tmp_path / name).convert("RGB")) for name in ("a.jpg", "b.png")]
    )
    targets = model(pixels).argmax(-1)
    maps = GenericAttention(model).attribute(pixels, targets)
    black = -torch.tensor(data["mean"]).view(3, 1, 1) / torch.tensor(data["std"]).view(3, 1, 1)
    curve = perturbation(model, Pixels(pixels, black), maps, accuracy(targets))
    figures = found.figures["Generic attention"]
    assert figures["positive"].value == pytest.approx(curve.auc().value, abs=1e-4)
    size = pixels.shape[-1]
    half = torch.zeros(2, size, size, dtype=torch.bool)
    half[:, :, size // 2 :] = True
    hits = pointing(maps[:, 0], half).mean()
    assert figures["pointing"].value == pytest.approx(float(hits))
    assert "still puts the class first" in " ".join(found.legend())
    # The TOML file itself, and the weights, and the notes.
    assert found.notes[0].startswith("3 files in the folder are no images by their ending")


def test_pictures_without_a_right_place_are_left_out_and_counted(images, tmp_path):
    shutil.copytree(images / "images", tmp_path / "images")
    shutil.copytree(images / "masks", tmp_path / "masks")
    for file in sorted((tmp_path / "masks").iterdir())[:2]:
        Image.new("P", (64, 64)).save(file)
    text = (
        '[data]\nimages = "images"\nmasks = "masks"\n'
        '[evaluation]\nmetrics = ["pointing"]\nbatch_size = 2'
    )
    found = report_of(tmp_path, text)
    assert found.figures["Generic attention"]["pointing"].count == COUNT - 2
    (note,) = found.notes
    assert note.startswith(f"2 of {COUNT} masks mark nothing in what the model is shown: left out")
    Image.new("L", (64, 60)).save(min((tmp_path / "masks").iterdir()))
    with pytest.raises(DataError, match="has 64 × 60 pixels, its image 64 × 64"):
        report_of(tmp_path, text)


def test_a_limit_draws_at_random():
    assert drawn(4, None, 0) == drawn(4, 9, 0) == [0, 1, 2, 3]
    chosen = drawn(100, 10, 3)
    assert chosen == sorted(set(chosen)) == drawn(100, 10, 3)
    assert len(chosen) == 10
    assert chosen != drawn(100, 10, 4)
    assert max(chosen) > 20


def test_methods_that_cannot_run_are_refused_with_their_reason(tmp_path, images):
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    save_file(model.state_dict(), tmp_path / "convolutions.safetensors")
    shutil.copytree(images / "images", tmp_path / "images")
    text = (
        '[model]\nname = "test_efficientnet"\nweights = "convolutions.safetensors"\n'
        '[data]\nimages = "images"\nlimit = 1\n[evaluation]\nmetrics = ["saco"]\n'
    )
    file = plan_file(tmp_path, f'{text}methods = ["generic", "Saliency"]')
    output = run(file, "--output", tmp_path / "report.json")
    assert "Warning: Generic attention is refused: " in output
    assert "no attention" in output
    kept = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert list(kept["figures"]) == ["Saliency", "Random, pixels"]
    assert "no attention" in kept["refused"]["Generic attention"]
    assert any("single pixels" in note for note in kept["notes"])

    alone = run(plan_file(tmp_path, text), code=1)
    assert "Error: timm/test_efficientnet: no method could explain it" in alone


# ---------------------------------------------------------------- the command


def test_the_table_and_the_json_say_the_same(images, tmp_path):
    file = plan_file(
        images,
        '[data]\nimages = "images"\nmasks = "masks"\nlimit = 3\n'
        '[evaluation]\nmetrics = ["positive", "pointing", "saco"]\n',
    )
    output = run(file, "--output", tmp_path / "report.json")
    kept = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert output.endswith("report.json")
    for name, found in kept["figures"].items():
        cells = []
        for key, digits in (("positive", 1), ("saco", 2)):
            half = (found[key]["high"] - found[key]["low"]) / 2
            cells.append(f"{found[key]['value']:.{digits}f} ±{half:.{digits}f}")
        assert f"{name} {' '.join(cells)}" in output
        assert found["positive"]["count"] == 3
    assert "method positive ↓ SaCo ↑" in output
    assert "method pointing game ↑" in output
    assert "examples 3 3" in output
    assert "3 images (drawn at random out of 5), explained: the class that the model" in output
    assert kept["meaning"]["positive"]["better"] == "lower"
    assert kept["settings"]["removed"] == {"positive": "black", "saco": "mean"}
    assert kept["about"]["available"] == COUNT
    assert kept["versions"]["torch"] == torch.__version__.partition("+")[0]
    curve = kept["curves"]["Generic attention"]["positive"]
    assert curve["fractions"][:2] == [0, 0.1]
    area = 100 * float(
        torch.trapezoid(*(torch.tensor(curve[key]) for key in ("means", "fractions")))
    )
    assert area == pytest.approx(kept["figures"]["Generic attention"]["positive"]["value"])


def test_the_example_of_the_documentation_runs(images, tmp_path):
    shutil.copytree(images / "images", tmp_path / "images")
    shutil.copytree(images / "masks", tmp_path / "masks")
    shutil.copy(EXAMPLE, tmp_path)
    run(tmp_path / EXAMPLE.name, "--output", tmp_path / "report.md")
    report = (tmp_path / "report.md").read_text("utf-8")
    assert report.startswith(f"# the shipped model: {COUNT} images\n")
    assert "| method | positive ↓ | negative ↑ | SaCo ↑ |\n|---|--:|--:|--:|\n" in report
    assert re.search(r"\n\| Random, 8 × 8 \| [\d.]+ ± [\d.]+ \| ", report)
    assert f"\n| examples | {COUNT} | {COUNT} | {COUNT} |\n" in report
    assert "Computed with python" in report


def test_the_example_names_every_key_method_and_metric():
    from captum_generic_attn import all_methods
    from captum_generic_attn.evaluation.plan import _KEYS, METRICS

    text = EXAMPLE.read_text("utf-8")
    words = " ".join(text.replace("#", " ").split())
    for keys in _KEYS.values():
        for key in keys:
            assert re.search(rf"^(# )?{key} = ", text, flags=re.MULTILINE), key
    for name in (*METRICS, *all_methods(torch.nn.Identity())):
        assert name in words, name


# ---------------------------------------------------------------- plans that cannot be


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images = ", "is no TOML file that can be read"),
        pytest.param("a = " + "[" * 100_000, "is no TOML file that can be read", id="nested"),
        ('[dat]\nimages = "images"', "there is no table [dat] (nearest: data); the tables are"),
        ('data = "images"', "[data] is a table, with keys of its own"),
        ("", "[data]: either images = FOLDER or texts = FILE is needed"),
        ('[data]\nimages = "images"\ntexts = "texts.jsonl"', "not both"),
        ('[data]\nimage = "images"', "there is no key 'image' (nearest: images); the keys are"),
        ('[data]\nimages = "nowhere"', "no folder (paths start from that of the TOML file)"),
        ("[data]\nimages = 3", "images = 3: a text in quotation marks is needed"),
        ('[data]\ntexts = "nowhere"', "no file (paths start from the TOML file's folder)"),
        ('[data]\nimages = "images"\nlimit = 0', "limit = 0: a whole number of at least 1"),
        ('[data]\nimages = "images"\nlimit = true', "limit = True: a whole number of at least 1"),
        ('[data]\ntexts = "texts.jsonl"\nmasks = "masks"', "they belong to images"),
        ('[data]\ntexts = "texts.jsonl"', "[model] name is left out: for texts, the Hugging Face"),
        ('[data]\nimages = "images"\n[model]\nweights = "texts.jsonl"', "give the name of the"),
        ('[data]\nimages = "images"\n[model]\nname = "masks"\nweights = "texts.jsonl"',
         "brings its own weights"),
        ('[data]\nimages = "images"\n[model]\nname = "vit_b_61"', "[model] name = 'vit_b_61': "),
    ],
)  # fmt: skip
def test_wrong_tables_say_what_is_allowed(text, message, images):
    (images / "texts.jsonl").write_text("{}")
    output = run(plan_file(images, text), code=2)
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('methods = ["Raw atention"]', "no 'Raw atention' (nearest: Raw attention"),
        ('methods = "generic"', '"all", or a list of names is needed'),
        ("methods = []", "a list of some of these is needed: generic, Generic attention"),
        ('methods = ["LRP", "LRP"]', "a name stands there twice"),
        ('methods = ["generic", "Generic attention"]', "are the same method"),
        ('metrics = ["delete"]', "no 'delete' (nearest: deletion); there is 'positive', "),
        ('metrics = ["pointing"]', "'pointing' needs masks = FOLDER under [data]"),
        ('metrics = ["token_f1"]', "'token_f1' is a metric of texts, not of images"),
        ('explain = "labels"', "there is 'prediction' or 'label' (nearest: label)"),
        ('removed = "white"', "removed = 'white': there is 'black', 'mean' or 'blur'"),
        ("patch = 0", "patch = 0: a whole number of at least 1 is needed"),
        ("patch = 7", "patch = 7: the model's images are 64 × 64 pixels"),
        ("batch_size = 2.5", "batch_size = 2.5: a whole number of at least 1 is needed"),
        ("seed = -1", "seed = -1: a whole number from 0 to 2147483648 is needed"),
    ],
)
def test_wrong_settings_say_what_is_allowed(line, message, images):
    file = plan_file(images, f'[data]\nimages = "images"\n[evaluation]\n{line}')
    with pytest.raises(PlanError) as raised:
        evaluate(read_plan(file))
    told = str(raised.value)
    assert message in told
    assert told.startswith(f"{file}, [evaluation] {line.partition(' ')[0]}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml"], "'nowhere.toml' does not exist"),
        (["plan.toml", "--output", "report.txt"], "must end with one of .json, .md"),
        (["plan.toml", "--output", "nowhere/report.md"], "is no file in an existing folder"),
    ],
)
def test_wrong_arguments(arguments, message, images, monkeypatch):
    monkeypatch.chdir(images)
    plan_file(images, '[data]\nimages = "images"')
    assert message in run(*arguments, code=2)


def test_missing_libraries_are_told_before_the_work(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    output = run(plan_file(images, '[data]\nimages = "images"'), code=1)
    assert "pip install 'captum-generic-attn[metrics]'" in output


def test_a_full_disk_is_told(images, tmp_path):
    full = tmp_path / "full.json"
    try:
        full.symlink_to("/dev/full")
    except OSError:
        pytest.skip("no symbolic links")
    if not full.exists():
        pytest.skip("no /dev/full")
    text = '[data]\nimages = "images"\nlimit = 1\n[evaluation]\nmetrics = ["saco"]'
    output = run(plan_file(images, text), "--output", full, code=1)
    assert "cannot be written: No space left" in output
    assert "SaCo ↑" in output


def test_data_that_cannot_be_used(tmp_path, images):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    empty = run(plan_file(tmp_path, '[data]\nimages = "empty"'), code=1)
    assert "there is no image in " in empty
    broken = run(plan_file(tmp_path, '[data]\nimages = "broken"'), code=1)
    assert "is no image that Pillow can read" in broken
    label = '[evaluation]\nexplain = "label"'
    flat = run(plan_file(images, f'[data]\nimages = "images"\n{label}'), code=1)
    assert "lies in no sub-folder that would name its class" in flat
    other = run(plan_file(images, f'[data]\nimages = "."\n{label}'), code=1)
    assert "sub-folders must be named like classes: the shipped model has no class" in other


def test_files_that_pillow_only_writes_or_measures_are_no_pictures(tmp_path):
    for name in ("paper.pdf", "clip.mpg", "data.h5", "forecast.grib"):
        (tmp_path / name).write_bytes(b"nothing")
    shutil.copy(demo.canvases()[0].path, tmp_path / "A.PNG")
    found = report_of(tmp_path, '[data]\nimages = "."\n[evaluation]\nmetrics = ["deletion"]')
    assert found.about["evaluated"] == 1
    assert found.notes[0].startswith("5 files in the folder are no images")


def test_devices_that_are_not_there_are_told(images):
    for device, reason in (("warp 9", "warp"), ("meta", "it holds no numbers")):
        text = f'[model]\ndevice = "{device}"\n[data]\nimages = "images"'
        with pytest.raises(PlanError, match=rf"device = '{device}'.*cannot compute.*{reason}"):
            read_plan(plan_file(images, text))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_gpu_gives_the_figures_of_the_cpu(kind, images, bert):
    folder = images if kind == "images" else bert[0]
    text = '[data]\nimages = "images"\nmasks = "masks"' if kind == "images" else HEAD
    model = "[model]\n" if kind == "images" else ""
    reports = [
        report_of(
            folder,
            f'{model}device = "cuda"\n{text}' if kind == "images"
            else text.replace("[data]", 'device = "cuda"\n[data]'),
        ),
        report_of(folder, text),
    ]  # fmt: skip
    for name, figures in reports[1].figures.items():
        for key, figure in figures.items():
            assert reports[0].figures[name][key].value == pytest.approx(figure.value, abs=3), key


def test_a_classifier_of_one_class_has_nothing_to_choose(tmp_path):
    model = timm.create_model("test_vit", num_classes=1)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    shutil.copy(demo.canvases()[0].path, tmp_path)
    plan = '[model]\nname = "test_vit"\nweights = "vit.safetensors"\n[data]\nimages = "."'
    assert "has one class: whether it comes first says nothing" in run(
        plan_file(tmp_path, plan), code=1
    )


def test_transparent_pictures_are_laid_on_white_and_noted(tmp_path):
    (tmp_path / "images").mkdir()
    canvas = np.asarray(demo.canvases()[0].image())
    clear = np.concatenate([canvas, np.full((64, 64, 1), 255, dtype=np.uint8)], axis=2)
    clear[:9] = 0
    white = np.where(clear[..., 3:] > 0, canvas, 255).astype(np.uint8)
    plan = '[data]\nimages = "images"\n[evaluation]\nmetrics = ["deletion"]\nbatch_size = 1'
    found = []
    for values in (white, clear):
        for name in ("a.png", "b.png"):
            Image.fromarray(values).save(tmp_path / "images" / name)
        found.append(report_of(tmp_path, plan))
    assert found[0].notes == ()
    (note,) = found[1].notes
    assert "a.png' is transparent in places: it is laid on white (and 1 other remarks" in note
    assert found[0].figures["Generic attention"] == found[1].figures["Generic attention"]


def test_kernel_shap_has_a_control_of_its_patches(images):
    found = report_of(
        images,
        '[data]\nimages = "images"\nlimit = 1\n'
        '[evaluation]\nmethods = ["Kernel SHAP"]\nmetrics = ["deletion"]',
    )
    assert list(found.controls) == ["Random, 8 × 8"]


def test_greys_of_sixteen_bits_are_not_all_white(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    found = np.asarray(open_image(tmp_path / "ramp.png"))
    assert (found == ramp >> 8).all()
    for values, kind in ((np.float32(ramp / 65535), "floats"), (np.int32(ramp), "whole numbers")):
        Image.fromarray(values).save(tmp_path / "values.tiff")
        with pytest.raises(UnreadableImageError, match=f"values.tiff' holds {kind}.*8 or 16"):
            open_image(tmp_path / "values.tiff")


def test_broken_files_are_told_whatever_pillow_says_of_them(tmp_path, monkeypatch):
    shutil.copy(demo.canvases()[0].path, tmp_path / "a.png")
    for error in (SyntaxError("odd"), ValueError("odd"), RuntimeError("odd"), EOFError("odd")):

        def broken(self, error=error):
            raise error

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
        with pytest.raises(UnreadableImageError, match=r"a\.png' cannot be read: odd"):
            open_image(tmp_path / "a.png")


def test_missing_weights_are_told_in_words_of_the_file(tmp_path, images):
    torch.save({"odd": torch.ones(2)}, tmp_path / "odd.pth")
    shutil.copytree(images / "images", tmp_path / "images")
    file = plan_file(
        tmp_path,
        '[model]\nname = "test_vit"\nweights = "odd.pth"\n[data]\nimages = "images"',
    )
    assert "do not fit timm/test_vit" in run(file, code=1)


# ---------------------------------------------------------------- texts

TEXTS = [
    {"text": "a truly good film , well-made .", "rationale": [1, 2, 5], "label": "good"},
    {"text": "bad bad film", "rationale": [0, 1], "label": 0},
    {"text": "the film", "label": "BAD", "id": 7},
    {"text": "a good film a good film a good film a good film a bad film", "rationale": [13]},
]

# The words of the tokens between CLS and SEP.
WORDS = {
    TEXTS[0]["text"]: [0, 1, 1, 2, 3, 4, 5, 5, 5, 6],
    TEXTS[1]["text"]: [0, 1, 2],
    TEXTS[3]["text"]: range(10),  # cut
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT with random weights and its tokenizer, and texts, in a folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("texts")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"-.,", "a", "the", "good", "bad"]
    words += ["film", "well", "made", "tru", "##ly"]
    vocabulary = {word: place for place, word in enumerate(words)}
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12, initializer_range=1.0,
        id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=12)
    with torch.no_grad():
        texts = tokenizer([text["text"] for text in TEXTS], padding=True, truncation=True)
        logits = model(**texts.convert_to_tensors("pt")).logits
        # Of random weights, one class would always win: now each wins for half of the texts.
        model.classifier.bias -= logits.median(0).values
    model.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    lines = "\n".join(json.dumps(text) for text in TEXTS)
    (folder / "texts.jsonl").write_text(f"{lines}\n\n", "utf-8")
    return folder, model, tokenizer


HEAD = '[model]\nname = "bert"\n[data]\ntexts = "texts.jsonl"\n[evaluation]\n'


def test_texts_by_hand(bert):
    folder, model, tokenizer = bert
    found = report_of(folder, f'{HEAD}methods = ["Raw attention"]\nbatch_size = 3')
    figures = found.figures["Raw attention"]

    values = {name: [] for name in ("positive", "negative", "deletion", "insertion", "saco")}
    f1 = {5: [], 10: [], 15: []}
    for given in TEXTS:
        encoding = tokenizer(
            given["text"], return_tensors="pt", truncation=True, return_special_tokens_mask=True
        )
        special = encoding.pop("special_tokens_mask")
        forward, ids, rest = hf.unpack(model, encoding, "input_ids")
        scores = forward(ids, *rest)["logits"]
        target = scores.argmax(-1)
        maps = RawAttention(forward).attribute(ids, target, rest)
        removal = Tokens((ids, *rest), dropped=range(3), protected=special)
        first, chance = accuracy(target), probability(target)
        options = dict(fractions=TOKENS)
        values["positive"] += perturbation(forward, removal, maps, first, **options).areas
        values["negative"] += perturbation(
            forward, removal, maps, first, most_relevant_first=False, **options
        ).areas
        values["deletion"] += deletion(forward, removal, maps, chance).areas
        values["insertion"] += insertion(forward, removal, maps, chance).areas
        values["saco"] += saco(forward, removal, maps, chance)
        if "rationale" in given:
            of = WORDS[given["text"]]
            by_word = torch.zeros(max(of) + 1)
            for place, word in enumerate(of):
                by_word[word] = max(by_word[word], maps[0, 1 + place])
            marked = torch.tensor([word in given["rationale"] for word in range(max(of) + 1)])
            if marked.any():
                for k, row in f1.items():
                    row.append(token_f1(by_word, marked, k))
    assert 0 < figures["positive"].value < 100
    for name, expected in values.items():
        assert figures[name].value == pytest.approx(float(np.mean(expected)), abs=1e-4), name
        assert figures[name].count == len(TEXTS)
    for k in (5, 10):
        assert figures[f"token_f1@{k}"].value == pytest.approx(float(np.mean(f1[k]))), k
        assert figures[f"token_f1@{k}"].count == 2
    assert "token_f1@15" not in figures
    assert found.notes == (
        "1 of 4 texts were cut to the 12 tokens that the model takes, their rationales alike",
        "2 of 4 texts mark no word: left out of token F1",
    )


def test_all_leaves_out_what_cannot_explain_ids_and_says_so(bert, tmp_path):
    folder, _, _ = bert
    file = plan_file(folder, f'{HEAD}methods = "all"\nmetrics = ["saco", "token_f1"]')
    output = run(file, "--output", tmp_path / "report.md")
    assert "Left out: Saliency, Input × gradient, Integrated gradients, Gradient SHAP, Kernel" in (
        output
    )
    assert "token ids are whole numbers" in output
    assert "F1 at 5 ↑" in output
    for name in ("Generic attention", "Partial LRP", "LRP, frozen", "Random"):
        assert name in output
    assert "Saliency was left out: made for continuous inputs" in (
        tmp_path / "report.md"
    ).read_text("utf-8")
    with pytest.raises(PlanError, match=r"'Saliency' cannot explain texts.*'Generic attention'"):
        read_plan(plan_file(folder, f'{HEAD}methods = ["Saliency"]'))


def test_labels_of_texts_are_names_or_indices(bert):
    folder, _, _ = bert
    lines = (folder / "texts.jsonl").read_text("utf-8").splitlines()
    (folder / "labelled.jsonl").write_text("\n".join(lines[:3]), "utf-8")
    text = HEAD.replace("texts.jsonl", "labelled.jsonl") + 'metrics = ["deletion"]\n'
    by_label = report_of(folder, f'{text}explain = "label"')
    assert by_label.about["explained"] == "label"
    assert by_label.figures["Generic attention"]["deletion"].count == 3
    with pytest.raises(DataError, match=r'line 4: explain = "label" needs a "label" in each line'):
        report_of(folder, f'{HEAD}explain = "label"')
    (folder / "labelled.jsonl").write_text('{"text": "film", "label": "godo"}', "utf-8")
    with pytest.raises(DataError, match=r"line 1: label 'godo': .*\(nearest: good\); there is bad"):
        report_of(folder, f'{text}explain = "label"')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("film", "line 2 is no JSON"),
        pytest.param("[" * 100_000, "line 2 is no JSON that can be read", id="nested"),
        ('["film"]', 'line 2: an object with "text": "..." is needed'),
        ('{"text": " "}', 'line 2: an object with "text": "..." is needed'),
        ('{"text": "a film", "rationale": [2]}', "from 0 to 1 in this text"),
        ('{"text": "a film", "rationale": [true]}', "from 0 to 1 in this text"),
        ('{"text": "a \\u200b film", "rationale": [2]}', "makes no token of word 1"),
        ('{"text": "\\u200b"}', "line 2: the tokenizer makes no token of the text"),
    ],
)
def test_lines_that_cannot_be_used(line, message, bert):
    folder, _, _ = bert
    (folder / "wrong.jsonl").write_text(f'{{"text": "a film"}}\n{line}\n', "utf-8")
    file = plan_file(folder, HEAD.replace("texts.jsonl", "wrong.jsonl"))
    assert message in run(file, code=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('metrics = ["pointing"]', "'pointing' is a metric of images, not of texts"),
        ('removed = "mean"', "it is about pixels; words are dropped"),
        ("patch = 8", "it is about pixels"),
    ],
)
def test_settings_that_texts_do_not_have(line, message, bert):
    folder, _, _ = bert
    assert message in run(plan_file(folder, f"{HEAD}{line}"), code=2)


def test_line_breaks_within_texts_are_not_those_of_the_file(tmp_path):
    texts = ["a\u2028good\x85film", "bad"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "texts.jsonl").write_text(f"\ufeff{lines}\r\n", "utf-8", newline="")
    assert [line.text for line in read_texts(tmp_path / "texts.jsonl")] == texts


def test_positions_that_begin_behind_padding_leave_fewer_tokens(bert, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, _, tokenizer = bert
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12, pad_token_id=0,
    )  # fmt: skip
    for padding, longest in ((0, 11), (1, 10)):
        config.pad_token_id = padding
        model = transformers.RobertaForSequenceClassification(config).eval()
        boundless = transformers.BertTokenizerFast(vocab=tokenizer.get_vocab())
        classifier = TextClassifier("tiny", model, boundless, ("no", "yes"), False)
        assert classifier.longest == longest
        ids = torch.full((1, longest), 5)
        model(input_ids=ids)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 5))


def test_texts_without_rationales(bert):
    folder, _, _ = bert
    (folder / "bare.jsonl").write_text('{"text": "a film"}\n{"text": "good film"}', "utf-8")
    text = HEAD.replace("texts.jsonl", "bare.jsonl")
    found = report_of(folder, text)
    assert found.notes == ("token F1 is not computed: no text has a rationale",)
    assert [sheet.heads for sheet in found.sheets()] == [
        ("positive ↓", "negative ↑", "deletion ↓", "insertion ↑", "SaCo ↑")
    ]
    with pytest.raises(PlanError, match="'token_f1' needs texts with marked words"):
        report_of(folder, f'{text}metrics = ["token_f1"]')


def test_text_models_that_cannot_be_had(bert, monkeypatch):
    transformers = pytest.importorskip("transformers")
    folder, model, _ = bert
    (folder / "bare").mkdir()
    model.save_pretrained(folder / "bare")
    assert "knows no word of the texts: was it saved beside the model?" in run(
        plan_file(folder, HEAD.replace('"bert"', '"bare"')), code=1
    )
    (folder / "empty").mkdir()
    assert "no sequence classifier with its tokenizer can be loaded from the folder" in run(
        plan_file(folder, HEAD.replace('"bert"', '"empty"')), code=1
    )
    (folder / "untrained").mkdir()
    shutil.copytree(folder / "bert", folder / "untrained", dirs_exist_ok=True)
    transformers.BertModel(model.config).save_pretrained(folder / "untrained")
    output = run(plan_file(folder, HEAD.replace('"bert"', '"untrained"')), code=1)
    assert "holds no trained sequence classifier" in output
    assert "classifier.weight" in output
    monkeypatch.setattr("captum_generic_attn.models.checkpoints.host_answers", lambda *args: False)
    assert "a folder that save_pretrained wrote can be given in its place" in run(
        plan_file(folder, HEAD.replace('"bert"', '"nobody/nothing"')), code=1
    )


def test_words_are_what_white_space_separates():
    text = " so-so,\tindeed "
    # As of a tokenizer that counts the space before a word as a part of it.
    offsets = [(0, 0), (0, 3), (3, 4), (4, 6), (6, 7), (7, 14), (14, 15), (0, 0)]
    assert words_of_tokens(text, offsets) == [None, 0, 0, 0, 0, 1, None, None]
