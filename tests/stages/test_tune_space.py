"""Search spaces: distributions, conditions, joining, grids, and what is refused in a file."""

import json
import math

import numpy as np
import optuna
import pytest
from loss_equality.cases import TWO_LEVELS

from pipeline.config.load import load
from pipeline.errors import SettingError
from pipeline.stages.tune_distributions import Choice, RandomTrial, Range, Simplex, parse, plain, shown
from pipeline.stages.tune_space import read_space, setting_of

SIMPLEX_NAMES = ("a", "b", "c")
optuna.logging.set_verbosity(optuna.logging.WARNING)


def drawn(distribution, count=2000):
    return [distribution.draw(RandomTrial(0, number), "x") for number in range(count)]


def optuna_trials(count, seed=0):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask() for _ in range(count)]


@pytest.fixture
def space_of(tmp_path):
    """The space of one or several files, given as texts of YAML, for `small` with further settings."""

    def made(*texts, settings=()):
        paths = []
        for number, text in enumerate(texts):
            paths.append(tmp_path / f"{'abc'[number]}.yaml")
            paths[-1].write_text(text)
        return read_space(load(TWO_LEVELS, [*settings, f"tune.space={json.dumps([str(path) for path in paths])}"]))

    return made


def test_uniform_numbers_fill_their_range():
    values = np.array(drawn(parse("w", "uniform", [2, 4])))
    assert values.min() >= 2 and values.max() <= 4
    assert np.quantile(values, [0.25, 0.5, 0.75]) == pytest.approx([2.5, 3, 3.5], abs=0.08)


def test_log_uniform_has_a_uniform_logarithm_also_of_numbers_that_yaml_reads_as_text():
    spread = parse("w", "log_uniform", ["1e-4", "1e-2"])
    assert spread == Range(1e-4, 1e-2, log=True)
    values = np.array(drawn(spread))
    assert values.min() >= 1e-4 and values.max() <= 1e-2
    quantiles = np.log10(np.quantile(values, [0.25, 0.5, 0.75]))
    assert quantiles == pytest.approx([-3.5, -3, -2.5], abs=0.08)


def test_whole_numbers_reach_both_ends_and_are_equally_likely():
    values = drawn(parse("w", "int", [1, 4]))
    assert {type(value) for value in values} == {int}
    counts = np.bincount(values)[1:]
    assert len(counts) == 4 and counts.min() > 400


@pytest.mark.parametrize(
    ("kind", "values", "step", "grid"),
    [
        ("uniform", [0.4, 0.9], 0.1, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("log_uniform", [0.1, 0.5], 0.2, [0.1, 0.3, 0.5]),
        ("log_uniform", [64, 256], 64, [64, 128, 192, 256]),
        ("int", [2, 10], 4, [2, 6, 10]),
    ],
)
def test_quantised_numbers_are_on_their_grid_with_a_seed_and_in_optuna(kind, values, step, grid):
    quantised = parse("w", kind, values, step)
    assert sorted(set(drawn(quantised))) == grid
    assert sorted({quantised.draw(trial, "x") for trial in optuna_trials(200)}) == grid
    assert {type(value) for value in drawn(quantised)} == {type(grid[0])}


def test_quantised_log_uniform_prefers_small_numbers():
    values = drawn(parse("w", "log_uniform", [1, 101], 10))
    assert np.mean(np.array(values) <= 11) > 0.55  # 2 of 11 values, log(16)/log(101) of the draws


def test_choices_are_equally_likely_and_keep_their_types():
    choice = parse("w", "choice", [None, True, [0.9, "1e-3"], {0: 0, 1: 1}, "text"])
    values = drawn(choice)
    assert {json.dumps(value) for value in values} == {
        json.dumps(value) for value in (None, True, [0.9, 0.001], {"0": 0, "1": 1}, "text")
    }
    counts = [values.count(value) for value in choice.values]
    assert min(counts) > 300
    assert {json.dumps(choice.draw(trial, "x")) for trial in optuna_trials(60)} == set(map(json.dumps, choice.values))


def test_optuna_knows_the_order_of_a_grid():
    study = optuna.create_study()
    trial = study.ask()
    value = parse("w", "grid", [64, 128, 256]).draw(trial, "x")
    assert trial.params["x"] == [64, 128, 256].index(value)
    assert isinstance(trial.distributions["x"], optuna.distributions.IntDistribution)


def test_a_simplex_is_a_uniform_division_of_one():
    points = np.array([Simplex.draw(RandomTrial(1, number), SIMPLEX_NAMES) for number in range(4000)])
    assert np.abs(points.sum(1) - 1).max() < 1e-12
    assert points.min() >= 0
    # Dirichlet(1, 1, 1): each share has mean 1/3 and distribution function 1 - (1 - x)^2.
    assert points.mean(0) == pytest.approx([1 / 3] * 3, abs=0.02)
    for share in points.T:
        assert np.mean(share <= 0.2) == pytest.approx(1 - 0.8**2, abs=0.03)
    assert np.abs(np.array([Simplex.draw(one, SIMPLEX_NAMES) for one in optuna_trials(500)]).sum(1) - 1).max() < 1e-12


def test_numbers_have_four_digits_and_stay_in_their_range():
    value = Range(0.123456, 0.123457).draw(RandomTrial(0), "x")
    assert 0.123456 <= value <= 0.123457
    assert all(value == float(f"{value:.4g}") for value in drawn(Range(0.0, 1.0), 50))


def test_a_trial_is_a_function_of_seed_and_number():
    def draw(seed, number):
        return Range(0.0, 1.0).draw(RandomTrial(seed, number), "x")

    assert draw(3, 4) == draw(3, 4)
    assert len({draw(0, 0), draw(0, 1), draw(1, 0)}) == 3


def test_values_are_shown_as_yaml_has_them():
    values = (None, True, False, 0, 1, 0.5, 1e-5, "a", [1, None], {"3": 6}, {})
    texts = ["null", "true", "false", "0", "1", "0.5", "1e-05", "a", "[1, null]", "{3: 6}", "{}"]
    assert [shown(value) for value in values] == texts
    assert plain({3: ["1e-4", "rrc", ".inf", "nan1"]}) == {"3": [1e-4, "rrc", ".inf", "nan1"]}


CONDITIONAL = """
question: which?
space:
  target.normalise:
    - {choice: [contrast], when: {target.kind: wavelet}}
    - {choice: [patch, dataset]}
  target.tilt: {uniform: [0, 1], when: {target.kind: wavelet, mask.kind: [random, block]}}
  target.kind: {choice: [wavelet, pixels]}
  mask.kind: {choice: [random, block, energy]}
"""


@pytest.mark.parametrize("source", ["seed", "optuna"])
def test_conditional_settings_are_drawn_only_where_their_conditions_hold(space_of, source):
    space = space_of(CONDITIONAL)
    assert space.settings == ("target.normalise", "target.tilt", "target.kind", "mask.kind")
    trials = optuna_trials(200) if source == "optuna" else [RandomTrial(0, number) for number in range(200)]
    points = [space.suggest(trial) for trial in trials]
    for point in points:
        assert ("target.tilt" in point) == (point["target.kind"] == "wavelet" and point["mask.kind"] != "energy")
        assert (point["target.normalise"] == "contrast") == (point["target.kind"] == "wavelet")
    assert {(point["target.kind"], point["mask.kind"]) for point in points} == {
        (target, mask) for target in ("wavelet", "pixels") for mask in ("random", "block", "energy")
    }
    assert {point["target.normalise"] for point in points} == {"contrast", "patch", "dataset"}
    if source == "optuna":
        names = {name for trial in trials for name in trial.params}
        assert {setting_of(name) for name in names} == set(space.settings)
        assert "target.normalise#2" in names  # alternatives are different parameters: Optuna allows one range for each


def test_a_condition_on_the_recipe_is_settled_at_once(space_of):
    text = "space: {target.tilt: {uniform: [0, 1], when: {target.kind: wavelet}}, mask.ratio: {uniform: [0.4, 0.9]}}"
    assert space_of(text).settings == ("target.tilt", "mask.ratio")
    assert space_of(text, settings=["target.kind=pixels"]).settings == ("mask.ratio",)


def test_weights_are_of_levels_that_the_point_taps(space_of):
    space = space_of(
        "space: {target.weights: {simplex: [1, 2, 3, 4]}}",
        "space: {target.taps: {choice: [{3: 6, 4: 8}, {2: 2, 3: 6, 4: 8}, {4: 8}]}}",
    )
    assert space.settings == ("target.weights.2", "target.weights.3", "target.weights.4", "target.taps")
    points = [space.suggest(RandomTrial(0, number)) for number in range(60)]
    assert {len(point["target.taps"]) for point in points} == {1, 2, 3}
    for point in points:
        weights = {key.rpartition(".")[2]: value for key, value in point.items() if key.startswith("target.weights.")}
        assert set(weights) == set(point["target.taps"])
        assert math.isclose(sum(weights.values()), 1)


def test_levels_without_a_tap_are_left_out(space_of):
    assert space_of("space: {target.weights: {simplex: [1, 2, 3, 4, 5]}}").settings == tuple(
        f"target.weights.{level}" for level in (3, 4)
    )
    assert space_of("space: {target.weights.1: {uniform: [0, 1]}, target.weights.3: {uniform: [0, 1]}}").settings == (
        "target.weights.3",
    )


def test_a_grid_has_all_combinations_once_and_only_those_that_are_possible(space_of):
    space = space_of(
        "space:\n"
        "  decoder.depth: {grid: [1, 2, 3]}\n"
        "  target.kind: {grid: [wavelet, hog]}\n"
        "  target.bins: {grid: [9, 18], when: {target.kind: hog}}\n"
        "  target.normalise: {choice: [patch]}\n"
    )
    points = space.grid()
    assert len(points) == 9 and len({json.dumps(point) for point in points}) == 9
    assert all(point["target.normalise"] == "patch" for point in points)
    assert {point.get("target.bins") for point in points if point["target.kind"] == "hog"} == {9, 18}
    assert [point["decoder.depth"] for point in points] == sorted(point["decoder.depth"] for point in points)


@pytest.mark.parametrize("other", ["choice: [self, cross]", "uniform: [0.25, 1]", "int: [1, 2]"])
def test_a_space_that_is_no_grid_has_no_list_of_points(space_of, other):
    key = {"c": "decoder.attention", "u": "decoder.predict", "i": "decoder.depth"}[other[0]]
    assert space_of(f"space: {{decoder.width: {{grid: [32, 64]}}, {key}: {{{other}}}}}").grid() is None


def test_a_grid_that_is_too_large_is_refused(space_of):
    values = [number / 200 for number in range(1, 120)]
    space = space_of(f"space: {{mask.ratio: {{grid: {values}}}, target.gamma: {{grid: {values}}}}}")
    with pytest.raises(SettingError, match=r"a\.yaml: the grid has more than 10000 points"):
        space.grid()


def test_the_record_says_what_is_drawn_whatever_the_notation(space_of):
    first = space_of("space: {train.lr: {log_uniform: [1e-4, 1e-2]}, decoder.depth: {int_uniform: [1, 3]}}")
    second = space_of("space: {train.lr: {log_uniform: [0.0001, 0.01]}, decoder.depth: {int: [1, 3]}}")
    assert first.record() == second.record() == json.loads(json.dumps(first.record()))
    assert first.record() == {"train.lr": {"log_uniform": [1e-4, 1e-2]}, "decoder.depth": {"int": [1, 3]}}
    assert Choice((1,)).record() == {"choice": [1]}


def test_joined_spaces_vary_what_both_vary(space_of):
    space = space_of(
        "{question: 'how   much?', unit: share, space: {mask.ratio: {uniform: [0.4, 0.9]}}}",
        "{question: 'how deep?', space: {decoder.depth: {int: [1, 4], when: {target.kind: pixels}}}}",
        "space: {target.kind: {choice: [wavelet, pixels]}}",
    )
    assert space.settings == ("mask.ratio", "decoder.depth", "target.kind")
    assert [(one.text, one.unit) for one in space.questions] == [("how much?", "share"), ("how deep?", ""), ("", "")]
    for number in range(30):
        point = space.suggest(RandomTrial(0, number))
        assert ("decoder.depth" in point) == (point["target.kind"] == "pixels")  # a condition on another file


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("mask.ratio: {uniform: [0, 1]}", "mask.ratio: {grid: [0.5]}", "mask.ratio is varied by tune.space="),
        (
            "target.weights: {simplex: [3, 4]}",
            "target.weights.3: {uniform: [0, 1]}",
            "target.weights.3 is varied by tune.space=",
        ),
        (
            "target.taps: {choice: [{3: 6, 4: 8}]}",
            "target.taps.3: {int: [1, 8]}",
            "target.taps and target.taps.3 are varied by tune.space=",
        ),
    ],
)
def test_spaces_that_vary_the_same_setting_are_refused(space_of, first, second, message):
    with pytest.raises(SettingError) as caught:
        space_of(f"space: {{{first}}}", f"space: {{{second}}}")
    assert message in str(caught.value) and "leave it out of one of them" in str(caught.value)
    assert "\n" not in str(caught.value)


MISTAKES = [
    ("[1, 2]", "contains a list, not a mapping of settings"),
    ("space: [mask.ratio]", "the file needs a mapping 'space'"),
    ("{spac: {}, space: {mask.ratio: {grid: [1]}}}", "unknown key 'spac'; did you mean 'space'?"),
    ("{question: [a], space: {mask.ratio: {grid: [1]}}}", "question and unit must be texts"),
    ("space: {mask.ratio: 0.5}", "mask.ratio needs one of uniform, log_uniform, int, choice, grid, simplex"),
    ("space: {mask.ratio: {}}", "mask.ratio needs one of uniform"),
    ("space: {mask.ratio: {unifrom: [0, 1]}}", "'unifrom' is none of them; did you mean 'uniform'?"),
    ("space: {mask.ratio: {uniform: [0, 1], int: [0, 1]}}", "mask.ratio needs one of uniform"),
    ("space: {mask.ratio: {uniform: 0.5}}", "uniform needs [low, high], got 0.5"),
    ("space: {mask.ratio: {uniform: [0.5, 0.5]}}", "uniform needs [low, high], got [0.5, 0.5]"),
    ("space: {mask.ratio: {uniform: [0, .inf]}}", "uniform needs [low, high], got [0, inf]"),
    ("space: {mask.ratio: {uniform: [true, 2]}}", "uniform needs [low, high], got [True, 2]"),
    ("space: {train.lr: {log_uniform: [-1, 1]}}", "log_uniform needs [low, high] above 0"),
    ("space: {decoder.depth: {int: [1, 2.5]}}", "int needs whole numbers, got [1, 2.5]"),
    ("space: {decoder.depth: {int: [1, 4], step: 1.5}}", "int needs whole numbers, got [1, 4] in steps of 1.5"),
    ("space: {mask.ratio: {uniform: [0.4, 0.9], step: 0}}", "step needs a number above 0 and at most 0.5, got 0"),
    ("space: {mask.ratio: {uniform: [0.4, 0.9], step: 0.6}}", "step needs a number above 0 and at most 0.5"),
    (
        "space: {mask.ratio: {uniform: [0.4, 0.9], step: 0.2}}",
        "0.9 is not reached from 0.4 in steps of 0.2; nearest: 0.8 or 1",
    ),
    (
        "space: {mask.ratio: {choice: [0.4, 0.9], step: 0.1}}",
        "step is for uniform, log_uniform, int only, not for choice",
    ),
    ("space: {mask.kind: {choice: random}}", "choice needs a list of values, got random"),
    ("space: {mask.kind: {grid: []}}", "grid needs a list of values, got []"),
    ("space: {train.lr: {choice: [1e-3, 0.001]}}", "choice has 0.001 twice"),
    ("space: {target.weights: {simplex: [3, 3]}}", "simplex has 3 twice"),
    ("space: {target.weights: {simplex: [1, 3]}}", "of its levels the recipe taps only 3"),
    ("space: {target.weights: {simplex: [1, 2]}}", "the recipe taps none of its levels"),
    ("space: {target.weights: {simplex: [a, b]}}", "'a' is not a level"),
    ("space: {mask.ratoi: {uniform: [0, 1]}}", "unknown setting 'mask.ratoi'; did you mean 'mask.ratio'?"),
    ("space: {train.workers: {int: [1, 2]}}", "train.workers cannot be searched: it does not change what is trained"),
    ("space: {seed: {int: [1, 2]}}", "seed cannot be searched"),
    ("space: {mask.ratio: {uniform: [0, 1], when: wavelet}}", "when needs a mapping, such as {target.kind: wavelet}"),
    ("space: {mask.ratio: {uniform: [0, 1], when: {target.knd: x}}}", "did you mean 'target.kind'?"),
    ("space: {mask.ratio: {uniform: [0, 1], when: {mask.ratio: 0.5}}}", "a setting cannot depend on itself"),
    (
        "space: {mask.ratio: {uniform: [0, 1], when: {target.kind: pixel}}, target.kind: {choice: [pixels, hog]}}",
        "when: target.kind=pixel is never drawn; did you mean 'pixels'?",
    ),
    (
        "space: {mask.kind: {choice: [random, block], when: {mask.ratio: 0.5}}, mask.ratio: {uniform: [0, 1]}}",
        "when: mask.ratio: it is drawn from a range",
    ),
    (
        "space: {decoder.depth: {int: [1, 2], when: {decoder.width: 32}}, "
        "decoder.width: {grid: [32, 64], when: {decoder.depth: 2}}}",
        "the conditions (when:) of decoder.depth, decoder.width depend on each other",
    ),
    (
        "space: {decoder.depth: {int: [1, 2], when: {target.taps: 1}}, target.taps.3: {int: [1, 8]}}",
        "when: target.taps: the space varies target.taps.3; name that one",
    ),
    (
        "space: {mask.ratio: [{uniform: [0, 1]}, {grid: [0.5]}]}",
        "entry 2 is never used, since entry 1 has no condition",
    ),
    ("space: {mask.ratio: {uniform: [0, 1], when: {target.kind: hog}}}", "or its conditions never hold"),
    ("space: {mask.ratio: {uniform: [0, 1]}, mask.ratio: {grid: [1]}}", "'space.mask.ratio' is given twice"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_in_a_file_is_one_line_that_names_it(space_of, text, message):
    with pytest.raises(SettingError) as caught:
        space_of(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("tune.space") and "a.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tune.space=[]", "must be the name of a search space"),
        ("tune.space=[1]", "must be the name of a search space"),
        ("tune.space=null", "must be the name of a search space"),
        ("tune.space=[tilt, tilt]", "the same search space is given twice"),
    ],
)
def test_the_setting_takes_a_name_or_a_list_of_names(given, message):
    with pytest.raises(SettingError, match=r"^tune\.space=") as caught:
        load("small", [given])
    assert message in str(caught.value)


def test_a_list_of_one_space_is_that_space():
    assert load("small", ["tune.space=[tilt]"]) == load("small", ["tune.space=tilt"])
    assert load("small", ["tune.space=[tilt, taps]"]).tune.space == ("tilt", "taps")
