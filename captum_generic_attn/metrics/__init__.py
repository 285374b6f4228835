"""Metrics of explanations, for the attributions of any Captum method.

Faithfulness (does the model depend on what the explanation highlights?): `perturbation`,
`deletion`, `insertion` and `saco`, each with a `Removal` (`Pixels`, `Tokens`) and a measure
(`accuracy`, `probability`, …). Localisation (does the explanation highlight the annotated
evidence?): `pointing`, `segment`, `detection_scores` with `otsu_masks`, and `token_f1`. Each metric
gives one value per example. `estimate` aggregates the values with a confidence interval, and
`RandomAttribution` gives the chance level.
"""

from captum_generic_attn.metrics.control import RandomAttribution
from captum_generic_attn.metrics.curves import (
    PIXELS,
    TOKENS,
    VISUALBERT_REGIONS,
    Curve,
    deletion,
    insertion,
    joined,
    perturbation,
)
from captum_generic_attn.metrics.detection import (
    Detections,
    DetectionScores,
    Objects,
    detection_scores,
)
from captum_generic_attn.metrics.localization import (
    Segmentation,
    otsu_masks,
    pointing,
    segment,
)
from captum_generic_attn.metrics.measures import (
    Measure,
    accuracy,
    detected,
    probability,
    soft_accuracy,
)
from captum_generic_attn.metrics.rationales import token_f1, token_f1_curve, words_of
from captum_generic_attn.metrics.removal import Pixels, Removal, Tokens, blurred
from captum_generic_attn.metrics.saco import saco
from captum_generic_attn.metrics.statistics import Estimate, estimate, ratio

__all__ = [
    "PIXELS",
    "TOKENS",
    "VISUALBERT_REGIONS",
    "Curve",
    "DetectionScores",
    "Detections",
    "Estimate",
    "Measure",
    "Objects",
    "Pixels",
    "RandomAttribution",
    "Removal",
    "Segmentation",
    "Tokens",
    "accuracy",
    "blurred",
    "deletion",
    "detected",
    "detection_scores",
    "estimate",
    "insertion",
    "joined",
    "otsu_masks",
    "perturbation",
    "pointing",
    "probability",
    "ratio",
    "saco",
    "segment",
    "soft_accuracy",
    "token_f1",
    "token_f1_curve",
    "words_of",
]
