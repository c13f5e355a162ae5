"""What evidence.py and progressive.py have finished so far, so that the same command resumes an interrupted call."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import BenchmarkError, Child, OutOfTime, in_child


class Journal:
    """Finished results of child processes, kept in a file until all are complete, so that the same command resumes.

    Beside it is a folder for what unfinished runs need: a folder for each, with its last checkpoint.
    """

    def __init__(self, path: Path, minutes: float | None = None, reserve: float = 0.0) -> None:
        """Open or create it.

        Args:
            path: The file.
            minutes: Time limit, from now on; None: none. What would not be finished by then is not begun.
            reserve: Seconds of it that are kept for `pace`.
        """
        self.path, self.work = path, path.with_suffix("")
        self._end = time.monotonic() + 60 * minutes if minutes else math.inf
        self._reserve = reserve
        lines = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # the last line may be incomplete
                lines.append(json.loads(line))
        self._found = {line["task"]: line["result"] for line in lines}
        self._lock = threading.Lock()
        self._running: dict[str, threading.Lock] = {}
        self._longest: dict[str, float] = {}  # seconds for an image or epoch, by function
        self.missing: list[str] = []  # what failed or did not fit into the time
        if lines:
            print(f"reusing {len(lines)} results from {path}; remove it to start over", flush=True)

    def result(
        self,
        function: str,
        label: str,
        threads: int,
        *,
        amount: float = 1,
        work: Path | None = None,
        of: str = "",
        **task: Any,
    ) -> Any | None:
        """Call a function of evidence_training.py in a new process, or return the recorded result; no task runs twice.

        Args:
            function: Its name.
            label: What to call it in messages.
            threads: Threads of the process.
            amount: How much it has to do, to which its time is proportional: images or epochs.
            work: Folder that it is given for unfinished work.
            of: Which run the result is of, if `task` does not say.
            **task: Its arguments.

        Returns:
            What it returns; None if it failed or did not fit into the time, which has then been printed.
        """
        key = self._key(function, of, task)
        with self._lock:
            running = self._running.setdefault(key, threading.Lock())
        with running:
            if key in self._found:
                return self._found[key]
            left = self._end - time.monotonic() - (self._reserve if function != "pace" else 0)
            expected = self._longest.get(function, 0.0) * amount
            if left < max(expected, 1):
                return self._lacks(label, f"skipped: it takes about {expected:.0f} s, {max(left, 0):.0f} s are left")
            began = time.monotonic()
            print(f"{label}: begins", flush=True)
            try:
                found = in_child(
                    f"evidence_training:{function}",
                    Child(
                        threads=threads,
                        say=lambda line: print(f"{label}: {line}", flush=True),
                        time_limit=None if math.isinf(left) else left,
                    ),
                    **task,
                    **({"work": str(work)} if work is not None else {}),
                )
            except (BenchmarkError, OutOfTime) as error:
                return self._lacks(label, str(error))
            took = (time.monotonic() - began) / amount
            with self._lock, self.path.open("a") as file:
                file.write("\n" + json.dumps({"task": key, "result": found}))
                self._longest[function] = max(took, self._longest.get(function, 0.0))
            self._found[key] = found
            return found

    @staticmethod
    def _key(function: str, of: str, task: Mapping[str, Any]) -> str:
        return json.dumps({"function": function, "of": of, **task}, sort_keys=True)

    def knows(self, function: str, *, of: str = "", **task: Any) -> bool:
        """Whether the result is recorded."""
        return self._key(function, of, task) in self._found

    def forget(self, function: str, *, of: str = "", **task: Any) -> None:
        """Have the result computed again."""
        self._found.pop(self._key(function, of, task), None)

    def _lacks(self, label: str, why: str) -> None:
        with self._lock:
            self.missing.append(label)
        print(f"{label}: {why}", flush=True)

    def folder_of(self, **task: Any) -> Path:
        """The folder for a run's unfinished work."""
        return self.work / hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:16]

    def close(self) -> bool:
        """Remove the file and the folder if nothing is missing: everything is in the results. Whether it did."""
        if self.missing:
            print(f"{len(self.missing)} missing; the same command goes on: {', '.join(self.missing)}", flush=True)
            return False
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        return True
