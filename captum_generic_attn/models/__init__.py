"""Models by name, with their own preprocessing and class names: shipped, of timm, torchvision and
Hugging Face. For the command line and for examples; a model of one's own needs none of this.
"""

from captum_generic_attn.models.classifiers import ImageClassifier, load_classifier
from captum_generic_attn.models.detectors import Detection, Detector, load_detector
from captum_generic_attn.models.dual_encoders import DualEncoder, Scores, Texts, load_dual_encoder

__all__ = [
    "Detection",
    "Detector",
    "DualEncoder",
    "ImageClassifier",
    "Scores",
    "Texts",
    "load_classifier",
    "load_detector",
    "load_dual_encoder",
]
