"""What a person sees of a sweep in MLflow, read from its pages in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow_server import mlflow_server
from tiny_sweeps import RECIPE, peaked, simulate

from pipeline.config.load import with_overrides
from pipeline.config.recipe import Recipe
from pipeline.stages.tune_trial import OBJECTIVE_CURVE, as_objective, searched_values
from pipeline.sweeps.trials import Sweep, trial_name
from pipeline.sweeps.write import write_results
from pipeline.tracking.tracker import Tracker

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
DATASET = {
    "name": "photos",
    "digest": "0123456789abcdef",
    "source": "/data/photos",
    "profile": {"num_rows": 50},
    "columns": {"label": "3 classes"},
}


class Pages(NamedTuple):
    browser: Any
    address: str
    parent: Tracker
    experiment: str
    sweep: Sweep

    def open(self, route: str) -> None:
        self.browser.get("about:blank")  # a change behind the # alone does not load the page anew
        self.browser.get(f"{self.address}/#{route}")

    def until(self, found: Callable[[str], Any], seconds: float = 25) -> Any:
        """What `found` returns of the page's text, once that is true; the test fails with the text if it never is."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            text = self.browser.execute_script("return document.body ? document.body.innerText : ''")
            if value := found(text):
                return value
            time.sleep(0.3)
        if folder := os.environ.get("WAVEMIM_SCREENSHOTS"):
            self.browser.save_screenshot(str(Path(folder) / "failed.png"))
        raise AssertionError(text)

    def shot(self, name: str) -> None:
        """A screenshot, for a person who wants to look at the pages."""
        if folder := os.environ.get("WAVEMIM_SCREENSHOTS"):
            time.sleep(2)
            self.browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def _log_sweep(out: Path, uri: str) -> tuple[Tracker, Sweep]:
    """The runs of a simulated sweep, logged as the stages log theirs; the last trial fails."""
    recipe = Recipe.model_validate(
        {"name": "mini", "out": str(out), "tracking": {"system_metrics": False, "uri": uri, "experiment": "sweep"}}
    )
    sweep = simulate(peaked, searched=3, seeds=2, finalists=1, noise=0.5)
    with Tracker.start(recipe, "tune", log_dir=out / "tune", dataset=DATASET) as parent:
        for trial in sweep.trials:
            point = {"mask.ratio": trial.point["mask.ratio"]}
            with Tracker.start(
                with_overrides(recipe, point),
                "trial",
                parent=parent.handle,
                name=trial_name(trial.number, trial.point, sweep.settings),
                params=searched_values(recipe, trial.point, sweep.settings),
                log_dir=out / f"{trial.number}",
                dataset=DATASET,
            ) as tracker:
                for images, value in ((0, 20.0), *trial.curve):
                    tracker.log({"objective": value, OBJECTIVE_CURVE: value}, images)
                    tracker.log({"train/loss": 100 / value, "train/loss_level2": 50 / value, **trial.cost}, images)
                    if trial is sweep.trials[-1]:
                        tracker.tag("wavemim.reason", "the loss is not a number")
                        tracker.end("FAILED")
                        break
                else:
                    measured = {sweep.objective: trial.objective, "eval/rankme": trial.objective / 2}
                    tracker.log(as_objective(measured, sweep.objective), trial.curve[-1][0])
        parent.log({"tune/best_linear_top1_heldout": 50.0, "eval/a": 1.0, "train/a": 1.0, "cost/flops": 1e12}, 2000)
        written = write_results(out, recipe, sweep)
        pictures = [path.name for path in written.files.values() if path.suffix == ".png"]
        for path in written.files.values():
            parent.artifact(path)
        parent.description(written.description, pictures)
    return parent, sweep


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    out = tmp_path_factory.mktemp("pages")
    parent, sweep = _log_sweep(out, uri := f"sqlite:///{out}/mlflow.db")
    with mlflow_server(out) as address:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1100"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
        try:
            experiment = _client(uri).get_experiment_by_name("sweep").experiment_id
            yield Pages(browser, f"http://{address}", parent, experiment, sweep)
        finally:
            browser.quit()


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def test_the_experiment_opens_on_training_runs_with_their_datasets(pages: Pages) -> None:
    # MLflow 3.17 begins in its mode for language models unless the address says otherwise: see docs/tracking.md.
    pages.open(f"/experiments/{pages.experiment}?workflowType=machine_learning")
    pages.until(lambda _: f"/experiments/{pages.experiment}/runs" in pages.browser.current_url)
    text = pages.until(lambda text: "tune-mini" in text and "photos (0123456" in text and text)
    pages.shot("experiment")
    assert "Model registry" in text and "Judges" not in text  # the menu of model training
    kind = _client(pages.parent.handle.uri).get_experiment(pages.experiment).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"


def test_parallel_coordinates_open_with_the_searched_settings_and_the_objective_last(pages: Pages) -> None:
    client = _client(pages.parent.handle.uri)
    runs = client.search_runs([pages.experiment], f"tags.`mlflow.parentRunId` = '{pages.parent.handle.run_id}'")
    assert [run.info.status for run in runs].count("FAILED") == 1
    ids = json.dumps([run.info.run_id for run in runs])
    pages.open(f"/compare-runs?runs={ids}&experiments=" + json.dumps([pages.experiment]))
    axes = pages.until(lambda _: _axes(pages.browser))
    pages.shot("parallel")
    trial = pages.sweep.trials[0]
    name = trial_name(trial.number, trial.point, pages.sweep.settings)
    pages.until(lambda text: name in " ".join(text.split()))
    assert axes[-1] == "objective"
    assert axes[:-1] == sorted(RECIPE)[:3]  # MLflow opens with three parameters; the others are in the list beside it
    lines = pages.browser.execute_script(
        "return document.querySelector('.js-plotly-plot').data[0].dimensions[0].values"
    )
    assert len(lines) == len(runs)  # also the failed one


def _axes(browser: Any) -> list[str]:
    script = (
        "return [...document.querySelectorAll('.js-plotly-plot')].filter(p => p.data && p.data[0].type === 'parcoords')"
        ".flatMap(p => p.data[0].dimensions.map(d => d.label))"
    )
    return list(browser.execute_script(script))


def test_charts_come_with_costs_after_results(pages: Pages) -> None:
    pages.open(f"/experiments/{pages.experiment}/runs?compareRunsMode=CHART")
    text = pages.until(lambda text: all(f"\n{name}" in text for name in ("eval", "train", "usage")) and text)
    pages.shot("charts")
    assert text.index("\neval") < text.index("\ntrain") < text.index("\nusage")


def test_the_sweeps_page_shows_the_answer_with_its_figures(pages: Pages) -> None:
    pages.open(f"/experiments/{pages.experiment}/runs/{pages.parent.handle.run_id}")
    text = pages.until(lambda text: "Sweep: which?" in text and "difference to the recipe" in text and text)
    assert "|---" not in text  # the table is drawn
    # Figures arrive one by one, in any order.
    script = (
        "return [...document.querySelectorAll('img')].some(i => i.naturalWidth > 200"
        " && i.src.includes('get-artifact') && i.src.includes('sweep.png'))"
    )
    pages.until(lambda _: pages.browser.execute_script(script))
    pages.shot("parent")
