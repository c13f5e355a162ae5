"""An encoder as ONNX: pixels in, features out, checked against PyTorch when it is written."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from wavemim.atomic import new_folder

FILE = "encoder.onnx"
INPUT, OUTPUT = "pixels", "features"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of features, relative to the largest where that is above 1
_CHECKED = (1, 2, 3)  # images in a batch: the file takes any number


class NormalisedEncoder(nn.Module):
    """`encoder` on pixels (B, C, H, W) in [0, 255]: the normalisation is part of it."""

    def __init__(self, encoder: nn.Module, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(pixel_mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(pixel_std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (B, F)."""
        features: torch.Tensor = self.encoder((pixels - self.mean) / self.std)  # type: ignore[operator]
        return features


def missing_packages() -> list[str]:
    """Those of the optional packages that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def export_onnx(
    folder: Path,
    encoder: nn.Module,
    *,
    image_size: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `encoder` (a timm model that gives (B, F)) as ``encoder.onnx`` in `folder`, whole or not at all.

    Input ``pixels``: float32 (B, C, H, W) in [0, 255], H = W = `image_size`, any B; output ``features`` (B, F). Weights
    beyond 2 GB lie beside the file. Gives shapes, the opset, and the largest difference between onnxruntime and torch on
    random images. Raises ValueError where that is above the tolerance, or the model cannot be exported.
    """
    missing = missing_packages()
    assert not missing, missing
    model = NormalisedEncoder(encoder, pixel_mean, pixel_std).eval()
    with new_folder(folder) as partial:
        shape = (len(pixel_mean), image_size, image_size)
        opset = _write(partial / FILE, model, shape, about)
        features, difference = _compare(partial / FILE, model, shape)
    return {"input": list(shape), "features": features, "opset": opset, "largest_difference": difference}


def _write(path: Path, model: nn.Module, shape: tuple[int, ...], about: Mapping[str, Any]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model,
                (torch.zeros(2, *shape),),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # of torch.onnx, which have causes
            raise ValueError(f"the encoder cannot be exported to ONNX: {' '.join(str(error).split())[:300]}") from error
    assert program is not None
    program.model.metadata_props["wavemim"] = json.dumps(dict(about))
    program.save(path)
    return int(program.model.opset_imports[""])


def _compare(path: Path, model: nn.Module, shape: tuple[int, ...]) -> tuple[int, float]:
    """Number of features, and the largest difference between onnxruntime and torch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    width, largest = 0, 0.0
    for count in _CHECKED:
        pixels = generator.integers(0, 256, (count, *shape)).astype(np.float32)
        with torch.inference_mode():
            expected = model(torch.from_numpy(pixels)).numpy()
        found = session.run([OUTPUT], {INPUT: pixels})[0]
        difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("nan")
        if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise ValueError(
                f"the ONNX file differs from PyTorch by {difference:.2g} on {count} random images, {TOLERANCE:g} is "
                "allowed; it is not written"
            )
        width, largest = expected.shape[1], max(largest, difference)
    return width, largest
