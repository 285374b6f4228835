"""Names of operations, their families, and looking into arguments."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_generic_attn.capture.tracking import operations
from captum_generic_attn.capture.tracking.operations import Family, argument, canonical, family_of

NAMES = {
    "function": (torch.matmul, ("matmul", False)),
    "method": (Tensor.matmul, ("matmul", False)),
    "operator": (Tensor.__matmul__, ("matmul", False)),
    "operator from the right": (Tensor.__rsub__, ("sub", False)),
    "product from the right": (Tensor.__rmatmul__, ("rmatmul", False)),
    "operator in place": (Tensor.__iadd__, ("add", True)),
    "method in place": (Tensor.masked_fill_, ("masked_fill", True)),
    "function in place": (F.relu_, ("relu", True)),
    "item": (Tensor.__getitem__, ("getitem", False)),
    "item in place": (Tensor.__setitem__, ("setitem", True)),
    "property": (Tensor.shape.__get__, ("shape", False)),
    "transposed property": (Tensor.T.__get__, ("T", False)),
    "private kernel": (torch._softmax, ("_softmax", False)),
    "Python function": (F.softmax, ("softmax", False)),
    "operator of the dispatcher": (torch.ops.aten.add.Tensor, ("add", False)),
    "in place of the dispatcher": (torch.ops.aten.add_.Tensor, ("add", True)),
    "no name of its own": (nn.Identity(), ("Identity", False)),
}  # fmt: skip


@pytest.mark.parametrize("form", NAMES)
def test_canonical_names(form: str) -> None:
    function, expected = NAMES[form]
    assert canonical(function) == expected


FAMILIES = {
    Family.NOTHING: ["zeros_like", "size", "argmax", "eq", "new_zeros"],
    Family.SAME: ["contiguous", "clone", "to", "layer_norm", "dropout", "detach"],
    Family.SHAPE: ["view", "permute", "getitem", "chunk", "flip", "mT", "gather", "take"],
    Family.TOKENWISE: ["add", "gelu", "masked_fill", "lerp"],
    Family.UNKNOWN: ["something_new", "lstm", "linalg_solve"],
    Family.CHOICE: ["topk", "sort"],
    Family.SCATTER: ["index_add", "scatter_add", "scatter_reduce"],
    Family.JOIN: ["cat", "stack", "hstack"],
    Family.PAD: ["pad"],
    Family.WRITE: ["setitem", "copy", "index_put", "scatter"],
    Family.REDUCE: ["mean", "amax", "std", "logsumexp"],
    Family.LINEAR: ["linear"],
    Family.WINDOW: ["conv2d", "conv_transpose1d", "max_pool1d", "adaptive_avg_pool3d"],
    Family.EMBEDDING: ["embedding"],
    Family.PRODUCT: ["matmul", "rmatmul", "einsum", "baddbmm"],
    Family.SOFTMAX: ["softmax", "_softmax"],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families(family: Family) -> None:
    assert {name: family_of(name) for name in FAMILIES[family]} == dict.fromkeys(
        FAMILIES[family], family
    )


def test_every_operation_stands_in_one_list() -> None:
    counts = Counter(name for names in operations._LISTS.values() for name in names.split())
    assert [name for name, count in counts.items() if count > 1] == []


def test_running_sums_keep_what_they_depend_on() -> None:
    """They mix tokens: a score read from one depends on the calls behind it."""
    assert family_of("cumsum") is not Family.NOTHING


def test_casts_are_not_conversions_to_numbers() -> None:
    """`ids.int()` is still ids, whatever `int(ids)` is."""
    casts = [Tensor.int, Tensor.long, Tensor.short, Tensor.float, Tensor.double, Tensor.half]
    for cast in casts:
        assert family_of(canonical(cast)[0]) in {Family.SAME, Family.TOKENWISE}, cast


def test_listed_names_are_names_of_pytorch() -> None:
    """A name that PyTorch does not have is a slip of the pen."""
    rooms = (torch, Tensor, F, torch.special, torch.linalg, torch.fft, torch.ops.aten)
    names = [name for listed in operations._LISTS.values() for name in listed.split()]
    unknown = [
        name for name in names
        if name != "names"  # named tensors, of older versions
        and not any(hasattr(room, n) for room in rooms for n in (name, f"__{name}__"))
    ]  # fmt: skip
    assert unknown == []


def test_arguments_by_place_or_by_name() -> None:
    assert argument((1, 2), {}, 1, "dim") == 2
    assert argument((1,), {"dim": 3}, 1, "dim") == 3
    assert argument((1,), {}, 1, "dim", -1) == -1
    assert argument((), {}, 0, "dim") is None


def test_tensors_in_nested_arguments() -> None:
    a, b, c, d = (torch.tensor(i) for i in range(4))
    nested = ((a, [b, "text", None]), {"x": (c,), "y": 3, "z": {"deep": d}})
    assert [int(t) for t in operations.tensors_in(nested)] == [0, 1, 2, 3]
    assert list(operations.tensors_in("text")) == []
    assert [int(t) for t in operations.tensors_in(a)] == [0]


def test_arguments_of_planes_are_detached() -> None:
    index = torch.ones(2, requires_grad=True)
    nested = operations.on_cpu([1, (index, slice(None), "text"), None])
    assert isinstance(nested, list)
    assert isinstance(nested[1], tuple)
    assert not nested[1][0].requires_grad
    assert torch.equal(nested[1][0], index)
    assert nested[1][1:] == (slice(None), "text")
    shape = torch.Size([2, 3])
    assert operations.on_cpu(shape) is shape
