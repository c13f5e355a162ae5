"""Export of an encoder or classifier as a folder that timm loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from wavemim.atomic import new_folder
from wavemim.data_statistics import STD_FLOOR
from wavemim.weights.checkpoint import MODEL, checksum, plain_tensors


def export_timm(
    folder: Path,
    encoder: nn.Module,
    *,
    architecture: str,
    arguments: Mapping[str, Any],
    pixel_mean: list[float],
    pixel_std: list[float],
    about: Mapping[str, Any],
    image_size: int | None = None,
    card: str = "",
    classes: Sequence[str] = (),
    crop_pct: float = 1.0,
) -> dict[str, Any]:
    """Write a timm model in timm's folder format, which is also that of the Hugging Face hub.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it, and so do ``pretrained_cfg_overlay`` with the
    architecture's name and transformers' ``AutoModel`` and ``AutoImageProcessor``.

    Args:
        folder: The folder to write. An existing one is replaced.
        encoder: The timm model.
        architecture: timm's name of it.
        arguments: Arguments of ``timm.create_model`` that build it.
        pixel_mean: Mean per channel, of pixels in [0, 255].
        pixel_std: Standard deviation per channel.
        about: Stored in ``config.json``.
        image_size: Pixels per side in pretraining; needed if `arguments` has no img_size.
        card: The model card, written as ``README.md``.
        classes: Names of a classifier's classes.
        crop_pct: Fraction of the image's side that is evaluated.

    Returns:
        The content of ``config.json``.
    """
    with new_folder(folder) as partial:
        save_file(plain_tensors(encoder.state_dict()), partial / MODEL)
        config = {
            "architecture": architecture.partition(".")[0],  # without the tag of the initial weights
            "num_classes": len(classes),
            "num_features": int(encoder.num_features),  # type: ignore[arg-type]
            "global_pool": arguments.get("global_pool", "avg"),
            # transformers passes num_classes=0 itself; timm reads it from pretrained_cfg
            "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
            "pretrained_cfg": _pretrained_cfg(encoder, arguments, pixel_mean, pixel_std, image_size, classes, crop_pct),
            **({"label_names": list(classes)} if classes else {}),
            "sha256": checksum(partial / MODEL),
            "wavemim": dict(about),
        }
        processor = {key: config[key] for key in ("architecture", "pretrained_cfg")}
        processor |= {"image_processor_type": "TimmWrapperImageProcessor"}  # which gets the transforms from timm
        for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
    return config


def _pretrained_cfg(
    encoder: nn.Module,
    arguments: Mapping[str, Any],
    pixel_mean: list[float],
    pixel_std: list[float],
    image_size: int | None,
    classes: Sequence[str],
    crop_pct: float,
) -> dict[str, Any]:
    """timm's description of the weights: input, preprocessing, and names of layers."""
    size = arguments.get("img_size", image_size)
    assert size is not None, "image_size is needed for a model without a fixed one"
    known: Mapping[str, Any] = encoder.pretrained_cfg  # type: ignore[assignment]
    return {
        "input_size": [int(arguments["in_chans"]), int(size), int(size)],
        "fixed_input_size": "img_size" in arguments,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "mean": [value / 255 for value in pixel_mean],
        "std": [max(value, STD_FLOOR) / 255 for value in pixel_std],
        "num_classes": len(classes),
        "pool_size": None,
        "first_conv": known["first_conv"],
        "classifier": known["classifier"],
    }
