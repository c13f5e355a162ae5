"""Work that is repeated in the background: a function called every few seconds while something else runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self


class Periodic:
    """Calls a function every few seconds in a daemon thread, from `start` to `stop` or for a ``with`` block.

    The function decides which errors it survives: one that it raises ends the thread, as does returning False.
    """

    def __init__(
        self,
        call: Callable[[], object],
        seconds: float | Callable[[], float],
        *,
        name: str,
        at_once: bool = False,
        last: Callable[[], object] | None = None,
        join: float | None = None,
    ) -> None:
        """
        Args:
            call: The work. Returning False ends the thread; any other result is ignored.
            seconds: Pause between two calls; a function is called before every pause.
            name: Of the thread.
            at_once: Whether the first call comes at the start instead of after the first pause.
            last: Called once by the thread before it ends because of `stop`.
            join: How long `stop` waits for the thread, in seconds; None waits until it ends.
        """
        self._call, self._seconds = call, seconds
        self._at_once, self._last, self._join = at_once, last, join
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread after the call in progress, and wait for it for `join` seconds at most."""
        self._stop.set()
        self._thread.join(self._join)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _run(self) -> None:
        if self._at_once and self._call() is False:
            return
        while not self._stop.wait(self._seconds() if callable(self._seconds) else self._seconds):
            if self._call() is False:
                return
        if self._last is not None:
            self._last()
