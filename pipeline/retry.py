"""Trying again after pauses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence


def attempts(pauses: Sequence[float], wait: Callable[[float], object] = time.sleep) -> Iterator[bool]:
    """Count the attempts at something that may fail: one at once, and one after each pause.

    Leave the loop when an attempt succeeds::

        for last in attempts((1.0, 4.0)):
            try:
                return read()
            except OSError:
                if last:
                    raise

    Args:
        pauses: Seconds before the second, third, … attempt.
        wait: Sleeps for so many seconds; `threading.Event.wait`, for example, may return early.

    Yields:
        Whether this is the last attempt.
    """
    yield not pauses
    for index, pause in enumerate(pauses, start=1):
        wait(pause)
        yield index == len(pauses)
