"""Options that methods share: one place, complete in signatures, help() and type hints."""

from __future__ import annotations

import inspect
import pydoc
from typing import get_type_hints

import pytest
import torch
from helpers.tiny_models import pictures, tiny_vit
from typing_extensions import Unpack

from captum_generic_attn import GenericAttention
from captum_generic_attn.attribution import AttentionAttribution, AttentionOptions, CommonOptions
from captum_generic_attn.baselines import METHODS, Lrp, method_classes
from captum_generic_attn.captum_api.options import documented_arguments, unpacked_options
from captum_generic_attn.relevance.attention_maps import AttentionMap
from captum_generic_attn.relevance.full_propagation import FullPropagation

SHARED = {"layers", "own", "output", "interpolation", "strict"}
BASELINES = [cls for cls in method_classes() if cls not in (GenericAttention, Lrp)]


def test_the_shared_options_are_those_of_the_base_class() -> None:
    options = inspect.signature(AttentionAttribution.__init__).parameters
    assert set(get_type_hints(CommonOptions)) == SHARED
    assert set(get_type_hints(AttentionOptions)) == {*SHARED, "rows"}
    assert set(options) == {"self", "forward_func", "start_layer", "rows", *SHARED}


@pytest.mark.parametrize("cls", BASELINES, ids=lambda cls: cls.__name__)
def test_signatures_and_docstrings_are_complete(cls: type) -> None:
    parameters = dict(inspect.signature(cls).parameters)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert set(parameters) >= SHARED
    reference = inspect.signature(AttentionAttribution.__init__).parameters
    for name in SHARED:
        assert parameters[name].default == reference[name].default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(documented_arguments(cls.__doc__)) == list(parameters)
    assert set(get_type_hints(cls.__init__)) >= set(parameters)
    page = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    assert "interpolation: str = 'bilinear'" in page
    assert "own: what the token of an example's only explained row gets" in page
    assert "**options" not in page.partition("Methods defined here")[0]


def test_options_are_described_once() -> None:
    """A baseline's text is that of GenericAttention."""
    own = documented_arguments(GenericAttention.__doc__)
    for cls in BASELINES:
        found = documented_arguments(cls.__doc__)
        assert all(found[name] == own[name] for name in SHARED)


@pytest.mark.parametrize("cls", BASELINES, ids=lambda cls: cls.__name__)
def test_options_that_a_method_does_not_have_are_refused(cls: type) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        cls(tiny_vit(), nothing=1)
    has = inspect.signature(cls).parameters
    for name in {"rows", "start_layer", "rules", "scale"} - set(has):
        with pytest.raises((TypeError, ValueError), match=name):
            cls(tiny_vit(), **{name: 0})


def test_a_function_without_unpacked_options_has_none() -> None:
    def plain(x: int, **more: object) -> None: ...
    def unpacking(x: int, **more: Unpack[AttentionOptions]) -> None: ...

    assert unpacked_options(plain) == []
    assert set(unpacked_options(unpacking)) == {*SHARED, "rows"}


# --- the one list


def test_methods_are_listed_once() -> None:
    assert list(METHODS)[:2] == ["Generic attention", "Raw attention"]
    assert len(METHODS) == 10
    for name, method in METHODS.items():
        made = method(tiny_vit())
        assert type(made) in method_classes(), name
    assert METHODS["LRP, frozen"](tiny_vit()).rules == "frozen"
    with pytest.raises(TypeError, match="item assignment"):
        METHODS["mine"] = GenericAttention


class Product(AttentionAttribution):
    """A user's method: `A ⊙ ∇A` with its sign, added up as in eq. 6.

    Args:
        forward_func: as in `GenericAttention`.

    """

    def __init__(self, forward_func, **options: Unpack[AttentionOptions]) -> None:
        super().__init__(forward_func, **options)

    @property
    def elementwise_rule(self):
        return lambda attention, gradient, out=None: torch.mul(attention, gradient, out=out)

    def aggregator(self, calls, output_streams, indexing, cross_pairs, *, matrices):
        found = GenericAttention.aggregator
        settings = GenericAttention(self.forward_func, own=self.own)
        return found(settings, calls, output_streams, indexing, cross_pairs, matrices=matrices)


def test_a_users_method_in_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signed element-wise rule runs in blocks: no whole matrix is built for it."""
    model, given = tiny_vit(), pictures(2)
    whole = GenericAttention(model, rule=lambda a, g: (a * g).mean(1))
    expected = whole.attribute(given, 1)
    assert float(expected.min()) < 0

    def refuse(*_: object) -> None:
        raise AssertionError("a whole matrix was built")

    monkeypatch.setattr(AttentionMap, "left_multiply", refuse)
    monkeypatch.setattr(FullPropagation, "add_map", refuse)
    found = Product(model).attribute(given, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    assert "strict: whether attention calls" in Product.__doc__
