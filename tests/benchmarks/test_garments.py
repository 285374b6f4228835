"""The benchmark that trains and measures the demo model: its canvases, its training, its figures.

Fashion-MNIST is not needed: a stand-in whose classes are rectangles of different widths is.
"""

import collections
import dataclasses
import gzip
import itertools
import json
import math
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Fashion-MNIST's label of a stand-in of each of the seven classes.
LABEL = (0, 1, 3, 5, 7, 8, 9)


@pytest.fixture(scope="module")
def garments():
    """The benchmark's modules, which are scripts beside the package."""
    for needed in ("scipy", "sklearn", "tqdm"):
        pytest.importorskip(needed)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks" / "garments")
        import canvases
        import captions
        import muon
        import questions
        import report
        import train_clip
        import train_detr
        import train_lxmert
        import train_visualbert
        import train_vit
        import training

        scripts = {
            module.__name__: module
            for module in (
                canvases, captions, muon, questions, report, train_clip, train_detr, train_lxmert,
                train_visualbert, train_vit, training,
            )
        }  # fmt: skip
        yield SimpleNamespace(**scripts)
        for name in scripts:
            sys.modules.pop(name)


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_split(folder, copies=4):
    """Garment of class c: a rectangle 20 high and 6 + 2c wide."""
    kinds = np.tile(np.arange(7), copies)
    images = np.zeros((len(kinds), 28, 28), np.uint8)
    for image, kind in zip(images, kinds, strict=True):
        image[4:24, 3 : 9 + 2 * kind] = 200
    write_idx(folder / "train-images-idx3-ubyte.gz", images)
    labels = np.array(LABEL, np.uint8)[kinds]
    write_idx(folder / "train-labels-idx1-ubyte.gz", labels)


@pytest.fixture(scope="module")
def split(garments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashion")
    write_split(folder)
    return garments.canvases.load_split("train", folder)


def test_split_has_classes_and_boxes(split):
    assert split.images.shape == (28, 28, 28)
    assert split.classes.tolist() == list(range(7)) * 4
    assert split.boxes.tolist() == [[3, 4, 9 + 2 * kind, 24] for kind in range(7)] * 4


def test_tops_are_one_class(garments, tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.full((10, 28, 28), 255, np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(10, dtype=np.uint8))
    classes = garments.canvases.load_split("train", tmp_path).classes
    named = [garments.canvases.CLASSES[kind] for kind in classes]
    assert named == [
        *("top", "trouser", "top", "dress", "top", "sandal", "top", "sneaker", "bag", "ankle boot")
    ]


def test_missing_data_says_how_to_get_it(garments, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset-fashion-mnist.*--data DIR"):
        garments.canvases.load_split("test", tmp_path)


def test_wrong_files_are_named(garments, tmp_path):
    write_split(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    write_idx(labels, np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match=r"holds \(28, 28, 28\) and .*labels.* \(3,\)"):
        garments.canvases.load_split("train", tmp_path)
    labels.write_bytes(gzip.compress(b"no idx file"))
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte\.gz is not an idx file"):
        garments.canvases.load_split("train", tmp_path)


def test_a_canvas_depends_on_its_seed_and_index_alone(garments, split):
    draw = garments.canvases.draw
    many, one = draw(split, 3, 0, 12), draw(split, 3, 7, 1)
    for name in ("pictures", "labels", "classes", "boxes", "masks"):
        assert (getattr(many, name)[7] == getattr(one, name)[0]).all(), name
    assert len({picture.tobytes() for picture in many.pictures}) == 12
    assert not (draw(split, 4, 7, 1).pictures == one.pictures).all()


def test_canvases_hold_what_they_say(garments, split):
    drawn = garments.canvases.draw(split, 0, 0, 400)
    assert set((drawn.classes >= 0).sum(1).tolist()) == {2, 3, 4}
    for picture, labels, classes, boxes in zip(
        drawn.pictures, drawn.labels, drawn.classes, drawn.boxes, strict=True
    ):
        held = [kind for kind in classes.tolist() if kind >= 0]
        assert sorted(set(held)) == np.nonzero(labels)[0].tolist()
        seen = np.zeros((64, 64), int)
        for kind, (left, top, right, bottom) in zip(held, boxes.tolist(), strict=False):
            assert 0 <= left < right <= 64
            assert 0 <= top < bottom <= 64
            # Width by height, as in the source, but for the rounding of either to whole pixels.
            height, width = bottom - top, right - left
            assert abs(width / height - (6 + 2 * kind) / 20) < 1.2 / height
            seen[top:bottom, left:right] += 1
        assert seen.max() == 1, "boxes overlap"
        ground = picture[seen == 0]
        assert (ground == ground[0]).all(), "something lies outside the boxes"
        assert (picture[seen == 1] != ground[0]).any(-1).all(), "a box holds bare ground"


def test_classes_are_equally_likely_and_independent(garments, split):
    classes = garments.canvases.draw(split, 0, 0, 4000).classes
    assert np.bincount(classes[classes >= 0], minlength=7) / (classes >= 0).sum() == pytest.approx(
        np.full(7, 1 / 7), abs=0.012
    )
    together = np.histogram2d(classes[:, 0], classes[:, 1], bins=np.arange(8))[0] / len(classes)
    assert together == pytest.approx(np.full((7, 7), 1 / 49), abs=0.012)


def test_scales_and_places_vary(garments, split):
    drawn = garments.canvases.draw(split, 0, 0, 400)
    boxes = drawn.boxes[drawn.classes >= 0]
    heights = np.unique(boxes[:, 3] - boxes[:, 1])
    low, high = garments.canvases._SCALES
    assert heights.min() == round(20 * low)
    assert heights.max() == round(20 * high)
    for axis in (0, 1):
        starts = boxes[:, axis]
        assert len(np.unique(starts)) > 40
        assert starts.min() == 0
        assert boxes[:, axis + 2].max() == 64


def test_crowded_canvases_fall_back_to_quarters(garments, tmp_path):
    """Garments that fill 28 × 28 pixels often leave no free layout for four."""
    images = np.full((7, 28, 28), 255, np.uint8)
    split = garments.canvases.Split(images, np.arange(7), np.tile([0, 0, 28, 28], (7, 1)))
    drawn = garments.canvases.draw(split, 0, 0, 200)
    for boxes, classes in zip(drawn.boxes, drawn.classes, strict=True):
        seen = np.zeros((64, 64), int)
        for left, top, right, bottom in boxes[classes >= 0]:
            seen[top:bottom, left:right] += 1
        assert seen.max() == 1


@pytest.mark.parametrize("shape", [(5, 8, 20), (3, 20, 8), (6, 6)])
def test_muon_orthogonalizes(garments, shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = garments.muon.orthogonalized(matrices)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    # Same singular vectors; singular values of well-conditioned matrices near 1.
    projected = left.mT @ result @ right.mT
    spread = projected.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(projected, torch.diag_embed(spread), atol=1e-4)
    sound = values > 0.1 * values.amax(-1, keepdim=True)
    assert ((spread > 0.6) & (spread < 1.3))[sound].all()


def test_muon_decays_and_moves_by_the_rate(garments):
    matrix = torch.nn.Parameter(torch.eye(4))
    optimizer = garments.muon.Muon([{"params": [matrix]}], lr=0.1, weight_decay=0.5)
    matrix.grad = torch.eye(4)
    expected = (1 - 0.1 * 0.5) * torch.eye(4)
    expected -= 0.1 * 0.2 * math.sqrt(4) * garments.muon.orthogonalized(torch.eye(4)[None])[0]
    optimizer.step()
    assert torch.allclose(matrix.detach(), expected, atol=1e-6)


def test_masks_are_what_differs_from_the_ground(garments, split):
    drawn = garments.canvases.draw(split, 0, 0, 50)
    for picture, masks, classes, boxes in zip(
        drawn.pictures, drawn.masks, drawn.classes, drawn.boxes, strict=True
    ):
        assert masks.any((1, 2)).tolist() == (classes >= 0).tolist()
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum()
        ground = picture[~masks.any(0)]
        assert (np.abs(ground.astype(int) - np.median(ground, 0)) < 130).all()
        # The stand-in's garments are full: at least what lies well inside is theirs.
        assert masks.sum() > 0.8 * ((boxes[:, 2:] - boxes[:, :2]).prod(1)).sum()


def test_learning_rate_warms_up_and_ends_at_zero(garments):
    rates = [garments.training.learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(rates) == pytest.approx(2.0)
    assert all(later < sooner for sooner, later in itertools.pairwise(rates[5:]))
    assert rates[-1] == pytest.approx(0, abs=1e-12)


@pytest.fixture
def small(garments, monkeypatch):
    """Training as it is, of a tiny model; few garments are watched."""
    monkeypatch.setattr(garments.training, "WATCHED", 7)
    monkeypatch.setattr(garments.training, "CHECKPOINT_EVERY", 2)
    vit = garments.train_vit
    config = vit.CONFIG | {"patch_size": 16, "embed_dim": 16, "depth": 1}
    monkeypatch.setattr(vit, "CONFIG", config)
    recipe = garments.training.Recipe(vit.plain_vit, vit.loss, vit.notes(config), vit.LIBRARIES)
    return SimpleNamespace(
        recipe=recipe, train=garments.training.train, settings=garments.training.Settings
    )


@pytest.mark.parametrize("count", [6, 5])
def test_two_halves_have_the_gradient_of_the_whole(garments, small, split, count):
    model, _ = small.recipe.build()
    with ThreadPoolExecutor(2) as workers:
        loss = garments.training.set_gradients(small.recipe, model, split, 1, 20, count, workers)
    whole = small.recipe.loss(model, split, 1, 20, count)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    torch.testing.assert_close(loss, whole.detach())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_a_vision_transformers_loss_is_that_of_each_class(garments, small, split):
    model, _ = small.recipe.build()
    drawn = garments.canvases.draw(split, 3, 5, 4)
    odds = model(garments.report.pictures_of(drawn)).sigmoid()
    labels = torch.from_numpy(drawn.labels)
    expected = -(labels * odds.log() + (1 - labels) * (1 - odds).log()).mean()
    torch.testing.assert_close(small.recipe.loss(model, split, 3, 5, 4), expected)


def test_training_cut_off_and_resumed_ends_the_same(small, split, tmp_path):
    settings = small.settings(seed=1, steps=5, batch_size=4, learning_rate=1e-2)
    whole, _ = small.train(small.recipe, split, tmp_path / "whole.pt", settings)

    drawn = []

    def cut_off(model, split, seed, start, count):
        if seed == 1:
            drawn.append(start)
            if start == 14 and drawn.count(14) == 1:
                raise KeyboardInterrupt
        return small.recipe.loss(model, split, seed, start, count)

    recipe = dataclasses.replace(small.recipe, loss=cut_off)
    with pytest.raises(KeyboardInterrupt):
        small.train(recipe, split, tmp_path / "cut.pt", settings)
    resumed, training = small.train(recipe, split, tmp_path / "cut.pt", settings)
    # Half a batch is two canvases. Cut off in the fourth step, resumed after the second.
    assert sorted(drawn[:8]) == list(range(0, 16, 2))
    assert sorted(drawn[8:]) == list(range(8, 20, 2))
    for (name, weight), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), name
    assert training["canvases"] == 20
    assert training["seed"] == 1


def test_a_checkpoint_of_other_settings_is_refused(small, split, tmp_path):
    settings = small.settings(1, 1, 4, 1e-2)
    small.train(small.recipe, split, tmp_path / "vit.pt", settings)
    with pytest.raises(ValueError, match=r"belongs to a run with .*'seed': 1.*--runs"):
        small.train(small.recipe, split, tmp_path / "vit.pt", dataclasses.replace(settings, seed=2))
    other = dataclasses.replace(small.recipe, notes={**small.recipe.notes, "mean": 0.5})
    with pytest.raises(ValueError, match=r'belongs to a run with .*"mean": 0.95.*--runs'):
        small.train(other, split, tmp_path / "vit.pt", settings)


def test_training_moves_every_parameter(small, split, tmp_path):
    model, _ = small.train(small.recipe, split, tmp_path / "vit.pt", small.settings(0, 3, 4, 1e-2))
    torch.manual_seed(0)
    untrained, _ = small.recipe.build()
    for (name, trained), first in zip(
        model.named_parameters(), untrained.parameters(), strict=True
    ):
        assert not torch.equal(trained, first), name


def test_written_weights_are_halved_and_bring_what_is_needed(garments, small, split, tmp_path):
    from safetensors import safe_open

    settings = small.settings(0, 1, 4, 1e-2)
    model, training = small.train(small.recipe, split, tmp_path / "vit.pt", settings)
    garments.training.write_weights(small.recipe, model, training, tmp_path / "vit.safetensors")
    with safe_open(tmp_path / "vit.safetensors", framework="pt") as file:
        notes = {name: json.loads(note) for name, note in file.metadata().items()}
        for name, tensor in model.state_dict().items():
            assert torch.equal(file.get_tensor(name), tensor.half()), name
    assert notes["config"] == garments.train_vit.CONFIG
    assert notes["classes"] == list(garments.canvases.CLASSES)
    assert (notes["training"]["steps"], notes["training"]["batch_size"]) == (1, 4)


# --- questions


@pytest.fixture(scope="module")
def questions(garments, split):
    return garments.questions.ask(split, 0, 0, 3000)


def test_a_question_depends_on_its_seed_and_index_alone(garments, split, questions):
    (one,) = garments.questions.ask(split, 0, 7, 1)
    for name, value in vars(questions[7]).items():
        assert np.array_equal(getattr(one, name), value), name
    (other,) = garments.questions.ask(split, 1, 7, 1)
    assert (other.words, other.answer) != (one.words, one.answer)


def cell_of(box):
    """Row and column of a box on the lattice."""
    left, top, right, bottom = box.tolist()
    assert (right - left, bottom - top) == (28, 28)
    assert (left // 32, top // 32) == ((right - 1) // 32, (bottom - 1) // 32)
    return top // 32, left // 32


def test_answers_follow_from_the_canvas(garments, split, questions):
    """A reader of questions, written apart from their writer."""
    moves = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
    rows, columns = ("upper", "middle", "lower"), ("left", "center", "right")
    for question in questions:
        names = [garments.questions.GARMENTS[kind] for kind in split.classes[question.garments]]
        held = dict(zip(map(cell_of, question.boxes), names, strict=True))
        assert len(held) == len(names)
        assert 4 <= len(names) <= 8
        *words, mark = question.words
        assert mark == "?"
        if question.kind == "existence":
            (place,) = (p for p, name in enumerate(words) if name in garments.questions.GARMENTS)
            asked = words[place]
            assert question.answer == ("yes" if asked in names else "no")
            right = {names.index(asked)} if asked in names else set()
            assert names.count(asked) <= 1
            decide = {place}
        elif question.kind == "place":
            *_, row, column = words
            cell = rows.index(row), columns.index(column)
            assert held[cell] == question.answer
            right = {list(held).index(cell)}
            decide = {len(words) - 2, len(words) - 1}
        else:
            anchor = words[-1]
            assert names.count(anchor) == 1
            (place,) = (p for p, word in enumerate(words) if word in moves)
            down, aside = moves[words[place]]
            row, column = list(held)[names.index(anchor)]
            cell = row + down, column + aside
            assert held[cell] == question.answer
            right = {names.index(anchor), list(held).index(cell)}
            decide = {place, len(words) - 1}
        assert set(question.deciding_regions) == right
        assert set(question.deciding_words) == decide


def test_guessing_answers_fails(questions):
    kinds = {kind: [q for q in questions if q.kind == kind] for kind in ("relation", "place")}
    yes = [q.answer == "yes" for q in questions if q.kind == "existence"]
    assert np.mean(yes) == pytest.approx(0.5, abs=0.05)
    assert len(yes) / len(questions) == pytest.approx(1 / 3, abs=0.03)
    for of_kind in kinds.values():
        counts = collections.Counter(question.answer for question in of_kind)
        assert len(counts) == 7
        assert max(counts.values()) / len(of_kind) < 0.2
        # Nor does the question tell: the best guess from its words alone.
        guesses = collections.defaultdict(collections.Counter)
        for question in of_kind:
            guesses[question.words[-3:]][question.answer] += 1
        best = sum(max(answers.values()) for answers in guesses.values())
        assert best / len(of_kind) < 0.35


def test_batches_hold_what_was_asked(garments, split, questions):
    asked = questions[:40]
    batch = garments.questions.collate(asked, split)
    vocabulary = garments.questions.VOCABULARY
    assert len(set(vocabulary)) == len(vocabulary) < 40
    assert batch.input_ids.shape[1] <= garments.questions.LONGEST
    for row, question in enumerate(asked):
        count, words = len(question.garments), len(question.words) + 2
        read = [vocabulary[token] for token in batch.input_ids[row].tolist()]
        assert read[:words] == ["[CLS]", *question.words, "[SEP]"]
        assert set(read[words:]) <= {"[PAD]"}
        assert batch.attention_mask[row].tolist() == [1.0] * words + [0.0] * (len(read) - words)
        pixels = split.images[question.garments].reshape(count, -1) / 255
        np.testing.assert_allclose(batch.visual_feats[row, :count].numpy(), pixels, atol=1e-6)
        np.testing.assert_allclose(batch.visual_pos[row, :count] * 96, question.boxes, atol=1e-4)
        assert batch.visual_attention_mask[row].tolist() == [1.0] * count + [0.0] * (
            batch.visual_feats.shape[1] - count
        )
        assert not batch.visual_feats[row, count:].any()
        assert garments.questions.ANSWERS[batch.answers[row]] == question.answer


def test_a_questions_picture_shows_its_garments(garments, split, questions):
    picture = garments.questions.picture(questions[0], split)
    assert picture.shape == (96, 96, 3)
    shown = (picture != picture[-1, 31]).any(-1)
    for garment, (left, top, right, bottom) in zip(
        questions[0].garments, questions[0].boxes, strict=True
    ):
        assert (shown[top:bottom, left:right] == (split.images[garment] > 0)).all()
        shown[top:bottom, left:right] = False
    assert not shown.any()


def test_lxmert_learns_from_all_of_its_inputs(garments, split):
    torch.manual_seed(0)
    model, layers = garments.train_lxmert.lxmert()
    loss = garments.train_lxmert.loss(model, split, 0, 0, 8)
    chance = math.log(len(garments.questions.ANSWERS))
    assert loss.item() == pytest.approx(chance, rel=0.2)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    without = {
        name
        for (name, _), gradient in zip(model.named_parameters(), found, strict=True)
        if gradient is None
    }
    # The image side of the last cross layer reaches no answer.
    assert without
    assert all("encoder.x_layers.2.vis" in name for name in without)
    assert sum(p.numel() for p in model.parameters()) * 2 < 2e6
    assert layers is model.lxmert.encoder


def test_only_the_maximum_counts_and_ties_count_by_share(garments):
    maps, inside = torch.zeros(4, 64, 64), torch.zeros(4, 64, 64, dtype=torch.bool)
    maps[:3, 10, 20] = 1
    maps[2, 50, 50] = 1
    inside[0, 10, 20] = inside[1, 11, 20] = inside[2, 5:15, 15:30] = inside[3, :32, :16] = True
    # The last map is constant: the share of the picture that lies inside.
    assert garments.report.points(maps, inside).tolist() == [1, 0, 0.5, 16 * 32 / 64**2]


def test_right_places_are_all_boxes_of_a_class(garments, split):
    drawn = garments.canvases.draw(split, 0, 0, 60)
    places = garments.report.right_places(drawn).numpy()
    assert (places.any((2, 3)) == (drawn.labels == 1)).all()
    twice = 0
    for place, classes, boxes in zip(places, drawn.classes, drawn.boxes, strict=True):
        for kind in range(7):
            own = boxes[classes == kind]
            twice += len(own) > 1
            assert place[kind].sum() == ((own[:, 2:] - own[:, :2]).prod(1)).sum()
            assert all(place[kind, top, left] for left, top, _, _ in own)
    assert twice > 5


def test_raw_attention_is_the_last_layers_class_row(garments):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(3)
    config = {"img_size": 64, "patch_size": 16, "embed_dim": 8, "num_heads": 2, "depth": 2}
    model = VisionTransformer(**config).eval()
    pictures = torch.randn(2, 3, 64, 64)
    maps = garments.report.raw_attention(model)(pictures, torch.tensor([0, 1]))

    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(pictures))
        block = model.blocks[1]
        mixed = block.attn.qkv(block.norm1(model.blocks[0](tokens)))
        queries, keys, _ = mixed.reshape(2, 17, 3, 2, 4).permute(2, 0, 3, 1, 4)
        weights = (queries @ keys.mT / 2).softmax(-1).mean(1)[:, 0, 1:].reshape(2, 4, 4)
    torch.testing.assert_close(maps, weights, atol=1e-6, rtol=0)


def test_summary_counts_explanations_and_draws_canvases_again(garments, split):
    drawn = garments.canvases.draw(split, 0, 0, 50)
    scores = np.where(drawn.labels == 1, np.arange(7) == 0, np.nan)
    summary = garments.report.summary(scores)
    share = drawn.labels[:, 0].sum() / drawn.labels.sum()
    assert summary["share"] == pytest.approx(share, abs=5e-5)
    assert summary["by_class"] == {name: float(name == "top") for name in garments.canvases.CLASSES}
    low, high = summary["interval"]
    assert low < share < high
    assert high - low < 0.25


def test_every_class_on_a_canvas_is_asked_for_and_no_other(garments, split):
    drawn = garments.canvases.draw(split, 0, 0, 40)
    pixels = garments.report.right_places(drawn).double()
    tokens = pixels.reshape(40, 7, 8, 8, 8, 8).amax((3, 5))
    pictures = garments.report.pictures_of(drawn)

    def best_token(asked, classes):
        """Highest where most of the right place is."""
        assert len(asked) == len(classes) <= garments.report.CHUNK
        found = [(pictures == picture).all((1, 2, 3)).nonzero()[0, 0] for picture in asked]
        return pixels[found, classes].reshape(-1, 8, 8, 8, 8).mean((2, 4))

    absent = drawn.labels == 0
    scores = garments.report.localisation(drawn, best_token)
    for values in scores.values():
        assert (np.isnan(values) == absent).all()
    assert (scores["token"][~absent] == 1).all()
    # A narrow garment may lie beside the centre of every token that shows it.
    assert scores["pixel"][~absent].mean() > 0.9
    chance = garments.report.localisation(drawn, None)
    for way, right in (("pixel", pixels), ("token", tokens)):
        np.testing.assert_array_equal(np.isnan(chance[way]), absent)
        area = right.mean((2, 3)).numpy()
        np.testing.assert_allclose(chance[way][~absent], area[~absent], rtol=1e-6)


def test_the_explained_tokens_are_what_users_get(garments, split):
    """The report interpolates by itself; it must be the package's own map."""
    from captum_generic_attn import GenericAttention, demo

    pictures = garments.report.pictures_of(garments.canvases.draw(split, 0, 0, 3))
    model, classes = demo.load_model(), torch.tensor([0, 3, 6])
    maps = garments.report.generic_attention(model, 0)(pictures, classes)
    fine = torch.nn.functional.interpolate(maps[:, None], (64, 64), mode="bilinear")
    expected = GenericAttention(model).attribute(pictures, target=classes)
    torch.testing.assert_close(fine.expand_as(expected), expected)


def test_the_shipped_canvases_are_the_first_of_their_seed(garments):
    from captum_generic_attn import demo

    folder = garments.canvases.DEBIAN_FOLDER
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: needs Debian's package dataset-fashion-mnist")
    split = garments.canvases.load_split("test", folder)
    drawn = garments.canvases.draw(split, garments.canvases.TEST_SEED, 0, 24)
    for canvas, picture in zip(demo.canvases(), drawn.pictures, strict=True):
        assert (np.asarray(canvas.image()) == picture).all(), canvas.path.name


def test_visualbert_is_asked_the_same(garments, split, questions):
    """Its regions hold their boxes as four more features; its loss is that of the answers."""
    batch = garments.questions.collate(questions[:6], split)
    given = garments.train_visualbert.inputs(batch)
    assert torch.equal(given["visual_embeds"][..., :784], batch.visual_feats)
    assert torch.equal(given["visual_embeds"][..., 784:], 8 * batch.visual_pos)
    model, layers = garments.train_visualbert.visualbert()
    assert layers is model.visual_bert.encoder
    shares = model.eval()(**given).logits.softmax(-1)
    expected = -shares[torch.arange(6), batch.answers].log().mean()
    torch.testing.assert_close(garments.train_visualbert.loss(model, split, 0, 0, 6), expected)


# --- captions


@pytest.fixture(scope="module")
def captioned(garments, split):
    drawn = garments.canvases.draw(split, 5, 0, 400)
    return drawn, garments.captions.describe(drawn, 9, 0)


def read(words, names):
    """A reader of captions, written apart from their writer: (garment, place) of each mention."""
    found = []
    for mention in " ".join(words).split(" and "):
        article, garment, *rest = mention.split()
        assert article == "a"
        assert rest[:2] == (["in", "the"] if rest else [])
        found.append((names.index(garment), tuple(rest[2:]) or None))
    return found


def lies_in(box, place, slack):
    """Whether the centre of a box is in a quarter, or outside it by less than so many pixels."""
    x, y = (box[0] + box[2]) / 2 - 32, (box[1] + box[3]) / 2 - 32
    down, aside = {"upper": -1, "lower": 1}[place[0]], {"left": -1, "right": 1}[place[1]]
    return y * down >= -slack and x * aside >= -slack


def holds(drawn, row, mention, slack):
    """The garments of a canvas that a mention may mean."""
    garment, place = mention
    return [
        slot
        for slot in range(4)
        if drawn.classes[row, slot] == garment
        and (place is None or lies_in(drawn.boxes[row, slot], place, slack))
    ]


def test_captions_are_true_of_their_canvases(garments, captioned):
    drawn, captions = captioned
    names = garments.questions.GARMENTS
    told, lengths = [], set()
    for row, caption in enumerate(captions):
        mentions = read(caption.words, names)
        assert str(caption) == " ".join(caption.words)
        assert len({garment for garment, _ in mentions}) == len(mentions)
        # Where a place is told, the garment is clearly there.
        assert all(holds(drawn, row, mention, -5) for mention in mentions)
        told += [place is not None for _, place in mentions]
        lengths.add(len(mentions))
        for mention, (garment, place) in zip(caption.mentions, mentions, strict=True):
            meant = garments.captions.meant(drawn, row, mention)
            assert np.flatnonzero(meant).tolist() == holds(drawn, row, (garment, place), 5)
    assert lengths == {1, 2, 3, 4}
    assert 0.4 < np.mean(told) < 0.6


def test_wrong_captions_are_wrong_in_one_thing(garments, captioned):
    drawn, captions = captioned
    names = garments.questions.GARMENTS
    wrong = garments.captions.distort(captions, drawn, 9, 0)
    changes = []
    for row, (caption, others) in enumerate(zip(captions, wrong, strict=True)):
        mine = read(caption.words, names)
        assert len({str(other) for other in others}) == len(others) >= 3
        for other in others:
            its = read(other.words, names)
            ((before, after),) = [
                both for both in zip(mine, its, strict=True) if both[0] != both[1]
            ]
            assert (before[0] == after[0]) != (before[1] == after[1])
            assert not holds(drawn, row, after, 5)  # not even a garment near the middle
            changes.append(before[0] == after[0])
    assert 0.2 < np.mean(changes) < 0.5  # places; the others are garments
    some = garments.captions.distort(captions, drawn, 9, 0, 2)
    assert some == [others[:2] for others in wrong]


def test_a_caption_depends_on_its_canvas_seed_and_index_alone(garments, captioned):
    drawn, captions = captioned
    one = drawn.part(7, 8)
    assert garments.captions.describe(one, 9, 7) == [captions[7]]
    wrong = garments.captions.distort(captions, drawn, 9, 0)
    assert garments.captions.distort([captions[7]], one, 9, 7) == [wrong[7]]
    others = garments.captions.describe(drawn, 10, 0)
    assert sum(one == other for one, other in zip(captions, others, strict=True)) < 200


def test_captions_do_not_hang_on_what_drew_their_canvas(garments, split):
    """Under the canvas's own seed: one, two or three of three classes are named equally often."""
    drawn = garments.canvases.draw(split, 9, 0, 1200)
    captions = garments.captions.describe(drawn, 9, 0)
    for classes in (2, 3):
        counts = np.bincount(
            [
                len(caption.mentions)
                for caption, labels in zip(captions, drawn.labels, strict=True)
                if labels.sum() == classes
            ],
            minlength=classes + 1,
        )[1:]
        assert counts.sum() > 250
        assert counts / counts.sum() == pytest.approx(np.full(classes, 1 / classes), abs=0.09)


def test_what_is_true_by_chance_is_known(garments, captioned):
    drawn, captions = captioned
    names = garments.questions.GARMENTS
    found = garments.captions.true_of(captions[:40], drawn.part(0, 60))
    assert found.shape == (60, 40)
    assert found.diagonal().all()
    for row in range(60):
        for column, caption in enumerate(captions[:40]):
            mentions = read(caption.words, names)
            expected = all(holds(drawn, row, mention, 5) for mention in mentions)
            assert found[row, column].item() is expected
    assert 0.05 < found.float().mean() < 0.4


def test_clips_loss_is_contrastive(garments, captioned, split):
    """A slow twin, one canvas and caption at a time."""
    from captum_generic_attn import demo

    clip = garments.train_clip
    model, _ = clip.clip()
    count, seed = 6, 4
    drawn = garments.canvases.draw(split, seed, 0, count)
    captions = garments.captions.describe(drawn, seed, 0)
    wrong = garments.captions.distort(captions, drawn, seed, 0, clip.WRONG)
    true = garments.captions.true_of(captions, drawn)
    pictures = garments.canvases.inputs(drawn)

    def score(row, caption):
        ids = demo.tokenize([str(caption)])
        return model(pixel_values=pictures[row : row + 1], input_ids=ids).logits_per_image[0, 0]

    losses = []
    for row in range(count):
        own = score(row, captions[row])
        others = [j for j in range(count) if j != row and not true[row, j]]
        choices = [own, *(score(row, captions[j]) for j in others)]
        choices += [score(row, caption) for caption in wrong[row]]
        losses.append(torch.stack(choices).logsumexp(0) - own)
        canvases = [j for j in range(count) if j == row or not true[j, row]]
        losses.append(torch.stack([score(j, captions[row]) for j in canvases]).logsumexp(0) - own)
    singles = []
    names = garments.questions.GARMENTS
    for row in range(count):
        scores = {
            text: (score(row, text), holds(drawn, row, read(text.split(), names)[0], -5),
                   holds(drawn, row, read(text.split(), names)[0], 5))
            for text in clip.MENTIONS
        }  # fmt: skip
        false = [value for value, _, possible in scores.values() if not possible]
        singles += [
            torch.stack([value, *false]).logsumexp(0) - value
            for value, certain, _ in scores.values()
            if certain
        ]
    assert len(clip.MENTIONS) == len(set(clip.MENTIONS)) == 7 * 5
    expected = torch.stack(losses).mean() + torch.stack(singles).mean()
    torch.testing.assert_close(clip.loss(model, split, seed, 0, count), expected)


def test_detr_is_given_boxes_and_classes(garments, split):
    drawn = garments.canvases.draw(split, 2, 0, 5)
    labels = garments.train_detr.labels(drawn)
    for row, label in enumerate(labels):
        present = drawn.classes[row] >= 0
        assert label["class_labels"].tolist() == drawn.classes[row][present].tolist()
        middle, size = 64 * label["boxes"].numpy()[:, :2], 64 * label["boxes"].numpy()[:, 2:]
        corners = np.concatenate([middle - size / 2, middle + size / 2], 1)
        np.testing.assert_allclose(corners, drawn.boxes[row][present], atol=1e-4)
    model, _ = garments.train_detr.detr()
    model.eval()
    expected = model(garments.canvases.inputs(drawn), labels=labels).loss
    torch.testing.assert_close(garments.train_detr.loss(model, split, 2, 0, 5), expected)
