"""Is an explanation right on this model? Eight checks that need no second implementation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor

from captum_generic_attn.captum_api.base import ModelAttribution, autograd_enabled
from captum_generic_attn.captum_api.inputs import TargetType
from captum_generic_attn.verification.calls import check_attention, check_heads
from captum_generic_attn.verification.elements import check_elements
from captum_generic_attn.verification.model_state import check_traces, state_of
from captum_generic_attn.verification.report import Check, Verification
from captum_generic_attn.verification.scores import (
    check_conservation,
    check_examples,
    check_rows,
)
from captum_generic_attn.verification.subject import Subject
from captum_generic_attn.verification.tokens import check_tokens


def verify(
    method: ModelAttribution, inputs: Tensor | tuple[Tensor, ...], target: TargetType = None,
    additional_forward_args: object = None, *, samples: int = 3, seed: int = 0,
) -> Verification:  # fmt: skip
    """Check on a model of your own that the maps of a method are right.

    The method runs as in `attribute`. What it assumes of the model is then compared with
    derivatives of the model:

    1. *attention*: probabilities times values are what each call returned.
    2. *tokens*: what a call reads at a position changes only with the tokens that stand there, by
       random vector-Jacobian products. Approximations of the docs that the model uses are listed.
    3. *rows*: the explained rows are those that have a gradient with all other calls held constant.
    4. *elements*: input elements without a gradient in any random probe have no relevance.
    5. *examples*: each score depends on its own example alone (of batches).
    6. *heads*: which calls were taken for heads of one layer, for you to judge.
    7. *conservation*: by how much the relevance of LRP differs from the score, and the operation
       where most of it is lost.
    8. *traces*: the model is left as it was.

    Args:
        method: any method of this package.
        inputs: as in `attribute`. The fifth check needs two examples or more.
        target: as in `attribute`.
        additional_forward_args: as in `attribute`.
        samples: how many random probes each check makes.
        seed: of the random probes; the global random state is left alone.

    Returns:
        A report; `.passed` says whether no check failed, and its `repr` has a line for each.

    Raises:
        TypeError: if `method` is no method of this package.
        ValueError: if `attribute` refuses the model, the inputs or the target.

    Example:
        >>> import timm, torch
        >>> from captum_generic_attn import GenericAttention, verify
        >>> model = timm.create_model("test_vit", num_classes=5).eval()
        >>> report = verify(GenericAttention(model), torch.rand(2, 3, 160, 160), target=1)
        >>> report.passed
        True
        >>> report["attention"].status, report["attention"].samples
        ('passed', 3)
    """
    if not isinstance(method, ModelAttribution):
        raise TypeError(f"verify takes a method of this package, not {type(method).__name__}")
    before = state_of(method.forward_func)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        subject = Subject(method, inputs, target, additional_forward_args, samples, seed)
        checks = list(_checks(subject))
    checks.append(check_traces(before, state_of(method.forward_func)))
    return Verification(method.get_name(), tuple(checks))


def _checks(subject: Subject) -> Iterator[Check]:
    """All checks but that of traces, in order."""
    try:
        found = subject.method.attribute(subject.given, subject.target, subject.more)
    except ValueError as error:
        if "must depend on that example alone" not in str(error):
            raise
        yield Check("examples", "failed", str(error), 1)
        return
    maps = found if isinstance(found, tuple) else (found,)
    with autograd_enabled():
        subject.capture_model()
        yield check_attention(subject)
        yield check_tokens(subject)
        yield check_rows(subject)
        yield check_elements(subject, maps)
        yield check_examples(subject)
        yield check_heads(subject)
    yield check_conservation(subject)
