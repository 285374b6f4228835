"""The README's Python runs as it stands there, and its commands exist."""

import json
import re
from pathlib import Path

import pytest
import torch

from captum_generic_attn import demo

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")


def joint_models():
    """A LXMERT and a CLIP, tiny, and what they take."""
    transformers = pytest.importorskip("transformers")
    tiny = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    lxmert = transformers.LxmertForQuestionAnswering(
        transformers.LxmertConfig(
            vocab_size=9, l_layers=1, x_layers=2, r_layers=1, visual_feat_dim=12, num_qa_labels=300,
            **tiny,
        )
    )  # fmt: skip
    towers = tiny | {"num_hidden_layers": 2}
    text = towers | {"vocab_size": 9, "max_position_embeddings": 4, "eos_token_id": 8}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=towers | {"image_size": 16, "patch_size": 8}
    )
    ids = torch.tensor([[1, 2, 3, 8], [4, 5, 8, 0]])
    encoding = {
        "input_ids": ids[:1],
        "attention_mask": torch.ones(1, 4),
        "visual_feats": torch.randn(1, 5, 12),
        "visual_pos": torch.rand(1, 5, 4),
    }
    return {
        "lxmert": lxmert.eval(),
        "clip": transformers.CLIPModel(config).eval(),
        "encoding": encoding,
        "pixel_values": torch.rand(2, 3, 16, 16),
        "input_ids": ids,
    }


def test_python_runs_and_gives_the_shapes_that_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, joint, batch, several, right = re.findall(
        r"```python\n(.*?)```", TEXT, flags=re.DOTALL
    )
    names = {}
    exec(compile(first, "README.md", "exec"), names)  # noqa: S102
    exec(compile(second, "README.md", "exec"), names)  # noqa: S102
    assert names["image"].shape == names["heatmap"].shape == (1, 3, 64, 64)
    assert demo.CLASSES[3] == "sandal"
    assert names["tokens"].shape == (1, 8, 8)
    assert names["maps"].shape == (2, 1, 3, 64, 64)
    assert names["relevance"].matrix("x", "x").shape == (1, 65, 65)
    names |= joint_models()
    exec(compile(joint, "README.md", "exec"), names)  # noqa: S102
    assert names["text"].shape == (1, 4)
    assert names["regions"].shape == (1, 5, 12)
    names["images"] = names["image"].repeat(3, 1, 1, 1)
    exec(compile(batch, "README.md", "exec"), names)  # noqa: S102
    assert names["heatmaps"].shape == (3, 3, 64, 64)
    exec(compile(several, "README.md", "exec"), names)  # noqa: S102
    assert len(names["found"].attributions) == 14
    assert names["found"]["LRP"].shape == (1, 3, 64, 64)
    exec(compile(right, "README.md", "exec"), names)  # noqa: S102
    # One picture, the class that is on it: most of the way without its pixels, it is gone.
    assert 0 < names["curve"].auc().value < 60
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    assert names["boxes"].shape == (1, 5, 4)
    assert names["image_map"].shape == (2, 3, 16, 16)
    assert names["text_map"].shape == (2, 4)


def test_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    wanted = set(re.findall(r"`make ([a-z0-9.-]+)`|^make ([a-z0-9.-]+)", TEXT, flags=re.MULTILINE))
    targets = {first or second for first, second in wanted}
    assert {"demo", "test", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([^):]+)\)", TEXT):
        assert (ROOT / link).is_file(), link


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
    text = " ".join(TEXT.split())
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
    text = " ".join(TEXT.split())
    precision, places = report["average_precision"], report["maximum_at_the_right_garment"]
    assert f"{report['model']['parameters']:,} parameters".replace(",", " ") in text
    assert f"On {precision['canvases']} canvases" in text
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
