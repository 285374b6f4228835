"""The command line: what it prints, what it writes, and how it fails."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from helpers.command_line import explain, recorded, run
from PIL import Image
from safetensors.torch import save_file

from captum_generic_attn import GenericAttention, all_methods, demo, verification, visualization
from captum_generic_attn.errors import UnavailableWeightsError, UnknownModelError
from captum_generic_attn.models import checkpoints
from captum_generic_attn.models.classifiers import load_classifier


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def figures(monkeypatch):
    """What the command hands to the drawing of its figures, which goes on as usual."""
    calls = []
    draw = visualization.heatmap_figure

    def record(image, heatmaps, titles, **options):
        calls.append({"image": image, "heatmaps": heatmaps, "titles": titles, **options})
        return draw(image, heatmaps, titles, **options)

    monkeypatch.setattr(visualization, "heatmap_figure", record)
    return calls


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """No host answers, and nothing was downloaded before."""
    monkeypatch.setattr(checkpoints, "host_answers", lambda *args: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **options: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def listed(output):
    """The printed classes: index -> (probability, explained?)."""
    rows = re.findall(r" (\d+) (?:class \d+|\D+?) (\d\.\d{3})( explained)?", output)
    return {int(index): (float(share), bool(mark)) for index, share, mark in rows}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A small timm model with random weights in both kinds of file."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=1000).eval()
    folder = tmp_path_factory.mktemp("weights")
    save_file(model.state_dict(), folder / "vit.safetensors")
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "vit.pth")
    return model, folder


# ---------------------------------------------------------------- the shipped model and image


def test_without_arguments_it_explains_the_shipped_picture(figures):
    output = explain()
    pixels = demo.preprocess(demo.canvases()[0].image())[None]
    model = demo.load_model()
    probabilities = model(pixels).sigmoid()[0]
    best = probabilities.topk(3)

    assert "What the shipped model sees (7 classes, probabilities by sigmoid)" in output
    assert output.endswith("Wrote explanation.png")
    assert listed(output) == {
        index: (pytest.approx(share, abs=6e-4), True)
        for index, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    }
    assert list(listed(output)) == best.indices.tolist()
    assert all(demo.CLASSES[index] in output for index in best.indices)

    (drawn,) = figures
    expected = GenericAttention(model).attribute_targets(pixels, best.indices.tolist())
    assert np.abs(drawn["heatmaps"] - expected[:, 0, 0].numpy()).max() < 1e-6
    original = np.asarray(demo.canvases()[0].image()) / 255
    assert np.abs(np.asarray(drawn["image"]) / 255 - original).max() < 1e-6
    assert drawn["crop_box"] == (0, 0, 64, 64)
    assert drawn["titles"] == [
        f"{demo.CLASSES[index]}  {probabilities[index]:.2f}" for index in best.indices
    ]


def test_the_figure_is_a_picture_of_four_panels():
    explain()
    with Image.open("explanation.png") as figure:
        pixels = np.asarray(figure.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert 3 < width / height < 5
    # The canvas comes first, with its colours; the last panel is grey but for the heat.
    colourful = np.ptp(pixels, axis=2) > 60
    assert colourful[:, : width // 4].mean() > 0.02
    assert (pixels < 128).any(axis=2).mean() > 0.01


def test_the_heat_lies_on_the_garment_that_the_class_names(figures):
    hits = []
    for canvas in demo.canvases()[:6]:
        # Two garments of a class are one target with two right places.
        names = list(dict.fromkeys(garment.name for garment in canvas.garments))
        explain(canvas.path, *(part for name in names for part in ("--target", name)))
        for name, heat in zip(names, figures[-1]["heatmaps"], strict=True):
            row, column = np.unravel_index(heat.argmax(), heat.shape)
            boxes = [garment.box for garment in canvas.garments if garment.name == name]
            # A patch of 8 pixels may peak beside the box of a garment that it covers in part.
            hits.append(
                any(
                    left - 4 <= column < right + 4 and top - 4 <= row < bottom + 4
                    for left, top, right, bottom in boxes
                )
            )
    assert len(hits) >= 12
    assert np.mean(hits) > 0.75


def test_the_shipped_model_has_a_name(figures):
    assert explain("--model", "garments-vit") == explain()
    assert (figures[0]["heatmaps"] == figures[1]["heatmaps"]).all()


def test_targets_are_names_in_any_case_or_indices_and_come_in_order(figures):
    output = explain("--target", "ANKLE boot", "--target", "0", "--target", "6", "--top", "1")
    (drawn,) = figures
    assert [title.split("  ")[0] for title in drawn["titles"]] == ["ankle boot", "top"]
    classes = listed(output)
    assert {index for index, (_, explained) in classes.items() if explained} == {0, 6}
    # The most probable class is printed as well, explained or not.
    assert classes[next(iter(classes))][0] == max(share for share, _ in classes.values())


def test_start_layer_is_the_one_of_the_method(figures):
    explain("--target", "bag", "--start-layer=-1")
    pixels = demo.preprocess(demo.canvases()[0].image())[None]
    model = demo.load_model()
    last = GenericAttention(model, start_layer=-1).attribute(pixels, 5)[0, 0].numpy()
    every = GenericAttention(model).attribute(pixels, 5)[0, 0].numpy()
    assert np.abs(figures[0]["heatmaps"][0] - last).max() < 1e-6
    assert np.abs(every - last).max() > 1e-3


@pytest.mark.parametrize(
    ("ending", "mark"), [("jpg", b"\xff\xd8\xff"), ("pdf", b"%PDF"), ("svg", b"<svg")]
)
def test_the_ending_says_the_format(ending, mark, tmp_path):
    (tmp_path / "sub").mkdir()
    output = explain("--output", f"sub/figure.{ending}")
    assert output.endswith(f"Wrote sub/figure.{ending}")
    assert mark in (tmp_path / "sub" / f"figure.{ending}").read_bytes()[:500]


def test_a_picture_of_a_phone_is_turned_upright(figures):
    upright = demo.canvases()[0].image()
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90° to the right"
    upright.transpose(Image.Transpose.ROTATE_90).save("phone.png", exif=exif)
    explain("phone.png")
    assert (np.asarray(figures[0]["image"]) == np.asarray(upright)).all()
    assert figures[0]["title"] == "phone.png"


# ---------------------------------------------------------------- other libraries' models


@pytest.mark.parametrize("file", ["vit.safetensors", "vit.pth"])
def test_a_timm_model_with_weights_of_a_file(vit, file, figures):
    model, folder = vit
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (170, 200, 3), dtype=np.uint8)).save("noise.png")
    output = explain(
        "noise.png", "--model", "timm/test_vit", "--weights", folder / file, "--target", "tabby"
    )
    assert "What timm/test_vit sees (1000 classes, probabilities by softmax)" in output
    assert "tabby, tabby cat" in output

    data = timm.data.resolve_model_data_config(model)
    with Image.open("noise.png") as image:
        pixels = timm.data.create_transform(**data, is_training=False)(image)[None]
    probabilities = model(pixels).softmax(-1)[0].detach()
    assert listed(output)[281] == (pytest.approx(float(probabilities[281]), abs=6e-4), True)
    expected = GenericAttention(model).attribute(pixels, 281)[0, 0].numpy()
    assert np.abs(figures[0]["heatmaps"][0] - expected).max() < 1e-6


def test_the_number_of_classes_follows_from_the_weights(tmp_path):
    model = timm.create_model("test_vit", num_classes=5)
    save_file(model.state_dict(), tmp_path / "five.safetensors")
    output = explain("--model", "test_vit", "--weights", "five.safetensors", "--top", "9")
    assert "(5 classes, probabilities by softmax)" in output
    assert sorted(listed(output)) == [0, 1, 2, 3, 4]
    assert sum(share for share, _ in listed(output).values()) == pytest.approx(1, abs=3e-3)
    assert "class 4" in output


@pytest.mark.slow
@pytest.mark.ci_sample
def test_a_torchvision_model_with_weights_of_a_file(tmp_path, figures):
    from torchvision.models import vit_b_32

    model = vit_b_32(num_classes=3).eval()
    # torchvision's head starts with zeros, which no relevance passes.
    torch.nn.init.normal_(model.heads.head.weight)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    output = explain("--model", "vit_b_32", "--weights", "vit.pth", "--target", "2")
    assert "What torchvision/vit_b_32 sees (3 classes, probabilities by softmax)" in output
    image = demo.canvases()[0].image()
    pixels = load_classifier("torchvision/vit_b_32", tmp_path / "vit.pth").preprocess(image)[None]
    assert pixels.shape == (1, 3, 224, 224)
    share = model(pixels).softmax(-1)[0, 2].item()
    assert listed(output)[2] == (pytest.approx(share, abs=6e-4), True)
    expected = GenericAttention(model).attribute(pixels, 2)[0, 0].numpy()
    assert np.abs(figures[0]["heatmaps"][0] - expected).max() < 1e-6


def hugging_face_vit(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    pixels = {"image_size": 32, "patch_size": 8, "intermediate_size": 48}
    return transformers.ViTConfig(
        **sizes, **pixels, id2label={0: "cat", 1: "dog", 2: "house"}, **options
    )


@pytest.mark.parametrize(
    ("problem", "kind"),
    [("single_label_classification", "softmax"), ("multi_label_classification", "sigmoid")],
)
def test_a_folder_of_hugging_face(problem, kind, tmp_path, figures):
    transformers = pytest.importorskip("transformers")
    config = hugging_face_vit(problem_type=problem)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "saved")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "saved")

    output = explain("--model", "saved", "--target", "Dog")
    assert f"What saved sees (3 classes, probabilities by {kind})" in output
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved")
    pixels = processor(images=demo.canvases()[0].image(), return_tensors="pt")["pixel_values"]
    logits = model(pixels).logits[0].detach()
    share = logits.softmax(-1)[1] if kind == "softmax" else logits.sigmoid()[1]
    assert listed(output)[1] == (pytest.approx(float(share), abs=6e-4), True)
    expected = GenericAttention(model).attribute(pixels, 1)[0, 0].numpy()
    assert np.abs(figures[0]["heatmaps"][0] - expected).max() < 1e-6
    # The model sees 32 × 32 pixels; people see their own image.
    assert figures[0]["image"].size == (64, 64)
    assert figures[0]["crop_box"] == (0, 0, 64, 64)


def save_vit(folder):
    transformers = pytest.importorskip("transformers")
    transformers.ViTForImageClassification(hugging_face_vit()).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def test_captums_methods_explain_a_folder_of_hugging_face(tmp_path, monkeypatch):
    save_vit(tmp_path / "saved")
    drawn = recorded(monkeypatch, "comparison_figure")
    explain("--model", "saved", "--methods", "Generic attention,Saliency")
    assert list(drawn[0][1].attributions) == ["Generic attention", "Saliency"]


@pytest.mark.parametrize("name", ["garments-clip", "garments-detr"])
def test_shipped_models_of_another_kind_are_no_classifiers(name):
    with pytest.raises(UnknownModelError, match=f"{name} is no image classifier; the shipped one"):
        load_classifier(name)


def test_weights_for_a_model_that_has_its_own(tmp_path):
    (tmp_path / "x.pth").touch()
    for name, message in [(None, "the shipped model"), (str(tmp_path), "a Hugging Face model")]:
        with pytest.raises(UnavailableWeightsError, match=f"{message} brings its own weights"):
            load_classifier(name, tmp_path / "x.pth")


def test_a_folder_without_a_trained_classifier_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTModel(hugging_face_vit()).save_pretrained(tmp_path / "saved")
    transformers.ViTImageProcessor().save_pretrained(tmp_path / "saved")
    output = explain("--model", "saved", code=1)
    assert "the folder 'saved' holds no trained image classifier" in output
    assert "classifier.weight" in output


def test_a_folder_without_an_image_processor_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = hugging_face_vit()
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "saved")
    output = explain("--model", "saved", code=1)
    assert "no image classifier with its image processor can be loaded from the folder" in output


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.png"], 2, "'missing.png' does not exist"),
        (["text.png"], 1, "'text.png' is no image that Pillow can read"),
        (["cut.png"], 1, "'cut.png' cannot be read"),
        (["--target", "shoe"], 2, "no class 'shoe' among its 7"),
        (["--target", "sneakr"], 2, "nearest: sneaker"),
        (["--target", "7"], 2, "index 7 is out of range: the shipped model has the classes 0 to 6"),
        (["--target=-1"], 2, "class index -1 is out of range"),
        (["--target", ""], 2, "no class '' among its 7"),
        (["--model", "vit_tiny_patch16_225"], 2, "vit_tiny_patch16_224"),
        (["--model", "timm/vit_b_16"], 2, "neither timm nor torchvision has a model of that name"),
        (["--model", "vit_tiny_patch16_224.nonsense"], 2, "nonsense"),
        (["--weights", "text.png"], 2, "--model NAME"),
        (["--model", "test_vit", "--weights", "text.png"], 1, "no weights that can be read safely"),
        (["--model", "test_vit", "--weights", "list.pth"], 1, "holds no state dict, but list"),
        (["--model", "test_vit", "--weights", "odd.pth"], 1, "do not fit timm/test_vit: Missing"),
        (["--model", ".", "--weights", "odd.pth"], 2, ". brings its own weights: leave them out"),
        (["--model", "garments-vit", "--weights", "odd.pth"], 2, "vit brings its own weights"),
        (["--model", "."], 1, "no model can be loaded from the folder '.'"),
        (["--start-layer", "4"], 1, "start_layer=4"),
        (["--top", "0"], 2, "Invalid value for '--top'"),
        (["--output", "figure.doc"], 2, "'figure.doc' ends with no image format"),
        (["--output", "figure"], 2, "'figure' ends with no image format"),
        (["--output", "nowhere/figure.png"], 2, "no file in an existing folder"),
        (["canvas.png", "--output", "canvas.png"], 2, "it would be overwritten"),
    ],
)
def test_failures_say_what_to_do(arguments, code, message, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    canvas = demo.canvases()[0].path.read_bytes()
    (tmp_path / "canvas.png").write_bytes(canvas)
    (tmp_path / "cut.png").write_bytes(canvas[: len(canvas) // 2])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"odd": torch.ones(2)}, tmp_path / "odd.pth")
    output = explain(*arguments, code=code)
    assert message in output
    assert "Traceback" not in output
    assert (tmp_path / "canvas.png").read_bytes() == canvas
    assert not (tmp_path / "explanation.png").exists()


def test_weights_that_would_run_code_are_not_loaded(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"harm": Harm()}, tmp_path / "harm.pth")
    output = explain("--model", "test_vit", "--weights", "harm.pth", code=1)
    assert "'harm.pth' holds no weights that can be read safely" in output
    assert not (tmp_path / "harm").exists()


def test_a_full_disk_is_told(tmp_path):
    full = tmp_path / "full.png"
    try:
        full.symlink_to("/dev/full")
    except OSError:
        pytest.skip("no symbolic links")
    if not full.exists():
        pytest.skip("no /dev/full")
    assert "'full.png' cannot be written: No space left" in explain("--output", full.name, code=1)


def test_a_model_without_attention_is_refused(tmp_path):
    model = timm.create_model("test_efficientnet", num_classes=3)
    save_file(model.state_dict(), tmp_path / "convolutions.safetensors")
    output = explain(
        "--model", "test_efficientnet", "--weights", "convolutions.safetensors", code=1
    )
    assert "Error: timm/test_efficientnet: " in output
    assert "no attention" in output


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_tiny_patch16_224", "the Hugging Face hub cannot be reached"),
        ("vit_b_16", "no pretrained weights for torchvision/vit_b_16"),
        ("google/vit-base-patch16-224", "a folder that save_pretrained wrote can be given"),
    ],
)
def test_pretrained_weights_that_cannot_be_had(model, message, unreachable):
    output = explain("--model", model, code=1)
    assert message in output
    assert ("--weights FILE" in output) == ("/" not in model)


def test_downloaded_weights_serve_without_a_connection(tmp_path, monkeypatch, unreachable):
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name).eval()
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    files = {(f"timm/{name}.augreg_in21k_ft_in1k", "model.safetensors"): tmp_path}

    def cached(repository, file, **options):
        folder = files.get((repository, file))
        return folder and str(folder / file)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    loaded = load_classifier(name).model.state_dict()
    assert all((loaded[key] == value).all() for key, value in model.state_dict().items())


def test_hosts_that_do_not_answer(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # Port 9 (discard) of this machine: nobody listens.
    assert not checkpoints.host_answers("http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert checkpoints.host_answers("http://127.0.0.1:9")


def test_warnings_of_the_method_are_passed_on(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    torch.nn.init.zeros_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "zero.safetensors")
    output = explain("--model", "test_vit", "--weights", "zero.safetensors")
    assert output.count("Warning: ") == 1
    assert output.endswith("Wrote explanation.png")


# ---------------------------------------------------------------- the program


def test_a_name_that_several_classes_share_needs_an_index():
    from dataclasses import replace

    birds = replace(load_classifier(), classes=("crane, bird", "crane, machine", "owl"))
    with pytest.raises(ValueError, match=r"ambiguous, give its index: 0 = 'crane, bird'; 1 = "):
        birds.index("crane")
    assert birds.index("crane, machine") == birds.index("Machine") == 1


def test_all_methods_explain_one_class(monkeypatch):
    drawn = recorded(monkeypatch, "comparison_figure")
    output = explain("--methods", "all", "--target", "sandal")
    ((_, comparison, options),) = drawn
    assert options == {"title": "sandal", "crop_box": (0, 0, 64, 64)}
    assert list(comparison.attributions) == list(all_methods(demo.load_model()))
    pixels = demo.preprocess(demo.canvases()[0].image())[None]
    ours = GenericAttention(demo.load_model()).attribute(pixels, demo.CLASSES.index("sandal"))
    assert torch.equal(comparison["Generic attention"], ours)
    for name in comparison.attributions:
        assert re.search(rf"{re.escape(name)} +\d+\.\d\d s", output)
    assert output.endswith("Wrote explanation.png")
    assert Image.open("explanation.png").size[0] > 1000


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("Generic attention, LRP", ["Generic attention", "LRP"]),
        ("LRP, frozen", ["LRP, frozen"]),
        ("LRP,LRP, frozen , generic", ["LRP", "LRP, frozen", "Generic attention"]),
        ("Raw attention,Raw attention", ["Raw attention"]),
    ],
)
def test_some_methods_by_name(given, names, monkeypatch):
    drawn = recorded(monkeypatch, "comparison_figure")
    output = explain("--methods", given)
    ((_, comparison, _),) = drawn
    assert list(comparison.attributions) == names
    assert "Saliency" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "LRP,theirs, LRP"], "'theirs': there are all; generic; Generic attention"),
        (["--methods", "LRP,,LRP"], "'': there are all; generic; Generic attention; Raw"),
        (["--methods", "all", "--target", "0", "--target", "1"], "several methods explain one"),
        (["--methods", "all", "--start-layer", "1"], "an option of generic attention alone"),
    ],
)
def test_wrong_choices_of_methods_are_told(arguments, message):
    assert message in explain(*arguments, code=2)


def test_wrong_methods_are_told_before_a_model_is_loaded():
    """There is no such folder on the hub, and none is asked for."""
    output = explain("--model", "nobody/nothing", "--methods", "theirs", code=2)
    assert "'theirs': there are all; generic" in output


def test_a_format_whose_program_is_missing_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    output = explain("--output", "figure.pgf", code=1)
    assert "Error: 'figure.pgf' cannot be written: 'xelatex' not found" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("broken", ["cut off", "other shapes"])
def test_broken_folders_of_hugging_face_are_told(tmp_path, broken):
    save_vit(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    if broken == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        config["hidden_size"] *= 2
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    output = explain("--model", "./saved", code=1)
    assert "no image classifier with its image processor can be loaded from the folder" in output
    assert "Traceback" not in output


def test_version_and_help():
    from importlib.metadata import version

    expected = f"captum-generic-attn {version('captum-generic-attn')}"
    assert run("--version") == expected
    shown = explain("--help")
    for option in ("IMAGE", "--model", "--weights", "--text", "--target", "--output", "--top"):
        assert option in shown
    for model in ("garments-vit", "garments-clip", "garments-detr"):
        assert model in shown
    module = [sys.executable, "-m", "captum_generic_attn", "--version"]
    answer = subprocess.run(module, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == expected


def test_transparent_pictures_are_explained_on_white_and_that_is_said(figures):
    canvas = np.asarray(demo.canvases()[0].image())
    alpha = np.zeros((64, 64, 1), dtype=np.uint8)
    alpha[8:56, 8:56] = 255
    # Under what is transparent lies something that nobody sees.
    hidden = np.where(alpha > 0, canvas, 30).astype(np.uint8)
    Image.fromarray(np.concatenate([hidden, alpha], axis=2)).save("clear.png")
    seen = np.where(alpha > 0, canvas, 255).astype(np.uint8)
    Image.fromarray(seen).save("white.png")
    said = explain("clear.png", "--target", "bag")
    assert "Warning: 'clear.png' is transparent in places: it is laid on white" in said
    plain = explain("white.png", "--target", "bag")
    assert "Warning" not in plain
    assert listed(said) == listed(plain)
    first, second = figures
    assert np.array_equal(np.asarray(first["image"]), seen)
    assert np.array_equal(first["heatmaps"], second["heatmaps"])


def test_too_large_pictures_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    Image.new("RGB", (30, 20)).save("large.jpg")
    output = explain("large.jpg", code=1)
    assert "'large.jpg' is too large: image size (600 pixels) exceeds limit of 500 pixels" in output
    assert "save it smaller, such as 4000 pixels wide" in output


CHECKS = ["attention", "tokens", "rows", "elements", "examples", "heads", "conservation", "traces"]


@pytest.mark.parametrize(
    "options", [[], ["--model", "garments-clip", "--text", "a boot", "--text", "a dress"],
                ["--model", "garments-detr"]],
    ids=["classifier", "dual encoder", "detector"],
)  # fmt: skip
def test_verify_checks_a_model(options):
    printed = run("verify", *options)
    assert printed.startswith("Checking the shipped ")
    assert re.findall(r"(?:ok|look|-) (\w+): ", printed) == CHECKS
    assert "WRONG" not in printed
    assert printed.endswith("Nothing is wrong.")


def test_verify_of_a_wrong_map_is_an_error(monkeypatch):
    wrong = verification.Verification(
        "Generic Attention", (verification.Check("rows", "failed", "others", 1),)
    )
    monkeypatch.setattr(verification, "verify", lambda *args: wrong)
    printed = run("verify", code=1)
    assert "WRONG rows: others" in printed
    assert "do not trust its maps" in printed


def test_verify_says_which_arguments_are_wrong():
    assert "--target" in run("verify", "--target", "no such class", code=2)
    assert "--target" in run("verify", "--model", demo.DETR, "--target", "no such class", code=2)
    assert "takes no text" in run("verify", "--text", "a boot", code=2)
    weights = run("verify", "--model", demo.CLIP, "--weights", __file__, code=2)
    assert "garments-clip brings its own weights" in weights


def test_verify_explains_the_detection_of_the_chosen_class(monkeypatch):
    seen = []
    right = verification.Verification("Generic Attention", ())
    monkeypatch.setattr(
        verification, "verify", lambda method, inputs, target, *rest: seen.append(target) or right
    )
    run("verify", "--model", demo.DETR)
    run("verify", "--model", demo.DETR, "--target", "dress")
    assert [demo.CLASSES[target] for _, target in seen] == ["sandal", "dress"]
    message = "--target: the shipped DETR finds none in the image"
    assert message in run("verify", "--model", demo.DETR, "--target", "bag", code=2)
    assert "two to verify it" in run("verify", "--model", "garments-clip", code=2)
