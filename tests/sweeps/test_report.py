"""Names, tables, the report, the Pareto front, the recommended recipe, and writing them all."""

import csv
import dataclasses
import io
import logging
import math

import pytest
import yaml
from PIL import Image
from tiny_sweeps import OBJECTIVE, RECIPE, peaked, simulate

from pipeline.config.load import load, with_overrides
from pipeline.errors import SettingError
from pipeline.sweeps import write
from pipeline.sweeps.answer import answer
from pipeline.sweeps.best import best_recipe
from pipeline.sweeps.importance import Importance
from pipeline.sweeps.pareto import cost_points, pareto_front
from pipeline.sweeps.report import LONGEST_NOTE, description, report, trials_csv, trials_table
from pipeline.sweeps.response import responses
from pipeline.sweeps.trials import Sweep, Trial, relative_weights, short_names, short_value, trial_name
from pipeline.sweeps.write import write_results

AWKWARD = [None, True, False, [1, 2], {"3": 6}, "a|b\n$x$", 3, 0.5, float("inf"), "", [], [None]]


def test_names_of_trials_are_what_varies():
    point = {"target.weights.1": 0.4123, "target.weights.3": 2.1, "mask.ratio": 0.67}
    assert trial_name(7, point) == "#07 w1=0.41 w3=2.1 mask=0.67"
    assert short_names(["encoder.depth", "decoder.depth", "train.lr", "target.taps.3", "target.kind", "seed"]) == {
        "encoder.depth": "encoder.depth", "decoder.depth": "decoder.depth", "train.lr": "lr", "target.taps.3": "tap3",
        "target.kind": "target", "seed": "seed",
    }  # fmt: skip
    assert short_names(["mask.ratio", "mask.kind"]) == {"mask.ratio": "mask.ratio", "mask.kind": "mask.kind"}
    assert trial_name(3, {"decoder.depth": 2}, ["encoder.depth", "decoder.depth"]) == "#03 decoder.depth=2"
    values = (1.5e-4, 150, 150.0, 1e-7, True, None, {"3": 6, "4": 8}, [0.25, 0.5], "x" * 30, 12345.6)
    assert [short_value(value) for value in values] == [
        "0.00015", "150", "150", "1e-07", "true", "null", "{3:6,4:8}", "[0.25,0.5]", "x" * 23 + "…", "12346",
    ]  # fmt: skip
    assert len(trial_name(1, {f"a.b{i}": "y" * 20 for i in range(40)})) == 250


def test_only_the_ratios_of_weights_matter_if_all_of_them_vary():
    recipe = with_overrides(load("small"), {"target.taps": {2: 4, 3: 8}})
    both = ["target.weights.2", "target.weights.3", "mask.ratio"]
    assert relative_weights(recipe, both) == both[:2]
    assert relative_weights(recipe, both[1:]) == []


def test_the_table_and_the_csv_hold_every_trial_and_every_kind_of_value():
    trials = [
        Trial(
            i, "search", {"a.b": value, **({"c.d": i} if i % 2 else {})}, i, "finished", float(i), metrics={"images": 5}
        )
        for i, value in enumerate(AWKWARD)
    ]
    trials.append(Trial(50, "search", {"a.b": 1}, 0, "failed", None, "CUDA out of memory\nat line | 3"))
    trials.append(Trial(51, "search", {"a.b": 1}, 0, "stopped", 99.0, "behind at 1,000 images"))
    trials.append(Trial(52, "search", {"a.b": 1}, 0, "finished", float("nan")))
    sweep = Sweep(OBJECTIVE, ["a.b", "c.d"], trials)
    lines = trials_table(sweep).splitlines()
    assert len(lines) == 2 + len(trials) and all(line.replace("\\|", "").count("|") == 7 for line in lines)
    assert lines[2].split()[1] == "#11"  # the highest that finished; not 99, which was stopped
    assert "stopped at 99.00: behind" in lines[-2] and "failed: CUDA out of memory at line \\| 3" in lines[-1]
    assert trials_table(sweep, 3).endswith("… and 12 more in trials.csv.")
    rows = list(csv.DictReader(io.StringIO(trials_csv(sweep))))
    assert len(rows) == len(trials) and [row["trial"] for row in rows[:2]] == ["11", "10"]
    by_number = {row["trial"]: row for row in rows}
    assert by_number["3"]["a.b"] == "[1, 2]" and by_number["0"]["a.b"] == "null" and by_number["5"]["a.b"] == "a|b\n$x$"
    assert by_number["0"]["c.d"] == "" and by_number["1"]["c.d"] == "1" and by_number["1"]["images"] == "5"
    assert float(by_number["4"][OBJECTIVE]) == 4.0


def test_the_report_begins_with_the_answer():
    sweep = simulate(peaked, searched=40)
    found = answer(sweep)
    curves = responses(sweep, found.resolution)
    shares = Importance({"mask.ratio": 0.6, "train.lr": 0.2}, {"train.lr": 9})
    text = report(sweep, found, curves, shares)
    assert text.startswith(f"# Sweep: which?\n\n- {found.sentences[0]}\n")
    for curve in curves.curves:
        assert f"- {curve.sentence}\n" in text
    for arm in (found.recipe, *found.finalists):
        assert f"{arm.mean:.2f} ({arm.interval[0]:.2f} to {arm.interval[1]:.2f})" in text
    assert (
        "60 %" in text
        and "9 points with this setting" in text
        and "52 trials: 52 finished." in text
        and "PFLOP" in text
    )
    order = [text.index(part) for part in ("does not tell", "## Recipe", "## Settings", "## Trials", "## Cost")]
    assert order == sorted(order)
    many = simulate(peaked, searched=300)
    parts = many, answer(many), responses(many), Importance(note="n")
    assert len(description(*parts)) <= LONGEST_NOTE
    short = report(*parts, longest=3000)
    assert 2800 < len(short) <= 3000 and "more in trials.csv" in short and "## Cost" in short
    assert len(report(*parts, longest=500)) == 500


def with_images(sweep, at_end=2000, during=1000):
    """The sweep, with the numbers of images that its trials were measured on, and curves that end lower than their objective."""
    on = {"objective_images": at_end, "curve_images": during}
    trials = [
        dataclasses.replace(t, metrics={**t.metrics, **on}, curve=[(i, v - 3) for i, v in t.curve])
        for t in sweep.trials
    ]
    return dataclasses.replace(sweep, trials=trials)


def test_the_curves_and_the_objective_at_the_end_are_told_apart(tmp_path, monkeypatch):
    """Would catch: a picture and a table that give the same trial different values without a word."""
    drawn = {}
    monkeypatch.setattr(write, "learning_figure", lambda path, lines, **said: drawn.update(lines=lines, **said))
    recipe = with_overrides(load("small", [f"out={tmp_path}/o"]), {"target.taps": {1: 2, 2: 4, 3: 8}})
    plain = simulate(peaked, searched=3, seeds=1, finalists=1)
    sweep = with_images(plain)
    written = write_results(tmp_path, recipe, sweep)
    assert (drawn["during"], drawn["at_end"]) == ("by a cheaper probe on 1,000 images", "on 2,000 images")
    for line, trial in zip(drawn["lines"], sweep.trials, strict=True):
        assert (line.end, line.name, line.points) == (trial.objective, f"#{trial.number:02d}", trial.curve)
    text = written.files["report.md"].read_text()
    assert "during training, by a cheaper probe on 1,000 images; the objective, by which" in text
    assert "once at the end, on 2,000 images." in text and "on 2,000 images" in written.description
    for row in csv.DictReader(io.StringIO(trials_csv(sweep))):
        assert float(row["curve_end"]) == pytest.approx(float(row[OBJECTIVE]) - 3)
        assert (row["objective_images"], row["curve_images"]) == ("2000", "1000")
    write_results(tmp_path, recipe, plain)  # of an earlier version, whose trials do not have the numbers
    assert (drawn["during"], drawn["at_end"]) == ("by a cheaper probe on fewer images", "on more images")
    assert "cheaper probe on fewer images" in (tmp_path / "report.md").read_text()
    rank = dataclasses.replace(with_images(plain, 24, 24), objective="eval/rankme")
    assert "are both measured on 24 images." in write_results(tmp_path, recipe, rank).description


def test_stopped_trials_do_not_count_for_what_the_objective_is_measured_on():
    stopped = Trial(99, "search", RECIPE, 0, "stopped", 1.0, metrics={"objective_images": 1000, "curve_images": 1000})
    sweep = with_images(simulate(peaked))
    sweep = dataclasses.replace(sweep, trials=[*sweep.trials, stopped])
    assert (sweep.images_of("objective_images"), sweep.images_of("curve_images")) == (2000, 1000)
    text = report(sweep, answer(sweep), responses(sweep, None), Importance(note="n"))
    assert "on 2,000 images. Compare" in text and "The value of a stopped trial is the last point of its curve." in text
    assert simulate(peaked).images_of("objective_images") is None


def test_no_text_has_two_empty_lines(tmp_path):
    sweep = dataclasses.replace(with_images(simulate(peaked)), cost="flops")
    parts = sweep, answer(sweep), responses(sweep, None), Importance(note="")
    for text in (report(*parts, missing={"a.png": "so"}), description(*parts)):
        assert "\n\n\n" not in text and text.endswith("\n") and not text.endswith("\n\n")


def test_the_pareto_front():
    points = [(3, 10), (1, 5), (2, 5), (2, 7), (4, 9), (1, 4), (3, 10)]
    front = pareto_front(points)
    dominated = {i for i, p in enumerate(points) if any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)}
    assert sorted(front) == sorted(set(range(len(points))) - dominated)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)
    sweep = simulate(peaked)
    words, found = cost_points(sweep)
    assert words == "counted FLOPs of a trial"
    best = answer(sweep).finalists[0]
    assert next(p for p in found if p[2] == best.name.split()[0])[1] == pytest.approx(best.mean)  # of fresh seeds only
    assert cost_points(dataclasses.replace(sweep, trials=[dataclasses.replace(t, cost={}) for t in sweep.trials])) == (
        "",
        [],
    )


def test_the_front_is_a_table_where_the_sweep_has_a_cost(tmp_path):
    sweep = simulate(peaked)
    recipe = with_overrides(load("small", [f"out={tmp_path}/o"]), {"target.taps": {1: 2, 2: 4, 3: 8}})
    assert "## Pareto front" not in write_results(tmp_path / "a", recipe, sweep).files["report.md"].read_text()
    trials = [
        dataclasses.replace(t, cost={"cost/flops": 1.0, "cost/wall_clock_s": float(t.number)}) for t in sweep.trials
    ]
    chosen = dataclasses.replace(sweep, trials=trials, cost="seconds")
    words, points = cost_points(chosen)
    assert words == "seconds of a trial"
    text = write_results(tmp_path / "b", recipe, chosen).files["report.md"].read_text()
    rows = text.split("## Pareto front")[1].split("No other point")[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    expected = [points[i] for i in pareto_front(points)]
    assert [(row[0], row[-1]) for row in cells] == [(p[2], f"{p[1]:.2f}") for p in expected] and len(cells) > 1
    assert all(len(row) == len(sweep.settings) + 3 for row in cells)


def test_a_sweep_whose_budget_allowed_no_search_is_written(tmp_path):
    sweep = simulate(peaked, searched=0)
    recipe = with_overrides(load("small", [f"out={tmp_path}/o"]), {"target.taps": {1: 2, 2: 4, 3: 8}})
    written = write_results(tmp_path, recipe, dataclasses.replace(sweep, cost="flops"))
    assert written.answer.chosen == {} and {"report.md", "best.yaml", "trials.csv"} <= set(written.files)


def test_the_recommended_recipe_works_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = load("small", [
        "out=runs", "images=../photos", "tracking.uri=sqlite:///m.db", "train.workers=7", "cluster.address=ray://host:1",
        "cluster.gpus=true", "tune.space=./mine.yaml", "restart=true", "tune.concurrent=3", "train.keep_checkpoints=5",
    ])  # fmt: skip
    text = best_recipe(recipe, {"mask.ratio": 0.61, "target.weights.3": 0.3}, ["first\nline: {x}", "second"])
    assert text.startswith("# first line: {x}\n# second\nname: small-tuned\n")
    (tmp_path / "best.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "there")
    found = load(str(tmp_path / "best.yaml"))
    here = tmp_path / "here"
    assert found.shards == str(here / "runs" / "shards") and found.out == str(here / "runs")
    assert found.tracking.uri == f"sqlite:///{here}/m.db" and found.tune.space == str(here / "mine.yaml")
    assert found.images == str(here / ".." / "photos")
    assert (found.mask.ratio, found.target.weights[3], found.train.keep_checkpoints) == (0.61, 0.3, 5)
    assert found.cluster == load("small").cluster and found.train.workers == 7
    assert not found.restart and found.tune.concurrent is None
    assert best_recipe(load("small", ["shards=s3://b/x"]), {}).startswith("name: small\n")
    assert yaml.safe_load(best_recipe(load("small", ["shards=s3://b/x"]), {}))["shards"] == "s3://b/x"


@pytest.mark.parametrize(
    "uri", ["postgresql://me:hunter2@db/mlflow", "https://u:hunter2@host", "mysql://db/x?user=me&password=hunter2"]
)
def test_no_password_is_in_the_recommended_recipe(uri):
    with pytest.raises(SettingError, match="MLFLOW_TRACKING_URI"):  # already refused when it is given
        load("small", [f"tracking.uri={uri}"])
    text = best_recipe(with_overrides(load("small"), {"tracking.uri": uri}), {"mask.ratio": 0.5})
    assert "hunter2" not in text and text.startswith("# tracking.uri is left out")
    assert yaml.safe_load(text)["tracking"]["uri"] is None
    assert (
        yaml.safe_load(best_recipe(load("small", ["tracking.uri=https://host"]), {}))["tracking"]["uri"]
        == "https://host"
    )


def test_everything_is_written_and_a_failing_figure_costs_one_line(tmp_path, monkeypatch, caplog):
    sweep = simulate(peaked, searched=30)
    recipe = with_overrides(load("small", [f"out={tmp_path}/o"]), {"target.taps": {1: 2, 2: 4, 3: 8}})
    names = {"trials.csv", "report.md", "best.yaml", "sweep.png", "importance.png", "learning_curves.png", "pareto.png"}
    written = write_results(tmp_path / "a", recipe, sweep)
    assert set(written.files) == names and not caplog.records
    assert all(Image.open(path).size[0] > 300 for name, path in written.files.items() if name.endswith(".png"))
    assert load(str(written.files["best.yaml"])).mask.ratio == written.answer.chosen.get(
        "mask.ratio", recipe.mask.ratio
    )
    assert (tmp_path / "a" / "report.md").read_text().startswith("# Sweep: which?")

    seen = []

    def fails(path, *_, **__):
        seen.append({p.name for p in (tmp_path / "b").iterdir()})
        raise ValueError("unhashable\ntype: 'list'")

    for figure in ("response_figure", "pareto_figure"):
        monkeypatch.setattr(write, figure, fails)
    monkeypatch.setattr(write, "importance", fails)
    with caplog.at_level(logging.WARNING):
        written = write_results(tmp_path / "b", recipe, sweep)
    assert set(written.files) == names - {"sweep.png", "pareto.png", "importance.png"}
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and all("\n" not in line and "the results are not affected" in line for line in lines)
    assert {"trials.csv", "best.yaml"} <= seen[0] and "report.md" in seen[1]


def test_any_value_and_any_outcome_can_be_written(tmp_path, caplog):
    for values in (AWKWARD, [[1], [2]] * 8, [{"3": 6}, None] * 8):
        trials = [
            Trial(i, "search", {"mask.x": value, "train.lr": 10.0 ** -(i + 1)}, 0, ("finished", "stopped", "failed")[i % 5 % 3],
                  [None, math.nan, math.inf, 1.0][i % 4] if i % 5 else float(i), curve=[(0, 0.5), (i, math.nan), (5, 1.0 * i)])
            for i, value in enumerate(values)
        ]  # fmt: skip
        sweep = Sweep("eval/rankme", ["mask.x", "train.lr"], trials, log=["train.lr"])
        written = write_results(tmp_path, load("small", [f"out={tmp_path}/o"]), sweep)
        assert {name for name in written.files if name.endswith(".png")} == {"sweep.png", "learning_curves.png"}
        assert written.sentences and "failed" not in caplog.text
    empty = write_results(
        tmp_path / "e", load("small", [f"out={tmp_path}/o"]), Sweep("eval/rankme", ["mask.ratio"], [])
    )
    assert "says nothing" in empty.sentences[0] and set(empty.files) == {"trials.csv", "report.md", "best.yaml"}


def test_figures_with_nothing_to_show_are_not_drawn_and_the_report_says_why(tmp_path):
    """Would catch: an empty picture, one of an earlier call that stays, a figure that is missing without a word."""
    recipe = load("small", [f"out={tmp_path}/o"])
    points = [{"mask.ratio": 0.5 + i / 10} for i in range(3)]
    costs = ([1e9, 1.01e9, 1e9], [1e9, 2e9, 1e9])
    for flops, drawn in zip(costs, (False, True), strict=True):
        trials = [
            Trial(i, "search", points[i], 0, "finished", float(i), curve=[(9, 1.0)], cost={"cost/flops": flops[i]})
            for i in range(3)
        ]
        (tmp_path / "pareto.png").touch()
        written = write_results(tmp_path, recipe, Sweep(OBJECTIVE, ["mask.ratio"], trials))
        said = (tmp_path / "report.md").read_text().splitlines()[-1]
        assert {path.name for path in tmp_path.glob("*.png")} == {"sweep.png", *(["pareto.png"] if drawn else [])}
        assert said.startswith(
            "Not drawn: `importance.png`, since the importance of the settings is not known; `learning_"
        )
        assert "since no trial was measured more than once" in said
        assert ("`pareto.png`, since all points cost about the same." in said) == (not drawn)
        assert set(written.files) == {"trials.csv", "report.md", "best.yaml", *(p.name for p in tmp_path.glob("*.png"))}
    write_results(tmp_path, recipe, Sweep(OBJECTIVE, ["mask.ratio"], trials[:2]))
    assert "`pareto.png`, since fewer than 3 points have a known cost." in (tmp_path / "report.md").read_text()


def test_a_point_that_is_impossible_at_full_length_costs_the_recipe_only(tmp_path, caplog):
    trials = [Trial(1, "search", {"train.warmup_epochs": 9999.0}, 0, "finished", 1.0)]
    with caplog.at_level(logging.WARNING):
        written = write_results(tmp_path, load("small"), Sweep(OBJECTIVE, ["train.warmup_epochs"], trials))
    assert "best.yaml" not in written.files and "report.md" in written.files
    assert "best.yaml was not written" in caplog.text


def test_the_recipe_of_a_simulated_sweep_is_its_own_arm():
    assert answer(simulate(peaked)).recipe.point == RECIPE
