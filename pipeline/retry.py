"""Retries with pauses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence


def attempts(pauses: Sequence[float], wait: Callable[[float], object] = time.sleep) -> Iterator[int]:
    """Count the attempts at something that may fail: one immediately, and one after each pause.

    Leave the loop when an attempt succeeds::

        for attempt in attempts(PAUSES):
            try:
                return read()
            except OSError:
                if attempt == len(PAUSES):
                    raise

    Args:
        pauses: Seconds before the second, third, … attempt.
        wait: Sleeps for so many seconds; `threading.Event.wait`, for example, may return early.

    Yields:
        How many attempts came before this one.
    """
    yield 0
    for number, pause in enumerate(pauses, start=1):
        wait(pause)
        yield number
