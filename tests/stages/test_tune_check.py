"""What is checked of a search space before its sweep, the spaces that come with the project, and --dry-run."""

import json
from pathlib import Path

import pytest
import tiny_shards
from loss_equality.cases import TWO_LEVELS
from stage_calls import wavemim

from pipeline.config.load import load, names_of, read_yaml, with_overrides
from pipeline.errors import SettingError
from pipeline.stages.tune_check import changes, check_points, check_space, trials_of
from pipeline.stages.tune_plan import dry_run, planned_points, slots_of
from pipeline.stages.tune_space import read_space

SPACES = {
    "level_weights",
    "mask_ratio",
    "level_weights_and_mask_ratio",
    "tilt",
    "taps",
    "targets",
    "decoder",
    "schedule",
}
# What a space depends on: the levels, or the geometry of the encoder.
OTHERS = [
    ("wamim_vit_base", "level_weights"),
    ("wamim_swin_tiny", "level_weights_and_mask_ratio"),
    ("demo", "mask_ratio"),
]


def checked(path, text, *settings):
    path.write_text(text)
    check_space(load(TWO_LEVELS, [*settings, f"tune.space={path}"]))


@pytest.mark.parametrize("name", sorted(SPACES | set(names_of("tune_spaces"))))
def test_every_space_says_what_it_asks_and_is_valid_for_small(name):
    assert name in SPACES, f"{name} is not described in docs/sweeps.md"
    recipe = load("small", [f"tune.space={name}"])
    assert list(read_yaml(name, "tune_spaces", "", "space"))[:2] == ["question", "unit"]
    space = read_space(recipe)
    (question,) = space.questions
    assert question.text.endswith("?") and question.unit
    check_points(recipe, space)
    assert trials_of(recipe, space) <= 8
    assert f"`{name}`" in (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("recipe", "name"), OTHERS)
def test_spaces_apply_to_other_recipes(recipe, name):
    check_space(load(recipe, [f"tune.space={name}"]))


def test_a_space_for_another_encoder_is_refused():
    six = ["encoder.depth=6", "target.taps={3: 4, 4: 6}"]
    with pytest.raises(SettingError, match=r"^tune\.space=taps: .*block 8 does not exist, .* has blocks 1 to 6"):
        check_space(load("small", ["tune.space=taps", *six]))


IMPOSSIBLE = [
    ("mask.ratio: {uniform: [0.4, 1.9]}", "mask.ratio=1.9: input should be less than 1"),
    ("train.batch: {uniform: [32, 64]}", "train.batch=43.84: input should be a valid integer"),
    ("target.kind: {choice: [wavelet, hogg]}", "target.kind=hogg: no target of this name; did you mean 'hog'?"),
    ("train.lr: {grid: [1e-3, fast]}", "train.lr=fast: input should be a valid number"),
    ("target.taps.3: {int: [1, 9]}", "block 9 does not exist, vit_tiny_patch16_224 has blocks 1 to 8"),
    ("target.taps.4: {int: [7, 8]}", "the last block, 8, has no tap"),
    ("decoder.width: {int: [64, 200]}", "decoder.width=114: a decoder of width 114 is not a multiple of its 4"),
    ("target.tilt: {grid: [0, 5]}", "target.tilt=5: must be from -4 to 4"),
    # Only together:
    (
        "decoder.width: {grid: [64, 96]}, decoder.heads: {grid: [4, 16, 64]}, mask.ratio: {uniform: [0.4, 0.9]}",
        "decoder.width=96 with decoder.heads=64 is not possible: decoder.width=96: a decoder of width 96 is not a multiple",
    ),
    (
        "target.weights.3: {uniform: [0, 1]}, target.weights.4: {uniform: [0, 1]}, train.lr: {grid: [1, 2]}",
        "target.weights.3=0 with target.weights.4=0 is not possible: target.weights: the weight of every level is 0",
    ),
    (  # 80 and 5 are possible together, so that both values occur in a point that can be built
        "encoder.width: {grid: [192, 80]}, encoder.heads: {grid: [3, 5]}",
        "encoder.heads=5 is not possible: encoder.name=vit_tiny_patch16_224",
    ),
    (
        "train.epochs: {grid: [1, 4]}, train.warmup_epochs: {grid: [0, 2]}",
        "train.epochs=1 with train.warmup_epochs=2 is not possible: train.warmup_epochs=2: must be less than",
    ),
    (
        "target.kind: {choice: [wavelet, pixels]}, target.tilt: {uniform: [0, 1]}",
        "target.kind=pixels with target.tilt=0 is not possible: target.tilt=0.0: for targets that predict bands",
    ),
]


@pytest.mark.parametrize(("entries", "message"), IMPOSSIBLE)
def test_an_impossible_point_is_refused_with_the_settings_that_cause_it(tmp_path, entries, message):
    with pytest.raises(SettingError) as caught:
        checked(tmp_path / "mine.yaml", f"space: {{{entries}}}")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"tune.space={tmp_path / 'mine.yaml'}: ")
    assert "\n" not in str(caught.value)


def test_a_level_that_a_point_does_not_tap_needs_no_weight(tmp_path):
    text = "space: {target.taps: {grid: [{3: 6, 4: 8}, {4: 8}]}}"
    checked(tmp_path / "mine.yaml", text, "target.weights={3: 0.5}")
    recipe = load("small", ["target.taps={3: 6, 4: 8}", "target.weights={3: 0.5}"])
    weights = [with_overrides(recipe, {"target.taps": taps}).target.weights for taps in ({3: 6, 4: 8}, {4: 8})]
    assert weights == [{3: 0.5}, {}]


def test_conditions_make_a_space_possible(tmp_path):
    checked(
        tmp_path / "mine.yaml",
        "space: {target.kind: {choice: [wavelet, pixels]}, target.tilt: {uniform: [0, 1], when: {target.kind: wavelet}}}",
    )


def test_a_mistake_is_found_among_more_combinations_than_are_tried(tmp_path):
    wide = ", ".join(f"{key}: {{int: [1, 9]}}" for key in ("decoder.depth", "train.accumulate", "mask.count"))
    with pytest.raises(SettingError, match=r"train\.betas=\[2, 0\.9\]|train\.betas.*less than 1"):
        checked(
            tmp_path / "mine.yaml",
            f"space: {{{wide}, target.kind: {{choice: [wavelet, pixels]}}, "
            "train.betas: {choice: [[0.9, 0.95], [2, 0.9]], when: {target.kind: pixels}}}",
        )


def test_the_best_point_has_to_be_a_recipe_of_full_length(tmp_path):
    text = "space: {train.epochs: {grid: [1, 2]}}"  # trials shorten their warm-up, best.yaml has that of the recipe
    checked(tmp_path / "mine.yaml", text, "train.warmup_epochs=0.5")
    with pytest.raises(SettingError, match=r"train\.warmup_epochs=5: must be less than train\.epochs=1"):
        checked(tmp_path / "mine.yaml", text, "train.warmup_epochs=5")


def test_a_grid_needs_as_many_trials_as_it_has_points():
    recipe = load("small", ["tune.space=taps", "tune.trials=7"])
    with pytest.raises(SettingError, match=r"tune\.trials=7: tune\.space=taps is a grid of 8 points.*tune\.trials=8"):
        check_space(recipe)
    more = with_overrides(recipe, {"tune.trials": 20})
    space = read_space(more)
    assert trials_of(more, space) == 8
    assert planned_points(more, space, 8) == space.grid()


def test_random_search_is_planned_and_optuna_is_not():
    random = load("small", ["tune.search=random"])
    space = read_space(random)
    assert planned_points(random, space, 5)[:3] == planned_points(random, space, 3)
    assert planned_points(load("small", ["seed=1", "tune.search=random"]), space, 3) != planned_points(random, space, 3)
    assert planned_points(load("small"), space, 3) is None


def test_trials_change_their_length_and_what_is_searched():
    recipe = load("small")
    assert changes(recipe, {"mask.ratio": 0.5})["train.epochs"] == recipe.tune.epochs
    assert changes(recipe, {"train.epochs": 7})["train.epochs"] == 7
    short = with_overrides(recipe, {"tune.epochs": 0.5})
    assert changes(short, {})["train.warmup_epochs"] == 0.05
    assert changes(short, {"train.warmup_epochs": 0})["train.warmup_epochs"] == 0


@pytest.fixture
def no_ray(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))


def test_dry_run_shows_the_points_of_the_sweep_and_writes_nothing(monkeypatch, capsys, tmp_path, no_ray):
    monkeypatch.chdir(tmp_path)
    arguments = ("tune", "--dry-run", "--space", "level_weights", "--space", "mask_ratio", "tune.search=random")
    code, out, err = wavemim(monkeypatch, capsys, *arguments, "tune.trials=12")
    assert (code, err) == (0, "")
    assert "level_weights: How should the loss be divided among the levels? [share of the sum" in out
    assert "  target.weights: {simplex: [1, 2, 3]}\n  mask.ratio: {uniform: [0.4, 0.9]}\n" in out
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")][2:]
    recipe = load("small", ["tune.space=[level_weights, mask_ratio]", "tune.search=random", "tune.trials=12"])
    points = planned_points(recipe, read_space(recipe), 12)
    assert [[float(cell) for cell in row[1:]] for row in rows] == [list(point.values()) for point in points[:10]]
    assert "budget: 12 trials of the search and 9 of the recipe's seeds and finalists, each of 2 epochs\n" in out
    assert "expected time: unknown, since" in out and "wavemim prepare makes one" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_estimates_the_time_by_timing_or_from_earlier_runs(tmp_path, no_ray):
    tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(30))
    recipe = load(
        "small",
        [
            f"out={tmp_path}",
            "tune.space=mask_ratio",
            "tune.concurrent=2",
            "tune.trials=4",
            "tune.recipe_seeds=0",
            "tune.finalists=0",
        ],
    )
    before = sorted(tmp_path.rglob("*"))
    said = []
    dry_run(recipe, said.append)
    assert (
        "budget: 4 trials of the search and 0 of the recipe's seeds and finalists, each of 2 epochs × 20 images: 160 images"
        in said[0]
    )
    assert "timed in 3 steps of 20 images on one core of this machine" in said[0]
    assert sorted(tmp_path.rglob("*")) == before

    run = tmp_path / "runs" / "other" / "pretrain"
    run.mkdir(parents=True)
    cost = {"cost/wall_clock_s": 1800.0, "cost/worker_hours": 1.0, "cost/flops": 3.6e9}  # two cores: 1 MFLOP/s each
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "metrics": cost}) + "\n")
    dry_run(recipe, said.append)
    assert f"at 1 MFLOP/s, as in the run other in {tmp_path}" in said[1]
    flops = float(said[1].split("images seen, ")[1].split(" GFLOP")[0]) * 1e9
    # Two rounds of two trials, each of which takes a quarter of all FLOPs.
    words = said[1].split("expected time: ")[1].split(" (")[0].split()
    seconds = sum(
        int(n) * {"d": 86400, "h": 3600, "min": 60}[unit] for n, unit in zip(words[::2], words[1::2], strict=True)
    )
    assert seconds == pytest.approx(2 * flops / 4 / 1e6, rel=0.05)


def test_dry_run_says_which_points_optuna_draws_without_results(monkeypatch, capsys, tmp_path, no_ray):
    monkeypatch.chdir(tmp_path)
    code, out, _ = wavemim(monkeypatch, capsys, "tune", "--dry-run", "--space=mask_ratio", "tune.trials=5")
    assert code == 0
    assert "5 trials; the first 4 are drawn at random, the others follow from results and are examples here:" in out
    assert wavemim(monkeypatch, capsys, "tune", "--dry-run", "--space=mask_ratio", "tune.trials=5")[1] == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--space", "tilt", "--space", "mask_ration"],
            "tune.space 'mask_ration' is not known; did you mean 'mask_ratio'?",
        ),
        (["--space", "mask_ratio", "--space", "level_weights_and_mask_ratio"], "mask.ratio is varied by"),
        (["--space", "tilt", "tune.space=tilt"], "--space is the same setting; use one of them"),
        (["--space", "tilt", "--space", "tilt"], "the same search space is given twice"),
        (["--space", "tilt", "target.kind=pixels"], "or its conditions never hold"),
        (["--space", "taps", "tune.trials=2"], "is a grid of 8 points"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_mistakes_in_spaces_end_the_command_with_one_line(
    monkeypatch, capsys, tmp_path, no_ray, arguments, message, dry
):
    monkeypatch.chdir(tmp_path)
    code, out, err = wavemim(monkeypatch, capsys, "tune", *dry, *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["tune.scheduler=asha", "tune.rungs=1"],
            "tune.rungs=1: tune.scheduler=asha compares trials before their end; set",
        ),
        (["tune.scheduler=asha", "tune.cost=flops"], "tune.cost=flops: tune.scheduler=asha would stop cheap trials"),
        (["tune.scheduler=pbt", "tune.rungs=1"], "tune.rungs=1: tune.scheduler=pbt compares trials before their end"),
        (
            ["tune.scheduler=pbt", "tune.cost=flops"],
            "tune.cost=flops: tune.scheduler=pbt would look at their accuracy alone",
        ),
        (["tune.scheduler=pbt", "tune.trials=1"], "tune.trials=1: tune.scheduler=pbt needs a population"),
        (["tune.scheduler=pbt", "tune.quantile=0.6"], "tune.quantile"),
        (
            ["tune.gpu_hours=2", "cluster.gpus=false"],
            "tune.gpu_hours=2: trials do not run on GPUs, so there are no GPU-hours; use tune.hours",
        ),
        (["tune.cost=gpu_hours", "cluster.gpus=false"], "tune.cost=gpu_hours: trials do not run on GPUs"),
        (["tune.gpus_per_trial=1.5"], "tune.gpus_per_trial"),
        (["tune.gpus_per_trial=0"], "tune.gpus_per_trial"),
    ],
)
def test_schedulers_costs_and_fractions_that_make_no_sense_are_refused(monkeypatch, capsys, tmp_path, settings, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = wavemim(monkeypatch, capsys, "tune", "--space", "mask_ratio", *settings)
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_budget_too_small_for_an_answer_is_refused_and_the_others_are_shown(tmp_path, no_ray):
    tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(30))
    recipe = load("small", [f"out={tmp_path}", "tune.space=mask_ratio", "tune.concurrent=1"])
    said = []
    with pytest.raises(SettingError, match=r"tune.images=439: .* set at least tune.images=440"):  # 3 + 2 × 3 + 2 trials
        dry_run(with_overrides(recipe, {"tune.images": 439}), said.append)
    dry_run(with_overrides(recipe, {"tune.images": 480, "tune.scheduler": "asha"}), said.append)
    assert "budget: 3 trials of the search and 9 of the recipe's seeds and finalists" in said[0]
    assert (
        "480 images seen" in said[0] and "tune.images=480: no new point once 480 images are seen or reserved" in said[0]
    )
    assert "asha: after 25 %, 50 % of a trial, those not among the best 1/2 are stopped" in said[0]


@pytest.mark.parametrize(
    ("share", "gpus", "cpus", "expected"),
    [(1, 8, 64, 8), (0.25, 2, 64, 8), (0.4, 2, 64, 4), (0.25, 8, 16, 16), (0.1, 0, 4, 1)],
)
def test_trials_at_a_time_are_as_many_as_gpus_and_cpus_have_room_for(share, gpus, cpus, expected):
    recipe = load("small", [f"tune.gpus_per_trial={share}", "cluster.cpus_per_worker=1"])
    assert slots_of(recipe, True, gpus, cpus) == expected and slots_of(recipe, False, gpus, cpus) == cpus


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (
            "target.taps: {grid: [{3: 2, 4: 8}, {3: 6, 4: 8}]}",
            "and target.taps cannot change there; leave it out, or set",
        ),
        ("mask.ratio: {uniform: [0.4, 0.9]}, decoder.depth: {int: [1, 2]}", "and decoder.depth cannot change there"),
        ("target.kind: {choice: [wavelet, pixels]}", "and target.kind cannot change there"),
        ("train.batch: {grid: [32, 64]}", "and train.batch cannot change there"),
        ("train.epochs: {grid: [2, 4]}", "compares trials of one length, so train.epochs cannot be searched"),
        (
            "train.flip: {choice: [true, false]}, train.lr: {log_uniform: [1e-4, 1e-2], when: {train.flip: true}}",
            "train.lr: when: train.flip: tune.scheduler=pbt changes each setting by itself; leave the condition out",
        ),
    ],
)
def test_a_population_is_refused_where_settings_cannot_change_during_training(
    monkeypatch, capsys, tmp_path, entries, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"space: {{{entries}}}")
    for dry in (["--dry-run"], []):
        arguments = ("tune", "--space", "mine.yaml", "tune.scheduler=pbt", *dry)
        code, out, err = wavemim(monkeypatch, capsys, *arguments)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1
        assert "tune.space=mine.yaml: " in err
        assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    check_space(load("small", [f"tune.space={tmp_path}/mine.yaml"]))


@pytest.mark.parametrize("name", ["level_weights", "mask_ratio", "level_weights_and_mask_ratio", "tilt"])
def test_spaces_of_weights_tilt_and_mask_suit_a_population(name):
    check_space(load("small", [f"tune.space={name}", "tune.scheduler=pbt"]))


def test_dry_run_says_what_a_population_does(tmp_path, no_ray):
    tiny_shards.write_set(tmp_path / "shards", tiny_shards.photos(30))
    small = [f"out={tmp_path}", "tune.space=mask_ratio", "tune.scheduler=pbt", "tune.trials=6", "train.batch=10"]
    recipe = load("small", [*small, "tune.concurrent=4"])
    run = tmp_path / "runs" / "other" / "pretrain"  # so that no steps are timed
    run.mkdir(parents=True)
    cost = {"cost/wall_clock_s": 1800.0, "cost/worker_hours": 1.0, "cost/flops": 3.6e9}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "metrics": cost}) + "\n")
    said = []
    dry_run(recipe, said.append)
    assert "6 trials; a population that begins at points drawn at random:" in said[0]
    assert "budget: 6 trials of the search and 9 of the recipe's seeds and finalists" in said[0]
    assert (
        "pbt: after 25 %, 50 %, 75 % of a trial, the worst 2 of 6 go on from checkpoints of the best 2 with" in said[0]
    )
    with pytest.raises(
        SettingError, match=r"tune\.rungs=5: a trial has 4 steps of training, and tune\.scheduler=pbt needs"
    ):
        dry_run(with_overrides(recipe, {"tune.rungs": 5}), said.append)
