"""Imports published weights of plain ViTs (in the format of MAE, DeiT or timm) as a folder in timm's format.

MAE (He et al., CVPR 2022) stores ``{"model": {"blocks.N.…": …}}`` with timm's names: pretraining checkpoints also have a
decoder, and models fine-tuned on pooled tokens have ``fc_norm`` instead of ``norm``. The architecture follows from the
shapes, except for the number of heads. Only tensors and plain values are unpickled.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from wavemim import __version__
from wavemim.encoders.pretrained import one_line
from wavemim.weights.checkpoint import checksum
from wavemim.weights.timm_folder import export_timm

# (width, patch): timm's architecture. Other sizes are set by its arguments.
_KNOWN = {
    (192, 16): "vit_tiny_patch16_224",
    (384, 16): "vit_small_patch16_224",
    (768, 16): "vit_base_patch16_224",
    (1024, 16): "vit_large_patch16_224",
    (1280, 14): "vit_huge_patch14_224",
}
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # width: heads, of the published models
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DROPPED = ("decoder_", "mask_token", "head.")  # prefixes of what is not part of the encoder
_WRAPPERS = ("model", "state_dict")  # keys that may hold the weights


def import_vit(
    file: Path,
    folder: Path,
    *,
    heads: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> dict[str, Any]:
    """Write the encoder of a weights file as a folder in timm's format.

    Args:
        file: The weights, .pth or .safetensors.
        folder: The folder to write.
        heads: Attention heads; needed if the width is not that of a published model.
        mean: Mean of pixels in [0, 1] per channel; None: ImageNet's.
        std: Their standard deviation per channel; None: ImageNet's.

    Returns:
        The content of ``config.json``.

    Raises:
        ValueError: If the file cannot be imported, with the reason in one line.
    """
    weights = {key: value for key, value in read_weights(file).items() if not key.startswith(_DROPPED)}
    arguments = _arguments(weights, file, heads)
    channels = arguments["in_chans"]
    mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    if not len(mean) == len(std) == channels:
        raise ValueError(f"{file} takes images of {channels} channels: give as many numbers for --mean and for --std")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"--mean {mean}, --std {std}: all numbers have to be finite, those of --std above 0")
    name = _KNOWN.get((arguments["embed_dim"], arguments["patch_size"]), "vit_base_patch16_224")
    try:
        model = timm.create_model(name, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: timm cannot build a ViT with {arguments}: {one_line(error)}") from None
    _check_same(weights, model.state_dict(), file)
    broken = next((key for key, value in weights.items() if not value.isfinite().all()), None)
    if broken is not None:
        raise ValueError(
            f"{file}: {broken} holds values that are not finite (NaN or infinite): the model's output would not be either"
        )
    model.load_state_dict(weights)
    return export_timm(
        folder,
        model,
        architecture=name,
        arguments=arguments,
        pixel_mean=[255 * value for value in mean],
        pixel_std=[255 * value for value in std],
        about={"version": __version__, "imported": file.name, "imported_sha256": checksum(file)},
    )


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a weights file.

    Args:
        file: A .pth or .safetensors file.

    Returns:
        {name: values}, float32, without the keys and prefixes that training scripts add.

    Raises:
        ValueError: If the file cannot be read as weights.
    """
    if not file.is_file():
        raise ValueError(f"{file}: {'a folder, not a file of weights' if file.is_dir() else 'no such file'}")
    content = load_file(file) if file.suffix == ".safetensors" and _is_safetensors(file) else _unpickled(file)
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        raise ValueError(
            f"{file} does not map names to weights (keys such as blocks.0.norm1.weight, possibly under 'model')"
        )
    other = next((key for key, value in content.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise ValueError(
            f"{file}: '{other}' is {type(content[other]).__name__}, not a tensor: it is not a state dictionary"
        )
    bare = {key.removeprefix("module."): value for key, value in content.items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in bare.items()}


def _is_safetensors(file: Path) -> bool:
    try:
        load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {one_line(error)}") from None
    return True


def _unpickled(file: Path) -> Any:
    # MAE's training stores its command line next to the weights: a Namespace, which holds values and runs no code.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles of other protocols than torch's
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"needs '{found[1]}' to be read" if found else "does not hold only weights"
            raise ValueError(
                f"{file} {what}: files that may run code are not opened; if you trust it, save its "
                "weights by themselves: torch.save(model.state_dict(), FILE)"
            ) from None
        except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
            if not isinstance(error, (RuntimeError, ValueError)):  # the unpickler's own messages, such as "101"
                error = ValueError("it is empty, truncated, or of another format")
            raise ValueError(f"{file} cannot be read as PyTorch weights: {one_line(error)}") from None


def _arguments(weights: Mapping[str, torch.Tensor], file: Path, heads: int | None) -> dict[str, Any]:
    """Arguments of ``timm.create_model``, from the shapes."""
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in weights]
    if missing:
        first = ", ".join(list(weights)[:3]) or "nothing"
        raise ValueError(f"{file} is not a plain ViT: it lacks {', '.join(missing)} and holds {first}, …")
    kernel, positions = weights["patch_embed.proj.weight"], weights["pos_embed"]
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f"{file}: patch_embed.proj.weight is {tuple(kernel.shape)}; needed is (width, channels, p, p)")
    width, channels, patch, _ = kernel.shape
    prefix = int("cls_token" in weights)
    side = math.isqrt(max(positions.shape[1] - prefix, 0)) if positions.ndim == 3 else 0
    if not side or side**2 + prefix != positions.shape[1]:
        raise ValueError(
            f"{file}: pos_embed is {tuple(positions.shape)}; needed is (1, a square number + {prefix}, {width})"
        )
    hidden = weights["blocks.0.mlp.fc1.weight"]
    if hidden.ndim != 2 or not width:
        raise ValueError(f"{file}: blocks.0.mlp.fc1.weight is {tuple(hidden.shape)}; needed is (hidden width, {width})")
    heads = heads or _HEADS.get(width)
    if heads is None or width % heads:
        known = ", ".join(map(str, _HEADS))
        was = f"cannot be inferred from the weights (known widths: {known})" if heads is None else f"cannot be {heads}"
        raise ValueError(f"{file}: the number of heads of a ViT of width {width} {was}; give --heads")
    blocks = {int(found[1]) for key in weights if (found := re.match(r"blocks\.(\d+)\.", key))}
    pooled = "fc_norm.weight" in weights
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": max(blocks) + 1,
        "num_heads": heads,
        "mlp_ratio": hidden.shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "in_chans": channels,
        "num_classes": 0,
        "class_token": bool(prefix),
        "global_pool": "avg" if pooled or not prefix else "token",
        "fc_norm": pooled,
    }


def _check_same(weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], file: Path) -> None:
    """Raise ValueError if names or shapes are not those of timm's ViT."""
    lacking, surplus = [key for key in wanted if key not in weights], [key for key in weights if key not in wanted]
    if lacking or surplus:
        words = [
            f"{verb} {', '.join(keys[:3])}{', …' * (len(keys) > 3)}"
            for verb, keys in (("lacks", lacking), ("has additional", surplus))
            if keys
        ]
        raise ValueError(f"{file} is not a plain ViT of timm: it {' and '.join(words)}")
    for key, value in wanted.items():
        if weights[key].shape != value.shape:
            raise ValueError(f"{file}: {key} is {tuple(weights[key].shape)}; needed is {tuple(value.shape)}")
