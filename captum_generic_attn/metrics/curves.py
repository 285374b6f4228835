"""Perturbation curves: how a model's output changes as relevant parts of its inputs are removed.

`perturbation` is the authors' positive and negative test; `deletion` and `insertion` are the tests
of RISE. A `Removal` defines what is removed, a `Measure` what is measured. The attributions may be
from any method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.captum_api.targets import OutputChoice, choose_output
from captum_generic_attn.metrics.measures import Measure
from captum_generic_attn.metrics.removal import Attributions, Removal
from captum_generic_attn.metrics.statistics import Estimate, estimate
from captum_generic_attn.progress import bar

PIXELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The fractions of pixels that the authors remove from images."""
TOKENS = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""The fractions that the authors remove: words and regions for LXMERT, words for VisualBERT."""
VISUALBERT_REGIONS = (0.0, 0.5, 0.75, 0.95, 0.96, 0.97, 0.98, 0.99, 1.0)
"""The fractions of regions that the authors remove from VisualBERT's inputs."""

_TIES = 2021  # seed of the random order of features with equal relevance


@dataclass(frozen=True, eq=False)
class Curve:
    """The measure of each example at each fraction: `scores` `[F, B]` at F `fractions`."""

    fractions: tuple[float, ...]
    scores: Tensor

    @property
    def means(self) -> Tensor:
        """The mean over the examples at each fraction, `[F]`."""
        return self.scores.mean(1)

    @property
    def areas(self) -> Tensor:
        """The area under each example's curve times 100, `[B]`, by the trapezoidal rule.

        The maximum is 100 times the largest fraction, for instance 90 if that is 0.9.
        """
        places = torch.tensor(self.fractions, dtype=self.scores.dtype, device=self.scores.device)
        return 100 * torch.trapezoid(self.scores, places, dim=0)

    def auc(self, **options: Any) -> Estimate:
        """The area under the mean curve times 100, with its confidence interval.

        Args:
            options: `groups`, `confidence`, `resamples` and `seed`, as in `estimate`.

        Example:
            >>> curve = Curve((0.0, 0.5, 1.0), torch.tensor([[1.0], [0.5], [0.0]]))
            >>> curve.auc().value
            50.0
        """
        return estimate(self.areas, **options)


def joined(curves: Sequence[Curve]) -> Curve:
    """Concatenate the curves of parts of a data set.

    Raises:
        ValueError: if there are none, or their fractions differ.

    Example:
        >>> one = Curve((0.0, 1.0), torch.tensor([[1.0], [0.0]]))
        >>> joined([one, one]).scores.shape
        torch.Size([2, 2])
    """
    fractions = {curve.fractions for curve in curves}
    if len(fractions) != 1:
        raise ValueError(f"curves over {len(fractions)} sets of fractions cannot be joined")
    return Curve(fractions.pop(), torch.cat([curve.scores for curve in curves], 1))


def perturbation(
    forward: Callable[..., Any],
    removal: Removal,
    attributions: Attributions,
    measure: Measure,
    *,
    fractions: Sequence[float] = PIXELS,
    most_relevant_first: bool = True,
    output: OutputChoice = None,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Curve:
    """Measure a model while more and more features are removed.

    The positive test removes the most relevant features first: a good explanation makes the curve
    fall, so less area is better. The negative test removes the least relevant first, so more area
    is better. Features of equal relevance have a random order, which is the same in every call.
    Therefore a constant attribution scores as a random one.

    Args:
        forward: the model; called without gradients on the perturbed inputs from `removal`.
        removal: the inputs, and how their features are removed: `Pixels(...)` or `Tokens(...)`.
        attributions: attributions of these inputs from any method, as `removal.features` takes
            them.
        measure: what is measured, such as `accuracy(targets)`.
        fractions: fractions of the removable features, in 0 … 1, ascending. 0, the unperturbed
            inputs, is always included.
        most_relevant_first: the positive test if true, otherwise the negative test.
        output: which of the model's outputs to measure, as in `GenericAttention`.
        batch_size: the maximum number of examples per forward pass.
        show_progress: whether to show a progress bar over the fractions on stderr.

    Returns:
        A `Curve`; `.auc()` is the area under it.

    Raises:
        ValueError: if shapes do not fit, fractions do not ascend in 0 … 1, or an attribution, the
            model's output or the measure is NaN or infinite.

    Source: section 5 of arXiv 2103.15679; the fractions are those of the authors' code.

    Example:
        >>> from captum_generic_attn.metrics import Tokens, accuracy
        >>> forward = lambda tokens: tokens.sum(1)         # three tokens; the first decides
        >>> tokens = torch.tensor([[[5.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])
        >>> relevance = torch.tensor([[0.9, 0.0, 0.1]])
        >>> curve = perturbation(forward, Tokens([tokens]), relevance, accuracy(0), fractions=[0.4])
        >>> curve.fractions, curve.means.tolist()          # clean, and without the first
        ((0.0, 0.4), [1.0, 0.0])
    """
    steps = _checked(fractions)
    steps = steps if steps[0] == 0 else (0.0, *steps)
    title = "positive perturbation" if most_relevant_first else "negative perturbation"
    return _removing(
        forward, removal, attributions, measure, steps,
        lambda place, count: removal.removed(steps[place], count),
        most_relevant_first=most_relevant_first, output=output, batch_size=batch_size,
        title=title if show_progress else None,
    )  # fmt: skip


def deletion(
    forward: Callable[..., Any],
    removal: Removal,
    attributions: Attributions,
    measure: Measure,
    *,
    steps: int = 20,
    output: OutputChoice = None,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Curve:
    """Measure a model while features are deleted, the most relevant first, until none is left.

    Args:
        forward: as in `perturbation`.
        removal: as in `perturbation`.
        attributions: as in `perturbation`.
        measure: as in `perturbation`; RISE uses `probability(targets)`.
        steps: the number of equal steps from all features to none.
        output: as in `perturbation`.
        batch_size: as in `perturbation`.
        show_progress: as in `perturbation`.

    Returns:
        A `Curve`; less area is better.

    Source: V. Petsiuk, A. Das, K. Saenko, *RISE*, BMVC 2018 (which deletes 1/224 of the pixels per
    step, and reports areas in 0 … 1).

    Example:
        >>> from captum_generic_attn.metrics import Tokens
        >>> removal = Tokens([torch.tensor([[5.0, 1.0]])])
        >>> forward = lambda x: x.sum(1, keepdim=True)
        >>> watch = lambda scores, rows: scores[:, 0] / 6
        >>> deletion(forward, removal, torch.tensor([[2.0, 1.0]]), watch, steps=2).means.tolist()
        [1.0, 0.16..., 0.0]
    """
    return _removing(
        forward, removal, attributions, measure, _even(steps),
        lambda step, count: step * count // steps,
        most_relevant_first=True, output=output, batch_size=batch_size,
        title="deletion" if show_progress else None,
    )  # fmt: skip


def insertion(
    forward: Callable[..., Any],
    removal: Removal,
    attributions: Attributions,
    measure: Measure,
    *,
    steps: int = 20,
    output: OutputChoice = None,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Curve:
    """Measure a model while features are inserted, the most relevant first, until all are present.

    Args:
        forward: as in `perturbation`.
        removal: as in `perturbation`; RISE starts from blurred images: `Pixels(images,
            baseline=blurred(images))`.
        attributions: as in `perturbation`.
        measure: as in `deletion`.
        steps: the number of equal steps from no feature to all.
        output: as in `perturbation`.
        batch_size: as in `perturbation`.
        show_progress: as in `perturbation`.

    Returns:
        A `Curve` over the fractions that are inserted; more area is better.

    Source: as `deletion`.

    Example:
        >>> from captum_generic_attn.metrics import Tokens
        >>> removal = Tokens([torch.tensor([[5.0, 1.0]])])
        >>> forward = lambda x: x.sum(1, keepdim=True)
        >>> watch = lambda scores, rows: scores[:, 0] / 6
        >>> insertion(forward, removal, torch.tensor([[2.0, 1.0]]), watch, steps=2).means.tolist()
        [0.0, 0.83..., 1.0]
    """
    # Inserting the most relevant first is removing the least relevant first in reverse.
    curve = _removing(
        forward, removal, attributions, measure, _even(steps),
        lambda step, count: count - (steps - step) * count // steps,
        most_relevant_first=False, output=output, batch_size=batch_size,
        title="insertion" if show_progress else None,
    )  # fmt: skip
    return Curve(curve.fractions, curve.scores.flip(0))


@torch.no_grad()
def measured(
    forward: Callable[..., Any], removal: Removal, keep: Tensor, measure: Measure,
    output: OutputChoice, batch_size: int,
) -> Tensor:  # fmt: skip
    """The measure of each example when only some features are kept, `[B]` float64 on the CPU.

    Args:
        forward: the model.
        removal: the inputs.
        keep: `[B, N]` bool, the features to keep.
        measure: what is measured.
        output: which of the model's outputs to measure.
        batch_size: the maximum number of examples per forward pass.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it must be at least 1")
    values = torch.full((len(keep),), torch.nan, dtype=torch.float64)
    for rows, inputs in removal.perturbed(keep, batch_size):
        scores = choose_output(forward(*inputs), output)
        found = measure(scores, rows)
        if found.shape != rows.shape:
            raise ValueError(
                f"the measure returned shape {list(found.shape)} for {len(rows)} examples; it must "
                "return one value each"
            )
        # Comparing with NaN would silently give False.
        if bool(scores.isnan().any()) or not bool(found.isfinite().all()):
            raise ValueError(
                f"the model's output or the measure is NaN or infinite for some of the examples "
                f"{rows.tolist()}, with {int(keep[rows].sum(1).min())} or more features kept"
            )
        values[rows.cpu()] = found.double().cpu()
    return values


def ranks(relevance: Tensor, removable: Tensor) -> Tensor:
    """The rank of each feature by descending relevance, `[B, N]`; 0 is the most relevant.

    Features that cannot be removed come last.

    Args:
        relevance: `[B, N]`.
        removable: `[B, N]` bool.

    Raises:
        ValueError: if a relevance is NaN or infinite.

    Example:
        >>> ranks(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([[True, True, False]])).tolist()
        [[1, 0, 2]]
    """
    if not bool(relevance[removable].isfinite().all()):
        raise ValueError("an attribution is NaN or infinite: nothing can be ranked by it")
    value = relevance.masked_fill(~removable, -torch.inf)
    # Shuffle before the stable sort, so that ties are in random order.
    dealt = torch.randperm(value.shape[1], generator=torch.Generator().manual_seed(_TIES))
    dealt = dealt.to(value.device)
    order = dealt[value[:, dealt].argsort(dim=1, descending=True, stable=True)]
    return order.argsort(dim=1)


def _removing(
    forward: Callable[..., Any], removal: Removal, attributions: Attributions, measure: Measure,
    fractions: tuple[float, ...], removed: Callable[[int, int], int], *,
    most_relevant_first: bool, output: OutputChoice, batch_size: int, title: str | None,
) -> Curve:  # fmt: skip
    """The measure at each fraction.

    `removed(step, count)` is the number of features that are removed at a step, of `count`
    features.
    """
    relevance = removal.features(attributions)
    if len(relevance) == 0:
        raise ValueError("there is no example to measure")
    place = ranks(relevance if most_relevant_first else -relevance, removal.removable)
    counts = removal.removable.sum(1).tolist()
    scores = []
    with bar(title or "", len(fractions), show=title is not None) as advance:
        for step in range(len(fractions)):
            gone = [removed(step, count) for count in counts]
            gone_first = place < torch.tensor(gone, device=place.device)[:, None]
            keep = ~(gone_first & removal.removable)
            scores.append(measured(forward, removal, keep, measure, output, batch_size))
            advance()
    return Curve(fractions, torch.stack(scores))


def _even(steps: int) -> tuple[float, ...]:
    if steps < 1:
        raise ValueError(f"steps={steps}: it must be at least 1")
    return tuple(step / steps for step in range(steps + 1))


def _checked(fractions: Sequence[float]) -> tuple[float, ...]:
    steps = tuple(float(fraction) for fraction in fractions)
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0 or steps[-1] > 1:
        raise ValueError(f"fractions must ascend within 0 … 1, not {list(fractions)}")
    return steps
