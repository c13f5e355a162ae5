"""Random numbers for timm's RandAugment that do not depend on how threads take turns.

timm draws from the global generators of Python and numpy. Several threads that augment images share these, with each other
and with the thread that mixes a batch: what each of them draws then depends on their timing, and no run could be repeated
or resumed exactly. Here timm's module is given stand-ins for `random` and `numpy`, by which every thread draws from
generators of its own; `seed_thread` seeds those of the calling one.
"""

from __future__ import annotations

import random
import threading
import zlib
from typing import Any

import numpy as np
from timm.data import auto_augment


class _Generators(threading.local):
    """The generators of a thread."""

    def __init__(self) -> None:
        self.python, self.numpy = random.Random(), np.random.RandomState()


_own = _Generators()


class _Random:
    """Stands for the module `random`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_own.python, name)


class _Numpy:
    """Stands for the module `numpy`, of which `random` is the thread's own."""

    def __getattr__(self, name: str) -> Any:
        return _own.numpy if name == "random" else getattr(np, name)


def seed_thread(*key: object) -> None:
    """Seed what timm's auto_augment draws next in this thread.

    Args:
        *key: Equal keys give equal draws.
    """
    seed = zlib.crc32(" ".join(map(str, key)).encode())
    _own.python.seed(seed)
    _own.numpy.seed(seed)


auto_augment.random = _Random()  # type: ignore[assignment]  # stand-ins for modules
auto_augment.np = _Numpy()  # type: ignore[assignment]
