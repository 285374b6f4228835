"""Which calls count, which are the last of their stream, and maps laid out over all tokens.

The options as users give them stand in `test_attribution.py` and `test_errors.py`.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import sentences, tiny_text
from torch import Tensor, nn

from captum_generic_attn import GenericAttention, UnsupportedAttentionError
from captum_generic_attn.capture.operands import Operands
from captum_generic_attn.capture.record import Explicit
from captum_generic_attn.relevance.aggregator import PropagationOptions
from captum_generic_attn.relevance.backward import check_padding
from captum_generic_attn.relevance.calls import TokenIndexing, indexed
from captum_generic_attn.relevance.explained_rows import explained_rows
from captum_generic_attn.relevance.output_rows import output_streams
from captum_generic_attn.relevance.selection import selected
from captum_generic_attn.relevance.states import RelevanceStates
from captum_generic_attn.tokens.space import PADDING
from captum_generic_attn.tokens.spaces import TokenSpaces
from captum_generic_attn.tokens.streams import TokenStreams


def call(index: int, *behind: int, stream: str = "x", keys: tuple[int, ...] | None = None):
    """A call whose queries (and keys, if no others are given) depend on calls `behind` it."""
    return SimpleNamespace(
        index=index, module=f"blocks.{index}", query_stream=stream, key_stream=stream,
        query_ancestors=frozenset(behind), query_tokens=None,
        key_ancestors=frozenset(behind if keys is None else keys),
    )  # fmt: skip


def final(*records, output: set[int], reached: set[int] | None = None) -> set[int]:
    every = {record.index for record in records}
    for record in records:
        record.stream_pair = SimpleNamespace(queries=frozenset([record.query_stream]))
    capture = SimpleNamespace(
        records=records, ancestors=frozenset(output), refusals=(),
        streams=SimpleNamespace(having=lambda name: None),
    )  # fmt: skip
    graph = Everything(every if reached is None else reached)
    return {r.index for reader in output_streams(capture, graph).values() for r in reader.last}


class Everything(set[int]):
    """Calls that a score reaches, all by one way."""

    def parts_early(self, *_: object) -> bool:
        return False


def test_the_last_of_a_chain() -> None:
    assert final(call(0), call(1, 0), call(2, 1), output={2}) == {2}


def test_the_last_of_each_stream() -> None:
    records = (call(0), call(1, stream="y"), call(2, 0), call(3, 1, stream="y"))
    assert final(*records, output={2, 3}) == {2, 3}


def test_parallel_branches_are_all_last() -> None:
    assert final(call(0), call(1, 0), call(2, 0), output={1, 2}) == {1, 2}


def test_what_keys_alone_depend_on_is_not_last() -> None:
    assert final(call(0), call(1, keys=(0,)), output={0, 1}) == {1}


def test_calls_that_the_score_does_not_reach_do_not_hide_others() -> None:
    records = (call(0), call(1, 0), call(2, 1))
    assert final(*records, output={1}, reached={0, 1}) == {1}


def test_a_refused_call_in_between_is_looked_through() -> None:
    """Another stream's call stands between two of this one."""
    records = (call(0), call(1, 0, stream="y"), call(2, 1))
    assert final(*records, output={2}) == {2}
    assert final(*records, output={1, 2}) == {1, 2}


# --- layers


def seen(*modules: str, **named: nn.Module):
    return SimpleNamespace(
        records=[SimpleNamespace(module=name) for name in modules[:-1]],
        refusals=[SimpleNamespace(module=name) for name in modules[-1:]],
        modules=named,
    )


def test_layers_are_names_prefixes_or_modules() -> None:
    block = nn.Identity()
    capture = seen("a.1.attn", "a.10.attn", "b", last=block)
    assert selected(capture, None) == {"a.1.attn", "a.10.attn", "b"}
    assert selected(capture, "a.1") == {"a.1.attn"}
    assert selected(capture, ["a", "b"]) == {"a.1.attn", "a.10.attn", "b"}
    assert selected(capture, "") == {"a.1.attn", "a.10.attn", "b"}
    capture.modules = {"a.10": block}
    assert selected(capture, block) == {"a.10.attn"}
    with pytest.raises(ValueError, match=r"layers='c' .* seen in: a\.1\.attn, a\.10\.attn, b$"):
        selected(capture, ["a", "c"])
    with pytest.raises(ValueError, match="layers=Linear selects no attention call"):
        selected(capture, nn.Linear(1, 1))


# --- maps and rows over all tokens of a stream


def stream_of(*reads: Tensor, spaces: TokenSpaces) -> SimpleNamespace:
    streams = TokenStreams(spaces)
    meetings = [streams.meet(ids, ids) for ids in reads]
    streams.close([("attention", ids) for ids in reads])
    return SimpleNamespace(streams=streams, spaces=spaces, stream_pair=meetings[-1])


def record_of(tokens: Tensor, examples: list[int], keys: Tensor | None = None):
    return SimpleNamespace(
        index=0, query_stream="x", query_tokens=tokens,
        key_tokens=tokens if keys is None else keys,
        query_ancestors=frozenset[int](), key_ancestors=frozenset[int](),
        examples=torch.tensor(examples), module="attention", module_type="Attention",
    )  # fmt: skip


def dense_in_loops(record, capture, maps: Tensor, examples: int, size: int) -> Tensor:
    result = torch.zeros(examples, size, size, dtype=maps.dtype)
    rows = capture.streams.positions(record.query_tokens)
    columns = capture.streams.positions(record.key_tokens)
    for group, owner in enumerate(record.examples.tolist()):
        for i, row in enumerate(rows[group].tolist()):
            for j, column in enumerate(columns[group].tolist()):
                if row >= 0 and column >= 0:
                    result[owner, row, column] += maps[group, i, j]
    return result


@pytest.mark.parametrize("layout", ["whole", "windows", "mixed", "padded", "other keys"])
def test_maps_over_all_tokens(layout: str) -> None:
    spaces = TokenSpaces()
    ids = spaces.of_input("x", torch.Size([2, 4]))
    record = {
        "whole": record_of(ids, [0, 1]),
        "windows": record_of(ids.view(4, 2), [0, 0, 1, 1]),
        "mixed": record_of(ids[:, [2, 0, 3, 1]].flip(0), [1, 0]),
        "padded": record_of(torch.nn.functional.pad(ids, (1, 1), value=PADDING), [0, 1]),
        "other keys": record_of(ids[:, :1], [0, 1], keys=ids[:, [3, 1]]),
    }[layout]
    capture = stream_of(ids, record.query_tokens, record.key_tokens, spaces=spaces)
    shape = (*record.query_tokens.shape, record.key_tokens.shape[1])
    maps = torch.rand(shape, dtype=torch.float64)
    maps[record.query_tokens == PADDING] = 0  # padding that looks at tokens hands nothing on
    record.stream_pair = capture.stream_pair
    states = RelevanceStates(
        TokenIndexing(capture.streams, 2, maps.new_empty(0)), PropagationOptions()
    )
    states.add_call(indexed(record, capture), maps)
    ours = states.delta("x", frozenset([0]), "x")
    assert ours is not None
    torch.testing.assert_close(ours, dense_in_loops(record, capture, maps, 2, 4))


def test_padding_that_hands_relevance_on_is_refused() -> None:
    spaces = TokenSpaces()
    ids = spaces.of_input("x", torch.Size([2, 2]))
    padded = torch.nn.functional.pad(ids, (0, 1), value=PADDING)
    record = record_of(padded, [0, 1])
    live = torch.tensor([[True, True, False], [False, True, False]])
    check_padding([(record_of(ids, [0, 1]), live[:, :2]), (record, live)])
    live[1, 2] = True
    message = r"^attention \(Attention\): padding stays among the tokens and hands relevance on"
    with pytest.raises(UnsupportedAttentionError, match=message):
        check_padding([(record, live)])


def test_explained_rows_are_those_with_a_gradient_in_any_head() -> None:
    spaces = TokenSpaces()
    ids = spaces.of_input("x", torch.Size([2, 4]))
    record = record_of(ids.view(4, 2), [0, 0, 1, 1])
    capture = stream_of(ids, spaces=spaces)
    gradient = torch.zeros(4, 3, 2, 2)
    gradient[1, 2, 0, 1] = -1e-30  # window 1 of example 0, its first row
    gradient[2, 0, 1, 0] = 5.0
    maps = torch.ones_like(gradient)
    source = Explicit(Operands.of(maps), (0, 1, 2, 3), single_query=False)
    live = source.blocks((maps,), gradient, None).live_rows().view(4, 3, 2).any(1)
    ours = explained_rows(record, live, capture, 2)
    assert ours.tolist() == [[False, False, True, False], [False, True, False, False]]


def test_a_score_that_is_read_at_padding_is_refused() -> None:
    spaces = TokenSpaces()
    ids = spaces.of_input("x", torch.Size([1, 2]))
    padded = torch.nn.functional.pad(ids, (0, 1), value=PADDING)
    capture = stream_of(ids, spaces=spaces)
    live = torch.tensor([[True, False, False]])
    assert explained_rows(record_of(padded, [0]), live, capture, 1).tolist() == [[True, False]]
    live[0, 2] = True
    with pytest.raises(ValueError, match="position of attention that holds padding"):
        explained_rows(record_of(padded, [0]), live, capture, 1)


# --- a score of another precision than attention


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("model", "score"), [("double", "float"), ("float", "double")])
def test_a_score_of_another_precision(model: str, score: str, eager: bool) -> None:
    """A head that works in float64, or hands its scores on in float32."""
    text = tiny_text(eager=eager)
    expected = GenericAttention(text).attribute(sentences(), 1)
    whole = GenericAttention(text).relevance(sentences(), 1).matrix("input_ids", "input_ids")
    getattr(text, model)()
    method = GenericAttention(lambda input_ids: getattr(text(input_ids), score)())
    ours = method.attribute(sentences(), 1)
    assert ours.dtype == getattr(torch, score)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)
    matrix = method.relevance(sentences(), 1).matrix("input_ids", "input_ids")
    torch.testing.assert_close(matrix.double(), whole, rtol=1e-4, atol=1e-6)
