"""SaCo: whether differences in relevance match differences in the effect of features.

Perturbation curves use only the ranking of an attribution; SaCo uses its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_generic_attn.captum_api.targets import OutputChoice
from captum_generic_attn.metrics.curves import measured, ranks
from captum_generic_attn.metrics.measures import Measure
from captum_generic_attn.metrics.removal import Attributions, Removal
from captum_generic_attn.progress import bar


def saco(
    forward: Callable[..., Any],
    removal: Removal,
    attributions: Attributions,
    measure: Measure,
    *,
    subsets: int = 10,
    output: OutputChoice = None,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Tensor:
    """The salience-guided faithfulness coefficient of each example.

    The features, ordered by relevance, are split into subsets of equal size, and each subset is
    removed alone. For each pair of subsets, the difference of their relevance counts for the
    attribution if the removal of the more relevant subset changes the measure at least as much, and
    against it otherwise.

    If the features cannot be split equally, relevance and change are taken per feature, since a
    larger subset would have larger sums of both for any attribution. For equal subsets the result
    is the paper's coefficient.

    Args:
        forward: the model; called without gradients.
        removal: the inputs, and how their features are removed. The paper replaces pixels by the
            image's mean: `Pixels(images, baseline=images.mean((2, 3), keepdim=True))`.
        attributions: attributions of these inputs from any method.
        measure: the model's confidence, such as `probability(targets)`.
        subsets: number of subsets; examples with fewer features are split into single features.
        output: which of the model's outputs to measure, as in `GenericAttention`.
        batch_size: the maximum number of examples per forward pass.
        show_progress: whether to show a progress bar over the subsets on stderr.

    Returns:
        `[B]` float64 in −1 … 1; 1 is best, and a random attribution has about 0. A constant
        attribution, which does not distinguish subsets, has 0.

    Raises:
        ValueError: if shapes do not fit, or an attribution or the measure is NaN or infinite.

    Source: algorithm 1 of J. Wu et al., *On the Faithfulness of Vision Transformer Explanations*,
    CVPR 2024 (arXiv 2404.01415); the paper's default is 10 subsets.

    Example:
        >>> from captum_generic_attn.metrics import Tokens
        >>> forward = lambda x: x.sum(1, keepdim=True)
        >>> watch = lambda scores, rows: scores[:, 0]
        >>> tokens = torch.tensor([[3.0, 2.0, 1.0]])
        >>> saco(forward, Tokens([tokens]), tokens, watch).tolist()        # says what is so
        [1.0]
        >>> saco(forward, Tokens([tokens]), -tokens, watch).tolist()       # says the opposite
        [-1.0]
    """
    if subsets < 2:
        raise ValueError(f"subsets={subsets}: it must be at least 2, since pairs are compared")
    relevance, removable = removal.features(attributions), removal.removable
    counts = removable.sum(1, keepdim=True)
    cut = counts.clamp(max=subsets)
    subset = (ranks(relevance, removable) * cut).div(counts.clamp(min=1), rounding_mode="floor")
    subset = subset.masked_fill(~removable, -1)

    with bar("SaCo", subsets + 1, show=show_progress) as advance:
        everything = torch.ones_like(removable)
        clean = measured(forward, removal, everything, measure, output, batch_size)
        advance()
        changes, means = [], []
        for index in range(subsets):
            chosen = subset == index
            size = chosen.sum(1).clamp(min=1)
            left = measured(forward, removal, ~chosen, measure, output, batch_size)
            changes.append((clean - left) / size.cpu())
            means.append((relevance.masked_fill(~chosen, 0).sum(1) / size).cpu())
            advance()
    return coefficient(torch.stack(means, 1), torch.stack(changes, 1), cut[:, 0].cpu())


def coefficient(means: Tensor, changes: Tensor, counts: Tensor | None = None) -> Tensor:
    """SaCo from the relevance and the effect of each subset.

    Args:
        means: `[B, K]`, the mean relevance of the subsets, the most relevant first.
        changes: `[B, K]`, the decrease of the measure without each subset, per feature.
        counts: `[B]`, the number of subsets of each example, of K; `None`: K.

    Returns:
        `[B]` in −1 … 1.

    Example:
        >>> coefficient(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.7, 0.1]])).tolist()
        [0.33...]
    """
    first, second = torch.triu_indices(means.shape[1], means.shape[1], offset=1)
    weight = means[:, first] - means[:, second]
    # Means of equal numbers may differ by rounding.
    weight = weight * (weight.abs() > 1e-12 * means.abs().amax(1, keepdim=True))
    if counts is not None:
        weight = weight * (second < counts[:, None])
    right = changes[:, first] >= changes[:, second]
    signed = torch.where(right, weight, -weight).sum(1)
    total = weight.abs().sum(1)
    return torch.where(total > 0, signed / total.where(total > 0, 1), 0.0)
