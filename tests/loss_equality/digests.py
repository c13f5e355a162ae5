"""Digests of weights, and what the last bits of floats depend on."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
from safetensors.torch import load_file


def digest(file: Path) -> str:
    """SHA-256 of the tensors of a safetensors file: their names, kinds, shapes and bytes."""
    found = hashlib.sha256()
    for name, value in sorted(load_file(file).items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Of the files of a checkpoint, by their names without the suffix."""
    return {file.stem: digest(file) for file in sorted(folder.glob("*.safetensors"))}


def fingerprint() -> dict[str, str]:
    """Versions of libraries and the type of the CPU."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        about = {key.strip(): value.strip() for key, value in reversed(lines)}
        cpu = " ".join(about.get(key, "") for key in ("vendor_id", "cpu family", "model", "model name"))
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "libc": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
        "cpu": cpu,
    }
