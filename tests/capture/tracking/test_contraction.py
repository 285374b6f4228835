"""Products as einsum sees them: what is read from a call gives the same result by einsum."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captum_generic_attn.capture.tracking import contraction
from captum_generic_attn.capture.tracking.contraction import Contraction, relabel
from captum_generic_attn.capture.tracking.operations import canonical


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def read(func, *args, **kwargs) -> Contraction:
    terms = contraction.read(canonical(func)[0], args, kwargs)
    assert terms is not None
    return terms


def by_labels(terms: Contraction, left: Tensor, right: Tensor) -> Tensor:
    """What the labels say, by an einsum of single letters."""
    letters: dict[str, str] = {}
    for label in (*terms.left_labels, *terms.right_labels, *terms.out_labels):
        letters.setdefault(label, chr(ord("a") + len(letters)))
    first, second, out = (
        "".join(letters[label] for label in labels)
        for labels in (terms.left_labels, terms.right_labels, terms.out_labels)
    )
    return torch.einsum(f"{first},{second}->{out}", left, right)


CALLS = {
    "matmul of matrices": (torch.matmul, (draw(2, 3), draw(3, 4))),
    "matmul of heads": (torch.matmul, (draw(2, 3, 4, 5), draw(2, 3, 5, 6))),
    "matmul that broadcasts the left": (torch.matmul, (draw(4, 5), draw(2, 3, 5, 6))),
    "matmul that broadcasts the right": (torch.matmul, (draw(2, 3, 4, 5), draw(3, 5, 6))),
    "matmul with an axis of one": (torch.matmul, (draw(2, 1, 4, 5), draw(1, 3, 5, 6))),
    "vector and matrix": (torch.matmul, (draw(3), draw(3, 4))),
    "vector and heads": (torch.matmul, (draw(3), draw(2, 5, 3, 4))),
    "matrix and vector": (torch.matmul, (draw(2, 4, 3), draw(3))),
    "vector and vector": (torch.matmul, (draw(3), draw(3))),
    "operator": (torch.Tensor.__matmul__, (draw(2, 3), draw(3, 4))),
    "bmm": (torch.bmm, (draw(2, 3, 4), draw(2, 4, 5))),
    "mm": (torch.Tensor.mm, (draw(3, 4), draw(4, 5))),
    "mv": (torch.mv, (draw(3, 4), draw(4))),
    "einsum": (torch.einsum, ("bhid,bhjd->bhij", draw(2, 3, 4, 5), draw(2, 3, 6, 5))),
    "einsum with spaces": (torch.einsum, ("b i d, b j d -> b j i", draw(2, 4, 5), draw(2, 6, 5))),
    "einsum without an arrow": (torch.einsum, ("zij,zjA", draw(2, 3, 4), draw(2, 4, 5))),
    "einsum with a list": (torch.einsum, ("ij,jk->ik", [draw(3, 4), draw(4, 5)])),
    "einsum with dots": (torch.einsum, ("...id,...jd->...ij", draw(2, 3, 4, 5), draw(2, 3, 6, 5))),
    "einsum with dots behind": (torch.einsum, ("i...,j...->i...j", draw(4, 2), draw(5, 2))),
    "einsum, unequal dots": (torch.einsum, ("...id,...dj->...ij", draw(4, 5), draw(2, 3, 5, 6))),
    "einsum, dots on one side": (torch.einsum, ("...id,dj->...ij", draw(2, 3, 4, 5), draw(5, 6))),
    "einsum, dots, no arrow": (torch.einsum, ("...ij,...jk", draw(2, 3, 4), draw(2, 4, 5))),
    "einsum that sums one side alone": (torch.einsum, ("ij,jk->k", draw(3, 4), draw(4, 5))),
    "outer product": (torch.einsum, ("i,j->ij", draw(3), draw(4))),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_labels_say_what_is_multiplied(name: str) -> None:
    func, args = CALLS[name]
    terms = read(func, *args)
    torch.testing.assert_close(by_labels(terms, terms.left, terms.right), func(*args))
    assert terms.bias is None
    assert terms.labels(0) == terms.left_labels
    assert terms.labels(1) == terms.right_labels


def test_operator_from_the_right() -> None:
    left, right = draw(2, 3), draw(3, 4)
    terms = read(torch.Tensor.__rmatmul__, right, left)
    assert terms.left is left
    assert terms.right is right
    torch.testing.assert_close(by_labels(terms, left, right), left @ right)


def test_arguments_by_name() -> None:
    left, right = draw(2, 3), draw(3, 4)
    terms = read(torch.matmul, input=left, other=right)
    assert terms.left is left
    assert terms.right is right
    terms = read(torch.matmul, left, other=right)
    torch.testing.assert_close(by_labels(terms, left, right), left @ right)


@pytest.mark.parametrize(
    ("func", "bias", "left", "right"),
    [
        (torch.addmm, draw(5), draw(3, 4), draw(4, 5)),
        (torch.baddbmm, draw(2, 3, 5), draw(2, 3, 4), draw(2, 4, 5)),
        (torch.addmv, draw(3), draw(3, 4), draw(4)),
    ],
    ids=["addmm", "baddbmm", "addmv"],
)
def test_what_is_added_is_told_apart(func, bias: Tensor, left: Tensor, right: Tensor) -> None:
    terms = read(func, bias, left, right, beta=0.5, alpha=2.0)
    assert terms.bias is bias
    expected = func(bias, left, right, beta=0.5, alpha=2.0)
    ours = 0.5 * bias + 2 * by_labels(terms, terms.left, terms.right)
    torch.testing.assert_close(ours, expected)


NO_CONTRACTION = {
    "three factors": (torch.einsum, ("ij,jk,kl->il", draw(2, 3), draw(3, 4), draw(4, 5))),
    "one factor": (torch.einsum, ("ij->ji", draw(2, 3))),
    "numbers for letters": (torch.einsum, (draw(2, 3), [0, 1], draw(3, 4), [1, 2], [0, 2])),
    "a sum over the batch": (torch.addbmm, (draw(3, 5), draw(2, 3, 4), draw(2, 4, 5))),
    "no tensor": (torch.matmul, (draw(2, 3), "x")),
}


@pytest.mark.parametrize("name", NO_CONTRACTION)
def test_what_is_no_product_of_two(name: str) -> None:
    func, args = NO_CONTRACTION[name]
    assert contraction.read(canonical(func)[0], args, {}) is None


def test_summed_axes() -> None:
    assert read(torch.matmul, draw(2, 3, 4), draw(2, 4, 5)).summed == {"sum"}
    assert read(torch.einsum, "bhij,bhjd->bhid", draw(1, 1, 2, 3), draw(1, 1, 3, 2)).summed == {"j"}
    # what one factor has alone is no axis along which the two meet
    assert read(torch.einsum, "ij,jk->k", draw(3, 4), draw(4, 5)).summed == {"j"}
    assert read(torch.einsum, "i,j->ij", draw(3), draw(4)).summed == set()


# --- carrying ids to the result


def parents_in_loops(terms: Contraction, side: int, ids: Tensor, shape: torch.Size) -> Tensor:
    """The id of the factor's element behind each number of the result; -9 where they differ."""
    labels, sizes = terms.labels(side), dict(zip(terms.out_labels, shape, strict=True))
    sizes |= {n: s for n, s in zip(labels, ids.shape, strict=True) if n not in sizes}
    result = torch.empty(shape, dtype=torch.long)
    hidden = [label for label in labels if label not in terms.out_labels]
    for place in itertools.product(*(range(n) for n in shape)):
        at = dict(zip(terms.out_labels, place, strict=True))
        found = set()
        for rest in itertools.product(*(range(sizes[label]) for label in hidden)):
            where = at | dict(zip(hidden, rest, strict=True))
            index = tuple(
                where[label] if n > 1 else 0 for label, n in zip(labels, ids.shape, strict=True)
            )
            found.add(int(ids[index]))
        result[place] = found.pop() if len(found) == 1 else -9
    return result


@given(name=st.sampled_from(sorted(CALLS)), side=st.integers(0, 1), flat=st.sets(st.integers(0, 3)))
@settings(deadline=None, max_examples=40)
def test_ids_follow_their_factor(name: str, side: int, flat: set[int]) -> None:
    """Along the axes in `flat` all elements are one token; others have a token each."""
    func, args = CALLS[name]
    terms = read(func, *args)
    tensor = (terms.left, terms.right)[side]
    shape = [1 if axis in flat else n for axis, n in enumerate(tensor.shape)]
    ids = torch.arange(torch.Size(shape).numel()).view(shape).expand(tensor.shape)
    result = func(*args)
    ours = relabel(ids, terms.labels(side), terms.out_labels, result.shape)
    expected = parents_in_loops(terms, side, ids, result.shape)
    if ours is None:
        assert (expected == -9).any()
    else:
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["matmul of heads", "einsum", "bmm", "einsum with dots"])
def test_ids_agree_with_a_one_hot_product(name: str) -> None:
    """Probe every row of the left factor: the rows of the result that react hold its id."""
    func, args = CALLS[name]
    terms = read(func, *args)
    rows = terms.left[..., 0]
    ids = torch.arange(rows.numel()).view(rows.shape)[..., None].expand(terms.left.shape)
    ours = relabel(ids, terms.left_labels, terms.out_labels, func(*args).shape)
    assert ours is not None
    for token in range(rows.numel()):
        probe = (ids == token).double()
        reacts = by_labels(terms, probe, terms.right.abs()) > 0
        assert torch.equal(ours == token, reacts)


def test_relabel_moves_and_repeats_axes() -> None:
    ids = torch.arange(6).view(2, 3)
    ours = relabel(ids, ("i", "h"), ("h", "j", "i"), torch.Size([3, 4, 2]))
    assert ours is not None
    assert torch.equal(ours, ids.T[:, None, :].expand(3, 4, 2))


def test_relabel_of_what_is_summed() -> None:
    ids = torch.arange(6).view(2, 3)
    features = ids[..., None].expand(2, 3, 4)
    ours = relabel(features, ("b", "i", "d"), ("b", "i"), torch.Size([2, 3]))
    assert ours is not None
    assert torch.equal(ours, ids)
    assert relabel(features, ("b", "i", "d"), ("b", "d"), torch.Size([2, 4])) is None


def test_relabel_sums_over_padding() -> None:
    ids = torch.tensor([[5, -1], [-1, 6]])
    ours = relabel(ids, ("i", "k"), ("i",), torch.Size([2]))
    assert ours is not None
    assert ours.tolist() == [5, 6]
