"""The method: wavelet targets, masks, encoders, decoders, losses, evaluation.

Needs torch, timm, numpy and PyWavelets, and imports no Ray, no MLflow and no pyarrow, so that it runs wherever torch
does. ``import wavemim`` by itself imports none of these either: the names below are loaded when they are first used.

    encoder = wavemim.load_encoder("wavemim-out/runs/small")
    features = encoder.features(["photo.jpg"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wavemim.registry import register_target
    from wavemim.weights.image_encoder import ImageEncoder, load_encoder

__version__ = "0.1.0"

__all__ = ["ImageEncoder", "__version__", "load_encoder", "register_target"]

_HOMES = {
    "ImageEncoder": "wavemim.weights.image_encoder",
    "load_encoder": "wavemim.weights.image_encoder",
    "register_target": "wavemim.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wavemim' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
