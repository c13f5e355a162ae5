"""Runs stages one after another: first all checks of the settings, then check, run and summary of each stage."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.config.recipe import Recipe
from pipeline.runtime import interrupts
from pipeline.runtime.out_folder import check_nodes, prepare_out
from pipeline.runtime.ray_session import ray_session
from pipeline.tracking.store_uris import check_uri
from pipeline.tracking.tracker import store_uri

WITHOUT_RAY = frozenset({"export"})
# MLflow, which every stage needs as soon as Ray has started, and what draws, which training needs at its end.
_SLOW = ("pipeline.tracking.mlflow_client", "wavemim.figures.reconstruction")
Check = Callable[[Recipe], object]
_LOCAL: set[Check] = set()


class Stage(Protocol):
    """What the module of a stage offers."""

    @property
    def CHECKS(self) -> Sequence[Check]:
        """Checks of the settings only; each raises SettingError."""

    def check(self, recipe: Recipe) -> Any:
        """Check the inputs on disk, before Ray is started; returns what `run` takes as `checked`."""

    def run(self, recipe: Recipe, session: Any, checked: Any, *, progress: bool = True) -> dict[str, Any]:
        """Do the work, or recognise that it is finished already."""

    def summary(self, recipe: Recipe, result: Mapping[str, Any]) -> str:
        """The text that is printed at the end."""


@dataclass
class Outcome:
    """What the stages returned, and how long each of them took."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # "start" is the start of Ray


def local(check: Check) -> Check:
    """Mark a check that looks at this machine: it says nothing about a stage that is to run on another one."""
    _LOCAL.add(check)
    return check


def check_settings(stages: Iterable[Stage], recipe: Recipe, *, elsewhere: bool = False) -> None:
    """Call every check that one of the stages names, once each.

    Args:
        stages: The stages that are going to run.
        recipe: The settings.
        elsewhere: Whether they are going to run on other machines.

    Raises:
        SettingError: The settings cannot be used.
    """
    for check in dict.fromkeys(check for stage in stages for check in stage.CHECKS):
        if not elsewhere or check not in _LOCAL:
            check(recipe)
    check_uri(store_uri(recipe))


def run_stages(
    stages: Mapping[str, Stage], recipe: Recipe, *, progress: bool = True, say: Callable[[str], object] = print
) -> Outcome:
    """Run stages in their order.

    Ray is started after the first stage's inputs have been checked, and shut down before a stage that needs no Ray.

    Args:
        stages: Modules of stages by name, in order.
        recipe: The settings.
        progress: Whether progress bars are shown.
        say: Called with the summary of each stage.

    Returns:
        The results of the stages and their durations.

    Raises:
        SettingError: The settings or the inputs cannot be used.
        StageError: A stage could not finish.
    """
    check_settings(stages.values(), recipe)
    prepare_out(recipe, say)
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        session = None
        for name, stage in stages.items():
            with interrupts.during(name, restarts=recipe.restart):
                began = time.perf_counter()
                checked = stage.check(recipe)
                starting = time.perf_counter()
                if name in WITHOUT_RAY:
                    stack.close()
                    session = None
                elif session is None:
                    threading.Thread(target=_import_ahead, daemon=True).start()
                    session = stack.enter_context(ray_session(recipe.cluster))
                    check_nodes(recipe, session)
                    outcome.seconds["start"] = time.perf_counter() - starting
                    began += outcome.seconds["start"]
                with interrupts.handlers_kept():
                    outcome.results[name] = stage.run(recipe, session, checked, progress=progress)
                outcome.seconds[name] = time.perf_counter() - began
                say(stage.summary(recipe, outcome.results[name]))
    return outcome


def _import_ahead() -> None:
    """Import what is slow to import while Ray starts its processes, which the main thread waits for."""
    with contextlib.suppress(Exception):  # whoever needs it will report it
        for module in _SLOW:
            importlib.import_module(module)
