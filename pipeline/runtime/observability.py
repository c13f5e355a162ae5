"""What a stage on a cluster publishes while it runs: Ray metrics, for Prometheus, and a file that `wavemim status` reads.

Both come from the process that runs the stage, and end with it. On a private Ray nothing is published.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Ray exports them with the prefix "ray_". Tags: run, stage; of wavemim_trials also state.
METRICS = {
    "wavemim_progress": "Finished share of the stage's work, 0 to 1",
    "wavemim_seconds_left": "Expected seconds until the stage's work is finished",
    "wavemim_images_per_second": "Images per second of the whole stage",
    "wavemim_loss": "Training loss",
    "wavemim_data_wait_share": "Share of the time that training waited for data, 0 to 1",
    "wavemim_checkpoint_age_seconds": "Seconds since the last checkpoint, or since training began",
    "wavemim_rejected_images": "Images that could not be decoded",
    "wavemim_trials": "Trials of a sweep, by state",
}
PAUSE = 2.0  # seconds between two values that are published
_TAGS = ("run", "stage")
_log = logging.getLogger(__name__)


class Publisher:
    """Publishes the numbers of the stage that this process runs; errors are logged once and otherwise ignored."""

    def __init__(self, file: Path, gauge: Callable[..., Any]) -> None:
        """With the arguments of `publishing`."""
        self._file, self._gauge = file, gauge
        self._gauges: dict[str, Any] = {}
        self._turn = threading.Lock()
        self._last = 0.0
        self._begun: tuple[str, float, float] | None = None  # stage, time, and what was done then
        self._failed = False

    def publish(self, run: str, stage: str, done: float, total: float, unit: str, numbers: Mapping[str, float]) -> None:
        """Publish, unless it is less than `PAUSE` seconds since the last time; the last value of a stage always is."""
        now = time.monotonic()
        with self._turn:
            if self._begun is None or self._begun[0] != stage:
                self._begun = (stage, now, done)
            elif now - self._last < PAUSE and done < total:
                return
            self._last = now
            _, since, before = self._begun
            values = dict(numbers)
            values["wavemim_progress"] = done / total if total else 1.0
            if done > before and now > since:
                rate = (done - before) / (now - since)
                values.setdefault("wavemim_seconds_left", (total - done) / rate)
                if unit == "images":
                    values.setdefault("wavemim_images_per_second", rate)
            about = {"run": run, "stage": stage, "done": done, "total": total, "unit": unit, "time": time.time()}
            try:
                self._write({**about, "numbers": values})
                for name, value in values.items():
                    self._set(name, value, {"run": run, "stage": stage})
            except Exception as error:  # no stage fails for what is only shown
                if not self._failed:
                    _log.warning("progress is not published: %s", error)
                self._failed = True

    def _write(self, content: Mapping[str, Any]) -> None:
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(self._file)

    def _set(self, name: str, value: float, tags: dict[str, str]) -> None:
        name, _, state = name.partition(".")
        if name not in self._gauges:
            keys = (*_TAGS, "state") if state else _TAGS
            self._gauges[name] = self._gauge(name, description=METRICS[name], tag_keys=keys)
        self._gauges[name].set(value, {**tags, "state": state} if state else tags)


def file_of(job_id: str) -> str:
    """The name of the file that is written for `wavemim status`, in Ray's log folder on the node of a job's process."""
    return f"wavemim-{job_id}.json"


_current: Publisher | None = None


@contextlib.contextmanager
def publishing(file: Path, gauge: Callable[..., Any]) -> Iterator[None]:
    """Publish while the block runs.

    Args:
        file: Written for `wavemim status`, in a folder that exists; removed at the end.
        gauge: Ray's `ray.util.metrics.Gauge`: this module is also used where Ray is not imported.
    """
    global _current
    before, _current = _current, Publisher(file, gauge)
    try:
        yield
    finally:
        _current = before
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def active() -> bool:
    """Whether numbers are published."""
    return _current is not None


def publish(
    run: str, stage: str, done: float, total: float, unit: str, numbers: Mapping[str, float] | None = None
) -> None:
    """Publish how far a stage is; cheap, and may be called at any time from any thread.

    Args:
        run: Name of the run.
        stage: Name of the stage.
        done: Finished units of its work.
        total: All units.
        unit: Their name in the plural: images, trials or tasks.
        numbers: Further values by names in `METRICS`; those of ``wavemim_trials`` are named ``wavemim_trials.STATE``. The
            rate and the seconds left, if not given, are those since the first call for this stage.
    """
    if _current is not None:
        _current.publish(run, stage, done, total, unit, numbers or {})
