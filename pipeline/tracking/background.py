"""A thread that sends what was logged, so that nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

# Seconds. After a failure MLflow is left alone for a while, doubled with every further one: a dead server costs nothing.
FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 600.0
_BETWEEN = 1.0


class SendingThread:
    """A thread that sends when there is something to send: at most once a second, and seldom while MLflow is away.

    It holds up nobody: a call that hangs is left behind, also at the exit of the process.
    """

    def __init__(self, send: Callable[[bool], bool | None]) -> None:
        """`send(urgent)` says whether all was sent; None: somebody else is sending, try again soon."""
        self._send = send
        self._turn = threading.Condition()
        self._asked = self._done = 0  # lines
        self._failed = 0  # lines that there were when a try failed
        self._urgent = self._closed = False
        self._not_before = 0.0
        self._pause = FIRST_PAUSE
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There is something to send."""
        with self._turn:
            self._asked += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
                self._thread.start()
            self._turn.notify_all()

    def pause(self) -> None:
        """Leave MLflow alone for a while."""
        with self._turn:
            self._not_before = time.monotonic() + FIRST_PAUSE

    def flush(self, seconds: float) -> bool:
        """Send at once; whether that succeeded in `seconds`."""
        until = time.monotonic() + seconds
        with self._turn:
            wanted, self._failed = self._asked, -1
            self._urgent = True
            self._turn.notify_all()
            # A try under way may have begun before the last line: then the next one counts.
            while self._done < wanted and self._failed < wanted and time.monotonic() < until:
                self._turn.wait(until - time.monotonic())
            return self._done >= wanted

    def close(self) -> None:
        """No more lines come: end when all is sent, or when that fails."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    def _run(self) -> None:
        while True:
            with self._turn:
                while not self._due():
                    if self._closed and (self._done >= self._asked or self._not_before > time.monotonic() + _BETWEEN):
                        return
                    left = self._not_before - time.monotonic()
                    self._turn.wait(left if self._done < self._asked and left > 0 else None)
                target, urgent = self._asked, self._urgent
                self._urgent = False
            sent = self._send(urgent)
            with self._turn:
                pause = _BETWEEN
                if sent:
                    self._done, self._pause = target, FIRST_PAUSE
                else:
                    self._failed = target
                    self._urgent = self._urgent and target < self._asked
                if sent is False:
                    pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
                self._not_before = time.monotonic() + pause
                self._turn.notify_all()

    def _due(self) -> bool:
        return self._done < self._asked and (self._urgent or time.monotonic() >= self._not_before)
