"""Export of an encoder as ONNX, from pixels to features, compared with PyTorch when it is written."""

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
TOLERANCE = 1e-4  # of features, relative to the largest one if that is above 1
_CHECKED = (1, 2, 3)  # batch sizes that are compared; the file takes any


class NormalisedEncoder(nn.Module):
    """An encoder of pixels (B, C, H, W) in [0, 255], with normalisation included."""

    def __init__(self, encoder: nn.Module, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        """Create the module.

        Args:
            encoder: A timm model of normalised images.
            pixel_mean: Mean per channel, of pixels in [0, 255].
            pixel_std: Standard deviation per channel.
        """
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(pixel_mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(pixel_std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features (B, F)."""
        features: torch.Tensor = self.encoder((pixels - self.mean) / self.std)  # type: ignore[operator]
        return features


def missing_packages() -> list[str]:
    """Return the names of the packages needed for ONNX that are not installed."""
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
    """Write an encoder as ``encoder.onnx`` in a folder, completely or not at all.

    Input ``pixels``: float32 (B, C, H, W) in [0, 255] for any B; output ``features`` (B, F). Weights above 2 GB are
    stored in a second file.

    Args:
        folder: The folder to write. An existing one is replaced.
        encoder: A timm model that returns (B, F).
        image_size: H = W, in pixels.
        pixel_mean: Mean per channel, of pixels in [0, 255].
        pixel_std: Standard deviation per channel.
        about: Stored in the file's metadata.

    Returns:
        Shapes, the opset, and the largest difference between onnxruntime and PyTorch on random images.

    Raises:
        ValueError: If the difference is above the tolerance, or the model cannot be exported.
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
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AssertionError,
        ) as error:  # torch.onnx's errors are subclasses of these
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
                "allowed; it is not saved"
            )
        width, largest = expected.shape[1], max(largest, difference)
    return width, largest
