"""The README's Python runs as it stands there, and its commands exist."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from captum_generic_attn import demo

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text("utf-8")
SHIPPED = (ROOT / "docs" / "shipped_models.md").read_text("utf-8")


def lxmert():
    """A tiny LXMERT, and what it takes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LxmertConfig(
        vocab_size=9, l_layers=1, x_layers=2, r_layers=1, visual_feat_dim=12, num_qa_labels=300,
        hidden_size=16, num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    encoding = {
        "input_ids": torch.tensor([[1, 2, 3, 8]]),
        "attention_mask": torch.ones(1, 4),
        "visual_feats": torch.randn(1, 5, 12),
        "visual_pos": torch.rand(1, 5, 4),
    }
    model = transformers.LxmertForQuestionAnswering(config).eval()
    return {"lxmert": model, "lxmert_encoding": encoding}


def language_model():
    """A tiny GPT-2, and a tokenizer whose words are numbered as they come."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=9, n_embd=16, n_layer=2, n_head=2)
    words = ["The", "capital", "of", "France", "is", "Paris"]

    def tokenizer(text, return_tensors=None):
        ids = [words.index(word) for word in text.split()]
        encoding = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if return_tensors:
            encoding = {name: torch.tensor([value]) for name, value in encoding.items()}
        return transformers.BatchEncoding(encoding)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    return {"language_model": model, "tokenizer": tokenizer}


def blocks():
    """The README's Python, in its order."""
    return re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def run(block, names):
    exec(compile(block, "README.md", "exec"), names)  # noqa: S102


@pytest.fixture
def without_downloads(monkeypatch, tmp_path):
    """The loaders of the README's models give random weights, Hugging Face's those of folders."""
    import timm
    import torchvision
    import transformers
    from helpers import hugging_face_folders as folders

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, depth=2))

    def vit_b_16(weights):
        model = torchvision.models.VisionTransformer(224, 16, 2, 12, 768, 3072)
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)  # zeros explain nothing
        return model

    monkeypatch.setattr(torchvision.models, "vit_b_16", vit_b_16)
    folders.clip(tmp_path / "clip")
    folders.detr(tmp_path / "detr")
    places = {
        "openai/clip-vit-base-patch32": tmp_path / "clip",
        "facebook/detr-resnet-50": tmp_path / "detr",
        "distilbert-base-uncased-finetuned-sst-2-english": ROOT / "benchmarks/sentiment/bert",
    }
    for name in (
        *("AutoModelForSequenceClassification", "AutoTokenizer", "CLIPModel", "CLIPProcessor"),
        *("DetrForObjectDetection", "DetrImageProcessor"),
    ):
        kind = getattr(transformers, name)
        load = kind.from_pretrained
        monkeypatch.setattr(
            kind,
            "from_pretrained",
            lambda name, load=load, **options: load(places.get(name, name), **options),
        )


def test_every_block_of_python_is_run_by_a_test():
    assert len(blocks()) == 13


def test_five_lines_for_each_library_run(tmp_path, monkeypatch, without_downloads):
    monkeypatch.chdir(tmp_path)
    start, timm_, torchvision_, text, clip, detr, prompt = blocks()[:7]
    photo = Image.new("RGB", (300, 240), "white")
    photo.paste((200, 30, 30), (40, 60, 160, 200))
    names = {"photo": photo, "texts": ["a fine film", "bad"]}
    run(start, names)
    assert names["image"].shape == names["heatmap"].shape == (1, 3, 64, 64)
    assert demo.CLASSES[3] == "sandal"
    run(timm_, names)
    assert names["heatmap"].shape == (1, 3, 224, 224)
    assert names["heatmap"].abs().sum() > 0
    run(torchvision_, names)
    assert names["heatmap"].shape == (1, 3, 224, 224)
    with Image.open(tmp_path / "tabby.png") as figure:
        assert figure.size[0] > figure.size[1]
    run(text, names)
    assert names["relevance"].shape == names["ids"].shape
    assert len(names["ids"]) == 2
    assert (tmp_path / "words.png").stat().st_size > 5_000
    run(clip, names)
    assert names["image_map"].shape == (2, 3, 32, 32)
    assert names["text_map"].shape == names["encoding"]["input_ids"].shape
    run(detr, names)
    names |= language_model()
    run(prompt, names)
    assert names["relevance"].shape == names["prompt"].shape == (1, 5)
    assert names["relevance"][0, -1] > 0
    assert names["heatmap"].shape == names["pixels"].shape
    assert all(names[name].abs().sum() > 0 for name in ("relevance", "image_map", "heatmap"))


def test_python_runs_and_gives_the_shapes_that_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start, *_ = blocks()
    shapes, joint, batch, verified, several, right = blocks()[7:]
    names = {}
    run(start, names)
    run(shapes, names)
    assert names["tokens"].shape == (1, 8, 8)
    assert names["maps"].shape == (2, 1, 3, 64, 64)
    assert names["relevance"].matrix("x", "x").shape == (1, 65, 65)
    run("from captum_generic_attn import hf", names)
    names |= lxmert()
    run(joint, names)
    assert names["text"].shape == (1, 4)
    assert names["regions"].shape == (1, 5, 12)
    assert names["boxes"].shape == (1, 5, 4)
    run(batch, names)
    assert names["heatmaps"].shape == (40, 3, 64, 64)
    run(verified, names)
    assert names["report"].passed
    assert {c.status for c in names["report"].checks} == {"passed", "skipped"}
    run(several, names)
    assert len(names["found"].attributions) == 15
    assert names["found"]["LRP"].shape == (1, 3, 64, 64)
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    run(right, names)
    # One image, the class that is on it: most of the way without its pixels, it is gone.
    assert 0 < names["curve"].auc().value < 60


def test_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    wanted = set(re.findall(r"`make ([a-z0-9.-]+)`|^make ([a-z0-9.-]+)", TEXT, flags=re.MULTILINE))
    targets = {first or second for first, second in wanted}
    assert {"demo", "test", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^):#]+)\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), (page.name, link)


def test_contributing_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"`make ([a-z0-9.-]+)`", text):
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target
    paths = re.findall(r"`([\w./-]*[a-z_]+(?:/|\.py|\.md))`", text)
    assert len(paths) > 20
    package = ROOT / "captum_generic_attn"
    for path in paths:
        places = [ROOT, package, package / "baselines", ROOT / "benchmarks" / "evidence"]
        assert any((place / path).exists() for place in places), path


def test_figures_of_clip_and_detr_are_those_of_the_evidence():
    pytest.importorskip("transformers")
    text = " ".join(SHIPPED.split())
    tables = ROOT / "benchmarks" / "evidence" / "tables"
    clip, detr = (
        json.loads((tables / f"{name}.json").read_text("utf-8")) for name in ("clip", "detr")
    )
    right, of = clip["settings"]["right caption of 10"].split(" % of ")
    assert f"it finds the right one on {right} % of {of} canvases" in text
    boxes = detr["settings"]["AP50 of the boxes"]
    assert f"AP50 of its boxes is {boxes} % on {detr['samples']} such canvases" in text
    for name, load in (("CLIPModel", demo.load_clip), ("DetrForObjectDetection", demo.load_detr)):
        count = f"{sum(p.numel() for p in load().parameters()):,}".replace(",", " ")
        assert f"`{name}` ({count} parameters)" in text


def test_figures_are_those_of_the_report():
    report = json.loads((ROOT / "benchmarks" / "garments" / "report.json").read_text("utf-8"))
    text = " ".join(SHIPPED.split())
    precision, places = report["average_precision"], report["maximum_at_the_right_garment"]
    assert f"{report['model']['parameters']:,} parameters".replace(",", " ") in text
    assert f"On {precision['canvases']} canvases that the vision transformer" in text
    assert f"classes is {precision['mean']:.3f}." in text
    assert f"On {places['canvases']} of them, all {places['explanations']} pairs" in text
    for name, key in [
        ("generic attention", "generic_attention"),
        ("the same, last layer alone (`start_layer=-1`)", "generic_attention_last_layer_only"),
        ("raw attention of the last layer", "raw_attention_last_layer"),
        ("chance", "chance"),
    ]:
        cells = []
        for unit in ("token", "pixel"):
            share, (low, high) = places[key][unit]["share"], places[key][unit]["interval"]
            cells.append(f"{share:.3f} [{low:.3f}, {high:.3f}]")
        assert f"| {name} | {cells[0]} | {cells[1]} |" in text


def test_python_of_the_page_on_baselines_runs():
    text = (ROOT / "docs" / "baselines.md").read_text("utf-8")
    model = demo.load_model()
    image = demo.preprocess(demo.canvases()[0].image())[None]
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        names = {"model": model}
        exec(compile(block, "baselines.md", "exec"), names)  # noqa: S102
        found = names["method"].attribute(image, 3)
        assert found.shape == image.shape
        assert found.isfinite().all()
        assert found.abs().max() > 0


def test_tables_are_those_of_the_pages_that_they_sum_up():
    speed = (ROOT / "docs" / "speed.md").read_text("utf-8")
    rows = re.search(r"<!-- speed -->\n(.*?)<!--", TEXT, flags=re.DOTALL).group(1).strip()
    assert len(rows.split("\n")) == 11
    assert all(line in speed for line in rows.split("\n"))
    models = (ROOT / "docs" / "models.md").read_text("utf-8")
    assert re.search(r"The census runs .*", TEXT).group() in models
    for part in models.split("\n## ")[1:]:
        library, *lines = part.split("\n")
        entries = [line for line in lines if line.startswith("| ") and "| calls |" not in line]
        refused = sum("| refused: " in line for line in entries)
        row = f"| {library} | {len(entries)} | {len(entries) - refused} | {refused} |"
        assert row in TEXT
