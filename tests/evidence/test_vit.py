"""The experiment on the vision transformer, and the broken variants of our method."""

from __future__ import annotations

import torch

from captum_generic_attn import GenericAttention


def test_explained_canvases_have_their_garments_marked(evidence, sample) -> None:
    vit = evidence.vit
    drawn = vit.draw(vit.load_split("test", sample), 3, 0, 40)
    seen = vit.explained(vit.demo.load_model(), drawn)
    for picture in range(40):
        mine = drawn.classes[picture] == int(seen.targets[picture])
        expected = drawn.masks[picture][mine].any(0)
        assert (seen.masks[picture].numpy() == expected).all()
        area = (drawn.boxes[picture][mine][:, 2:] - drawn.boxes[picture][mine][:, :2]).prod(1).sum()
        assert seen.boxes[picture].sum().item() == area
        assert not (seen.masks[picture] & ~seen.boxes[picture]).any()


def test_the_broken_column_is_the_transposed_row(evidence) -> None:
    vit = evidence.vit
    model = vit.demo.load_model()
    pictures = torch.rand(2, 3, 64, 64)
    broken = evidence.methods.broken_vit(model, (8, 8), 64)["ours, broken: R transposed"]
    matrix = GenericAttention(model).relevance(pictures, 1).matrix("x", "x")
    expected = matrix.mT[:, 0, 1:].view(2, 1, 8, 8)
    found = broken.attribute(pictures, 1)
    torch.testing.assert_close(
        found, torch.nn.functional.interpolate(expected, (64, 64), mode="bilinear")
    )


def test_heads_first_differs_where_heads_disagree(evidence) -> None:
    ours = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    ones = torch.ones(1, 2, 1, 1)
    assert evidence.methods.heads_first(ours, ones).item() == 0  # eq. 5 says 1/2
