"""The ledger of a sweep: each trial as it begins, measures and ends, one JSON line each, so that nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.sweeps.trials import Fork, Role, State, Trial


@dataclass(frozen=True)
class Begun:
    """A trial as it begins.

    Attributes:
        number: Its number in the sweep, from 1 on.
        role: Why it is run.
        point: Values of the searched settings by dotted key.
        seed: Its seed.
        drawn: What the searcher needs to remember the point after a restart: JSON values.
    """

    number: int
    role: Role
    point: Mapping[str, Any]
    seed: int
    drawn: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """The objective of a trial during its training.

    Attributes:
        number: The trial's number.
        rung: Number of the measurement, from 1 on; 0 is that of the untrained encoder.
        images: Images seen.
        objective: The objective, on the images of a rung, which may be fewer than at the end.
    """

    number: int
    rung: int
    images: int
    objective: float


@dataclass(frozen=True)
class Ended:
    """How a trial ended. Attributes as those of `Trial`."""

    number: int
    state: State
    objective: float | None = None
    reason: str = ""
    curve: tuple[tuple[int, float], ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """What population-based training has decided at a rung. Trials without a fork go on as they are.

    Attributes:
        rung: The rung.
        forks: Trials that go on from the checkpoints of others.
    """

    rung: int
    forks: tuple[Fork, ...] = ()


Entry = Begun | Measured | Ended | Generation
_KINDS = {Begun: "begin", Measured: "rung", Ended: "end", Generation: "generation"}


class Ledger:
    """Trials by number, in memory and in a file to which lines are only added."""

    def __init__(self, path: Path, changed: Callable[[], None] = lambda: None) -> None:
        """Read the file if there is one. A last line that was cut while it was written does not count.

        Args:
            path: The file.
            changed: Called when a line has been written.
        """
        self.path, self._changed = path, changed
        self.begun: dict[int, Begun] = {}
        self.ended: dict[int, Ended] = {}
        self.measured: dict[tuple[int, int], Measured] = {}  # by trial and rung, in the order that they came in
        self.generations: dict[int, Generation] = {}  # by rung
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if "begin" in entry:
                    self._remember(Begun(**entry["begin"]))
                elif "rung" in entry:
                    self._remember(Measured(**entry["rung"]))
                elif "end" in entry:
                    curve = tuple((int(images), float(value)) for images, value in entry["end"].pop("curve"))
                    self._remember(Ended(**entry["end"], curve=curve))
                elif "generation" in entry:
                    forks = tuple(Fork(**fork) for fork in entry["generation"]["forks"])
                    self._remember(Generation(entry["generation"]["rung"], forks))

    def add(self, entry: Entry) -> None:
        """Add a line, which is on the disk when this returns."""
        kind = _KINDS[type(entry)]
        line = json.dumps({kind: asdict(entry)}, sort_keys=True, default=str)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._torn = False
        self._remember(entry)
        self._changed()

    def trials(self) -> list[Trial]:
        """The trials that ended, by number."""
        found = []
        for number, end in sorted(self.ended.items()):
            begin = self.begun[number]
            found.append(
                Trial(
                    number, begin.role, self.point(number), begin.seed, end.state, end.objective, end.reason,
                    end.curve, end.cost, end.metrics, self.forks(number),
                )
            )  # fmt: skip
        return found

    def curve(self, number: int) -> tuple[tuple[int, float], ...]:
        """(images seen, objective) of a trial so far, without its end."""
        found = sorted((one.images, one.objective) for one in self.measured.values() if one.number == number)
        return tuple(found)

    def forks(self, number: int) -> tuple[Fork, ...]:
        """The forks of a trial so far, in their order."""
        made = [fork for one in self.generations.values() for fork in one.forks if fork.number == number]
        return tuple(sorted(made, key=lambda fork: fork.rung))

    def point(self, number: int) -> Mapping[str, Any]:
        """The values of a trial's searched settings as they are now."""
        forks = self.forks(number)
        return forks[-1].point if forks else self.begun[number].point

    def _remember(self, entry: Entry) -> None:
        if isinstance(entry, Begun):
            self.begun[entry.number] = entry
            self.ended.pop(entry.number, None)  # one that begins again has not ended
        elif isinstance(entry, Measured):
            self.measured.setdefault((entry.number, entry.rung), entry)
        elif isinstance(entry, Generation):
            self.generations.setdefault(entry.rung, entry)
        elif entry.number in self.begun:
            self.ended[entry.number] = entry
