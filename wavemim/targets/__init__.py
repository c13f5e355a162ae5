"""What each tap is asked for: wavelet coefficients, pixels, histograms of oriented gradients, or the Fourier spectrum."""

from wavemim.data_statistics import STD_FLOOR, Statistics
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
]
