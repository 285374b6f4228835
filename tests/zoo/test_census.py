"""Every model of the zoo gives maps, or is refused for a reason that is written down.

`make zoo` runs them all and writes `docs/models.md`; a fixed share runs with `make test`.
"""

from __future__ import annotations

import pkgutil
import re

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("open_clip")

from captum_generic_attn.captum_api.targets import choose_output
from zoo import aten
from zoo.census import Finding, examine, write_down
from zoo.models import Entry, entries

ENTRIES = entries()
EVERY_TEST, EVERY_CI = 12, 3
"""Of the quick models, so many-th run with `make test`, and so many-th where CI asks for more."""


def _parameters() -> list[object]:
    quick = [entry for entry in ENTRIES if not entry.heavy]
    tested = {entry.label for entry in quick[::EVERY_TEST]}
    sampled = {entry.label for entry in quick[::EVERY_CI]}
    marks = {
        entry.label: () if entry.label in tested
        else (pytest.mark.slow, pytest.mark.ci_sample) if entry.label in sampled
        else (pytest.mark.slow,)
        for entry in ENTRIES
    }  # fmt: skip
    return [pytest.param(entry, marks=marks[entry.label], id=entry.label) for entry in ENTRIES]


@pytest.mark.parametrize("entry", _parameters())
def test_model(entry: Entry) -> None:
    finding = examine(entry)
    write_down(finding)
    assert not finding.left_behind
    assert finding.output_moved <= 1e-5 or finding.message
    if entry.refusal:
        assert entry.refusal in finding.message
        assert_refusals_say_where_and_what_to_do(finding)
        assert_nothing_overlooked(finding)
        return
    assert finding.message == ""
    assert finding.gives_maps
    calls = finding.used + finding.unused + finding.refused
    assert calls + finding.ignored == finding.aten + finding.aten_others
    assert calls < finding.aten if entry.blends else calls == finding.aten
    assert finding.fused_apart <= (entry.tolerance if finding.double else 2e-5)
    assert finding.crosses == entry.crosses
    if entry.streams:
        assert sorted(finding.streams) == sorted(entry.streams)


def assert_nothing_overlooked(finding: Finding) -> None:
    """Whatever attention there is was seen: in a record, in a refusal, or as a softmax alone."""
    seen = finding.used + finding.unused + finding.refused + finding.ignored
    assert seen >= finding.aten or "no attention was found" in finding.message


def assert_refusals_say_where_and_what_to_do(finding: Finding) -> None:
    """Each line: name and type of the module, what was seen; what to do."""
    first, *lines = finding.message.splitlines()
    if first.startswith("no attention was found"):
        assert 'load it with attn_implementation="sdpa" or "eager"' in first
    else:
        assert lines
    for line in lines:
        assert re.fullmatch(r"  [\w.]+ \(\w+\): .+; .+", line), line


def test_labels_are_unique() -> None:
    labels = [entry.label for entry in ENTRIES]
    assert len(labels) == len(set(labels))


def test_what_is_refused_has_a_reason_or_counts_against_us() -> None:
    """At least 95 % of the models whose attention is softmax attention between tokens give maps."""
    ours = [entry for entry in ENTRIES if not entry.why]
    refused = [entry.label for entry in ours if entry.refusal]
    assert len(refused) <= 0.05 * len(ours), refused


def test_no_module_of_timm_is_missing() -> None:
    import timm

    from zoo.models import timm_models

    listed = {entry.name.split(":")[0] for entry in timm_models.ENTRIES}
    known = listed | timm_models.WITHOUT
    assert not listed & timm_models.WITHOUT
    modules = [m.name for m in pkgutil.iter_modules(timm.models.__path__) if m.name[0] != "_"]
    missing = [m for m in modules if m not in known and timm.list_models(module=m)]
    assert not missing


@pytest.mark.slow
def test_no_type_of_transformers_is_missing() -> None:
    """The rule of `huggingface.py`, applied anew: nothing that it selects is left out."""
    import torch
    import transformers

    from zoo.models import huggingface

    listed = {kind for kinds in huggingface.TYPES.values() for kind in kinds.split()}
    missing, seen = [], set()
    for task, classes in huggingface.CLASSES.items():
        for kind in classes:
            if kind in seen or kind in listed:
                seen.add(kind)
                continue
            seen.add(kind)
            try:
                config = transformers.CONFIG_MAPPING[kind](**huggingface.TINY)
                with torch.device("meta"):
                    cls = getattr(transformers, huggingface.class_of(task, kind))
                    size = sum(p.numel() for p in cls(config).parameters())
                if size > huggingface.MOST_PARAMETERS:
                    continue
                built = huggingface.build(task, kind)
                choose_output(built.forward(*built.inputs, *built.additional), None)
            except Exception:  # noqa: BLE001, S112 - whatever it is, the rule leaves it out
                continue
            missing.append(kind)
    assert not missing


def test_attention_is_counted_below() -> None:
    """Fused, written out, with mixed heads, as a router: what the independent count says."""
    import torch
    import torch.nn.functional as F

    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    weight = torch.randn(4, 4)
    assert aten.count(lambda: F.scaled_dot_product_attention(q, k, v)).attention == 1
    written_out = aten.count(lambda: F.dropout((q @ k.mT).softmax(-1), 0.1) @ v)
    assert (written_out.attention, written_out.others) == (1, 0)

    def mixed_heads() -> torch.Tensor:
        maps = F.linear((q @ k.mT).softmax(-1).permute(0, 2, 3, 1), weight)
        return maps.permute(0, 3, 1, 2) @ v

    assert aten.count(mixed_heads).attention == 1
    router = aten.count(lambda: (q * q.softmax(-1).topk(2)[0].sum(-1, keepdim=True)) @ k.mT)
    assert (router.attention, router.others) == (0, 1)
