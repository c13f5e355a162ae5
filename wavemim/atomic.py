"""Files and folders that are written whole or not at all: under another name first, then renamed.

The other name is hidden (it begins with a dot) and ends with ``.partial``, so that whoever lists the folder skips it, and
what a killed process left is recognised.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Write a file that appears at once, in place of the one that may be there.

    Args:
        target: The file; its folder is created if needed.

    Yields:
        The path to write to. It becomes `target` at the end of the block, and is removed if the block raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Fill a folder that appears at once.

    Args:
        target: The folder; the one above it is created if needed.
        replace: Whether `target` may exist: it is then removed just before the new one takes its place.

    Yields:
        An empty folder to fill. It becomes `target` at the end of the block, and is removed if the block raises.

    Raises:
        OSError: `target` exists and is not empty, with `replace=False`.
    """
    partial = _partial(target)
    partial.mkdir(parents=True)
    try:
        yield partial
        if replace:
            shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")
