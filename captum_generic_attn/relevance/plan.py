"""Before the backward pass of a score: which calls are used, and which rows are known already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from captum_generic_attn.capture import AttentionRecord, Capture, Reached, reached_by
from captum_generic_attn.relevance.aggregator import OutputRows
from captum_generic_attn.relevance.explained_rows import RowsOption, all_rows, given_rows
from captum_generic_attn.relevance.independence import Compared
from captum_generic_attn.relevance.method import Method
from captum_generic_attn.relevance.output_rows import OutputStream, RowFinder, output_streams
from captum_generic_attn.relevance.selection import check_heads, unused_calls, used_in_state


@dataclass(frozen=True, eq=False)
class Plan:
    """What is decided about a score before its backward pass.

    Attributes:
        reached: the calls that the score depends on.
        outputs: the streams that the score reads directly, by name.
        used: the calls that are used, in execution order.
        unused: why each other call is not.
        final: for each stream the calls of its last state that are used.
        rows: the explained rows that are known, by stream, each with the used calls of its state.
        awaited: the calls whose gradients tell the rows of the other output streams.
        compared: a check that the examples are independent, to be finished by the backward pass.
    """

    reached: Reached
    outputs: Mapping[str, OutputStream]
    used: Sequence[AttentionRecord]
    unused: Mapping[int, str]
    final: Mapping[str, frozenset[int]]
    rows: Mapping[str, Sequence[OutputRows]]
    awaited: Sequence[AttentionRecord]
    compared: Compared | None


def plan(
    capture: Capture, score: Tensor, method: Method, rows: RowsOption, like: Tensor, *,
    earlier: bool,
) -> Plan:  # fmt: skip
    """Decide which calls are used and which rows are explained, as far as that is known.

    Args:
        capture: the forward pass.
        score: `[B]`.
        method: the method, with its options.
        rows: the user's `rows=`.
        like: a tensor of the precision and device of weights.
        earlier: whether to look for explained rows at calls before the last ones in any case.

    Raises:
        ValueError: if an option does not fit, or the score of an example reads another example.
        UnsupportedAttentionError: if the method cannot be applied to these calls.
    """
    examples = len(score)
    reached = reached_by(score, capture.records)
    outputs = output_streams(capture, reached)
    given = given_rows(capture, list(outputs), rows, examples, like)
    finder = RowFinder(capture, score, like, outputs)
    all_alike = method.row_source == "all"
    asked = [] if all_alike else [name for name in outputs if name not in given]
    known = finder.rows_of(asked, earlier=earlier)
    states = {name: [state for _, state in found] for name, found in known.items()}
    unused = unused_calls(capture, reached, method, states)
    used = [record for record in capture.records if record.index not in unused]
    if all_alike:
        given = all_rows(capture, {record.query_stream for record in used}, examples, like)
    everything = frozenset(record.index for record in capture.records)
    final = {
        stream.name: used_in_state(
            used, method, capture.ancestors if stream.name in outputs else everything
        )
        for stream in capture.streams
    }
    # What the user chose is read in the last state.
    known |= {name: [OutputRows(weights, final[name])] for name, weights in given.items()}
    check_heads(used, method)
    return Plan(
        reached, outputs, used, unused, final,
        {
            name: [OutputRows(weights, used_in_state(used, method, state)) for weights, state in of]
            for name, of in known.items()
        },
        [record for name, out in outputs.items() if name not in known for record in out.last],
        finder.compared,
    )  # fmt: skip
