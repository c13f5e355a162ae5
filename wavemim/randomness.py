"""Random numbers as a pure function of (seed, purpose, epoch, row).

Masks, crops and flips drawn here do not depend on the batch size, the number of workers, or earlier draws: a resumed
run, a run on other workers and an uninterrupted run see the same data.
The mixing function is SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

from __future__ import annotations

import zlib

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(seed: int, purpose: str, epoch: int, rows: torch.Tensor, count: int, *, number: int = 0) -> torch.Tensor:
    """Draw uniform random numbers.

    Args:
        seed: Of the run.
        purpose: Distinguishes independent draws for the same image, such as "mask" and "crop".
        epoch: Of training.
        rows: Row numbers (B,) of the images.
        count: Numbers per image.
        number: Of the draw, where there are several for the same image and purpose.

    Returns:
        (B, count), float32 in [0, 1), on the device of `rows`.
    """
    purpose = f"{purpose} {number}" if number else purpose
    base = _mix_int(_mix_int(_mix_int(seed) ^ zlib.crc32(purpose.encode())) ^ epoch)
    lines = _mix(rows.to(torch.int64) ^ _signed(base))
    places = torch.arange(1, count + 1, device=rows.device, dtype=torch.int64) * _signed(_GOLDEN)
    bits = _mix(lines[:, None] + places[None, :])
    return (_shift(bits, 40)).to(torch.float32) * 2.0**-24


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64 as if it were unsigned."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def _mix_int(value: int) -> int:
    mask = 2**64 - 1
    value = (value + _GOLDEN) & mask
    value = ((value ^ (value >> 30)) * _FIRST) & mask
    value = ((value ^ (value >> 27)) * _SECOND) & mask
    return value ^ (value >> 31)
