"""A trial's folder where the sweep's out folder is in a store: on whatever node the trial goes on, it has what it wrote."""

import pytest

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError
from pipeline.stages import tune
from pipeline.stages.tune_parts import (
    CHECKPOINTS,
    STOPPED,
    home_of,
    note_stopped,
    remove_checkpoints,
    trial_folder,
    was_stopped,
)
from pipeline.storage import mirror
from pipeline.storage.folder import Folder
from pipeline.storage.object_stores import StorageError
from pipeline.sweeps.ledger import Begun, Ended, Ledger


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Move to another node: what is where the last one had its copies."""

    def move(node):
        monkeypatch.setenv("WAVEMIM_CACHE", str(tmp_path / node))
        return load("small", ["name=sweep", f"out=memory://{tmp_path.name}"])

    return move


def test_a_trial_goes_on_elsewhere_from_its_checkpoint_and_leaves_nothing_on_its_node(on, tmp_path):
    class Killed(BaseException):
        pass

    logs = tmp_path / "of the driver"
    recipe = on("one")
    place = home_of(recipe, 7)

    def killed_trial():
        with trial_folder(recipe, logs, 7) as (folder, _):
            (folder / CHECKPOINTS / "images-000000000010").mkdir(parents=True)
            (folder / CHECKPOINTS / "images-000000000010/state.json").write_text("{}")
            (folder / "metrics.jsonl").write_text("1\n")
            raise Killed

    with pytest.raises(Killed):
        killed_trial()
    recipe = on("two")
    with trial_folder(recipe, logs, 7) as (folder, _):
        assert (folder / CHECKPOINTS / "images-000000000010/state.json").exists()
        (folder / "metrics.jsonl").write_text("1\n2\n")
    assert not folder.exists() and not logs.exists()
    assert place.read("metrics.jsonl") == b"1\n2\n" and place.kind(CHECKPOINTS) == "folder"

    recipe = on("driver")
    assert not was_stopped(folder, place)
    note_stopped(logs, 7, place)
    assert was_stopped(folder, place) and (logs / "0007" / STOPPED).exists()
    remove_checkpoints(logs, 7, place)
    assert place.kind(CHECKPOINTS) is None and place.read("metrics.jsonl") == b"1\n2\n"


def test_a_trial_whose_files_do_not_arrive_is_begun_again(on, tmp_path, monkeypatch):
    recipe = on("one")
    monkeypatch.setattr(mirror, "RETRIES", ())

    def away(*_):
        raise StorageError("the store does not answer")

    def trial():
        with trial_folder(recipe, tmp_path, 1) as (folder, save):
            (folder / "metrics.jsonl").write_text("1\n")
            save()  # a scheduler may end the process now
            assert home_of(recipe, 1).read("metrics.jsonl") == b"1\n"
            (folder / "metrics.jsonl").write_text("1\n2\n")
            monkeypatch.setattr(Folder, "write", away)
            save()

    with pytest.raises(OSError, match=r"not all files of memory://.*does not answer"):  # which Ray is told
        trial()
    assert (recipe.stage_dir("tune") / "trials/0001/metrics.jsonl").exists()


def test_a_trial_of_another_node_costs_what_it_reported(tmp_path):
    told = []
    ledger = Ledger(tmp_path / "trials.jsonl", lambda: told.append(1))
    ledger.add(Begun(1, "search", {}, 0))
    assert tune._spent(ledger, tmp_path, 1).images_seen == 0
    ledger.add(Ended(1, "finished", 1.0, cost={"cost/images_seen": 5.0, "cost/wall_clock_s": 1.0}))
    assert tune._spent(ledger, tmp_path, 1).images_seen == 5
    assert len(told) == 2  # each line is copied to the store at once


def test_population_based_training_needs_a_shared_folder(on):
    recipe = with_overrides(on("one"), {"tune.scheduler": "pbt"})
    with pytest.raises(SettingError, match=r"out=memory://.*tune\.scheduler=pbt copies checkpoints"):
        tune.check(recipe)
