"""Runs in MLflow, found by what the user gives: an id, a name, or a run's folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.places import is_url
from pipeline.errors import SettingError, StageError
from pipeline.storage.jsonl import JsonLines
from pipeline.storage.object_stores import masked
from pipeline.tracking import mlflow_client as store
from pipeline.tracking import store_uris
from pipeline.tracking.journal import OUTBOX, SendOffset

STAGE, RUN, RECIPE, OUT, PARENT = (
    *("wavemim.stage", "wavemim.run", "wavemim.recipe", "wavemim.out"),
    "mlflow.parentRunId",
)
DEFAULT = Path("wavemim-out") / "mlflow.db"
_SHOWN = 8  # names in a message


@dataclass
class Run:
    """The stages of one run of the pipeline: of each stage the newest run in MLflow."""

    label: str  # for people
    uri: str  # of the store
    stages: dict[str, Any] = field(default_factory=dict)  # stage -> MLflow's run
    notes: list[str] = field(default_factory=list)  # what the user should know, a line each


def find(names: Sequence[str], uri: str | None) -> list[Run]:
    """Find runs. May take long, and raises MLflow's errors too.

    Args:
        names: Ids, names, or folders (OUT/runs/NAME, or that of a stage).
        uri: The store; None for that of a folder, else MLFLOW_TRACKING_URI, else that of the default out folder.

    Returns:
        The runs in this order, with different labels.

    Raises:
        SettingError: A name is unknown or ambiguous, or the store is not known.
        StageError: A folder has not been sent to MLflow.
    """
    folders = {name: folders for name in names if (folders := _folders(name))}
    uris = {name: store_uris.absolute_uri(uri) if uri else _uri_of(found[0]) for name, found in folders.items()}
    elsewhere = _uri_of_names(uri, list(dict.fromkeys(uris.values()))) if len(folders) < len(set(names)) else ""
    clients: dict[str, Any] = {}
    found = []
    for name in dict.fromkeys(names):
        where = uris.get(name, elsewhere)
        client = clients.setdefault(where, None) or store.connect(where, create=False)
        clients[where] = client
        run = _in_folders(client, name, folders[name], where) if name in folders else _named(client, name, where)
        found.append(run)
    _make_labels_differ(found)
    return found


def _folders(name: str) -> list[Path]:
    """The stages' folders, if `name` is the folder of a run or of a stage; none if it may be a name or an id."""
    if is_url(name):
        raise SettingError(
            f"{masked(name)}: compare reads MLflow, not a store; give the run's name, and tracking.uri= of the server "
            "(wavemim sync URL tracking.uri=URI sends a run there)"
        )
    place = Path(name).expanduser()
    if not place.is_dir():
        if os.sep in name or name.startswith("~"):
            raise SettingError(f"{name} is not a folder; give OUT/runs/NAME, a run's name, or a run id of MLflow")
        return []
    place = place.absolute()
    if (place / OUTBOX).is_file():
        return [place]
    found = sorted(path.parent for path in place.glob(f"*/{OUTBOX}"))
    if found:
        return found
    if (place / "runs").is_dir():
        inside = sorted(path.name for path in (place / "runs").iterdir() if path.is_dir())
        raise SettingError(
            f"{name} holds runs; give one or more of them: {_listed([f'{name}/runs/{n}' for n in inside])}"
        )
    if os.sep in name:
        raise SettingError(f"{name} contains no logs of a stage; give OUT/runs/NAME or the folder of a stage in it")
    return []  # a run's name that is also the name of some folder


def _uri_of(folder: Path) -> str:
    return stored_uri(folder, JsonLines(folder / OUTBOX))


def _uri_of_names(uri: str | None, of_folders: Sequence[str]) -> str:
    if uri or (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        return store_uris.absolute_uri(uri)
    if len(of_folders) == 1:
        return of_folders[0]
    if DEFAULT.is_file():
        return store_uris.sqlite_uri(DEFAULT.absolute())
    raise SettingError("the address of MLflow is unknown; give tracking.uri=URI, or folders of runs (OUT/runs/NAME)")


def _in_folders(client: Any, name: str, folders: Sequence[Path], uri: str) -> Run:
    runs = []
    for folder in folders:
        run_id = SendOffset.of(folder).run_id
        if not run_id:
            raise StageError(f"{folder} has not reached MLflow; wavemim sync {name} sends it")
        try:
            runs.append(store.check_run(client, run_id))
        except store.RunGone as gone:
            raise StageError(
                f"{folder}: {gone} in MLflow at {store_uris.without_password(uri)}; name another one with tracking.uri=, or "
                "send it there with wavemim sync"
            ) from None
    return _together(Path(name).expanduser().absolute().name if len(runs) > 1 else _name_of(runs[0]), runs, uri)


def _named(client: Any, name: str, uri: str) -> Run:
    if re.fullmatch("[0-9a-f]{32}", name):
        try:
            run = store.check_run(client, name)
        except store.RunGone as gone:
            raise SettingError(f"{name}: {gone} in MLflow at {store_uris.without_password(uri)}") from None
        return _together(_name_of(run), [run], uri)
    runs: list[Any] = []
    if "'" not in name:
        for key in (f"tags.`{RUN}`", f"tags.`{RECIPE}`", "attributes.run_name"):
            runs = [
                run
                for run in store.find_runs(client, f"{key} = '{name}'")
                if key.startswith("attributes") or PARENT not in run.data.tags
            ]
            if runs:
                break
    if not runs:
        raise SettingError(_unknown(client, name, uri))
    places = sorted({run.data.tags.get(OUT, "") for run in runs})
    if len(places) > 1:
        raise SettingError(
            f"{name}: ambiguous, runs of this name are in {len(places)} out folders ({_listed(places)}); give the folder "
            f"OUT/runs/{name}, or a run id of MLflow: {_listed([run.info.run_id for run in runs])}"
        )
    return _together(name, runs, uri)


def _unknown(client: Any, name: str, uri: str) -> str:
    runs = [run for run in store.find_runs(client, at_most=1000) if PARENT not in run.data.tags]
    known = list(dict.fromkeys(run.data.tags.get(RUN) or run.data.tags.get(RECIPE) or _name_of(run) for run in runs))
    there = f"its runs are {_listed(known)}" if known else "it has no runs"
    return f"{name}: MLflow at {store_uris.without_password(uri)} has no run of this name or id; {there}"


def _together(label: str, runs: Sequence[Any], uri: str) -> Run:
    """Put the runs of stages together. Of several runs of a stage the newest counts: it replaced or resumed the others."""
    found = Run(label, uri)
    for run in sorted(runs, key=lambda run: run.info.start_time, reverse=True):
        stage = run.data.tags.get(STAGE) or _name_of(run)
        if stage in found.stages:
            found.notes.append(f"{label}: {stage} also has an older run, {run.info.run_id}, which is not shown")
        found.stages.setdefault(stage, run)
    trained = found.stages.get("pretrain")
    for stage, run in found.stages.items():
        if trained is not None and stage != "prepare" and run.info.start_time < trained.info.start_time:
            found.notes.append(
                f"{label}: its {stage} is older than its pretrain, so it belongs to an earlier training run"
            )
    if len(found.stages) > 1 and any(RUN not in run.data.tags for run in found.stages.values()):
        found.notes.append(
            f"{label}: logged by an earlier version, without the tag {RUN}; stages were matched by {RECIPE} or by folder"
        )
    return found


def _make_labels_differ(runs: Sequence[Run]) -> None:
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            newest = next(iter(run.stages.values()))
            run.label = f"{run.label} ({newest.info.run_id[:8]})"


def _name_of(run: Any) -> str:
    return str(run.info.run_name or run.info.run_id)


def _listed(words: Sequence[str]) -> str:
    more = f", … ({len(words)})" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def recorded_address(outbox: JsonLines) -> str:
    """The store that the folder's runs go to, with its password masked; "" if the outbox does not say."""
    uris = [entry["uri"] for entry, _ in outbox.read() if entry.get("do") in ("start", "store")]
    return str(uris[-1]) if uris else ""


def stored_uri(folder: Path, outbox: JsonLines) -> str:
    """The store to send a folder to. A password is not in the folder: it must come from the environment.

    Raises:
        SettingError: The folder does not say where the store is, or not its password.
    """
    address = recorded_address(outbox)
    from_outside = os.environ.get("MLFLOW_TRACKING_URI")
    if from_outside:
        from_outside = store_uris.absolute_uri(from_outside)
        if not address or store_uris.without_password(from_outside) == address:
            return from_outside
    if not address or "***" in address:
        raise SettingError(f"{folder} lacks the address of MLflow, or its password; give tracking.uri=")
    return address
