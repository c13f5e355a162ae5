"""Prediction targets: wavelet coefficients, pixels, histograms of oriented gradients, and the Fourier spectrum.

A target of one's own derives from `Target` and is added by `register_target`; `target.kind` of a recipe then names it.
"""

from wavemim.data_statistics import STD_FLOOR, Statistics
from wavemim.registry import known_targets, register_target, target_class
from wavemim.targets.base import Loss, Normalise, Tap, Target
from wavemim.targets.fourier import FourierTarget
from wavemim.targets.hog import HOGTarget
from wavemim.targets.pixels import PixelTarget
from wavemim.targets.wavelet import WaveletTarget

__all__ = [
    "STD_FLOOR",
    "FourierTarget",
    "HOGTarget",
    "Loss",
    "Normalise",
    "PixelTarget",
    "Statistics",
    "Tap",
    "Target",
    "WaveletTarget",
    "known_targets",
    "register_target",
    "target_class",
]
