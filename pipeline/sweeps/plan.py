"""The plan of a sweep: which trial is run next, from those that have been run. Knows neither Ray nor MLflow.

A sweep has three parts: the recipe's own settings with several seeds, which measure the noise; the search; and the best
points of the search again, each with fresh seeds, which decide. Every trial is in the ledger before it begins and when it
has ended. After an interruption the same plan goes on: what ended counts, what only began is begun again under its number,
so that it finds its own checkpoints, and the searcher is told what it had drawn. Failed trials stay failed, except those that
ended the sweep: they are begun again, as their cause may be gone.

With population-based training the search is handed out in parts, from rung to rung: a trial ends its part when it has
measured the rung, and its next part is handed out when the generation is decided.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pipeline.sweeps.budget import Limits, fits
from pipeline.sweeps.ledger import Begun, Ended, Ledger, Measured
from pipeline.sweeps.population import Population
from pipeline.sweeps.trials import Trial, point_key


class Draws(Protocol):
    """Draws the points of the search; the results of earlier ones may guide it."""

    def draw(self, number: int) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """Draw the point of a trial: its values, and what `restore` needs. None: there are no more points."""

    def restore(self, number: int, drawn: Mapping[str, Any]) -> None:
        """Remember a point that was drawn before an interruption."""

    def tell(self, number: int, ended: Ended | None) -> None:
        """Take the result of a point, finished, stopped or failed; None if there is none."""


@dataclass(frozen=True)
class Budget:
    """How many trials a sweep has, and what they may use.

    Attributes:
        trials: Points of the search. May be raised after a sweep has ended: it then goes on.
        recipe_seeds: Seeds of the recipe's own settings.
        finalists: Points of the search that are run again.
        fresh_seeds: Fresh seeds of each of them.
        same_reason: The sweep ends when so many trials in a row have failed for the same reason.
        limits: Images and hours. When they are used up no new point is searched; what the recipe's seeds and the finalists
            need is reserved, so that the sweep ends with an answer.
    """

    trials: int
    recipe_seeds: int = 3
    finalists: int = 2
    fresh_seeds: int = 3
    same_reason: int = 3
    limits: Limits = field(default_factory=Limits)


class Plan:
    """Hands out trials until the budget is used up."""

    def __init__(
        self,
        ledger: Ledger,
        draws: Draws,
        budget: Budget,
        *,
        own: Mapping[str, Any],
        seed: int,
        elapsed: Callable[[], float] = lambda: 0.0,
        population: Population | None = None,
    ) -> None:
        """Make the plan, and restore the searcher from the ledger.

        Args:
            ledger: What has been run.
            draws: The searcher.
            budget: How much is run.
            own: The recipe's own values of the searched settings.
            seed: The recipe's seed. The search uses it for all points, so that they differ in the point alone.
            elapsed: Hours that the sweep has taken so far, over all its calls.
            population: How population-based training decides at rungs; None: the trials of the search run to their end.
        """
        self._population = population
        self._elapsed = elapsed
        self.ledger, self.draws, self.budget, self.own, self.seed = ledger, draws, budget, dict(own), seed
        self._out: set[int] = set()  # handed out by this process, and not ended
        self._exhausted = False
        for number in self._ended_the_sweep():
            ledger.add(ledger.begun[number])
        for number, begun in sorted(ledger.begun.items()):
            if begun.role == "search":
                draws.restore(number, begun.drawn)
                if number in ledger.ended:
                    draws.tell(number, ledger.ended[number])

    def next(self) -> Begun | None:
        """The next trial to run; None if there is none now: later, when others have ended, there may be one."""
        if self.failing is not None:
            return None
        self._decide()
        for number, begun in sorted(self.ledger.begun.items()):
            if number not in self.ledger.ended and number not in self._out and not self._waits(number):
                return self._hand_out(replace(begun, point=self.ledger.point(number)))
        new = self._of_recipe() or self._of_search() or self._of_finalists()
        if new is None:
            return None
        self.ledger.add(new)
        return self._hand_out(new)

    def part(self, number: int) -> tuple[int, int | None]:
        """The part of a trial that is handed out next: the rung at which it begins, and the one at which it pauses, or None.

        A trial begins at rung 0. One that is not of a population has one part.
        """
        if self._population is None or self.ledger.begun[number].role != "search":
            return 0, None
        decided = self.ledger.generations
        begin = max((rung for rung in decided if (number, rung) in self.ledger.measured), default=0)
        return begin, begin + 1 if begin + 1 < self._population.rungs else None

    def measure(self, measured: Measured) -> None:
        """A trial has measured the objective during its training. A rung counts once, also of a trial that was resumed."""
        if (measured.number, measured.rung) not in self.ledger.measured:
            self.ledger.add(measured)

    def end(self, ended: Ended) -> None:
        """A trial has ended."""
        self.ledger.add(ended)
        self._out.discard(ended.number)
        if self.ledger.begun[ended.number].role == "search":
            self.draws.tell(ended.number, ended)

    def release(self, number: int) -> None:
        """A trial was interrupted, or has ended a part: it begins again under its number."""
        self._out.discard(number)

    @property
    def done(self) -> bool:
        """Whether every trial has ended and no more will begin."""
        if self.failing is not None:
            return not self._out
        if self.ledger.begun.keys() != self.ledger.ended.keys():
            return False
        return self._of_recipe() is None and self._search_is_over() and self._of_finalists() is None

    @property
    def failing(self) -> str | None:
        """The reason for which the last trials in a row have failed, if they are too many."""
        failed = self._failed_alike()
        return failed[-1].reason if len(failed) >= self.budget.same_reason else None

    @property
    def total(self) -> int:
        """The number of trials of the whole sweep, as far as it is known."""
        return self.budget.recipe_seeds + self.budget.trials + self.budget.finalists * self.budget.fresh_seeds

    def _failed_alike(self) -> list[Trial]:
        """The last trials, as long as they failed for the same reason."""
        trials = self.ledger.trials()
        alike = itertools.takewhile(
            lambda trial: trial.state == "failed" and _kind(trial.reason) == _kind(trials[-1].reason), reversed(trials)
        )
        return list(alike)[::-1]

    def _ended_the_sweep(self) -> list[int]:
        """Numbers of the failed trials that ended an earlier call: too many in a row, or all that there were."""
        trials = self.ledger.trials()
        if self.failing is not None:
            return [trial.number for trial in self._failed_alike()]
        none_left = len(trials) == len(self.ledger.begun) and all(trial.state == "failed" for trial in trials)
        return [trial.number for trial in trials] if none_left else []

    def _waits(self, number: int) -> bool:
        """Whether a trial has measured a rung at which nothing is decided yet."""
        _, pause = self.part(number)
        return pause is not None and (number, pause) in self.ledger.measured

    def _decide(self) -> None:
        """Decide at the rungs that the whole population has measured. Trials that ended, by failing, are out of it."""
        if self._population is None or not self._search_is_over():
            return
        members = [begun.number for begun in self._searched() if begun.number not in self.ledger.ended]
        for rung in range(1, self._population.rungs):
            if rung in self.ledger.generations:
                continue
            if not members or any((number, rung) not in self.ledger.measured for number in members):
                return
            measured = {number: self.ledger.measured[number, rung] for number in members}
            points = {number: self.ledger.point(number) for number in members}
            self.ledger.add(self._population.decide(rung, measured, points))

    def _hand_out(self, begun: Begun) -> Begun:
        self._out.add(begun.number)
        return begun

    def _number(self) -> int:
        return max(self.ledger.begun, default=0) + 1

    def _of_recipe(self) -> Begun | None:
        count = sum(begun.role == "recipe" for begun in self.ledger.begun.values())
        if count >= self.budget.recipe_seeds:
            return None
        return Begun(self._number(), "recipe", self.own, self.seed + count)

    def _searched(self) -> list[Begun]:
        return [begun for begun in self.ledger.begun.values() if begun.role == "search"]

    @property
    def search_ended(self) -> bool:
        """Whether all trials of the search have ended, and no more will begin."""
        return self._search_is_over() and all(begun.number in self.ledger.ended for begun in self._searched())

    def _search_is_over(self) -> bool:
        if self.ledger.generations:
            return True  # a population has one size at all its rungs
        return self._exhausted or len(self._searched()) >= self.budget.trials or not self._affordable()

    def _affordable(self) -> bool:
        """Whether another point of the search is within the limits. What finalists have used has no influence: the search
        does not begin again because they were cheaper than expected."""
        if self.budget.limits == Limits():
            return True
        before = [begun for begun in self.ledger.begun.values() if begun.role != "finalist"]
        ended = [self.ledger.ended[begun.number] for begun in before if begun.number in self.ledger.ended]
        to_come = self.budget.recipe_seeds - sum(begun.role == "recipe" for begun in before)
        to_come += self.budget.finalists * self.budget.fresh_seeds
        running = len(before) - len(ended)
        return fits(self.budget.limits, ended, running=running, to_come=to_come, elapsed=self._elapsed())

    def _of_search(self) -> Begun | None:
        """A new point. One that was drawn before is not run again: its result is told, and it counts as a trial."""
        while not self._search_is_over():
            number = self._number()
            drawn = self.draws.draw(number)
            if drawn is None:
                self._exhausted = True
                return None
            new = Begun(number, "search", drawn[0], self.seed, drawn[1])
            earlier = self._run_before(new)
            if earlier is None:
                return new
            self.ledger.add(new)
            self.ledger.add(Ended(number, "stopped", reason=f"the same point and seed as #{earlier:02d}"))
            self.draws.tell(number, self.ledger.ended.get(earlier))
        return None

    def _run_before(self, new: Begun) -> int | None:
        """Number of the first trial with this point and seed."""
        same = (b.number for b in self.ledger.begun.values() if b.seed == new.seed and _same(b.point, new.point))
        return min(same, default=None)

    def _of_finalists(self) -> Begun | None:
        """A finalist with a seed that it has not had; once all trials of the search have ended."""
        if not self.search_ended:
            return None
        for point in self._best():
            seeds = [b.seed for b in self.ledger.begun.values() if b.role == "finalist" and _same(b.point, point)]
            if len(seeds) < self.budget.fresh_seeds:
                fresh = itertools.count(self.seed + self.budget.recipe_seeds)
                unused = next(seed for seed in fresh if seed not in seeds)
                return Begun(self._number(), "finalist", point, unused)
        return None

    def _best(self) -> list[Mapping[str, Any]]:
        """The best points of the search, without the recipe's own."""
        values: list[Trial] = [
            trial for trial in self.ledger.trials() if trial.role == "search" and trial.value is not None
        ]
        ranked = sorted(values, key=lambda trial: (-(trial.value or 0.0), trial.number))
        found: dict[str, Mapping[str, Any]] = {}
        for trial in ranked:
            if not _same(trial.point, self.own):
                found.setdefault(point_key(trial.point), trial.point)
        return list(found.values())[: self.budget.finalists]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return point_key(one) == point_key(other)


def _kind(reason: str) -> str:
    """A reason without its numbers, such as the step of a loss that is not finite."""
    return re.sub(r"-?\d[\d.,]*(e[+-]?\d+)?", "#", reason)
