"""The thread that sends the journal, so that logging never waits for MLflow."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable

# Seconds. After a failure MLflow is left alone for FIRST_PAUSE, and twice as long after each further one, so that a server
# that is away costs nothing. These vary by half, so that trials that failed together do not try again together.
FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 600.0
_BETWEEN = 1.0  # between two rounds while all goes well
# A round that took long is followed by a pause this many times as long, up to FIRST_PAUSE: a server that many trials keep
# busy gets fewer and larger batches from each.
_REST = 2.0
_AGAIN = (1.0, 4.0)  # seconds to the next try of a caller that waits for a server that answers


class SendingThread:
    """Sends when there is something to send: at most once a second, and rarely while MLflow is away.

    It starts with the first line. A daemon thread: if a call hangs, neither `flush` nor the end of the process waits for it.
    """

    def __init__(
        self, send: Callable[[bool], bool | None], alive_until: Callable[[], float] = lambda: -math.inf
    ) -> None:
        """
        Args:
            send: Does one round; its argument says whether a caller waits for it. Returns whether everything was sent; None
                if another process is sending, so that it should be tried again soon.
            alive_until: Until when MLflow counts as alive without another answer, by `time.monotonic`.
        """
        self._send, self._alive_until = send, alive_until
        self._turn = threading.Condition()  # guards all that follows
        self._asked = 0  # lines that were logged
        self._done = 0  # of these, lines that were sent
        self._failed = 0  # lines that were logged when a round last failed
        self._urgent = self._closed = False
        self._not_before = 0.0  # time of the next round
        self._pause = FIRST_PAUSE  # after the next failure
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Report that a line was logged; returns immediately."""
        with self._turn:
            self._asked += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
                self._thread.start()
            self._turn.notify_all()

    def pause(self) -> None:
        """Do not send for some time."""
        with self._turn:
            self._not_before = time.monotonic() + FIRST_PAUSE

    def flush(self, seconds: float, most: float | None = None) -> bool:
        """Send at once, and wait for it.

        Args:
            seconds: To wait.
            most: To wait while MLflow is alive, but slow; then what fails is tried again. None: `seconds`.

        Returns:
            Whether all that was logged before the call was sent.
        """
        began = time.monotonic()
        with self._turn:
            wanted, self._failed = self._asked, -1
            self._urgent = True
            self._turn.notify_all()
            # A round in progress may have begun before the last line was logged: then the next one counts.
            while self._done < wanted:
                alive_until = min(self._alive_until(), began + (most or seconds))
                left = max(began + seconds, alive_until) - time.monotonic()
                failed = self._failed >= wanted
                if left <= 0 or (failed and alive_until <= time.monotonic()):
                    break
                if failed:
                    self._turn.wait_for(lambda: self._done >= wanted, min(left, random.uniform(*_AGAIN)))
                    self._failed, self._urgent = -1, True
                    self._turn.notify_all()
                else:
                    self._turn.wait(min(left, 1.0))  # meanwhile MLflow may answer
            return self._done >= wanted

    def close(self) -> None:
        """Report that no more lines follow: the thread ends when all are sent, or when that fails."""
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
            began = time.monotonic()
            sent = self._send(urgent)
            with self._turn:
                pause = min(FIRST_PAUSE, max(_BETWEEN, _REST * (time.monotonic() - began)))
                if sent:
                    self._done, self._pause = target, FIRST_PAUSE
                else:
                    self._failed = target
                    self._urgent = self._urgent and target < self._asked
                if sent is False:
                    pause, self._pause = self._pause * random.uniform(0.5, 1.5), min(2 * self._pause, _LONGEST_PAUSE)
                self._not_before = time.monotonic() + pause
                self._turn.notify_all()

    def _due(self) -> bool:
        return self._done < self._asked and (self._urgent or time.monotonic() >= self._not_before)
