"""From the trials of the stage `tune` to its files and result."""

from types import SimpleNamespace

import pytest

from pipeline.config.load import load
from pipeline.stages.tune import _write, summary, sweep_table
from pipeline.sweeps.trials import Sweep, Trial

OBJECTIVE = "eval/linear_top1_heldout"


def trial(number, point, objective, reason="", **more):
    state = "failed" if reason else "finished"
    return Trial(number, "search", point, 0, state, None if reason else objective, reason, **more)


class Recorder:
    def __init__(self):
        self.files, self.tags, self.metrics = [], {}, {}
        self.handle = SimpleNamespace(run_id="abc")

    def artifact(self, path):
        self.files.append(path.name)

    def tag(self, key, value):
        self.tags[key] = value

    def description(self, markdown, figures):
        self.note, self.figures = markdown, figures

    def log(self, metrics, step):
        self.metrics |= metrics


@pytest.mark.parametrize(
    "values", [[0.5, 0.6, 0.7], [[1, 2], [3, 4], [1, 2]], [{"3": 6}, None, "a"], [True, False, None]]
)
def test_results_of_any_values_and_a_failed_trial_are_written(tmp_path, values):
    recipe = load("small", [f"out={tmp_path}/o"])
    trials = [
        trial(i, {"mask.ratio": 0.5 + i / 10, "x.y": v}, 30.0 - i, metrics={"images": 100}, cost={"cost/flops": 5e9})
        for i, v in enumerate(values)
    ]
    trials.append(trial(9, {"mask.ratio": 0.9, "x.y": values[0]}, None, "ValueError: a | b"))
    sweep = Sweep(OBJECTIVE, ["mask.ratio", "x.y"], trials)
    tracker = Recorder()
    # best.yaml needs settings that exist: x.y does not
    result = _write(recipe, SimpleNamespace(path=tmp_path), sweep, tracker)
    assert result["best_recipe"] == "not written" and result["verdict"] == "unknown"
    assert result["best"] == {"mask.ratio": 0.5, "x.y": values[0]}
    assert {"trials.csv", "report.md", "sweep.png"} <= set(tracker.files)
    assert "The noise was not measured" in result["answer"][0]
    assert "The noise was not measured" in tracker.note
    assert "sweep.png" in tracker.figures
    assert tracker.metrics == {"tune/best_linear_top1_heldout": 30.0}
    table = sweep_table(result)
    assert table.startswith("- The noise was not measured") and "ValueError" in table
    assert "| #00 " in table and "| #09 " in table  # as in the report and the figures


def test_the_best_trial_of_a_search_becomes_the_recipe(tmp_path):
    recipe = load("small", [f"out={tmp_path}/o"])
    trials = [trial(1, {"mask.ratio": 0.61}, 30.0), trial(2, {"mask.ratio": 0.5}, 20.0)]
    sweep = Sweep(OBJECTIVE, ["mask.ratio"], trials)
    result = _write(recipe, SimpleNamespace(path=tmp_path), sweep, Recorder())
    found = load(result["best_recipe"])
    assert (found.mask.ratio, found.name) == (0.61, "small-tuned")
    assert "# The noise was not measured" in (tmp_path / "best.yaml").read_text()
    said = summary(recipe, {**result, "state": "new"})
    assert said.startswith("- The noise was not measured") and f"report {tmp_path / 'report.md'}, table" in said
