"""The experiments on questions: what is asked, what is known to decide, what is removed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from captum_generic_attn import GenericAttention


@pytest.fixture(scope="module", params=["lxmert", "visualbert"])
def model(evidence, request):
    """The script of a model."""
    return getattr(evidence, request.param)


def test_weights_are_small_and_say_how_they_were_made(model) -> None:
    import questions as script

    path = model.WEIGHTS
    assert path.stat().st_size <= 2_000_000
    with safe_open(path, framework="pt") as file:
        notes = {name: json.loads(note) for name, note in file.metadata().items()}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert tuple(notes["answers"]) == script.ANSWERS
    assert tuple(notes["vocabulary"]) == script.VOCABULARY
    training = notes["training"]
    assert training["canvases"] == training["steps"] * training["batch_size"]
    assert training["core_seconds"] < 2 * 30 * 60
    assert {"seed", "learning_rate", "versions"} <= set(training)


@pytest.fixture(scope="module")
def questions(evidence, model, sample):
    split = evidence.vqa.load_split("test", sample)
    answerer = model.answerer()
    return answerer, evidence.vqa.asked(answerer, evidence.vqa.ask(split, 1, 0, 60), split), split


def test_what_is_known_to_decide_reaches_the_table(questions) -> None:
    _, seen, split = questions
    for row, question in enumerate(seen.questions):
        assert seen.words[row].nonzero().flatten().tolist() == [
            place + 1 for place in question.deciding_words
        ]
        assert seen.regions[row].nonzero().flatten().tolist() == sorted(question.deciding_regions)
        answering = seen.answering[row].nonzero().flatten().tolist()
        if question.kind == "existence":
            assert answering == []
        else:
            (place,) = answering
            assert split.classes[question.garments[place]] == [
                "top", "trouser", "dress", "sandal", "sneaker", "bag", "boot"
            ].index(question.answer)  # fmt: skip


def test_what_frames_a_question_is_never_dropped(evidence, questions) -> None:
    answerer, seen, _ = questions
    kept = {"lxmert": ["[CLS]", "[SEP]"], "visualbert": ["[CLS]", "?", "[SEP]"]}[answerer.name]
    from questions import VOCABULARY

    for ids, stays in zip(seen.inputs[0], seen.kept, strict=True):
        assert [VOCABULARY[token] for token in ids[stays]] == kept
    removal = evidence.vqa.removals(answerer, seen)["text"]
    for row, question in enumerate(seen.questions):
        free = removal.removable[row].nonzero().flatten().tolist()
        assert [VOCABULARY[token] for token in seen.inputs[0][row, free]] == [
            word for word in question.words if word not in kept
        ]


def test_regions_are_dropped_with_all_that_belongs_to_them(evidence, questions) -> None:
    answerer, seen, _ = questions
    removal = evidence.vqa.removals(answerer, seen)["image"]
    assert torch.equal(
        removal.removable.sum(1), torch.tensor([len(q.garments) for q in seen.questions])
    )
    first = torch.zeros_like(removal.removable)
    first[:, 0] = True
    ((_, left),) = removal.perturbed(first, 60)
    for place, (mine, whole) in enumerate(zip(left, seen.inputs, strict=True)):
        expected = whole[:, :1] if place in answerer.of_regions else whole
        assert torch.equal(mine, expected), place


def test_perfect_and_inverted_maps_of_questions(evidence, questions) -> None:
    """What decides, and its opposite, in place of a method."""
    answerer, seen, _ = questions
    words, regions = seen.words.float(), seen.regions.float()
    perfect = evidence.vqa.deciding(answerer, seen, words, regions)
    inverted = evidence.vqa.deciding(answerer, seen, -words, -regions)
    for key, figure in perfect.items():
        if key != "answer_relation":
            assert figure.value == 100, key
            assert inverted[key].value == 0, key
    assert 40 < perfect["answer_relation"].value <= 50  # one of two


def test_a_question_may_lose_all_of_its_regions(questions) -> None:
    answerer, seen, _ = questions
    inputs = [tensor[:3] for tensor in seen.inputs]
    empty, hidden = (
        [
            edit(tensor) if place in answerer.of_regions else tensor
            for place, tensor in enumerate(inputs)
        ]
        for edit in (lambda tensor: tensor[:, :0], lambda tensor: torch.zeros_like(tensor[:, :1]))
    )
    assert answerer.scores(*inputs).shape == (3, 9)
    # LXMERT gets a region of zeros, which its mask hides; VisualBERT's text is all there is.
    torch.testing.assert_close(answerer.scores(*empty), answerer.scores(*hidden))


def test_scores_are_those_of_the_explained_model(questions) -> None:
    answerer, seen, _ = questions
    inputs = [tensor[:3] for tensor in seen.inputs]
    output = answerer.model(*inputs)
    (name,) = {"question_answering_score", "logits"} & set(output)
    assert torch.equal(answerer.scores(*inputs), output[name])


def test_the_broken_variants_of_one_stream(evidence, questions) -> None:
    answerer, seen, _ = questions
    if answerer.name != "visualbert":
        pytest.skip("LXMERT has two streams")
    ids, regions, *rest = (tensor[:4] for tensor in seen.inputs)
    broken = evidence.methods.broken_visualbert(answerer.model)
    given = {"target": seen.answers[:4], "additional_forward_args": tuple(rest)}
    matrix = GenericAttention(answerer.model).relevance((ids, regions), **given)
    (stream,) = matrix.streams
    length, question_marks = ids.shape[1], rest[0].sum(1) - 2
    column, row = broken["ours, broken: R transposed"], broken["ours, broken: wrong row"]
    words, boxes = column.attribute((ids, regions), **given)
    first = row.attribute((ids, regions), return_input_shape=False, **given)
    for example, mark in enumerate(question_marks.tolist()):
        expected = matrix.matrix(stream, stream)[example, :, mark].clone()
        expected[mark] = 0
        torch.testing.assert_close(torch.cat([words[example], boxes[example]]), expected)
        of_first = matrix.matrix(stream, stream)[example, 0].clone()
        of_first[0] = 0
        torch.testing.assert_close(torch.cat([part[example] for part in first]), of_first)
    assert length == words.shape[1]


def test_the_figure_of_questions_shows_them_as_they_are(evidence, sample) -> None:
    split = evidence.vqa.load_split("test", sample)
    figure = evidence.figures.questions(split)
    assert len(figure.axes) == 9
    for axes in figure.axes:
        bottom, top = axes.get_ylim()
        assert bottom > top  # rows of a picture run down
        frames = [p for p in axes.patches if not p.get_fill()]
        assert frames
        assert {(p.get_width(), p.get_height()) for p in frames} == {(28, 28)}
        *words, answer = [text.get_text() for text in axes.texts]
        assert words[-1] == "?"
        assert answer.endswith(("(right)", "(wrong)"))
